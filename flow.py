"""Flow language models (FLM): the mathematics. Pure functions over tensors, no input or output.

A text is the one-hot array x1 (L, V). A straight line joins it to noise x0 ~ N(0, I),

    x_t = (1 - t) x0 + t x1,        0 <= t <= 1,

and a network learns the denoiser D_t(x)[l, v] = P(token l is v | x_t = x) by cross-entropy. To
generate, follow the flow dx/dt = (D_t(x) - x) / (1 - t) from noise at t = 0 to a text at t = 1.
Three ideas make this practical:

- **the clock** (`Clock`). t is a poor measure of progress: with a large vocabulary nothing can be
  decoded until t is near 0.8, and then everything can. tau is the share of tokens that can be
  decoded. Training and sampling are uniform in tau;
- **z instead of x** (`latent_noise`). The network reads x only through z = x E. So noise with the
  law of x0 E is drawn directly, in d dimensions instead of V;
- **the head in slices** (`sum_by_tokens`). Logits exist for a slice of the tokens at a time.

Shapes: B sequences, L tokens, V vocabulary, d width. `model` is any callable (z, tau) -> hidden
(B, L, d) with `embed.weight` E (V, d) and a `head` that turns hidden (.., d) into logits (.., V).
Start with `loss` and `sample`.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------------------ the loss

def loss(model: Callable, clock: "Clock", y: Tensor, tau: Tensor, rng: torch.Generator,
         replaced_share: float = 0.0, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The loss of an FLM on tokens y (B, L) at clock times tau (B,), with noise from rng: the mean
    cross-entropy of the denoiser in nats per token, and each token's, (B, L), without gradient.

    replaced_share: up to this share of a row's tokens is wrong in the input; see `replace`.
    known: tokens (B, L) that the network is told; see `Given`. The others' losses count. The mean
    is still over all B L tokens, so that each unknown one weighs the same in every batch.
    """
    E = model.embed.weight                                          # (V, d)
    z0 = latent_noise(E, y.shape, rng)                              # (B, L, d), the law of x0 E
    shown = replace(y, replaced_share, rng) if replaced_share else y
    z = corrupt(E, shown, clock.t_of_tau(tau), z0)                  # (1 - t) z0 + t E[shown]
    if known is not None:
        model = Given(model, y, known)
    hidden = model(z, tau)                                          # (B, L, d)
    return cross_entropy(model.head, hidden, y, known)

# ------------------------------------------------------------------------------ the clock

class Clock:
    """The change of time t <-> tau, tabulated once in float64, interpolated on the device.

    P(r) = E_Z Phi(Z + r)^(V - 1), Z ~ N(0, 1), is the chance that argmax x_t is the right token at
    r = t / (1 - t): the right coordinate must beat V - 1 others. Rescaled from [1/V, 1] to [0, 1],

        tau(t) = (V P - 1) / (V - 1) = 1 - V / (V - 1) (1 - P).

    In the d dimensions that the network sees, the signal of an average token is weaker, by sqrt(d /
    V). embedding_share > 0 mixes in a clock that counts this, (1 - share) tau(r) + share
    tau(r sqrt(d / V)). 0 is the published clock, and so is any share where d >= V.

    Errors of tau are below 1e-5. Raises ValueError for V < 2, for a share outside [0, 1], and for
    a share without a width d >= 1.
    """

    def __init__(self, V: int, d: int | None = None, embedding_share: float = 0.0,
                 device: torch.device | str = "cpu"):
        if V < 2 or not 0 <= embedding_share <= 1:
            raise ValueError(f"a clock needs V >= 2 and a share in [0, 1], got V={V}, "
                             f"embedding_share={embedding_share}")
        if embedding_share and (d is None or d < 1):
            raise ValueError(f"embedding_share={embedding_share} needs a width d >= 1, got d={d}")
        table_r = torch.linspace(0, 18, 4001, dtype=torch.float64)  # past 18 no errors are left
        table = (1 - V / (V - 1) * decoding_error(V)).clamp(0, 1).cummax(0).values
        table[0], table[-1] = 0, 1
        weak = math.sqrt(d / V) if embedding_share and d < V else 1.0
        r = torch.linspace(0, 18 / weak, math.ceil(4000 / weak) + 1, dtype=torch.float64)
        tau = torch.lerp(interpolate(r, table_r, table), interpolate(weak * r, table_r, table),
                         embedding_share)
        t = torch.cat([r / (1 + r), torch.ones(1, dtype=r.dtype)])  # r = infinity closes the table
        tau = torch.cat([tau, torch.ones(1, dtype=r.dtype)])
        slope, = torch.gradient(tau, spacing=(t,), edge_order=2)
        device = torch.device(device)
        dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple GPUs lack float64
        self.t, self.tau, self.slope = (column.to(device, dtype) for column in (t, tau, slope))

    def tau_of_t(self, t: Tensor) -> Tensor:
        """tau(t) of any shape, in the dtype of the table; monotone, exactly 0 at 0 and 1 at 1."""
        return interpolate(t, self.t, self.tau)

    def t_of_tau(self, tau: Tensor) -> Tensor:
        """The inverse t(tau). t(1) = 1, although tau rounds to 1 before that."""
        return interpolate(tau, self.tau, self.t)

    def dtau_dt(self, t: Tensor) -> Tensor:
        """The speed of the clock, d tau / d t, by central differences of the table."""
        return interpolate(t, self.t, self.slope)


def decoding_error(V: int) -> Tensor:
    """1 - P(r), (4001,) in float64, at r = 0, h, 2h .. 18 with h = 18 / 4000.

    With w = Z + r, 1 - P(r) = integral of phi(w - r) (1 - Phi(w)^(V-1)) dw: a correlation, on the
    grid of r. Phi^(V-1) is nearly a step, hence the thousands of nodes.
    """
    h = 18 / 4000
    w = torch.arange(-2000, 6001, dtype=torch.float64) * h          # -9 .. 27
    wrong = -torch.expm1((V - 1) * torch.special.log_ndtr(w))       # 1 - Phi(w)^(V-1)
    phi = torch.exp(-w[:4001] ** 2 / 2) * (h / math.sqrt(2 * math.pi))          # on -9 .. 9
    return F.conv1d(wrong[None], phi[None, None])[0]


def interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear ys(x) for sorted xs, in the dtype of the table. Where xs is flat, the last
    of its ys."""
    x = x.to(xs.dtype)
    i = torch.searchsorted(xs, x.contiguous(), right=True).clamp(1, len(xs) - 1)
    width = xs[i] - xs[i - 1]
    weight = torch.where(width > 0, (x - xs[i - 1]) / width, 1.0)
    return torch.lerp(ys[i - 1], ys[i], weight.clamp(0, 1))


def stratified(n: int, rng: torch.Generator) -> Tensor:
    """n times (n,), uniform on [0, 1], one in each n-th of it, shuffled; on the rng's device."""
    strata = torch.randperm(n, generator=rng, device=rng.device)
    return (strata + torch.rand(n, generator=rng, device=rng.device)) / n

# ------------------------------------------------------------------------------ noise

def noise_factor(E: Tensor, tokens: float = math.inf) -> Tensor | None:
    """C (d, d) with C C^T = E^T E, or None where noise is better drawn in V dimensions: for V <= d,
    where E^T E is singular, and for fewer `tokens` than d, where forming E^T E would cost more.

    Differentiable. The gradient for E is unbiased, with about V / d times less variance than
    through V-dimensional noise. Float32 or better even under autocast. A diverged E gives NaN, not
    an error: checking would wait for the device.
    """
    V, d = E.shape
    if V <= d or tokens < d:
        return None
    with torch.autocast(E.device.type, enabled=False):
        E = E if E.dtype == torch.float64 else E.float()
        gram = E.detach().T @ E
        gram = gram + gram.T - gram.detach()    # E^T E still, but one product backward, not two
        identity = torch.eye(d, dtype=E.dtype, device=E.device)
        with torch.no_grad():
            # Rounding errors scale with the largest eigenvalue: 1e-6 of the mean may be too little.
            jitter = 1e-6 * gram.diagonal().mean()
            failed = torch.linalg.cholesky_ex(gram + jitter * identity).info > 0
            jitter = torch.where(failed, 1e-5 * gram.norm(), jitter)
        return torch.linalg.cholesky_ex(gram + jitter * identity).L


def latent_noise(E: Tensor, shape: tuple[int, int], rng: torch.Generator,
                 factor: Tensor | None = None) -> Tensor:
    """Noise z0 (B, L, d) with the law of x0 E, x0 ~ N(0, I_V), for shape (B, L).

    factor: noise_factor(E), where E is frozen and it need not be formed again.
    """
    def normal(n: int) -> Tensor:                                   # (B, L, n)
        return torch.randn(*shape, n, generator=rng, device=E.device, dtype=E.dtype)

    if factor is None:
        factor = noise_factor(E, math.prod(shape))
    with torch.autocast(E.device.type, enabled=False):
        if factor is not None:
            return normal(E.size(1)) @ factor.T
        step = max(E.size(1), 1024)  # a slice of V at a time: x0 as a whole would be (B, L, V)
        return sum(normal(len(part)) @ part for part in E.split(step))


def corrupt(E: Tensor, y: Tensor, t: Tensor, z0: Tensor) -> Tensor:
    """z_t = x_t E = (1 - t) z0 + t E[y], (B, L, d): tokens y (B, L), times t (B,), noise z0."""
    return torch.lerp(z0, F.embedding(y, E), per_sample(t, z0))


def replace(y: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Tokens y (B, L) with some replaced by the previous row's at the same place, (B, L). Each row
    draws its chance of replacement from [0, share]. Needs B > 1.

    A network that has never seen a wrong token trusts every token it can read. But the sampler's
    state does contain wrong tokens, from its own early steps. Trained on such input, the network
    checks each token against the rest of the text. Its D, for replaced tokens, is less sure near
    t = 1 than the flow's own.
    """
    chance = share * torch.rand(len(y), 1, generator=rng, device=y.device)
    replaced = torch.rand(y.shape, generator=rng, device=y.device) < chance
    return torch.where(replaced, y.roll(1, dims=0), y)


def per_sample(scalar: Tensor, z: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1) in the dtype of z."""
    return scalar.to(z.dtype)[:, None, None]

# ------------------------------------------------------------------------------ known tokens

class Given:
    """A network that is told some tokens of the text: y (B, L) where `known` (B, L) is true.

    There the state is E[y] at all times, whatever noise or a sampler put in its place, and a
    learned vector marks it (model.py). So D, the flow and the flow map are conditional on these
    tokens, and all that holds for them holds for the other places.
    """

    def __init__(self, model: Callable, y: Tensor, known: Tensor):
        self.model, self.y, self.known = model, y, known
        self.head, self.embed = model.head, model.embed

    def __call__(self, z: Tensor, *times: Tensor, **options) -> Tensor:
        z = hold(z, self.embed.weight, self.y, self.known)
        return self.model(z, *times, known=self.known, **options)


def hold(z: Tensor, E: Tensor, y: Tensor, known: Tensor) -> Tensor:
    """The state z (B, L, d) with the embeddings of the known tokens put back."""
    return torch.where(known[..., None], F.embedding(y, E).to(z.dtype), z)


def draw_known(shape: tuple[int, int], share: float, rng: torch.Generator) -> Tensor:
    """Tokens to tell the network in training, (B, L) bool. A share of the rows is told each token
    with chance f, drawn for the row from [0, 1]. The other rows are told none. So a network learns
    any set of known tokens: the beginning, the ends, every second word."""
    f = stratified(shape[0], rng) / share                           # (B,), on [0, 1 / share]
    chance = torch.where(f < 1, f, 0)[:, None]
    return torch.rand(shape, generator=rng, device=rng.device) < chance

# ------------------------------------------------------------------------------ sampling

def step_size(s: Tensor, t: Tensor) -> Tensor:
    """h = (t - s) / (1 - s), the share of the way from x_s to the denoised text: 0 at t = s, 1 at
    t = 1."""
    return torch.where(t > s, (t - s) / torch.where(s < 1, 1 - s, 1.0), 0.0)


def move(z: Tensor, aim: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """(1 - h) z + h aim: z, aim (B, L, d), s and t (B,).

    For aim = D_s E an Euler step of the flow: z + (t - s) dz/ds with dz/ds = (D_s E - z) / (1 - s).
    For aim = delta_{s,t} E the exact jump X_{s,t} of a flow map.
    """
    return torch.lerp(z, aim, per_sample(step_size(s, t), z))


def expected_embedding(head: nn.Module, hidden: Tensor, E: Tensor, temperature: float = 1.0
                       ) -> Tensor:
    """D E = sum_v D[v] E[v], the denoised state (B, L, d), from hidden (B, L, d). No gradient."""
    return by_tokens(lambda hidden: (head(hidden) / temperature).softmax(-1).to(E.dtype) @ E,
                     head, hidden).to(E.dtype)


def most_likely(head: nn.Module, hidden: Tensor) -> Tensor:
    """argmax_v D[v], tokens (B, L), from hidden (B, L, d). In bfloat16 the largest logits are often
    equal, and the first one would win. So the best four are recomputed in float32, uncapped."""
    def best(hidden):
        few = head(hidden).topk(min(4, head.out_features)).indices  # (n, 4)
        with torch.autocast(hidden.device.type, enabled=False):
            again = head.weight[few] @ hidden[..., None].to(head.weight.dtype)      # (n, 4, 1)
            again = again.squeeze(-1) + head.bias[few]
        return few.gather(-1, again.argmax(-1, keepdim=True)).squeeze(-1)
    return by_tokens(best, head, hidden)


def draw_tokens(head: nn.Module, hidden: Tensor, rng: torch.Generator, temperature: float = 1.0
          ) -> Tensor:
    """Tokens (B, L) drawn from D, each on its own, instead of its mode."""
    def one(hidden):
        return draw_from((head(hidden).double() / temperature).softmax(-1), rng).squeeze(-1)
    return by_tokens(one, head, hidden)


@torch.no_grad()
def decode(model: Callable, times: int, clock: Clock, z: Tensor, steps: int, gamma: float = 0.0,
           noise: Callable[[], Tensor] | None = None, last: Callable = most_likely,
           temperature: float = 1.0, weak: Callable | None = None, eta: float = 1.0,
           watch: Callable[[Callable, Tensor], None] | None = None, rescale: bool = True) -> Tensor:
    """Tokens (B, L) from noise z (B, L, d), in `steps` moves on a uniform grid of tau.

    The network, with one time input (a flow) or two (a flow map), returns hidden states (B, L, d)
    of the distribution each move aims at. A temperature below 1 sharpens all but the last, which
    last(head, hidden) turns into tokens. Those that a network is told (`Given`) stay as they are.

    gamma in [0, 1] makes it stochastic. Instead of landing at t, go on to t~ with 1 - t~ = (1 - t)
    sqrt(1 - gamma^2). Then add noise until the state is as noisy as at t again, (t / t~) z +
    sqrt((1 - t)^2 - (t / t~)^2 (1 - t~)^2) z0. noise() draws a fresh z0 (B, L, d). After an exact
    jump to t~ the law at t is exact. rescale = False is the authors' way, z - (t~ - t) aim + gamma
    (1 - t) z0, exact only where the aim is the text itself. Both agree at gamma 0 and 1.

    weak makes it guided by a worse network with the same E: a move aims at D_weak + eta (D -
    D_weak), past D, away from what the worse one would do (autoguidance, arXiv 2406.02507). The
    last tokens are the likeliest of that, and `last` is not used. eta = 1 is no guidance.
    watch(model, hidden) sees every guess.
    """
    E = model.embed.weight
    tau = torch.linspace(0, 1, steps + 1, dtype=clock.t.dtype, device=z.device)
    for i, (here, there) in enumerate(zip(tau[:-1].split(1), tau[1:].split(1))):    # (1,) each
        s, t = clock.t_of_tau(here), clock.t_of_tau(there)
        beyond = 1 - (1 - t) * math.sqrt(1 - gamma ** 2)            # t~
        at = [tau.expand(len(z)) for tau in (here, clock.tau_of_t(beyond))[:times]]
        hidden = model(z, *at)
        weaker = weak(z, *at) if weak else None
        if watch:
            watch(model, hidden)
        if i < steps - 1:
            aim = expected_embedding(model.head, hidden, E, temperature)
            if weak:
                aim = torch.lerp(expected_embedding(weak.head, weaker, E, temperature), aim, eta)
            z = move(z, aim, s, beyond)
            if gamma and not rescale:
                back, fresh = (beyond - t).to(z.dtype), (gamma * (1 - t)).to(z.dtype)
                z = z - back * aim + fresh * noise()
            elif gamma:
                kept = t / beyond
                fresh = ((1 - t) ** 2 - kept ** 2 * (1 - beyond) ** 2).clamp_min(0).sqrt()
                z = kept.to(z.dtype) * z + fresh.to(z.dtype) * noise()
    if weak:
        def guided(hidden, weaker):
            with torch.autocast(E.device.type, enabled=False):      # for `most_likely`'s reason
                weak_d, d = (head(x.to(E.dtype)).softmax(-1)
                             for head, x in ((weak.head, weaker), (model.head, hidden)))
            return torch.lerp(weak_d, d, eta).argmax(-1)
        tokens = by_tokens(guided, model.head, hidden, weaker)
    else:
        tokens = last(model.head, hidden)
    return torch.where(model.known, model.y, tokens) if isinstance(model, Given) else tokens


def sample(model: Callable, clock: Clock, z: Tensor, steps: int, gamma: float = 0.0,
           noise: Callable[[], Tensor] | None = None, **options) -> Tensor:
    """Tokens (B, L) by Euler steps; see `decode`. With gamma, later steps can correct earlier ones.
    But every Euler step then goes as far as t~, so its error does not vanish with more steps. The
    jumps of a flow map have no such error."""
    return decode(model, 1, clock, z, steps, gamma, noise, **options)

# ------------------------------------------------------------------------------ the head in slices

SLICE = 2 ** 25  # logits held at once on a CPU: 128 MiB in float32, 667 tokens at V = 50,257


def slices(head: nn.Module, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices of several tensors (N, ..), of as many tokens as SLICE logits allow. Four times that
    on a GPU: each slice adds a (V, d) gradient to the head's, so fewer and larger are faster."""
    n = max(1, (4 if tensors[0].is_cuda else 1) * SLICE // head.out_features)
    return zip(*(tensor.split(n) for tensor in tensors))


@torch.no_grad()
def by_tokens(function: Callable[..., Tensor], head: nn.Module, *tensors: Tensor) -> Tensor:
    """function(*tensors) without gradient, a slice of the B L tokens at a time.

    tensors: (B, L, ..) each. function sees slices (n, ..) and returns one (n, ..); the result is
    (B, L, ..). `head` is asked for its vocabulary size only.
    """
    parts = [function(*part) for part in slices(head, *(x.flatten(0, 1) for x in tensors))]
    return torch.cat(parts).unflatten(0, tensors[0].shape[:2])


def draw_from(p: Tensor, rng: torch.Generator | None) -> Tensor:
    """One token a row, (n, 1), from probabilities p (n, V): the first at which their cumulative sum
    exceeds a uniform u.

    In float64. A float32 u has 24 bits, too few for the rarest tokens, here as in the Gumbel-max
    trick: they are hardly drawn, and generative perplexity looks better than it is (arXiv
    2409.02908). Where p is not finite the token is V, which no embedding has.
    """
    sums = p.double().cumsum(-1)
    u = torch.rand(len(p), 1, dtype=torch.float64, generator=rng, device=p.device)  # below 1
    return torch.searchsorted(sums, u * sums[:, -1:], right=True)


def cross_entropy(head: nn.Module, hidden: Tensor, y: Tensor, known: Tensor | None = None
                  ) -> tuple[Tensor, Tensor]:
    """-log D[y] in nats from hidden (B, L, d) and tokens y (B, L), 0 for known ones: the mean over
    all tokens, and each (B, L)."""
    function, tensors = SoftmaxCrossEntropy.apply, [y[..., None]]
    if known is not None:
        function = lambda logits, y, unknown: unknown * SoftmaxCrossEntropy.apply(logits, y)
        tensors.append(~known[..., None])
    total, losses = sum_by_tokens(function, head, hidden, *tensors)
    return total / y.numel(), losses[..., 0]


def sum_by_tokens(function: Callable[..., Tensor], head: nn.Module, hidden: Tensor,
                  *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of a loss over all tokens, and what `function` returned, (B, L, k), without gradient.

    function(head(hidden), *tensors) sees slices (n, ..) of hidden (B, L, d) and tensors (B, L, ..)
    and returns (n, k), losses in column 0. Gradients go to hidden and to the head's parameters, not
    to the other tensors. The sum can be differentiated once.
    """
    if torch.is_grad_enabled():
        flat = [x.flatten(0, 1) for x in tensors]
        total, values = SumBySlices.apply(function, head, hidden.flatten(0, 1), flat,
                                          *head.parameters())
        return total, values.unflatten(0, hidden.shape[:2])
    values = by_tokens(lambda hidden, *rest: function(head(hidden), *rest), head, hidden, *tensors)
    return values[..., 0].sum(), values


class SumBySlices(torch.autograd.Function):
    """The gradient of a sum over tokens is known as soon as the loss is. So each slice is
    differentiated in the forward pass and its logits are dropped. Keeping them would take B L V
    numbers, recomputing them would cost a fourth matrix product with V."""

    @staticmethod
    def forward(ctx, function, head, hidden, tensors, *parameters):
        values, of_hidden, of_head, kind = [], [], [], hidden.device.type
        half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        run = lambda part, *rest: function(head(part), *rest)
        if getattr(head, "compiled", False):  # so that logits are read and written fewer times
            run = torch.compile(run, dynamic=False, fullgraph=True)
        for part, *rest in slices(head, hidden.detach(), *tensors):
            with torch.enable_grad():
                part.requires_grad_()                               # (n, d)
                if half and len(part):
                    value, gradient, *more = in_float16(function, head, part, *rest)
                else:
                    value = run(part, *rest)                        # (n, k)
                    gradient, *more = torch.autograd.grad(value[:, 0].sum(), (part, *parameters))
            of_head = [whole.add_(x) for whole, x in zip(of_head, more)] if values else more
            of_hidden.append(gradient)
            values.append(value.detach())
            del value, more                                         # logits and (V, d) gradient
        values = torch.cat(values)                                  # (B L, k)
        ctx.mark_non_differentiable(values)
        ctx.save_for_backward(torch.cat(of_hidden), *of_head)
        ctx.dtype = hidden.dtype
        return values[:, 0].sum(), values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, _):
        of_hidden, *of_head = (saved.mul_(gradient) for saved in ctx.saved_tensors)
        return None, None, of_hidden.to(ctx.dtype), None, *of_head


def in_float16(function: Callable, head: nn.Module, part: Tensor, *rest: Tensor) -> list[Tensor]:
    """Values (n, k) of a slice, and the gradients for hidden (n, d) and the head's parameters in
    float32. The products between are in float16, whose range is short, and the loss scaler's factor
    comes in the backward pass, too late for what is 0 or infinite here. So the logits' gradient has
    a factor of its own, a power of 2. The sums bound every number in the products."""
    logits = head(part)                                             # (n, V)
    value = function(logits, *rest)
    slope, = torch.autograd.grad(value[:, 0].sum(), logits)
    size, largest = slope.abs(), [x.abs().max().clamp_min(1) for x in (part, head.weight)]
    bound = torch.stack([size.sum(0).max() * largest[0], size.sum(1).max() * largest[1]]).max()
    scale = torch.exp2(torch.log2(2 ** 15 / bound.float().clamp_min(1e-30)).floor())
    gradients = torch.autograd.grad(logits, (part, *head.parameters()), slope * scale)
    return [value, *(x.float() / scale for x in gradients)]


class SoftmaxCrossEntropy(torch.autograd.Function):
    """-sum_v p_v log softmax(logits)_v, (n, 1), from logits (n, V) and p: distributions (n, V) or
    tokens (n, 1). The gradient softmax(logits) - p is made in place, where autograd would fill an
    array with zeros for it and read it twice. That is a tenth of the head's time."""

    @staticmethod
    def forward(ctx, logits: Tensor, p: Tensor) -> Tensor:
        log_q = logits.log_softmax(-1)
        ctx.save_for_backward(log_q, p)
        if p.is_floating_point():
            return -(log_q * p).sum(-1, keepdim=True)
        return -log_q.gather(-1, p)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        log_q, p = ctx.saved_tensors
        q = log_q.exp_()
        if p.is_floating_point():
            q -= p
        else:
            q.scatter_add_(-1, p, q.new_full(p.shape, -1))
        return q.mul_(gradient), None
