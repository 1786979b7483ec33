"""Every test: the repository root on the path, no network, few threads, the same random numbers."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402  (after the path and the environment)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
