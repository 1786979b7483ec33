"""Ablation: squared error instead of cross-entropy, as image flows use. The minimum is the same,
E[x1 | x_t], but guessing a token at 0.01 instead of 0.001 gains next to nothing."""

from collections.abc import Callable

import torch
from torch import Tensor

from flow import Clock, corrupt, latent_noise, sum_by_tokens


def squared_error(logits: Tensor, y: Tensor) -> Tensor:
    """|| D - onehot(y) ||^2 = |D|^2 - 2 D[y] + 1, (n, 1), from logits (n, V), tokens y (n, 1)."""
    D = logits.softmax(-1)
    return D.square().sum(-1, keepdim=True) - 2 * D.gather(-1, y) + 1


def loss(model: Callable, clock: Clock, y: Tensor, tau: Tensor, rng: torch.Generator
         ) -> tuple[Tensor, Tensor]:
    """flow.loss with the squared error of each token: the mean, to differentiate, and (B, L)."""
    E = model.embed.weight
    z = corrupt(E, y, clock.t_of_tau(tau), latent_noise(E, y.shape, rng))
    total, losses = sum_by_tokens(squared_error, model.head, model(z, tau), y[..., None])
    return total / y.numel(), losses[..., 0]
