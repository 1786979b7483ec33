"""Duo, uniform-state diffusion, and its distillation DCD: the mathematics, no input or output.

Uniform-state diffusion replaces tokens where a flow adds noise. Time tau runs from 0 (noise) to 1
(the text). A token y is kept with probability tau, otherwise drawn anew from all V. So it is v with
probability

    q(v | y) = xbar_v / V,        xbar = V tau onehot(y) + 1 - tau.

Wrong tokens carry no mark, and every step may change every token: early mistakes can be mended.

**Duality.** The argmax of the x_t of flow.py has this very law, with tau = tau(t) of `flow.Clock`,
which is the papers' T(alpha~): only t / (1 - t) = alpha~ / sigma~ matters to an argmax. A flow and
Duo see the same noise on the same clock; Duo keeps the largest coordinate and forgets the others.

**The bound.** On the way to y, token z becomes v at the rate R_v / (V tau), R_v = xbar_v / xbar_z.
The model jumps at the rate Rhat_v / (V tau), with D in place of onehot(y), and pays the divergence
of the two jump processes:

    -log p(y) <= integral over tau of
                 1 / (V tau) E sum_l sum_v [Rhat_v - R_v + R_v log(R_v / Rhat_v)].

It is an equality where D[l] is the law of y_l given all *other* tokens of z. D must not weigh z_l
itself: the sampler does that, in q(z_t | z_s, D), and would count it twice.

**Discrete consistency distillation** (DCD). With fixed Gaussian noise, argmax x_t follows a
deterministic path to y. The student learns to guess at tau what its teacher guesses a step further
along this path. Then the student becomes the teacher of steps twice as long. Here steps are even in
tau, like the sampler's; the authors' are even in log(alpha~ / sigma~).

The papers' time runs the other way; their alpha is tau here, drawn evenly. Sahoo et al., 2025,
arXiv 2506.10892.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.mdlm import EDGE, reverse_kl
from flow import Clock, by_tokens, draw_from, sum_by_tokens
from model import FlowTransformer


def path(y: Tensor, V: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The noise of tokens y (B, L) at all times, (rank, other), (B, L) each: a token is `other`,
    uniform among the V - 1 wrong ones, until tau + (1 - tau) / V exceeds `rank`, uniform on [0, 1];
    then it is y.

    These are exactly the paths of argmax x_t, without the V Gaussians. The argmax is the best wrong
    coordinate of the noise until t / (1 - t) exceeds its lead over y's, then y. Which coordinate
    that is tells nothing of the lead, and the chance that the lead is made up by tau is
    tau + (1 - tau) / V, by definition of the clock.
    """
    other = (y + torch.randint(1, V, y.shape, generator=rng, device=y.device)) % V
    return torch.rand(y.shape, generator=rng, device=y.device), other


def at(tau: Tensor, y: Tensor, V: int, rank: Tensor, other: Tensor) -> Tensor:
    """The tokens z (B, L) on the paths to y (B, L) at tau (B,)."""
    return torch.where(rank < (tau + (1 - tau) / V)[:, None], y, other)


def bound(logits: Tensor, y: Tensor, z: Tensor, tau: Tensor) -> Tensor:
    """The integrand of the bound, nats, (n, 1), from logits (n, V), tokens y, z and times tau
    (n, 1) each.

    sum_v R_v = V / xbar_z, and sum_v R_v f_v = V / xbar_z E f_v with v ~ q(v | y), which mixes f_y
    with the mean of all f_v: no one-hot arrays. Only log xbar is formed, by log1p, since at small
    tau every xbar is nearly 1.
    """
    V = logits.size(-1)
    right, wrong = torch.log1p(tau * (V - 1)), torch.log1p(-tau)    # log xbar at y, elsewhere
    true_z = torch.where(z == y, right, wrong)
    true_mean = tau * right + (1 - tau) * (right + (V - 1) * wrong) / V     # E log xbar_v
    ours = torch.log1p(tau * (V * logits.softmax(-1) - 1))          # the same of D, (n, V)
    ours_z = ours.gather(-1, z)
    ours_mean = tau * ours.gather(-1, y) + (1 - tau) * ours.mean(-1, keepdim=True)
    gain = torch.expm1(-ours_z) - torch.expm1(-true_z)              # 1 / xbarhat_z - 1 / xbar_z
    return (gain + torch.exp(-true_z) * ((true_mean - true_z) - (ours_mean - ours_z))) / tau


def loss(model: FlowTransformer, clock: Clock | None, y: Tensor, tau: Tensor, rng: torch.Generator
         ) -> tuple[Tensor, Tensor]:
    """For uniform tau (B,) an unbiased estimate of a bound on -log p(y), nats per token: its mean,
    to differentiate, and each (B, L), from tokens y (B, L)."""
    E, V, tau = model.embed.weight, model.config.vocab_size, tau.clamp(EDGE, 1 - EDGE)
    z = at(tau, y, V, *path(y, V, rng))
    total, losses = sum_by_tokens(bound, model.head, model(F.embedding(z, E), tau), y[..., None],
                                  z[..., None], tau[:, None, None].expand(*y.shape, 1))
    return total / y.numel(), losses[..., 0]


def posterior(D: Tensor, z: Tensor, s: float, t: float) -> Tensor:
    """q(z_t | z_s, D), (n, V), for times s < t, in proportion to q(z_s | z_t) q(z_t | D):

        (s/t 1[v = z_s] + (1 - s/t) / V) (t D_v + (1 - t) / V),

    from D (n, V) and z_s (n, 1)."""
    V, kept = D.size(-1), s / t
    marginal = t * D + (1 - t) / V
    joint = (1 - kept) / V * marginal
    joint = joint.scatter_add(-1, z, kept * marginal.gather(-1, z))
    return joint / joint.sum(-1, keepdim=True)


@torch.no_grad()
def sample(model: FlowTransformer, clock: Clock | None, B: int, L: int, steps: int,
           rng: torch.Generator, temperature: float = 1.0) -> Tensor:
    """Tokens (B, L) from uniform ones, in steps of equal length in tau, each drawn from
    q(z_t | z_s, D), with D at a temperature."""
    E, V = model.embed.weight, model.config.vocab_size
    z = torch.randint(V, (B, L), generator=rng, device=E.device)
    for i in range(steps):
        def move(hidden, z):
            D = (model.head(hidden).double() / temperature).softmax(-1)
            return draw_from(posterior(D, z, i / steps, (i + 1) / steps), rng)
        hidden = model(F.embedding(z, E), torch.full((B,), i / steps, device=E.device))
        z = by_tokens(move, model.head, hidden, z[..., None]).squeeze(-1)
    return z


def distillation_loss(student: FlowTransformer, teacher: FlowTransformer, clock: Clock | None,
                      y: Tensor, tau: Tensor, step: float, rng: torch.Generator
                      ) -> tuple[Tensor, Tensor]:
    """DCD, nats per token: KL(student at tau || teacher at tau + step), the mean, to differentiate,
    and each (B, L). Both are on the same paths to y (B, L), the student at tau (B,)."""
    V, E = student.config.vocab_size, student.embed.weight
    noise, later = path(y, V, rng), (tau + step).clamp_max(1)
    z, cleaner = at(tau, y, V, *noise), at(later, y, V, *noise)     # (B, L) each
    with torch.no_grad():
        target = teacher(F.embedding(cleaner, teacher.embed.weight), later)     # (B, L, d)

    def divergence(logits, target):
        return reverse_kl(logits, teacher.head(target))
    total, losses = sum_by_tokens(divergence, student.head, student(F.embedding(z, E), tau), target)
    return total / y.numel(), losses[..., 0]
