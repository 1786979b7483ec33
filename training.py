"""What train.py and distill.py share: optimizers, the learning-rate schedule, the moving average of the weights, and
the running commentary: a loss that is no number, progress, the interrupt, the last words."""

import hashlib
import math
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common import Machine, fail, require_choice, require_in
from data.loader import Data
from model import FlowTransformer
from storage import PLACES


BASELINES = ("ar", "mdlm", "duo", "dense", "mse", "noclock")  # files of baselines/ with a loss that train.py can train

# What a resumed run may not change: with another batch, say, it would read some texts twice and others never.
FIXED = ("optimizer", "beta1", "beta2", "weight_decay", "batch_size", "gradient_accumulation_steps", "seed")


def require_trainable(settings: dict) -> None:
    """What train.py and distill.py ask of the settings that both have."""
    require_choice("optimizer", settings["optimizer"], ("adamw", "muon"))
    require_choice("schedule", settings["schedule"], ("constant", "cosine"))
    require_in(settings, "[1, inf)", "batch_size", "gradient_accumulation_steps", "max_iters", "eval_interval",
               "eval_iters", "log_interval")
    require_in(settings, "(0, inf)", "learning_rate")
    require_in(settings, "[0, inf)", "min_lr", "warmup_iters", "weight_decay", "grad_clip", "seed")
    require_in(settings, "[0, 1)", "beta1", "beta2", "ema_decay", "dropout")
    require_falling(settings)


def require_falling(settings: dict) -> None:
    """Exits when the learning rate would rise along its cosine."""
    if settings["schedule"] == "cosine" and settings["min_lr"] > settings["learning_rate"]:
        fail(f"the cosine would rise from learning_rate={settings['learning_rate']} to min_lr={settings['min_lr']}; lower "
             f"min_lr, or set schedule=constant")


def require_alike(settings: dict, data: Data, step: int, machine: Machine, *models: nn.Module) -> None:
    """Exits unless all processes have the same settings (places apart), data, first step, kind of device, arithmetic and
    weights, of the teacher too. With others their weights would drift apart, and nothing would show it."""
    if machine.world == 1:
        return
    facts = [value for key, value in settings.items() if key not in PLACES]
    facts += [data.meta["tokenizer"], len(data.tokens), step, machine.device.type, machine.dtype]
    facts += [zlib.crc32(p.detach().cpu().numpy()) for model in models for p in model.parameters()]
    digest = float(int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:4], "big"))
    low, minus_high = machine.total(torch.tensor([digest, -digest], dtype=torch.float64), dist.ReduceOp.MIN).tolist()
    if low != -minus_high:
        fail("the processes have different settings, data, checkpoints, arithmetic or kinds of device; give all of them the same")


# ---------------------------------------------------------------- optimizers, schedule, moving average

def make_optimizers(model: nn.Module, optimizer: str, learning_rate: float, betas: tuple[float, float],
                    weight_decay: float, dtype: str) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices between embedding and head and AdamW for the rest. `dtype` is the
    machine's, which it multiplies matrices in.

    Muon also takes the matrices of the time embedding and of the modulations. AdamW moves all weights of a feature of time
    by about as much, and at the learning rates of Muon most of these features ended where SiLU is zero."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in named if p.ndim == 2 and not name.startswith(("embed", "positions", "head"))]
    muon = {id(p) for p in hidden} if optimizer == "muon" else set()
    device = named[0][1].device.type
    optimizers = [torch.optim.AdamW([p for _, p in named if id(p) not in muon], learning_rate, betas,
                                    weight_decay=weight_decay, fused=device in ("cuda", "cpu"))]
    if muon:
        optimizers.append(Muon(hidden, learning_rate, weight_decay, torch.bfloat16 if dtype == "bfloat16" else torch.float32))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum whose step, a matrix, has its singular values made nearly equal (https://kellerjordan.github.io/posts/muon) and
    is rescaled to the size of AdamW's, so that one learning rate serves both.

    Notable, beside torch.optim.Muon: matrices of one shape go through the iteration together, in `dtype`; PyTorch's takes
    bfloat16 everywhere, in which a processor without units for it is more than ten times slower than in float32."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype,
                 momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            of_shape = {}                                                       # (rows, columns) -> matrices
            for p in group["params"]:
                if p.grad is not None:
                    of_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), matrices in of_shape.items():
                for p in matrices:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                averages = [self.state[p]["momentum_buffer"] for p in matrices]
                gradients = torch.stack([p.grad for p in matrices])             # (n, rows, columns)
                torch._foreach_lerp_(averages, list(gradients), 1 - group["momentum"])
                ahead = gradients.lerp_(torch.stack(averages), group["momentum"])       # Nesterov's
                steps = orthogonalized(ahead.to(self.dtype)).to(ahead.dtype)
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, list(steps), alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)


def orthogonalized(x: Tensor) -> Tensor:
    """Matrices U S V^T as U S' V^T, (n, rows, columns): S' lies between about 0.7 and 1.2 but where S is below 1/500 of the
    Frobenius norm, and is smaller there. Five steps of a Newton-Schulz iteration with Jordan's coefficients, made for few
    steps rather than for an exact end."""
    wide = x if x.size(1) <= x.size(2) else x.mT                                # the smaller Gram matrix
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)           # no singular value above 1
    for _ in range(5):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), wide, beta=3.4445)
    return wide if x.size(1) <= x.size(2) else wide.mT


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
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    # float16 only, where the scaler waits for the device anyway: it would step the optimizer whose own gradients are finite
    overflow = machine.scaler.is_enabled() and not norm.isfinite()
    for optimizer in optimizers:
        if not overflow:
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

class LossWatch:
    """Remembers the first step with a loss that is not a finite number, and the times drawn there, on the device: to
    look at every loss would be to wait for it.

    names: what to call the times. Steps count from 1, as in the log.
    """

    def __init__(self, machine: Machine, *names: str):
        self.machine, self.names = machine, names
        self.first = torch.full((1 + len(names),), math.inf, device=machine.device)  # step, times

    def see(self, step: int, losses: Tensor, *times: Tensor) -> None:
        """losses (B,) and times (B,) each of a micro-step."""
        bad = ~losses.isfinite()
        row = bad.int().argmax(0, keepdim=True)                                 # the first such row
        here = torch.cat([torch.where(bad.any(), step, math.inf)[None], *(t.gather(0, row) for t in times)])
        self.first = torch.where(here[0] < self.first[0], here, self.first)

    def check(self) -> None:
        """Exits if there was such a step: the process where it came up first says so. Waits for the device."""
        step, *times = self.first.tolist()
        first = self.machine.total(torch.tensor(step), dist.ReduceOp.MIN).item()
        if first < math.inf:
            if step > first:
                sys.exit(1)
            where = ", ".join(f"{name} = {time:.6g}" for name, time in zip(self.names, times))
            advice = "; try a lower learning_rate" if step > 1 else ""  # the first step has not used it yet
            fail(f"the loss is not a finite number at step {step:.0f}, first for a text at {where}; the last checkpoint "
                 f"is untouched{advice}")


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
    """Speed and time left, and the interrupt: Ctrl-C or SIGTERM lets the step finish and a checkpoint be written. A
    second Ctrl-C ends at once (not under torchrun, which passes the first one on a second time). Under torchrun the end
    of the terminal is an interrupt, too: torchrun passes it on, even where nohup had it ignored."""

    def __init__(self, step: int, max_iters: int, tokens_per_step: int):
        self.max_iters, self.tokens_per_step, self.interrupted, self.stopped = max_iters, tokens_per_step, False, False
        self.step, self.start, self.rate = step, time.perf_counter(), None
        hang_up = dist.is_initialized() and getattr(signal, "SIGHUP", None)     # Windows has none
        for number in (signal.SIGINT, signal.SIGTERM, *([hang_up] if hang_up else [])):
            signal.signal(number, self.stop)

    def stop(self, number, frame):
        if self.interrupted and number == signal.SIGINT and not dist.is_initialized():
            sys.exit(130)
        self.interrupted = True

    def should_stop(self, machine: Machine) -> bool:
        """Whether any process was interrupted. They must agree, or the others would wait for the one that left."""
        self.stopped = bool(machine.total(torch.tensor(float(self.interrupted))))
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
    """The last words of a training script: where the result is, or where an interrupted run can be taken up. All processes
    stay until the checkpoint is written: when one ends, torchrun gives the others 30 seconds."""
    stopped = progress.stopped and step < max_iters
    if stopped:
        save()
    machine.total(torch.zeros(1))
    if machine.main and stopped:
        print(f"stopped at step {step}, saved {path}; continue with --init_from=resume", file=sys.stderr)
    elif machine.main:
        print(f"done: {path}")
    if machine.world > 1:
        dist.destroy_process_group()
    if stopped:
        sys.exit(130)
