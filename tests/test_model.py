"""python -m pytest tests/test_model.py

model.py: every attention path gives the same values, the options do what they say, the network
starts as promised. test_released.py compares it with the authors' network."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from flow import latent_noise
from lib.machine import generator
from model import FlowTransformer, ModelConfig, attend, cap, rotary_table, rotate

SMALL = dict(vocab_size=11, block_size=6, n_layer=2, n_head=2, n_embd=8, n_time=8, dropout=0.0)


def network(randomised=True, **changes):
    model = FlowTransformer(ModelConfig(**SMALL | changes)).eval()
    if randomised:  # the zero-initialised layers would hide most mistakes
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.4)
    return model


def qkv():
    return [5 * torch.randn(2, 3, 7, 4) for _ in range(3)]


def by_hand(q, k, v, softcap):
    """Softmax attention, one query at a time."""
    out = torch.empty_like(v)
    for b in range(2):
        for h in range(3):
            for i in range(7):
                logits = torch.stack([q[b, h, i] @ k[b, h, j] / math.sqrt(4) for j in range(7)])
                if softcap:
                    logits = softcap * torch.tanh(logits / softcap)
                out[b, h, i] = logits.softmax(0) @ v[b, h]
    return out


@pytest.mark.parametrize("path, softcap", [("sdpa", 0), ("math", 0), ("auto", 0), ("math", 3),
                                           ("auto", 3)])
def test_attention_paths_agree(path, softcap):
    q, k, v = qkv()
    assert torch.allclose(attend(q, k, v, softcap, path), by_hand(q, k, v, softcap), atol=1e-5)


@pytest.mark.parametrize("softcap", [0, 3])
def test_flex_attention_agrees(softcap, monkeypatch):
    """The score function in PyTorch's own uncompiled reference; CUDA compiles the same function."""
    monkeypatch.setattr("model.compiled", lambda function: function)
    q, k, v = qkv()
    assert torch.allclose(attend(q, k, v, softcap, "flex"), by_hand(q, k, v, softcap), atol=1e-5)


def test_attention_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="'sdpa' cannot be used with softcap=50"):
        attend(*qkv(), 50, "sdpa")
    with pytest.raises(ValueError, match="'fast'"):
        attend(*qkv(), 0, "fast")


def test_cap():
    x = torch.linspace(-500, 500, 11)
    assert torch.allclose(cap(x, 30), 30 * torch.tanh(x / 30)) and cap(x, 0) is x
    assert cap(torch.tensor(0.1), 30).item() == pytest.approx(0.1, rel=1e-4)


def test_forward_mode_passes_through_the_math_path():
    model = network(flow_map=True, attention_softcap=50.0, time_scale=1.0).double()
    inputs = torch.randn(2, 6, 8).double(), *torch.tensor([[0.1, 0.5], [0.7, 0.8]]).double()
    run = lambda z, tau, tau_t: model(z, tau, tau_t, attention="math")
    along, eps = (torch.randn(2, 6, 8).double(), *torch.tensor([[1, 1], [2, 2]]).double()), 1e-5
    _, tangent = torch.func.jvp(run, inputs, along)
    ahead, behind = (run(*(x + sign * eps * dx for x, dx in zip(inputs, along)))
                     for sign in (1, -1))
    assert torch.allclose(tangent, (ahead - behind) / (2 * eps), atol=1e-6)


def test_rotary_depends_on_distance_only():
    cos, sin = rotary_table(20, 8, torch.device("cpu"))
    q, k = torch.randn(8), torch.randn(8)
    Q, K = (rotate(x.expand(1, 1, 20, 8), cos, sin)[0, 0] for x in (q, k))
    products = Q @ K.T
    for distance in (-7, 0, 3):
        diagonal = products.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4)
    assert products[0, 0] == pytest.approx((q @ k).item(), abs=1e-5)
    assert abs(products[0, 1] - products[0, 0]) > 1e-3


def test_without_learned_positions_the_network_cannot_tell_them_apart():
    """The same vector everywhere comes out the same everywhere: noise has no first token."""
    z, tau = torch.randn(1, 1, 8).expand(1, 6, 8), torch.tensor([0.3])
    for learned, same in ((False, True), (True, False)):
        h = network(learned_positions=learned)(z, tau)
        assert torch.allclose(h, h[:, :1].expand_as(h), atol=1e-5) == same


def test_time_features():
    """256 sinusoids of tau, cosines first, at frequencies 10000^(-i/128)."""
    embedding = network(time_scale=1000.0).time_s
    seen = []
    embedding.fc1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    embedding(torch.tensor([0.25]))
    phases = 250 * 10_000.0 ** (-torch.arange(128) / 128)
    assert torch.allclose(seen[0][0], torch.cat([phases.cos(), phases.sin()]), atol=1e-4)


def test_the_time_moves_the_output():
    model, z = network(), torch.randn(1, 6, 8)
    early, late = (model(z, torch.tensor([tau])) for tau in (0.1, 0.2))
    assert not torch.allclose(early, late, atol=1e-3)


def test_starts_as_a_uniform_guess():
    model = network(randomised=False)
    logits = model.head(model(torch.randn(2, 6, 8), torch.tensor([0.0, 0.9])))
    assert torch.equal(logits, torch.zeros(2, 6, 11))


def test_noise_starts_near_unit_variance():
    model = network(randomised=False, vocab_size=3000, n_embd=64)
    z0 = latent_noise(model.embed.weight, (4, 6), generator(0))
    assert z0.std().item() == pytest.approx(1, abs=0.1)


def test_flow_map_starts_as_the_flow():
    flow, z, tau = network(), torch.randn(2, 6, 8), torch.tensor([0.2, 0.6])
    flow_map = network(randomised=False, flow_map=True)
    missing, unexpected = flow_map.load_state_dict(flow.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("time_t.") for name in missing)
    for tau_t in (tau, torch.ones(2)):
        assert torch.equal(flow_map(z, tau, tau_t), flow(z, tau))


def test_parameter_count_of_the_published_size():
    """About 170 M with V = 50257, by arithmetic on shapes; no weights are allocated."""
    with torch.device("meta"):
        model = FlowTransformer(ModelConfig(50257, 1024, learned_positions=False))
    count = sum(p.numel() for p in model.parameters())
    d, V, c = 768, 50257, 128
    block = 2 * d + 4 * d * d + 8 * d * d + 5 * d + 6 * d * (c + 1)
    assert count == V * d + V * (d + 1) + 12 * block + d + 2 * d * (c + 1) + 257 * c + (c + 1) * c
    assert 160e6 < count < 175e6


def test_mlp_ratio_is_the_width_of_the_hidden_layer():
    """From 4 d to 2 d, a block's two matrices lose 4 d^2 weights and the first 2 d biases."""
    four, two = (sum(p.numel() for p in network(mlp_ratio=ratio).parameters()) for ratio in (4, 2))
    assert four - two == 2 * (4 * 8 ** 2 + 2 * 8)


def test_wrong_inputs():
    z, tau = torch.randn(1, 6, 8), torch.tensor([0.5])
    with pytest.raises(ValueError, match="a flow map takes tau and tau_t"):
        network()(z, tau, tau)
    with pytest.raises(ValueError, match="a flow map takes tau and tau_t"):
        network(flow_map=True)(z, tau)
    with pytest.raises(ValueError, match="7 tokens, but the model has positions for 6"):
        network()(torch.randn(1, 7, 8), tau)
    with pytest.raises(ValueError, match="n_embd=8 must be an even multiple of n_head=3"):
        ModelConfig(**SMALL | dict(n_head=3))


def test_dropout_is_on_both_branches_of_a_block_and_only_in_training():
    net = network(n_layer=1, dropout=0.5)
    z, tau, block = torch.randn(1, 6, 8), torch.tensor([0.5]), net.blocks[0]
    for silent in (block.attn_out, block.mlp_out):                  # only the other can show it
        weights = copy.deepcopy(silent.state_dict())
        for p in silent.parameters():
            torch.nn.init.zeros_(p)
        assert torch.equal(net.eval()(z, tau), net(z, tau))
        assert not torch.equal(net.train()(z, tau), net(z, tau))
        silent.load_state_dict(weights)


def test_every_block_begins_as_the_identity():
    """A layer norm of the state and its positions is left. Those have the deviation asked for."""
    net, z = network(randomised=False, block_size=600, position_std=0.3), torch.randn(2, 600, 8)
    assert net.positions.std().item() == pytest.approx(0.3, rel=0.1)
    assert torch.equal(net(z, torch.tensor([0.1, 0.9])), F.layer_norm(z + net.positions, (8,)))
