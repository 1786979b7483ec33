"""The learning rate's schedule, and Muon.

Muon is as in torch.optim.Muon with adjust_lr_fn="match_rms_adamw" (the tests compare them), but
matrices of one shape go through the iteration together, and in float32 where the run is in float32:
PyTorch's takes bfloat16, which is tens of times slower on a processor without units for it."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def learning_rate_at(step: int, settings: dict) -> float:
    """Linear warm-up, then constant, or a cosine down to min_lr at max_iters."""
    peak, warmup, last, iters = (settings[key] for key in (
        "learning_rate", "warmup_iters", "min_lr", "max_iters"))
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings["schedule"] == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, iters - warmup))
    return last + (peak - last) * (1 + math.cos(math.pi * done)) / 2


class Muon(torch.optim.Optimizer):
    """Momentum whose step, a matrix, has its singular values made nearly equal
    (https://kellerjordan.github.io/posts/muon) and is rescaled to the size of AdamW's, so that one
    learning rate serves both."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float,
                 in_bfloat16: bool, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = torch.bfloat16 if in_bfloat16 else torch.float32

    @torch.no_grad()
    def step(self) -> None:
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape = {}                                           # (rows, columns) -> matrices
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), matrices in by_shape.items():
                averages = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                            for p in matrices]
                gradients = torch.stack([p.grad for p in matrices])             # (n, rows, columns)
                torch._foreach_lerp_(averages, list(gradients), 1 - group["momentum"])
                ahead = gradients.lerp_(torch.stack(averages), group["momentum"])       # Nesterov
                steps = orthogonalized(ahead.to(self.dtype)).to(ahead.dtype)
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, list(steps),
                                    alpha=-0.2 * group["lr"] * max(rows, columns) ** 0.5)


def orthogonalized(x: Tensor) -> Tensor:
    """Matrices U S V^T as U S' V^T, (n, rows, columns), S' between about 0.7 and 1.2 except where S
    is below 1/500 of the Frobenius norm, and smaller there: five steps of a Newton-Schulz iteration
    with Jordan's coefficients, made for few steps rather than for an exact end."""
    wide = x if x.size(1) <= x.size(2) else x.mT                    # the smaller Gram matrix
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)           # all S at most 1
    for _ in range(5):
        gram = wide @ wide.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        wide = torch.baddbmm(wide, polynomial, wide, beta=3.4445)
    return wide if x.size(1) <= x.size(2) else wide.mT
