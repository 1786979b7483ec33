"""Ablation: a flow without a clock. Time is drawn evenly in t itself, the network is told t and the sampler steps evenly
in t, although with many tokens nothing can be decoded for most of the way. All else is flow.py."""

import torch
from torch import Tensor

from flow import Clock, flow_loss, latent_noise, noise_factor
from model import FlowTransformer


class NoClock:
    """What flow.Clock offers, with tau = t."""

    def __init__(self, clock: Clock):
        self.t = clock.t

    def tau_of_t(self, t: Tensor) -> Tensor:
        return t.to(self.t.dtype)

    t_of_tau = tau_of_t


def noise(E: Tensor, y: Tensor, random: torch.Generator) -> Tensor:
    """z0 (B, L, d) for tokens y (B, L), from one generator."""
    def normal(n):
        return torch.randn(*y.shape, n, generator=random, device=y.device)
    return latent_noise(E, noise_factor(E, y.numel()), normal)


def loss(model: FlowTransformer, clock: Clock, y: Tensor, tau: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """The cross-entropy of the denoiser at t = tau (B,), nats a token: the mean, to differentiate, and each (B, L)."""
    return flow_loss(model, NoClock(clock), y, tau, noise(model.embed.weight, y, random))
