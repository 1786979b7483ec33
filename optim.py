"""Optimizers, the learning-rate schedule and the moving average of the weights, for train.py and distill.py."""

import math
import re

import torch
from torch import Tensor, nn

from common import Machine


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
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
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
