"""python -m pytest tests/test_flow.py

flow.py against independent computations: the clock against simulation, quadrature and finite differences, latent noise
against dense noise, the sampler against the exact posterior of a known distribution.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from flow import (Clock, corrupt, cross_entropy, expected_embedding, flow_loss, latent_noise, most_likely,
                  move, noise_factor, sample_flow, step_size, stratified)

SIZES = [2, 26, 1024, 50257, 262144]


# ---------------------------------------------------------------- the clock

@pytest.mark.parametrize("V", [2, 7, 300])
def test_clock_is_the_decoding_rate_found_by_simulation(V):
    clock, n = Clock(V), 200_000
    for t in (0.2, 0.5, 0.7):
        x = (1 - t) * torch.randn(n, V)
        x[:, 0] += t
        right = (x.argmax(1) == 0).double().mean().item()
        simulated = (V * right - 1) / (V - 1)
        assert clock.tau_of_t(torch.tensor(t)).item() == pytest.approx(simulated, abs=5 * 0.5 / n ** 0.5 * V / (V - 1))


@pytest.mark.parametrize("V", SIZES)
def test_clock_agrees_with_direct_quadrature(V):
    """The definition, E_Z Phi(Z + r)^(V-1), on a ten times finer grid over Z; the table integrates over w = Z + r."""
    z = torch.linspace(-10, 10, 40_001, dtype=torch.float64)
    weight = torch.exp(-z ** 2 / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    t = torch.rand(40, dtype=torch.float64)
    P = torch.exp((V - 1) * torch.special.log_ndtr(z + (t / (1 - t))[:, None])) @ weight
    assert torch.allclose(Clock(V).tau_of_t(t), (V * P - 1) / (V - 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("V", SIZES)
def test_clock_ends_order_and_inverse(V):
    clock = Clock(V)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert clock.tau_of_t(ends).tolist() == [0, 1] and clock.t_of_tau(ends).tolist() == [0, 1]
    near = torch.tensor([0, 1e-12, 1e-7, 0.3, 0.7, 1 - 1e-7, 1 - 1e-12, 1], dtype=torch.float64)
    grid = torch.linspace(0, 1, 30_001, dtype=torch.float64)
    for function in (clock.tau_of_t, clock.t_of_tau):
        assert (function(grid).diff() >= 0).all() and function(near).isfinite().all()
    tau = grid[grid < 1 - 1e-9]
    assert torch.allclose(clock.tau_of_t(clock.t_of_tau(tau)), tau, atol=1e-12)


@pytest.mark.parametrize("V", SIZES)
def test_clock_speed_against_finite_differences(V):
    clock = Clock(V)
    t = clock.t_of_tau(torch.linspace(0.01, 0.99, 50, dtype=torch.float64))
    step = 1e-3  # several cells of the table, so that its corners average out
    difference = (clock.tau_of_t(t + step) - clock.tau_of_t(t - step)) / (2 * step)
    assert torch.allclose(clock.dtau_dt(t), difference, rtol=2e-3, atol=2e-3)
    assert clock.dtau_dt(torch.tensor([0.0, 1.0])).isfinite().all()


def test_embedding_aware_clock_is_the_published_one_at_a_weaker_signal():
    V, d, share = 1000, 40, 0.3
    t = torch.rand(30, dtype=torch.float64)
    r = t / (1 - t) * math.sqrt(d / V)
    published = Clock(V)
    weak = published.tau_of_t(r / (1 + r))
    expected = (1 - share) * published.tau_of_t(t) + share * weak
    assert torch.allclose(Clock(V, d, share).tau_of_t(t), expected, atol=1e-5)


def test_clock_refuses_nonsense():
    with pytest.raises(ValueError, match="V >= 2"):
        Clock(1)
    with pytest.raises(ValueError, match="embedding_share=1.5"):
        Clock(10, 4, 1.5)
    for d in (None, 0):
        with pytest.raises(ValueError, match="needs the width"):
            Clock(10, d, 0.5)
    assert Clock(10, 12, 0.5).tau.equal(Clock(10).tau)                          # a network that sees all V


def test_stratified_puts_one_draw_in_every_stratum():
    draws = stratified(50, torch.Generator().manual_seed(0))
    assert sorted((draws * 50).long().tolist()) == list(range(50))
    assert draws.tolist() != sorted(draws.tolist())


# ---------------------------------------------------------------- noise

def test_factor_is_a_root_of_the_gram_matrix():
    E = torch.randn(50, 8, dtype=torch.float64)
    C = noise_factor(E, tokens=100)
    assert torch.allclose(C @ C.T, E.T @ E, rtol=1e-5, atol=1e-4)


def test_factor_is_left_out_where_it_is_singular_or_dear():
    assert noise_factor(torch.randn(8, 8), tokens=100) is None    # V <= d: E^T E is singular
    assert noise_factor(torch.randn(50, 8), tokens=7) is None     # a Gram matrix for fewer tokens than it has rows


def test_factor_is_float32_under_autocast():
    E = torch.randn(500, 16)
    with torch.autocast("cpu", torch.bfloat16):
        C = noise_factor(E, 100)
        z = latent_noise(E, C, lambda n: torch.randn(2, 3, n))
    assert C.dtype == z.dtype == torch.float32
    assert torch.allclose(C @ C.T, E.T @ E, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("tokens", [1, 10_000])
def test_latent_noise_has_the_law_of_dense_noise(tokens):
    """Mean 0 and covariance E^T E, on both paths; a Gaussian has no more to it."""
    E = torch.randn(20, 5, dtype=torch.float64)
    factor = noise_factor(E, tokens)
    assert (factor is None) == (tokens == 1)
    z = latent_noise(E, factor, lambda n: torch.randn(200, 1000, n)).flatten(0, 1)
    gram = E.T @ E
    scale = gram.diagonal().mean()
    assert (z.mean(0).abs() < 0.02 * scale.sqrt()).all()
    assert ((z.T @ z / len(z) - gram).abs() < 0.02 * scale).all()


def test_dense_noise_by_slices_of_the_vocabulary_is_one_product():
    E = torch.randn(3000, 4)  # three slices
    rows = []

    def normal(n):
        rows.append(torch.randn(2, 3, n))
        return rows[-1]
    z = latent_noise(E, None, normal)
    assert len(rows) == 3
    assert torch.allclose(z, torch.cat(rows, dim=-1) @ E, atol=1e-4)


class Linear:
    """The smallest model: hidden = z, logits = z W."""

    def __init__(self, E, W):
        self.embed, self.head = torch.nn.Embedding.from_pretrained(E, freeze=False), torch.nn.Linear(*W.T.shape)
        self.head.weight, self.head.bias = torch.nn.Parameter(W), torch.nn.Parameter(torch.zeros(len(W)).to(W))

    def __call__(self, z, tau, tau_t=None, attention="auto"):
        return z


def test_latent_noise_gives_the_mean_gradient_of_dense_noise_with_less_variance():
    V, d, n = 200, 4, 400
    E = torch.randn(V, d, dtype=torch.float64) / V ** 0.5
    W = torch.randn(V, d, dtype=torch.float64)
    model, clock = Linear(E, W), Clock(V)
    y, tau = torch.randint(V, (16, 4)), torch.linspace(0.1, 0.9, 16)
    gradients = {}
    for path in ("latent", "dense"):
        draws = []
        for _ in range(n):
            factor = noise_factor(model.embed.weight, 64) if path == "latent" else None
            z0 = latent_noise(model.embed.weight, factor, lambda k: torch.randn(16, 4, k, dtype=torch.float64))
            loss, _ = flow_loss(model, clock, y, tau, z0)
            draws.append(torch.autograd.grad(loss, model.embed.weight)[0])
        gradients[path] = torch.stack(draws)
    difference = gradients["latent"].mean(0) - gradients["dense"].mean(0)
    variance = {path: draws.var(0) for path, draws in gradients.items()}
    error = ((variance["latent"] + variance["dense"]) / n).sqrt()
    z_scores = difference / error
    assert z_scores.pow(2).mean() < 1.3                            # 1 for equal means, over 800 entries
    assert variance["dense"].sum() > 5 * variance["latent"].sum()  # about V / d = 50 from the noise alone


# ---------------------------------------------------------------- the state and the head

def test_corrupt_is_the_interpolant_seen_through_E():
    V, E = 6, torch.randn(6, 3, dtype=torch.float64)
    y, t, x0 = torch.randint(V, (2, 5)), torch.tensor([0.3, 1.0]), torch.randn(2, 5, V, dtype=torch.float64)
    x = (1 - t)[:, None, None] * x0 + t[:, None, None] * F.one_hot(y, V)
    assert torch.allclose(corrupt(E, y, t, x0 @ E), x @ E)


def test_euler_step_is_the_velocity_times_the_time():
    z, D = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    s, t = torch.tensor([0.1, 0.5, 0.0]).double(), torch.tensor([0.2, 1.0, 0.0]).double()
    velocity = (D - z) / (1 - s)[:, None, None]
    assert torch.allclose(move(z, D, s, t), z + (t - s)[:, None, None] * velocity)
    assert step_size(s, t)[1:].tolist() == [1, 0]
    assert step_size(torch.ones(1), torch.ones(1)).tolist() == [0]


@pytest.mark.parametrize("slice_size", [10, 21, 10 ** 9])
def test_head_in_slices_gives_the_same_values_and_gradients(slice_size, monkeypatch):
    monkeypatch.setattr("head.SLICE", slice_size)
    head, hidden = torch.nn.Linear(4, 7).double(), torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    y, E = torch.randint(7, (2, 5)), torch.randn(7, 4, dtype=torch.float64)
    logits = head(hidden)
    expected = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")
    total, losses = cross_entropy(head, hidden, y)
    assert torch.allclose(losses, expected) and torch.allclose(total, expected.sum()) and not losses.requires_grad
    parameters = [hidden, head.weight, head.bias]
    for ours, plain in zip(torch.autograd.grad(3 * total, parameters),
                           torch.autograd.grad(3 * expected.sum(), parameters, retain_graph=True)):
        assert torch.allclose(ours, plain)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(cross_entropy(head, hidden, y), (total, losses)))
    assert torch.allclose(expected_embedding(head, hidden, E), logits.softmax(-1) @ E)
    assert torch.equal(most_likely(head, hidden), logits.argmax(-1))


def test_no_tensor_of_vocabulary_width_for_all_tokens(monkeypatch):
    """The largest tensor with a vocabulary axis is one slice, in the forward and in the backward pass."""
    monkeypatch.setattr("head.SLICE", 3000)
    V, d, heights = 1000, 8, []
    model, clock = Linear(torch.randn(V, d) / V ** 0.5, torch.randn(V, d)), Clock(V)
    model.head.register_forward_hook(lambda module, inputs, logits: heights.append(logits.shape[0]))

    def normal(n):
        assert n < V
        return torch.randn(4, 16, n)
    z0 = latent_noise(model.embed.weight, noise_factor(model.embed.weight, 64), normal)
    flow_loss(model, clock, torch.randint(V, (4, 16)), torch.rand(4), z0)[0].backward()
    assert max(heights) == 3 and len(heights) == 22  # 64 tokens in threes, once: nothing is remade in the backward pass


# ---------------------------------------------------------------- the flow, against the exact posterior

class Exact:
    """The exact denoiser of a distribution over sequences, by Bayes over all V^L of them, with E the identity.

    x_t given y is Gaussian around t y with deviation 1 - t, so P(y | x_t) is in proportion to P(y) exp(r x . y / (1-t)).
    """

    def __init__(self, probabilities, clock):
        V, L = probabilities.shape[0], probabilities.ndim
        self.texts = F.one_hot(torch.tensor(list(itertools.product(range(V), repeat=L))), V).double()  # (N, L, V)
        self.log_p = probabilities.flatten().log()
        self.clock = clock
        self.embed = torch.nn.Embedding.from_pretrained(torch.eye(V, dtype=torch.float64))
        self.head = torch.nn.Linear(V, V).double()
        torch.nn.init.eye_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def __call__(self, z, tau):
        t = self.clock.t_of_tau(tau)[:, None]                                   # (B, 1)
        score = torch.einsum("blv,nlv->bn", z, self.texts) * t / (1 - t) ** 2
        return torch.einsum("bn,nlv->blv", (self.log_p + score).softmax(-1), self.texts).log()


def test_flow_of_the_exact_posterior_generates_the_distribution():
    """Two tokens of three, dependent: independent decoding would give other pairs their product of marginals."""
    p = torch.tensor([[0.30, 0.05, 0.0], [0.0, 0.25, 0.10], [0.20, 0.0, 0.10]], dtype=torch.float64)
    clock = Clock(3)
    model = Exact(p, clock)
    tokens = sample_flow(model, clock, torch.randn(20_000, 2, 3, dtype=torch.float64), steps=100)
    found = torch.bincount(tokens[:, 0] * 3 + tokens[:, 1], minlength=9).double().view(3, 3) / len(tokens)
    assert torch.allclose(found, p, atol=0.02)
    assert found[p == 0].max() < 0.005


@pytest.mark.parametrize("gamma, likeliest", [(0.2, 0.30), (0.9, 0.335)])
def test_stochastic_sampling_keeps_the_distribution_but_for_the_length_of_its_steps(gamma, likeliest):
    """Every Euler step goes on to 1 - t~ = (1 - t) sqrt(1 - gamma^2), however many there are: with gamma = 0.9 more than
    half of the way that is left, which here makes the likeliest text likelier still, by a tenth."""
    p = torch.tensor([[0.30, 0.05, 0.0], [0.0, 0.25, 0.10], [0.20, 0.0, 0.10]], dtype=torch.float64)
    noise = lambda: torch.randn(20_000, 2, 3, dtype=torch.float64)
    tokens = sample_flow(Exact(p, Clock(3)), Clock(3), noise(), steps=100, gamma=gamma, noise=noise)
    found = torch.bincount(tokens[:, 0] * 3 + tokens[:, 1], minlength=9).double().view(3, 3) / len(tokens)
    assert abs(found[0, 0] - likeliest) < 0.015
    assert torch.allclose(found, p, atol=0.02 if gamma == 0.2 else 0.05)


def test_cross_entropy_of_the_exact_posterior_is_the_smallest():
    """Monte-Carlo: any other denoiser, here one with a wrong prior, has a larger loss."""
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    clock = Clock(3)
    y = torch.multinomial(p, 40_000, replacement=True)[:, None]
    tau, z0 = torch.rand(40_000), torch.randn(40_000, 1, 3, dtype=torch.float64)
    exact, wrong = (flow_loss(Exact(q, clock), clock, y, tau, z0)[0] for q in (p, torch.ones(3).double() / 3))
    assert exact < wrong - 0.02


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_speed_of_the_clock_that_sees_the_embedding(share):
    clock, t, step = Clock(1024, 64, share), torch.linspace(0.05, 0.97, 50, dtype=torch.float64), 1e-3
    difference = (clock.tau_of_t(t + step) - clock.tau_of_t(t - step)) / (2 * step)
    assert torch.allclose(clock.dtau_dt(t), difference, rtol=2e-2, atol=2e-3)
