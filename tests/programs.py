"""What tests of the programs share: running one, reading what it left, and a toy set."""

import json
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from data import corpus, tokenizer
from model import FlowTransformer, ModelConfig

TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--n_time=8", "--block_size=8",
        "--batch_size=8"]
QUICK = ["--max_iters=6", "--eval_interval=3", "--eval_iters=2", "--log_interval=1",
         "--device=cpu", "--dtype=float32"]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
TWO = (*TORCHRUN, "--standalone", "--nproc_per_node=2")


def start(*command, launcher=(sys.executable,)):
    """Start a program as a user would, with Python or torchrun."""
    return subprocess.Popen([*launcher, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def run(*command, status=0, launcher=(sys.executable,)):
    """stdout of a program, which must end with this status; stderr when that is not 0."""
    process = start(*command, launcher=launcher)
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, out + err
    return out if status == 0 else err.strip()


# Starting Python and PyTorch takes seconds, and there are dozens of runs. These fork instead, from
# a process that has imported PyTorch.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed", "numpy", "tiktoken",
                               "pytest"])


def become(words, environment, output):
    """Turn this process into a run of the program."""
    os.chdir(ROOT)
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.argv = words
    sys.path[0] = str(ROOT)
    runpy.run_path(words[0], run_name="__main__")


class Fork:
    """A program in one or more forked processes, made one run by torchrun's variables."""

    def __init__(self, *command, processes=1):
        self.output = Path(tempfile.mkdtemp())
        group = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
                     MASTER_PORT=str(free_port()))
        words = [str(word) for word in command]
        self.processes = [SERVER.Process(target=become, args=(
            words, dict(group, RANK=str(rank), LOCAL_RANK=str(rank)), self.output / str(rank)))
            for rank in range(processes)]
        for process in self.processes:
            process.start()

    def running(self):
        return all(process.is_alive() for process in self.processes)

    def signal(self, number):
        for process in self.processes:
            os.kill(process.pid, number)

    def end(self):
        """Wait. Exit statuses, and all that was written to stdout and to stderr."""
        for process in self.processes:
            process.join(120)
        out, err = ("".join(path.read_text() for path in sorted(self.output.glob(f"*.{name}")))
                    for name in ("out", "err"))
        shutil.rmtree(self.output)
        return [process.exitcode for process in self.processes], out, err


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def quick_run(*command, status=0, processes=1):
    """`run` by `Fork`."""
    statuses, out, err = Fork(*command, processes=processes).end()
    assert statuses == [status] * processes, out + err
    return out if status == 0 else err.strip()


def inside(monkeypatch, *command):
    """Run a program in this process, where its parts can be watched or replaced; its globals."""
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    monkeypatch.chdir(ROOT)
    return runpy.run_path(command[0], run_name="__main__")


def mistake(monkeypatch, *command):
    """The error a program ends with. It runs in this process, since starting PyTorch for each would
    take minutes. Any other exception fails the test: a user would see a traceback."""
    with pytest.raises(SystemExit) as stopped:
        inside(monkeypatch, *command)
    return stopped.value.code  # sys.exit(text) prints the text on stderr and ends with status 1


def write_set(folder: Path, text: str):
    """A set of `text` in characters, the first 400 also held out."""
    encoding = tokenizer.char_encoding(text, "toy")
    ids = np.array(encoding.encode(text))
    corpus.write_bins(folder, encoding, [ids], [ids[:400]], None)


def write_toy(folder: Path):
    """2,000 tokens, V = 16."""
    write_set(folder, "the cat sat on the mat. a dog ran to the red hut.\n" * 40)


def write_told(path: Path, L: int, enc, flow_map=True, seed=0, share=0.5, end=-99):
    """A checkpoint that can be told tokens, of random weights. Its texts do not end early, unless
    the bias of the end of text is large. E is the same for every seed."""
    torch.manual_seed(seed)
    config = ModelConfig(enc.n_vocab, L, 1, 2, 16, 8, flow_map=flow_map, context=True)
    net = FlowTransformer(config)
    for name, p in net.named_parameters():
        if name.startswith("head") or "modulation" in name and "bias" in name or name == "known":
            torch.nn.init.normal_(p)
    torch.nn.init.normal_(net.embed.weight, generator=torch.Generator().manual_seed(0))
    net.head.bias.data[list(enc._special_tokens.values())] = end
    torch.save(dict(
        format="flm-1", kind="fmlm" if flow_map else "flm", model_config=asdict(config), step=1,
        ema=net.state_dict(), clock_embedding_share=0.0, settings=dict(context_share=share),
        checker=None, tokenizer=tokenizer.to_dict(enc), vocabulary=""), path)


def log(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(a, b):
    """Equal to the bit, also tensors in nested dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
