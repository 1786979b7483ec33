"""MDLM, masked diffusion, and its distillation SDTT: the mathematics, nothing read or written.

Masked diffusion hides tokens where a flow adds noise. At time tau, from 0 (nothing known) to 1 (the text), a token is
seen with probability tau, on its own, and is the mask otherwise, one token more than the data has. D guesses the hidden
tokens from those seen, and since they show how far along it is, the network is told no time. With the exact D,

    -log p(y) = integral over tau of 1 / (1 - tau) E sum over hidden l of -log D[y_l]

(tokens come in random order, each guessed from those before it); with any other D the integral is larger. It is the
loss.

To generate, start from masks only and uncover tokens at random, each drawn from the guess for it, never to be changed.
Tokens uncovered in the same step do not know of each other, so few steps make bad text. Self-distillation through time
(SDTT) teaches a student, a copy at first, to guess at once what its teacher guesses on the way through two steps; then
the student becomes the teacher of steps twice as long, and so on. The tokens of a step are still drawn independently:
where they agree, it is because the guesses got sharper.

The papers' time runs the other way, from data at 0 to masks at 1: their t is 1 - tau. MDLM: Sahoo et al., 2024, arXiv
2406.07524, with its log-linear schedule, which is this tau; SDTT: Deschenaux and Gulcehre, 2024, arXiv 2410.21035.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flow import Clock
from head import SoftmaxCrossEntropy, by_tokens, draw, sum_by_tokens
from model import FlowTransformer

MORE_TOKENS = 1    # rows of the network beyond the data's tokens: the mask, the last
EDGE = 1e-3        # no closer to an end of time: weights diverge there. Bounds move by about 0.001 nats a text
TEACHER_STEPS = 2  # in one of the student's. The authors found more at a time to be worse than more rounds


def hide(y: Tensor, tau: Tensor, mask: int, random: torch.Generator) -> Tensor:
    """Tokens y (B, L), each kept with probability tau (B,) and the mask otherwise."""
    return torch.where(torch.rand(y.shape, generator=random, device=y.device) < tau[:, None], y, mask)


def guess(model: FlowTransformer, z: Tensor) -> Tensor:
    """Hidden states (B, L, d) for tokens z (B, L), masks among them; the time is held at 1."""
    return model(F.embedding(z, model.embed.weight), torch.ones(len(z), device=z.device))


def masked_cross_entropy(logits: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """-weight log D[y], (n, 1), from logits (n, V), tokens y (n, 1) and weights (n, 1). The last logit is left out, as
    if it were -inf: the mask is never the answer."""
    return weight * SoftmaxCrossEntropy.apply(logits[:, :-1], y)


def loss(model: FlowTransformer, clock: Clock | None, y: Tensor, tau: Tensor, random: torch.Generator
         ) -> tuple[Tensor, Tensor]:
    """-log D[y] / (1 - tau) on hidden tokens and 0 on others: for uniform tau (B,) an unbiased estimate of the bound on
    -log p(y), nats a token. Its mean, to differentiate, and each (B, L), from tokens y (B, L). No clock is needed."""
    tau, mask = tau.clamp_max(1 - EDGE), model.config.vocab_size - 1
    z = hide(y, tau, mask, random)
    weight = (z == mask) / (1 - tau)[:, None]                                   # (B, L)
    total, losses = sum_by_tokens(masked_cross_entropy, model.head, guess(model, z), y[..., None], weight[..., None])
    return total / y.numel(), losses[..., 0]


# ---------------------------------------------------------------- sampling

def choose(z: Tensor, mask: int, share: Tensor | float, random: torch.Generator) -> Tensor:
    """The masks in z (B, L) to uncover now, (B, L) bool: each with the probability `share`, a number or (B, 1)."""
    return (z == mask) & (torch.rand(z.shape, generator=random, device=z.device) < share)


def uncover(head: torch.nn.Module, hidden: Tensor, z: Tensor, chosen: Tensor, random: torch.Generator,
            temperature: float = 1.0) -> Tensor:
    """Tokens z (B, L) with those at `chosen` (B, L) drawn from hidden (B, L, d). Only they pass through the head."""
    def tokens(hidden):
        return draw((head(hidden)[:, :-1].double() / temperature).softmax(-1), random)
    return z.masked_scatter(chosen, by_tokens(tokens, head, hidden[chosen][:, None]))


@torch.no_grad()
def sample(model: FlowTransformer, clock: Clock | None, B: int, L: int, steps: int, random: torch.Generator,
           temperature: float = 1.0) -> Tensor:
    """Tokens (B, L) from masks, in steps of equal length in tau: of the masks left at i / steps, 1 in steps - i is
    uncovered, hence all in the last step. Where a step uncovers nothing the network is not asked: N steps take at most L
    evaluations a text, on average N (1 - (1 - 1/N)^L)."""
    mask = model.config.vocab_size - 1
    z = torch.full((B, L), mask, device=model.embed.weight.device)
    for i in range(steps):
        chosen = choose(z, mask, 1 / (steps - i), random)
        rows = chosen.any(1)
        if rows.any():
            z[rows] = uncover(model.head, guess(model, z[rows]), z[rows], chosen[rows], random, temperature)
    return z


# ---------------------------------------------------------------- distillation

@torch.no_grad()
def teacher_states(teacher: FlowTransformer, z: Tensor, tau: Tensor, step: float, random: torch.Generator) -> Tensor:
    """Hidden states (B, L, d) of the teacher's last guess of each token while it was hidden, on the way from z (B, L)
    at tau (B,) through TEACHER_STEPS steps of length `step`: d numbers a token in the place of V probabilities."""
    mask = teacher.config.vocab_size - 1
    states = hidden = guess(teacher, z)
    for i in range(TEACHER_STEPS - 1):
        left = (1 - tau - i * step)[:, None].clamp_min(step)                    # (B, 1): past the end all is uncovered
        z = uncover(teacher.head, hidden, z, choose(z, mask, step / left, random), random)
        hidden = guess(teacher, z)
        states = torch.where((z == mask)[..., None], hidden, states)
    return states


def reverse_kl(logits: Tensor, target: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(target)), (n, 1), from logits (n, V); no gradient to the target. This direction,
    the published one, is mode-seeking: the student says nothing that its teacher finds unlikely, and may leave out what it
    finds likely."""
    log_q, log_p = logits.log_softmax(-1), target.detach().log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1, keepdim=True)


def distillation_loss(student: FlowTransformer, teacher: FlowTransformer, clock: Clock | None, y: Tensor, tau: Tensor,
                      step: float, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """SDTT, nats: the mean over hidden tokens, to differentiate, and each (B, L), 0 where seen. The student guesses the
    hidden tokens of y (B, L) at tau (B,), the teacher the same ones in steps of length `step` from there."""
    mask = student.config.vocab_size - 1
    z = hide(y, tau, mask, random)
    hidden = (z == mask)[..., None]                                             # (B, L, 1)

    def divergence(logits, target, hidden):
        return hidden * reverse_kl(logits[:, :-1], teacher.head(target)[:, :-1])
    total, losses = sum_by_tokens(divergence, student.head, guess(student, z),
                                  teacher_states(teacher, z, tau, step, random), hidden)
    return total / hidden.sum().clamp_min(1), losses[..., 0]
