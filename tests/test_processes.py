"""python -m pytest tests/test_processes.py

Several processes are one: the same gradient, every sample once, one writer. When one of them ends,
all do.
"""

import os
import signal
import time

import pytest
import torch
from programs import (QUICK, TINY, TORCHRUN, Fork, free_port, log, quick_run, start,
                      write_toy)

from lib import machine as lib

# A config file is Python. This one gives every process a folder of its own and writes down which
# rows it reads.
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
SIX = ["--gradient_accumulation_steps=6", "--dropout=0.3", "--max_iters=1", "--eval_interval=1",
       "--grad_clip=0", "--beta1=0.5"]


def take_a_step(folder, script, *options, processes):
    """One optimizer step. Returns its gradient and the record of the log. Adam's first moment after
    one step is (1 - beta1) times the gradient."""
    folder.mkdir()
    (folder / "spy.py").write_text(f"_folder = {str(folder)!r}\n" + SPY)
    quick_run(script, folder / "spy.py", *QUICK, *SIX, *options, processes=processes)
    path = folder / "out0" / ("fmlm.pt" if script == "distill.py" else "flm.pt")
    state = torch.load(path)["optimizers"][0]["state"]
    gradient = torch.cat([moments["exp_avg"].flatten() for moments in state.values()]) / 0.5
    return gradient, log(path.with_suffix(".jsonl"))[1]


@pytest.mark.parametrize("script, options", [
    ("train.py", [*TINY, "--n_embd=8"]),    # noise through the Gram matrix (V = 16 > d)
    ("train.py", [*TINY, "--n_embd=16"]),   # noise in all V dimensions
    ("distill.py", ["--batch_size=8"])])
def test_the_gradient_does_not_depend_on_the_number_of_processes(toy, script, options, tmp_path):
    """Six micro-batches, in one, two and three processes: the same samples, times, noise and
    dropout. Each sample is read once and process 0 alone writes."""
    options = [*options, f"--dataset={toy[0] / 'data'}"]
    if script == "distill.py":
        # A sharper teacher: the student starts as its copy, and would have nothing to learn.
        options += [f"--teacher_path={toy[0] / 'out' / 'flm.pt'}", "--teacher_temperature=0.02"]
    expected, alone = take_a_step(tmp_path / "1", script, *options, processes=1)
    assert expected.norm() > 1e-2
    assert expected.norm().item() == pytest.approx(alone["grad_norm"], rel=1e-5)
    for processes in (2, 3):
        folder = tmp_path / str(processes)
        found, record = take_a_step(folder, script, *options, processes=processes)
        assert (found - expected).norm() < 1e-5 * expected.norm()
        assert record == pytest.approx(alone, rel=1e-5)
        rows = [list(map(int, (folder / f"rows{rank}").read_text().split()))
                for rank in range(processes)]
        n = 48 // processes
        assert sorted(sum((read[:n] for read in rows), [])) == list(range(48))
        assert all(min(read[n:]) >= 48 for read in rows)                # of the next step
        assert [path.name for path in folder.glob("out*")] == ["out0"]


# Where a network outgrows one GPU, fully_shard takes the place of DistributedDataParallel: around
# each block, and around the module of the loss, which also uses E and the head by themselves.
SHARDED = """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import flow
from lib.machine import generator
from model import FlowTransformer, ModelConfig

class Loss(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, number):
        rng = generator(number)
        y, tau = torch.randint(50, (4, 8), generator=rng), torch.rand(4, generator=rng)
        return flow.loss(self.net, flow.Clock(50), y, tau, rng)[0]

torch.set_num_threads(1)
dist.init_process_group("gloo")
torch.manual_seed(0)
flow.SLICE = 5 * 50                                                 # several slices
whole, sharded = (FlowTransformer(ModelConfig(50, 8, 2, 2, 16, n_time=8)).eval() for _ in range(2))
for p in whole.parameters():
    torch.nn.init.normal_(p, std=0.3)
sharded.load_state_dict(whole.state_dict())
loss, mesh = Loss(sharded), init_device_mesh("cpu", (2,))
for block in sharded.blocks:
    fully_shard(block, mesh=mesh)
fully_shard(loss, mesh=mesh)
loss(dist.get_rank()).backward()
((Loss(whole)(0) + Loss(whole)(1)) / 2).backward()
for (name, p), q in zip(whole.named_parameters(), sharded.parameters()):
    assert torch.allclose(q.grad.full_tensor(), p.grad, atol=1e-6) and p.grad.norm() > 1e-3, name
    assert q.to_local().numel() < p.numel(), name
print("equal")
dist.destroy_process_group()
"""


def test_the_loss_of_a_sharded_network(tmp_path):
    """Two processes that each keep half of every weight find the gradient of one that keeps all."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    assert quick_run(tmp_path / "sharded.py", processes=2).split() == ["equal"] * 2


def test_two_agents(toy, tmp_path):
    """The command of the README for two nodes, on one."""
    port = free_port()
    command = ["train.py", *toy[1], *TINY, "--max_iters=2", "--gradient_accumulation_steps=2"]
    agents = [start(*command, f"--out_dir={tmp_path / str(rank)}", launcher=(
        *TORCHRUN, "--nnodes=2", "--nproc_per_node=1", f"--node_rank={rank}",
        "--master_addr=127.0.0.1", f"--master_port={port}")) for rank in range(2)]
    said = [agent.communicate(timeout=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert "; 2 x " in said[0][0] and said[1][0] == ""
    assert not (tmp_path / "1").exists()
    quick_run(*command, f"--out_dir={tmp_path / 'alone'}")
    together, alone = (torch.load(tmp_path / name / "flm.pt") for name in ("0", "alone"))
    for name, weight in alone["model"].items():
        assert torch.allclose(together["model"][name], weight, atol=1e-5), name

# ---------------------------------------------------------------- the end of one is the end of all

def test_a_process_with_damaged_data_takes_the_others_along(toy, tmp_path):
    """Its error is on the screen, no process keeps waiting, and none shows a traceback."""
    write_toy(tmp_path / "damaged")
    tokens = bytearray((tmp_path / "damaged" / "train.bin").read_bytes())
    tokens[::2] = b"\xff" * (len(tokens) // 2)
    (tmp_path / "damaged" / "train.bin").write_bytes(tokens)
    config = tmp_path / "config.py"
    sets = [str(toy[0] / "data"), str(tmp_path / "damaged")]
    config.write_text(f"import os as _os\ndataset = {sets}[int(_os.environ['RANK'])]\n")
    said = quick_run("train.py", config, *QUICK, *TINY, f"--out_dir={tmp_path / 'out'}",
                     "--gradient_accumulation_steps=2", processes=2, status=1)
    path = tmp_path / "damaged" / "train.bin"
    assert f"error: {path} holds token 255, past its vocabulary of 16" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "flm.pt").exists()


SLOW = """
import lib.checkpoint as _ckpt, time as _time
_save = _ckpt.save_checkpoint
_ckpt.save_checkpoint = lambda *rest, **more: (_time.sleep(1), _save(*rest, **more))
"""


def two_of_them(toy, folder, *options):
    (folder / "config.py").write_text(SLOW)
    return Fork("train.py", folder / "config.py", *toy[1], *TINY, f"--out_dir={folder}",
                "--eval_interval=1000000", "--gradient_accumulation_steps=2", "--max_iters=1000000",
                *options, processes=2)


def wait_for_steps(running, path):
    while not path.exists() or path.read_text().count("\n") < 3:
        assert running.running()
        time.sleep(0.01)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_takes_the_others_along(toy, rank, tmp_path):
    running = two_of_them(toy, tmp_path)
    wait_for_steps(running, tmp_path / "flm.jsonl")
    os.kill(running.processes[rank].pid, signal.SIGKILL)
    began = time.monotonic()
    statuses, *_ = running.end()
    assert statuses[rank] == -signal.SIGKILL and statuses[1 - rank] == 1
    assert time.monotonic() < began + 60


def test_a_full_disk_ends_all(toy, tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full to write to")
    (tmp_path / "flm.pt.tmp").symlink_to("/dev/full")
    said = quick_run("train.py", *toy[1], *TINY, f"--out_dir={tmp_path}",
                     "--gradient_accumulation_steps=2", processes=2, status=1)
    assert f"error: cannot write {tmp_path / 'flm.pt'} (No space left on device)" in said
    assert "error: process 1 stops: another one ended, see there" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("interrupted", [True, False])
def test_all_stay_until_the_last_checkpoint_is_written(toy, interrupted, tmp_path):
    """torchrun kills the others half a minute after one has ended, and the disk may be slow."""
    running = two_of_them(toy, tmp_path, *([] if interrupted else ["--max_iters=4"]))
    if interrupted:
        wait_for_steps(running, tmp_path / "flm.jsonl")
        os.kill(running.processes[1].pid, signal.SIGTERM)
    running.processes[1].join(60)
    assert (tmp_path / "flm.pt").exists()
    statuses, *_ = running.end()
    assert statuses == [130 if interrupted else 0] * 2

def test_processes_that_do_not_all_see_a_checkpoint_do_not_start(toy, tmp_path):
    """Two nodes without a disk in common: one would go on, the other start anew."""
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "flm.pt").write_bytes((toy[0] / "out" / "flm.pt").read_bytes())
    config = tmp_path / "config.py"
    config.write_text(f"import os as _os\nout_dir = '{tmp_path}/' + _os.environ['RANK']\n")
    said = quick_run("train.py", config, toy[1][0], *QUICK, *TINY, "--init_from=auto",
                     "--gradient_accumulation_steps=2", processes=2, status=1)
    for rank in range(2):
        assert (f"error: init_from=auto: some processes see {tmp_path}/{rank}/flm.pt, others do "
                f"not; put out_dir on a disk that all nodes share") in said

# ---------------------------------------------------------------- what each is given

def test_micro_steps_must_go_round(toy):
    said = quick_run("train.py", *toy[1], *TINY, processes=2, status=1)
    assert ("error: gradient_accumulation_steps=1 must be a multiple of the 2 processes, which "
            "share the micro-steps of a step") in said


@pytest.mark.parametrize("device, world, taken", [
    ("auto", 1, 0), ("cuda", 1, 0), ("cuda:1", 1, 1), ("cuda", 4, 3)])
def test_every_process_takes_a_gpu_by_its_number(device, world, taken, monkeypatch):
    """PyTorch's own check of what it is asked to take, on a machine that only pretends to have
    one."""
    numbers = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "ones", lambda *size, device: None)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", numbers.append, raising=False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for name, value in (("RANK", world - 1), ("LOCAL_RANK", world - 1), ("WORLD_SIZE", world)):
        monkeypatch.setenv(name, str(value))
    machine = lib.Machine(device, "bfloat16")
    assert (machine.device, numbers) == (torch.device("cuda", taken), [taken])
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "5")
    with pytest.raises(SystemExit, match="process 5 of this machine has no GPU of its own: it sees "
                                         "4; start one process for each GPU"):
        lib.Machine("auto", "bfloat16")
    with pytest.raises(SystemExit, match="device=cuda:1 would put all processes on one GPU; use "
                                         "--device=cuda"):
        lib.Machine("cuda:1", "bfloat16")


def test_the_processor_has_a_name(monkeypatch):
    for text, name in (("flags: a\nmodel name\t: Some CPU 9\nmodel name\t: Some CPU 9\n",
                        "Some CPU 9"), ("flags: a\n", "cpu")):
        monkeypatch.setattr(lib.Path, "read_text", lambda path: text)
        assert lib.processor() == name
    monkeypatch.setattr(lib, "Path", lambda name: open("/no such file"))
    assert lib.processor() == "cpu"
