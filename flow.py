"""Flow language models: the mathematics. Pure functions over tensors, nothing read or written.

A text is the one-hot array x1 (L, V). Noise x0 ~ N(0, I) of the same shape is carried to it in a straight line,

    x_t = (1 - t) x0 + t x1,        0 <= t <= 1,

and a network learns the denoiser D_t(x)[l, v] = P(token l is v | x_t = x) with plain cross-entropy. To generate, follow
the flow dx/dt = (D_t(x) - x) / (1 - t) from noise at t = 0 to a text at t = 1. Three things make this practical:

- **the clock** (`Clock`): t is a bad measure of progress, since with a large vocabulary nothing can be decoded until
  t is near 0.8 and then everything can. `tau` is the share of tokens that could be decoded; train and sample in tau;
- **z instead of x** (`latent_noise`): the network reads x only through z = x E, so noise of the law of x0 E is drawn
  directly, in d dimensions instead of V;
- **the head in slices** (head.py): logits, one for every word of the vocabulary, exist for some of the tokens at a time.

Shapes: B sequences, L tokens, V vocabulary, d width. `model` is any callable (z, tau) -> hidden with an
`embed.weight` E (V, d) and a `head` that turns hidden (.., d) into logits (.., V): a linear layer, or like one.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from head import SoftmaxCrossEntropy, by_tokens, draw, sum_by_tokens


# ---------------------------------------------------------------- the clock

class Clock:
    """The change of time t <-> tau, tabulated once in float64 and interpolated on the device.

    The chance that argmax x_t is the right token is P(r) = E_Z Phi(Z + r)^(V - 1) with Z ~ N(0, 1) and r = t / (1 - t):
    the right coordinate must beat V - 1 others. Rescaled from [1/V, 1] to [0, 1] it is the clock,

        tau(t) = (V P - 1) / (V - 1) = 1 - V / (V - 1) (1 - P).

    That is what a reader of all V coordinates can decode. The network sees d of them, where an average token is
    sqrt(d / V) times weaker; `embedding_share` > 0 mixes in a clock that ticks at r sqrt(d / V), as
    (1 - share) tau(r) + share tau(r sqrt(d / V)). 0 is the published clock, and so is any share where d >= V.

    Raises ValueError for V < 2, for a share outside [0, 1], and for a share without a width d >= 1.
    """

    def __init__(self, V: int, d: int | None = None, embedding_share: float = 0.0, device: torch.device | str = "cpu"):
        if V < 2 or not 0 <= embedding_share <= 1:
            raise ValueError(f"a clock needs V >= 2 and a share in [0, 1], got V={V}, embedding_share={embedding_share}")
        if embedding_share and (d is None or d < 1):
            raise ValueError(f"a clock with embedding_share={embedding_share} needs the width d >= 1, got d={d}")
        t = torch.linspace(0, 1, 8193, dtype=torch.float64)
        table = error_table(V)
        tau, slope = clock_at(t, V, *table)
        if embedding_share and d < V:
            weak_tau, weak_slope = clock_at(t, V, *table, math.sqrt(d / V))
            tau, slope = torch.lerp(tau, weak_tau, embedding_share), torch.lerp(slope, weak_slope, embedding_share)
        device = torch.device(device)
        dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        self.t, self.tau, self.slope = (column.to(device, dtype) for column in (t, tau, slope))

    def tau_of_t(self, t: Tensor) -> Tensor:
        """tau(t), any shape: float64 (float32 on mps), monotone, 0 at 0 and 1 at 1 exactly."""
        return interpolate(t, self.t, self.tau)

    def t_of_tau(self, tau: Tensor) -> Tensor:
        """The inverse t(tau); tau = 1 gives 1, although the table reaches 1 to rounding before that."""
        return interpolate(tau, self.tau, self.t)

    def dtau_dt(self, t: Tensor) -> Tensor:
        """The speed of the clock, d tau / d t, from its own integral rather than from differences of the table."""
        return interpolate(t, self.t, self.slope)


def error_table(V: int) -> tuple[Tensor, Tensor, Tensor]:
    """1 - P(r) and its derivative, (1001,) each in float64, at the evenly spaced r from 0 to 18, past which no errors are
    left: r, error, derivative.

    Substituting w = Z + r moves r into the Gaussian weight, 1 - P(r) = integral of phi(w - r) (1 - Phi(w)^(V-1)) dw, so
    that the powers of Phi are computed once for all r. They are nearly steps, hence the thousands of nodes.
    """
    dw = 18 / 4000
    w = torch.arange(-9, 27, dw, dtype=torch.float64)                           # (W,)
    log_cdf = torch.special.log_ndtr(w)
    wrong = -torch.expm1((V - 1) * log_cdf)                                     # 1 - Phi(w)^(V-1)
    wrong_slope = -(V - 1) * torch.exp((V - 2) * log_cdf - w ** 2 / 2) / math.sqrt(2 * math.pi)
    columns = torch.stack([wrong, wrong_slope], dim=1) * (dw / math.sqrt(2 * math.pi))          # (W, 2)
    r = torch.linspace(0, 18, 1001, dtype=torch.float64)
    return r, *(torch.exp(-(w - r[:, None]) ** 2 / 2) @ columns).unbind(1)


def clock_at(t: Tensor, V: int, r: Tensor, error: Tensor, derivative: Tensor, scale: float = 1.0
             ) -> tuple[Tensor, Tensor]:
    """tau and d tau / d t at the sorted times t (T,), from 0 to 1, of the clock that ticks at scale t / (1 - t): by cubic
    Hermite interpolation in an `error_table` (error below 1e-8), which is cheaper than to integrate at each of them."""
    left, h = (1 - t).clamp_min(1e-9), r[1]
    x = (scale * t / left).clamp_max(r[-1]) / h
    i = x.long().clamp_max(len(r) - 2)
    u = x - i
    (e0, e1), (d0, d1) = ((table[i], table[i + 1]) for table in (error, derivative))
    value = (1 - u) ** 2 * ((1 + 2 * u) * e0 + u * h * d0) + u ** 2 * ((3 - 2 * u) * e1 - (1 - u) * h * d1)
    slope = 6 * u * (1 - u) * (e1 - e0) / h + (1 - u) * (1 - 3 * u) * d0 + u * (3 * u - 2) * d1
    tau = (1 - V / (V - 1) * value).clamp(0, 1).cummax(0).values                # cummax: rounding must not step back
    tau[0], tau[-1] = 0, 1
    return tau, (-V / (V - 1) * slope * scale / left ** 2).clamp_min(0)


def interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear ys(x) for sorted xs; where xs is flat, the last of the ys. Result in the dtype of the table."""
    x = x.to(xs.dtype)
    i = torch.searchsorted(xs, x.contiguous(), right=True).clamp(1, len(xs) - 1)
    width = xs[i] - xs[i - 1]
    weight = torch.where(width > 0, (x - xs[i - 1]) / width, 1.0)
    return torch.lerp(ys[i - 1], ys[i], weight.clamp(0, 1))


def stratified(n: int, generator: torch.Generator) -> Tensor:
    """n times uniform on [0, 1], one in each n-th of it, in random order: (n,), on the generator's device."""
    strata = torch.randperm(n, generator=generator, device=generator.device)
    return (strata + torch.rand(n, generator=generator, device=generator.device)) / n


# ---------------------------------------------------------------- noise and corruption

def noise_factor(E: Tensor, tokens: float = math.inf) -> Tensor | None:
    """C (d, d) with C C^T = E^T E, or None where noise is to be drawn in all V dimensions: for V <= d, where E^T E is
    singular or has no room to save, and for fewer `tokens`, that will share it, than d, where that is cheaper than the V d^2
    of E^T E.

    Differentiable: with C the gradient for E is unbiased, and its variance about V / d times smaller than through
    V-dimensional noise. Float32 or better even under autocast. An E that has diverged gives NaN, not an error: to check
    would be to wait for the device.

    The jitter on the diagonal is 1e-6 of its mean. Rounding errors are in proportion to the largest eigenvalue, though,
    and where one direction of E dominates they exceed that: Cholesky fails, and the jitter becomes 1e-5 of the norm.
    """
    V, d = E.shape
    if V <= d or tokens < d:
        return None
    with torch.autocast(E.device.type, enabled=False):
        E = E if E.dtype == torch.float64 else E.float()
        gram = Gram.apply(E)
        identity = torch.eye(d, dtype=E.dtype, device=E.device)
        with torch.no_grad():
            jitter = 1e-6 * gram.diagonal().mean()
            failed = torch.linalg.cholesky_ex(gram + jitter * identity).info > 0
            jitter = torch.where(failed, 1e-5 * gram.norm(), jitter)
        return torch.linalg.cholesky_ex(gram + jitter * identity).L


class Gram(torch.autograd.Function):
    """E^T E (d, d) from E (V, d). Its derivative dE = E (dG + dG^T) is one product where autograd would make two."""

    @staticmethod
    def forward(ctx, E: Tensor) -> Tensor:
        ctx.save_for_backward(E)
        return E.T @ E

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return ctx.saved_tensors[0] @ (gradient + gradient.T)


def latent_noise(E: Tensor, factor: Tensor | None, normal: Callable[[int], Tensor]) -> Tensor:
    """Noise z0 (B, L, d) with the law of x0 E, x0 ~ N(0, I_V).

    factor: what `noise_factor` returned. normal(n) draws (B, L, n) standard normals: the caller owns the randomness.
    """
    with torch.autocast(E.device.type, enabled=False):
        if factor is not None:
            return normal(factor.size(0)).to(factor.dtype) @ factor.T
        step = max(E.size(1), 1024)  # a slice of the vocabulary at a time: x0 as a whole would be (B, L, V)
        return sum(normal(len(part)).to(E.dtype) @ part for part in E.split(step))


def per_sample(scalar: Tensor, z: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1) in the dtype of z."""
    return scalar.to(z.dtype)[:, None, None]


def corrupt(E: Tensor, y: Tensor, t: Tensor, z0: Tensor) -> Tensor:
    """z_t = x_t E = (1 - t) z0 + t E[y]: (B, L, d) from tokens y (B, L), times t (B,), noise z0 (B, L, d)."""
    return torch.lerp(z0, F.embedding(y, E), per_sample(t, z0))


# ---------------------------------------------------------------- the denoiser D = softmax(head(hidden))

def cross_entropy(head: nn.Module, hidden: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """-log D[y] in nats from hidden (B, L, d) and tokens y (B, L): the sum, to differentiate, and each (B, L)."""
    total, losses = sum_by_tokens(SoftmaxCrossEntropy.apply, head, hidden, y[..., None])
    return total, losses[..., 0]


def expected_embedding(head: nn.Module, hidden: Tensor, E: Tensor) -> Tensor:
    """D E = sum_v D[v] E[v], the denoised state (B, L, d), from hidden (B, L, d). Without gradient."""
    return by_tokens(lambda hidden: head(hidden).softmax(-1).to(E.dtype) @ E, head, hidden).to(E.dtype)


def most_likely(head: nn.Module, hidden: Tensor) -> Tensor:
    """argmax_v D[v], tokens (B, L), from hidden (B, L, d). In bfloat16 the largest logits are often equal, and the first
    in the vocabulary would win: the best four are computed again in float32."""
    def best(hidden):
        few = head(hidden).topk(min(4, head.out_features)).indices              # (n, 4)
        with torch.autocast(hidden.device.type, enabled=False):
            again = (head.weight[few] @ hidden[..., None].to(head.weight.dtype)).squeeze(-1) + head.bias[few]
        return few.gather(-1, again.argmax(-1, keepdim=True)).squeeze(-1)
    return by_tokens(best, head, hidden)


def drawn(head: nn.Module, hidden: Tensor, random: torch.Generator) -> Tensor:
    """Tokens (B, L) drawn from D, each on its own, instead of its mode."""
    return by_tokens(lambda hidden: draw(head(hidden).double().softmax(-1), random).squeeze(-1), head, hidden)


# ---------------------------------------------------------------- training and sampling

def flow_loss(model: Callable, clock: Clock, y: Tensor, tau: Tensor, z0: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of an FLM at clock times tau (B,): the mean cross-entropy of the denoiser, nats a token, to
    differentiate, and that of each token, (B, L), without gradient."""
    z = corrupt(model.embed.weight, y, clock.t_of_tau(tau), z0)
    total, losses = cross_entropy(model.head, model(z, tau), y)
    return total / y.numel(), losses


def step_size(s: Tensor, t: Tensor) -> Tensor:
    """h = (t - s) / (1 - s): the share of the way from x_s to the denoised text. 1 at t = 1, 0 at t = s."""
    return torch.where(t > s, (t - s) / torch.where(s < 1, 1 - s, 1.0), 0.0)


def move(z: Tensor, target: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """(1 - h) z + h target: one Euler step of the flow when target = D_s E, the exact jump X_{s,t} when target =
    delta_{s,t} E. z, target (B, L, d), s and t (B,)."""
    return torch.lerp(z, target, per_sample(step_size(s, t), z))


@torch.no_grad()
def decode(guess: Callable, model: Callable, clock: Clock, z: Tensor, steps: int, gamma: float,
           noise: Callable[[], Tensor] | None, last: Callable) -> Tensor:
    """Tokens (B, L) from noise z (B, L, d), in `steps` moves on a uniform grid of tau. guess(z, tau_s, tau_t) returns the
    hidden states (B, L, d) of the distributions that a move aims at; last(head, hidden) makes tokens of those of the last.

    gamma in [0, 1] makes it stochastic: instead of landing at t, go further, to t~ with 1 - t~ = (1 - t) sqrt(1 - gamma^2),
    and add noise until the state is as noisy as at t again, (t / t~) z + sqrt((1 - t)^2 - (t / t~)^2 (1 - t~)^2) z0.
    noise() draws a fresh z0 (B, L, d).
    """
    tau = torch.linspace(0, 1, steps + 1, dtype=clock.t.dtype, device=z.device)
    for i, (here, there) in enumerate(zip(tau[:-1].split(1), tau[1:].split(1))):  # (1,) each
        s, t = clock.t_of_tau(here), clock.t_of_tau(there)
        beyond = 1 - (1 - t) * math.sqrt(1 - gamma ** 2)                        # t~
        hidden = guess(z, here.expand(len(z)), clock.tau_of_t(beyond).expand(len(z)))
        if i < steps - 1:
            z = move(z, expected_embedding(model.head, hidden, model.embed.weight), s, beyond)
            if gamma:
                kept = t / beyond
                fresh = ((1 - t) ** 2 - kept ** 2 * (1 - beyond) ** 2).clamp_min(0).sqrt()
                z = kept.to(z.dtype) * z + fresh.to(z.dtype) * noise()
    return last(model.head, hidden)


def sample_flow(model: Callable, clock: Clock, z: Tensor, steps: int, gamma: float = 0.0,
                noise: Callable[[], Tensor] | None = None, last: Callable = most_likely) -> Tensor:
    """Tokens (B, L) by Euler steps; see `decode`. With gamma later steps can correct earlier ones. But every Euler step then
    goes as far as t~, however many steps there are, so that its error does not vanish with more of them; the jumps of a flow
    map have no such error."""
    return decode(lambda z, tau, _: model(z, tau), model, clock, z, steps, gamma, noise, last)
