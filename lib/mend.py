"""Mending: a second stage of distillation, ours, for better texts in few steps. Used by distill.py.

The full jump of a flow map decides between all texts at once. Near the border between two of them
a small network writes a mixture, and better targets hardly help: the noise does say which text the
flow would reach, but in a way that the network cannot follow. Mending asks for less. Any text will
do that is right and near what the student writes anyway.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flow import Clock, Given, corrupt, cross_entropy, latent_noise, most_likely, move

EARLIEST, LATEST = 0.3, 0.9      # from where a draft is jumped on, as part of the way from tau to 1
ROUNDS = 2                       # jumps that mend a draft; one leaves more mistakes


def mending_loss(student: Callable, draft_net: Callable, flow_map: Callable, clock: Clock,
                 y: Tensor, tau: Tensor, rng: torch.Generator, noise_scale: float = 1.0,
                 factor: Tensor | None = None, known: Tensor | None = None
                 ) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of jumps from tau (B,) to the end, on texts y (B, L) with noise from rng: the mean
    cross-entropy of mended drafts in nats per token, each token's (B, L) without gradient, and
    zeros (B, L), for the mass that other objectives cut from their targets.

    A draft x is the text that a network jumps to from z. Take it for the end of a straight path,
    (1 - h) z + h E[x], and jump on from a later point of that path by the frozen flow_map. The text
    this reaches is the draft, mended. It ends another straight path, and so on, ROUNDS times.

    draft_net: half of the drafts are its, the moving average of the student: the student learns
    from its own mistakes. The other half are the flow map's. Without those, the texts that are easy
    to write crowd out the others.
    noise_scale: the noise has this times the size of the flow's. The flow map was not trained on
    less noise, but with less it tells the kinds of text more evenly, and the student learns faster.
    factor, known: as for flowmap.loss.
    """
    E, end, n = student.embed.weight, torch.ones_like(tau), len(y) // 2
    z0 = noise_scale * latent_noise(E, y.shape, rng, factor)        # (B, L, d)
    z = corrupt(E, y, clock.t_of_tau(tau), z0)

    def told(net: Callable, rows: slice = slice(None)) -> Callable:
        return net if known is None else Given(net, y[rows], known[rows])

    with torch.no_grad():
        x = torch.cat([most_likely(net.head, told(net, rows)(z[rows], tau[rows], end[rows]))
                       for net, rows in ((flow_map, slice(n)), (draft_net, slice(n, None)))])
        for _ in range(ROUNDS):
            part = torch.rand(tau.shape, generator=rng, dtype=tau.dtype, device=tau.device)
            later = torch.lerp(tau, end, EARLIEST + (LATEST - EARLIEST) * part)
            z_later = move(z, F.embedding(x, E), clock.t_of_tau(tau), clock.t_of_tau(later))
            x = most_likely(flow_map.head, told(flow_map)(z_later, later, end))
    mean, losses = cross_entropy(student.head, told(student)(z, tau, end), x, known)
    return mean, losses, torch.zeros_like(losses)
