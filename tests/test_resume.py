"""python -m pytest tests/test_resume.py

Nothing a user does loses work. A run that is killed at any moment, interrupted, or stopped by a
full disk goes on from its last checkpoint to the very bits of a run that was left alone: weights,
moving average, optimizer state and log.
"""

import math
import os
import random
import signal
import subprocess
import time

import pytest
import torch
from programs import TINY, TWO, Fork, inside, log, mistake, quick_run, same, start

from lib import checkpoint as ckpt
from lib.machine import Machine, Progress

STEPS = ["--max_iters=40", "--eval_interval=20", "--gradient_accumulation_steps=8", "--dropout=0.1"]
KINDS = {"train.py": "flm", "distill.py": "fmlm"}


class Run:
    """One training run in a folder of its own."""

    def __init__(self, toy, script, processes, folder):
        data, common, *_ = toy
        folder.mkdir(exist_ok=True)
        self.path, self.processes = folder / f"{KINDS[script]}.pt", processes
        shape = TINY if script == "train.py" else ["--batch_size=8"]
        self.command = [script, *common, *shape, f"--out_dir={folder}", *STEPS]
        if script == "distill.py":
            (folder / "flm.pt").write_bytes((data / "out" / "flm.pt").read_bytes())

    def to_the_end(self, *options):
        quick_run(*self.command, *options, processes=self.processes)
        return torch.load(self.path), log(self.path.with_suffix(".jsonl"))

    def wait_for(self, lines):
        """Until its log has so many lines."""
        written, began = self.path.with_suffix(".jsonl"), time.monotonic()
        while not written.exists() or written.read_bytes().count(b"\n") < lines:
            assert time.monotonic() < began + 120
            time.sleep(0.001)


@pytest.fixture(scope="module")
def undisturbed(toy, tmp_path_factory):
    """(script, processes) -> checkpoint and log of a run that nobody disturbs; made once."""
    done = {}

    def result(*key):
        if key not in done:
            done[key] = Run(toy, *key, tmp_path_factory.mktemp("whole")).to_the_end()
        return done[key]
    return result


def assert_same_run(found, expected):
    for key in ("model", "ema", "optimizers", "scaler", "step"):
        assert same(found[0][key], expected[0][key]), key
    assert found[1] == expected[1]  # every record: losses, rates, gradient norms, validations


@pytest.mark.parametrize("script, processes", [("train.py", 1), ("train.py", 2), ("distill.py", 1)])
def test_killed_at_a_random_moment(toy, undisturbed, script, processes, tmp_path):
    """SIGKILL to every process at some moment after the checkpoint of step 20. Chance decides
    where: the outcome must not depend on it. A kill after the last step is tried again."""
    for attempt in range(5):
        disturbed = Run(toy, script, processes, tmp_path / str(attempt))
        running = Fork(*disturbed.command, processes=processes)
        disturbed.wait_for(lines=24)
        time.sleep(0.1 * random.random())
        running.signal(signal.SIGKILL)
        killed = running.end()[0] == [-signal.SIGKILL] * processes
        if killed and torch.load(disturbed.path)["step"] == 20:
            break
    assert torch.load(disturbed.path)["step"] == 20
    assert_same_run(disturbed.to_the_end("--init_from=resume"), undisturbed(script, processes))


@pytest.mark.parametrize("script, number", [
    ("train.py", signal.SIGINT), ("distill.py", signal.SIGTERM)])
def test_interrupted(toy, undisturbed, script, number, tmp_path):
    """Ctrl-C or SIGTERM finishes the step, writes a checkpoint, says so, and ends with a status
    that is not 0."""
    disturbed = Run(toy, script, 1, tmp_path)
    running = Fork(*disturbed.command)
    disturbed.wait_for(lines=5)
    running.signal(number)
    statuses, _, err = running.end()
    step = torch.load(disturbed.path)["step"]
    assert 0 < step < 40 and statuses == [130]
    assert (f"stopped at step {step}, saved {disturbed.path}; continue with --init_from=resume"
            in err)
    assert_same_run(disturbed.to_the_end("--init_from=resume"), undisturbed(script, 1))


def test_torchrun_restarts_a_killed_worker_and_stops_all(toy, undisturbed, tmp_path):
    """With init_from=auto a run starts where nothing is there and goes on where something is. A
    signal to torchrun, which passes it on, ends the run like one to a single process."""
    disturbed = Run(toy, "train.py", 2, tmp_path)
    process = start(*disturbed.command, "--init_from=auto", launcher=(*TWO, "--max_restarts=1"))
    disturbed.wait_for(lines=24)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    began = filter(lambda line: line.startswith("step 21/40"), process.stdout)
    assert next(began) and next(began)                              # the second after the restart
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    step = torch.load(disturbed.path)["step"]
    assert process.returncode != 0 and 20 < step < 40, err
    assert f"stopped at step {step}, saved {disturbed.path}" in err
    assert_same_run(disturbed.to_the_end("--init_from=resume"), undisturbed("train.py", 2))


def test_stopping_where_it_just_saved_writes_nothing(toy, tmp_path, monkeypatch):
    """So flm.prev.pt stays the checkpoint before."""
    words = ["train.py", *toy[1], *TINY, f"--out_dir={tmp_path}"]
    monkeypatch.setattr(Progress, "should_stop", lambda self, machine: (
        tmp_path / "flm.prev.pt").exists())
    for resume in ([], ["--init_from=resume"]):
        with pytest.raises(SystemExit):
            inside(monkeypatch, *words, *resume, "--max_iters=9", "--eval_interval=3")
        assert [torch.load(tmp_path / name)["step"] for name in ("flm.prev.pt", "flm.pt")] == [3, 6]


def test_two_ctrl_c_end_at_once():
    """The first lets the step finish; a person who insists does not wait for it."""
    progress = Progress(0, 10, 10)
    os.kill(os.getpid(), signal.SIGINT)
    assert progress.interrupted
    with pytest.raises(SystemExit) as stopped:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert stopped.value.code == 130

# ---------------------------------------------------------------- writing

def test_killed_in_the_middle_of_writing(toy, undisturbed, tmp_path):
    """The second checkpoint is half on the disk when the process dies: the first one is whole, and
    enough."""
    disturbed = Run(toy, "train.py", 1, tmp_path)
    config = tmp_path / "config.py"  # a config file is Python
    config.write_text("""
import io as _io, os as _os, signal as _signal, torch as _torch
_save, _saved = _torch.save, []
def _die_in_the_second(checkpoint, file):
    whole = _io.BytesIO()
    _save(checkpoint, whole)
    file.write(whole.getvalue() if not _saved else whole.getvalue()[:len(whole.getvalue()) // 2])
    file.flush()
    _saved.append(1)
    if len(_saved) == 2:
        _os.kill(_os.getpid(), _signal.SIGKILL)
_torch.save = _die_in_the_second
""")
    quick_run("train.py", config, *disturbed.command[1:], status=-signal.SIGKILL)
    half = tmp_path / "flm.pt.tmp"
    assert 0 < half.stat().st_size < disturbed.path.stat().st_size
    assert torch.load(disturbed.path)["step"] == 20
    assert_same_run(disturbed.to_the_end("--init_from=resume"), undisturbed("train.py", 1))
    assert not half.exists()


def test_full_disk(toy, tmp_path):
    """A real write that fails: the checkpoint before it stays, the error says so, and the run goes
    on from there."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full to write to")
    folder, common, *_ = toy
    path = tmp_path / "flm.pt"
    path.write_bytes((folder / "out" / "flm.pt").read_bytes())
    (tmp_path / "flm.pt.tmp").symlink_to("/dev/full")
    command = ["train.py", *common, *TINY, f"--out_dir={tmp_path}", "--init_from=resume",
               "--max_iters=9"]
    said = quick_run(*command, status=1)
    assert said.splitlines()[-1] == (f"error: cannot write {path} (No space left on device); what "
                                     f"was there is untouched")
    assert path.read_bytes() == (folder / "out" / "flm.pt").read_bytes()
    quick_run(*command)
    assert torch.load(path)["step"] == 9


def test_full_disk_under_the_log(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full to write to")
    path = tmp_path / "flm.jsonl"
    record = ckpt.Log(tmp_path / "flm.pt", Machine("cpu", "float32"), False, 0, "", {})
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(SystemExit) as stopped:
        record.write(1, loss=2.0)
    assert stopped.value.code == (f"error: cannot write {path} (No space left on device); the last "
                                  f"checkpoint is untouched")


def test_the_run_before_is_kept(toy, tmp_path):
    """Whoever forgets --init_from=resume has not lost the run, nor whoever forgets it twice."""
    (tmp_path / "flm.pt").write_bytes(b"checkpoint")
    (tmp_path / "flm.jsonl").write_text('{"step": 1}\n')
    for _ in range(2):
        quick_run("train.py", *toy[1], *TINY, f"--out_dir={tmp_path}", "--max_iters=1",
                  "--eval_iters=1")
    assert (tmp_path / "flm.old1.pt").read_bytes() == b"checkpoint"
    assert log(tmp_path / "flm.old1.jsonl") == [dict(step=1)]
    for name in ("flm.old2", "flm"):
        assert torch.load(tmp_path / f"{name}.pt")["step"] == 1
        assert log(tmp_path / f"{name}.jsonl")[0]["step"] == 0


def test_a_reader_of_the_old_checkpoint_is_left_alone(tmp_path):
    """The new one takes the name, not the file: whoever has the old one open reads it to its end. A
    link stays one."""
    path = tmp_path / "flm.pt"
    (tmp_path / "elsewhere").mkdir()
    path.symlink_to(tmp_path / "elsewhere" / "big.pt")
    first, second = (dict(model={}, step=step) for step in (1, 2))
    ckpt.save_checkpoint(path, first)
    with open(path, "rb") as reader:
        before = path.read_bytes()
        ckpt.save_checkpoint(path, second)
        assert reader.read() == before != path.read_bytes()
    assert path.is_symlink() and torch.load(tmp_path / "elsewhere" / "big.pt") == second


def test_a_log_cut_short_by_a_crash_is_taken_up(tmp_path):
    """The half line is dropped, and so is every record past the checkpoint; anything else there is
    not a log."""
    path = tmp_path / "flm.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    record = ckpt.Log(tmp_path / "flm.pt", Machine("cpu", "float32"), True, 1, "", {})
    record.write(2, loss=1.25)
    assert log(path) == [dict(step=1, loss=2.0), dict(step=2, loss=1.25)]
    for content, error in (("1\n", "TypeError"), ("{}\n", "KeyError"),
                           ("no\n{}\n", "JSONDecodeError")):
        path.write_text(content)
        with pytest.raises(SystemExit) as stopped:
            ckpt.read_log(path)
        assert stopped.value.code.startswith(
            f"error: {path} is not a log of train.py or distill.py ({error}: ")

# ---------------------------------------------------------------- other settings

def test_a_run_goes_on_in_another_arithmetic(toy, tmp_path):
    """From float32, which has no loss scale, to float16, which begins with a fresh one and then
    keeps it."""
    path = tmp_path / "flm.pt"
    path.write_bytes((toy[0] / "out" / "flm.pt").read_bytes())
    assert torch.load(path)["scaler"] == {}
    words = ["train.py", *toy[1], *TINY, f"--out_dir={tmp_path}", "--init_from=resume",
             "--dtype=float16"]
    quick_run(*words, "--max_iters=8")
    checkpoint = torch.load(path)
    assert checkpoint["step"] == 8 and checkpoint["scaler"]["scale"] > 64
    checkpoint["scaler"]["scale"] = 64.0
    torch.save(checkpoint, path)
    quick_run(*words, "--max_iters=9")
    assert torch.load(path)["scaler"]["scale"] == 64


def test_changed_settings_are_told_or_refused(toy, tmp_path):
    path = tmp_path / "flm.pt"
    path.write_bytes((toy[0] / "out" / "flm.pt").read_bytes())
    command = ["train.py", *toy[1], *TINY, f"--out_dir={tmp_path}", "--init_from=resume",
               "--max_iters=7"]
    for key, before, after in (("weight_decay", 0.0, 0.5), ("batch_size", 8, 4),
                               ("beta1", 0.9, 0.5)):
        assert quick_run(*command, f"--{key}={after}", status=1) == (
            f"error: {path} was made with {key}={before}, not {after}; resume with that, or start "
            f"again with --init_from=scratch")
    _, _, said = Fork(*command, "--learning_rate=0.001").end()
    assert said.splitlines() == ["from here on max_iters=7, until now 6",
                                 "from here on learning_rate=0.001, until now 0.002"]


def test_keeps_the_checkpoint_before_and_the_best(toy, tmp_path, monkeypatch):
    """The one before the last, and with keep_best that of the lowest validation loss, also of a run
    in two parts. Before the first step nothing is kept, so that loss does not count. A new run sets
    all of them aside."""
    words = ["train.py", *toy[1], *TINY, "--keep_best", f"--out_dir={tmp_path}"]
    losses = iter([1.0, 3.0, 5.0, 4.0, 2.5, 3.5])
    write, lowest = ckpt.Log.write, ckpt.Log.new_best
    replaced = lambda log: ckpt.read_log(log.path)[-1]["val_loss"]
    monkeypatch.setattr(ckpt.Log, "write", lambda self, step, **values: write(
        self, step, **values | ({"val_loss": next(losses)} if "val_loss" in values else {})))
    monkeypatch.setattr(ckpt.Log, "new_best", lambda self, _: lowest(self, replaced(self)))
    steps = lambda: {name: torch.load(tmp_path / f"flm{name}.pt")["step"]
                     for name in ("", ".prev", ".best")}
    inside(monkeypatch, *words, "--max_iters=9", "--eval_interval=3")
    assert steps() == {"": 9, ".prev": 6, ".best": 3}
    inside(monkeypatch, *words, "--init_from=resume", "--max_iters=15", "--eval_interval=3")
    assert steps() == {"": 15, ".prev": 12, ".best": 12}
    (tmp_path / "flm.best.pt").unlink()                             # as if not asked for until now
    losses = iter([6.0, 5.5])
    inside(monkeypatch, *words, "--init_from=resume", "--max_iters=21", "--eval_interval=3")
    assert steps() == {"": 21, ".prev": 18, ".best": 21}
    monkeypatch.undo()
    inside(monkeypatch, *words, "--max_iters=3")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "flm.best.pt", "flm.jsonl", "flm.old1.best.pt", "flm.old1.jsonl", "flm.old1.prev.pt",
        "flm.old1.pt", "flm.pt"]


def test_what_a_kill_left_is_no_checkpoint_before(tmp_path):
    """Nor is a copy beside a link, which may lead to a larger disk."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "flm.pt").symlink_to(tmp_path / "elsewhere" / "big.pt")
    (tmp_path / "elsewhere" / "big.part").write_bytes(b"of another run")
    for step in range(2):
        ckpt.save_checkpoint(tmp_path / "flm.pt", dict(model={}, step=step))
    assert sorted(path.name for path in tmp_path.rglob("*.p*")) == [
        "big.prev.pt", "big.pt", "flm.pt"]
    assert torch.load(tmp_path / "elsewhere" / "big.prev.pt")["step"] == 0


def test_a_file_system_without_links(tmp_path, monkeypatch):
    path = tmp_path / "flm.pt"
    path.write_bytes(b"one")

    def refuse(*_):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(os, "link", refuse)
    ckpt.link(path, tmp_path / "flm.prev.pt")
    assert (tmp_path / "flm.prev.pt").read_bytes() == b"one" and path.exists()


def test_float16_that_always_overflows_stops(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    said = mistake(monkeypatch, "train.py", *toy[1], *TINY, f"--out_dir={tmp_path}",
                   "--dtype=float16", "--max_iters=30")
    assert said == ("error: float16 overflowed in 20 steps in a row, the last of them 19; the last "
                    "checkpoint is untouched; use --dtype=bfloat16 or float32, or a lower "
                    "learning_rate")
