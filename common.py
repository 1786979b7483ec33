"""What the programs share: settings, the device and its processes, randomness. No mathematics.

- settings are the plain globals of each script; a config file and `--key=value` replace them, and nothing else can;
- every random number of a run is a function of (seed, what it is for, number of the sample or step), never of how many
  were drawn before. So resuming is exact, and one process or eight draw the same;
- data parallelism is one all-reduce of the gradients after the last micro-step (`average_gradients`), nothing more.
"""

import contextlib
import ctypes
import difflib
import math
import os
import re
import runpy
import signal
import sys
import types
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

def fail(message: str):
    """A mistake of the user: one line on stderr and exit status 1, no traceback."""
    sys.exit("error: " + " ".join(message.splitlines()))


# ---------------------------------------------------------------- settings

def configure(script: dict, argv: list[str]) -> dict:
    """The settings of a script: its lower-case globals of plain type, replaced by `config/file.py` (at most one, first)
    and then by `--key=value` or `--key value`.

    script: the caller's globals(). Returns only the settings; the caller puts them back with globals().update.
    `--key` alone means true. A config file is Python: it may import and compute, and `_names` are its own.
    Exits with one line for an unknown key (naming the nearest), a wrong type, or an unreadable config file. From here on
    Ctrl-C ends the program without a traceback; `Progress` makes it end with a checkpoint.
    """
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    settings = {key: value for key, value in script.items()
                if key.islower() and not key.startswith("_") and type(value) in (bool, int, float, str)}
    if "--help" in argv or "-h" in argv:
        source = Path(script["__file__"]).read_text().split("settings = ")[0]
        print(script["__doc__"], *re.findall(r"^[a-z]\w* = .*|^# --.*", source, re.M), sep="\n")
        sys.exit()
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        path = argv.pop(0)
        if not os.path.isfile(path):  # Path.is_file raises on a name that is too long
            fail(f"no config file {path!r}; there are: {' '.join(sorted(map(str, Path('config').glob('*.py'))))}")
        try:
            assigned = runpy.run_path(path)
        except (Exception, SystemExit) as error:
            fail(f"config file {path}: {type(error).__name__}: {error}")
        for key, value in assigned.items():
            helper = key not in settings and (callable(value) or isinstance(value, types.ModuleType))
            if not (key.startswith("_") or helper):
                settings[key] = checked(settings, key, value, f"in {path}")
    while argv:
        word = argv.pop(0)
        if not word.startswith("--"):
            fail(f"cannot read {word!r}; settings are given as --key=value, a config file comes first")
        key, has_value, value = word[2:].partition("=")
        require_known(settings, key, "on the command line")
        if not has_value and (not argv or argv[0].startswith("--")):
            if type(settings[key]) is not bool:
                fail(f"--{key} needs a value, such as --{key}={settings[key]}")
            value = "true"
        elif not has_value:
            value = argv.pop(0)
        settings[key] = checked(settings, key, value, "on the command line")
    return settings


EXPECTED = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}


def require_known(settings: dict, key: str, where: str) -> None:
    if key not in settings:
        nearest = difflib.get_close_matches(key, settings, n=1, cutoff=0.0)[0]
        fail(f"unknown setting {key!r} {where}; did you mean {nearest!r}?")


def checked(settings: dict, key: str, value: object, where: str) -> object:
    """The value for settings[key], in the type of its default. Exits when there is no such key, the type differs or the
    number is not finite."""
    require_known(settings, key, where)
    default = settings[key]
    wanted = type(default)
    try:
        if isinstance(value, str) and wanted is bool:
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if isinstance(value, str) and wanted in (int, float) or type(value) is int and wanted is float:
            value = wanted(value)
    except (KeyError, ValueError, OverflowError):
        pass
    if type(value) is not wanted or wanted is float and not math.isfinite(value) or wanted is int and abs(value) >> 63:
        with contextlib.suppress(ValueError):  # Python does not print an integer of 5,000 digits
            key = f"{key}={value}"
        fail(f"{key[:200]} {where}: expected {EXPECTED[wanted]}, such as {default!r}")
    return value


def require_choice(key: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        fail(f"{key}={value}: choose {', '.join(choices)}")


def require_in(settings: dict, interval: str, *keys: str) -> None:
    """Exits unless every settings[key] lies in the interval, written as in mathematics: "[0, 1)", "(0, inf)"."""
    low, high = map(float, interval[1:-1].split(","))
    for key in keys:
        value = settings[key]
        if not low <= value <= high or value == low and interval[0] == "(" or value == high and interval[-1] == ")":
            fail(f"{key}={value}: must lie in {interval}")


def parse_steps(text: str) -> list[int]:
    """"1,2,4" -> [1, 2, 4]; exits unless all are integers from 1 to a million."""
    try:
        steps = [int(word) for word in text.split(",")]
    except ValueError:
        steps = [0]
    if min(steps) < 1 or max(steps) > 1_000_000:
        fail(f"steps={text}: expected numbers from 1 to 1,000,000, such as 1 or 1,2,4,8")
    return steps


def parse_positive(name: str, words: list[str], example: str) -> list[float]:
    """The numbers that setting `name` lists, sorted; exits unless all are positive and finite."""
    try:
        values = sorted(float(word) for word in words)
    except ValueError:
        values = [0.0]
    if not all(0 < value < math.inf for value in values):
        fail(f"{name}={','.join(words)}: expected positive numbers such as {example}")
    return values


# ---------------------------------------------------------------- device, processes, randomness

def keep_memory() -> None:
    """On a Linux CPU, keep the memory of freed tensors. glibc returns every large one to the system and asks for it anew:
    clearing its pages then takes up to half the time of a training step (measured in the README). Elsewhere: nothing."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by PyTorch at the first tensor: pages of 2 MiB
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)   # M_MMAP_MAX: no tensor in a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: and none given back


def with_float64(device: str) -> str:
    """The setting `device` of a program that draws tokens, which head.draw does in float64: "auto" passes over Apple GPUs,
    which have none. Exits for "mps"."""
    if device == "mps":
        fail("device=mps: tokens are drawn in float64, which Apple GPUs do not have; use --device=cpu")
    return "cpu" if device == "auto" and not torch.cuda.is_available() else device


class Machine:
    """Where the run happens: device, arithmetic and process group.

    device: "auto" (cuda, else mps, else cpu) or a torch device name; under torchrun each process takes its own GPU.
    dtype: "auto", "bfloat16", "float16" or "float32", the type of matrix products under autocast; weights, times and
    losses stay float32. "auto" takes bfloat16 where the hardware multiplies it, on CPUs too, float16 on older GPUs.
    retain: whether to `keep_memory`.
    """

    def __init__(self, device: str, dtype: str, retain: bool = True):
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        local = os.environ.get("LOCAL_RANK", rank)
        if not (rank.isdecimal() and world.isdecimal() and local.isdecimal() and int(rank) < int(world)):
            fail(f"RANK={rank}, LOCAL_RANK={local} and WORLD_SIZE={world} make no sense; start the processes with torchrun, or "
                 f"unset all three")
        self.rank, self.world, self.main = int(rank), int(world), int(rank) == 0
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            fail(f"device={device}, but this PyTorch sees no CUDA device; use --device=cpu")
        if device.startswith("cuda:") and self.world > 1:
            fail(f"device={device} would put all processes on one GPU; use --device=cuda")
        if device == "cuda" and self.world > 1:
            gpus = torch.cuda.device_count()
            if int(local) >= gpus:
                fail(f"process {rank} is number {local} on this machine, and it sees {gpus} GPUs; start a process for each GPU")
            device = f"cuda:{local}"
        try:
            self.device = torch.device(device)
            if self.device.type not in ("cpu", "cuda", "mps"):
                raise RuntimeError
            torch.ones(1, device=self.device)  # a kernel runs, which a GPU too old for this PyTorch does not have
        except (RuntimeError, AssertionError) as error:
            why = f" ({str(error).splitlines()[0]})" if device.startswith("cuda") and str(error) else ""
            fail(f"device={device}: PyTorch cannot use it here{why}; choose auto, cpu, cuda or mps")
        if self.device.type == "cuda":
            self.device = torch.device("cuda", self.device.index or 0)          # set_device wants a number
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():  # gloo on GPUs too: asking who was interrupted costs no sync
            try:
                dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
                                        timeout=timedelta(minutes=10))
            except (RuntimeError, ValueError) as error:
                fail(f"process {self.rank} did not find the others ({error}); start all of them with torchrun, and on several "
                     f"machines name the network that joins them, such as GLOO_SOCKET_IFNAME=eth0")
        if self.device.type == "cpu" and retain:
            keep_memory()
        require_choice("dtype", dtype, ("auto", "bfloat16", "float16", "float32"))
        self.dtype = fast_dtype(self.device.type) if dtype == "auto" else dtype
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == "float16")

    def autocast(self):
        return torch.autocast(self.device.type, getattr(torch, self.dtype), enabled=self.dtype != "float32")

    def put(self, array: np.ndarray | Tensor) -> Tensor:
        """To the device, without waiting for it."""
        tensor = torch.as_tensor(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def total(self, tensor: Tensor, operation: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
        """The sum of a tensor over all processes, or their minimum: by NCCL if it is on a GPU, else by Gloo. Exits when
        another process has gone: its own words are the ones to read."""
        if self.world > 1:
            try:
                dist.all_reduce(tensor, operation)
            except RuntimeError as error:
                fail(f"process {self.rank} stops: another one ended, see there, or cannot be reached ({error})")
        return tensor

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Data parallelism: replace every gradient by its mean over the processes, in one all-reduce."""
        if self.world > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            flat = self.total(torch.cat([g.flatten() for g in gradients])) / self.world
            torch._foreach_copy_(gradients, [part.view_as(g) for part, g in
                                             zip(flat.split([g.numel() for g in gradients]), gradients)])

    def describe(self) -> str:
        """Processes, processor, threads and type of matrix products: what else is equal where times are compared."""
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        elif self.device.type == "cpu":
            name = f"{processor()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        else:
            name = self.device.type
        return f"{self.world} x {name}, {self.dtype}"


def processor() -> str:
    """What Linux calls it; elsewhere just "cpu"."""
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # no such file; no such line, as on Arm
        return "cpu"


def compiled(model: nn.Module, machine: Machine) -> nn.Module:
    """torch.compile(model), which shares its weights. A trifle is compiled first: exits where that does not work."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=machine.device))
    except Exception as error:
        reason = str(error).splitlines()[0]
        fail(f"compile=true does not work here ({reason}); install a C++ compiler such as g++, or set compile=false")
    return torch.compile(model, dynamic=False)  # a few shapes, each with its own code


def fast_dtype(device_type: str) -> str:
    if device_type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device_type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return "bfloat16"
    return "float32"


def mix(*numbers: int) -> int:
    """A 64-bit seed from a few integers (splitmix64): near numbers give unrelated seeds."""
    x = 0
    for number in numbers:
        x = (x + number + 0x9E3779B97F4A7C15) & (2 ** 64 - 1)
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & (2 ** 64 - 1)
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & (2 ** 64 - 1)
        x ^= x >> 31
    return x


# What random numbers are for, the second number of every seed. What is judged starts from the noise that sample.py draws.
VAL_TIMES, VAL_NOISE, TIMES, DROPOUT, NOISE, SAMPLE_NOISE, SAMPLE_DRAWS, BOUND_NOISE = 2, 3, 4, 5, 6, 7, 9, 10


def generator(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(mix(*numbers))


def sample_normals(seed: int, samples: Iterable[int], L: int, device: torch.device) -> Callable[[int], Tensor]:
    """normal(n) -> (B, L, n) standard normals, row i drawn by a generator that depends on samples[i] and seed alone:
    the same whichever process draws it, and whatever the batch. For flow.latent_noise."""
    generators = [generator(seed, sample, device=device) for sample in samples]
    return lambda n: torch.stack([torch.randn(L, n, generator=g, device=device) for g in generators])
