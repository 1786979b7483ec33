"""python -m pytest tests/test_numerics.py

Where bfloat16 may enter and where it must not, the two ends of time, an embedding matrix close to singular, and batches
of other sizes. Where a test says that something is float32, it also does the same in bfloat16, which misses by far.
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from common import sample_normals
from flow import Clock, cross_entropy, flow_loss, interpolate, latent_noise, noise_factor, sample_flow
from flowmap import OBJECTIVES, distillation_loss, kl_to_target, sample_flow_map, semigroup_weight
from model import FlowTransformer, Head, ModelConfig, cap

SIZES = [2, 1024, 50257, 262144]
clock_of = functools.cache(Clock)


def network(V, L, d=64, n_layer=2, **changes):
    """No layer is zero, as the head and the modulations are at the start; logits have a deviation of about 1."""
    model = FlowTransformer(ModelConfig(V, L, n_layer, 4, d, n_time=16, dropout=0.0, **changes)).eval()
    for name, p in model.named_parameters():
        if name.startswith(("head", "time_t")) or "modulation" in name:
            torch.nn.init.normal_(p, std=p.size(-1) ** -0.5 if p.ndim == 2 else 0.1)
    return model


def autocast(dtype):
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


def error(ours, exact):
    """Relative, in the Euclidean norm."""
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


# ---------------------------------------------------------------- a step at V = 50257, bfloat16 against float64

def step(objective, dtype):
    """Losses (B, L) and named gradients of one step as in train.py and distill.py: float32 weights and times, noise
    through the Gram matrix, the loss under autocast. The same weights, tokens, times and normals at every call."""
    V, B, L, d = 50257, 4, 8, 64
    torch.manual_seed(0)
    model, teacher = network(V, L, flow_map=objective != "flow"), network(V, L)
    y, normals, (tau_s, tau_t) = torch.randint(V, (B, L)), torch.randn(B, L, d), torch.rand(2, B).sort(0).values
    if dtype == torch.float64:
        model, teacher = model.double(), teacher.double()
    E = model.embed.weight.requires_grad_(objective == "flow")
    z0 = latent_noise(E, noise_factor(E, d), lambda n: normals)
    with autocast(dtype):
        if objective == "flow":
            mean, loss = flow_loss(model, clock_of(V), y, tau_s, z0)
        else:
            tau_t[:2] = tau_s[:2]
            mean, loss, _ = distillation_loss(model, model, teacher, clock_of(V), objective, y, tau_s, tau_t, z0, 2)
    mean.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("objective", ["flow", "psd", "lsd", "esd"])
def test_step_in_bfloat16_is_the_step_in_float64(objective, monkeypatch):
    """bfloat16 keeps 8 bits: each factor of a product is off by up to 2^-9 = 0.2 %, and a gradient comes out of some
    twenty products in a row, which makes 1 or 2 %. A term that is lost or weighed wrongly is off by all of it. The head
    works in slices of ten tokens."""
    monkeypatch.setattr("head.SLICE", 10 * 50257)
    loss, gradients = step(objective, torch.bfloat16)
    exact_loss, exact = step(objective, torch.float64)
    assert loss.dtype == torch.float32 and exact_loss.dtype == torch.float64
    assert error(loss, exact_loss) < 0.01
    for name in exact:
        assert gradients[name].dtype == torch.float32
        assert exact[name].norm() > 1e-3 and error(gradients[name], exact[name]) < 0.05, name


# ---------------------------------------------------------------- what is float32 under autocast, piece by piece

@pytest.mark.parametrize("tokens", [1, 1000])
def test_noise_is_float32_under_autocast(tokens):
    """The Gram matrix, its root, the noise made with either, and the gradient for E through all of them."""
    E, x = torch.randn(3000, 64), torch.randn(2, 3, 1024)

    def noise(E, dtype):
        E = E.clone().requires_grad_()
        with autocast(dtype):
            factor = noise_factor(E, tokens)
            z = latent_noise(E, factor, lambda n: x[..., :n])
        return [z, *torch.autograd.grad(z.square().sum(), E), *([] if factor is None else [factor])]
    exact = noise(E.double(), torch.float64)
    for ours, reference in zip(noise(E, torch.bfloat16), exact, strict=True):
        assert ours.dtype == torch.float32 and error(ours, reference) < 1e-5
    with autocast(torch.bfloat16):
        root = torch.linalg.cholesky((E.T @ E).float())
        low = x[..., :64] @ root.T if tokens > 1 else sum(x[..., :len(part)] @ part for part in E.split(1024))
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
    assert (clock.tau_of_t(low) - tau).abs().max() > 1e-3 and error(clock.dtau_dt(t.bfloat16()), speed) > 1e-3


def head_and_hidden(softcap):
    """A head over V = 50257, hidden states (2, 8, d), others close to them, and the logits of each as the product
    leaves them under autocast: bfloat16, before cap and softmax."""
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
        _, loss = cross_entropy(head, hidden, y)
    exact, low = (F.cross_entropy(cap(product.to(dtype), softcap).transpose(1, 2), y, reduction="none")
                  for dtype in (torch.float64, torch.bfloat16))
    assert (loss - exact).abs().max() < 1e-5
    assert (low - exact).abs().max() > 1e-2


@pytest.mark.parametrize("softcap", [0, 30])
def test_kl_is_float32_under_autocast(softcap):
    """Of two distributions close to each other, as late in distillation: a small difference of large sums."""
    head, hidden, near, product, near_product = head_and_hidden(softcap)

    def divergence(dtype):
        log_p, log_q = (cap(logits.to(dtype), softcap).log_softmax(-1) for logits in (near_product, product))
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    with autocast(torch.bfloat16):
        _, kl, _ = kl_to_target(head, hidden, (lambda near: head(near).softmax(-1), (near,)))
    exact = divergence(torch.float64)
    assert (kl - exact).abs().max() < 1e-5
    assert (divergence(torch.bfloat16) - exact).abs().max() > 1e-3


# ---------------------------------------------------------------- the ends of time

ENDS = torch.tensor([0, 1e-7, 1 - 1e-7, 1])
PAIRS = torch.combinations(ENDS, 2, with_replacement=True)  # (10, 2), start and end


def assert_finite(mean, loss, model):
    assert loss.isfinite().all()
    mean.backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all(), name


def small(V, **changes):
    """A network that costs little at any V, and z0 for `rows` texts of two tokens."""
    model = network(V, 2, d=8, n_layer=1, **changes)
    E = model.embed.weight
    return model, lambda rows: latent_noise(E, noise_factor(E, E.size(1)), lambda n: torch.randn(rows, 2, n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [2, 50257])
def test_flow_loss_at_the_ends_of_time(V, dtype):
    model, noise = small(V)
    with autocast(dtype):
        mean, loss = flow_loss(model, clock_of(V), torch.randint(V, (4, 2)), ENDS, noise(4))
    assert_finite(mean, loss, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("V", [2, 50257])
def test_distillation_loss_at_the_ends_of_time(V, objective, dtype):
    """Every jump between two ends in one batch, those of no length too, after a diagonal of its own."""
    (model, noise), (teacher, _) = small(V, flow_map=True), small(V)
    tau_s, tau_t = torch.cat([ENDS[:, None].expand(4, 2), PAIRS]).unbind(1)
    with autocast(dtype):
        mean, loss, cut = distillation_loss(model, model, teacher, clock_of(V), objective, torch.randint(V, (14, 2)),
                                            tau_s, tau_t, noise(14), 4)
    assert cut.isfinite().all() and loss.min() > -1e-5
    assert_finite(mean, loss, model)


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
    def check(model, sample):
        states = []
        hook = model.register_forward_hook(lambda module, inputs, hidden: states.extend([inputs[0], hidden]))
        tokens = sample()
        hook.remove()
        assert len(states) == 2 * steps and all(state.isfinite().all() for state in states)
        assert tokens.shape == (3, 2) and 0 <= tokens.min() and tokens.max() < V
    for decode, is_map in ((sample_flow, False), (sample_flow_map, True)):
        net, noise = small(V, flow_map=is_map)
        for gamma in (0.0, 1e-9, 0.5, 1.0):  # at 1e-9 the variance of the fresh noise can round to less than 0
            check(net, lambda: decode(net, clock_of(V), noise(3), steps, gamma, lambda: noise(3)))


# ---------------------------------------------------------------- an ill-conditioned E

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
def test_noise_of_an_embedding_with_condition_number_a_million(V, d, name):
    """E^T E then has eigenvalues from 1 to 1e-12, and float32 resolves 1e-7: what is asked is that noise has the right
    covariance to 1e-4 of the largest eigenvalue. The normals are exactly uncorrelated, so that it can be read off."""
    E = (orthonormal(V, d) * spectrum(name, d) @ orthonormal(d, d).T).float().requires_grad_()
    normals = math.sqrt(d) * orthonormal(d, d).float()[None]
    C = noise_factor(E, tokens=d)
    z = latent_noise(E, C, lambda n: normals)[0]
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


# ---------------------------------------------------------------- batches of other sizes

SAMPLERS = {"one step": (True, 1, 0.0), "four steps": (True, 4, 0.0), "four noisy steps": (True, 4, 0.5),
            "flow": (False, 16, 0.0), "noisy flow": (False, 16, 0.5)}


def generate(model, steps, gamma, samples):
    """Tokens of the texts with these numbers, as in sample.py."""
    E, normal = model.embed.weight.detach(), sample_normals(1, samples, 32, torch.device("cpu"))
    noise = lambda: latent_noise(E, noise_factor(E, E.size(1)), normal)
    clock = clock_of(1024)
    return (sample_flow_map if model.config.flow_map else sample_flow)(model, clock, noise(), steps, gamma, noise)


@pytest.mark.parametrize("flow_map, steps, gamma", SAMPLERS.values(), ids=SAMPLERS)
def test_text_does_not_depend_on_the_batch_size(flow_map, steps, gamma):
    """In float64, where a sum in another order, which is what another shape can lead to, decides no argmax."""
    model = network(1024, 32, flow_map=flow_map).double()
    whole = generate(model, steps, gamma, range(24))
    assert whole.unique().numel() > 50
    for size in (1, 3, 8):
        parts = [generate(model, steps, gamma, range(i, i + size)) for i in range(0, 24, size)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flow_map, steps, gamma", SAMPLERS.values(), ids=SAMPLERS)
def test_text_depends_on_its_own_noise_alone(flow_map, steps, gamma, dtype):
    """To the last bit, in a batch of a given shape: whatever the other texts in it are."""
    model = network(1024, 32, flow_map=flow_map)
    with autocast(dtype):
        first, second = (generate(model, steps, gamma, samples) for samples in ([0, 1, 2, 3, 4], [7, 1, 9, 3, 8]))
    assert torch.equal(first[[1, 3]], second[[1, 3]]) and not torch.equal(first[0], second[0])
