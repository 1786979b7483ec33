"""python -m pytest tests/test_learning.py

The whole method at toy size, trained in seconds: the flow reaches the loss of the exact posterior,
which no model can beat, and the flow map carries a correlation in one step that independent tokens
cannot.
"""

import dataclasses

import pytest
import torch
from test_flow import Exact

import flow
import flowmap
from model import FlowTransformer, ModelConfig

V, L, B = 4, 2, 256
JOINT = torch.tensor([[.40, .0, .0, .0], [.0, .30, .0, .0], [.0, .0, .15, .0], [.0, .0, .05, .10]],
                     dtype=torch.float64)
CLOCK = flow.Clock(V)


def batch(n, rng):
    pairs = torch.multinomial(JOINT.flatten(), n, replacement=True, generator=rng)
    return torch.stack([pairs // V, pairs % V], dim=1)


def train(model, loss_of, steps, learning_rate):
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, learning_rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        loss = loss_of(rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = FlowTransformer(ModelConfig(V, L, n_layer=2, n_head=2, n_embd=32, n_time=32))
    return train(model, lambda rng: flow.loss(
        model, CLOCK, batch(B, rng), flow.stratified(B, rng), rng)[0], 400, 5e-3)


def test_flow_learns_a_known_language_to_its_entropy(trained):
    """At tau = 0 the loss is the entropy of a token on its own; in between, that of the exact
    posterior; at 1, zero.

    The exact denoiser reads x, the trained one z = x E: the same noise in both, through x E."""
    rng, n = torch.Generator().manual_seed(2), 4000
    y, exact = batch(n, rng), Exact(JOINT)
    x0 = torch.randn(n, L, V, generator=rng)
    entropy = sum(-(p * p.log()).sum().item() for p in (JOINT.sum(1), JOINT.sum(0))) / 2

    def loss(net, tau, z0):
        z = flow.corrupt(net.embed.weight, y, CLOCK.t_of_tau(tau), z0)
        return flow.cross_entropy(net.head, net(z, tau), y)[0].item()
    with torch.no_grad():
        for tau in (0.0, 0.3, 0.6, 0.9, 1.0):
            times = torch.full((n,), tau)
            ours = loss(trained, times, x0 @ trained.embed.weight)
            best = loss(exact, times.clamp_max(1 - 1e-6), x0.double())
            assert best - 0.003 < ours < best + 0.03, tau
            if tau == 0:
                assert ours == pytest.approx(entropy, abs=0.03)
            if tau == 1:
                assert ours < 0.01


def distribution(tokens):
    counts = torch.bincount(tokens[:, 0] * V + tokens[:, 1], minlength=V * V)
    return counts.double().view(V, V) / len(tokens)


def distance(p, q):
    """Total variation: 0 for the same distribution, 1 for disjoint ones."""
    return ((p - q).abs().sum() / 2).item()


def noise(model, seed):
    rng = torch.Generator().manual_seed(seed)
    return flow.latent_noise(model.embed.weight.detach(), (4000, L), rng)


def test_flow_samples_the_language(trained):
    tokens = flow.sample(trained, CLOCK, noise(trained, 3), 64)
    assert distance(distribution(tokens), JOINT) < 0.05


def test_flow_map_samples_it_in_one_step(trained):
    student = FlowTransformer(dataclasses.replace(trained.config, flow_map=True))
    student.load_state_dict(trained.state_dict(), strict=False)
    student.embed.weight.requires_grad_(False)

    def loss_of(rng):
        half = B // 2
        diagonal, length, place, u = torch.rand(4, half, generator=rng)
        jumps = flowmap.off_diagonal_times(length, place, u < 0.2)
        tau_s, tau_t = (torch.cat([diagonal, jump]) for jump in jumps)
        return flowmap.loss(student, student, trained, CLOCK, "psd", batch(B, rng), tau_s, tau_t,
                            rng, half)[0]
    z = noise(trained, 4)
    independent = JOINT.sum(1)[:, None] * JOINT.sum(0)
    one_euler_step = distance(distribution(flow.sample(trained, CLOCK, z, 1)), JOINT)
    train(student, loss_of, 300, 3e-3)
    one_jump = distance(distribution(flowmap.sample(student, CLOCK, z, 1)), JOINT)
    assert distance(independent, JOINT) > 0.5 and one_euler_step > 0.3
    assert one_jump < 0.1
