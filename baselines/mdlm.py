"""MDLM, masked diffusion, and its distillation SDTT: the mathematics, no input or output.

Masked diffusion hides tokens where a flow adds noise. Time tau runs from 0 (nothing known) to 1
(the text). Each token is seen with probability tau, independently; otherwise it is the mask, one
token more than the data has. D guesses the hidden tokens from those seen. Since these show how far
along the text is, the network is told no time. With the exact D,

    -log p(y) = integral over tau of 1 / (1 - tau) E sum over hidden l of -log D[y_l]

(tokens appear in random order, each guessed from those before it). With any other D the integral is
larger. It is the loss.

To generate, start from masks alone and uncover tokens at random, each drawn from its guess and then
never changed. Tokens uncovered in the same step do not know of each other, so few steps make bad
text. Self-distillation through time (SDTT) teaches a student, a copy of its teacher at first, to
guess at once what the teacher guesses during two steps. Then the student becomes the teacher of
steps twice as long, and so on. The tokens of a step are still drawn independently: where they
agree, it is because the guesses got sharper.

The papers' time is 1 - tau. MDLM: Sahoo et al., 2024, arXiv 2406.07524; its log-linear schedule is
this tau. SDTT: Deschenaux and Gulcehre, 2024, arXiv 2410.21035.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flow import Clock, SoftmaxCrossEntropy, by_tokens, draw_from, sum_by_tokens
from model import FlowTransformer

MORE_TOKENS = 1    # rows of the network beyond the data's tokens: the mask, the last
EDGE = 1e-3        # of time, cut off as weights diverge there: moves a bound by 0.001 nats a text
TEACHER_STEPS = 2  # in one of the student's. The authors found more to be worse than more rounds


def hide(y: Tensor, tau: Tensor, mask: int, rng: torch.Generator) -> Tensor:
    """Tokens y (B, L), each kept with probability tau (B,), otherwise the mask."""
    return torch.where(torch.rand(y.shape, generator=rng, device=y.device) < tau[:, None], y, mask)


def guess(model: FlowTransformer, z: Tensor) -> Tensor:
    """Hidden states (B, L, d) for tokens z (B, L), masks among them. The time is held at 1."""
    return model(F.embedding(z, model.embed.weight), torch.ones(len(z), device=z.device))


def masked_cross_entropy(logits: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """-weight log D[y], (n, 1), from logits (n, V), tokens y (n, 1) and weights (n, 1). The last
    logit is left out, as if it were -inf: the mask is never the answer."""
    return weight * SoftmaxCrossEntropy.apply(logits[:, :-1], y)


def loss(model: FlowTransformer, clock: Clock | None, y: Tensor, tau: Tensor, rng: torch.Generator
         ) -> tuple[Tensor, Tensor]:
    """-log D[y] / (1 - tau) on hidden tokens, 0 on others: for uniform tau (B,) an unbiased
    estimate of the bound on -log p(y), nats per token. Its mean, to differentiate, and each (B, L),
    from tokens y (B, L). The clock is for other methods."""
    tau, mask = tau.clamp_max(1 - EDGE), model.config.vocab_size - 1
    z = hide(y, tau, mask, rng)
    weight = (z == mask) / (1 - tau)[:, None]                       # (B, L)
    total, losses = sum_by_tokens(masked_cross_entropy, model.head, guess(model, z),
                                  y[..., None], weight[..., None])
    return total / y.numel(), losses[..., 0]


def choose(z: Tensor, mask: int, share: Tensor | float, rng: torch.Generator) -> Tensor:
    """Masks in z (B, L) to uncover, (B, L) bool: each with probability `share`, () or (B, 1)."""
    return (z == mask) & (torch.rand(z.shape, generator=rng, device=z.device) < share)


def uncover(head: nn.Module, hidden: Tensor, z: Tensor, chosen: Tensor, rng: torch.Generator,
            temperature: float = 1.0) -> Tensor:
    """Tokens z (B, L), those at `chosen` (B, L) drawn anew from hidden (B, L, d)."""
    def tokens(hidden):
        return draw_from((head(hidden)[:, :-1].double() / temperature).softmax(-1), rng)
    return z.masked_scatter(chosen, by_tokens(tokens, head, hidden[chosen][:, None]))


@torch.no_grad()
def sample(model: FlowTransformer, clock: Clock | None, B: int, L: int, steps: int,
           rng: torch.Generator, temperature: float = 1.0, y: Tensor | None = None,
           known: Tensor | None = None) -> Tensor:
    """Tokens (B, L) from masks, in N = `steps` steps of equal length in tau: step i uncovers 1 in
    N - i of the masks left, the last all. Where a step uncovers nothing the network is not asked:
    a text takes N (1 - (1 - 1/N)^L) evaluations on average, at most L. Tokens y (B, L) that are
    `known` stand from the start."""
    mask = model.config.vocab_size - 1
    z = torch.full((B, L), mask, device=model.embed.weight.device)
    z = z if known is None else y.where(known, z)
    for i in range(steps):
        chosen = choose(z, mask, 1 / (steps - i), rng)
        rows = chosen.any(1)
        if rows.any():
            hidden = guess(model, z[rows])
            z[rows] = uncover(model.head, hidden, z[rows], chosen[rows], rng, temperature)
    return z


@torch.no_grad()
def sample_surest(model: FlowTransformer, clock: Clock | None, B: int, L: int, steps: int,
                  rng: torch.Generator, temperature: float = 1.0, y: Tensor | None = None,
                  known: Tensor | None = None) -> Tensor:
    """As `sample`, but each step draws all hidden tokens and keeps the surest: of n masks in a row
    ceil(n / steps left), those of the largest probability (MaskGIT, arXiv 2202.04200)."""
    mask = model.config.vocab_size - 1
    z = torch.full((B, L), mask, device=model.embed.weight.device)
    z = z if known is None else y.where(known, z)
    for left in range(steps, 0, -1):
        hidden, masked = guess(model, z), z == mask
        drawn = uncover(model.head, hidden, z, masked, rng, temperature)
        sure = by_tokens(lambda hidden, y: model.head(hidden)[:, :-1].softmax(-1).gather(
            -1, y.clamp_max(mask - 1)).squeeze(-1), model.head, hidden, drawn[..., None])
        number = torch.ceil(masked.sum(1, keepdim=True) / left)     # (B, 1)
        rank = sure.masked_fill(~masked, -1).argsort(1, descending=True).argsort(1)
        z = drawn.where(masked & (rank < number), z)
    return z


@torch.no_grad()
def teacher_states(teacher: FlowTransformer, z: Tensor, tau: Tensor, step: float,
                   rng: torch.Generator) -> Tensor:
    """Hidden states (B, L, d) of the teacher's last guess at each token while it was hidden, on the
    way from z (B, L) at tau (B,) through TEACHER_STEPS steps of length `step`: d numbers a token
    instead of V probabilities."""
    mask = teacher.config.vocab_size - 1
    states = hidden = guess(teacher, z)
    for i in range(TEACHER_STEPS - 1):
        left = (1 - tau - i * step)[:, None].clamp_min(step)        # (B, 1): past the end, all
        z = uncover(teacher.head, hidden, z, choose(z, mask, step / left, rng), rng)
        hidden = guess(teacher, z)
        states = torch.where((z == mask)[..., None], hidden, states)
    return states


def reverse_kl(logits: Tensor, target: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(target)), (n, 1), from logits (n, V); no gradient to target.
    This direction, the published one, is mode-seeking: the student says nothing that its teacher
    finds unlikely, and may leave out what the teacher finds likely."""
    log_q, log_p = logits.log_softmax(-1), target.detach().log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1, keepdim=True)


def distillation_loss(student: FlowTransformer, teacher: FlowTransformer, clock: Clock | None,
                      y: Tensor, tau: Tensor, step: float, rng: torch.Generator
                      ) -> tuple[Tensor, Tensor]:
    """SDTT, nats: the mean over hidden tokens, to differentiate, and each (B, L), 0 where seen. The
    teacher starts where the student does, at tau (B,) of y (B, L), in steps of length `step`."""
    mask = student.config.vocab_size - 1
    z = hide(y, tau, mask, rng)
    hidden = (z == mask)[..., None]                                 # (B, L, 1)

    def divergence(logits, target, hidden):
        return hidden * reverse_kl(logits[:, :-1], teacher.head(target)[:, :-1])
    total, losses = sum_by_tokens(divergence, student.head, guess(student, z),
                                  teacher_states(teacher, z, tau, step, rng), hidden)
    return total / hidden.sum().clamp_min(1), losses[..., 0]
