"""python -m pytest tests/test_baselines.py

baselines/ against independent computations: bounds against the likelihood of a known language and
discrete time, noise against Gaussians, steps against Bayes' rule, samplers against the language,
distillation against its definition."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from baselines import ar, duo, mdlm, mse, noclock
from flow import Clock, draw_from, draw_tokens, latent_noise
from model import FlowTransformer, ModelConfig

V, L = 3, 2
JOINT = torch.tensor([[.38, .02, .05], [.01, .27, .02], [.05, .05, .15]], dtype=torch.float64)
INDEPENDENT = JOINT.sum(1)[:, None] * JOINT.sum(0)
TEXTS = torch.tensor(list(itertools.product(range(V), repeat=L)))   # (9, L), as JOINT.flatten()
ENTROPY = -(JOINT * JOINT.log()).sum().item()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def language(n, seed=0):
    return TEXTS[torch.multinomial(JOINT.flatten(), n, replacement=True, generator=generator(seed))]


def distance(tokens, p):
    """Total variation between the distribution of tokens (n, L) and p (V, V)."""
    found = torch.bincount(tokens[:, 0] * V + tokens[:, 1], minlength=V * V) / len(tokens)
    return ((found - p.flatten()).abs().sum() / 2).item()


def kernel(tau, n=V):
    """Duo's q(v | y), (n, n), rows y, at tau; or between two times, with tau the share kept."""
    return tau * torch.eye(n, dtype=torch.float64) + (1 - tau) / n


def nodes(n):
    """Gauss-Legendre on [0, 1], nodes and weights (n,)."""
    x, weight = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy((x + 1) / 2), torch.from_numpy(weight / 2)


class Exact:
    """The exact denoiser of JOINT, by Bayes over all texts: for MDLM, which has a mask, of hidden
    tokens; for Duo of each token given the others, or with `own` given all. Hidden states are
    logits, times `sure`. The mask's is large, which must not matter."""

    def __init__(self, mask=False, own=False, sure=1.0):
        self.mask, self.own, self.sure = mask, own, sure
        n = V + mask
        self.config = ModelConfig(n, L, n_head=1, n_embd=2)
        self.embed = torch.nn.Embedding.from_pretrained(torch.eye(n, dtype=torch.float64))
        self.head = torch.nn.Identity()
        self.head.out_features = n
        self.times = []

    def __call__(self, state, tau):
        self.times.append(tau)
        z = state.argmax(-1)                                                    # (B, L)
        same, share = (z[:, None] == TEXTS).double(), tau.double()[:, None, None]
        noisy = share * same + (1 - share) / V
        seen = torch.where(z[:, None] == V, 1.0, same) if self.mask else noisy  # (B, 9, L)
        columns = []
        for l in range(L):
            counted = [i for i in range(L) if self.own or self.mask or i != l]
            p = (JOINT.flatten() * seen[..., counted].prod(-1)) @ F.one_hot(TEXTS[:, l], V).double()
            columns.append((p / p.sum(-1, keepdim=True)).clamp_min(1e-300).log())          # (B, V)
        logits = self.sure * torch.stack(columns, dim=1)                        # (B, L, V)
        return F.pad(logits, (0, 1), value=3.0) if self.mask else logits


def network(seed=0, rows=V):
    """A small network of which no layer is zero, in float64."""
    torch.manual_seed(seed)
    net = FlowTransformer(ModelConfig(rows, L, 2, 2, 16, n_time=8, dropout=0.0)).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


class Watched:
    """A network that notes what it is asked, and whether for a gradient."""

    def __init__(self, net):
        self.net, self.embed, self.head, self.config = net, net.embed, net.head, net.config
        self.asked, self.graded = [], []

    def __call__(self, state, tau):
        tokens = torch.cdist(state.detach(), self.embed.weight.detach()).argmin(-1)     # (B, L)
        self.asked.append((tokens, tau))
        self.graded.append(torch.is_grad_enabled())
        return self.net(state, tau)


def kl(q, p):
    return (q * (q / p).log()).sum(-1)


def same_gradients(ours, plain, parameters):
    """Of two losses, for all parameters that either depends on."""
    of_ours, of_plain = (torch.autograd.grad(loss, parameters, materialize_grads=True)
                         for loss in (ours, plain))
    assert any(gradient.any() for gradient in of_ours)
    return all(torch.allclose(a, b, atol=1e-12) for a, b in zip(of_ours, of_plain))


def spread(values):
    """The standard error of a mean over values (n, L) whose rows are independent."""
    return values.sum(1).std().item() / len(values) ** 0.5


def test_hidden_share_is_one_minus_tau():
    tau = torch.tensor([0.0, 0.3, 1.0])
    z = mdlm.hide(torch.ones(3, 100_000, dtype=torch.long), tau, V, generator())
    assert torch.allclose((z == 1).double().mean(1), tau.double(), atol=0.005)
    assert ((z == 1) | (z == V)).all()


def test_mdlm_bound_of_the_exact_denoiser_is_the_likelihood(monkeypatch):
    """For every text: a sum over all ways to hide and a quadrature in time, exact here."""
    model, times = Exact(mask=True), list(zip(*nodes(3)))
    for y, p in zip(TEXTS, JOINT.flatten()):
        total = 0
        for hidden in itertools.product([False, True], repeat=L):
            monkeypatch.setattr(mdlm, "hide", lambda y, *_: y.where(~torch.tensor([hidden]), V))
            for tau, weight in times:
                probability = (1 - tau) ** sum(hidden) * tau ** (L - sum(hidden))
                _, losses = mdlm.loss(model, None, y[None], tau[None], None)
                total += weight * probability * losses.sum()
        assert total.item() == pytest.approx(-p.log().item(), rel=1e-9)


def test_mdlm_loss_is_an_unbiased_estimate_and_any_other_denoiser_has_more():
    y, tau = language(100_000), torch.rand(100_000, generator=generator(1))
    mean, losses = mdlm.loss(Exact(mask=True), None, y, tau, generator(2))
    assert mean.item() == pytest.approx(losses.mean().item())
    assert mean.item() * L == pytest.approx(ENTROPY, abs=4 * spread(losses))
    unsure = mdlm.loss(Exact(mask=True, sure=0.5), None, y, tau, generator(2))[0]
    assert unsure > mean + 0.02


def test_mdlm_loss_and_gradients_are_the_textbooks():
    """With all logits at once, the mask's at -inf, and times at both ends."""
    net, y = network(rows=V + 1), language(64)
    tau = torch.linspace(0, 1, 64, dtype=torch.float64)
    mean, losses = mdlm.loss(net, None, y, tau, generator(3))
    tau = tau.clamp_max(0.999)[:, None]
    z = mdlm.hide(y, tau[:, 0], V, generator(3))
    logits = net.head(net(net.embed(z), torch.ones(64)))
    logits = torch.where(torch.arange(V + 1) == V, -torch.inf, logits)
    plain = (z == V) / (1 - tau) * F.cross_entropy(logits.transpose(1, 2), y, reduction="none")
    assert torch.allclose(losses, plain) and torch.allclose(mean, plain.mean())
    assert losses.isfinite().all()
    assert same_gradients(mean, plain.mean(), list(net.parameters()))


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_mdlm_samples_the_language_in_many_steps_and_independent_tokens_in_one(steps):
    model = Exact(mask=True)
    tokens = mdlm.sample(model, None, 20_000, L, steps, generator())
    assert tokens.max() < V and len(model.times) <= steps
    evaluations = sum(map(len, model.times)) / 20_000       # a text
    assert evaluations == pytest.approx(steps * (1 - (1 - 1 / steps) ** L), abs=0.02)
    at_once = 1 / steps                                 # the chance that one step uncovers both
    assert distance(tokens, at_once * INDEPENDENT + (1 - at_once) * JOINT) < 0.015
    assert distance(tokens, JOINT) < 0.02 or steps < 50


@pytest.mark.parametrize("sample", [mdlm.sample, mdlm.sample_surest])
def test_mdlm_goes_on_from_known_tokens(sample):
    """They stay, and the other token has its probability given them."""
    y, n = torch.tensor([[2, 0]]), 20_000
    known = torch.tensor([[True, False]])
    tokens = sample(Exact(mask=True), None, n, L, 3, generator(), y=y, known=known)
    given = torch.zeros(V, V, dtype=torch.float64)
    given[2] = JOINT[2] / JOINT[2].sum()
    assert distance(tokens, given) < 0.015


def test_mdlm_keeps_the_surest_token_first():
    """Both are drawn alone, the likelier of the two stays, and the other is drawn given it."""
    expected = torch.zeros(V, V, dtype=torch.float64)
    first, second = JOINT.sum(1), JOINT.sum(0)
    for a, b in itertools.product(range(V), repeat=2):
        chance = first[a] * second[b]
        if first[a] > second[b]:
            expected[a] += chance * JOINT[a] / first[a]
        else:
            expected[:, b] += chance * JOINT[:, b] / second[b]
    tokens = mdlm.sample_surest(Exact(mask=True), None, 20_000, L, 2, generator())
    assert distance(tokens, expected) < 0.015 < distance(tokens, JOINT)
    tokens = mdlm.sample_surest(Exact(mask=True), None, 20_000, L, 1, generator())
    assert distance(tokens, INDEPENDENT) < 0.015


def test_draws_have_their_probabilities_and_never_what_has_none():
    p = torch.tensor([0, 0.5, 0, 0.3, 0.2, 0])
    tokens = draw_from(p.expand(100_000, 6), generator())
    assert torch.allclose(torch.bincount(tokens[:, 0], minlength=6) / 100_000, p, atol=0.008)
    assert set(tokens[:, 0].tolist()) == {1, 3, 4}


@pytest.mark.parametrize("u, token", [(0, 1), (2.0 ** -53, 1), (2.0 ** -50, 2), (0.5, 2),
                                      (1 - 2.0 ** -50, 2), (1 - 2.0 ** -53, 3)])
def test_draws_tell_probabilities_of_float64_apart(u, token, monkeypatch):
    """Two tokens of 2^-52, which float32 would never draw, between two of 0, never drawn."""
    p = torch.tensor([[0, 2.0 ** -52, 1 - 2.0 ** -51, 2.0 ** -52, 0]], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, **_: torch.full(shape, u, dtype=dtype))
    assert draw_from(p, None).tolist() == [[token]]


def test_draws_from_what_is_not_finite_are_no_token():
    assert draw_from(torch.tensor([[0.5, math.nan, 0.5]]), generator()).tolist() == [[3]]


def test_samplers_draw_in_float64(monkeypatch):
    """From networks in float32, too."""
    asked, search = [], torch.searchsorted
    monkeypatch.setattr(torch, "searchsorted", lambda sums, *rest, **options: (
        asked.append(sums.dtype) or search(sums, *rest, **options)))
    for module, rows in ((ar, V), (mdlm, V + 1), (duo, V)):
        module.sample(network(rows=rows).float(), None, 2, L, 3, generator())
    draw_tokens(network().float().head, torch.randn(2, L, 16), generator())
    assert len(asked) > 3 and set(asked) == {torch.float64}


@pytest.mark.parametrize("module", [mdlm, duo])
def test_temperature_sharpens_every_guess(module):
    model = Exact(mask=module is mdlm)
    tokens = module.sample(model, None, 20_000, L, 1, generator(), temperature=0.5)
    sharp = [p ** 2 / (p ** 2).sum() for p in (JOINT.sum(1), JOINT.sum(0))]
    assert distance(tokens, sharp[0][:, None] * sharp[1]) < 0.015


def test_sdtt_is_the_divergence_from_the_teachers_guesses_on_its_way(monkeypatch):
    """With a script for what is hidden, uncovered and drawn: of the first text all is hidden and
    the first token then uncovered; of the second one token is seen, of the third both."""
    student, teacher = Watched(network(1, V + 1)), Watched(network(2, V + 1))
    y = torch.tensor([[0, 2], [1, 2], [0, 1]])
    start = torch.tensor([[V, V], [V, 2], [0, 1]])
    between = torch.tensor([[1, V], [V, 2], [0, 1]])
    shares = []
    monkeypatch.setattr(mdlm, "hide", lambda *_: start)
    monkeypatch.setattr(mdlm, "choose", lambda z, mask, share, rng: (
        shares.append(share) or start != between))
    monkeypatch.setattr(mdlm, "draw_from", lambda p, rng: torch.tensor([[1]]).expand(len(p), 1))
    tau = torch.tensor([0.1, 0.5, 0.9])
    mean, losses = mdlm.distillation_loss(student, teacher, None, y, tau, 0.2, None)

    def guess(net, z, row, column):
        logits = net.net.head(net.net(net.embed(z[row:row + 1]), torch.ones(1)))
        return logits[0, column, :V].softmax(-1)
    target = {(0, 0): start, (0, 1): between, (1, 0): between}      # what the teacher last sees
    plain = {at: kl(guess(student, start, *at), guess(teacher, z, *at)) for at, z in target.items()}
    expected = [[plain[i, j].item() if (i, j) in plain else 0 for j in range(L)] for i in range(3)]
    assert torch.allclose(losses, losses.new_tensor(expected), atol=1e-12)
    assert mean.item() == pytest.approx(sum(plain.values()).item() / 3)
    assert [z.tolist() for z, _ in teacher.asked] == [start.tolist(), between.tolist()]
    assert shares[0][:, 0].tolist() == pytest.approx([0.2 / 0.9, 0.2 / 0.5, 1.0])
    assert same_gradients(mean, sum(plain.values()) / 3, list(student.net.parameters()))
    assert student.graded == [True] and teacher.graded == [False, False]


def test_reverse_kl():
    logits, target = torch.randn(2, 6, V, dtype=torch.float64, requires_grad=True)
    losses = mdlm.reverse_kl(logits, target)
    assert torch.allclose(losses[:, 0], kl(logits.softmax(-1), target.softmax(-1)))
    assert torch.autograd.grad(losses.sum(), target, allow_unused=True)[0] is None


def test_sdtt_of_the_exact_denoiser_with_short_steps_is_nothing_to_learn():
    """The teacher's guesses differ where the other token is uncovered between them: rarely."""
    y, tau = language(4000), torch.rand(4000, generator=generator(1))
    exact = Exact(mask=True)
    short, long = (mdlm.distillation_loss(exact, exact, None, y, tau, step, generator(2))[0]
                   for step in (1e-4, 0.4))
    assert 0 <= short < 0.01 and long > 0.05


def test_uncovered_share_of_a_step():
    z = torch.full((2, 100_000), V)
    z[0, 0] = 1
    chosen = mdlm.choose(z, V, torch.tensor([[0.25], [1.0]]), generator())
    assert chosen.double().mean(1).tolist() == pytest.approx([0.25, 1], abs=0.005)
    assert not chosen[0, 0]


@pytest.mark.parametrize("n", [2, 26, 50257])
def test_clock_is_the_diffusion_transformation_operator(n):
    """T(alpha~) = K / (K - 1) [integral of N(w; alpha~, sigma~^2) Phi(w / sigma~)^(K-1) - 1/K]."""
    for alpha in (0.1, 0.5, 0.9, 0.98):
        sigma = math.sqrt(1 - alpha ** 2)
        w = torch.linspace(alpha - 9 * sigma, alpha + 9 * sigma, 20_001, dtype=torch.float64)
        density = torch.exp(-((w - alpha) / sigma) ** 2 / 2) / (sigma * math.sqrt(2 * math.pi))
        chance = torch.exp((n - 1) * torch.special.log_ndtr(w / sigma))
        integral = torch.trapezoid(density * chance, w).item()
        t = torch.tensor(alpha / (alpha + sigma), dtype=torch.float64)
        expected = n / (n - 1) * (integral - 1 / n)
        assert Clock(n).tau_of_t(t).item() == pytest.approx(expected, abs=1e-5)


def test_paths_are_those_of_the_argmax_of_gaussians():
    """The joint law of tokens at three times, against argmax x_t with the same x0."""
    n, V, y = 400_000, 4, 2
    tau = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    tokens = torch.full((n, 1), y)
    noise = duo.path(tokens, V, generator())
    ours = [duo.at(time.expand(n), tokens, V, *noise)[:, 0] for time in tau]
    x0 = torch.randn(n, V, generator=generator(1), dtype=torch.float64)
    gaussian = [((1 - t) * x0 + t * F.one_hot(torch.tensor(y), V)).argmax(-1)
                for t in Clock(V).t_of_tau(tau)]
    found = [torch.bincount(a * V * V + b * V + c, minlength=V ** 3) / n
             for a, b, c in (ours, gaussian)]
    assert (found[0] - found[1]).abs().max() < 0.003
    for time, z in zip(tau, ours):
        share = torch.bincount(z, minlength=V) / n
        assert torch.allclose(share, kernel(time, V)[y].float(), atol=0.003)


@pytest.mark.parametrize("s, t", [(0.0, 0.4), (0.3, 0.4), (0.3, 0.9), (0.6, 1.0)])
def test_posterior_is_bayes_rule(s, t):
    """For clean D: q(z_t | z_s, y) from forward kernels, in which z_s is z_t kept with probability
    s / t. For a mixture of them: the mixture with weights P(y) q(z_s | y)."""
    assert torch.allclose(kernel(t) @ kernel(s / t), kernel(s))     # noise on noise is noise
    bayes = kernel(t)[:, None, :] * kernel(s / t).T[None]                       # y, z_s, z_t
    bayes = bayes / bayes.sum(-1, keepdim=True)
    z = torch.arange(V)[:, None]
    for y in range(V):
        D = F.one_hot(torch.full((V,), y), V).double()
        assert torch.allclose(duo.posterior(D, z, s, t), bayes[y])
    prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    weight = prior[:, None] * kernel(s)                                         # y, z_s
    mixed = torch.einsum("yz,yzv->zv", weight / weight.sum(0), bayes)
    assert torch.allclose(duo.posterior(prior.expand(V, V), z, s, t), mixed)


def random_cases(n, K, seed=0):
    """logits (n, K), y and z (n, 1), tau (n, 1): z is right in a third of the cases."""
    rng = generator(seed)
    logits = 2 * torch.randn(n, K, generator=rng, dtype=torch.float64)
    y, z = torch.randint(K, (2, n, 1), generator=rng)
    z = torch.where(torch.arange(n)[:, None] % 3 == 0, y, z)
    return logits, y, z, torch.rand(n, 1, generator=rng, dtype=torch.float64) * 0.98 + 0.01


def test_bound_is_the_divergence_of_one_short_step():
    """KL(q(z_t | z_s, y) || q(z_t | z_s, D)) / (t - s), t - s -> 0: the discrete-time bound."""
    for logits, y, z, tau in zip(*random_cases(60, 5)):
        s, t = tau.item() - 5e-6, tau.item() + 5e-6
        clean, ours = (duo.posterior(D[None], z[None], s, t)
                       for D in (F.one_hot(y[0], 5).double(), logits.softmax(-1)))
        loss = duo.bound(logits[None], y[None], z[None], tau[None]).item()
        assert loss == pytest.approx(kl(clean, ours).item() / 1e-5, rel=2e-3, abs=1e-4)


def test_bound_is_the_published_one():
    """The bracket of equation 17 times alpha' / (K alpha), with alpha' = -1, alpha = 1 - t."""
    K, (logits, y, z, a) = 5, random_cases(200, 5)
    xbar = K * a * logits.softmax(-1) + 1 - a
    i, m, hit = xbar.gather(-1, z), xbar.gather(-1, y), (z == y).double()
    zeta = (1 - a) / (K * a + 1 - a)
    log_i, log_zeta = (i / xbar).log().sum(-1, keepdim=True), zeta.log()
    bracket = (K / (K * a * hit + 1 - a) - K / i - (zeta * hit + 1 - hit) * log_i
               - K * a / (1 - a) * (i / m).log() * (1 - hit)
               - ((K - 1) * zeta * hit - (1 - hit) / zeta) * log_zeta)
    assert torch.allclose(duo.bound(logits, y, z, a), -bracket / (K * a))


@pytest.mark.parametrize("own", [False, True])
def test_duo_bound_is_the_likelihood_when_each_token_is_guessed_from_the_others(own, monkeypatch):
    """For every text: a sum over all z and an integral over 60 times, tau = 3u^2 - 2u^3 for the
    logarithms at the ends. With D from all of z, own evidence counts twice: a looser bound."""
    y, z = TEXTS.repeat_interleave(9, 0), TEXTS.repeat(9, 1)        # (81, L): every pair
    monkeypatch.setattr(duo, "at", lambda *_: z)
    monkeypatch.setattr(duo, "EDGE", 0.0)
    model, total, (u, weights) = Exact(own=own), 0, nodes(60)
    for tau, weight in zip(u ** 2 * (3 - 2 * u), weights * 6 * u * (1 - u)):
        _, losses = duo.loss(model, None, y, tau.expand(81), generator())
        total += weight * (kernel(tau)[y, z].prod(-1) * losses.sum(-1)).view(9, 9).sum(-1)
    if own:
        assert (JOINT.flatten() * total).sum() > ENTROPY + 0.02
    else:
        assert torch.allclose(total, -JOINT.flatten().log(), atol=1e-4)


def test_duo_loss_is_differentiable_and_finite_to_the_ends_of_time_in_float32():
    logits, y, z, _ = random_cases(200, 5)
    for tau in (1e-3, 0.01, 0.5, 1 - 1e-3):
        times = torch.full((200, 1), tau, dtype=torch.float64)
        exact, ours = (duo.bound(logits.to(dtype), y, z, times.to(dtype))
                       for dtype in (torch.float64, torch.float32))
        assert torch.allclose(ours.double(), exact, rtol=1e-4, atol=1e-6)
    net = network().float()
    y, tau = language(64), torch.tensor([0.0, 1.0]).repeat(32)
    mean, losses = duo.loss(net, None, y, tau, generator(3))
    noise = duo.path(y, V, generator(3))
    tau = tau.clamp(1e-3, 1 - 1e-3)
    z = duo.at(tau, y, V, *noise)
    logits = net.head(net(net.embed(z), tau)).flatten(0, 1)         # the same, all logits at once
    flat = tau.repeat_interleave(L)[:, None]
    plain = duo.bound(logits, y.view(-1, 1), z.view(-1, 1), flat)
    assert torch.allclose(losses.flatten(), plain[:, 0], rtol=1e-4) and losses.isfinite().all()
    ours, plain = (torch.autograd.grad(loss, net.embed.weight)[0] for loss in (mean, plain.mean()))
    assert torch.allclose(ours, plain, rtol=1e-3, atol=1e-5)


def test_duo_samples_the_language_in_many_steps_and_independent_tokens_in_one():
    assert distance(duo.sample(Exact(), None, 20_000, L, 1, generator()), INDEPENDENT) < 0.015
    model = Exact()
    assert distance(duo.sample(model, None, 20_000, L, 60, generator()), JOINT) < 0.015
    assert [t[0].item() for t in model.times] == pytest.approx([i / 60 for i in range(60)])
    twice = duo.sample(Exact(own=True), None, 20_000, L, 60, generator())
    assert distance(twice, JOINT) > 0.03                            # own evidence counts twice


def test_dcd_is_the_divergence_from_the_teacher_further_along_the_path():
    n = 5000
    student, teacher = Watched(network(1)), Watched(network(2))
    y, tau = language(n), torch.rand(n, generator=generator(1), dtype=torch.float64)
    mean, losses = duo.distillation_loss(student, teacher, None, y, tau, 0.25, generator(2))
    (z, here), (cleaner, there) = student.asked[0], teacher.asked[0]
    assert torch.equal(here, tau) and torch.equal(there, (tau + 0.25).clamp_max(1))
    assert (cleaner == y)[z != cleaner].all() and (z != cleaner).any()  # what changes is right
    for tokens, times in ((z, here), (cleaner, there)):
        right = (times + (1 - times) / V).mean().item()
        assert (tokens == y).double().mean().item() == pytest.approx(right, abs=0.015)
    q, p = (net.net.head(net.net(net.embed(tokens), times)).softmax(-1)
            for net, tokens, times in ((student, z, here), (teacher, cleaner, there)))
    plain = kl(q, p.detach())
    assert torch.allclose(losses, plain) and torch.allclose(mean, plain.mean())
    assert student.graded == [True] and teacher.graded == [False]
    assert same_gradients(mean, plain.mean(), list(student.net.parameters()))
    same, _ = duo.distillation_loss(student, student, None, y, tau, 0.0, generator(2))
    assert same.item() == pytest.approx(0, abs=1e-12)


def test_squared_error_and_no_clock_are_the_textbooks():
    """With (B, L, V) arrays: the squared distance of D to the one-hot text; and t itself as time,
    in the noise and for the network."""
    net = FlowTransformer(ModelConfig(40, 8, 1, 2, 16, 8, dropout=0.0))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    y, tau, E = torch.randint(40, (4, 8)), torch.rand(4), net.embed.weight
    z0 = latent_noise(E, y.shape, generator(3))
    for loss, t, measure in (
            (noclock.loss, tau, lambda p: -p.log().gather(-1, y[..., None])[..., 0]),
            (mse.loss, Clock(40).t_of_tau(tau).float(),
             lambda p: (p - F.one_hot(y, 40)).square().sum(-1))):
        z = (1 - t)[:, None, None] * z0 + t[:, None, None] * E[y]
        plain = measure(net.head(net(z, tau)).softmax(-1))
        mean, losses = loss(net, Clock(40), y, tau, generator(3))
        assert torch.allclose(losses, plain, atol=1e-5)
        assert torch.allclose(mean, plain.mean(), atol=1e-5)
