"""python -m pytest tests/test_learning.py

The whole method at toy size, trained in seconds: the flow reaches the loss of the exact posterior, which no model can
beat, and the flow map carries a correlation in one step that independent tokens cannot.
"""

import dataclasses

import pytest
import torch

from flow import Clock, flow_loss, latent_noise, noise_factor, sample_flow, stratified
from flowmap import distillation_loss, off_diagonal_times, sample_flow_map
from model import FlowTransformer, ModelConfig
from test_flow import Exact

V, L, B = 4, 2, 256
JOINT = torch.tensor([[.40, .0, .0, .0], [.0, .30, .0, .0], [.0, .0, .15, .0], [.0, .0, .05, .10]], dtype=torch.float64)
CLOCK = Clock(V)


def batch(n, random):
    pairs = torch.multinomial(JOINT.flatten(), n, replacement=True, generator=random)
    return torch.stack([pairs // V, pairs % V], dim=1)


def noise(model, n, random):
    E = model.embed.weight
    return latent_noise(E, noise_factor(E, n * L), lambda k: torch.randn(n, L, k, generator=random))


def train(model, loss_of, steps, learning_rate):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], learning_rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    random = torch.Generator().manual_seed(1)
    for _ in range(steps):
        loss = loss_of(random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@pytest.fixture(scope="module")
def flow():
    torch.manual_seed(0)
    model = FlowTransformer(ModelConfig(V, L, n_layer=2, n_head=2, n_embd=32, n_time=32, dropout=0.0))
    return train(model, lambda random: flow_loss(
        model, CLOCK, batch(B, random), stratified(B, random), noise(model, B, random))[0], 400, 5e-3)


def test_flow_learns_a_known_language_to_its_entropy(flow):
    """At tau = 0 the loss is the entropy of a token on its own; in between, that of the exact posterior; at 1, zero.

    The exact denoiser reads x, the trained one z = x E: the same noise in both, through x E."""
    random, n = torch.Generator().manual_seed(2), 4000
    y, x0 = batch(n, random), torch.randn(n, L, V, generator=random)
    exact = Exact(JOINT, CLOCK)
    marginal = [JOINT.sum(1), JOINT.sum(0)]
    entropy = sum(-(p * p.log()).sum().item() for p in marginal) / 2
    with torch.no_grad():
        for tau in (0.0, 0.3, 0.6, 0.9, 1.0):
            times = torch.full((n,), tau)
            ours = flow_loss(flow, CLOCK, y, times, x0 @ flow.embed.weight)[0].item()
            best = flow_loss(exact, CLOCK, y, times.clamp_max(1 - 1e-6), x0.double())[0].item()
            assert best - 0.003 < ours < best + 0.03, tau
            if tau == 0:
                assert ours == pytest.approx(entropy, abs=0.03)
            if tau == 1:
                assert ours < 0.01


def distribution(tokens):
    return torch.bincount(tokens[:, 0] * V + tokens[:, 1], minlength=V * V).double().view(V, V) / len(tokens)


def distance(p, q):
    """Total variation: 0 for the same distribution, 1 for disjoint ones."""
    return ((p - q).abs().sum() / 2).item()


def test_flow_samples_the_language(flow):
    z = noise(flow, 4000, torch.Generator().manual_seed(3))
    assert distance(distribution(sample_flow(flow, CLOCK, z, 64)), JOINT) < 0.05


def test_flow_map_samples_it_in_one_step(flow):
    student = FlowTransformer(dataclasses.replace(flow.config, flow_map=True))
    student.load_state_dict(flow.state_dict(), strict=False)
    student.embed.weight.requires_grad_(False)

    def loss_of(random):
        half = B // 2
        diagonal = torch.rand(half, generator=random)
        jumps = off_diagonal_times(*(torch.rand(half, generator=random) for _ in range(2)),
                                   torch.rand(half, generator=random) < 0.2)
        tau_s, tau_t = (torch.cat([diagonal, jump]) for jump in jumps)
        return distillation_loss(student, student, flow, CLOCK, "psd", batch(B, random), tau_s, tau_t,
                                 noise(student, B, random), half)[0]
    z = noise(flow, 4000, torch.Generator().manual_seed(4))
    independent = JOINT.sum(1)[:, None] * JOINT.sum(0)
    one_euler_step = distance(distribution(sample_flow(flow, CLOCK, z, 1)), JOINT)
    train(student, loss_of, 400, 3e-3)
    one_jump = distance(distribution(sample_flow_map(student, CLOCK, z, 1)), JOINT)
    assert distance(independent, JOINT) > 0.5 and one_euler_step > 0.3
    assert one_jump < 0.1
