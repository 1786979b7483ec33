"""python -m pytest tests/test_flow.py

flow.py against independent computations: the clock against simulation and quadrature, latent noise
against dense noise, the sampler against the exact posterior of a known distribution."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import flow
from flow import (Clock, corrupt, cross_entropy, expected_embedding, latent_noise, most_likely,
                  move, noise_factor, step_size)
from lib.machine import generator

SIZES = [2, 26, 1024, 50257, 262144]
CLOCKS = [*((V, V, 0.0) for V in SIZES), (1024, 64, 0.4), (1024, 64, 1.0), (50257, 768, 0.5)]


@pytest.mark.parametrize("V", [2, 7, 300])
def test_clock_is_the_decoding_rate_found_by_simulation(V):
    clock, n = Clock(V), 200_000
    for t in (0.2, 0.5, 0.7):
        x = (1 - t) * torch.randn(n, V)
        x[:, 0] += t
        right = (x.argmax(1) == 0).double().mean().item()
        error = 5 * 0.5 / n ** 0.5
        found = clock.tau_of_t(torch.tensor(t)).item()
        assert found == pytest.approx((V * right - 1) / (V - 1), abs=error * V / (V - 1))


def quadrature(V, r):
    """tau and d tau / d r by their definitions, P = E_Z Phi(Z + r)^(V-1), on a fine grid over Z."""
    z = torch.linspace(-10, 10, 40_001, dtype=torch.float64)
    weight = torch.exp(-z ** 2 / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    w = z + r[:, None]
    log_cdf = torch.special.log_ndtr(w)
    P = torch.exp((V - 1) * log_cdf) @ weight
    slope = torch.exp((V - 2) * log_cdf - w ** 2 / 2) @ weight / math.sqrt(2 * math.pi)
    return (V * P - 1) / (V - 1), V * slope


@pytest.mark.parametrize("V, d, share", CLOCKS)
def test_clock_and_its_speed_agree_with_direct_quadrature(V, d, share):
    clock, weak = Clock(V, d, share), math.sqrt(d / V)
    spread = clock.t_of_tau(torch.linspace(0.01, 0.99, 50, dtype=torch.float64))
    t = torch.cat([torch.rand(40, dtype=torch.float64), spread])
    r = t / (1 - t)
    (tau, speed), (weak_tau, weak_speed) = quadrature(V, r), quadrature(V, weak * r)
    speed = torch.lerp(speed, weak * weak_speed, share) / (1 - t) ** 2
    assert torch.allclose(clock.tau_of_t(t), torch.lerp(tau, weak_tau, share), atol=1e-5, rtol=0)
    error = (clock.dtau_dt(t) - speed).abs().max() / speed.max()
    assert error < (2e-3 if share else 1e-4)


@pytest.mark.parametrize("V", SIZES)
def test_clock_ends_order_and_inverse(V):
    clock = Clock(V)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert clock.tau_of_t(ends).tolist() == [0, 1] and clock.t_of_tau(ends).tolist() == [0, 1]
    near = torch.tensor([0, 1e-12, 1e-7, 0.3, 0.7, 1 - 1e-7, 1 - 1e-12, 1], dtype=torch.float64)
    grid = torch.linspace(0, 1, 30_001, dtype=torch.float64)
    for function in (clock.tau_of_t, clock.t_of_tau):
        assert (function(grid).diff() >= 0).all() and function(near).isfinite().all()
    assert clock.dtau_dt(near).isfinite().all()
    tau = grid[grid < 1 - 1e-9]
    assert torch.allclose(clock.tau_of_t(clock.t_of_tau(tau)), tau, atol=1e-12)


def test_clock_refuses_nonsense():
    with pytest.raises(ValueError, match="V >= 2"):
        Clock(1)
    with pytest.raises(ValueError, match="embedding_share=1.5"):
        Clock(10, 4, 1.5)
    for d in (None, 0):
        with pytest.raises(ValueError, match="needs a width"):
            Clock(10, d, 0.5)
    assert Clock(10, 12, 0.5).tau.equal(Clock(10).tau)  # the network sees all V


def test_factor_is_a_root_of_the_gram_matrix_with_its_gradient():
    """The gradient, of one product, against autograd's own through E^T E and Cholesky."""
    E, weights = torch.randn(50, 8, dtype=torch.float64).requires_grad_(), torch.randn(8, 8)
    C = noise_factor(E, tokens=100)
    assert torch.allclose(C @ C.T, E.T @ E, rtol=1e-5, atol=1e-4)
    gram = E.T @ E
    jitter = 1e-6 * gram.diagonal().mean().detach() * torch.eye(8, dtype=torch.float64)
    plain = torch.linalg.cholesky(gram + jitter)
    ours, expected = (torch.autograd.grad((weights * x.sin()).sum(), E)[0] for x in (C, plain))
    assert torch.equal(C, plain) and torch.allclose(ours, expected, rtol=1e-10, atol=1e-10)


def test_factor_is_left_out_where_it_is_singular_or_dear():
    assert noise_factor(torch.randn(8, 8), tokens=100) is None
    assert noise_factor(torch.randn(50, 8), tokens=7) is None


def test_noise_is_float32_under_autocast():
    E = torch.randn(500, 16)
    with torch.autocast("cpu", torch.bfloat16):
        C = noise_factor(E, 100)
        z = latent_noise(E, (4, 25), generator(0))
    assert C.dtype == z.dtype == torch.float32
    assert torch.allclose(C @ C.T, E.T @ E, rtol=1e-4, atol=1e-2)
    assert torch.equal(z, latent_noise(E, (4, 25), generator(0), C))  # a factor formed before


@pytest.mark.parametrize("V, d", [(20, 5), (5, 8)])
def test_latent_noise_has_the_law_of_dense_noise(V, d):
    """Mean 0 and covariance E^T E, with a factor and without: all there is to a Gaussian."""
    E = torch.randn(V, d, dtype=torch.float64)
    z = latent_noise(E, (200, 1000), generator(0)).flatten(0, 1)
    gram = E.T @ E
    scale = gram.diagonal().mean()
    assert (z.mean(0).abs() < 0.02 * scale.sqrt()).all()
    assert ((z.T @ z / len(z) - gram).abs() < 0.02 * scale).all()


def test_dense_noise_by_slices_of_the_vocabulary_is_one_product():
    E, rng = torch.randn(3000, 4), generator(0)
    x0 = torch.cat([torch.randn(1, 3, n, generator=rng) for n in (1024, 1024, 952)], dim=-1)
    assert torch.allclose(latent_noise(E, (1, 3), generator(0)), x0 @ E, atol=1e-4)


class Linear:
    """The smallest model: hidden = z, logits = z W^T."""

    def __init__(self, E, W):
        self.embed = torch.nn.Embedding.from_pretrained(E, freeze=False)
        self.head = torch.nn.Linear(*W.T.shape, dtype=W.dtype)
        self.head.weight = torch.nn.Parameter(W)
        torch.nn.init.zeros_(self.head.bias)

    def __call__(self, z, tau):
        return z


def test_latent_noise_gives_the_mean_gradient_of_dense_noise_with_less_variance(monkeypatch):
    V, d, n = 200, 4, 400
    E = torch.randn(V, d, dtype=torch.float64) / V ** 0.5
    model, clock, rng = Linear(E, torch.randn(V, d, dtype=torch.float64)), Clock(V), generator(0)
    y, tau = torch.randint(V, (16, 4)), torch.linspace(0.1, 0.9, 16)

    def gradients():
        losses = (flow.loss(model, clock, y, tau, rng)[0] for _ in range(n))
        return torch.stack([torch.autograd.grad(x, model.embed.weight)[0] for x in losses])
    latent = gradients()
    monkeypatch.setattr(flow, "noise_factor", lambda *_: None)
    dense = gradients()
    error = ((latent.var(0) + dense.var(0)) / n).sqrt()
    z_scores = (latent.mean(0) - dense.mean(0)) / error
    assert z_scores.pow(2).mean() < 1.3                     # 1 for equal means, over 800 entries
    assert dense.var(0).sum() > 5 * latent.var(0).sum()     # about V / d = 50 from the noise alone


def test_corrupt_is_the_interpolant_seen_through_E():
    V, E = 6, torch.randn(6, 3, dtype=torch.float64)
    y, t, x0 = torch.randint(V, (2, 5)), torch.tensor([0.3, 1.0]), torch.randn(2, 5, V).double()
    x = (1 - t)[:, None, None] * x0 + t[:, None, None] * F.one_hot(y, V)
    assert torch.allclose(corrupt(E, y, t, x0 @ E), x @ E)


def test_replaced_tokens_are_those_of_the_row_before_at_the_same_place():
    rows, L, share = 4000, 50, 0.4
    y = torch.arange(rows)[:, None] * L + torch.arange(L)           # every token is its own place
    shown = flow.replace(y, share, generator(1))
    wrong = shown != y
    assert torch.equal(shown[wrong], y.roll(1, 0)[wrong])
    # A row's count is binomial given its chance ~ U(0, share): by the laws of total expectation and
    # total variance.
    count = wrong.double().sum(1)
    mean = L * share / 2
    variance = L * (share / 2 - share ** 2 / 3) + (L * share) ** 2 / 12
    assert count.mean().item() == pytest.approx(mean, abs=5 * (variance / rows) ** 0.5)
    assert count.var().item() == pytest.approx(variance, rel=0.1)


def test_the_loss_asks_for_the_text_behind_replaced_tokens():
    """A head that reads the nearest embedding from an input without noise, tau = 1: it is wrong
    at the replaced tokens and nowhere else."""
    V, B, L = 11, 6, 40
    E = torch.randn(V, 64, generator=torch.Generator().manual_seed(0))
    head = torch.nn.Linear(64, V, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.linalg.pinv(E).T * 100)

    def model(z, tau):
        return z
    model.embed, model.head = torch.nn.Embedding.from_pretrained(E), head
    y = torch.randint(V, (B, L), generator=torch.Generator().manual_seed(1))
    for share in (0.0, 0.5):
        _, losses = flow.loss(model, Clock(V), y, torch.ones(B), generator(2), share)
        rng = generator(2)
        latent_noise(E, y.shape, rng)
        shown = flow.replace(y, share, rng)
        assert torch.equal(losses > 1, shown != y)
        assert (shown != y).any() == bool(share)


def test_euler_step_is_the_velocity_times_the_time():
    z, D = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    s, t = torch.tensor([[0.1, 0.5, 0.0], [0.2, 1.0, 0.0]]).double()
    velocity = (D - z) / (1 - s)[:, None, None]
    assert torch.allclose(move(z, D, s, t), z + (t - s)[:, None, None] * velocity)
    assert step_size(s, t)[1:].tolist() == [1, 0]
    assert step_size(torch.ones(1), torch.ones(1)).tolist() == [0]


@pytest.mark.parametrize("slice_size", [10, 21, 10 ** 9])
def test_head_in_slices_gives_the_same_values_and_gradients(slice_size, monkeypatch):
    monkeypatch.setattr(flow, "SLICE", slice_size)
    head = torch.nn.Linear(4, 7).double()
    hidden, E = torch.randn(2, 5, 4).double().requires_grad_(), torch.randn(7, 4).double()
    y, logits = torch.randint(7, (2, 5)), head(hidden)
    expected = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")
    mean, losses = cross_entropy(head, hidden, y)
    assert torch.allclose(losses, expected) and not losses.requires_grad
    assert torch.allclose(mean, expected.mean())
    parameters = [hidden, head.weight, head.bias]
    plain = torch.autograd.grad(3 * expected.mean(), parameters, retain_graph=True)
    for ours, reference in zip(torch.autograd.grad(3 * mean, parameters), plain):
        assert torch.allclose(ours, reference)
    with torch.no_grad():
        assert all(map(torch.equal, cross_entropy(head, hidden, y), (mean, losses)))
    for temperature in (1.0, 0.4):
        D = (logits / temperature).softmax(-1)
        assert torch.allclose(expected_embedding(head, hidden, E, temperature), D @ E)
    assert torch.equal(most_likely(head, hidden), logits.argmax(-1))


def test_no_tensor_of_vocabulary_width_for_all_tokens(monkeypatch):
    """The widest noise is narrower than V. One slice of logits exists at a time, and each once:
    the backward pass recomputes none."""
    monkeypatch.setattr(flow, "SLICE", 3000)
    V, d, heights, widths, randn = 1000, 8, [], [], torch.randn
    model, clock = Linear(torch.randn(V, d) / V ** 0.5, torch.randn(V, d)), Clock(V)
    model.head.register_forward_hook(lambda head, inputs, logits: heights.append(len(logits)))
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: (
        widths.append(shape[-1]) or randn(*shape, **options)))
    y = torch.randint(V, (4, 16))
    flow.loss(model, clock, y, torch.rand(4), generator(0))[0].backward()
    assert widths == [d] and max(heights) == 3 and len(heights) == 22  # 64 tokens in threes


P = torch.tensor([[0.30, 0.05, 0.0], [0.0, 0.25, 0.10], [0.20, 0.0, 0.10]], dtype=torch.float64)


class Exact:
    """The exact denoiser of a distribution over texts, by Bayes over all V^L, with E = identity.

    x_t given y is Gaussian around t y with deviation 1 - t, so P(y | x_t) is in proportion to
    P(y) exp(r x . y / (1 - t)).
    """

    def __init__(self, probabilities):
        V, L = probabilities.shape[0], probabilities.ndim
        texts = torch.tensor(list(itertools.product(range(V), repeat=L)))
        self.texts = F.one_hot(texts, V).double()                   # (N, L, V)
        self.log_p, self.clock = probabilities.flatten().log(), Clock(V)
        eye = torch.eye(V, dtype=torch.float64)
        self.embed, self.head = torch.nn.Embedding.from_pretrained(eye), Linear(eye, eye).head

    def __call__(self, z, tau):
        t = self.clock.t_of_tau(tau)[:, None]                       # (B, 1)
        score = torch.einsum("blv,nlv->bn", z, self.texts) * t / (1 - t) ** 2
        weights = (self.log_p + score).softmax(-1)
        return torch.einsum("bn,nlv->blv", weights, self.texts).log()

    def sample(self, gamma=0.0):
        """The distribution of 20,000 texts of two tokens, in 100 steps."""
        noise = lambda: torch.randn(20_000, 2, 3, dtype=torch.float64)
        tokens = flow.sample(self, self.clock, noise(), 100, gamma, noise)
        return torch.bincount(tokens[:, 0] * 3 + tokens[:, 1], minlength=9).view(3, 3) / 20_000


def test_flow_of_the_exact_posterior_generates_the_distribution():
    """Two dependent tokens of three: decoded independently, zero entries would occur."""
    found = Exact(P).sample()
    assert torch.allclose(found.double(), P, atol=0.02) and found[P == 0].max() < 0.005


@pytest.mark.parametrize("gamma, likeliest", [(0.2, 0.30), (0.9, 0.335)])
def test_stochastic_sampling_keeps_the_distribution_but_for_the_length_of_its_steps(
        gamma, likeliest):
    """Every Euler step goes on to 1 - t~ = (1 - t) sqrt(1 - gamma^2), however many there are. With
    gamma = 0.9 that is over half of what is left, and the likeliest text gains a tenth."""
    found = Exact(P).sample(gamma)
    assert abs(found[0, 0] - likeliest) < 0.015
    assert torch.allclose(found.double(), P, atol=0.02 if gamma == 0.2 else 0.05)


def test_cross_entropy_of_the_exact_posterior_is_the_smallest():
    """Monte Carlo: any other denoiser, here one with a wrong prior, has a larger loss."""
    p, tau = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.rand(40_000)
    y = torch.multinomial(p, 40_000, replacement=True)[:, None]
    exact, wrong = (flow.loss(Exact(q), Clock(3), y, tau, generator(0))[0]
                    for q in (p, torch.ones(3).double() / 3))
    assert exact < wrong - 0.02


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_temperature_sharpens_every_guess_but_the_last(temperature):
    V, clock, asked = 5, Clock(5), []
    model = Linear(torch.randn(V, 4).double(), 2 * torch.randn(V, 4).double())
    z = torch.randn(3, 2, 4, dtype=torch.float64)
    last = lambda head, hidden: asked.append(hidden) or head(hidden)
    logits = flow.sample(model, clock, z, 3, last=last, temperature=temperature)
    times = clock.t_of_tau(torch.linspace(0, 1, 4, dtype=torch.float64))
    for s, t in itertools.pairwise(times[:-1]):
        D = (z @ model.head.weight.T / temperature).softmax(-1)
        z = z + (t - s) / (1 - s) * (D @ model.embed.weight - z)
    assert torch.allclose(asked[0], z) and torch.allclose(logits, z @ model.head.weight.T)
