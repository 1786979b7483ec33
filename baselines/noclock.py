"""Ablation: a flow without a clock. Training draws t itself uniformly, the network is told t, and
the sampler steps evenly in t, although with many tokens nothing can be decoded for most of it."""

from collections.abc import Callable

import torch
from torch import Tensor

import flow


class NoClock:
    """The part of flow.Clock that losses and samplers use, with tau = t."""

    def __init__(self, clock: flow.Clock):
        self.t = clock.t

    def tau_of_t(self, t: Tensor) -> Tensor:
        return t.to(self.t.dtype)

    t_of_tau = tau_of_t


def loss(model: Callable, clock: flow.Clock, y: Tensor, tau: Tensor, rng: torch.Generator
         ) -> tuple[Tensor, Tensor]:
    """flow.loss at t = tau (B,)."""
    return flow.loss(model, NoClock(clock), y, tau, rng)
