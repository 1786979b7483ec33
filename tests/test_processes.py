"""python -m pytest tests/test_processes.py

Several processes are one: the same gradient, the same noise, every sample once, one writer; and when one of them ends,
all do, with the words of the one that knows why.
"""

import os
import signal
import time

import pytest
import torch
from conftest import ROOT
from programs import QUICK, TINY, TORCHRUN, TWO, Fork, free_port, quick_run, run, start, write_set, write_toy

import common

# A config file is Python. This one gives every process a folder of its own and writes down the rows it reads.
SPY = """
import os as _os
import data.loader as _loader
_rank, _row = _os.environ.get("RANK", "0"), _loader.Data.row
out_dir = f"{_folder}/out{_rank}"
def _row_and_tell(self, n):
    if "train.bin" in str(self.path):
        print(n, file=open(f"{_folder}/rows{_rank}", "a"))
    return _row(self, n)
_loader.Data.row = _row_and_tell
"""
ONE_STEP = ["--max_iters=1", "--eval_interval=1", "--grad_clip=0", "--beta1=0.5", "--dropout=0"]


def take_a_step(folder, script, *options, processes=1):
    """One optimizer step. Returns its gradient: Adam's first moment after one step is (1 - beta1) times it."""
    folder.mkdir()
    (folder / "spy.py").write_text(f"_folder = {str(folder)!r}\n" + SPY)
    quick_run(script, folder / "spy.py", *QUICK, *ONE_STEP, *options, processes=processes)
    checkpoint = torch.load(folder / "out0" / f"{'fmlm' if script == 'distill.py' else 'flm'}.pt")
    return {name: state["exp_avg"] / 0.5 for name, state in checkpoint["optimizers"][0]["state"].items()}


def assert_close(found, expected):
    size = max(g.abs().max() for g in expected.values())
    assert size > 1e-3
    for name in expected:
        assert torch.allclose(found[name], expected[name], atol=1e-6 * size, rtol=1e-4), name


@pytest.mark.parametrize("n_embd", [8, 16])  # noise through the Gram matrix (V = 16 > d), and in all V dimensions
def test_gradient_is_that_of_the_concatenated_batch(toy, n_embd, tmp_path):
    """Two processes with 8 texts each, one with 16 texts, one with twice 8: the same samples, times and noise."""
    options = [f"--dataset={toy[0] / 'data'}", *TINY, f"--n_embd={n_embd}"]
    two = take_a_step(tmp_path / "two", "train.py", *options, "--gradient_accumulation_steps=2", processes=2)
    one = take_a_step(tmp_path / "one", "train.py", *options, "--batch_size=16")
    assert_close(two, one)
    dropout = [*options, "--gradient_accumulation_steps=2", "--dropout=0.3"]
    assert_close(take_a_step(tmp_path / "two drop", "train.py", *dropout, processes=2),
                 take_a_step(tmp_path / "one drops", "train.py", *dropout))

    read = [[int(line) for line in (tmp_path / "two" / f"rows{rank}").read_text().split()] for rank in range(2)]
    assert sorted(read[0][:8] + read[1][:8]) == list(range(16))                          # sharded without overlap
    assert sorted(read[0][8:] + read[1][8:]) == list(range(16, 32))                      # the next batch, read ahead
    assert (tmp_path / "two" / "out0" / "flm.pt").exists()
    assert not (tmp_path / "two" / "out1").exists()                                      # only process 0 writes


def test_gradient_of_distillation(tmp_path):
    """Its micro-batches each have a diagonal part, so one process takes two of them. The teacher is one with something to
    teach: the toy flow, six steps old, would give next to no gradient."""
    write_set(tmp_path / "data", "abcdefghijkl" * 50)
    options = [f"--dataset={tmp_path / 'data'}", f"--teacher={ROOT / 'tests' / 'fixtures' / 'released_flm.ckpt'}",
               "--block_size=5", "--batch_size=8", "--gradient_accumulation_steps=2"]
    assert_close(take_a_step(tmp_path / "two", "distill.py", *options, processes=2),
                 take_a_step(tmp_path / "one", "distill.py", *options))


def test_two_agents(toy, tmp_path):
    """The command of the README for two nodes, on one."""
    port = free_port()
    _, common, *_ = toy
    command = ["train.py", *common, *TINY, "--max_iters=2", "--gradient_accumulation_steps=2"]
    agents = [start(*command, f"--out_dir={tmp_path / str(rank)}",
                    launcher=(*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", f"--node_rank={rank}",
                              "--master_addr=127.0.0.1", f"--master_port={port}")) for rank in range(2)]
    said = [agent.communicate(timeout=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert "machine: 2 x " in said[0][0] and said[1][0] == ""
    assert not (tmp_path / "1").exists()
    quick_run(*command, f"--out_dir={tmp_path / 'alone'}")
    together, alone = (torch.load(tmp_path / name / "flm.pt") for name in ("0", "alone"))
    for name, weight in alone["model"].items():
        assert torch.allclose(together["model"][name], weight, atol=1e-5), name


def test_a_process_that_ends_takes_the_others_along(toy, tmp_path):
    """One node has damaged data: its error is on the screen, no process keeps waiting, and none shows a traceback."""
    data, *_ = toy
    write_toy(tmp_path / "damaged")
    tokens = bytearray((tmp_path / "damaged" / "train.bin").read_bytes())
    tokens[::2] = b"\xff" * (len(tokens) // 2)
    (tmp_path / "damaged" / "train.bin").write_bytes(tokens)
    config = tmp_path / "config.py"
    sets = [str(data / "data"), str(tmp_path / "damaged")]
    config.write_text(f"import os as _os\ndataset = {sets}[int(_os.environ['RANK'])]\n")
    said = run("train.py", config, *QUICK, *TINY, f"--out_dir={tmp_path / 'out'}", "--gradient_accumulation_steps=2",
               launcher=TWO, status=1)
    assert f"error: {tmp_path / 'damaged' / 'train.bin'} holds token 255, past its vocabulary of 16" in said
    assert 'train.py", line' not in said  # the only traceback is torchrun's own
    assert not (tmp_path / "out" / "flm.pt").exists()


def wait_for_steps(running, path):
    while not path.exists() or path.read_text().count("\n") < 3:
        assert running.running()
        time.sleep(0.01)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_takes_the_others_along(toy, rank, tmp_path):
    running = Fork("train.py", *toy[1], *TINY, f"--out_dir={tmp_path}", "--max_iters=1000000", "--log_interval=1",
                   "--eval_interval=1000000", "--gradient_accumulation_steps=2", processes=2)
    wait_for_steps(running, tmp_path / "flm.jsonl")
    os.kill(running.processes[rank].pid, signal.SIGKILL)
    start = time.monotonic()
    statuses, _, said = running.end()
    assert statuses[rank] == -signal.SIGKILL and statuses[1 - rank] == 1 and time.monotonic() < start + 60
    assert f"error: process {1 - rank} stops: another one ended, see there" in said and "Traceback" not in said


def test_a_full_disk_ends_all(toy, tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full to write to")
    (tmp_path / "flm.pt.tmp").symlink_to("/dev/full")
    said = quick_run("train.py", *toy[1], *TINY, f"--out_dir={tmp_path}", "--gradient_accumulation_steps=2", processes=2,
                     status=1)
    assert f"error: cannot write {tmp_path / 'flm.pt'} (No space left on device)" in said
    assert "error: process 1 stops: another one ended, see there" in said and "Traceback" not in said


def test_micro_steps_must_go_round(toy):
    said = quick_run("train.py", *toy[1], *TINY, processes=2, status=1)
    assert ("error: gradient_accumulation_steps=1 must be a multiple of the 2 processes, which share the micro-steps of a "
            "step") in said


def test_processes_must_be_started_alike(toy, tmp_path):
    config = tmp_path / "config.py"
    config.write_text("import os as _os\nlearning_rate = 0.01 if _os.environ['RANK'] == '1' else 0.02\n")
    said = quick_run("train.py", config, *toy[1], *TINY, f"--out_dir={tmp_path}", "--gradient_accumulation_steps=2",
                     processes=2, status=1)
    assert ("error: the processes have different settings, data, checkpoints, arithmetic or kinds of device; give all of them the same"
            in said)
    assert not (tmp_path / "flm.jsonl").exists()


def test_processes_must_have_the_same_teacher(toy, tmp_path):
    """As on two nodes with folders of their own."""
    teacher = torch.load(toy[0] / "out" / "flm.pt")
    teacher["ema"]["head.bias"][0] += 1e-6
    torch.save(teacher, tmp_path / "flm.pt")
    (tmp_path / "config.py").write_text(f"import os as _os\nteacher = {str(toy[0] / 'out' / 'flm.pt')!r}\n"
                                        f"if _os.environ['RANK'] == '1': teacher = {str(tmp_path / 'flm.pt')!r}\n")
    said = quick_run("distill.py", tmp_path / "config.py", *toy[1], "--batch_size=8", f"--out_dir={tmp_path}",
                     "--gradient_accumulation_steps=2", processes=2, status=1)
    assert "error: the processes have different settings, data, checkpoints, arithmetic or kinds of device" in said


@pytest.mark.parametrize("interrupted, status", [(True, 130), (False, 0)])
def test_all_stay_until_the_last_checkpoint_is_written(toy, interrupted, status, tmp_path):
    """torchrun kills the others half a minute after one has ended, and the disk may be slow."""
    (tmp_path / "config.py").write_text("import storage as _storage, time as _time\n_save = _storage.save_checkpoint\n"
                                        "_storage.save_checkpoint = lambda *rest: (_time.sleep(1), _save(*rest))\n")
    running = Fork("train.py", tmp_path / "config.py", *toy[1], *TINY, f"--out_dir={tmp_path}", "--log_interval=1",
                   f"--max_iters={1000000 if interrupted else 4}", "--eval_interval=1000000",
                   "--gradient_accumulation_steps=2", processes=2)
    if interrupted:
        wait_for_steps(running, tmp_path / "flm.jsonl")
        os.kill(running.processes[1].pid, signal.SIGTERM)
    running.processes[1].join(60)
    assert (tmp_path / "flm.pt").exists()
    statuses, *_ = running.end()
    assert statuses == [status, status]


def test_other_arithmetic_elsewhere_is_refused(toy, tmp_path):
    """As where one machine of two multiplies bfloat16 and the other does not."""
    (tmp_path / "config.py").write_text("import common as _common, os as _os\n"
                                        "_common.fast_dtype = lambda _: ('float32', 'bfloat16')[int(_os.environ['RANK'])]\n")
    said = quick_run("train.py", tmp_path / "config.py", *toy[1], *TINY, "--dtype=auto", f"--out_dir={tmp_path}",
                     "--gradient_accumulation_steps=2", processes=2, status=1)
    assert "error: the processes have different settings, data, checkpoints, arithmetic or kinds of device" in said


@pytest.mark.parametrize("device, world, taken", [("auto", 1, 0), ("cuda", 1, 0), ("cuda:1", 1, 1), ("cuda", 4, 3)])
def test_every_process_takes_a_gpu_by_its_number(device, world, taken, monkeypatch):
    """PyTorch's own check of what it is asked to take, on a machine that only pretends to have one."""
    numbers = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "ones", lambda *size, device: None)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", numbers.append, raising=False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for name, value in (("RANK", world - 1), ("LOCAL_RANK", world - 1), ("WORLD_SIZE", world)):
        monkeypatch.setenv(name, str(value))
    machine = common.Machine(device, "bfloat16")
    assert (machine.device, numbers) == (torch.device("cuda", taken), [taken])
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "5")
    with pytest.raises(SystemExit, match="is number 5 on this machine, and it sees 4 GPUs; start a process for each GPU"):
        common.Machine("auto", "bfloat16")
    with pytest.raises(SystemExit, match="device=cuda:1 would put all processes on one GPU; use --device=cuda"):
        common.Machine("cuda:1", "bfloat16")


def test_the_processor_has_a_name(monkeypatch):
    for text, name in (("flags: a\nmodel name\t: Some CPU 9\nmodel name\t: Some CPU 9\n", "Some CPU 9"), ("flags: a\n", "cpu")):
        monkeypatch.setattr(common.Path, "read_text", lambda path: text)
        assert common.processor() == name
    monkeypatch.setattr(common, "Path", lambda name: open("/no such file"))
    assert common.processor() == "cpu"
