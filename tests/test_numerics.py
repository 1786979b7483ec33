"""python -m pytest tests/test_numerics.py

Where bfloat16 may enter and where not, both ends of time, a nearly singular embedding, batches of
other sizes. A test that something is float32 also does it in bfloat16, which misses by far."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

import flow
import flowmap
from flow import Clock, cross_entropy, interpolate, latent_noise, noise_factor
from flowmap import OBJECTIVES, kl_to_target, semigroup_weight
from lib.machine import generator
from model import FlowTransformer, Head, ModelConfig, TimeEmbedding, cap

SIZES = [2, 1024, 50257, 262144]
clock_of = functools.cache(Clock)


def network(V, L, d=64, n_layer=2, **changes):
    """No layer is zero, unlike at the start. Logits have a deviation of about 1."""
    config = ModelConfig(V, L, n_layer, 4, d, n_time=16, dropout=0.0, **changes)
    model = FlowTransformer(config).eval()
    for name, p in model.named_parameters():
        if name.startswith(("head", "time_t")) or "modulation" in name:
            torch.nn.init.normal_(p, std=p.size(-1) ** -0.5 if p.ndim == 2 else 0.1)
    return model


def autocast(dtype):
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


@pytest.fixture
def fix_noise(monkeypatch):
    """fix_noise(x) makes every draw of noise (B, L, n) the first n columns of x, in any dtype."""
    return lambda x: monkeypatch.setattr(
        torch, "randn", lambda *shape, dtype, **_: x[..., :shape[-1]].expand(shape).to(dtype))


def error(ours, exact):
    """Relative, in the Euclidean norm."""
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


def step(objective, dtype):
    """Losses (B, L) and named gradients of one step as in train.py and distill.py: float32 weights
    and times, the loss under autocast. The same weights, tokens and times at every call."""
    V, B, L, d = 50257, 4, 8, 32
    torch.manual_seed(0)
    model, teacher = network(V, L, d, flow_map=objective != "flow"), network(V, L, d)
    y, (tau_s, tau_t) = torch.randint(V, (B, L)), torch.rand(2, B).sort(0).values
    if dtype == torch.float64:
        model, teacher = model.double(), teacher.double()
    model.embed.requires_grad_(objective == "flow")
    with autocast(dtype):
        if objective == "flow":
            mean, losses = flow.loss(model, clock_of(V), y, tau_s, None)
        else:
            tau_t[:2] = tau_s[:2]
            mean, losses, _ = flowmap.loss(model, model, teacher, clock_of(V), objective, y, tau_s,
                                           tau_t, None, 2)
    mean.backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("objective", ["flow", "psd", "lsd", "esd"])
def test_step_in_bfloat16_is_the_step_in_float64(objective, fix_noise, monkeypatch):
    """bfloat16 keeps 8 bits: each factor of a product is off by up to 2^-9 = 0.2 %, a gradient, the
    end of some twenty products, by 1 or 2 %. A lost or wrongly weighed term is off by all of it.
    The head works in slices of ten tokens."""
    monkeypatch.setattr(flow, "SLICE", 10 * 50257)
    fix_noise(torch.randn(4, 8, 32))
    losses, gradients = step(objective, torch.bfloat16)
    exact_losses, exact = step(objective, torch.float64)
    assert losses.dtype == torch.float32 and exact_losses.dtype == torch.float64
    assert error(losses, exact_losses) < 0.01
    for name in exact:
        assert gradients[name].dtype == torch.float32
        assert exact[name].norm() > 1e-3 and error(gradients[name], exact[name]) < 0.05, name


@pytest.mark.parametrize("tokens", [1, 1000])
def test_noise_is_float32_under_autocast(tokens, fix_noise):
    """The Gram matrix, its root, noise made with either, and the gradient for E through them."""
    E, x = torch.randn(3000, 64), torch.randn(2, 3, 1024)
    fix_noise(x)

    def noise(E, dtype):
        E = E.clone().requires_grad_()
        with autocast(dtype):
            factor = noise_factor(E, tokens)
            z = latent_noise(E, (2, 3), None, factor)
        gradient, = torch.autograd.grad(z.square().sum(), E)
        return [z, gradient, *([] if factor is None else [factor])]
    exact = noise(E.double(), torch.float64)
    for ours, reference in zip(noise(E, torch.bfloat16), exact, strict=True):
        assert ours.dtype == torch.float32 and error(ours, reference) < 1e-5
    with autocast(torch.bfloat16):
        low = (x[..., :64] @ torch.linalg.cholesky((E.T @ E).float()).T if tokens > 1
               else sum(x[..., :len(part)] @ part for part in E.split(1024)))
    assert error(low, exact[0]) > 1e-3


@pytest.mark.parametrize("V", SIZES)
def test_clock_is_not_rounded_under_autocast(V):
    """Float32 times, as the programs pass them, up to 1e-7 from both ends."""
    clock = clock_of(V)
    tau = torch.cat([torch.linspace(0, 1, 2001), torch.tensor([1e-7, 1 - 1e-7])])
    with autocast(torch.bfloat16):
        t = clock.t_of_tau(tau)
        back, speed = clock.tau_of_t(t), clock.dtau_dt(t)
    assert t.dtype == back.dtype == speed.dtype == torch.float64
    assert torch.equal(t, clock.t_of_tau(tau.double())) and torch.equal(speed, clock.dtau_dt(t))
    assert (back - tau).abs().max() < 1e-12
    low = interpolate(tau, clock.tau.bfloat16(), clock.t.bfloat16())
    assert (clock.tau_of_t(low) - tau).abs().max() > 1e-3
    assert error(clock.dtau_dt(t.bfloat16()), speed) > 1e-3


def head_and_hidden(softcap):
    """A head over V = 50257, hidden states (2, 8, d), others close to them, and the logits of each
    as the product leaves them under autocast: bfloat16, before cap and softmax."""
    V, d = 50257, 64
    head = Head(ModelConfig(V, 8, n_embd=d, n_head=4, logit_softcap=softcap))
    torch.nn.init.normal_(head.weight, std=3 * d ** -0.5)
    hidden = torch.randn(2, 8, d)
    near = hidden + 0.1 * torch.randn(2, 8, d)
    with torch.no_grad(), autocast(torch.bfloat16):
        products = [F.linear(h, head.weight, head.bias) for h in (hidden, near)]
    assert products[0].dtype == torch.bfloat16
    return head, hidden, near, *products


@pytest.mark.parametrize("softcap", [0, 30])
def test_log_softmax_is_float32_under_autocast(softcap):
    head, hidden, _, product, _ = head_and_hidden(softcap)
    y = torch.randint(50257, (2, 8))
    with autocast(torch.bfloat16):
        _, losses = cross_entropy(head, hidden, y)
    logits = (cap(product.to(dtype), softcap) for dtype in (torch.float64, torch.bfloat16))
    exact, low = (F.cross_entropy(x.transpose(1, 2), y, reduction="none") for x in logits)
    assert (losses - exact).abs().max() < 1e-5
    assert (low - exact).abs().max() > 1e-2


@pytest.mark.parametrize("softcap", [0, 30])
def test_kl_is_float32_under_autocast(softcap):
    """Of two close distributions, as late in distillation: a small difference of large sums."""
    head, hidden, near, product, near_product = head_and_hidden(softcap)

    def divergence(dtype):
        log_p, log_q = (cap(logits.to(dtype), softcap).log_softmax(-1)
                        for logits in (near_product, product))
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    with autocast(torch.bfloat16):
        _, kl, _ = kl_to_target(head, hidden, (lambda near: head(near).softmax(-1), (near,)))
    exact = divergence(torch.float64)
    assert (kl - exact).abs().max() < 1e-5
    assert (divergence(torch.bfloat16) - exact).abs().max() > 1e-3


ENDS = torch.tensor([0, 1e-7, 1 - 1e-7, 1])
PAIRS = torch.combinations(ENDS, 2, with_replacement=True)  # (10, 2), start and end


def assert_finite(mean, losses, model):
    assert losses.isfinite().all()
    mean.backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [2, 50257])
def test_flow_loss_at_the_ends_of_time(V, dtype):
    model, y = network(V, 2, d=8, n_layer=1), torch.randint(V, (4, 2))
    with autocast(dtype):
        mean, losses = flow.loss(model, clock_of(V), y, ENDS, generator(0))
    assert_finite(mean, losses, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("V", [2, 50257])
def test_distillation_loss_at_the_ends_of_time(V, objective, dtype):
    """Every jump between two ends, those of no length too, after a diagonal of its own."""
    model, teacher = (network(V, 2, d=8, n_layer=1, flow_map=is_map) for is_map in (True, False))
    tau_s, tau_t = torch.cat([ENDS[:, None].expand(4, 2), PAIRS]).unbind(1)
    with autocast(dtype):
        mean, losses, cut = flowmap.loss(model, model, teacher, clock_of(V), objective,
                                         torch.randint(V, (14, 2)), tau_s, tau_t, generator(0), 4)
    assert cut.isfinite().all() and losses.min() > -1e-5
    assert_finite(mean, losses, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("V", SIZES)
def test_semigroup_weight_at_the_ends_of_time(V, dtype):
    clock = clock_of(V)
    s, u, t = (clock.t_of_tau(tau).to(dtype) for tau in (PAIRS[:, 0], PAIRS.mean(1), PAIRS[:, 1]))
    assert torch.equal(semigroup_weight(s, s, t), (s == t).to(dtype))
    assert torch.equal(semigroup_weight(s, t, t), torch.ones_like(s))
    g = semigroup_weight(s, u, t)
    assert ((0 <= g) & (g <= 1)).all()  # false for NaN


@pytest.mark.parametrize("steps", [1, 2, 50])
@pytest.mark.parametrize("V", [2, 1024])
def test_samplers_from_end_to_end(V, steps):
    for decode, is_map in ((flow.sample, False), (flowmap.sample, True)):
        net, states, rng = network(V, 2, d=8, n_layer=1, flow_map=is_map), [], generator(0)
        net.register_forward_hook(lambda net, inputs, hidden: states.extend([inputs[0], hidden]))
        noise = lambda: latent_noise(net.embed.weight, (3, 2), rng)
        for gamma in (0.0, 1e-9, 0.5, 1.0):  # at 1e-9 the variance of fresh noise can round below 0
            states.clear()
            tokens = decode(net, clock_of(V), noise(), steps, gamma, noise)
            assert len(states) == 2 * steps and all(state.isfinite().all() for state in states)
            assert tokens.shape == (3, 2) and 0 <= tokens.min() and tokens.max() < V


def spectrum(name, d):
    """Singular values (d,), the largest 1, the smallest 1e-6."""
    s = torch.full((d,), 1.0 if name == "one small" else 1e-6, dtype=torch.float64)
    if name == "geometric":
        return torch.logspace(0, -6, d, dtype=torch.float64)
    s[0], s[-1] = 1, 1e-6
    return s


def orthonormal(n, d):
    return torch.linalg.qr(torch.randn(n, d, dtype=torch.float64)).Q


@pytest.mark.parametrize("name", ["geometric", "one large", "one small"])
@pytest.mark.parametrize("V, d", [(17, 16), (3000, 64), (300, 256), (1000, 768)])
def test_noise_of_an_embedding_with_condition_number_a_million(V, d, name, fix_noise):
    """E^T E has eigenvalues from 1 to 1e-12; float32 resolves 1e-7. The covariance must be right to
    1e-4 of the largest. The normals are exactly uncorrelated, so that it can be read off."""
    E = (orthonormal(V, d) * spectrum(name, d) @ orthonormal(d, d).T).float().requires_grad_()
    fix_noise(math.sqrt(d) * orthonormal(d, d).float())
    C = noise_factor(E, tokens=d)
    z = latent_noise(E, (1, d), None)[0]
    gram = E.detach().double().T @ E.detach().double()
    for covariance in (C @ C.T, z.T @ z / d):
        assert torch.linalg.matrix_norm(covariance.double() - gram, 2) < 1e-4
    assert torch.autograd.grad(z.square().sum(), E)[0].isfinite().all()


def test_noise_of_a_well_conditioned_embedding_is_hardly_touched():
    E = torch.randn(3000, 64)
    C = noise_factor(E, tokens=64).double()
    gram = E.double().T @ E.double()
    assert torch.linalg.matrix_norm(C @ C.T - gram, 2) < 3e-6 * gram.diagonal().mean()


def test_diverged_embedding_gives_nan_and_no_error():
    E = torch.randn(50, 8)
    E[3, 2] = math.nan
    assert noise_factor(E, tokens=100).diagonal().isnan().all()


SAMPLERS = {"one step": (True, 1, 0.0), "four steps": (True, 4, 0.0),
            "four noisy steps": (True, 4, 0.5), "flow": (False, 16, 0.0),
            "noisy flow": (False, 16, 0.5)}


def generate(model, steps, gamma, samples):
    """Tokens of these of 9 texts, each with the noise it always has."""
    E, rng = model.embed.weight.detach(), generator(1)
    noise = lambda: latent_noise(E, (9, 32), rng)[samples]
    sample = flowmap.sample if model.config.flow_map else flow.sample
    return sample(model, clock_of(1024), noise(), steps, gamma, noise)


@pytest.mark.parametrize("flow_map, steps, gamma", SAMPLERS.values(), ids=SAMPLERS)
def test_text_does_not_depend_on_the_batch_size(flow_map, steps, gamma):
    """In float64, where sums in another order, as other shapes can cause, decide no argmax."""
    model = network(1024, 32, flow_map=flow_map).double()
    whole = generate(model, steps, gamma, slice(9))
    assert whole.unique().numel() > 50
    for size in (1, 4):
        parts = [generate(model, steps, gamma, slice(i, i + size)) for i in range(0, 9, size)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flow_map, steps, gamma", SAMPLERS.values(), ids=SAMPLERS)
def test_text_depends_on_its_own_noise_alone(flow_map, steps, gamma, dtype):
    """To the last bit, whatever the other texts in a batch of a given shape are."""
    model = network(1024, 32, flow_map=flow_map)
    with autocast(dtype):
        first, second = (generate(model, steps, gamma, samples)
                         for samples in ([0, 1, 2, 3, 4], [7, 1, 6, 3, 8]))
    assert torch.equal(first[[1, 3]], second[[1, 3]]) and not torch.equal(first[0], second[0])


@pytest.mark.parametrize("size, bias, V", [
    (4, 0, 2), (30, -3, 2), (4, 2.5, 2), (0, 12, 500)])
def test_the_head_s_gradient_in_float16(size, bias, V):
    """262,144 tokens of which all are the first: the head's gradient, summed over them, is beyond
    65,504, the largest float16, so every step would be skipped. The small gradients of a confident
    head, and those of tokens that it never expects, are not lost either."""
    B, L, d = 4096 if V == 2 else 64, 64, 8
    hidden = size * torch.ones(B, L, d) + (0.1 if size else 1) * torch.randn(B, L, d)
    y, found = torch.zeros(B, L, dtype=torch.long), {}
    for dtype in (torch.float32, torch.float16):
        head = Head(ModelConfig(V, L, n_head=4, n_embd=d))
        torch.nn.init.normal_(head.weight, std=0.01, generator=generator(3))
        head.bias.data = torch.tensor([bias] + [-bias] * (V - 1)).float()
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
            scaled = cross_entropy(head, leaf.to(dtype), y)[0] * 2 ** 16
        scaled.backward()
        found[dtype] = head.weight.grad, leaf.grad
        if dtype == torch.float16:  # what would overflow, or be nothing
            assert size == 0 or (0.5 * hidden.sum((0, 1))).min() > torch.finfo(dtype).max
            assert size or torch.tensor(math.exp(-2 * bias)).to(dtype) == 0
    for ours, exact in list(zip(found[torch.float16], found[torch.float32]))[:2 if size else 1]:
        assert ours.isfinite().all() and error(ours, exact) < 5e-3
    exact, rare = (found[dtype][0][1:] for dtype in found)          # rows of the other tokens
    assert error(rare, exact) < 0.01


def test_no_tokens_in_float16():
    """A batch without a diagonal has a slice of none."""
    head, hidden = Head(ModelConfig(3, 8, n_head=4, n_embd=8)), torch.zeros(0, 8, 8)
    with torch.autocast("cpu", torch.float16):
        total, _ = cross_entropy(head, hidden.requires_grad_(), torch.zeros(0, 8).long())
    assert torch.autograd.grad(total.nan_to_num(), hidden)[0].shape == (0, 8, 8)


def test_time_embedding_is_not_in_16_bits():
    """A step of tau of 1/1024 must move it by more than rounding does."""
    torch.manual_seed(0)
    embedding = TimeEmbedding(128, 1.0)
    tau = torch.linspace(0, 1, 9)
    exact = embedding(tau)
    step = (embedding(tau + 1 / 1024) - exact).abs().mean().item()
    with autocast(torch.bfloat16):
        found = embedding(tau)
        low = embedding.fc2(F.silu(embedding.fc1(features(tau))))   # as it would be under autocast
    assert torch.equal(found, exact)
    assert (low.float() - exact).abs().mean().item() > step > 0


def features(tau):
    frequencies = torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    phases = tau[:, None] * frequencies
    return torch.cat([phases.cos(), phases.sin()], -1)
