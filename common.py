"""What the programs share: settings, the device and its processes, randomness, optimizers, progress. No mathematics.

- settings are the plain globals of each script; a config file and `--key=value` replace them, and nothing else can;
- every random number of a run is a function of (seed, what it is for, index of the sample), never of how many were
  drawn before. So resuming is exact, and one process or eight draw the same noise for the same sample;
- data parallelism is one all-reduce of the gradients after the last micro-step (`average_gradients`), nothing more.
"""

import difflib
import math
import os
import re
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import FlowTransformer


def fail(message: str):
    """A mistake of the user: one line on stderr and exit status 1, no traceback."""
    sys.exit(f"error: {message}")


# ---------------------------------------------------------------- settings

def configure(script: dict, argv: list[str]) -> dict:
    """The settings of a script: its lower-case globals of plain type, replaced by `config/file.py` (at most one, first)
    and then by `--key=value` or `--key value`.

    script: the caller's globals(). Returns only the settings; the caller puts them back with globals().update.
    Exits with one line for an unknown key (naming the nearest), a wrong type, or an unreadable config file.
    """
    settings = {key: value for key, value in script.items()
                if key.islower() and not key.startswith("_") and type(value) in (bool, int, float, str)}
    if "--help" in argv or "-h" in argv:
        source = Path(script["__file__"]).read_text().split("settings = ")[0]
        print(script["__doc__"], *re.findall(r"^[a-z]\w* = .*|^# --.*", source, re.M), sep="\n")
        sys.exit()
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        path = argv.pop(0)
        if not Path(path).is_file():
            fail(f"no config file {path!r}; there are: {' '.join(sorted(map(str, Path('config').glob('*.py'))))}")
        try:
            assigned = runpy.run_path(path)
        except Exception as error:
            fail(f"config file {path}: {type(error).__name__}: {error}")
        for key, value in assigned.items():
            if not key.startswith("_"):
                settings[key] = checked(settings, key, value, f"in {path}")
    while argv:
        word = argv.pop(0)
        if not word.startswith("--"):
            fail(f"cannot read {word!r}; settings are given as --key=value, a config file comes first")
        key, has_value, value = word[2:].partition("=")
        if not has_value:
            if not argv or argv[0].startswith("--"):
                fail(f"--{key} needs a value, as in --{key}=1")
            value = argv.pop(0)
        settings[key] = checked(settings, key, value, "on the command line")
    return settings


def checked(settings: dict, key: str, value: object, where: str) -> object:
    """The value for settings[key], in the type of its default. Exits when there is no such key or the type differs."""
    if key not in settings:
        nearest = difflib.get_close_matches(key, settings, n=1, cutoff=0.0)[0]
        fail(f"unknown setting {key!r} {where}; did you mean {nearest!r}?")
    wanted = type(settings[key])
    try:
        if isinstance(value, str) and wanted is bool:
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if isinstance(value, str) and wanted in (int, float):
            return wanted(value)
        if wanted is float and type(value) is int:
            return float(value)
    except (KeyError, ValueError):
        pass
    if type(value) is not wanted:
        fail(f"{key}={value} {where}: expected {wanted.__name__}, such as {settings[key]!r}")
    return value


def require_choice(key: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        fail(f"{key}={value}: choose {', '.join(choices)}")


def require_positive(settings: dict, *keys: str) -> None:
    for key in keys:
        if settings[key] <= 0:
            fail(f"{key}={settings[key]}: must be positive")


def parse_steps(text: str) -> list[int]:
    """"1,2,4" -> [1, 2, 4]; exits unless all are positive integers."""
    try:
        steps = [int(word) for word in text.split(",")]
    except ValueError:
        steps = [0]
    if min(steps) < 1:
        fail(f"steps={text}: expected positive numbers such as 1 or 1,2,4,8")
    return steps


# ---------------------------------------------------------------- device, processes, randomness

class Machine:
    """Where the run happens: device, arithmetic and process group.

    device: "auto" (cuda, else mps, else cpu) or a torch device name; under torchrun each process takes its own GPU.
    dtype: "auto", "bfloat16", "float16" or "float32", the type of matrix products under autocast; weights, times and
    losses stay float32. "auto" takes bfloat16 where the hardware multiplies it, on CPUs too, float16 on older GPUs.
    """

    def __init__(self, device: str, dtype: str):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            fail(f"device={device}, but this PyTorch sees no CUDA device; use --device=cpu")
        if device == "cuda" and self.world > 1:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        try:
            self.device = torch.device(device)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError):
            fail(f"device={device}: PyTorch cannot use it here; choose auto, cpu, cuda or mps")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
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

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Data parallelism: replace every gradient by its mean over the processes, in one all-reduce."""
        if self.world > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            flat = self.total(torch.cat([g.flatten() for g in gradients])) / self.world
            torch._foreach_copy_(gradients, [part.view_as(g) for part, g in
                                             zip(flat.split([g.numel() for g in gradients]), gradients)])

    def describe(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        return f"{self.world} x {name}{threads}, {self.dtype}"


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


def generator(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(mix(*numbers))


def sample_normals(seed: int, samples: Iterable[int], L: int, device: torch.device) -> Callable[[int], Tensor]:
    """normal(n) -> (B, L, n) standard normals, row i drawn by a generator that depends on samples[i] and seed alone:
    the same whichever process draws it, and whatever the batch. For flow.latent_noise."""
    generators = [generator(seed, sample, device=device) for sample in samples]
    return lambda n: torch.stack([torch.randn(L, n, generator=g, device=device) for g in generators])


# ---------------------------------------------------------------- optimizers, schedule, moving average

def make_optimizers(model: nn.Module, optimizer: str, learning_rate: float, betas: tuple[float, float],
                    weight_decay: float) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices inside the blocks and AdamW for the rest."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in named if p.ndim == 2 and re.search(r"(qkv|attn_out|mlp_in|mlp_out)\.weight", name)]
    muon = {id(p) for p in hidden} if optimizer == "muon" else set()
    device = named[0][1].device.type
    optimizers = [torch.optim.AdamW([p for _, p in named if id(p) not in muon], learning_rate, betas,
                                    weight_decay=weight_decay, fused=device in ("cuda", "cpu"))]
    if muon:  # its step is rescaled to the size of AdamW's, so that one learning rate serves both
        optimizers.append(torch.optim.Muon(hidden, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def optimizer_step(model: nn.Module, optimizers: list[torch.optim.Optimizer], machine: Machine, grad_clip: float
                   ) -> Tensor:
    """Average the gradients over the processes, clip, step. Returns the norm before clipping, still on the device."""
    machine.average_gradients(model.parameters())
    for optimizer in optimizers:
        machine.scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    for optimizer in optimizers:
        machine.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    machine.scaler.update()
    return norm


def learning_rate_at(step: int, peak: float, final: float, schedule: str, warmup_iters: int, max_iters: int) -> float:
    """Linear warm-up to `peak`, then "constant", or "cosine" down to `final` at max_iters."""
    if step < warmup_iters:
        return peak * (step + 1) / warmup_iters
    if schedule == "constant":
        return peak
    done = min(1.0, (step - warmup_iters) / max(1, max_iters - warmup_iters))
    return final + (peak - final) * (1 + math.cos(math.pi * done)) / 2


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """ema <- decay ema + (1 - decay) model, with decay at most (1 + step)/(10 + step) so that the start is forgotten."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), weight)


# ---------------------------------------------------------------- the run

def require_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        fail(f"the loss became {loss} at step {step}; the last checkpoint is untouched; try a lower learning_rate")


def share_of_steps(gradient_accumulation_steps: int, machine: Machine) -> int:
    """How many of a step's micro-steps this process takes."""
    if gradient_accumulation_steps % machine.world:
        fail(f"gradient_accumulation_steps={gradient_accumulation_steps} must be a multiple of the {machine.world} "
             f"processes, which share the micro-steps of a step")
    return gradient_accumulation_steps // machine.world


def announce(what: str, model: FlowTransformer, machine: Machine, train_tokens: int, tokens_per_step: int,
             max_iters: int, path: Path, passes: float) -> None:
    """Print what a person wants to know before a run. passes: forward passes a token costs, a backward counting two."""
    n = sum(p.numel() for p in model.parameters())
    used = n - model.embed.weight.numel()  # looking a row up costs nothing; the head is a matrix product
    tokens = tokens_per_step * max_iters
    print(f"{what}: {n / 1e6:.2f} M parameters, vocabulary {model.config.vocab_size:,}, "
          f"{model.config.block_size} tokens a sequence")
    print(f"machine: {machine.describe()}")
    print(f"run: {max_iters:,} steps of {tokens_per_step:,} tokens = {tokens / 1e6:.1f} M tokens "
          f"({tokens / train_tokens:.1f} epochs), about {2 * passes * used * tokens:.1e} floating-point operations "
          f"-> {path}", flush=True)


def bin_means(sums: Tensor, counts: Tensor) -> list[float | None]:
    """sums / counts, None where a bin is empty."""
    return [s / n if n else None for s, n in zip(sums.tolist(), counts.tolist())]


def show(bins: Iterable[float | None]) -> str:
    return " ".join("-" if x is None else f"{x:.2f}" for x in bins)


class Progress:
    """Speed and time left, and the interrupt: Ctrl-C or SIGTERM lets the step finish and a checkpoint be written."""

    def __init__(self, step: int, max_iters: int, tokens_per_step: int):
        self.max_iters, self.tokens_per_step, self.interrupted, self.stopped = max_iters, tokens_per_step, False, False
        self.step, self.start, self.rate = step, time.perf_counter(), None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, number, frame):
        self.interrupted = True

    def should_stop(self, step: int, machine: Machine) -> bool:
        """Whether any process was interrupted. They must agree, or the others would wait for the one that left: they
        ask each other every tenth step."""
        if machine.world == 1:
            self.stopped = self.interrupted
        elif step % 10 == 0:
            self.stopped = bool(machine.total(torch.tensor(float(self.interrupted), device=machine.device)))
        return self.stopped

    def restart(self, step: int) -> None:
        """Leave out of the speed what was not training."""
        self.step, self.start = step, time.perf_counter()

    def line(self, step: int) -> str:
        """'12.3k tok/s, 1:05 left', measured since the last call."""
        now = time.perf_counter()
        seconds = (now - self.start) / max(1, step - self.step)
        self.step, self.start = step, now
        self.rate = seconds if self.rate is None else 0.7 * self.rate + 0.3 * seconds
        left = int((self.max_iters - step) * self.rate)
        clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}" if left >= 3600 else f"{left // 60}:{left % 60:02}"
        return f"{self.tokens_per_step / seconds / 1000:.1f}k tok/s, {clock} left"


def finish(progress: Progress, step: int, max_iters: int, path: Path, save: Callable[[], None], machine: Machine):
    """The last words of a training script: where the result is, or where an interrupted run can be taken up."""
    if progress.stopped and step < max_iters:
        save()
        if machine.main:
            print(f"stopped at step {step}, saved {path}; continue with --init_from=resume", file=sys.stderr)
    elif machine.main:
        print(f"done: {path}")
    if machine.world > 1:
        dist.destroy_process_group()
    if progress.stopped and step < max_iters:
        sys.exit(130)
