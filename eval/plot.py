"""Draw the validation losses of a run, from the logs of train.py and distill.py.

    python eval/plot.py --out_dir=out/pydocs      # writes out/pydocs/loss.png

Left: the flow's cross-entropy by tenths of tau, late times (nearly clean text) below early ones.
Right: the flow map's loss by tenths of the length of a jump, and that of the diagonal.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # the top folder
from lib.checkpoint import read_log, replace_file
from lib.settings import configure, fail

out_dir = "out/pydocs"           # reads flm.jsonl and fmlm.jsonl here, writes loss.png

settings = configure(globals(), sys.argv[1:])
globals().update(settings)

try:
    import matplotlib
except ImportError:
    fail("the figure needs matplotlib; run: pip install matplotlib")
matplotlib.use("Agg")
from matplotlib import pyplot as plt

figure, panels = plt.subplots(1, 2, figsize=(12, 4.5))
panel_of = [("flm.jsonl", "val_loss_by_tau", "tau", "Flow: cross-entropy"),
            ("fmlm.jsonl", "val_loss_by_length", "jump", "Flow map: loss of jumps by length")]
found = 0
for panel, (name, bins, label, title) in zip(panels, panel_of):
    records = [record for record in read_log(Path(out_dir) / name) if bins in record]
    steps = [record["step"] for record in records]
    found += len(steps)
    for i in range(10):
        panel.plot(steps, [record[bins][i] for record in records], color=plt.cm.viridis(i / 10),
                   label=f"{label} {i / 10:.1f} to {(i + 1) / 10:.1f}")
    if name == "fmlm.jsonl":
        panel.plot(steps, [record["val_diagonal"] for record in records], "k--", label="diagonal")
    panel.set(title=title, xlabel="step", ylabel="nats per token, held-out text", ylim=(0, None))
    panel.legend(fontsize=7, ncols=2)
if not found:
    fail(f"no log in {out_dir}; train.py writes one")
figure.tight_layout()
path = Path(out_dir) / "loss.png"
replace_file(path, lambda file: figure.savefig(file, dpi=120, format="png"))
print(f"wrote {path}")
