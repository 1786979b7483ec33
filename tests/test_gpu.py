"""python -m pytest tests/test_gpu.py

On an NVIDIA GPU everything is as on a CPU: losses and gradients, tokens, programs, resuming. A step
neither waits for the device nor holds an array (B, L, V). Skipped where there is none.
"""

import copy

import pytest
import torch
from programs import QUICK, TINY, log, quick_run, same, write_toy
from test_cost import network, two_steps

import flow
import flowmap
from flow import Clock, draw_from, noise_factor
from flowmap import OBJECTIVES
from lib.checkpoint import build_model, load_checkpoint
from lib.machine import Machine, generator
from model import attend

MODERN = (torch.cuda.is_available() and torch.version.cuda
          and torch.cuda.is_bf16_supported(including_emulation=False))
pytestmark = pytest.mark.skipif(not MODERN, reason="needs an NVIDIA GPU with bfloat16")
ON_GPU = [word for word in QUICK if not word.startswith(("--device", "--dtype"))]


def on(device, *things):
    """Copies there."""
    return [copy.deepcopy(thing).to(device) for thing in things]


def gradients_on(device, objective, L, monkeypatch):
    """The loss and all gradients of one batch there, in float32, from the same noise everywhere."""
    torch.manual_seed(3)
    net, teacher = network(V=97, L=L, flow_map=objective is not None), network(V=97, L=L)
    y, normal = torch.randint(97, (6, L)), torch.randn(6, L, 16)
    tau_s, tau_t = torch.rand(2, 6).sort(0).values
    tau_t[:2] = tau_s[:2]
    net, teacher, y, normal, tau_s, tau_t = on(device, net, teacher, y, normal, tau_s, tau_t)
    net.embed.weight.requires_grad_(objective is None)
    clock = Clock(97, device=device)
    for module in (flow, flowmap):  # a GPU's generator draws other numbers than a CPU's
        monkeypatch.setattr(module, "latent_noise", lambda E, shape, rng, factor=None:
                            normal @ noise_factor(E).T)
    if objective is None:
        loss, _ = flow.loss(net, clock, y, tau_s, None)
    else:
        loss, _, _ = flowmap.loss(net, net, teacher, clock, objective, y, tau_s, tau_t, None, 2)
    loss.backward()
    return loss.item(), {name: p.grad.cpu() for name, p in net.named_parameters()
                         if p.grad is not None}


@pytest.mark.parametrize("objective, L", [(None, 8), (None, 300),
                                          *((name, 8) for name in OBJECTIVES)])
def test_losses_and_gradients_are_those_of_a_cpu(objective, L, monkeypatch):
    (loss, found), (expected_loss, expected) = (gradients_on(device, objective, L, monkeypatch)
                                                for device in ("cuda", "cpu"))
    assert abs(loss - expected_loss) < 1e-4 * abs(expected_loss)
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).norm() < 1e-3 * expected[name].norm() + 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_soft_cap_is_the_plain_one(dtype):
    """flex_attention, which the published recipes use on a GPU, and its gradients."""
    q, k, v, weight = (torch.randn(2, 3, 320, 32, device="cuda", dtype=dtype) for _ in range(4))
    results = {}
    for path, kind in (("flex", dtype), ("math", torch.float32)):
        inputs = [(3 * x).to(kind).requires_grad_() for x in (q, k, v)]
        out = attend(*inputs, softcap=5.0, path=path)
        results[path] = [out, *torch.autograd.grad((out * weight).sum(), inputs)]
    for found, expected in zip(results["flex"], results["math"]):
        error = (found.float() - expected).norm() / expected.norm()
        assert error < (1e-4 if dtype == torch.float32 else 2e-2)


def test_tokens_are_those_of_a_cpu():
    torch.manual_seed(5)
    for flow_map, sample in ((False, flow.sample), (True, flowmap.sample)):
        net = network(V=97, flow_map=flow_map)
        z0 = torch.randn(64, 8, 16)
        found, expected = (
            sample(*on(device, net), Clock(97, device=device), z0.to(device), 8).cpu()
            for device in ("cuda", "cpu"))
        assert (found == expected).float().mean() > 0.99
    p = torch.tensor([0.0, 0.25, 0.75], device="cuda").expand(40_000, 3)
    drawn = draw_from(p, generator(1, device="cuda")).flatten()
    shares = drawn.bincount(minlength=3).cpu() / 40_000
    assert (shares - torch.tensor([0.0, 0.25, 0.75])).abs().max() < 0.01


@pytest.mark.parametrize("objective", [None, *OBJECTIVES])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_step_waits_for_the_gpu(objective, dtype):
    machine = Machine("cuda", dtype)
    steps = two_steps(objective, machine)
    steps()                                                                     # libraries load
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones(1, device="cuda").item()
        steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("objective", [None, "psd"])
def test_no_array_over_the_vocabulary(objective):
    """65,536 tokens at V = 50,257 would be 13 GB of logits; a step takes less than a third."""
    V, B, L = 50_257, 512, 128
    net, teacher = network(V, L, flow_map=objective is not None).cuda(), network(V, L).cuda()
    net.embed.weight.requires_grad_(objective is None)
    clock = Clock(V, device="cuda")
    y = torch.randint(V, (B, L), device="cuda")
    times = torch.rand(2, B, device="cuda").sort(0).values
    rng = generator(1, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        if objective is None:
            loss = flow.loss(net, clock, y, times[0], rng)[0]
        else:
            times[1, :B // 2] = times[0, :B // 2]
            loss = flowmap.loss(net, net, teacher, clock, objective, y, *times, rng, B // 2)[0]
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < B * L * V * 4 / 3


def test_programs(tmp_path):
    """The README's commands on a GPU: flow, flow map by every objective, baselines, texts."""
    write_toy(tmp_path / "data")
    places = [f"--dataset={tmp_path / 'data'}", f"--out_dir={tmp_path}"]
    for method in ("flm", "ar", "mdlm", "duo", "dense", "mse", "noclock"):
        assert "NVIDIA" in quick_run("train.py", *places, *ON_GPU, *TINY, f"--method={method}")
    for objective in OBJECTIVES:
        quick_run("distill.py", *places, *ON_GPU, "--batch_size=8", f"--objective={objective}")
    for method, teacher in (("sdtt", "mdlm"), ("dcd", "duo")):
        quick_run("baselines/distill.py", *places, f"--method={method}", "--max_iters=5",
                  f"--teacher_path={tmp_path / teacher}.pt", "--batch_size=8")
    said = quick_run("sample.py", f"--out_dir={tmp_path}", "--steps=1,2", "--flow_steps=4")
    assert said.count("FLM        4") == 1 + 4                  # in the table, and each text
    names = ("flm", "fmlm", "ar", "mdlm", "duo", "noclock", "sdtt", "dcd")
    models = ",".join(str(tmp_path / f"{name}.pt") for name in names)
    said = quick_run("eval/evaluate.py", f"--dataset={tmp_path / 'data'}", f"--source={models}",
                     f"--scorer={tmp_path / 'ar.pt'}", "--num_samples=12", "--steps=2", "--bound")
    assert said.count("likelihood (") == 4


def test_other_arithmetic(tmp_path):
    """float16 with its scaled gradients, float32, Muon: all learn."""
    write_toy(tmp_path / "data")
    for words in (["--dtype=float16"], ["--dtype=float32"], ["--optimizer=muon"]):
        quick_run("train.py", f"--dataset={tmp_path / 'data'}", f"--out_dir={tmp_path}", *TINY,
                  *words, "--max_iters=100", "--warmup_iters=5", "--log_interval=20",
                  "--eval_iters=2")
        losses = [record["val_loss"] for record in log(tmp_path / "flm.jsonl")
                  if "val_loss" in record]
        assert losses[-1] < 0.9 * losses[0], words


@pytest.mark.parametrize("script", ["train.py", "distill.py"])
def test_compiled_is_eager(script, tmp_path):
    """torch.compile changes the speed of both programs, not their losses."""
    write_toy(tmp_path / "data")
    train = ["train.py", f"--dataset={tmp_path / 'data'}", f"--out_dir={tmp_path}", *ON_GPU, *TINY,
             "--dtype=float32"]
    # to a flow that a map can miss
    quick_run(*train, "--max_iters=200", "--learning_rate=1e-2", "--eval_interval=200")
    distill = ["distill.py", *train[1:3], *ON_GPU, "--batch_size=8", "--dtype=float32"]
    command, losses = train if script == "train.py" else distill, []
    path = tmp_path / ("flm.jsonl" if script == "train.py" else "fmlm.jsonl")
    for words in ([], ["--compile=true"]):
        quick_run(*command, *words)
        losses.append([record["loss"] for record in log(path) if "loss" in record])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3, abs=1e-5)
    assert max(losses[0]) > 0.01


@pytest.mark.parametrize("script, kind", [("train.py", "flm"), ("distill.py", "fmlm")])
def test_resumes_exactly(script, kind, tmp_path):
    write_toy(tmp_path / "data")
    results = []
    quick_run("train.py", f"--dataset={tmp_path / 'data'}", f"--out_dir={tmp_path}", *ON_GPU, *TINY)
    teacher = (tmp_path / "flm.pt").read_bytes()
    shape = TINY if script == "train.py" else ["--batch_size=8"]
    parts = [["--max_iters=3"], ["--max_iters=6", "--init_from=resume"]]
    for folder, runs in (("whole", [["--max_iters=6"]]), ("parts", parts)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "flm.pt").write_bytes(teacher) if kind == "fmlm" else None
        for words in runs:
            quick_run(script, f"--dataset={tmp_path / 'data'}", f"--out_dir={tmp_path / folder}",
                      *ON_GPU, *shape, "--schedule=constant", "--dropout=0.1", *words)
        results.append(torch.load(tmp_path / folder / f"{kind}.pt"))
    for key in ("model", "ema", "optimizers", "step"):
        assert same(results[0][key], results[1][key]), key
    checkpoint = load_checkpoint(tmp_path / "parts" / f"{kind}.pt", kind)
    assert build_model(checkpoint, torch.device("cuda"))
