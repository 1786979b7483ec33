"""The textbook way, in arrays of shape (B, L, V): flow.py and flowmap.py without their savings.

Noise, one-hot text, their mixture, its product with the embedding, all log-probabilities and their
product with the one-hot text are each computed as written in the paper. The losses equal those of
flow.py and flowmap.py for z0 = x0 E, to rounding. Read it next to them. eval/bench.py measures
against it; train.py --method=dense trains with it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flow import Clock
from flowmap import semigroup_weight


def mixture(x0: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = (1 - t) x0 + t x1 and the one-hot x1: (B, L, V), like x0, from y (B, L) and t (B,)."""
    x1 = F.one_hot(y, x0.size(-1)).to(x0.dtype)
    t = t.to(x0.dtype)[:, None, None]
    return (1 - t) * x0 + t * x1, x1


def embed(x: Tensor, E: Tensor) -> Tensor:
    """x E (B, L, d), in float32 even under autocast, as the authors do: in bfloat16 the V terms of
    the noise would drown the one of the signal."""
    with torch.autocast(x.device.type, enabled=False):
        return x @ E


def flow_losses(model: Callable, clock: Clock, y: Tensor, tau: Tensor, x0: Tensor) -> Tensor:
    """The cross-entropy of each token, nats, (B, L): y (B, L), tau (B,), x0 (B, L, V)."""
    x, x1 = mixture(x0, y, clock.t_of_tau(tau))
    log_p = model.head(model(embed(x, model.embed.weight), tau)).log_softmax(-1)
    return -(x1 * log_p).sum(-1)


def loss(model: Callable, clock: Clock, y: Tensor, tau: Tensor, rng: torch.Generator
         ) -> tuple[Tensor, Tensor]:
    """flow_losses with noise from rng: the mean, to differentiate, and each (B, L)."""
    x0 = torch.randn(*y.shape, model.embed.num_embeddings, generator=rng, device=y.device)
    losses = flow_losses(model, clock, y, tau, x0)
    return losses.mean(), losses.detach()


def semigroup_loss(student: Callable, teacher: Callable, clock: Clock, y: Tensor, tau_s: Tensor,
                   tau_t: Tensor, x0: Tensor, n_diagonal: int) -> Tensor:
    """Mean loss of an FMLM by PSD, nats per token: the first n_diagonal rows learn the teacher's
    denoiser, the others two jumps in one. y (B, L), tau_s and tau_t (B,), x0 (B, L, V)."""
    n, E, tau_u = n_diagonal, student.embed.weight, (tau_s + tau_t) / 2
    s, u, t = (clock.t_of_tau(tau).to(x0.dtype)[:, None, None] for tau in (tau_s, tau_u, tau_t))
    x, _ = mixture(x0, y, clock.t_of_tau(tau_s))
    log_q = student.head(student(embed(x, E), tau_s, tau_t)).log_softmax(-1)
    with torch.no_grad():
        diagonal = teacher.head(teacher(embed(x[:n], E), tau_s[:n])).softmax(-1)
        first = student.head(student(embed(x[n:], E), tau_s[n:], tau_u[n:])).softmax(-1)
        h = ((u - s) / (1 - s))[n:]
        x_u = (1 - h) * x[n:] + h * first
        second = student.head(student(embed(x_u, E), tau_u[n:], tau_t[n:])).softmax(-1)
        g = semigroup_weight(s, u, t)[n:]
        p = torch.cat([diagonal, g * first + (1 - g) * second])
    return -(torch.special.entr(p) + p * log_q).sum(-1).mean()
