"""Every test: the top folder on the path, no network, one thread, the same random numbers. And a
toy run for those that ask."""

import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # files of tests run side by side

import torch


@pytest.fixture(autouse=True)
def undisturbed_by_other_tests():
    torch.manual_seed(0)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():  # programs run in this process install their own
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with the toy set in data/ and, in out/, a flow and a flow map trained on it for six
    steps; the settings of both; what train.py and distill.py printed. Tests must not write there.
    """
    import programs
    folder = tmp_path_factory.mktemp("toy")
    programs.write_toy(folder / "data")
    common = [f"--dataset={folder / 'data'}", f"--out_dir={folder / 'out'}", *programs.QUICK]
    train = programs.run("train.py", *common, *programs.TINY)
    distill = programs.run("distill.py", *common, "--batch_size", 8)
    return folder, common, train, distill
