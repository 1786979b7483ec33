"""python -m pytest tests/test_bound.py

eval/bound.py: the exact posterior of a small distribution gives -log p(y), in every embedding; any
other denoiser gives more than the process it drives, which is simulated; one case by quadrature.

Monte-Carlo estimates are compared within five standard errors.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from eval.bound import accuracy, bits_per_character, likelihood_bound, squared_error, whiten
from flow import Clock
from model import FlowTransformer, ModelConfig
from test_learning import CLOCK, JOINT

V, L = JOINT.shape[0], JOINT.ndim
PAIRS = JOINT.nonzero()                                                 # (5, L), all that can occur
SURPRISE = -JOINT[JOINT > 0].log()                                              # (5,), -log p(y)
END = 60.0                                                     # decoding is exact for every E below


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def embedding(V, d, rank=None):
    """A matrix (V, d) of given rank with rows well apart: harmonics, then a random matrix."""
    rank = rank or min(V, d)
    angles = 2 * math.pi * torch.arange(V).double()[:, None] * torch.arange(V) / V
    rows = torch.cat([angles.cos(), angles.sin()], dim=1)[:, [1, V + 1, 2, 0][:rank]]    # (V, rank)
    return rows @ torch.randn(rank, d, dtype=torch.float64, generator=generator(0))


EMBEDDINGS = {"identity": torch.eye(V).double(), "V > d": embedding(V, 3), "V < d": embedding(V, 6),
              "V >> d": embedding(V, 2), "dependent columns": embedding(V, 3, rank=2)}


class Posterior:
    """The exact denoiser of a distribution over texts, by Bayes over all V^L, then `change`d.

    z given y is Gaussian around t E[y] with covariance (1-t)^2 E^T E, on the row space of E.
    """

    def __init__(self, probabilities, E, clock=CLOCK, change=lambda D: D):
        size, length = probabilities.shape[0], probabilities.ndim
        texts = torch.tensor(list(itertools.product(range(size), repeat=length)))
        self.texts = F.one_hot(texts, size).double()
        self.log_p, self.clock, self.change = probabilities.flatten().log(), clock, change
        self.read = torch.linalg.pinv(E.T @ E, hermitian=True) @ E.T            # (d, V)
        self.visible = (E @ self.read).diagonal()                               # (V,)
        self.embed = torch.nn.Embedding.from_pretrained(E)
        self.head = torch.nn.Identity()                       # what __call__ returns are the logits
        self.head.out_features = size

    def __call__(self, z, tau):
        t = self.clock.t_of_tau(tau)[:, None, None]
        score = (t * (z @ self.read) - t ** 2 / 2 * self.visible) / (1 - t) ** 2         # (B, L, V)
        posterior = (self.log_p + torch.einsum("blv,nlv->bn", score, self.texts)).softmax(-1)
        D = self.change(torch.einsum("bn,nlv->blv", posterior, self.texts))
        return D.clamp_min(1e-300).log()


def tempered(power):
    return lambda D: D ** power / (D ** power).sum(-1, keepdim=True)


def estimate(model, texts, nu_max=END, n=3000, clock=CLOCK, part="nats"):
    """For each of the texts (k, L), the mean of n estimates and its standard error: (k,), (k,)."""
    found = likelihood_bound(model, clock, texts.repeat_interleave(n, 0), generator(), 12, nu_max)
    values = getattr(found, part).view(len(texts), n)
    return values.mean(1), values.std(1) / n ** 0.5 + 1e-9


def agree(found, expected):
    mean, error = found
    return bool(((mean - expected).abs() < 5 * error).all()) and error.max() < 0.06


# ------------------------------------------------------------------------------ the exact posterior

@pytest.mark.parametrize("E", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_exact_posterior_gives_the_probability_of_every_text(E):
    assert agree(estimate(Posterior(JOINT, E), PAIRS), SURPRISE)


@pytest.mark.parametrize("nu_max", [0.3, 3.0, 30.0])
def test_one_token_is_exact_at_any_end(nu_max):
    """The path alone would miss what is still unknown at nu_max."""
    p = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64)
    model = Posterior(p, embedding(V, 3))
    assert agree(estimate(model, torch.arange(V)[:, None], nu_max), -p.log())


def test_two_tokens_become_exact_as_the_end_moves_out():
    """At nu_max = 0 the bound is that of independent tokens; where each is certain it is exact."""
    p = JOINT[JOINT > 0]
    independent = -(JOINT.sum(1)[:, None] * JOINT.sum(0))[JOINT > 0].log()
    model = Posterior(JOINT, embedding(V, 3))
    at_zero = likelihood_bound(model, CLOCK, PAIRS, generator(), nu_max=0)
    assert torch.allclose(at_zero.nats, independent)
    means, errors = zip(*(estimate(model, PAIRS, nu_max) for nu_max in (0.5, 1.5, 4, END)))
    excess = torch.stack(means) @ p - p @ SURPRISE                              # (4,)
    error = (torch.stack(errors) * p).norm(dim=1)
    assert excess[0] < p @ (independent - SURPRISE) and (excess[:-1] > excess[1:]).all()
    assert excess[2] > 5 * error[2] and excess[3].abs() < 5 * error[3]


def test_default_end_is_nearly_exact():
    texts = PAIRS.repeat_interleave(3000, 0)
    found = likelihood_bound(Posterior(JOINT, EMBEDDINGS["identity"]), CLOCK, texts, generator())
    mean = found.nats.view(5, -1).mean(1) @ JOINT[JOINT > 0]
    assert mean.item() == pytest.approx((JOINT[JOINT > 0] @ SURPRISE).item(), abs=0.03)
    assert found.decoding.mean() < 0.03


# ---------------------------------------------------------------------------------- other denoisers

def test_exact_posterior_of_another_distribution_gives_that_ones_probability():
    """Here independent tokens of the right frequencies."""
    product = JOINT.sum(1)[:, None] * JOINT.sum(0)
    assert agree(estimate(Posterior(product, embedding(V, 3)), PAIRS), -product[JOINT > 0].log())


@pytest.mark.parametrize("power", [0.6, 1.6])
def test_wrong_denoisers_cost_more_in_any_coordinates(power):
    """And as much for E A, A invertible, where the denoiser is the same function of x."""
    E = embedding(V, 3)
    A = torch.randn(3, 3, dtype=torch.float64, generator=generator(5))
    (mean, error), (other, _) = (estimate(Posterior(JOINT, matrix, change=tempered(power)), PAIRS)
                                 for matrix in (E, E @ A))
    p = JOINT[JOINT > 0]
    assert p @ mean > p @ SURPRISE + 5 * (p * error).norm()
    assert ((mean - other).abs() < 5 * 2 ** 0.5 * error).all()


@pytest.mark.parametrize("power, nu_max", [(1.0, 3.0), (0.8, 6.0), (1.5, 6.0)])
def test_bounds_the_probability_of_the_process_that_the_denoiser_drives(power, nu_max):
    """Grow Y by dY = D E~ dnu + dW, draw each token from D at nu_max, and count, for every text."""
    model, n, steps = Posterior(JOINT, EMBEDDINGS["identity"], change=tempered(power)), 20_000, 60
    levels, rng = nu_max * torch.linspace(0, 1, steps + 1).double() ** 2, generator()
    Y = torch.zeros(n, L, V, dtype=torch.float64)
    for nu, step in zip(levels, [*levels.diff(), None]):
        t = (nu.sqrt() / (1 + nu.sqrt())).expand(n)
        D = model(Y * (1 - t[0]) / nu.sqrt().clamp_min(1e-9), CLOCK.tau_of_t(t)).softmax(-1)
        if step:
            Y = Y + D * step + step.sqrt() * torch.empty_like(Y).normal_(generator=rng)
    tokens = torch.multinomial(D.flatten(0, 1), 1, generator=rng).view(n, L)
    counts = torch.bincount(tokens @ torch.tensor([V, 1]), minlength=V ** L).view(V, V)[JOINT > 0]
    mean, error = estimate(model, PAIRS, nu_max)
    assert (mean > -(counts / n).log() - 5 * (error ** 2 + 1 / counts).sqrt()).all()


@pytest.mark.parametrize("V, d", [(50, 16), (10, 16)])
def test_untrained_network(V, d):
    """It guesses all tokens alike: the same error at all levels, the path nu_max / 2 times it."""
    net, clock = FlowTransformer(ModelConfig(V, 8, 1, 2, d, n_time=8)).eval(), Clock(V)
    y, E = torch.randint(V, (8,)).repeat(100, 1), whiten(net.embed.weight).double()
    recorded = []
    net.register_forward_hook(
        lambda module, z, hidden: recorded.append((z[0].dtype, hidden.requires_grad)))
    with torch.autocast("cpu", torch.bfloat16):
        found, again = (likelihood_bound(net, clock, y, generator(), 32, 20.0, white)
                        for white in (None, E.float()))
    assert torch.allclose(found.decoding, torch.tensor(8 * math.log(V)))
    expected = 10 * (E[y[0]] - E.mean(0)).square().sum()
    assert (found.path.mean() - expected).abs() < 5 * found.path.std() / 10
    assert found.path.std() < 0.02 * expected                                   # stratified
    assert found.path.unique().numel() > 90                                     # its own levels
    assert torch.equal(found.nats, again.nats) and set(recorded) == {(torch.float32, False)}
    assert likelihood_bound(net, clock, y, generator()).nats.min() > 8 * math.log(V)


def test_two_tokens_of_one_dimension_by_quadrature():
    """V = 2, L = 1, E = (2, -1), so e~ = (2, -1) / sqrt 5. The denoiser has half the log odds."""
    p, nu_max, E = torch.tensor([0.8, 0.2]).double(), 10.0, torch.tensor([[2.0], [-1.0]]).double()
    clock, texts = Clock(2), torch.tensor([[0], [1]])
    e0, e1 = 2 / 5 ** 0.5, -1 / 5 ** 0.5
    xi = torch.linspace(-9, 9, 1801, dtype=torch.float64)
    weight = torch.exp(-xi ** 2 / 2) / math.sqrt(2 * math.pi) * (xi[1] - xi[0])
    nu = torch.linspace(0, nu_max, 2001, dtype=torch.float64)[:, None]

    def wrong(e, sign):  # the probability of the other token, at every level and noise
        seen = nu.sqrt() * e + xi
        odds = math.log(p[0] / p[1]) + nu.sqrt() * (e0 - e1) * seen - nu / 2 * (e0 ** 2 - e1 ** 2)
        return torch.sigmoid(-sign * odds / 2)
    misses = [wrong(e0, 1), wrong(e1, -1)]
    path = torch.stack([torch.trapezoid(miss ** 2 @ weight, nu[:, 0]) for miss in misses])
    path *= (e0 - e1) ** 2 / 2
    decoding = torch.stack([-torch.log1p(-miss[-1]) @ weight for miss in misses])
    model = Posterior(p, E, clock, tempered(0.5))
    for part, expected in (("path", path), ("decoding", decoding)):
        assert agree(estimate(model, texts, nu_max, 10_000, clock, part), expected)


# ---------------------------------------------------------------------------------------- its parts

ILL_CONDITIONED = torch.randn(500, 20, generator=generator()).double() * torch.logspace(0, -4, 20)


@pytest.mark.parametrize("E", [*EMBEDDINGS.values(), ILL_CONDITIONED], ids=[*EMBEDDINGS, "ill"])
def test_whitened_is_orthonormal_on_the_row_space(E):
    white, rank = whiten(E), torch.linalg.matrix_rank(E)
    assert torch.allclose(white.T @ white, torch.linalg.pinv(E) @ E, atol=1e-6)
    assert torch.allclose(white @ (white.T @ E), E, atol=1e-8)                # z = z~ (E^T E)^(1/2)
    leverage = white.square().sum(1)
    assert leverage.sum().item() == pytest.approx(rank.item()) and leverage.max() < 1 + 1e-9
    A = torch.randn(E.size(1), E.size(1), dtype=torch.float64, generator=generator())
    other = whiten(E @ A)
    assert torch.allclose(other @ other.T, white @ white.T, atol=1e-6)          # E A is E~, turned
    assert whiten(E.bfloat16()).dtype == torch.float32


def test_error_is_the_formula_a_slice_at_a_time_and_not_in_bfloat16(monkeypatch):
    monkeypatch.setattr("flow.SLICE", 120)
    head, hidden, y = torch.nn.Identity(), 3 * torch.randn(2, 5, 40), torch.randint(40, (2, 5))
    head.out_features, heights = 40, []
    head.register_forward_hook(lambda module, inputs, logits: heights.append(len(logits)))
    E = whiten(torch.randn(40, 8))
    expected = (E[y] - hidden.softmax(-1) @ E).square().sum(-1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(squared_error(head, hidden, y, E), expected, rtol=1e-4)
    assert heights == [3, 3, 3, 1]


@pytest.mark.parametrize("d, nu", [(1, 0.7), (1, 4.0), (3, 4.0)])
def test_accuracy_is_that_of_the_best_reader(d, nu):
    """Two tokens, p and 1 - p: the exact posterior reads y from u ~ N(+-sqrt(nu) a, 1) along their
    difference, with a its whitened half length, at a threshold that the prior shifts."""
    p = 0.8
    E = torch.tensor([[1.0], [-1.0]], dtype=torch.float64) if d == 1 else torch.randn(
        2, 3, dtype=torch.float64, generator=generator(3))
    a = math.sqrt(0.5)                                            # rows +-1/sqrt(2), or orthonormal
    clock = Clock(2)
    model = Posterior(torch.tensor([p, 1 - p], dtype=torch.float64), E, clock)
    model.head.weight, model.head.bias = torch.eye(2).double(), torch.zeros(2).double()
    y = (torch.arange(40_000) % 5 == 4).long()[:, None]                     # one in five is token 1
    mean = a * nu ** 0.5
    threshold = -math.log(p / (1 - p)) / (2 * mean)                 # token 0 where u is above
    below = torch.special.ndtr(torch.tensor([threshold - mean, threshold + mean])).tolist()
    expected = p * (1 - below[0]) + (1 - p) * below[1]
    found = accuracy(model, clock, y, generator(), nu)
    assert abs(found.mean().item() - expected) < 5 * found.std().item() / len(y) ** 0.5


def test_bits_per_character():
    assert bits_per_character(3 * math.log(2), 6) == pytest.approx(0.5)
