"""A bound on the likelihood of a flow language model. Pure functions over tensors, nothing read or written.

The probability that the flow's ODE ends in a text cannot be computed. But the denoiser D also drives a random process,
and its probability can be bounded. In whitened coordinates, E~ = E (E^T E)^(-1/2) with rows e~_v, the noise x0 E is
xi ~ N(0, I), and the state z~_t = t e~_y + (1 - t) xi of a text y is a Gaussian channel with signal-to-noise ratio
nu = (t / (1 - t))^2. Its states at all nu are those of one path, Y(nu) = sqrt(nu) z~_t / (1 - t), that starts at 0 with

    dY = e~_y dnu + dW,        W a Brownian motion.

A model does not know y. It moves by its best guess, dY = sum_v D[v] e~_v dnu + dW, stops at nu_max and draws each token
on its own from D. For the probability p(y) that this ends in y, Girsanov's theorem and the evidence lower bound give

    -log p(y) <= 1/2 int_0^nu_max E_xi || e~_y - sum_v D[v] e~_v ||^2 dnu + E_xi[-log D[y] at nu_max],

in nats, `path` + `decoding`, each summed over positions, for any D and any nu_max. Both processes start at 0, so there
is no third term. The exact posterior of a distribution makes the path exact (the I-MMSE identity); what is left above
that distribution's entropy is that tokens are drawn apart: nothing for L = 1, and vanishing as nu_max grows.

The mean cross-entropy over tau, which training minimises, is no bound: it weighs noise levels by the clock, not by dnu.
The coordinates matter: one-hot vectors in place of e~ give a bound too, but the error above is a projection of theirs,
for d << V a small part of it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flow import Clock, corrupt, cross_entropy, most_likely
from head import by_tokens


class Bound(NamedTuple):
    """Unbiased estimates of the two parts, in nats a text, (B,) each. Texts have noise and levels of their own, so the
    spread over texts gives the standard error of a mean."""
    path: Tensor
    decoding: Tensor

    @property
    def nats(self) -> Tensor:
        return self.path + self.decoding


def whiten(E: Tensor) -> Tensor:
    """E~ = E (E^T E)^(-1/2), (V, d), float32 or better: E~^T E~ is the projection on the row space of E.

    |e~_v|^2 in [0, 1] is the leverage of token v; all together sum to the rank of E. E^T E is singular for V < d: what
    float64 cannot tell from zero is left out. Computed on the CPU, since not every device has float64.
    """
    wide = E.detach().cpu().double()
    eigenvalues, Q = torch.linalg.eigh(wide.T @ wide)                           # (d,), (d, d)
    kept = eigenvalues > max(E.shape) * torch.finfo(wide.dtype).eps * eigenvalues[-1]
    Q, scale = Q[:, kept], eigenvalues[kept].sqrt()                             # (d, rank), (rank,)
    return (wide @ (Q / scale @ Q.T)).to(E.device, torch.promote_types(E.dtype, torch.float32))


def squared_error(head: nn.Module, hidden: Tensor, y: Tensor, E_white: Tensor) -> Tensor:
    """|| e~_y - sum_v D[v] e~_v ||^2 of each token, (B, L), from hidden (B, L, d) and tokens y (B, L).

    The one-hot y is subtracted before the product, not e~_y after it: the product's rounding is then in proportion to
    the error, which is tiny where nu, that multiplies it, is huge."""
    def error(hidden, y):
        D = head(hidden).softmax(-1)                                            # (n, V)
        D.scatter_add_(-1, y[:, None], D.new_full((len(y), 1), -1))
        with torch.autocast(D.device.type, enabled=False):
            return (D.to(E_white.dtype) @ E_white).square().sum(-1)             # (n,)
    return by_tokens(error, head, hidden, y)


def hidden_of(model: Callable, clock: Clock, y: Tensor, random: torch.Generator, E_white: Tensor
              ) -> Callable[[Tensor], Tensor]:
    """A function from signal-to-noise ratios nu (B,) to the network's answer (B, L, d) to y (B, L) in fresh noise."""
    E = model.embed.weight
    with torch.autocast(y.device.type, enabled=False):
        root = E_white.T @ E.to(E_white.dtype)                                  # (E^T E)^(1/2), (d, d)

    def hidden_at(nu):
        t = nu.sqrt() / (1 + nu.sqrt())
        with torch.autocast(y.device.type, enabled=False):
            xi = torch.randn(*y.shape, E.size(1), generator=random, device=y.device, dtype=E_white.dtype)
            z = corrupt(E_white, y, t, xi) @ root                               # z = z~ (E^T E)^(1/2)
        return model(z, clock.tau_of_t(t))
    return hidden_at


@torch.no_grad()
def accuracy(model: Callable, clock: Clock, y: Tensor, random: torch.Generator, nu: float, E_white: Tensor | None = None
             ) -> Tensor:
    """The share of tokens of each text of y (B, L) that the network's likeliest guess has right at signal-to-noise ratio
    nu, (B,). Where nu is large it tells whether E keeps rare tokens apart. The rest as in `likelihood_bound`."""
    E_white = whiten(model.embed.weight) if E_white is None else E_white
    hidden = hidden_of(model, clock, y, random, E_white)(clock.t.new_full((len(y),), nu))
    return (most_likely(model.head, hidden) == y).float().mean(1)


@torch.no_grad()
def likelihood_bound(model: Callable, clock: Clock, y: Tensor, random: torch.Generator, points: int = 32,
                     nu_max: float | None = None, E_white: Tensor | None = None) -> Bound:
    """An estimate of the bound for each text of y (B, L), from points + 1 network evaluations.

    The integral is over u = log(1 + nu), dnu = (1 + nu) du, which spreads the orders of magnitude of nu evenly and
    leaves nothing out near 0. The interval is cut into `points` equal parts, and each text has a level drawn in each.

    nu_max None: at tau = 0.99, where the clock says that nearly all is decoded and past which the network was hardly
    trained. Any other is valid too, unless chosen for giving these texts the smallest bound. E_white: whiten(E), to
    share between batches. random: on the device of y. Eval mode and autocast are up to the caller.
    """
    E_white = whiten(model.embed.weight) if E_white is None else E_white
    hidden_at = hidden_of(model, clock, y, random, E_white)
    if nu_max is None:
        t = clock.t_of_tau(clock.t.new_tensor(0.99)).item()
        nu_max = (t / (1 - t)) ** 2
    end = math.log1p(nu_max)

    path = 0
    for i in range(points):
        u = (i + torch.rand(len(y), generator=random, device=y.device, dtype=clock.t.dtype)) * end / points
        error = squared_error(model.head, hidden_at(u.expm1()), y, E_white).sum(1)
        path = path + u.exp() * error * end / (2 * points)                      # 1 + nu = exp(u)
    decoding = cross_entropy(model.head, hidden_at(torch.full_like(u, nu_max)), y)[1].sum(1)
    return Bound(path, decoding)


def bits_per_character(nats: float, characters: int) -> float:
    """nats / (characters log 2), for nats summed over all tokens of a text of so many characters."""
    return nats / (characters * math.log(2))
