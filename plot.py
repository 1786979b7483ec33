"""Draw the validation losses of a run, from the logs that train.py and distill.py leave beside their checkpoints.

    python plot.py --out_dir=out/pydocs           # writes out/pydocs/loss.png

Left, the flow: cross-entropy in tenths of tau, late times (easy, nearly clean text) below early ones. Right, the flow
map: the loss of jumps in tenths of their length, and of the diagonal.
"""

import sys
from pathlib import Path

import common
import storage

out_dir = "out/pydocs"           # where flm.jsonl and fmlm.jsonl are; loss.png goes there too

settings = common.configure(globals(), sys.argv[1:])
globals().update(settings)

try:
    import matplotlib
except ImportError:
    common.fail("the figure needs matplotlib; run: pip install matplotlib")
matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)


def curves(name: str, bins: str) -> tuple[list[int], list[dict]]:
    """Steps and validation records of a log, or none when it does not exist."""
    kept = [record for record in storage.read_log(Path(out_dir) / name) if bins in record]
    return [record["step"] for record in kept], kept


figure, panels = plt.subplots(1, 2, figsize=(12, 4.5))
panel_of = [("flm.jsonl", "val_loss_by_tau", "tau", "Flow: cross-entropy"),
            ("fmlm.jsonl", "val_loss_by_length", "jump", "Flow map: loss of jumps by length")]
found = 0
for panel, (name, bins, label, title) in zip(panels, panel_of):
    steps, records = curves(name, bins)
    found += len(steps)
    for i in range(10):
        panel.plot(steps, [record[bins][i] for record in records], color=plt.cm.viridis(i / 10),
                   label=f"{label} {i / 10:.1f} to {(i + 1) / 10:.1f}")
    if name == "fmlm.jsonl":
        panel.plot(steps, [record["val_diagonal"] for record in records], "k--", label="diagonal")
    panel.set(title=title, xlabel="step", ylabel="nats per token, held-out text", ylim=(0, None))
    panel.legend(fontsize=7, ncols=2)
if not found:
    common.fail(f"no log in {out_dir}; train.py writes one")
figure.tight_layout()
storage.replace_file(Path(out_dir) / "loss.png", lambda file: figure.savefig(file, dpi=120, format="png"))
print(f"wrote {Path(out_dir) / 'loss.png'}")
