"""Mending: a last stage of distillation, ours, for better texts in few steps. Used by distill.py.

The full jump of a flow map decides between all texts at once. Near the border between two of them
a small network writes a mixture, and better targets hardly help: the noise does say which text the
flow would reach, but in a way that the network cannot follow. Mending asks for less. Any text will
do that is right and near what the student writes anyway, as long as every word is written as often
as in real text.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flow import (Clock, Given, by_tokens, corrupt, cross_entropy, latent_noise, most_likely, move,
                  per_sample)

NOISE_SCALE = 0.5   # the size of the noise, by that of the flow
LATER = 0.6         # where the teacher looks at a draft, as part of the way from tau to 1
ROUNDS = 2          # of mending a draft; one round leaves more mistakes
BIAS_STEP = 0.1     # by which the bias of a token rises in a step that does not write it


def shared_noise(E: Tensor, shape: tuple[int, int], rng: torch.Generator,
                 factor: Tensor | None = None) -> Tensor:
    """The noise (B, L, d) of a mended map: half of latent_noise, and the same at every token.

    Tokens with noise of their own have to agree on a text by attention. With the same noise each
    can tell by itself which text it is. A flow map reads such noise without being trained on it.
    """
    B, L = shape
    return NOISE_SCALE * latent_noise(E, (B, 1), rng, factor).expand(B, L, E.size(1))


def noise_of(checkpoint: dict) -> Callable:
    """What draws the noise of a checkpoint's network: shared_noise for a mended map, latent_noise
    for others. A map that an earlier version mended (weights/chat) has its size in noise_scale."""
    if checkpoint.get("mended"):
        return shared_noise
    return lambda *args: checkpoint.get("noise_scale", 1) * latent_noise(*args)


def noise_of_rounds(checkpoint: dict, draw: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What draws the noise (B, L, d) of each round of refinement, given what draws it once. It is
    fresh, but for a mended map, which tells texts apart by their noise. From fresh noise such a map
    would go on with another text, so every round starts from the noise of the first."""
    if not checkpoint.get("mended"):
        return draw
    first = draw()
    return lambda: first


def mending_loss(student: Callable, draft_net: Callable, teacher: Callable, clock: Clock,
                 y: Tensor, tau: Tensor, rng: torch.Generator, frequency: Tensor, bias: Tensor,
                 factor: Tensor | None = None, known: Tensor | None = None, by_map: bool = False
                 ) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of jumps from tau (B,) to the end, with shared_noise from rng: the mean
    cross-entropy of mended drafts in nats per token, each token's (B, L) without gradient, and
    zeros (B, L), for the mass that other objectives cut from their targets.

    A draft x is the text that draft_net, the moving average of the student, jumps to from noise z0.
    The student jumps from z: from z0 itself, or for tau > 0 from x with fresh noise, where a
    sampler's next step would find it. The student's aim is the draft, mended: take x for the end of
    a straight path from z, and let the frozen teacher say at a later point of it which token is
    likeliest at each place: by a jump to the end (by_map), or by the denoiser of a flow. This text
    ends another path from z, and so on, ROUNDS times. After long training the flow mends better.

    From its own drafts alone the student would soon write few words and kinds of text, those that
    are easy. So bias (V,) is added to the logits of drafts, and moved here, in place: up for tokens
    that they have more rarely than real text, whose shares are frequency (V,), down for others.
    (Mixtures of experts balance their load like this, arXiv 2408.15664.)

    y (B, L): the texts of which known (B, L) tokens are told; factor: as for flowmap.loss.
    """
    E, end, start = student.embed.weight, torch.ones_like(tau), torch.zeros_like(tau)
    t = clock.t_of_tau(tau)
    z0, again = (shared_noise(E, y.shape, rng, factor) for _ in range(2))       # (B, L, d)

    def told(net: Callable) -> Callable:
        return net if known is None else Given(net, y, known)

    with torch.no_grad():
        hidden = told(draft_net)(z0, start, end)
        x = by_tokens(lambda hidden: (draft_net.head(hidden) + bias).argmax(-1), draft_net.head,
                      hidden)                                       # (B, L)
        free = torch.ones_like(x, dtype=bias.dtype)                 # 0 in texts told tokens
        if known is not None:
            free *= ~known.any(1, keepdim=True)
        one = 1 / free.sum().clamp_min(1)                           # the share of a single token
        share = torch.zeros_like(bias).index_add_(0, x.flatten(), free.flatten()) * one
        bias += free.any() * BIAS_STEP * (frequency - share) / frequency.maximum(one)
        z = torch.where(per_sample(tau, z0) > 0, corrupt(E, x, t, again), z0)
        later = torch.lerp(tau, end, LATER)
        times = (later, end) if by_map else (later,)
        for _ in range(ROUNDS):
            z_later = move(z, F.embedding(x, E), t, clock.t_of_tau(later))
            x = most_likely(teacher.head, told(teacher)(z_later, *times))
    mean, losses = cross_entropy(student.head, told(student)(z, tau, end), x, known)
    return mean, losses, torch.zeros_like(losses)
