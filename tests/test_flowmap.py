"""python -m pytest tests/test_flowmap.py

flowmap.py at V = 3 against the exact flow map of a known distribution, integrated in float64: the algebra, the three
targets, their derivatives against finite differences, and that none of them pulls the exact flow map away.
"""

import pytest
import torch
import torch.nn.functional as F

from flow import Clock, corrupt, move, sample_flow
from flowmap import (OBJECTIVES, distillation_loss, kl_to_target, off_diagonal_times, sample_flow_map,
                     semigroup_weight, softmax_and_tangent)

V, CLOCK = 3, Clock(3)
PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


class ExactFlow:
    """The exact denoiser of single tokens drawn from PRIOR, with an embedding that is not the identity: d = V = 3, so
    z determines x, and x_t given token v is Gaussian around t e_v with deviation 1 - t."""

    def __init__(self):
        E = torch.tensor([[1.0, 0.2, 0.0], [-0.3, 0.8, 0.1], [0.0, 0.4, 1.3]], dtype=torch.float64)
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
    """delta_{s,t}(z) of the exact flow, by 200 Runge-Kutta steps, uniform in log(1 - t). Differentiable in z and in both
    times. The landing point is X_{s,t} = (1 - h) z + h delta E: delta is read off it, or is D_s where s = t."""

    def __call__(self, z, tau_s, tau_t, attention="auto"):
        s, t = SmoothTime.apply(tau_s), SmoothTime.apply(tau_t)
        t = torch.minimum(t, torch.full_like(t, 1 - 1e-3))                      # the velocity is singular at 1
        n, E = 200, self.embed.weight
        log_left = torch.log1p(-s), torch.log1p(-t)
        dt = (log_left[1] - log_left[0]) / n                                    # (B,), equal steps in log(1 - t)
        x = z

        def velocity(x, log_left):                                              # dz / d log(1 - t) = z - D E
            return x - self.denoise(x, -torch.expm1(log_left)) @ E
        for i in range(n):
            l = log_left[0] + i * dt
            h = dt[:, None, None]
            k1 = velocity(x, l)
            k2 = velocity(x + h / 2 * k1, l + dt / 2)
            k3 = velocity(x + h / 2 * k2, l + dt / 2)
            k4 = velocity(x + h * k3, l + dt)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        share = -torch.expm1(log_left[1] - log_left[0])[:, None, None]          # h = (t - s)/(1 - s)
        aim = (x - (1 - share) * z) / torch.where(share > 1e-9, share, torch.ones_like(share)) @ self.inverse
        here = self.denoise(z, s)
        return torch.where(share > 1e-9, aim, here).clamp_min(1e-30).log()


class SmoothTime(torch.autograd.Function):
    """t(tau) with the derivative 1 / (d tau / d t), in forward mode too: the table itself is only piecewise linear."""

    @staticmethod
    def forward(tau):
        return CLOCK.t_of_tau(tau)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(output)
        ctx.save_for_backward(output)

    @staticmethod
    def jvp(ctx, tangent):
        return tangent / CLOCK.dtau_dt(ctx.saved_tensors[0])

    @staticmethod
    def backward(ctx, gradient):
        return gradient / CLOCK.dtau_dt(ctx.saved_tensors[0])


def state(B=6, L=2):
    return torch.randn(B, L, V, dtype=torch.float64)


TAU_S = torch.tensor([0.05, 0.20, 0.30, 0.50, 0.60, 0.10], dtype=torch.float64)
TAU_T = torch.tensor([0.40, 0.90, 0.35, 0.80, 0.95, 0.70], dtype=torch.float64)


# ---------------------------------------------------------------- algebra

def test_semigroup_weight():
    s, u, t = torch.tensor(0.2), torch.tensor(0.5), torch.tensor(0.8)
    assert semigroup_weight(s, u, t).item() == pytest.approx(0.2 * 0.3 / (0.5 * 0.6))
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    assert semigroup_weight(s, u, one) == 0
    assert semigroup_weight(s, s, t) == 0
    for ends in [(s, t, t), (s, s, s), (one, one, one), (zero, zero, zero)]:
        assert semigroup_weight(*ends) == 1


def test_two_jumps_are_one_for_any_denoisers():
    """g is what makes the composition of two jumps a jump: pure algebra, true for arbitrary aims."""
    z, first, second = state(), state(), state()
    s, t = TAU_S, TAU_T
    u = (s + t) / 2
    g = semigroup_weight(s, u, t)[:, None, None]
    assert torch.allclose(move(move(z, first, s, u), second, u, t), move(z, g * first + (1 - g) * second, s, t))


def test_off_diagonal_times():
    n = 100_000
    tau_s, tau_t = off_diagonal_times(torch.rand(n), torch.rand(n), torch.arange(n) < n // 4)
    assert (tau_s[:n // 4] == 0).all() and (tau_t[:n // 4] == 1).all()
    s, t = tau_s[n // 4:], tau_t[n // 4:]
    assert (0 <= s).all() and (s <= t).all() and (t <= 1).all()
    assert (t - s).mean().item() == pytest.approx(1 / 2, abs=0.01)  # length uniform on [0, 1]
    assert s.mean().item() == pytest.approx(1 / 4, abs=0.01)        # start uniform on [0, 1 - length]


# ---------------------------------------------------------------- the exact flow map

def test_exact_flow_map_is_one():
    """The reference itself: a distribution, the denoiser on the diagonal, and two jumps are one."""
    model, z = ExactFlowMap(), state()
    delta = model(z, TAU_S, TAU_T).exp()
    assert (delta >= 0).all() and torch.allclose(delta.sum(-1), torch.ones(6, 2, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(model(z, TAU_S, TAU_S), ExactFlow()(z, TAU_S), atol=1e-9)
    s, t = CLOCK.t_of_tau(TAU_S), CLOCK.t_of_tau(TAU_T)
    tau_u = (TAU_S + TAU_T) / 2
    u, E = CLOCK.t_of_tau(tau_u), model.embed.weight
    middle = move(z, model(z, TAU_S, tau_u).exp() @ E, s, u)
    assert torch.allclose(move(middle, model(middle, tau_u, TAU_T).exp() @ E, u, t), move(z, delta @ E, s, t), atol=1e-8)


@pytest.mark.parametrize("objective, extra", [*((name, {}) for name in OBJECTIVES), ("psd", dict(split=0.1))])
def test_target_at_the_exact_flow_map_is_the_flow_map(objective, extra):
    """Each objective's identity holds exactly, so the gradient of its loss there is zero."""
    model, z = ExactFlowMap(), state()
    exact = model(z, TAU_S, TAU_T).requires_grad_()
    target = OBJECTIVES[objective](model, ExactFlow(), CLOCK, z, TAU_S, TAU_T, **extra)
    p = target[0](*(x.flatten(0, 1) for x in target[1])).unflatten(0, (6, 2))
    assert torch.allclose(p, exact.exp(), atol=1e-5)
    total, loss, cut = kl_to_target(model.head, exact, target)
    assert loss.abs().max() < 1e-6 and cut.max() < 1e-6
    assert torch.autograd.grad(total, exact)[0].abs().max() < 1e-5


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("tau_t", [1 - 5e-5, 1 - 1e-5, 1.0])
def test_target_of_a_jump_to_the_end_is_the_flow_map(objective, tau_t):
    """The same for jumps to the end of the clock and close to it, where the Eulerian target is infinity times zero. The
    exact flow map ends at t = 1 - 1e-3, hence the tolerance; D, which a careless target has here, is 0.5 off."""
    model, z = ExactFlowMap(), state()
    tau_s, tau_t = torch.tensor([0, 0, 0, 0.3, 0.3, 0.6], dtype=torch.float64), torch.full((6,), tau_t, dtype=torch.float64)
    exact = model(z, tau_s, tau_t).exp()
    function, tensors = OBJECTIVES[objective](model, ExactFlow(), CLOCK, z, tau_s, tau_t)
    p = function(*(x.flatten(0, 1) for x in tensors)).unflatten(0, (6, 2))
    assert torch.allclose(p, exact, atol=0.01)
    assert (ExactFlow()(z, tau_s).exp() - exact).abs().max() > 0.5


def test_the_jumps_of_a_target_meet_where_split_says():
    """The times that the network is asked for, and that a loss is computed with it."""
    asked = []

    class Recorder(ExactFlowMap):
        def __call__(self, z, tau_s, tau_t, attention="auto"):
            asked.append((tau_s, tau_t))
            return super().__call__(z, tau_s, tau_t)
    z0, y = state(8, 1), torch.randint(V, (8, 1))
    both = [torch.cat([torch.tensor([0.2, 0.7]).double(), tau]) for tau in (TAU_S, TAU_T)]
    distillation_loss(ExactFlowMap(), Recorder(), ExactFlow(), CLOCK, "psd", y, *both, z0, 2, split=0.25)
    (start, met), (left, end) = asked
    assert torch.equal(start, TAU_S) and torch.equal(end, TAU_T) and torch.equal(met, left)
    assert torch.allclose(met, TAU_S + 0.25 * (TAU_T - TAU_S))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_target_away_from_the_flow_map_pulls_towards_it(objective):
    """The same, failing where it should: a map that ignores tau_t is not a fixed point of any objective."""
    class Still(ExactFlow):
        def __call__(self, z, tau_s, tau_t, attention="auto"):
            return super().denoise(z, SmoothTime.apply(tau_s)).log()
    z = state()
    hidden = Still()(z, TAU_S, TAU_T).requires_grad_()
    loss, *_ = kl_to_target(Still().head, hidden, OBJECTIVES[objective](Still(), ExactFlow(), CLOCK, z, TAU_S, TAU_T))
    assert torch.autograd.grad(loss, hidden)[0].abs().max() > 0.01


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_whole_loss_has_no_gradient_at_the_exact_flow_map(objective):
    """Diagonal and off-diagonal rows together, through the function that distill.py calls."""
    class Student(ExactFlowMap):
        def __init__(self):
            super().__init__()
            self.shift = torch.zeros(V, dtype=torch.float64, requires_grad=True)

        def __call__(self, *inputs, **options):
            return super().__call__(*inputs, **options) + self.shift
    student = Student()
    y, z0 = torch.randint(V, (8, 1)), state(8, 1)
    tau_s = torch.cat([torch.tensor([0.2, 0.7]).double(), TAU_S])
    tau_t = torch.cat([torch.tensor([0.2, 0.7]).double(), TAU_T])
    mean, loss, cut = distillation_loss(student, ExactFlowMap(), ExactFlow(), CLOCK, objective, y, tau_s, tau_t, z0, 2)
    assert loss.shape == (8, 1) and cut.shape == (6, 1) and torch.allclose(mean, loss.mean())
    assert torch.autograd.grad(8 * mean, student.shift)[0].abs().max() < 1e-4


# ---------------------------------------------------------------- derivatives

def small_network():
    from model import FlowTransformer, ModelConfig
    model = FlowTransformer(ModelConfig(V, 2, n_layer=2, n_head=2, n_embd=4, n_time=8, dropout=0.0, flow_map=True,
                                        time_scale=3.0)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model.eval()


def delta(model, z, s, t):
    """delta_{s,t}(z) as a function of the times themselves, for finite differences."""
    return model.head(model(z, CLOCK.tau_of_t(s), CLOCK.tau_of_t(t))).softmax(-1)


def evaluate(target):
    function, tensors = target
    return function(*(x.flatten(0, 1) for x in tensors)).unflatten(0, (6, 2))


def test_lagrangian_target_against_finite_differences():
    model, teacher, eps = small_network(), small_network(), 2e-4
    teacher_net = lambda z, tau: teacher(z, tau, tau)
    teacher_net.head = teacher.head
    z = torch.randn(6, 2, 4, dtype=torch.float64)
    s, t = CLOCK.t_of_tau(TAU_S), CLOCK.t_of_tau(TAU_T)
    found = evaluate(OBJECTIVES["lsd"](model, teacher_net, CLOCK, z, TAU_S, TAU_T))
    derivative = (delta(model, z, s, t + eps) - delta(model, z, s, t - eps)) / (2 * eps)
    z_t = move(z, delta(model, z, s, t) @ model.embed.weight, s, t)
    factor = ((1 - t) * (t - s) / (1 - s))[:, None, None]
    expected = teacher.head(teacher_net(z_t, TAU_T)).softmax(-1) - factor * derivative
    assert (factor * derivative).abs().max() > 0.05  # the term under test is not a small one
    assert torch.allclose(found, expected, atol=2e-3)


def test_eulerian_target_against_finite_differences():
    model, teacher, eps = small_network(), small_network(), 2e-4
    teacher_net = lambda z, tau: teacher(z, tau, tau)
    teacher_net.head = teacher.head
    z = torch.randn(6, 2, 4, dtype=torch.float64)
    s, t = CLOCK.t_of_tau(TAU_S), CLOCK.t_of_tau(TAU_T)
    found = evaluate(OBJECTIVES["esd"](model, teacher_net, CLOCK, z, TAU_S, TAU_T))
    D = teacher.head(teacher_net(z, TAU_S)).softmax(-1)
    along = D @ model.embed.weight - z
    # one central difference along the flow: s moves by eps (1 - s) while z moves by eps (D E - z)
    derivative = (delta(model, z + eps * along, s + eps * (1 - s), t)
                  - delta(model, z - eps * along, s - eps * (1 - s), t)) / (2 * eps)
    factor = ((t - s) / (1 - t))[:, None, None]
    assert (factor * derivative).abs().max() > 0.05
    assert torch.allclose(found, D + factor * derivative, atol=5e-3)


def test_softmax_and_tangent_against_finite_differences():
    head, eps = torch.nn.Linear(4, 5).double(), 1e-6
    hidden, tangent = torch.randn(2, 3, 4).double()
    difference = (head(hidden + eps * tangent).softmax(-1) - head(hidden - eps * tangent).softmax(-1)) / (2 * eps)
    value, slope = softmax_and_tangent(head, hidden, tangent)
    assert torch.equal(value, head(hidden).softmax(-1)) and torch.allclose(slope, difference, atol=1e-8)


# ---------------------------------------------------------------- the loss at its edges

def test_target_outside_the_simplex_is_projected_and_reported():
    hidden = torch.randn(1, 2, V, dtype=torch.float64)
    raw = torch.tensor([[[0.5, 0.3, 0.2], [1.2, -0.3, 0.1]]], dtype=torch.float64)
    head = ExactFlow().head
    _, loss, cut = kl_to_target(head, hidden, (lambda raw: raw, (raw,)))
    assert torch.allclose(cut, torch.tensor([[0.0, 0.3]]).double())
    p = torch.tensor([[0.5, 0.3, 0.2], [1.2 / 1.3, 0, 0.1 / 1.3]]).double()
    expected = F.kl_div(hidden[0].log_softmax(-1), p, reduction="none").sum(-1)
    assert torch.allclose(loss[0], expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_degenerate_times_give_finite_losses_and_gradients(objective):
    """s = t, t = 1, the full jump, and times within 1e-7 of the ends, in float32."""
    model = small_network().float()
    times = torch.tensor([[0, 0], [0, 1], [1, 1], [0.5, 0.5], [1 - 1e-7, 1], [0, 1e-7], [0.5, 0.5 + 1e-7]])
    y, z0 = torch.randint(V, (7, 2)), torch.randn(7, 2, 4)
    tau_s, tau_t = (torch.cat([tau[:1], tau]) for tau in times.unbind(1))
    tau_s, tau_t, y, z0 = tau_s[:8], tau_t[:8], y[[0, *range(7)]], z0[[0, *range(7)]]
    mean, loss, cut = distillation_loss(model, model, None, CLOCK, objective, y, tau_s, tau_t, z0, 1)
    assert loss.isfinite().all() and cut.isfinite().all()
    for gradient in torch.autograd.grad(mean, list(model.parameters()), allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


# ---------------------------------------------------------------- sampling

def test_one_exact_jump_is_the_whole_flow():
    """One evaluation of the exact flow map decodes the noise to what 2,000 Euler steps decode it to."""
    z = state(500, 1)
    one = sample_flow_map(ExactFlowMap(), CLOCK, z, steps=1)
    many = sample_flow(ExactFlow(), CLOCK, z, steps=2000)
    assert (one == many).double().mean() > 0.985
    assert torch.equal(one, sample_flow_map(ExactFlowMap(), CLOCK, z, steps=1))


@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.0])
def test_stochastic_sampling_keeps_the_distribution(gamma):
    E = ExactFlow().embed.weight
    noise = lambda: state(3000, 1) @ E
    tokens = sample_flow_map(ExactFlowMap(), CLOCK, noise(), steps=3, gamma=gamma, noise=noise)
    found = torch.bincount(tokens.flatten(), minlength=V) / 3000
    assert torch.allclose(found.double(), PRIOR, atol=0.04)


# ---------------------------------------------------------------- as distill.py runs it at a large vocabulary

@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("n_diagonal", [0, 2])
def test_sliced_head_under_autocast_gives_the_gradients_of_float32(objective, n_diagonal, monkeypatch):
    """bfloat16 products, logits in slices of seven tokens: every parameter
    still gets its gradient, to the precision of bfloat16."""
    from model import FlowTransformer, ModelConfig
    model = FlowTransformer(ModelConfig(40, 6, 2, 2, 16, 8, 0.0, flow_map=True, time_scale=3.0))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    clock = Clock(40)
    y, z0 = torch.randint(40, (5, 6)), torch.randn(5, 6, 16)
    tau_s, tau_t = torch.rand(5) * 0.5, torch.rand(5) * 0.5 + 0.5
    tau_t[:n_diagonal] = tau_s[:n_diagonal]

    def gradients(slice_size, dtype):
        monkeypatch.setattr("head.SLICE", slice_size)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, *_ = distillation_loss(model, model, None, clock, objective, y, tau_s, tau_t, z0, n_diagonal)
        assert loss.dtype == torch.float32
        return torch.autograd.grad(loss, [p for p in model.parameters()])
    for ours, exact in zip(gradients(7 * 40, torch.bfloat16), gradients(10 ** 9, torch.float32)):
        assert (ours - exact).norm() < 0.25 * exact.norm() + 1e-4  # a lost gradient would be off by all of it


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_a_teacher_the_diagonal_learns_from_the_data(objective):
    """Its loss is the cross-entropy of the text at its own times; the exact jumps below it are left alone."""
    model, y, z0 = ExactFlowMap(), torch.arange(8)[:, None] % V, state(8, 1)
    tau_s, tau_t = (torch.cat([torch.tensor([0.2, 0.7]).double(), tau]) for tau in (TAU_S, TAU_T))
    _, loss, _ = distillation_loss(model, model, None, CLOCK, objective, y, tau_s, tau_t, z0, 2)
    z = corrupt(model.embed.weight, y, CLOCK.t_of_tau(tau_s), z0)
    assert torch.allclose(loss[:2, 0], F.cross_entropy(model(z, tau_s, tau_s)[:2, 0], y[:2, 0], reduction="none"))
    assert loss[2:].abs().max() < 1e-6
