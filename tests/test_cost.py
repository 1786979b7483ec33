"""python -m pytest tests/test_cost.py

Nothing is computed twice, waits for the device or breaks the compiled graph. eval/bench.py from end
to end, and that what it compares computes the same.
"""

import contextlib
import copy
import json
import subprocess

import pytest
import torch
import torch.nn.functional as F
from programs import QUICK, TINY, inside, mistake, write_set
from torch.utils._python_dispatch import TorchDispatchMode

import flow
import flowmap
from baselines import ar, dense
from eval import heads
from eval.estimate import estimate, seconds
from flow import Clock, cross_entropy, most_likely
from flowmap import OBJECTIVES
from lib.machine import Machine, generator
from model import FlowTransformer, ModelConfig


def network(V=40, L=8, **changes):
    """No layer is zero, as the head and the modulations are at the start."""
    net = FlowTransformer(ModelConfig(V, L, 2, 2, 16, n_time=8, dropout=0.0, **changes)).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


def tokens_and_times(V, B, L, n_diagonal=0):
    y, (tau_s, tau_t) = torch.randint(V, (B, L)), torch.rand(2, B).sort(0).values
    tau_t[:n_diagonal] = tau_s[:n_diagonal]
    return y, tau_s, tau_t


# ------------------------------------------------------------------------------ the Gram matrix


def test_gram_matrix_once_a_micro_step_and_once_for_all(tmp_path, monkeypatch):
    """Three steps of four micro-steps and two validations of two batches; in distillation, where E
    is frozen, and sampling once. V = 41 is more than the 16 dimensions."""
    letters = torch.randint(41, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    write_set(tmp_path / "data", "".join(chr(48 + i) for i in letters))
    real, factors = flow.noise_factor, []
    monkeypatch.setattr(flow, "noise_factor", lambda *args: factors.append(1) or real(*args))
    places = [f"--dataset={tmp_path / 'data'}", f"--out_dir={tmp_path}"]
    for command, expected in [
            (["train.py", *places, *QUICK, *TINY, "--gradient_accumulation_steps=4",
              "--max_iters=3"], 3 * 4 + 2 * 2),
            (["distill.py", *places, *QUICK, "--batch_size=8"], 1),
            (["sample.py", places[1], "--steps=1,4", "--num_samples=20"], 1)]:
        factors.clear()
        inside(monkeypatch, *command)
        assert len(factors) == expected, command[0]


def test_gradient_of_a_training_step():
    """That of flow.loss, E's included, is what plain autograd finds through E^T E."""
    net, (y, tau, _) = network().double(), tokens_and_times(40, 6, 8)
    ours, plain, clock = net, copy.deepcopy(net), Clock(40)
    loss, _ = flow.loss(ours, clock, y, tau.double(), generator(1))
    loss.backward()
    E, xi = plain.embed.weight, torch.randn(6, 8, 16, generator=generator(1), dtype=torch.float64)
    G = E.T @ E
    C = torch.linalg.cholesky(G + 1e-6 * G.detach().diagonal().mean() * torch.eye(16))
    t = clock.t_of_tau(tau)[:, None, None]
    logits = plain.head(plain((1 - t) * (xi @ C.T) + t * E[y], tau.double()))
    F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
    for (name, p), expected in zip(ours.named_parameters(), plain.parameters()):
        assert torch.allclose(p.grad, expected.grad, rtol=1e-6, atol=1e-9), name
    assert ours.embed.weight.grad.norm() > 0


# ------------------------------------------------------------------------------ the head


def test_loss_can_be_differentiated_once():
    """A second time would be wrong, since the gradient is scaled in place: it is refused."""
    head, hidden = torch.nn.Linear(4, 7), torch.randn(1, 5, 4, requires_grad=True)
    y = torch.randint(7, (1, 5))
    mean, _ = cross_entropy(head, hidden, y)
    assert not torch.autograd.grad(mean, hidden, create_graph=True)[0].requires_grad
    mean, _ = cross_entropy(head, hidden, y)
    mean.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        mean.backward()


def test_a_compiled_head_has_the_same_loss(monkeypatch):
    """And the same gradients, of cross-entropy and of KL, in slices of two sizes. Each loss is one
    graph (fullgraph) of each size, traced once: not again in the next step."""
    compile, V, B, L = torch.compile, 40, 2, 5
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(
        f, backend="aot_eager", **options))                         # no C++ compiler needed
    monkeypatch.setattr(flow, "SLICE", 4 * V)
    torch._dynamo.reset()
    head, hidden = network(logit_softcap=3.0).head, torch.randn(B, L, 16, requires_grad=True)
    y, p = torch.randint(V, (B, L)), torch.randn(B, L, V).softmax(-1)
    found = {}
    for head.compiled in (False, True, True):
        with compiled_graphs() as graphs:
            ce = cross_entropy(head, hidden, y)[0]
            kl = flowmap.kl_to_target(head, hidden, (lambda p: p, (p,)))[0]
            parts = [ce, kl, *torch.autograd.grad(ce + 2 * kl, [hidden, *head.parameters()])]
        found[len(found)] = parts, graphs()
    assert [found[i][1] for i in range(3)] == [0, 4, 0]
    for plain, compiled in zip(found[0][0], found[1][0]):
        assert torch.allclose(plain, compiled, atol=1e-6) and plain.abs().max() > 1e-3


def test_rows_of_logits_are_padded_on_a_gpu(monkeypatch):
    """With the same logits and gradients. A CPU says here that it is one."""
    head, hidden, found = network(V=70).head, torch.randn(52, 5, 16, requires_grad=True), []
    y = torch.randint(70, (52, 5))
    for gpu in (False, True):
        monkeypatch.setattr(torch.Tensor, "is_cuda", gpu)
        loss = cross_entropy(head, hidden, y)[0]
        found.append([head(hidden), *torch.autograd.grad(loss, [hidden, *head.parameters()])])
        assert found[-1][0].stride() == ((5 * 128, 128, 1) if gpu else (5 * 70, 70, 1))
    for plain, padded in zip(*found):
        assert plain.shape == padded.shape and torch.allclose(plain, padded, atol=1e-6)


@contextlib.contextmanager
def compiled_graphs():
    """A function that says how many graphs were traced inside."""
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    yield lambda: stats["unique_graphs"] - before


def test_most_likely_token_is_that_of_float32():
    """In bfloat16 alone, equal logits hide it from one token in thirty or so."""
    head, hidden = torch.nn.Linear(64, 20_000), torch.randn(2, 250, 64)
    exact = head(hidden).argmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        assert (most_likely(head, hidden) == exact).float().mean() > 0.999
        assert (head(hidden).argmax(-1) == exact).float().mean() < 0.98


# ------------------------------------------------------------------------------ a step


@pytest.mark.parametrize("objective, rows", [("psd", [5, 5]), ("lsd", [5]), ("esd", [5])])
def test_each_network_sees_only_the_rows_it_must(objective, rows):
    """The student all eight at once; the target network the five jumps; the teacher the three of
    the diagonal and, for a derivative, the jumps."""
    nets = network(flow_map=True), network(flow_map=True), network()
    seen = [], [], []
    for net, sizes in zip(nets, seen):
        net.blocks[0].register_forward_hook(lambda block, inputs, out, sizes=sizes:
                                            sizes.append(len(inputs[0])))
    times = tokens_and_times(40, 8, 8, 3)
    flowmap.loss(*nets, Clock(40), objective, *times, generator(1), 3)[0].backward()
    assert seen == ([8], rows, [3] if objective == "psd" else [3, 5])


WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "unique_dim"}


class NoWaiting(TorchDispatchMode):
    """To ask a tensor for its values, or for a result whose size depends on them, is an error."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        masks = name == "index" and any(i is not None and i.dtype == torch.bool
                                        for i in arguments[1])
        if masks or name in WAITS:
            raise RuntimeError(f"{name} waits for the device")
        return function(*arguments, **(keywords or {}))


def two_steps(objective, machine):
    """A function that trains a network twice, by `objective` or, without one, as a flow."""
    device = machine.device
    net, teacher = network(flow_map=objective is not None).train().to(device), network().to(device)
    net.embed.weight.requires_grad_(objective is None)
    ema, clock, rng = copy.deepcopy(net), Clock(40, device=device), generator(1, device=device)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], fused=True)
    y, tau_s, tau_t = map(machine.put, tokens_and_times(40, 4, 8, 2))

    def steps():
        for _ in range(2):
            with machine.autocast():
                if objective is None:
                    loss = flow.loss(net, clock, y, tau_s, rng)[0]
                else:
                    loss = flowmap.loss(net, net, teacher, clock, objective, y, tau_s, tau_t, rng,
                                        2)[0]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 0.01)
    return steps


@pytest.mark.parametrize("objective", [None, *OBJECTIVES])
def test_no_step_waits_for_the_device(objective):
    steps, y = two_steps(objective, Machine("cpu", "float32")), torch.arange(4)
    with NoWaiting():
        for careless in (lambda: y.sum().item(), lambda: bool(y.any()), lambda: y[y > 0]):
            with pytest.raises(RuntimeError, match="waits for the device"):
                careless()
        steps()


@pytest.mark.parametrize("objective", [None, "psd"])
def test_no_array_over_the_vocabulary(objective, monkeypatch):
    """No operation of a step, backward included, makes one of B L V = 1,280 numbers or more. The
    slices are of four tokens; E and its gradients have 640 numbers."""
    monkeypatch.setattr(flow, "SLICE", 4 * 40)
    largest = 0

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            out = function(*arguments, **(keywords or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (40,):
                    largest = max(largest, tensor.numel())
            return out
    steps = two_steps(objective, Machine("cpu", "float32"))
    with Watching():
        steps()
    assert 4 * 40 <= largest <= 40 * 16


@pytest.mark.parametrize("L", [8, 300])
@pytest.mark.parametrize("flow_map", [False, True])
def test_the_network_compiles_into_one_graph(flow_map, L):
    net, times = network(L=L, flow_map=flow_map), [torch.rand(2)] * (1 + flow_map)
    explained = torch._dynamo.explain(net)(torch.randn(2, L, 16), *times)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


# ------------------------------------------------------------------------------ several GPUs


def test_a_ring_moves_so_many_numbers():
    """Two GPUs of two nodes, 1 GB of float32: by hand. In a ring of n each passes n - 1 parts of
    1/n on, twice: once to sum, once to share the sums."""
    parts = lambda n: sum(1 / n for _ in range(2) for _ in range(n - 1))
    assert seconds(0.25e9, 4, 2, 2, 10.0, 4.0) == pytest.approx(parts(2) / 10 + parts(2) / 4)
    assert seconds(0.25e9, 4, 8, 1, 10.0, 4.0) == pytest.approx(parts(8) / 10)
    row = estimate(10 ** 9, 10 ** 9, 10 ** 9, 3.0, 3.0, 2, 1)[0]         # backward: 1 s
    assert row["float32"]["all"] == pytest.approx(12 / 450)
    assert row["float32"]["left"] == pytest.approx(4 / 450)         # of the embedding alone
    slow = estimate(10 ** 9, 10 ** 9, 10 ** 9, 0.3, 0.03, 2, 1)[0]["float32"]   # backward: 0.01 s
    assert slow["left"] == pytest.approx(12 / 450 - 0.01) and slow["share"] == pytest.approx(
        slow["left"] / (slow["left"] + 0.3))


def test_estimate_from_end_to_end(monkeypatch, capsys):
    inside(monkeypatch, "eval/bench.py", "estimate", "--gpus=8", "--nodes=4", "--vocab_size=100",
           "--n_layer=1", "--n_head=2", "--n_embd=16")
    said = capsys.readouterr().out
    assert said.startswith("4 x 8 GPUs, each 4,096 tokens in 29 ms; 0.1 M gradients")
    assert said.count("NVLink") == said.count("PCIe") == 3

# ------------------------------------------------------------------------------ baselines


def test_dense_losses_are_ours(monkeypatch):
    """For the same noise, seen through E."""
    V, B, L, n = 40, 6, 8, 2
    student, teacher, clock = network(flow_map=True).double(), network().double(), Clock(V)
    teacher.embed.weight.data.copy_(student.embed.weight)
    x0, (y, tau_s, tau_t) = torch.randn(B, L, V).double(), tokens_and_times(V, B, L, n)
    z0 = x0 @ student.embed.weight.detach()
    for module in (flow, flowmap):
        monkeypatch.setattr(module, "latent_noise", lambda *args: z0)
    ours = flow.loss(teacher, clock, y, tau_s, None)[0]
    our_jumps = flowmap.loss(student, student, teacher, clock, "psd", y, tau_s, tau_t, None, n)[0]
    textbook = dense.flow_losses(teacher, clock, y, tau_s, x0).mean()
    their_jumps = dense.semigroup_loss(student, teacher, clock, y, tau_s, tau_t, x0, n)
    for net, a, b in ((teacher, ours, textbook), (student, our_jumps, their_jumps)):
        assert torch.allclose(a, b) and a > 0.1
        parameters = [net.head.weight, net.blocks[0].qkv.weight]
        for of_a, of_b in zip(*(torch.autograd.grad(loss, parameters) for loss in (a, b))):
            assert torch.allclose(of_a, of_b, atol=1e-9)


@pytest.mark.parametrize("name", ["whole", "checkpointed", "builtin"])
def test_other_heads_are_ours(name, monkeypatch):
    """Loss and gradients, over slices of three tokens."""
    monkeypatch.setattr(flow, "SLICE", 3 * 700)
    net, y = network(V=700).double(), torch.randint(700, (4, 8))
    hidden = torch.randn(4, 8, 16).double().requires_grad_()
    ours, other = cross_entropy(net.head, hidden, y)[0], getattr(heads, name)(net.head, hidden, y)
    assert torch.allclose(ours, other.double(), rtol=1e-6)          # builtin ends in float32
    inputs = [hidden, *net.head.parameters()]
    for a, b in zip(*(torch.autograd.grad(loss, inputs) for loss in (ours, other))):
        assert torch.allclose(a, b, atol=1e-8)


@pytest.mark.parametrize("learned_positions", [False, True])
def test_decoder_with_a_cache_is_the_network_under_a_causal_mask(learned_positions):
    net = network(learned_positions=learned_positions).requires_grad_(False)
    tokens, decoder = torch.randint(40, (3, 8)), ar.Decoder(net, 3, 8)
    x = net.embed(tokens)
    pieces = torch.cat([decoder(part) for part in x.split([3, 1, 4], dim=1)], dim=1)
    whole = net.head(net(x, torch.ones(3), attention="causal"))
    assert torch.allclose(pieces, whole, atol=1e-4)
    with pytest.raises(ValueError, match="9 tokens, but room for 8"):
        decoder(x[:, :1])


@torch.no_grad()
def test_autoregressive_loss_is_that_of_the_decoder():
    """Of every token given those before it alone: what follows does not change it."""
    net, y = network(), torch.randint(40, (3, 8))
    mean, losses = ar.loss(net, None, y, torch.rand(3), None)
    decoder = ar.Decoder(net, 3, 8)
    x = torch.cat([torch.zeros(3, 1, 16), net.embed(y)], dim=1)
    logits = torch.cat([decoder(x[:, i:i + 1]) for i in range(8)], dim=1)
    expected = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")
    assert torch.allclose(losses, expected, atol=1e-4)
    assert torch.allclose(mean, expected.mean(), atol=1e-4)
    y[:, 5:] = 0
    again = ar.loss(net, None, y, torch.rand(3), None)[1]
    assert torch.allclose(again[:, :5], losses[:, :5], atol=1e-5)


def test_decoder_draws_from_its_distribution():
    """The head sees its bias alone: tokens are independent draws from its softmax, at half the
    temperature from the square of that."""
    net = network(V=3)
    torch.nn.init.zeros_(net.head.weight)
    net.head.bias.data = torch.tensor([0.2, 0.3, 0.5]).log()
    for temperature, expected in ((1.0, [0.2, 0.3, 0.5]), (0.5, [4 / 38, 9 / 38, 25 / 38])):
        tokens = ar.sample(net, None, 2000, 8, 8, generator(0), temperature)
        assert tokens.shape == (2000, 8)
        shares = torch.bincount(tokens.flatten()) / 16_000
        assert torch.allclose(shares, torch.tensor(expected), atol=0.02)


# ------------------------------------------------------------------------------ bench.py

BENCH = "eval/bench.py"
SMALL = ["--vocab_size=50", "--n_layer=1", "--n_head=2", "--n_embd=16", "--n_time=8",
         "--block_size=8", "--batch_size=4", "--turns=1", "--steps=2", "--device=cpu",
         "--dtype=float32"]


@pytest.mark.parametrize("command, paths", [
    ("train", "other,floor"), ("distill", "dense,ours"), ("sample", "ours,ar")])
def test_bench_measures(command, paths, tmp_path, monkeypatch, capsys):
    """The other checkout has its bench.py at the top, which knows two settings."""
    (tmp_path / "bench.py").write_text(
        "worker = 2\nvocab_size = 1\nsettings = 3\nimport sys\n"
        "assert sys.argv[1:] == ['train', '--worker=ours', '--vocab_size=50'], sys.argv\n"
        "print('{\"seconds\": [1, 2], \"peak\": 1000000000, \"machine\": \"here\"}')")
    inside(monkeypatch, BENCH, command, *SMALL, f"--paths={paths}", f"--out_dir={tmp_path}",
           f"--other={tmp_path}")
    out = capsys.readouterr().out
    record, = map(json.loads, (tmp_path / f"{command}.jsonl").read_text().splitlines())
    assert list(record["paths"]) == paths.split(",")
    base = record["paths"][paths.split(",")[-1]]
    for path, row in record["paths"].items():
        assert any(line.startswith(path) for line in out.splitlines())
        assert row["seconds"] > 0 and row["peak_gib"] > 0.1
        assert row["time_ratio"] == row["seconds"] / base["seconds"]
    assert base["time_ratio"] == base["smallest"] == base["largest"] == 1


def test_bench_scaling_measures_one_point_after_another(tmp_path, monkeypatch):
    """What would be started, and what is kept of it."""
    started = []

    def start(words, **_):
        started.append(words[2:])
        answer = dict(seconds=[1, 3, 2], peak=2 ** 30, machine="here")
        return subprocess.CompletedProcess(words, 0, json.dumps(answer))
    monkeypatch.setattr(subprocess, "run", start)
    inside(monkeypatch, BENCH, "scaling", f"--out_dir={tmp_path}", *SMALL[1:7], "--turns=2")
    records = [json.loads(line) for line in (tmp_path / "scaling.jsonl").read_text().splitlines()]
    assert [words[0] for words in started] == (["train"] * 27 + ["sample"] * 7) * 2
    assert len(records) == 68
    assert not any(word.startswith("--command") for words in started for word in words)
    for words, record in zip(started, records):
        setting = {"V": "vocab_size", "steps": "sampling_steps"}.get(record["axis"], "batch_size")
        size = record["value"] // 8 if record["axis"] == "B L" else record["value"]
        assert f"--{setting}={size}" in words and f"--worker={record['path']}" in words
        assert (record["seconds"], record["peak_gib"]) == (2, 1)


def test_bench_figure(tmp_path, monkeypatch):
    settings = dict(n_layer=1, n_embd=16, block_size=8, vocab_size=50)
    point = dict(path="ours", seconds=1.0, peak_gib=1.0, settings=settings, where="here")
    records = [dict(axis=axis, value=value, **point)
               for axis in ("V", "B L", "steps") for value in (1, 10)]
    source = tmp_path / "scaling.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    inside(monkeypatch, BENCH, "plot", f"--out_dir={tmp_path}")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    settings["n_layer"] = 2
    source.write_text(source.read_text() + json.dumps(dict(axis="V", value=1, **point)) + "\n")
    complaint = mistake(monkeypatch, BENCH, "plot", f"--out_dir={tmp_path}")
    assert "measurements of different networks" in complaint


@pytest.mark.parametrize("words, complaint", [
    ("race", "bench.py race: choose train, distill, sample, head, scaling, plot"),
    ("", "choose train, distill, sample, head, scaling, plot"),
    ("train --paths=ours,ar", "paths=ar: choose ours, dense, floor, whole"),
    ("train --paths=other,ours", "paths=other: choose ours, dense, floor, whole"),
    ("train --paths=other --other=nowhere", "no nowhere/bench.py"),
    ("sample --paths=dense", "paths=dense: choose ours, ar"),
    ("head --paths=floor", "paths=floor: choose ours, checkpointed, builtin, whole"),
    ("train --n_embed=64", "did you mean 'n_embd'?"),
    ("train --turns=0", "turns=0: must lie in [1, inf)"),
    ("plot --out_dir=/nowhere", "no /nowhere/scaling.jsonl; run: python eval/bench.py scaling"),
])
def test_bench_mistakes(words, complaint, monkeypatch):
    assert complaint in mistake(monkeypatch, BENCH, *words.split())
