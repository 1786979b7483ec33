"""Ablation: the denoiser learns by squared error, as image flows do, instead of by cross-entropy. The minimum is the same,
E[x1 | x_t], but a token guessed at 0.01 instead of 0.001 gains next to nothing. All else is flow.py."""

import torch
from torch import Tensor

from baselines.noclock import noise
from flow import Clock, corrupt
from head import sum_by_tokens
from model import FlowTransformer


def squared_error(logits: Tensor, y: Tensor) -> Tensor:
    """|| D - onehot(y) ||^2 = |D|^2 - 2 D[y] + 1, (n, 1), from logits (n, V) and tokens y (n, 1)."""
    D = logits.softmax(-1)
    return D.square().sum(-1, keepdim=True) - 2 * D.gather(-1, y) + 1


def loss(model: FlowTransformer, clock: Clock, y: Tensor, tau: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """The squared error at clock times tau (B,), a token: the mean, to differentiate, and each (B, L)."""
    E = model.embed.weight
    z = corrupt(E, y, clock.t_of_tau(tau), noise(E, y, random))
    total, losses = sum_by_tokens(squared_error, model.head, model(z, tau), y[..., None])
    return total / y.numel(), losses[..., 0]
