"""python -m pytest tests/test_scripts.py

The programs as a user runs them, on a toy set: from data to one-step text, and their settings.
"""

import copy
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from programs import TINY, log, mistake, quick_run, run, start

import common
from data import tokenizer
from model import FlowTransformer, ModelConfig
from training import Muon, make_optimizers, optimizer_step, orthogonalized

# ---------------------------------------------------------------- the way through

def test_training_says_what_a_person_wants_to_know(toy):
    _, _, train, distill = toy
    for output in (train, distill):
        assert "M parameters" in output and "tokens a sequence" in output and "threads, float32" in output
        assert "step 6/6 | loss" in output and "tok/s" in output and "left" in output
    assert "6 steps of 64 tokens" in train and "by tau 0..1:" in train
    assert "by length 0..1:" in distill and "diagonal" in distill


def test_checkpoints_hold_everything(toy):
    folder, *_ = toy
    for kind in ("flm", "fmlm"):
        checkpoint = torch.load(folder / "out" / f"{kind}.pt", weights_only=True)
        assert checkpoint["kind"] == kind and checkpoint["step"] == 6
        assert checkpoint["settings"]["seed"] == 1
        assert {"model", "ema", "optimizers", "settings", "model_config", "tokenizer", "vocabulary"} <= checkpoint.keys()
        assert checkpoint["vocabulary"] == tokenizer.identity(checkpoint["tokenizer"])
    assert not list((folder / "out").glob("*.tmp"))


def test_logs_have_validation_by_time(toy):
    folder, *_ = toy
    records = log(folder / "out" / "flm.jsonl")
    assert [r["step"] for r in records if "val_loss" in r] == [0, 3, 6]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert all(len(r["val_loss_by_tau"]) == 10 for r in records if "val_loss" in r)
    assert records[0]["val_loss"] == pytest.approx(np.log(16), abs=1e-3)  # a uniform guess
    assert all(len(r["val_loss_by_length"]) == 10 for r in log(folder / "out" / "fmlm.jsonl") if "val_loss" in r)


def sampled(monkeypatch, path, *options):
    """The texts that sample.py writes to `path`, run in this process."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--out={path}", "--device=cpu", *options])
    runpy.run_path("sample.py", run_name="__main__")
    return [record["text"] for record in log(path)]


def test_sampling(toy, tmp_path, monkeypatch, capsys):
    options = tmp_path / "texts.jsonl", f"--out_dir={toy[0] / 'out'}", "--dtype=float32"
    texts = sampled(monkeypatch, *options, "--num_samples=3", "--steps", "1")
    assert "FMLM: 1 network evaluation and" in capsys.readouterr().out
    assert len(texts) == 3 and all(len(text) == 8 for text in texts)
    assert sampled(monkeypatch, *options, "--num_samples=3", "--steps=2,1")[3:] == texts
    assert sampled(monkeypatch, *options, "--num_samples=3", "--seed=2") != texts
    sampled(monkeypatch, *options, "--steps=3", "--gamma=1")
    flow = *options, "--steps=4", "--model=flm"
    texts = sampled(monkeypatch, *flow)
    assert "FLM: 4 network evaluations" in capsys.readouterr().out
    for other in ("--gamma=0.9", "--temperature=0.01"):
        once, again = (sampled(monkeypatch, *flow, other) for _ in range(2))
        assert once == again != texts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text_does_not_depend_on_how_many_are_asked_for(toy, dtype, tmp_path, monkeypatch):
    options = tmp_path / "texts.jsonl", f"--out_dir={toy[0] / 'out'}", f"--dtype={dtype}", "--steps=3"
    many = sampled(monkeypatch, *options, "--num_samples=17")
    for n in (1, 7, 9):
        assert sampled(monkeypatch, *options, f"--num_samples={n}") == many[:n]
    assert len(set(many)) > 1


def test_sampling_needs_no_data_folder_and_falls_back_to_the_flow(toy, tmp_path):
    folder, *_ = toy
    (tmp_path / "flm.pt").write_bytes((folder / "out" / "flm.pt").read_bytes())
    done = subprocess.run([sys.executable, ROOT / "sample.py", f"--out_dir={tmp_path}"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "no flow map" in done.stderr and "FLM: 1 network evaluation" in done.stdout


def test_texts_are_written_even_if_nobody_reads_the_screen(toy, tmp_path):
    """As with "| head -1", which closes the pipe."""
    process = start("sample.py", f"--out_dir={toy[0] / 'out'}", "--num_samples=5", f"--out={tmp_path / 'texts.jsonl'}",
                    launcher=(sys.executable, "-u"))
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=120) == 0
    assert [record["sample"] for record in log(tmp_path / "texts.jsonl")] == [1, 2, 3, 4, 5]


def test_plot(toy):
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib")
    folder, *_ = toy
    run("plot.py", f"--out_dir={folder / 'out'}")
    assert (folder / "out" / "loss.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("options", [["--objective=lsd"], ["--objective=esd"], ["--self_distill=true"],
                                     ["--target_ema=1", "--split=0.2"], ["--optimizer=muon", "--schedule=constant"]])
def test_every_objective_runs(toy, options, tmp_path):
    folder, common, *_ = toy
    (tmp_path / "flm.pt").write_bytes((folder / "out" / "flm.pt").read_bytes())
    output = quick_run("distill.py", *common, "--batch_size=8", f"--out_dir={tmp_path}", *options)
    assert ("off simplex" in output) == (options[0] in ("--objective=lsd", "--objective=esd"))


def test_a_teacher_at_another_temperature(toy, tmp_path):
    """At the start the student's diagonal is the FLM: no divergence from it, but from the FLM at another temperature (a low
    one: after six steps its guesses are nearly even, which no higher one would change)."""
    folder, common, *_ = toy
    (tmp_path / "flm.pt").write_bytes((folder / "out" / "flm.pt").read_bytes())
    for temperature in (1, 0.02):
        quick_run("distill.py", *common, "--batch_size=8", f"--out_dir={tmp_path}", f"--teacher_temperature={temperature}")
    same, other = (log(tmp_path / name)[0]["val_diagonal"] for name in ("fmlm.old1.jsonl", "fmlm.jsonl"))
    assert abs(same) < 1e-6 < 1e-4 < other


def test_muon_takes_the_matrices_between_embedding_and_head():
    """The time's too; and moves a matrix by 0.2 times the learning rate (root mean square), however small the gradient."""
    net = FlowTransformer(ModelConfig(vocab_size=11, block_size=4, n_layer=1, n_head=2, n_embd=16, n_time=8, flow_map=True))
    adamw, muon = make_optimizers(net, "muon", 1e-2, (0.9, 0.99), 0.0, "float32")
    of = {id(p): name for name, p in net.named_parameters()}
    mine = [of[id(p)] for p in muon.param_groups[0]["params"]]
    assert mine == [f"{module}.weight" for module in (
        "time_s.fc1", "time_s.fc2", "time_t.fc1", "time_t.fc2", "blocks.0.qkv", "blocks.0.attn_out", "blocks.0.mlp_in",
        "blocks.0.mlp_out", "blocks.0.modulation", "modulation_out")]
    assert len(of) == len(mine) + len(adamw.param_groups[0]["params"])
    before = net.time_s.fc2.weight.detach().clone()
    net.time_s.fc2.weight.grad = 1e-4 * torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    muon.step()
    moved = net.time_s.fc2.weight.detach() - before
    assert moved.square().mean().sqrt().item() == pytest.approx(2e-3, rel=0.2)
    assert len(make_optimizers(net, "adamw", 1e-2, (0.9, 0.99), 0.0, "float32")) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_is_pytorchs(dtype):
    """But for rounding: its products are in bfloat16 everywhere."""
    random = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=random) for shape in ((24, 8), (8, 8), (8, 24), (24, 8))]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizers = [Muon(ours, 0.01, 0.1, dtype), torch.optim.Muon(theirs, 0.01, 0.1, adjust_lr_fn="match_rms_adamw")]
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=random)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, p in zip(ours, theirs, start):
        assert (a - b).norm() <= 0.02 * (b - p).norm()


def test_muon_goes_on_from_its_state():
    """To the same bits; a matrix without a gradient stays where it is."""
    random = torch.Generator().manual_seed(1)
    first, second = ([torch.nn.Parameter(torch.ones(4, 6)) for _ in range(3)] for _ in range(2))
    optimizers = [Muon(first, 0.01, 0.1, torch.float32)]

    def step():
        for p, q in zip(first[:2], second):
            p.grad = torch.randn(4, 6, generator=random)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    step()
    for p, q in zip(first, second):
        q.data = p.detach().clone()
    optimizers.append(Muon(second, 0.01, 0.1, torch.float32))
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    step()
    assert all(torch.equal(p, q) for p, q in zip(first, second))
    assert torch.equal(first[2], torch.ones(4, 6)) and not torch.equal(first[1], torch.ones(4, 6))


def test_an_overflow_anywhere_stops_every_optimizer():
    """In float16 the scaler looks at the gradients of each optimizer alone, and clipping spreads one that is no number."""
    machine = common.Machine("cpu", "float16")
    net = FlowTransformer(ModelConfig(vocab_size=11, block_size=4, n_layer=1, n_head=2, n_embd=16, n_time=8))
    optimizers = make_optimizers(net, "muon", 1e-2, (0.9, 0.99), 0.0, machine.dtype)
    for overflow in (True, False):
        before, scale = [p.detach().clone() for p in net.parameters()], machine.scaler.get_scale()
        machine.scaler.scale(sum(p.square().sum() for p in net.parameters())).backward()
        if overflow:
            net.embed.weight.grad[0, 0] = torch.nan                             # AdamW's, not Muon's
        optimizer_step(net, optimizers, machine, 1.0)
        moved = [not torch.equal(p, q) for p, q in zip(before, net.parameters())]
        assert any(moved) != overflow and (machine.scaler.get_scale() < scale) == overflow
        assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("rows, columns", [(40, 100), (100, 40)])
def test_orthogonalized_keeps_the_singular_vectors_and_levels_the_values(rows, columns):
    x = torch.randn(3, rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    U, _, Vt = torch.linalg.svd(x, full_matrices=False)
    inside = U.mT @ orthogonalized(x) @ Vt.mT                                    # diagonal, if U and V are what they were
    values = inside.diagonal(dim1=1, dim2=2)
    assert 0.65 < values.min() and values.max() < 1.2
    assert (inside - values.diag_embed()).abs().max() < 1e-9


def test_full_jumps_are_ramped_up(toy, tmp_path, monkeypatch):
    """Every jump is full at the end of the run, none at its beginning, half of them between; without the ramp all are."""
    folder, common, *_ = toy
    monkeypatch.chdir(ROOT)
    for ramp, expected in ((True, [0, 8, 16]), (False, [16, 16, 16])):
        monkeypatch.setattr(sys, "argv", ["distill.py", *common, f"--out_dir={tmp_path / str(ramp)}", "--batch_size=32",
                                          f"--teacher={folder / 'out' / 'flm.pt'}", "--full_jump_share=1",
                                          f"--full_jump_ramp={ramp}"])
        batch = runpy.run_path("distill.py")["batch"]
        full = [int(((start == 0) & (end == 1)).sum()) for _, _, start, end in map(batch, (0, 3, 6))]  # of 6 steps
        assert full == expected


# ---------------------------------------------------------------- settings

def test_config_file(toy, tmp_path, monkeypatch):
    """A config file is Python, may compute, and loses to the command line."""
    folder, common, *_ = toy
    config = tmp_path / "mine.py"
    config.write_text("max_iters = 2 * 2\nlearning_rate = 1\nout_dir = 'elsewhere'\n")
    quick_run("train.py", config, *common, *TINY, f"--out_dir={tmp_path}", "--max_iters=2")
    settings = torch.load(tmp_path / "flm.pt")["settings"]
    assert (settings["max_iters"], settings["learning_rate"], settings["out_dir"]) == (2, 1.0, str(tmp_path))
    config.write_text("n_layers = 3\n")
    assert mistake(monkeypatch, "train.py", config) == f"error: unknown setting 'n_layers' in {config}; did you mean 'n_layer'?"
    config.write_text("n_layer = 1 / 0\n")
    assert mistake(monkeypatch, "train.py", config) == f"error: config file {config}: ZeroDivisionError: division by zero"
    assert "no config file 'config/none.py'; there are: config/" in mistake(monkeypatch, "train.py", "config/none.py")


def test_help_lists_the_settings():
    output = run("train.py", "--help")
    assert "machine =" not in output and "Train a flow language model" in output
    assert "learning_rate = " in output and "# -- model" in output


def test_every_config_file_has_only_known_settings():
    import common
    for path in sorted((ROOT / "config").glob("*.py")):
        script = ROOT / ("distill.py" if path.name.startswith("distill_") else "train.py")
        defaults = {}
        exec(script.read_text().split("settings = common.configure")[0], dict(__name__="x"), defaults)
        settings = common.configure(defaults | dict(__doc__="", __file__=str(script)), [str(path)])
        assert settings["out_dir"].startswith("out/")
