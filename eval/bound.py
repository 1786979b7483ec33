"""A bound on the likelihood of a flow language model. Pure functions over tensors.

The probability that the flow's ODE ends in a given text cannot be computed. But the denoiser D also
drives a random process, whose probabilities can be bounded. Whiten the coordinates: with
E~ = E (E^T E)^(-1/2) and rows e~_v, the noise x0 E becomes xi ~ N(0, I). The state of a text y,
z~_t = t e~_y + (1 - t) xi, is a Gaussian channel with signal-to-noise ratio nu = (t / (1 - t))^2.
Its states at all nu lie on one path Y(nu) = sqrt(nu) z~_t / (1 - t) that starts at 0 and obeys

    dY = e~_y dnu + dW,        W a Brownian motion.

A model does not know y. It moves by its best guess, dY = sum_v D[v] e~_v dnu + dW, stops at nu_max
and draws each token independently from D. For the probability p(y) of ending in y, Girsanov's
theorem (both start at 0) and the evidence lower bound give, for any D and any nu_max,

    -log p(y) <= 1/2 int_0^nu_max E_xi || e~_y - sum_v D[v] e~_v ||^2 dnu     `path`
                 + E_xi[-log D[y] at nu_max]                                  `decoding`

in nats, summed over positions. For the exact posterior of a distribution the path is exact (the
I-MMSE identity), and what exceeds its entropy is the price of drawing tokens independently: zero
for L = 1, vanishing as nu_max grows.

The loss of training is no bound: it weighs noise levels by the clock, not by dnu. One-hot vectors
in place of e~ give a bound too, but for d << V a looser one.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flow import Clock, by_tokens, corrupt, cross_entropy, most_likely


class Bound(NamedTuple):
    """Unbiased estimates of the two parts, in nats a text, (B,) each. Texts have independent noise
    and levels, so the spread over texts gives the standard error of a mean."""
    path: Tensor
    decoding: Tensor

    @property
    def nats(self) -> Tensor:
        return self.path + self.decoding


def whiten(E: Tensor) -> Tensor:
    """E~ = E (E^T E)^(-1/2), (V, d), float32 or better: E~^T E~ projects on the row space of E.

    |e~_v|^2 in [0, 1] is the leverage of token v; their sum is the rank of E. Eigenvalues of E^T E
    that float64 cannot tell from 0 are left out. Runs on the CPU: not every device has float64."""
    wide = E.detach().cpu().double()
    eigenvalues, Q = torch.linalg.eigh(wide.T @ wide)               # (d,), (d, d)
    kept = eigenvalues > max(E.shape) * torch.finfo(wide.dtype).eps * eigenvalues[-1]
    Q, scale = Q[:, kept], eigenvalues[kept].sqrt()                 # (d, rank), (rank,)
    return (wide @ (Q / scale @ Q.T)).to(E.device, torch.promote_types(E.dtype, torch.float32))


def squared_error(head: nn.Module, hidden: Tensor, y: Tensor, E_white: Tensor) -> Tensor:
    """|| e~_y - sum_v D[v] e~_v ||^2 of each token, (B, L), from hidden (B, L, d), tokens y (B, L).

    The one-hot y is subtracted before the product, not e~_y after it: rounding then scales with the
    error, which is tiny where its factor nu is huge."""
    def error(hidden, y):
        D = head(hidden).softmax(-1)                                # (n, V)
        D.scatter_add_(-1, y[:, None], D.new_full((len(y), 1), -1))
        with torch.autocast(D.device.type, enabled=False):
            return (D.to(E_white.dtype) @ E_white).square().sum(-1)             # (n,)
    return by_tokens(error, head, hidden, y)


def hidden_of(model: Callable, clock: Clock, y: Tensor, rng: torch.Generator, E_white: Tensor
              ) -> Callable[[Tensor], Tensor]:
    """The network's answer (B, L, d) to y (B, L) in fresh noise, as a function of nu (B,)."""
    E = model.embed.weight
    with torch.autocast(y.device.type, enabled=False):
        root = E_white.T @ E.to(E_white.dtype)                      # (E^T E)^(1/2), (d, d)

    def hidden_at(nu):
        t = nu.sqrt() / (1 + nu.sqrt())
        with torch.autocast(y.device.type, enabled=False):
            xi = E_white.new_empty(*y.shape, E.size(1)).normal_(generator=rng)
            z = corrupt(E_white, y, t, xi) @ root                   # z = z~ (E^T E)^(1/2)
        return model(z, clock.tau_of_t(t))
    return hidden_at


@torch.no_grad()
def accuracy(model: Callable, clock: Clock, y: Tensor, rng: torch.Generator, nu: float,
             E_white: Tensor | None = None) -> Tensor:
    """The share of each text's tokens, (B,), that the likeliest guess gets right at signal-to-noise
    ratio nu. At a large nu it shows whether E separates rare tokens. See `likelihood_bound`."""
    E_white = whiten(model.embed.weight) if E_white is None else E_white
    hidden = hidden_of(model, clock, y, rng, E_white)(clock.t.new_full((len(y),), nu))
    return (most_likely(model.head, hidden) == y).float().mean(1)


@torch.no_grad()
def likelihood_bound(model: Callable, clock: Clock, y: Tensor, rng: torch.Generator,
                     points: int = 32, nu_max: float | None = None,
                     E_white: Tensor | None = None) -> Bound:
    """An estimate of the bound for each text of y (B, L), from points + 1 network evaluations.

    The integral is over u = log(1 + nu), dnu = (1 + nu) du, which spreads the orders of magnitude
    of nu evenly. Each text draws a level in each of `points` equal parts of it.

    nu_max None: at tau = 0.99, past which the network was hardly trained. Any other is valid unless
    chosen to minimise the bound of these texts. E_white: whiten(E), to share between batches.
    rng: on the device of y. The caller sets eval mode and autocast."""
    E_white = whiten(model.embed.weight) if E_white is None else E_white
    hidden_at = hidden_of(model, clock, y, rng, E_white)
    if nu_max is None:
        t = clock.t_of_tau(clock.t.new_tensor(0.99)).item()
        nu_max = (t / (1 - t)) ** 2
    end = math.log1p(nu_max)

    path = 0
    for i in range(points):
        u = (i + clock.t.new_empty(len(y)).uniform_(generator=rng)) * end / points
        error = squared_error(model.head, hidden_at(u.expm1()), y, E_white).sum(1)
        path = path + u.exp() * error * end / (2 * points)          # 1 + nu = exp(u)
    decoding = cross_entropy(model.head, hidden_at(torch.full_like(u, nu_max)), y)[1].sum(1)
    return Bound(path, decoding)


def bits_per_character(nats: float, characters: int) -> float:
    """nats / (characters log 2), for the nats of all tokens of a text of that many characters."""
    return nats / (characters * math.log(2))
