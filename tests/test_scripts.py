"""python -m pytest tests/test_scripts.py

The programs as a user runs them, on a toy set: from data to one-step text, resuming, several processes, and what they
say to mistakes.
"""

import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from data import corpus, tokenizer

TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--n_time=8", "--block_size=8", "--batch_size=8"]
QUICK = ["--max_iters=6", "--eval_interval=3", "--eval_iters=2", "--log_interval=1", "--device=cpu", "--dtype=float32"]


def run(*command, status=0, launcher=(sys.executable,)):
    """stdout of a program, which must end with this status, and without a traceback unless it succeeded."""
    done = subprocess.run([*launcher, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout if status == 0 else done.stderr.strip()


def mistake(monkeypatch, *command):
    """What a script's error says. Run in this process: starting PyTorch anew for each of them would take minutes."""
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(command[0], run_name="__main__")
    return stopped.value.code  # sys.exit(text) prints the text on stderr and ends with status 1


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A data folder of 16 characters, and a flow and a flow map trained on it for six steps."""
    folder = tmp_path_factory.mktemp("toy")
    text = "the cat sat on the mat. a dog ran to the red hut.\n" * 40
    encoding = tokenizer.char_encoding(text, "toy")
    ids = np.array(encoding.encode(text))
    corpus.write_bins(folder / "data", encoding, [ids], [ids[:400]], None)
    common = [f"--dataset={folder / 'data'}", f"--out_dir={folder / 'out'}", *QUICK]
    train = run("train.py", *common, *TINY)
    distill = run("distill.py", *common, "--batch_size", 8)
    return folder, common, train, distill


def log(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------- the way through

def test_training_says_what_a_person_wants_to_know(toy):
    _, _, train, distill = toy
    for output in (train, distill):
        assert "M parameters" in output and "tokens a sequence" in output and "cpu" in output and "float32" in output
        assert "step 6/6 | loss" in output and "tok/s" in output and "left" in output
    assert "6 steps of 64 tokens" in train and "by tau 0..1:" in train
    assert "by length 0..1:" in distill and "diagonal" in distill


def test_checkpoints_hold_everything(toy):
    folder, *_ = toy
    for kind in ("flm", "fmlm"):
        checkpoint = torch.load(folder / "out" / f"{kind}.pt", weights_only=True)
        assert checkpoint["kind"] == kind and checkpoint["step"] == 6
        assert checkpoint["generator"] == dict(seed=1, samples_seen=48)
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


def test_sampling(toy):
    folder, *_ = toy
    base = ["sample.py", f"--out_dir={folder / 'out'}", "--num_samples=3", "--device=cpu", "--dtype=float32"]
    output = run(*base, "--steps", 1, f"--out={folder / 'a.jsonl'}")
    assert "FMLM: 1 network evaluation and" in output and "ms a sample" in output
    texts = [r["text"] for r in log(folder / "a.jsonl")]
    assert len(texts) == 3 and all(len(text) == 8 for text in texts)
    run(*base, "--steps=1,2", "--batch_size=2", f"--out={folder / 'b.jsonl'}")
    again = log(folder / "b.jsonl")
    assert [r["text"] for r in again if r["steps"] == 1] == texts  # the seed decides, not the batch size
    run(*base, "--steps=1", "--seed=2", f"--out={folder / 'c.jsonl'}")
    assert [r["text"] for r in log(folder / "c.jsonl")] != texts
    run(*base, "--steps=3", "--gamma=1", f"--out={folder / 'd.jsonl'}")
    assert "FLM: 4 network evaluations" in run(*base, "--steps=4", "--model=flm")


def test_sampling_needs_no_data_folder_and_falls_back_to_the_flow(toy, tmp_path):
    folder, *_ = toy
    (tmp_path / "flm.pt").write_bytes((folder / "out" / "flm.pt").read_bytes())
    done = subprocess.run([sys.executable, ROOT / "sample.py", f"--out_dir={tmp_path}"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "no flow map" in done.stderr and "FLM: 1 network evaluation" in done.stdout


def test_plot(toy):
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib")
    folder, *_ = toy
    run("plot.py", f"--out_dir={folder / 'out'}")
    assert (folder / "out" / "loss.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("options", [["--objective=lsd"], ["--objective=esd"], ["--self_distill=true"],
                                     ["--target_ema=1"], ["--optimizer=muon", "--schedule=constant"]])
def test_every_objective_runs(toy, options, tmp_path):
    folder, common, *_ = toy
    (tmp_path / "flm.pt").write_bytes((folder / "out" / "flm.pt").read_bytes())
    output = run("distill.py", *common, "--batch_size=8", f"--out_dir={tmp_path}", *options)
    assert ("off simplex" in output) == (options[0] in ("--objective=lsd", "--objective=esd"))


# ---------------------------------------------------------------- resuming, processes

def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("script, kind", [("train.py", "flm"), ("distill.py", "fmlm")])
def test_resuming_is_exact(toy, script, kind, tmp_path):
    """Six steps at once, and three and three: the same weights, averages, optimizer state and log, to the bit."""
    folder, common, *_ = toy
    shape = TINY if kind == "flm" else ["--batch_size=8"]
    options = [*common, *shape, f"--out_dir={tmp_path}", "--dropout=0.1", "--schedule=constant"]
    (tmp_path / "flm.pt").write_bytes((folder / "out" / "flm.pt").read_bytes())
    run(script, *options)
    whole, whole_log = torch.load(tmp_path / f"{kind}.pt"), log(tmp_path / f"{kind}.jsonl")
    run(script, *options, "--max_iters=3")
    run(script, *options, "--init_from=resume")
    resumed = torch.load(tmp_path / f"{kind}.pt")
    for key in ("model", "ema", "optimizers", "step", "generator"):
        assert same(whole[key], resumed[key]), key
    assert log(tmp_path / f"{kind}.jsonl") == whole_log


def test_two_processes_are_one(toy, tmp_path):
    """Data-parallel training with two processes takes the steps of one with twice the micro-steps."""
    _, common, *_ = toy
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    states = []
    for name, launcher in (("one", (sys.executable,)), ("two", torchrun)):
        run("train.py", *common, *TINY, "--gradient_accumulation_steps=2", "--dropout=0", f"--out_dir={tmp_path / name}",
            launcher=launcher)
        states.append(torch.load(tmp_path / name / "flm.pt"))
    for name, weight in states[0]["model"].items():
        assert torch.allclose(weight, states[1]["model"][name], atol=1e-5), name
    assert states[0]["generator"] == states[1]["generator"]


# ---------------------------------------------------------------- mistakes

@pytest.mark.parametrize("command, message", [
    (["train.py", "--lerning_rate=1"], "unknown setting 'lerning_rate' on the command line; did you mean 'learning_rate'?"),
    (["train.py", "--max_iters=ten"], "max_iters=ten on the command line: expected int, such as 1000"),
    (["train.py", "--compile=maybe"], "compile=maybe on the command line: expected bool, such as False"),
    (["train.py", "--seed"], "--seed needs a value, as in --seed=1"),
    (["train.py", "--out_dir=x", "config/owt.py"],
     "cannot read 'config/owt.py'; settings are given as --key=value, a config file comes first"),
    (["train.py", "--init_from=gpt2"], "init_from=gpt2: choose scratch, resume"),
    (["train.py", "--dtype=int8"], "dtype=int8: choose auto, bfloat16, float16, float32"),
    (["train.py", "--optimizer=sgd"], "optimizer=sgd: choose adamw, muon"),
    (["train.py", "--schedule=linear"], "schedule=linear: choose constant, cosine"),
    (["train.py", "--block_size=500"], "{folder}/data/val.bin has 400 tokens, fewer than block_size=500"),
    (["distill.py", "--objective=mse"], "objective=mse: choose psd, lsd, esd"),
    (["distill.py", "--diagonal_share=1"], "diagonal_share=1.0 of batch_size=64 leaves no row for jumps"),
    (["distill.py", "--out_dir=nowhere"],
     "no checkpoint nowhere/flm.pt; train.py writes flm.pt, distill.py reads it and writes fmlm.pt"),
    (["train.py", "--device=gpu"], "device=gpu: PyTorch cannot use it here; choose auto, cpu, cuda or mps"),
    (["train.py", "--n_head=3"], "n_embd=256 must be an even multiple of n_head=3"),
    (["train.py", "--dropout=2"], "dropout=2.0 must lie between 0 and 1"),
    (["train.py", "--batch_size=0"], "batch_size=0: must be positive"),
    (["train.py", "--init_from=resume", "--seed=2"],
     "{folder}/out/flm.pt was made with block_size=8, not 64; resume with that, or start again with --init_from=scratch"),
    (["sample.py", "--steps=0"], "steps=0: expected positive numbers such as 1 or 1,2,4,8"),
    (["sample.py", "--steps=1,x"], "steps=1,x: expected positive numbers such as 1 or 1,2,4,8"),
    (["sample.py", "--gamma=2"], "gamma=2.0: must lie between 0 and 1"),
    (["sample.py", "--model=flm", "--gamma=0.5"],
     "gamma needs a flow map; this checkpoint is a flow: run distill.py first, or set --gamma=0"),
    (["sample.py", "--model=gpt"], "model=gpt: choose auto, flm, fmlm"),
])
def test_mistakes_end_in_one_line(toy, command, message, monkeypatch):
    folder, *_ = toy
    options = [f"--out_dir={folder / 'out'}", "--device=cpu"]
    options += [f"--dataset={folder / 'data'}"] if command[0] != "sample.py" else []
    assert mistake(monkeypatch, command[0], *options, *command[1:]) == f"error: {message.format(folder=folder)}"


def test_config_file(toy, tmp_path, monkeypatch):
    """A config file is Python, may compute, and loses to the command line."""
    folder, common, *_ = toy
    config = tmp_path / "mine.py"
    config.write_text("max_iters = 2 * 2\nlearning_rate = 1\nout_dir = 'elsewhere'\n")
    run("train.py", config, *common, *TINY, f"--out_dir={tmp_path}", "--max_iters=2")
    settings = torch.load(tmp_path / "flm.pt")["settings"]
    assert (settings["max_iters"], settings["learning_rate"], settings["out_dir"]) == (2, 1.0, str(tmp_path))
    config.write_text("n_layers = 3\n")
    assert mistake(monkeypatch, "train.py", config) == f"error: unknown setting 'n_layers' in {config}; did you mean 'n_layer'?"
    config.write_text("n_layer = 1 / 0\n")
    assert mistake(monkeypatch, "train.py", config) == f"error: config file {config}: ZeroDivisionError: division by zero"
    assert "no config file 'config/none.py'; there are: config/" in mistake(monkeypatch, "train.py", "config/none.py")


def test_help_lists_the_settings():
    output = run("train.py", "--help")
    assert "machine =" not in output and "Train a flow language model" in output and "learning_rate = " in output and "# -- model" in output


def test_every_config_file_has_only_known_settings():
    import common
    for path in sorted((ROOT / "config").glob("*.py")):
        script = ROOT / ("distill.py" if path.name.startswith("distill_") else "train.py")
        defaults = {}
        exec(script.read_text().split("settings = common.configure")[0], dict(__name__="x"), defaults)
        settings = common.configure(defaults | dict(__doc__="", __file__=str(script)), [str(path)])
        assert settings["out_dir"].startswith("out/")
