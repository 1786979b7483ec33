"""Where a run happens: device, arithmetic, processes, random seeds; its speed and interrupts."""

import ctypes
import os
import re
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lib.settings import fail, require_choice

# ------------------------------------------------------------------------------ device, processes

class Machine:
    """The device, the arithmetic and the process group of a run.

    device: "auto" (cuda, else mps, else cpu) or a torch device name; under torchrun every process
    takes its own GPU.
    dtype: of matrix products under autocast; weights, times and losses stay float32. "auto" takes
    the fastest that the hardware multiplies: bfloat16, on CPUs too, float16 on older GPUs.
    retain: whether to `keep_memory`.
    """

    def __init__(self, device: str, dtype: str, retain: bool = True):
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        local = os.environ.get("LOCAL_RANK", rank)
        if not all(map(str.isdecimal, (rank, world, local))) or int(rank) >= int(world):
            fail(f"RANK={rank}, LOCAL_RANK={local} and WORLD_SIZE={world} make no sense; start the "
                 f"processes with torchrun, or unset all three")
        self.rank, self.world, self.main = int(rank), int(world), int(rank) == 0
        self.device = find_device(device, int(local), self.world)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            # gloo beside nccl: asking who was interrupted must not wait for the GPU
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            try:
                # The others wait while one writes a checkpoint, which may take long. That a process
                # has ended they notice at once.
                store, *_ = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
                # After a restart torchrun's store still holds the old processes' addresses. (With
                # --rdzv_backend=c10d agents may count restarts differently; the recipes do not.)
                attempt = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
                dist.init_process_group(backend, timeout=timedelta(hours=2), store=attempt,
                                        rank=self.rank, world_size=self.world)
            except (RuntimeError, ValueError) as error:
                fail(f"process {self.rank} did not find the others ({error}); start all of them "
                     f"with torchrun, and on several machines name the network that joins them, "
                     f"such as GLOO_SOCKET_IFNAME=eth0")
        if self.device.type == "cpu" and retain:
            keep_memory()
        require_choice("dtype", dtype, ("auto", "bfloat16", "float16", "float32"))
        self.dtype = fast_dtype(self.device.type) if dtype == "auto" else dtype
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == "float16")

    def autocast(self):
        dtype = getattr(torch, self.dtype)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def put(self, array: np.ndarray | Tensor) -> Tensor:
        """To the device, without waiting for it."""
        tensor, cuda = torch.as_tensor(array), self.device.type == "cuda"
        return (tensor.pin_memory() if cuda else tensor).to(self.device, non_blocking=cuda)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes. Exits when another process has gone."""
        if self.world > 1:
            try:
                dist.all_reduce(tensor)
            except RuntimeError as error:
                fail(f"process {self.rank} stops: another one ended, see there, or cannot be "
                     f"reached ({error})")
        return tensor

    def describe(self) -> str:
        """Processes, processor, threads and dtype: what must be equal where times are compared."""
        name = self.device.type
        if name == "cuda":
            name = torch.cuda.get_device_name(self.device)
        elif name == "cpu":
            capability = torch.backends.cpu.get_cpu_capability()
            name = f"{processor()} {capability}, {torch.get_num_threads()} threads"
        return f"{self.world} x {name}, {self.dtype}"


def find_device(name: str, local_rank: int, world: int) -> torch.device:
    """The device of a process, checked by running a kernel. Exits where it cannot be used."""
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    if name.startswith("cuda") and not torch.cuda.is_available():
        fail(f"device={name}, but this PyTorch sees no CUDA device; use --device=cpu")
    if name.startswith("cuda:") and world > 1:
        fail(f"device={name} would put all processes on one GPU; use --device=cuda")
    if name == "cuda" and world > 1:
        if local_rank >= (gpus := torch.cuda.device_count()):
            fail(f"process {local_rank} of this machine has no GPU of its own: it sees {gpus}; "
                 f"start one process for each GPU")
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        torch.ones(1, device=device)  # fails on a GPU too old for this PyTorch
    except (RuntimeError, AssertionError) as error:
        why = f" ({str(error).splitlines()[0]})" if name.startswith("cuda") and str(error) else ""
        fail(f"device={name}: PyTorch cannot use it here{why}; choose auto, cpu, cuda or mps")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def with_float64(device: str) -> str:
    """The setting `device` where tokens are drawn, in float64: "auto" passes over Apple GPUs."""
    if device == "mps":
        fail("device=mps: drawing tokens takes float64, which Apple GPUs lack; use --device=cpu")
    return "cpu" if device == "auto" and not torch.cuda.is_available() else device


def fast_dtype(device_type: str) -> str:
    """The fastest dtype that the hardware multiplies."""
    if device_type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    cpu = torch.cpu
    if device_type == "cpu" and (cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported()):
        return "bfloat16"
    return "float32"


def keep_memory() -> None:
    """On a Linux CPU, keep the memory of freed tensors. glibc returns every large one to the system
    and asks again; clearing the pages then takes up to half of a training step (docs/speed.md)."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch reads it once: pages of 2 MiB
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)   # M_MMAP_MAX: no tensor in a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give memory back


def processor() -> str:
    """The processor's name on Linux; elsewhere just "cpu"."""
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # no such file; no such line, as on Arm
        return "cpu"

# ------------------------------------------------------------------------------ randomness

# Random streams: the second component of every seed.
VAL_TIMES, VAL_NOISE, TIMES, DROPOUT, NOISE = 2, 3, 4, 5, 6
SAMPLE_NOISE, BOUND_NOISE = 7, 10


def mix(*numbers: int) -> int:
    """A 64-bit seed from a few integers (splitmix64): near numbers give unrelated seeds."""
    x = 0
    for number in numbers:
        x = (x + number + 0x9E3779B97F4A7C15) & (2 ** 64 - 1)
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & (2 ** 64 - 1)
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & (2 ** 64 - 1)
        x ^= x >> 31
    return x


def generator(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose numbers are a function of these: (seed, stream, step, ...)."""
    return torch.Generator(device).manual_seed(mix(*numbers))

# ------------------------------------------------------------------------------ the run

class Progress:
    """Speed, time left, and the interrupt: Ctrl-C or SIGTERM lets the step finish and be saved. A
    second Ctrl-C ends at once, but not under torchrun, which repeats the first."""

    def __init__(self, step: int, max_iters: int, tokens_per_step: int):
        self.max_iters, self.tokens_per_step = max_iters, tokens_per_step
        self.step, self.start, self.rate = step, time.perf_counter(), None
        self.interrupted = False
        signal.signal(signal.SIGINT, self.stop)
        signal.signal(signal.SIGTERM, self.stop)

    def stop(self, number, frame):
        if self.interrupted and number == signal.SIGINT and not dist.is_initialized():
            sys.exit(130)
        self.interrupted = True

    def should_stop(self, machine: Machine) -> bool:
        """Whether any process was interrupted. All must agree, or the others would wait for it."""
        return bool(machine.total(torch.tensor(float(self.interrupted))))

    def restart(self, step: int) -> None:
        """Leave validation out of the speed."""
        self.step, self.start = step, time.perf_counter()

    def line(self, step: int) -> str:
        """'12.3k tok/s, 1:05 left', measured since the last call."""
        seconds = (time.perf_counter() - self.start) / max(1, step - self.step)
        self.restart(step)
        self.rate = seconds if self.rate is None else 0.7 * self.rate + 0.3 * seconds
        minutes, left = divmod(int((self.max_iters - step) * self.rate), 60)
        hours = f"{minutes // 60}:{minutes % 60:02}" if minutes >= 60 else f"{minutes}"
        return f"{self.tokens_per_step / seconds / 1000:.1f}k tok/s, {hours}:{left:02} left"
