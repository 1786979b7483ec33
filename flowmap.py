"""Flow map language models: the mathematics. A flow map jumps along the flow of flow.py in one network evaluation.

The flow map X_{s,t} carries the state at time s to the state at time t. Write its jump as an Euler step that knows
where to aim,

    X_{s,t}(x) = (1 - h) x + h delta_{s,t}(x),        h = (t - s) / (1 - s).

The two-time denoiser delta_{s,t} is a weighted average of the denoisers D met between s and t, hence a distribution
over the vocabulary, hence again a softmax output. It is trained to agree with itself and with a flow language model:

    diagonal      delta_{t,t} = D_t: a jump of no length is what the FLM (the teacher) already knows;
    off-diagonal  delta_{s,t} = what makes X a flow map, in one of three ways that differ in what they differentiate:

    semigroup   (PSD)  two jumps s -> u -> t land where one jump s -> t does. No derivative, the default;
    Lagrangian  (LSD)  moving the end t, the landing point follows the flow;
    Eulerian    (ESD)  moving the start s along the flow, the landing point stays.

Where the teacher's head has another temperature than 1, D is the softened denoiser, and the map learns the flow of that.

Every objective is a KL divergence to a target without gradient. `student` and `target` are callables
(z, tau_s, tau_t) -> hidden with `head` and `embed.weight` (LSD and ESD differentiate them in forward mode, and add
attention="math" to the call, which lets PyTorch do that); `teacher` is (z, tau) -> hidden with `head`. All share one frozen
E, so they see the same noisy state.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flow import Clock, corrupt, cross_entropy, decode, expected_embedding, most_likely, move, step_size
from head import SoftmaxCrossEntropy, sum_by_tokens

Target = tuple[Callable[..., Tensor], tuple[Tensor, ...]]  # a function of slices of those (B, L, ..) -> (n, V)


# ---------------------------------------------------------------- times

def off_diagonal_times(length: Tensor, place: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
    """Start and end (tau_s, tau_t), (B,) each, of jumps on the clock: `length` and `place` are uniform on [0, 1], the
    jump covers `length` of the clock and starts at `place` of what is left. Where `full` is true it is (0, 1)."""
    tau_s = torch.where(full, 0.0, place * (1 - length))
    return tau_s, torch.where(full, 1.0, (tau_s + length).clamp_max(1))


def semigroup_weight(s: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """g = (1 - t)(u - s) / ((1 - u)(t - s)) in [0, 1] for s <= u <= t: what delta_{s,u} weighs in delta_{s,t}. 0 at
    t = 1 unless u = 1 too, 1 at u = t."""
    inside = u < t  # hence s < t and u < 1
    g = (1 - t) / torch.where(inside, 1 - u, 1.0) * ((u - s) / torch.where(inside, t - s, 1.0))
    return torch.where(inside, g, 1.0).clamp(0, 1)


# ---------------------------------------------------------------- the three objectives

@torch.no_grad()
def semigroup_target(target: Callable, teacher: Callable, clock: Clock, z: Tensor, tau_s: Tensor, tau_t: Tensor,
                     split: float = 0.5) -> Target:
    """PSD: g delta_{s,u}(z) + (1 - g) delta_{u,t}(X_{s,u}(z)), with u at `split` of the way from s to t on the clock.
    Two forward passes."""
    tau_u = torch.lerp(tau_s, tau_t, split)
    s, u, t = (clock.t_of_tau(tau) for tau in (tau_s, tau_u, tau_t))
    first = target(z, tau_s, tau_u)                                             # (B, L, d)
    z_u = move(z, expected_embedding(target.head, first, target.embed.weight), s, u)
    second = target(z_u, tau_u, tau_t)

    def average(first, second, g):
        return g * target.head(first).softmax(-1) + (1 - g) * target.head(second).softmax(-1)
    return average, (first, second, per_token(semigroup_weight(s, u, t), first))


@torch.no_grad()
def lagrangian_target(target: Callable, teacher: Callable, clock: Clock, z: Tensor, tau_s: Tensor, tau_t: Tensor
                      ) -> Target:
    """LSD: D_t(X_{s,t}(z)) - (1 - t)(t - s)/(1 - s) d delta_{s,t}(z) / dt."""
    s, t = clock.t_of_tau(tau_s), clock.t_of_tau(tau_t)
    hidden, tangent = torch.func.jvp(lambda tau_t: differentiable(target)(z, tau_s, tau_t, attention="math"),
                                     (tau_t,), (clock.dtau_dt(t).to(tau_t.dtype),))
    z_t = move(z, expected_embedding(target.head, hidden, target.embed.weight), s, t)
    denoised = teacher(z_t, tau_t)
    speed = -(1 - t) * step_size(s, t)

    def follow(denoised, hidden, tangent, speed):
        return teacher.head(denoised).softmax(-1) + speed * softmax_and_tangent(target.head, hidden, tangent)[1]
    return follow, (denoised, hidden, tangent, per_token(speed, hidden))


@torch.no_grad()
def eulerian_target(target: Callable, teacher: Callable, clock: Clock, z: Tensor, tau_s: Tensor, tau_t: Tensor
                    ) -> Target:
    """ESD: D_s(z) + (t - s)/(1 - t) [(1 - s) d delta_{s,t}/ds + (D_s(z) E - z) . grad_z delta_{s,t}].

    The factor diverges at t = 1, where the bracket of a flow map vanishes: infinity times 0 is delta - D there, and a
    factor merely cut off would leave D. So past tau = 1 - 1e-4, where all but one token in 10,000 is decoded, the target
    goes only part of the way from delta to this, (1 - t)/c of it, with c = 1 - t at that tau,

        delta + [(1 - t)(D - delta) + (t - s) bracket] / c,

    which is finite, and equal to delta for a flow map.
    """
    s, t = clock.t_of_tau(tau_s), clock.t_of_tau(tau_t)
    denoised = teacher(z, tau_s)
    direction = expected_embedding(teacher.head, denoised, target.embed.weight) - z
    clock_speed = ((1 - s) * clock.dtau_dt(s)).to(tau_s.dtype)
    hidden, tangent = torch.func.jvp(lambda z, tau_s: differentiable(target)(z, tau_s, tau_t, attention="math"),
                                     (z, tau_s), (direction, clock_speed))
    last = clock.t_of_tau(torch.full((1,), 1 - 1e-4, dtype=clock.t.dtype, device=z.device))  # (1,)
    c = 1 - torch.minimum(t, last)                                              # 1 - t before the last part of the clock

    def stay(denoised, hidden, tangent, part, factor):
        delta, slope = softmax_and_tangent(target.head, hidden, tangent)
        return torch.lerp(delta, teacher.head(denoised).softmax(-1), part) + factor * slope
    return stay, (denoised, hidden, tangent, per_token((1 - t) / c, hidden), per_token((t - s) / c, hidden))


OBJECTIVES = {"psd": semigroup_target, "lsd": lagrangian_target, "esd": eulerian_target}


def differentiable(model: Callable) -> Callable:
    """The network without torch.compile, which forward-mode derivatives do not pass through."""
    return getattr(model, "_orig_mod", model)


def softmax_and_tangent(head: Callable, hidden: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(head(hidden)), (n, V), and its derivative (n, V) along tangent (n, d)."""
    return torch.func.jvp(lambda hidden: head(hidden).softmax(-1), (hidden,), (tangent.to(hidden.dtype),))


def per_token(scalar: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, L, 1), in float32 or better: what by_tokens can slice."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return scalar.to(dtype)[:, None, None].expand(-1, like.size(1), -1)


# ---------------------------------------------------------------- the loss

def kl_to_target(head: Callable, hidden: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor]:
    """KL(target || softmax(head(hidden))), nats: the sum, to differentiate, and each (B, L); and how far each target had
    left the simplex, (B, L).

    A target with a derivative in it can have negative entries. They are set to zero and the rest rescaled to sum to
    one; the mass cut off is returned, for the training log to show, since a projected target is a biased one.
    """
    function, tensors = target

    def divergence(logits, *tensors):
        with torch.no_grad():
            raw = function(*tensors)                                            # (n, V), sums to one
            cut = raw.clamp_max(0).sum(-1, keepdim=True).neg()                  # (n, 1)
            p = raw.clamp_min(0)
            p /= p.sum(-1, keepdim=True)
            entropy = -p.clamp_min(1e-37).log_().mul_(p).sum(-1, keepdim=True)  # three times as fast as xlogy
        return torch.cat([SoftmaxCrossEntropy.apply(logits, p) - entropy, cut], dim=-1)
    total, values = sum_by_tokens(divergence, head, hidden, *tensors)
    return total, *values.unbind(-1)


def distillation_loss(student: Callable, target: Callable, teacher: Callable | None, clock: Clock, objective: str,
                      y: Tensor, tau_s: Tensor, tau_t: Tensor, z0: Tensor, n_diagonal: int, split: float = 0.5
                      ) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of an FMLM, nats a token: the mean, to differentiate, and each (B, L); and the mass cut from off-diagonal
    targets, (B - n_diagonal, L).

    The first n_diagonal rows have tau_t = tau_s and learn the denoiser; the others learn jumps by `objective`, a key of
    OBJECTIVES. Both go through the student in one pass. y (B, L) tokens, tau_s and tau_t (B,), z0 (B, L, d) noise.

    target: the network that off-diagonal targets are computed with: the student itself, or its moving average.
    teacher: the FLM; None for self-distillation, where the diagonal learns from the data, and the place of D_t is
    taken by the target network's own diagonal.
    split: of psd, where on the way the two jumps of a target meet.
    """
    n, extra = n_diagonal, dict(split=split) if objective == "psd" else {}
    z = corrupt(student.embed.weight, y, clock.t_of_tau(tau_s), z0)
    hidden = student(z, tau_s, tau_t)                                           # (B, L, d)
    if teacher is None:
        total, diagonal = cross_entropy(student.head, hidden[:n], y[:n])
        teacher = OwnDiagonal(target)
    else:
        with torch.no_grad():
            denoised = teacher(z[:n], tau_s[:n])
        total, diagonal, _ = kl_to_target(student.head, hidden[:n],
                                          (lambda h: teacher.head(h).softmax(-1), (denoised,)))
    more, off_diagonal, cut = kl_to_target(student.head, hidden[n:],
                                           OBJECTIVES[objective](target, teacher, clock, z[n:], tau_s[n:], tau_t[n:],
                                                                 **extra))
    return (total + more) / y.numel(), torch.cat([diagonal, off_diagonal]), cut


class OwnDiagonal:
    """A flow map used as a denoiser: D_t(z) = delta_{t,t}(z)."""

    def __init__(self, model: Callable):
        self.model, self.head = model, model.head

    def __call__(self, z: Tensor, tau: Tensor) -> Tensor:
        return self.model(z, tau, tau)


# ---------------------------------------------------------------- sampling

def sample_flow_map(model: Callable, clock: Clock, z: Tensor, steps: int, gamma: float = 0.0,
                    noise: Callable[[], Tensor] | None = None, last: Callable = most_likely) -> Tensor:
    """Tokens (B, L) by jumps X_{s,t}; see flow.decode."""
    return decode(model, model, clock, z, steps, gamma, noise, last)
