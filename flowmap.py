"""Flow map language models (FMLM): the mathematics. A flow map jumps along the flow of flow.py in
one network evaluation.

The flow map X_{s,t} carries the state at time s to the state at time t. Write its jump as an Euler
step that knows where to aim,

    X_{s,t}(x) = (1 - h) x + h delta_{s,t}(x),        h = (t - s) / (1 - s).

The two-time denoiser delta_{s,t} is a weighted average of the denoisers D met between s and t.
Hence it is a distribution over the vocabulary, and again a softmax output. It is trained to agree
with itself and with a flow language model:

    diagonal      delta_{t,t} = D_t: the FLM (the teacher) knows jumps of no length already;
    off-diagonal  one of three conditions that make X a flow map:

    semigroup   (PSD)  two jumps s -> u -> t land where one jump s -> t does. The default: it
                       takes no derivative;
    Lagrangian  (LSD)  as the end t moves, the landing point follows the flow;
    Eulerian    (ESD)  as the start s moves along the flow, the landing point stays.

Losses are KL divergences to targets without gradient (the diagonal's, without a teacher: to data).
`student` and `target_net` are callables (z, tau_s, tau_t) -> hidden with `head` and `embed.weight`;
LSD and ESD differentiate them in forward mode, which needs attention="math".
`teacher` is (z, tau) -> hidden with `head`. All share one frozen E, so that they see the same
noisy state. Start with `loss` and `sample`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flow import (Clock, Given, SoftmaxCrossEntropy, by_tokens, corrupt, cross_entropy, decode,
                  expected_embedding, latent_noise, most_likely, move, step_size, sum_by_tokens)

Target = tuple[Callable[..., Tensor], tuple[Tensor, ...]]
# A function of slices of those tensors (B, L, ..) that returns distributions (n, V).

# ------------------------------------------------------------------------------ the loss

def loss(student: Callable, target_net: Callable, teacher: Callable | None, clock: Clock,
         objective: str, y: Tensor, tau_s: Tensor, tau_t: Tensor, rng: torch.Generator,
         n_diagonal: int, factor: Tensor | None = None, split: float = 0.5,
         teacher_temperature: float = 1.0, known: Tensor | None = None
         ) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of an FMLM on tokens y (B, L) for jumps from tau_s to tau_t (B,), with noise from
    rng: the mean in nats per token, each token's (B, L) without gradient, and the mass cut from
    off-diagonal targets, (B - n_diagonal, L).

    The first n_diagonal rows have tau_t = tau_s and learn the denoiser. The others learn jumps by
    `objective`, a key of OBJECTIVES. Both go through the student in one pass.

    target_net: computes the off-diagonal targets: the student itself, or its moving average.
    teacher: the FLM. None for self-distillation: the diagonal learns from the data, and the target
    network's own diagonal takes the place of D_t.
    factor: noise_factor(E), formed once for the frozen E.
    split: of psd, where on the way from tau_s to tau_t the two jumps of a target meet.
    teacher_temperature: other than 1, D is the teacher's denoiser at that temperature, and the map
    learns the flow of that.
    known: tokens (B, L) that all three networks are told; see flow.Given. The mean is over all
    tokens, known ones count as 0.
    """
    n, B, E = n_diagonal, len(y), student.embed.weight
    z = corrupt(E, y, clock.t_of_tau(tau_s), latent_noise(E, y.shape, rng, factor))
    known_n, known_rest = (None, None) if known is None else (known[:n], known[n:])
    told = lambda net, y, known: net if known is None else Given(net, y, known)
    hidden = told(student, y, known)(z, tau_s, tau_t)               # (B, L, d)
    target_net = told(target_net, y[n:], known_rest)
    if teacher is None:
        diagonal, losses = cross_entropy(student.head, hidden[:n], y[:n], known_n)
        denoiser = Denoiser(target_net, times=2)
    else:
        denoiser = Denoiser(told(teacher, y[n:], known_rest), teacher_temperature)
        with torch.no_grad():
            denoised = told(teacher, y[:n], known_n)(z[:n], tau_s[:n])
        diagonal, losses, _ = kl_to_target(
            student.head, hidden[:n], (lambda h: denoiser.head(h).softmax(-1), (denoised,)),
            known_n)
    extra = dict(split=split) if objective == "psd" else {}
    target = OBJECTIVES[objective](target_net, denoiser, clock, z[n:], tau_s[n:], tau_t[n:],
                                   **extra)
    jumps, more, cut = kl_to_target(student.head, hidden[n:], target, known_rest)
    mean = (n * diagonal + (B - n) * jumps) / B if n else jumps
    return mean, torch.cat([losses, more]), cut


def kl_to_target(head: Callable, hidden: Tensor, target: Target, known: Tensor | None = None
                 ) -> tuple[Tensor, Tensor, Tensor]:
    """KL(target || softmax(head(hidden))) in nats, 0 for known tokens: the mean over all tokens, to
    differentiate, and each (B, L); and how far each target had left the simplex, (B, L).

    A target with a derivative in it can have negative entries. They are set to zero and the rest is
    rescaled to sum to one. The training log shows the mass cut off: a projected target is biased.
    """
    function, tensors = target
    unknown = hidden.new_ones(hidden.shape[:2]) if known is None else ~known

    def divergence(logits, unknown, *tensors):
        with torch.no_grad():
            raw = function(*tensors)                                # (n, V), sums to one
            cut = raw.clamp_max(0).sum(-1, keepdim=True).neg()      # (n, 1)
            p = raw.clamp_min(0)
            p /= p.sum(-1, keepdim=True)
            # Three times as fast as xlogy.
            entropy = -p.clamp_min(1e-37).log_().mul_(p).sum(-1, keepdim=True)
        return unknown * torch.cat([SoftmaxCrossEntropy.apply(logits, p) - entropy, cut], dim=-1)
    total, values = sum_by_tokens(divergence, head, hidden, unknown[..., None], *tensors)
    return total / max(1, values[..., 0].numel()), *values.unbind(-1)


class Denoiser:
    """D_t of an FLM at a temperature, or the diagonal of a flow map (two times), delta_{t,t}."""

    def __init__(self, model: Callable, temperature: float = 1.0, times: int = 1):
        self.model, self.times = model, times
        self.head = lambda hidden: model.head(hidden) / temperature
        self.head.out_features = model.head.out_features            # V, by which tokens are sliced

    def __call__(self, z: Tensor, tau: Tensor) -> Tensor:
        return self.model(z, *[tau] * self.times)


# ------------------------------------------------------------------------------ times

def off_diagonal_times(length: Tensor, place: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
    """Start and end (tau_s, tau_t), (B,) each, of jumps on the clock. `length` and `place` are
    uniform on [0, 1]: the jump covers `length` of the clock and starts at `place` of what is left.
    Where `full` is true it is (0, 1)."""
    tau_s = torch.where(full, 0.0, place * (1 - length))
    return tau_s, torch.where(full, 1.0, (tau_s + length).clamp_max(1))


def semigroup_weight(s: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """g = (1 - t)(u - s) / ((1 - u)(t - s)) in [0, 1] for s <= u <= t, the weight of delta_{s,u} in
    delta_{s,t}. 0 at t = 1 unless u = 1 too, and 1 at u = t."""
    inside = u < t  # hence s < t and u < 1
    g = (1 - t) / torch.where(inside, 1 - u, 1.0) * ((u - s) / torch.where(inside, t - s, 1.0))
    return torch.where(inside, g, 1.0).clamp(0, 1)

# ------------------------------------------------------------------------------ the objectives

@torch.no_grad()
def semigroup_target(target_net: Callable, teacher: Callable, clock: Clock, z: Tensor,
                     tau_s: Tensor, tau_t: Tensor, split: float = 0.5) -> Target:
    """PSD: g delta_{s,u}(z) + (1 - g) delta_{u,t}(X_{s,u}(z)), with u at `split` of the way from s
    to t on the clock. Two forward passes."""
    tau_u = torch.lerp(tau_s, tau_t, split)
    s, u, t = (clock.t_of_tau(tau) for tau in (tau_s, tau_u, tau_t))
    first = target_net(z, tau_s, tau_u)                             # (B, L, d)
    z_u = move(z, expected_embedding(target_net.head, first, target_net.embed.weight), s, u)
    second = target_net(z_u, tau_u, tau_t)

    def average(first, second, g):
        delta_su, delta_ut = target_net.head(first), target_net.head(second)
        return g * delta_su.softmax(-1) + (1 - g) * delta_ut.softmax(-1)
    return average, (first, second, per_token(semigroup_weight(s, u, t), first))


@torch.no_grad()
def lagrangian_target(target_net: Callable, teacher: Callable, clock: Clock, z: Tensor,
                      tau_s: Tensor, tau_t: Tensor) -> Target:
    """LSD: D_t(X_{s,t}(z)) - (1 - t)(t - s)/(1 - s) d delta_{s,t}(z) / dt."""
    s, t = clock.t_of_tau(tau_s), clock.t_of_tau(tau_t)
    net = uncompiled(target_net)
    hidden, tangent = torch.func.jvp(lambda tau_t: net(z, tau_s, tau_t, attention="math"),
                                     (tau_t,), (clock.dtau_dt(t).to(tau_t.dtype),))
    z_t = move(z, expected_embedding(net.head, hidden, net.embed.weight), s, t)
    denoised = teacher(z_t, tau_t)
    speed = -(1 - t) * step_size(s, t)

    def follow(denoised, hidden, tangent, speed):
        slope = softmax_and_tangent(net.head, hidden, tangent)[1]
        return teacher.head(denoised).softmax(-1) + speed * slope
    return follow, (denoised, hidden, tangent, per_token(speed, hidden))


@torch.no_grad()
def eulerian_target(target_net: Callable, teacher: Callable, clock: Clock, z: Tensor,
                    tau_s: Tensor, tau_t: Tensor) -> Target:
    """ESD: D_s(z) + (t - s)/(1 - t) bracket, with
    bracket = (1 - s) d delta_{s,t}/ds + (D_s(z) E - z) . grad_z delta_{s,t}.

    The factor diverges at t = 1, where the bracket of a flow map vanishes. Cutting the factor off
    would leave D there instead of delta. So past tau = 1 - 1e-4, where all but one token in 10,000
    is decoded, the target goes only (1 - t)/c of the way from delta to this, c = 1 - t at that tau,

        delta + [(1 - t)(D - delta) + (t - s) bracket] / c,

    which is finite, and equal to delta for a flow map.
    """
    s, t = clock.t_of_tau(tau_s), clock.t_of_tau(tau_t)
    net = uncompiled(target_net)
    denoised = teacher(z, tau_s)
    direction = expected_embedding(teacher.head, denoised, net.embed.weight) - z
    clock_speed = ((1 - s) * clock.dtau_dt(s)).to(tau_s.dtype)
    hidden, tangent = torch.func.jvp(lambda z, tau_s: net(z, tau_s, tau_t, attention="math"),
                                     (z, tau_s), (direction, clock_speed))
    last = clock.t_of_tau(torch.full((1,), 1 - 1e-4, dtype=clock.t.dtype, device=z.device))
    c = 1 - torch.minimum(t, last)                                  # 1 - t up to tau = 1 - 1e-4

    def stay(denoised, hidden, tangent, part, factor):
        delta, slope = softmax_and_tangent(net.head, hidden, tangent)
        return torch.lerp(delta, teacher.head(denoised).softmax(-1), part) + factor * slope
    part, factor = per_token((1 - t) / c, hidden), per_token((t - s) / c, hidden)
    return stay, (denoised, hidden, tangent, part, factor)


OBJECTIVES = {"psd": semigroup_target, "lsd": lagrangian_target, "esd": eulerian_target}


def uncompiled(model: Callable) -> Callable:
    """The network without torch.compile, which forward-mode derivatives do not pass through."""
    if isinstance(model, Given):
        return Given(uncompiled(model.model), model.y, model.known)
    return getattr(model, "_orig_mod", model)


def softmax_and_tangent(head: Callable, hidden: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(head(hidden)), (n, V), and its derivative (n, V) along tangent (n, d)."""
    return torch.func.jvp(lambda hidden: head(hidden).softmax(-1), (hidden,),
                          (tangent.to(hidden.dtype),))


def per_token(scalar: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, L, 1), in float32 or better, for `sum_by_tokens` to slice."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return scalar.to(dtype)[:, None, None].expand(-1, like.size(1), -1)

# ------------------------------------------------------------------------------ sampling

def sample(model: Callable, clock: Clock, z: Tensor, steps: int, gamma: float = 0.0,
           noise: Callable[[], Tensor] | None = None, **options) -> Tensor:
    """Tokens (B, L) by `steps` jumps X_{s,t} from noise z (B, L, d); see flow.decode."""
    return decode(model, 2, clock, z, steps, gamma, noise, **options)


@torch.no_grad()
def refine(model: Callable, clock: Clock, noise: Callable[[], Tensor], rounds: int, jumps: int = 1,
           order: torch.Generator | None = None, y: Tensor | None = None,
           known: Tensor | None = None, watch: Callable | None = None) -> Tensor:
    """Posterior refinement (FMLM+, arXiv 2606.24773): tokens (B, L) in `rounds` rounds.

    Each round drafts the whole text from noise(), in `jumps` evaluations, told all tokens that are
    known so far. Then it commits the surest of the others: of n in a row ceil(n / rounds left). How
    sure a token is, is its probability under the last jump's delta. With a generator as `order`,
    tokens are committed at random. Then one a round, each from fresh noise, gives the exact joint
    law of an exact flow map. By sureness it does not: what is committed depends on the draft.

    y, known: (B, L), tokens known from the start.
    """
    for left in range(rounds, 0, -1):
        z = noise()                                                 # (B, L, d)
        if known is None:
            y = torch.zeros(z.shape[:2], dtype=torch.long, device=z.device)
            known = torch.zeros_like(y, dtype=torch.bool)
        sure = torch.rand(y.shape, generator=order, device=z.device)

        def last(head, hidden):
            nonlocal sure
            tokens = most_likely(head, hidden)
            sure = confidence(head, hidden, tokens) if order is None else sure
            return tokens
        y = sample(Given(model, y, known), clock, z, jumps, last=last, watch=watch)
        number = torch.ceil((~known).sum(1, keepdim=True) / left)   # (B, 1), of tokens to commit
        rank = sure.masked_fill(known, -1).argsort(1, descending=True).argsort(1)
        known = known | (rank < number)
    return y


def confidence(head: Callable, hidden: Tensor, tokens: Tensor) -> Tensor:
    """The probability (B, L) of tokens (B, L) under softmax(head(hidden)), hidden (B, L, d)."""
    return by_tokens(lambda hidden, tokens: head(hidden).softmax(-1).gather(-1, tokens).squeeze(-1),
                     head, hidden, tokens[..., None])
