"""python -m pytest tests/test_scripts.py

The programs as a user runs them, on a toy set: from data to one-step text, and their settings.
"""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from programs import TINY, inside, log, mistake, quick_run, run, same, start

from data.loader import identity
from lib.optim import Muon, orthogonalized
from lib.settings import configure

# ------------------------------------------------------------------------------ the way through

def test_training_says_what_a_person_wants_to_know(toy):
    _, _, train, distill = toy
    for output in (train, distill):
        assert "threads, float32" in output and "6 steps" in output and "epochs" in output
        assert "step 6/6 | loss" in output and "tok/s" in output and "left" in output
    assert "M parameters, V = 16, L = 8" in train
    assert "6 steps of 64 tokens" in train and "by tau 0..1:" in train
    assert "by length 0..1:" in distill and "diagonal" in distill


def test_checkpoints_hold_everything(toy):
    for kind in ("flm", "fmlm"):
        checkpoint = torch.load(toy[0] / "out" / f"{kind}.pt", weights_only=True)
        assert checkpoint["kind"] == kind and checkpoint["step"] == 6
        assert checkpoint["settings"]["seed"] == 1
        assert {"model", "ema", "optimizers", "settings", "model_config"} <= checkpoint.keys()
        assert checkpoint["vocabulary"] == identity(checkpoint["tokenizer"])
    assert not list((toy[0] / "out").glob("*.tmp"))


def test_logs_have_validation_by_time(toy):
    flow, flow_map = (log(toy[0] / "out" / f"{kind}.jsonl") for kind in ("flm", "fmlm"))
    assert [r["step"] for r in flow if "val_loss" in r] == [0, 3, 6]
    assert [r["step"] for r in flow if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert flow[0]["val_loss"] == pytest.approx(np.log(16), abs=1e-3)  # a uniform guess
    assert all(len(r["val_loss_by_tau"]) == 10 for r in flow if "val_loss" in r)
    assert all(len(r["val_loss_by_length"]) == 10 for r in flow_map if "val_loss" in r)


def sampled(monkeypatch, path, *options):
    """The texts that sample.py writes to `path`, run in this process."""
    inside(monkeypatch, "sample.py", f"--out={path}", "--device=cpu", *options)
    return [record["text"] for record in log(path)]


def test_sampling(toy, tmp_path, monkeypatch, capsys):
    options = tmp_path / "texts.jsonl", f"--out_dir={toy[0] / 'out'}", "--dtype=float32"
    texts = sampled(monkeypatch, *options, "--num_samples=3", "--steps", "1")
    assert "\nFMLM       1 " in capsys.readouterr().out
    assert len(texts) == 3 and all(len(text) == 8 for text in texts)
    assert sampled(monkeypatch, *options, "--num_samples=3", "--steps=2,1")[3:] == texts
    assert sampled(monkeypatch, *options, "--num_samples=3", "--seed=2") != texts
    sampled(monkeypatch, *options, "--steps=3", "--gamma=1")
    flow = *options, "--num_samples=9", "--steps=4", "--model=flm"
    texts = sampled(monkeypatch, *flow)
    assert "\nFLM        4 " in capsys.readouterr().out
    for other in ("--gamma=0.9", "--temperature=0.001"):
        once, again = (sampled(monkeypatch, *flow, other) for _ in range(2))
        assert once == again != texts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text_does_not_depend_on_how_many_are_asked_for(toy, dtype, tmp_path, monkeypatch):
    """Nor when all noise is drawn anew after every step."""
    for gamma in (0, 1):
        options = (tmp_path / "texts.jsonl", f"--out_dir={toy[0] / 'out'}", f"--dtype={dtype}",
                   "--steps=3", f"--gamma={gamma}")
        many = sampled(monkeypatch, *options, "--num_samples=17")
        for n in (1, 7, 9):
            assert sampled(monkeypatch, *options, f"--num_samples={n}") == many[:n]
        assert len(set(many)) > 8  # groups differ


def test_sampling_needs_no_data_folder_and_falls_back_to_the_flow(toy, tmp_path):
    (tmp_path / "flm.pt").write_bytes((toy[0] / "out" / "flm.pt").read_bytes())
    done = subprocess.run([sys.executable, ROOT / "sample.py", f"--out_dir={tmp_path}"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "no flow map" in done.stderr
    assert "\nFLM        1 " in done.stdout


def test_texts_are_written_even_if_nobody_reads_the_screen(toy, tmp_path):
    """As with "| head -1", which closes the pipe."""
    path = tmp_path / "texts.jsonl"
    process = start("sample.py", f"--out_dir={toy[0] / 'out'}", "--num_samples=5", f"--out={path}",
                    launcher=(sys.executable, "-u"))
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=120) == 0
    assert [record["sample"] for record in log(path)] == [1, 2, 3, 4, 5]


def test_plot(toy, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib")
    for name in ("flm.jsonl", "fmlm.jsonl"):
        (tmp_path / name).write_bytes((toy[0] / "out" / name).read_bytes())
    inside(monkeypatch, "eval/plot.py", f"--out_dir={tmp_path}")
    assert f"wrote {tmp_path / 'loss.png'}" in capsys.readouterr().out
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_loss_curves_without_matplotlib(tmp_path, monkeypatch, capsys):
    """Bars in eighths of the largest loss; a gap where a validation had no such time."""
    losses = [[8.0] * 10, [4.0] * 9 + [0.5], [2.0] * 8 + [None, 0.0]]
    (tmp_path / "flm.jsonl").write_text("".join(
        json.dumps(dict(step=step, val_loss_by_tau=bins)) + "\n"
        for step, bins in zip((0, 10, 20), losses)))
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    with pytest.raises(SystemExit) as stopped:
        inside(monkeypatch, "eval/plot.py", f"--out_dir={tmp_path}")
    assert stopped.value.code is None and not (tmp_path / "loss.png").exists()
    title, first, *_, last_but_one, last = capsys.readouterr().out.splitlines()
    assert title == "Flow: cross-entropy, nats per token of held-out text, steps 0 to 20"
    assert first == "tau 0.0 to 0.1  █▅▃  8.00 -> 2.00"
    assert last_but_one == "tau 0.8 to 0.9  █▅   8.00 -> 4.00"
    assert last == "tau 0.9 to 1.0  █▁▁  8.00 -> 0.00"

# ------------------------------------------------------------------------------ distillation

def distilled(toy, tmp_path, *options):
    """What distill.py prints, writing to tmp_path from the toy flow."""
    return quick_run("distill.py", *toy[1], "--batch_size=8", f"--out_dir={tmp_path}",
                     f"--teacher_path={toy[0] / 'out' / 'flm.pt'}", *options)


@pytest.mark.parametrize("options", [
    ["--objective=lsd"], ["--objective=esd"], ["--self_distill=true"],
    ["--target_ema=1", "--split=0.2"], ["--optimizer=muon", "--schedule=constant"]])
def test_every_objective_runs(toy, options, tmp_path):
    output = distilled(toy, tmp_path, *options)
    assert ("off simplex" in output) == (options[0] in ("--objective=lsd", "--objective=esd"))


def test_a_teacher_at_another_temperature(toy, tmp_path):
    """At first the student's diagonal is the FLM: it diverges only from the FLM at another
    temperature. A low one, since after six steps guesses are too even for a higher one to change.
    """
    for temperature in (1, 0.02):
        distilled(toy, tmp_path, f"--teacher_temperature={temperature}")
    same, other = (log(tmp_path / name)[0]["val_diagonal"]
                   for name in ("fmlm.old1.jsonl", "fmlm.jsonl"))
    assert abs(same) < 1e-6 < 1e-4 < other


def test_full_jumps_are_ramped_up(toy, tmp_path, monkeypatch):
    """Of 16 jumps none is full at the beginning of the run, half in the middle, all at the end;
    without the ramp all are."""
    for ramp, expected in ((True, [0, 8, 16]), (False, [16, 16, 16])):
        batch = inside(monkeypatch, "distill.py", *toy[1], f"--out_dir={tmp_path / str(ramp)}",
                       "--batch_size=32", f"--teacher_path={toy[0] / 'out' / 'flm.pt'}",
                       "--full_jump_share=1", f"--full_jump_ramp={ramp}")["batch"]
        times = [batch(step)[2:] for step in (0, 3, 6)]             # of 6 steps
        assert [int(((s == 0) & (t == 1)).sum()) for s, t in times] == expected

# ------------------------------------------------------------------------------ optimizers

def test_muon_takes_the_matrices_between_embedding_and_head(toy, tmp_path, monkeypatch):
    """The times' too. AdamW takes all else that learns."""
    blocks = ["qkv", "attn_out", "mlp_in", "mlp_out", "modulation"]
    expected = {f"{module}.weight" for module in (
        "time_s.fc1", "time_s.fc2", "modulation_out", *(f"blocks.0.{name}" for name in blocks))}
    flow = f"--teacher_path={toy[0] / 'out' / 'flm.pt'}"
    for script, name, options in (("train.py", "model", TINY),
                                  ("distill.py", "student", ["--batch_size=8", flow])):
        run = inside(monkeypatch, script, *toy[1], *options, f"--out_dir={tmp_path}",
                     "--optimizer=muon", "--max_iters=1")
        names = {p: name for name, p in run[name].named_parameters() if p.requires_grad}
        adamw, muon = ([names[p] for p in opt.param_groups[0]["params"]]
                       for opt in run["optimizers"])
        assert set(muon) == expected and len(muon) + len(adamw) == len(names)
        assert set(muon + adamw) == set(names.values())
        expected |= {"time_t.fc1.weight", "time_t.fc2.weight"}


def test_muon_moves_a_matrix_by_a_fifth_of_the_learning_rate():
    """Root mean square, however small the gradient."""
    p = torch.nn.Parameter(torch.zeros(8, 8))
    p.grad = 1e-4 * torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    Muon([p], 0.01, 0.0, False).step()
    assert p.square().mean().sqrt().item() == pytest.approx(2e-3, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_is_pytorchs(dtype):
    """But for rounding: PyTorch's products are in bfloat16 everywhere."""
    rng = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=rng) for shape in ((24, 8), (8, 8), (8, 24), (24, 8))]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizers = [Muon(ours, 0.01, 0.1, dtype == torch.bfloat16),
                  torch.optim.Muon(theirs, 0.01, 0.1, adjust_lr_fn="match_rms_adamw")]
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=rng)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, p in zip(ours, theirs, start):
        assert (a - b).norm() <= 0.02 * (b - p).norm()


def test_muon_goes_on_from_its_state():
    """To the same bits. A matrix without a gradient stays where it is."""
    rng = torch.Generator().manual_seed(1)
    first, second = ([torch.nn.Parameter(torch.ones(4, 6)) for _ in range(3)] for _ in range(2))
    optimizers = [Muon(first, 0.01, 0.1, False)]

    def step():
        for p, q in zip(first[:2], second):
            p.grad = torch.randn(4, 6, generator=rng)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    step()
    for p, q in zip(first, second):
        q.data = p.detach().clone()
    optimizers.append(Muon(second, 0.01, 0.1, False))
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    step()
    assert all(torch.equal(p, q) for p, q in zip(first, second))
    assert torch.equal(first[2], torch.ones(4, 6)) and not torch.equal(first[1], torch.ones(4, 6))


@pytest.mark.parametrize("rows, columns", [(40, 100), (100, 40)])
def test_orthogonalized_keeps_the_singular_vectors_and_levels_the_values(rows, columns):
    x = torch.randn(3, rows, columns, dtype=torch.float64,
                    generator=torch.Generator().manual_seed(1))
    U, _, Vt = torch.linalg.svd(x, full_matrices=False)
    inner = U.mT @ orthogonalized(x) @ Vt.mT  # diagonal, if U and V are what they were
    values = inner.diagonal(dim1=1, dim2=2)
    assert 0.65 < values.min() and values.max() < 1.2
    assert (inner - values.diag_embed()).abs().max() < 1e-9


def test_an_overflow_anywhere_stops_every_optimizer(toy, tmp_path, monkeypatch):
    """In float16 the scaler checks the gradients of each optimizer alone. Here AdamW's overflow in
    the third of five steps; Muon must not move either."""
    unscale, before = torch.amp.GradScaler.unscale_, []             # scale, weights; by step

    def overflow(scaler, opt):
        params = opt.param_groups[0]["params"]
        if isinstance(opt, torch.optim.AdamW):
            before.append([scaler.get_scale()])
            if len(before) == 3:
                params[0].grad[0, 0] = torch.inf
        before[-1].append([p.detach().clone() for p in params])
        unscale(scaler, opt)
    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", overflow)
    inside(monkeypatch, "train.py", *toy[1], *TINY, f"--out_dir={tmp_path}", "--dtype=float16",
           "--optimizer=muon", "--max_iters=5")
    for i, overflowed in ((2, True), (3, False)):
        (scale, *weights), (scale_after, *weights_after) = before[i:i + 2]
        assert (scale_after < scale) == overflowed
        assert [same(*pair) for pair in zip(weights, weights_after)] == [overflowed] * 2

# ------------------------------------------------------------------------------ settings

def test_config_file(toy, tmp_path, monkeypatch):
    """A config file is Python, may compute, and loses to the command line."""
    config = tmp_path / "mine.py"
    config.write_text("max_iters = 2 * 2\nlearning_rate = 1\nout_dir = 'elsewhere'\n")
    quick_run("train.py", config, *toy[1], *TINY, f"--out_dir={tmp_path}", "--max_iters=2")
    found = torch.load(tmp_path / "flm.pt")["settings"]
    assert [found[key] for key in ("max_iters", "learning_rate", "out_dir")] == [
        2, 1.0, str(tmp_path)]
    for content, reason in (
            ("n_layers = 3\n", f"unknown setting 'n_layers' in {config}; did you mean 'n_layer'?"),
            ("n_layer = 1 / 0\n", f"config file {config}: ZeroDivisionError: division by zero")):
        config.write_text(content)
        assert mistake(monkeypatch, "train.py", config) == f"error: {reason}"
    said = mistake(monkeypatch, "train.py", "config/none.py")
    assert "no config file 'config/none.py'; there are: config/" in said


SPY = """
import os, runpy, sys
class Spy:
    def find_spec(self, name, *rest):
        if name == "torch":
            sys.exit(os.environ.get("GOMP_SPINCOUNT", "unset"))
sys.meta_path.insert(0, Spy())
sys.path.insert(0, "")
runpy.run_path(sys.argv[1])
"""


@pytest.mark.parametrize("script", ["train.py", "distill.py", "sample.py"])
def test_threads_wait_politely_unless_told_otherwise(script, monkeypatch):
    """What OpenMP finds in the environment when PyTorch is loaded."""
    names = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"
    for name, value, found in ((None, None, "1000"), (names[0], "7", "7"),
                               (names[1], "active", "unset"), (names[2], "0", "unset")):
        with monkeypatch.context() as patch:
            for key in names:
                patch.delenv(key, raising=False)
            if name:
                patch.setenv(name, value)
            assert run("-c", SPY, script, status=1) == found


def test_help_lists_the_settings():
    output = run("train.py", "--help")
    assert "machine =" not in output and "Train a flow language model" in output
    assert "learning_rate = " in output and "# -- model" in output


def test_every_config_file_has_only_known_settings():
    for path in sorted((ROOT / "config").glob("*.py")):
        stage = path.name.partition("_")[0]
        script = ROOT / ("distill.py" if stage in ("distill", "mend") else "train.py")
        defaults = {}
        exec(script.read_text().split("settings = configure")[0], dict(__name__="x"), defaults)
        settings = configure(defaults | dict(__doc__="", __file__=str(script)), [str(path)])
        assert settings["out_dir"].startswith("out/")
