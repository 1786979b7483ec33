"""Make small checkpoints of a finished run: only the averaged weights, in bfloat16.

    python weights/pack.py out/stories weights/stories      # flm.pt; mended.pt or fmlm.pt

sample.py, distill.py (as a teacher) and eval/evaluate.py read them like others.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # the top folder
from lib.checkpoint import load_checkpoint, replace_file
from lib.settings import fail

if len(sys.argv) != 3:
    fail("name a run's out_dir and a folder to write, such as out/stories weights/stories")
source, target = map(Path, sys.argv[1:])
for kind in ("flm", "fmlm"):
    mended = kind == "fmlm" and (source / "mended.pt").exists()
    read = source / ("mended.pt" if mended else f"{kind}.pt")
    checkpoint = load_checkpoint(read, kind)
    small = {key: value for key, value in checkpoint.items()
             if key not in ("model", "optimizers", "scaler", "draft_bias")}
    small["ema"] = {name: p.bfloat16() for name, p in checkpoint["ema"].items()}
    path = target / f"{kind}.pt"
    replace_file(path, lambda file: torch.save(small, file))
    print(f"{read} -> {path}: {path.stat().st_size / 1e6:.1f} MB")
