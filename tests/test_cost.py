"""python -m pytest tests/test_cost.py

Nothing is computed twice, waits for the device or breaks the compiled graph; bench.py from end to end, and the two ways
of baselines/ that it measures ours against.
"""

import collections
import copy
import json
import runpy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from programs import QUICK, ROOT, TINY, mistake, run, write_set
from torch.utils._python_dispatch import TorchDispatchMode

import common
import flow
import head as output_head
import training
from baselines import ar, dense, heads
from flow import Clock, cross_entropy, flow_loss, latent_noise, most_likely, noise_factor
from flowmap import OBJECTIVES, distillation_loss
from model import FlowTransformer, ModelConfig


def network(V=40, L=8, **changes):
    """No layer is zero, as the head and the modulations are at the start."""
    net = FlowTransformer(ModelConfig(V, L, 2, 2, 16, n_time=8, dropout=0.0, **changes)).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


def in_this_process(monkeypatch, *command):
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    monkeypatch.chdir(ROOT)
    runpy.run_path(command[0], run_name="__main__")


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A set of V = 41 characters, more than the 16 dimensions of the network."""
    folder = tmp_path_factory.mktemp("letters")
    random = torch.Generator().manual_seed(0)
    write_set(folder / "data", "".join(chr(48 + i) for i in torch.randint(41, (3000,), generator=random).tolist()))
    return folder, [f"--dataset={folder / 'data'}", f"--out_dir={folder / 'out'}", *QUICK, *TINY]


# ---------------------------------------------------------------- the Gram matrix

def test_gradient_of_the_gram_matrix():
    E = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 4, dtype=torch.float64)                            # not symmetric
    ours, plain = (torch.autograd.grad((G * weights).sum(), E)[0] for G in (flow.Gram.apply(E), E.T @ E))
    assert torch.allclose(ours, plain)


def test_gram_matrix_once_a_step_and_once_for_all(letters, monkeypatch):
    """Three steps of four micro-steps and two validations of two batches; then distillation, where E is frozen, and
    sampling."""
    products = collections.Counter()
    real = flow.Gram.forward

    def counting(ctx, E):
        products[program] += 1
        return real(ctx, E)
    monkeypatch.setattr(flow.Gram, "forward", staticmethod(counting))
    folder, words = letters
    steps = ["--gradient_accumulation_steps=4", "--max_iters=3"]
    distill = [word for word in words if word.split("=")[0][2:] not in ("n_layer", "n_head", "n_embd", "n_time")]
    for program, command in [("train.py", words + steps), ("distill.py", distill + steps),
                             ("sample.py", [f"--out_dir={folder / 'out'}", "--steps=1,4", "--num_samples=20"])]:
        in_this_process(monkeypatch, program, *command)
    assert products == {"train.py": 3 + 2, "distill.py": 1, "sample.py": 1}


def test_gradient_of_a_training_step(letters, tmp_path, monkeypatch):
    """That of train.py after two steps of three micro-steps, E's included, is what plain autograd finds through a Gram
    matrix made anew in every micro-step."""
    normals, batches, models = [], [], []
    real_noise, real_loss, real_step = flow.latent_noise, flow.flow_loss, training.optimizer_step

    def noise(E, factor, normal):
        return real_noise(E, factor, lambda n: normals.append(normal(n)) or normals[-1])

    def loss(model, clock, y, tau, z0):
        if torch.is_grad_enabled():
            batches.append((y, tau, normals[-1]))
        return real_loss(model, clock, y, tau, z0)

    def step(model, *rest):
        models.append(copy.deepcopy(model))
        for copied, p in zip(models[-1].parameters(), model.parameters()):
            copied.grad = p.grad.clone()
        return real_step(model, *rest)
    for module, name, replacement in ((flow, "latent_noise", noise), (flow, "flow_loss", loss),
                                      (training, "optimizer_step", step)):
        monkeypatch.setattr(module, name, replacement)
    in_this_process(monkeypatch, "train.py", *letters[1], f"--out_dir={tmp_path}", "--max_iters=3",
                    "--gradient_accumulation_steps=3", "--learning_rate=0.05", "--warmup_iters=0")
    ours = models[2]
    plain, clock = copy.deepcopy(ours).double(), Clock(ours.config.vocab_size)
    plain.zero_grad()
    for y, tau, xi in batches[6:9]:
        E = plain.embed.weight
        G = E.T @ E
        C = torch.linalg.cholesky(G + 1e-6 * G.detach().diagonal().mean() * torch.eye(16, dtype=E.dtype))
        t = clock.t_of_tau(tau)[:, None, None]
        logits = plain.head(plain((1 - t) * (xi.double() @ C.T) + t * E[y], tau.double()))
        (F.cross_entropy(logits.flatten(0, 1), y.flatten()) / 3).backward()
    for p, expected in zip(ours.parameters(), plain.parameters()):
        assert torch.allclose(p.grad.double(), expected.grad, rtol=1e-3, atol=1e-3 * expected.grad.abs().max())
    assert ours.embed.weight.grad.norm() > 0


# ---------------------------------------------------------------- the head

def test_loss_can_be_differentiated_once():
    """A second time would be wrong, the gradient having been scaled in place: it is refused."""
    head, hidden = torch.nn.Linear(4, 7), torch.randn(1, 5, 4, requires_grad=True)
    y = torch.randint(7, (1, 5))
    total, _ = cross_entropy(head, hidden, y)
    assert not torch.autograd.grad(total, hidden, create_graph=True)[0].requires_grad
    total, _ = cross_entropy(head, hidden, y)
    (2 * total).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        (2 * total).backward()


def test_most_likely_token_is_that_of_float32():
    """In bfloat16 alone, equal logits hide it from one token in thirty or so."""
    head, hidden = torch.nn.Linear(64, 20_000), torch.randn(4, 500, 64)
    exact = head(hidden).argmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        assert (most_likely(head, hidden) == exact).float().mean() > 0.999
        assert (head(hidden).argmax(-1) == exact).float().mean() < 0.98


# ---------------------------------------------------------------- what a step evaluates

@pytest.mark.parametrize("objective, target_rows", [("psd", [5, 5]), ("lsd", [5]), ("esd", [5])])
def test_each_network_sees_only_the_rows_it_must(objective, target_rows):
    """The student all eight at once; the targets' network the five jumps; the teacher the three of the diagonal and, for
    a derivative, the jumps."""
    student, target, teacher = network(flow_map=True), network(flow_map=True), network()
    rows = {name: [] for name in ("student", "target", "teacher")}
    for name, net in zip(rows, (student, target, teacher)):
        net.blocks[0].register_forward_hook(lambda block, inputs, out, name=name: rows[name].append(len(inputs[0])))
    tau_s, tau_t = torch.rand(2, 8).sort(0).values
    tau_t[:3] = tau_s[:3]
    distillation_loss(student, target, teacher, Clock(40), objective, torch.randint(40, (8, 8)), tau_s, tau_t,
                      torch.randn(8, 8, 16), 3)[0].backward()
    assert rows == dict(student=[8], target=target_rows, teacher=[3] if objective == "psd" else [3, 5])


class NoWaiting(TorchDispatchMode):
    """To ask a tensor for its values, or for a result whose size depends on them, is an error."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in arguments[1])
        if by_mask or name in ("_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "unique_dim"):
            raise RuntimeError(f"{name} waits for the device")
        return function(*arguments, **(keywords or {}))


def two_steps(objective, machine):
    """A function that trains a network twice, by `objective` or, without one, as a flow."""
    device = machine.device
    net, teacher = network(flow_map=objective is not None).train().to(device), network().to(device)
    ema, E, clock = copy.deepcopy(net), net.embed.weight.requires_grad_(objective is None), Clock(40, device=device)
    optimizers = training.make_optimizers(net, "adamw", 1e-3, (0.9, 0.99), 0.1, machine.dtype)
    watch, y, times = training.LossWatch(machine, "tau"), torch.randint(40, (4, 8)), torch.rand(2, 4)
    y, times = machine.put(y), machine.put(times)

    def steps():
        for step in range(2):
            z0 = latent_noise(E, noise_factor(E, 32), common.sample_normals(1, range(4), 8, device))
            with machine.autocast():
                if objective is None:
                    loss, losses = flow_loss(net, clock, y, times[0], z0)
                else:
                    loss, losses, _ = distillation_loss(net, net, teacher, clock, objective, y, *times, z0, 2)
            loss.backward()
            watch.see(step, losses.mean(1), times[0])
            training.optimizer_step(net, optimizers, machine, 1.0)
            training.update_ema(ema, net, 0.99, step)
    return steps


@pytest.mark.parametrize("objective", [None, *OBJECTIVES])
def test_no_step_waits_for_the_device(objective):
    steps, y = two_steps(objective, common.Machine("cpu", "float32")), torch.arange(4)
    with NoWaiting():
        for careless in (lambda: y.sum().item(), lambda: bool(y.any()), lambda: y[y > 0]):
            with pytest.raises(RuntimeError, match="waits for the device"):
                careless()
        steps()


@pytest.mark.parametrize("L", [8, 300])
@pytest.mark.parametrize("flow_map", [False, True])
def test_the_network_compiles_into_one_graph(flow_map, L):
    net, times = network(L=L, flow_map=flow_map), [torch.rand(2)] * (1 + flow_map)
    explained = torch._dynamo.explain(net)(torch.randn(2, L, 16), *times)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


# ---------------------------------------------------------------- baselines

def test_dense_losses_are_ours():
    """For the same noise, seen through E."""
    V, B, L, n = 40, 6, 8, 2
    student, teacher, clock = network(flow_map=True).double(), network().double(), Clock(V)
    teacher.embed.weight.data.copy_(student.embed.weight)
    y, x0, (tau_s, tau_t) = torch.randint(V, (B, L)), torch.randn(B, L, V).double(), torch.rand(2, B).sort(0).values
    tau_t[:n] = tau_s[:n]
    z0 = x0 @ student.embed.weight.detach()
    jumps = (y, tau_s, tau_t)
    for net, ours, textbook in [
            (teacher, flow_loss(teacher, clock, y, tau_s, z0)[0], dense.flow_losses(teacher, clock, y, tau_s, x0).mean()),
            (student, distillation_loss(student, student, teacher, clock, "psd", *jumps, z0, n)[0],
             dense.semigroup_loss(student, teacher, clock, *jumps, x0, n))]:
        assert torch.allclose(ours, textbook) and ours > 0.1
        parameters = [net.head.weight, net.blocks[0].qkv.weight]
        for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(textbook, parameters)):
            assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("name", ["whole", "checkpointed", "builtin"])
def test_other_heads_are_ours(name, monkeypatch):
    """Loss and gradients, over slices of three tokens."""
    monkeypatch.setattr(output_head, "SLICE", 3 * 700)
    net, hidden, y = network(V=700).double(), torch.randn(4, 8, 16).double(), torch.randint(700, (4, 8))
    hidden.requires_grad_()
    inputs = [hidden, *net.head.parameters()]
    total, _ = cross_entropy(net.head, hidden, y)
    other = getattr(heads, name)(net.head, hidden, y)
    assert torch.allclose(total / 32, other.double(), rtol=1e-6)  # the builtin one ends in float32
    for a, b in zip(torch.autograd.grad(total / 32, inputs), torch.autograd.grad(other, inputs)):
        assert torch.allclose(a, b, atol=1e-8)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_online_average_is_ours(softcap, monkeypatch):
    """Over slices of seven of the forty tokens, the largest logit now in this one, now in that."""
    net, hidden = network(logit_softcap=softcap).double(), 5 * torch.randn(4, 8, 16).double()
    expected = flow.expected_embedding(net.head, hidden, net.embed.weight)
    monkeypatch.setattr(heads, "SLICE", 7 * 32)
    assert torch.allclose(heads.online(net.head, hidden, net.embed.weight), expected, atol=1e-12)


@pytest.mark.parametrize("learned_positions", [False, True])
def test_decoder_with_a_cache_is_the_network_under_a_causal_mask(learned_positions):
    net, tokens = network(learned_positions=learned_positions).requires_grad_(False), torch.randint(40, (3, 8))
    decoder = ar.Decoder(net, 3, 8)
    x = net.embed(tokens)
    pieces = torch.cat([decoder(part) for part in x.split([3, 1, 4], dim=1)], dim=1)
    whole = net.head(net(x, torch.ones(3), attention="causal"))
    assert torch.allclose(pieces, whole, atol=1e-4)
    with pytest.raises(ValueError, match="9 tokens, but room for 8"):
        decoder(x[:, :1])


@torch.no_grad()
def test_autoregressive_loss_is_that_of_the_decoder():
    """Of every token given those before it, and nothing else: the loss of a prefix does not change with what follows."""
    net, y = network(), torch.randint(40, (3, 8))
    mean, losses = ar.loss(net, None, y, torch.rand(3), None)
    decoder = ar.Decoder(net, 3, 8)
    x = torch.cat([torch.zeros(3, 1, 16), net.embed(y)], dim=1)
    expected = torch.stack([F.cross_entropy(decoder(x[:, i:i + 1])[:, 0], y[:, i], reduction="none") for i in range(8)], 1)
    assert torch.allclose(losses, expected, atol=1e-4) and torch.allclose(mean, expected.mean(), atol=1e-4)
    y[:, 5:] = 0
    assert torch.allclose(ar.loss(net, None, y, torch.rand(3), None)[1][:, :5], losses[:, :5], atol=1e-5)


def test_decoder_draws_from_its_distribution():
    """The head sees nothing but its bias: the tokens are independent draws from its softmax, at half the temperature
    from the square of that."""
    net = network(V=3)
    torch.nn.init.zeros_(net.head.weight)
    net.head.bias.data = torch.tensor([0.2, 0.3, 0.5]).log()
    for temperature, expected in ((1.0, [0.2, 0.3, 0.5]), (0.5, [4 / 38, 9 / 38, 25 / 38])):
        tokens = ar.sample(net, None, 2000, 8, 8, torch.Generator().manual_seed(0), temperature)
        assert tokens.shape == (2000, 8)
        assert torch.allclose(torch.bincount(tokens.flatten()) / 16_000, torch.tensor(expected), atol=0.02)


# ---------------------------------------------------------------- bench.py

SMALL = ["--vocab_size=50", "--n_layer=1", "--n_head=2", "--n_embd=16", "--n_time=8", "--block_size=8",
         "--batch_size=4", "--turns=1", "--steps=2", "--device=cpu", "--dtype=float32"]


@pytest.mark.parametrize("command, paths", [("train", "ours,dense,floor,whole"), ("distill", "ours,dense,floor"),
                                            ("sample", "ours,ar"), ("head", "ours,checkpointed,builtin,whole"),
                                            ("average", "ours,online")])
def test_bench_measures(command, paths, tmp_path):
    out = run("bench.py", command, *SMALL, f"--paths={paths}", f"--out_dir={tmp_path}")
    record, = (json.loads(line) for line in (tmp_path / f"{command}.jsonl").read_text().splitlines())
    assert list(record["paths"]) == paths.split(",")
    base = record["paths"][paths.split(",")[-1]]
    for path, row in record["paths"].items():
        assert any(line.startswith(path) for line in out.splitlines())
        assert row["seconds"] > 0 and row["peak_gib"] > 0.1
        assert row["time_ratio"] == row["seconds"] / base["seconds"]
    assert base["time_ratio"] == base["smallest"] == base["largest"] == 1


def test_bench_scaling_measures_one_point_after_another(tmp_path, monkeypatch):
    """What would be started, by commands of their own, and what is kept of it."""
    started = []

    def start(words, **_):
        started.append(words[2:])
        return subprocess.CompletedProcess(words, 0, json.dumps(dict(seconds=[1, 3, 2], peak=2 ** 30, machine="here")))
    monkeypatch.setattr(subprocess, "run", start)
    in_this_process(monkeypatch, "bench.py", "scaling", f"--out_dir={tmp_path}", *SMALL[1:7], "--turns=2")
    records = [json.loads(line) for line in (tmp_path / "scaling.jsonl").read_text().splitlines()]
    assert [words[0] for words in started] == (["train"] * 27 + ["sample"] * 7) * 2 and len(records) == 68
    assert not any(word.startswith("--command") for words in started for word in words)
    for words, record in zip(started, records):
        setting = {"V": "vocab_size", "steps": "sampling_steps"}.get(record["axis"], "batch_size")
        size = record["value"] // 8 if record["axis"] == "B L" else record["value"]
        assert f"--{setting}={size}" in words and f"--worker={record['path']}" in words
        assert (record["seconds"], record["peak_gib"]) == (2, 1)


def test_bench_figure(tmp_path, monkeypatch):
    settings = dict(n_layer=1, n_embd=16, block_size=8, vocab_size=50)
    (tmp_path / "scaling.jsonl").write_text("".join(
        json.dumps(dict(axis=axis, value=value, path="ours", seconds=1.0, peak_gib=1.0, settings=settings, where="here"))
        + "\n" for axis in ("V", "B L", "steps") for value in (1, 10)))
    run("bench.py", "plot", f"--out_dir={tmp_path}")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "scaling.jsonl").open("a") as file:
        file.write(json.dumps(dict(axis="V", value=1, path="ours", settings=dict(settings, n_layer=2), where="here")) + "\n")
    assert "measurements of different networks" in mistake(monkeypatch, "bench.py", "plot", f"--out_dir={tmp_path}")


def test_bench_estimate():
    """The operations of the floor are six for every weight of a matrix product and token, and those of attention."""
    out = run("bench.py", "--estimate", "--block_size=1024")
    assert out.startswith("ESTIMATE, not a measurement")
    floor = next(line for line in out.splitlines() if line.startswith("floor")).split()
    weights = 12 * 12 * 768 ** 2 + 768 * 50257
    attention = 12 * 2 * 2 * 1024 * 768                                          # two products of L d, twice L d each
    assert float(floor[1]) == pytest.approx((6 * weights + 3 * attention) / 1e6, rel=1e-3)


@pytest.mark.parametrize("words, complaint", [
    (["race"], "bench.py race: choose train, distill, sample, head, average, scaling, plot or --estimate"),
    ([], "choose train, distill, sample, head, average, scaling, plot or --estimate"),
    (["train", "--paths=ours,ar"], "paths=ar: choose ours, dense, floor, whole"),
    (["sample", "--paths=dense"], "paths=dense: choose ours, ar"),
    (["head", "--paths=floor"], "paths=floor: choose ours, checkpointed, builtin, whole"),
    (["train", "--n_embed=64"], "did you mean 'n_embd'?"),
    (["train", "--turns=0"], "turns=0: must lie in [1, inf)"),
    (["plot", "--out_dir=/nowhere"], "no /nowhere/scaling.jsonl; run: python bench.py scaling"),
])
def test_bench_mistakes(words, complaint, monkeypatch):
    assert complaint in mistake(monkeypatch, "bench.py", *words)
