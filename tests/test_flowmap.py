"""python -m pytest tests/test_flowmap.py

flowmap.py at V = 3 against the exact flow map of a known distribution, integrated in float64: the
algebra, the three targets, their derivatives against finite differences, and that no loss pulls
the exact flow map away."""

import math

import pytest
import torch
import torch.nn.functional as F

import flow
import flowmap
from flow import Clock, corrupt, latent_noise, move
from flowmap import (OBJECTIVES, Denoiser, kl_to_target, off_diagonal_times, semigroup_weight,
                     softmax_and_tangent)
from lib.machine import generator
from model import FlowTransformer, ModelConfig

V, CLOCK = 3, Clock(3)
PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


class ExactFlow:
    """The exact denoiser of single tokens drawn from PRIOR. E is not the identity, but d = V = 3,
    so z determines x, and x_t given token v is Gaussian around t e_v with deviation 1 - t."""

    def __init__(self):
        E = torch.tensor([[1.0, 0.2, 0.0], [-0.3, 0.8, 0.1], [0.0, 0.4, 1.3]]).double()
        self.embed = torch.nn.Embedding.from_pretrained(E)
        self.inverse = torch.linalg.inv(E)
        self.head = torch.nn.Linear(V, V).double()
        torch.nn.init.eye_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def denoise(self, z, t):
        """D_t(z), (B, L, V), from t (B,)."""
        t = t[:, None, None].clamp_max(1 - 1e-4)
        return (PRIOR.log() + z @ self.inverse * t / (1 - t) ** 2).softmax(-1)

    def __call__(self, z, tau):
        return self.denoise(z, CLOCK.t_of_tau(tau)).clamp_min(1e-300).log()


class ExactFlowMap(ExactFlow):
    """delta_{s,t}(z) of the exact flow, by 100 Runge-Kutta steps uniform in log(1 - t), which
    can be differentiated in z and both times. The landing point X_{s,t} = (1 - h) z + h delta E
    gives delta; where s = t it is D_s."""

    def __call__(self, z, tau_s, tau_t, attention="auto"):
        s, t = SmoothTime.apply(tau_s), SmoothTime.apply(tau_t)
        t = torch.minimum(t, torch.full_like(t, 1 - 1e-3))          # the velocity is singular at 1
        n, E, x = 100, self.embed.weight, z
        log_left = torch.log1p(-s), torch.log1p(-t)
        dt = (log_left[1] - log_left[0]) / n                        # (B,)

        def velocity(x, log_left):                                  # dz / d log(1 - t) = z - D E
            return x - self.denoise(x, -torch.expm1(log_left)) @ E
        for i in range(n):
            l = log_left[0] + i * dt
            h = dt[:, None, None]
            k1 = velocity(x, l)
            k2 = velocity(x + h / 2 * k1, l + dt / 2)
            k3 = velocity(x + h / 2 * k2, l + dt / 2)
            k4 = velocity(x + h * k3, l + dt)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        share = -torch.expm1(log_left[1] - log_left[0])[:, None, None]          # (t - s) / (1 - s)
        moves = share > 1e-9
        aim = (x - (1 - share) * z) / torch.where(moves, share, 1.0) @ self.inverse
        return torch.where(moves, aim, self.denoise(z, s)).clamp_min(1e-30).log()


class SmoothTime(torch.autograd.Function):
    """t(tau) with the derivative 1 / (d tau / d t), in forward mode too: the table itself is only
    piecewise linear."""

    @staticmethod
    def forward(tau):
        return CLOCK.t_of_tau(tau)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(output)

    @staticmethod
    def jvp(ctx, tangent):
        return tangent / CLOCK.dtau_dt(ctx.saved_tensors[0])


class Still(ExactFlow):
    def __call__(self, z, tau_s, tau_t, attention="auto"):          # ignores tau_t
        return self.denoise(z, SmoothTime.apply(tau_s)).log()


def state(B=6, L=2):
    return torch.randn(B, L, V, dtype=torch.float64)


TAU_S = torch.tensor([0.05, 0.20, 0.30, 0.50, 0.60, 0.10], dtype=torch.float64)
TAU_T = torch.tensor([0.40, 0.90, 0.35, 0.80, 0.95, 0.70], dtype=torch.float64)
BOTH_S, BOTH_T = (torch.cat([torch.tensor([0.2, 0.7]), tau]) for tau in (TAU_S, TAU_T))


def noisy(E, y, tau):
    """The state that `loss` makes with generator(0)."""
    return corrupt(E, y, CLOCK.t_of_tau(tau), latent_noise(E, y.shape, generator(0)))


def evaluate(target):
    function, tensors = target
    return function(*(x.flatten(0, 1) for x in tensors)).unflatten(0, tensors[0].shape[:2])


def test_semigroup_weight():
    s, u, t = torch.tensor(0.2), torch.tensor(0.5), torch.tensor(0.8)
    assert semigroup_weight(s, u, t).item() == pytest.approx(0.2 * 0.3 / (0.5 * 0.6))
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    assert semigroup_weight(s, u, one) == 0
    assert semigroup_weight(s, s, t) == 0
    for ends in [(s, t, t), (s, s, s), (one, one, one), (zero, zero, zero)]:
        assert semigroup_weight(*ends) == 1


def test_off_diagonal_times():
    n = 100_000
    tau_s, tau_t = off_diagonal_times(torch.rand(n), torch.rand(n), torch.arange(n) < n // 4)
    assert (tau_s[:n // 4] == 0).all() and (tau_t[:n // 4] == 1).all()
    s, t = tau_s[n // 4:], tau_t[n // 4:]
    assert (0 <= s).all() and (s <= t).all() and (t <= 1).all()
    assert (t - s).mean().item() == pytest.approx(1 / 2, abs=0.01)  # length uniform on [0, 1]
    assert s.mean().item() == pytest.approx(1 / 4, abs=0.01)        # start uniform on the rest


def test_exact_flow_map_is_one():
    """The reference itself: a distribution, the denoiser on the diagonal, and two jumps are one."""
    model, z = ExactFlowMap(), state()
    delta = model(z, TAU_S, TAU_T).exp()
    assert (delta >= 0).all() and ((delta.sum(-1) - 1).abs() < 1e-9).all()
    assert torch.allclose(model(z, TAU_S, TAU_S), ExactFlow()(z, TAU_S), atol=1e-9)
    s, t = CLOCK.t_of_tau(TAU_S), CLOCK.t_of_tau(TAU_T)
    tau_u = (TAU_S + TAU_T) / 2
    u, E = CLOCK.t_of_tau(tau_u), model.embed.weight
    middle = move(z, model(z, TAU_S, tau_u).exp() @ E, s, u)
    twice = move(middle, model(middle, tau_u, TAU_T).exp() @ E, u, t)
    assert torch.allclose(twice, move(z, delta @ E, s, t), atol=1e-8)


@pytest.mark.parametrize("objective, extra", [*((name, {}) for name in OBJECTIVES),
                                              ("psd", dict(split=0.1))])
def test_target_at_the_exact_flow_map_is_the_flow_map(objective, extra):
    """Each objective's identity holds exactly, so the gradient of its loss there is zero."""
    model, z = ExactFlowMap(), state()
    exact = model(z, TAU_S, TAU_T).requires_grad_()
    teacher = Denoiser(ExactFlow())
    target = OBJECTIVES[objective](model, teacher, CLOCK, z, TAU_S, TAU_T, **extra)
    assert torch.allclose(evaluate(target), exact.exp(), atol=1e-5)
    mean, losses, cut = kl_to_target(model.head, exact, target)
    assert losses.abs().max() < 1e-6 and cut.max() < 1e-6
    assert torch.autograd.grad(12 * mean, exact)[0].abs().max() < 1e-5


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("tau_t", [1 - 5e-5, 1 - 1e-5, 1.0])
def test_target_of_a_jump_to_the_end_is_the_flow_map(objective, tau_t):
    """The same for jumps to the end of the clock or nearly, where the Eulerian target is infinity
    times zero. The exact flow map ends at t = 1 - 1e-3, hence the tolerance. A careless target is D
    there, 0.5 off."""
    model, z = ExactFlowMap(), state()
    tau_s, tau_t = torch.tensor([[0, 0, 0, 0.3, 0.3, 0.6], 6 * [tau_t]], dtype=torch.float64)
    exact = model(z, tau_s, tau_t).exp()
    p = evaluate(OBJECTIVES[objective](model, Denoiser(ExactFlow()), CLOCK, z, tau_s, tau_t))
    assert torch.allclose(p, exact, atol=0.01)
    assert (ExactFlow()(z, tau_s).exp() - exact).abs().max() > 0.5


def test_the_jumps_of_a_target_meet_where_split_says():
    """The times that the loss asks the target network for."""
    asked = []

    class Recorder(ExactFlowMap):
        def __call__(self, z, tau_s, tau_t, attention="auto"):
            asked.append((tau_s, tau_t))
            return super().__call__(z, tau_s, tau_t)
    y = torch.randint(V, (8, 1))
    flowmap.loss(ExactFlowMap(), Recorder(), ExactFlow(), CLOCK, "psd", y, BOTH_S, BOTH_T,
                 generator(0), 2, split=0.25)
    (start, met), (left, end) = asked
    assert torch.equal(start, TAU_S) and torch.equal(end, TAU_T) and torch.equal(met, left)
    assert torch.allclose(met, TAU_S + 0.25 * (TAU_T - TAU_S))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_target_away_from_the_flow_map_pulls_towards_it(objective):
    """No objective has a fixed point that ignores tau_t."""
    z = state()
    hidden = Still()(z, TAU_S, TAU_T).requires_grad_()
    target = OBJECTIVES[objective](Still(), Denoiser(ExactFlow()), CLOCK, z, TAU_S, TAU_T)
    mean, *_ = kl_to_target(Still().head, hidden, target)
    assert torch.autograd.grad(12 * mean, hidden)[0].abs().max() > 0.01


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_whole_loss_has_no_gradient_at_the_exact_flow_map(objective):
    """Diagonal and off-diagonal rows together, by the function that distill.py calls."""
    student, y = ExactFlowMap(), torch.randint(V, (8, 1))
    mean, losses, cut = flowmap.loss(student, ExactFlowMap(), ExactFlow(), CLOCK, objective, y,
                                     BOTH_S, BOTH_T, generator(0), 2)
    assert losses.shape == (8, 1) and cut.shape == (6, 1)
    assert torch.autograd.grad(8 * mean, student.head.bias)[0].abs().max() < 1e-4


@pytest.mark.parametrize("n", [0, 2])
@pytest.mark.parametrize("own", [False, True])
def test_mean_and_gradient_weigh_every_row_alike(n, own):
    """The losses, their mean and its gradient against all rows at once, with autograd's own."""
    net, other, y = small_network(), small_network(), torch.randint(V, (6, 2))
    tau_t, teacher = torch.where(torch.arange(6) < n, TAU_S, TAU_T), Denoiser(other, times=2)
    mean, losses, _ = flowmap.loss(net, other, None if own else teacher, CLOCK, "psd", y, TAU_S,
                                   tau_t, generator(0), n)
    z = noisy(net.embed.weight, y, TAU_S)
    with torch.no_grad():
        p = evaluate(OBJECTIVES["psd"](other, None, CLOCK, z, TAU_S, tau_t))
        D = F.one_hot(y, V) if own else teacher.head(teacher(z, TAU_S)).softmax(-1)
        p[:n] = D[:n]
    plain = (p.xlogy(p) - p * net.head(net(z, TAU_S, tau_t)).log_softmax(-1)).sum(-1)
    assert torch.allclose(losses, plain) and torch.allclose(mean, plain.mean())
    for ours, expected in zip(*(torch.autograd.grad(x, list(net.parameters()))
                                for x in (mean, plain.mean()))):
        assert torch.allclose(ours, expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_teacher_at_a_temperature_has_divided_logits(objective):
    """On the diagonal by hand. Off it the target is that of such a teacher."""
    class Sharp(ExactFlow):
        def __call__(self, z, tau):
            return super().__call__(z, tau) / 0.6
    y, E = torch.randint(V, (8, 1)), ExactFlow().embed.weight
    found, expected, other = (
        flowmap.loss(Still(), Still(), teacher, CLOCK, objective, y, BOTH_S, BOTH_T, generator(0),
                     2, teacher_temperature=temperature)[1]
        for teacher, temperature in ((ExactFlow(), 0.6), (Sharp(), 1.0), (ExactFlow(), 1.0)))
    assert torch.allclose(found, expected)
    D = ExactFlow()(noisy(E, y, BOTH_S), BOTH_S)[:2].exp()
    sharp = D ** (1 / 0.6) / (D ** (1 / 0.6)).sum(-1, keepdim=True)
    assert torch.allclose(found[:2], (sharp * (sharp / D).log()).sum(-1)) and found[:2].min() > 1e-4
    assert ((found - other)[2:].abs().max() > 1e-4) == (objective != "psd")  # which asks no teacher


def small_network():
    model = FlowTransformer(ModelConfig(V, 2, n_layer=2, n_head=2, n_embd=4, n_time=8, dropout=0.0,
                                        flow_map=True, time_scale=3.0)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model.eval()


def delta(model, z, s, t):
    """delta_{s,t}(z) as a function of the times themselves, for finite differences."""
    return model.head(model(z, CLOCK.tau_of_t(s), CLOCK.tau_of_t(t))).softmax(-1)


@pytest.mark.parametrize("objective", ["lsd", "esd"])
def test_target_with_a_derivative_against_finite_differences(objective):
    model, teacher, eps = small_network(), Denoiser(small_network(), times=2), 2e-4
    z, s, t = torch.randn(6, 2, 4).double(), *CLOCK.t_of_tau(torch.stack([TAU_S, TAU_T]))
    D = lambda z, tau: teacher.head(teacher(z, tau)).softmax(-1)
    found = evaluate(OBJECTIVES[objective](model, teacher, CLOCK, z, TAU_S, TAU_T))
    if objective == "lsd":
        ahead, behind = (delta(model, z, s, t + step) for step in (eps, -eps))
        factor = -(1 - t) * (t - s) / (1 - s)
        base = D(move(z, delta(model, z, s, t) @ model.embed.weight, s, t), TAU_T)
    else:  # along the flow: s moves by eps (1 - s) as z moves by eps (D E - z)
        base = D(z, TAU_S)
        along, factor = base @ model.embed.weight - z, (t - s) / (1 - t)
        ahead, behind = (delta(model, z + step * along, s + step * (1 - s), t)
                         for step in (eps, -eps))
    term = factor[:, None, None] * (ahead - behind) / (2 * eps)
    assert term.abs().max() > 0.05                                  # not a small one
    assert torch.allclose(found, base + term, atol=2e-3 if objective == "lsd" else 5e-3)


@pytest.mark.parametrize("tau_t", [1 - 1e-5, 1.0])
def test_eulerian_target_past_the_time_where_one_token_in_10000_is_lost(tau_t):
    """It goes (1 - t)/c of the way, with c = 1 - t at tau = 1 - 1e-4, however late the end is."""
    model, teacher, eps = small_network(), Denoiser(small_network(), times=2), 2e-4
    z, ends = torch.randn(6, 2, 4).double(), torch.full_like(TAU_S, tau_t)
    s, t, last = (CLOCK.t_of_tau(tau)[:, None, None] for tau in (TAU_S, ends, 0 * ends + 0.9999))
    D, c = teacher.head(teacher(z, TAU_S)).softmax(-1), 1 - last
    at = lambda step: model.head(model(
        z + step * (D @ model.embed.weight - z), CLOCK.tau_of_t((s + step * (1 - s)).flatten()),
        ends)).softmax(-1)
    bracket = (at(eps) - at(-eps)) / (2 * eps)
    expected = at(0) + ((1 - t) * (D - at(0)) + (t - s) * bracket) / c
    found = evaluate(OBJECTIVES["esd"](model, teacher, CLOCK, z, TAU_S, ends))
    assert torch.allclose(found, expected, atol=5e-3)
    assert ((t - s) * bracket / c).abs().max() > 0.1                # with 1e-3 a fifth less


def test_softmax_and_tangent_against_finite_differences():
    head, eps = torch.nn.Linear(4, 5).double(), 1e-6
    hidden, tangent = torch.randn(2, 3, 4).double()
    ahead, behind = (head(hidden + sign * eps * tangent).softmax(-1) for sign in (1, -1))
    value, slope = softmax_and_tangent(head, hidden, tangent)
    assert torch.equal(value, head(hidden).softmax(-1))
    assert torch.allclose(slope, (ahead - behind) / (2 * eps), atol=1e-8)


def test_target_outside_the_simplex_is_projected_and_reported():
    hidden = torch.randn(1, 2, V, dtype=torch.float64)
    raw = torch.tensor([[[0.5, 0.3, 0.2], [1.2, -0.3, 0.1]]], dtype=torch.float64)
    _, losses, cut = kl_to_target(ExactFlow().head, hidden, (lambda raw: raw, (raw,)))
    assert torch.allclose(cut, torch.tensor([[0.0, 0.3]]).double())
    p = torch.tensor([[0.5, 0.3, 0.2], [1.2 / 1.3, 0, 0.1 / 1.3]]).double()
    expected = F.kl_div(hidden[0].log_softmax(-1), p, reduction="none").sum(-1)
    assert torch.allclose(losses[0], expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_degenerate_times_give_finite_losses_and_gradients(objective):
    """s = t, t = 1, the full jump, and times within 1e-7 of the ends, in float32."""
    model, end = small_network().float(), 1 - 1e-7
    tau_s, tau_t = torch.tensor([[0, 0], [0, 0], [0, 1], [1, 1], [0.5, 0.5], [end, 1], [0, 1e-7],
                                 [0.5, 0.5 + 1e-7]]).unbind(1)
    mean, losses, cut = flowmap.loss(model, model, None, CLOCK, objective,
                                     torch.randint(V, (8, 2)), tau_s, tau_t, generator(0), 1)
    assert losses.isfinite().all() and cut.isfinite().all()
    for gradient in torch.autograd.grad(mean, list(model.parameters()), allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


def test_one_exact_jump_is_the_whole_flow():
    """One evaluation of the exact flow map decodes the noise as 2,000 Euler steps do."""
    z = state(500, 1)
    one = flowmap.sample(ExactFlowMap(), CLOCK, z, steps=1)
    many = flow.sample(ExactFlow(), CLOCK, z, steps=2000)
    assert (one == many).double().mean() > 0.985
    assert torch.equal(one, flowmap.sample(ExactFlowMap(), CLOCK, z, steps=1))


@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.0])
def test_stochastic_sampling_keeps_the_distribution(gamma):
    noise = lambda: state(3000, 1) @ ExactFlow().embed.weight
    tokens = flowmap.sample(ExactFlowMap(), CLOCK, noise(), steps=3, gamma=gamma, noise=noise)
    found = torch.bincount(tokens.flatten(), minlength=V) / 3000
    assert torch.allclose(found.double(), PRIOR, atol=0.04)


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_the_authors_gamma_steps_back_from_the_aim(gamma):
    """One step by hand: x' = x~ + (sigma~ - sigma') D + gamma sigma' noise. Ours, which rescales,
    is the same at 0 and 1 only."""
    model, z, fresh = Still(), state(), state()
    theirs, ours = (flowmap.sample(model, CLOCK, z, 2, gamma, lambda: fresh, rescale=rescale,
                                   last=lambda head, hidden: hidden) for rescale in (False, True))
    half = torch.full((6,), 0.5).double()
    sigma = (1 - CLOCK.t_of_tau(half))[:, None, None]               # at the next time
    beyond = sigma * math.sqrt(1 - gamma ** 2)                      # where the jump goes
    D = model(z, 0 * half, half).exp() @ model.embed.weight
    x = beyond * z + (1 - beyond) * D
    x = x + (beyond - sigma) * D + gamma * sigma * fresh
    assert torch.allclose(theirs, model(x, half, half))
    assert torch.allclose(theirs, ours) == (gamma != 0.6)


class Certain:
    """Knows the text, token 0, at all times. Keeps the states that it sees."""

    def __init__(self):
        self.embed = torch.nn.Embedding.from_pretrained(torch.eye(V).double())
        self.head, self.seen = torch.nn.Identity(), []
        self.head.out_features = V

    def __call__(self, z, tau_s, tau_t):
        self.seen.append(z)
        return torch.tensor([0, -1e3, -1e3]).double().expand_as(z)


def test_the_authors_gamma_has_the_amount_of_noise_where_the_text_is_known():
    """Variance sigma~^2 + gamma^2 sigma'^2 = sigma'^2 about t' of the text. gamma^2 sigma'^2 of it
    is fresh: less than where the state is rescaled."""
    gamma, n, variances = 0.6, 40_000, {}
    t = CLOCK.t_of_tau(torch.tensor([0.5]).double()).item()
    left, left_beyond = 1 - t, (1 - t) * math.sqrt(1 - gamma ** 2)
    for rescale in (False, True):
        for same in (False, True):                                  # the first noise of all rows
            model = Certain()
            z = state(1, 1).expand(n, 1, V) if same else state(n, 1)
            flowmap.sample(model, CLOCK, z, 2, gamma, lambda: state(n, 1), rescale=rescale,
                           last=lambda head, hidden: hidden)
            x = model.seen[1]
            if not same:
                text = torch.tensor([t, 0, 0]).double()
                assert torch.allclose(x.mean((0, 1)), text, atol=5 * left / n ** 0.5)
            variances[rescale, same] = x.var(0).mean().item()
    close = lambda value: pytest.approx(value, rel=0.02)
    assert variances[False, False] == close(left_beyond ** 2 + gamma ** 2 * left ** 2)
    assert variances[True, False] == close(left ** 2)
    assert variances[False, True] == close(gamma ** 2 * left ** 2)
    assert variances[True, True] == close(left ** 2 - (t / (1 - left_beyond) * left_beyond) ** 2)
    assert variances[True, True] > 1.05 * variances[False, True]


def test_temperature_sharpens_every_jump_but_the_last():
    model, z, times = ExactFlowMap(), state(), torch.tensor([[0, 0.5, 1]] * 6).double().T
    D = (model(z, *times[:2]) / 0.3).softmax(-1)
    middle = move(z, D @ model.embed.weight, *CLOCK.t_of_tau(times[:2]))
    found = flowmap.sample(model, CLOCK, z, 2, temperature=0.3, last=lambda head, hidden: hidden)
    assert torch.allclose(found, model(middle, *times[1:]))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("n_diagonal", [0, 2])
def test_sliced_head_under_autocast_gives_float32_gradients(objective, n_diagonal, monkeypatch):
    """bfloat16 products and logits in slices of seven tokens: every parameter still gets its
    gradient, to the precision of bfloat16."""
    model = FlowTransformer(ModelConfig(40, 6, 2, 2, 16, 8, 0.0, flow_map=True, time_scale=3.0))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.embed.requires_grad_(False)
    y, clock, tau_s, tau_t = torch.randint(40, (5, 6)), Clock(40), torch.rand(5), torch.rand(5)
    tau_s, tau_t = tau_s * 0.5, tau_t * 0.5 + 0.5
    tau_t[:n_diagonal] = tau_s[:n_diagonal]

    def gradients(slice_size, dtype):
        monkeypatch.setattr(flow, "SLICE", slice_size)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            mean, *_ = flowmap.loss(model, model, None, clock, objective, y, tau_s, tau_t,
                                    generator(0), n_diagonal)
        assert mean.dtype == torch.float32
        return torch.autograd.grad(mean, [p for p in model.parameters() if p.requires_grad])
    for ours, exact in zip(gradients(7 * 40, torch.bfloat16), gradients(10 ** 9, torch.float32)):
        assert (ours - exact).norm() < 0.25 * exact.norm() + 1e-4   # a lost one is off by all of it


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_a_teacher_the_diagonal_learns_from_the_data(objective):
    """Its loss is the cross-entropy of the text at its times. Exact jumps are left alone."""
    model, y = ExactFlowMap(), torch.arange(8)[:, None] % V
    _, losses, _ = flowmap.loss(model, model, None, CLOCK, objective, y, BOTH_S, BOTH_T,
                                generator(0), 2)
    z = noisy(model.embed.weight, y, BOTH_S)
    expected = F.cross_entropy(model(z, BOTH_S, BOTH_S)[:2, 0], y[:2, 0], reduction="none")
    assert torch.allclose(losses[:2, 0], expected)
    assert losses[2:].abs().max() < 1e-6
