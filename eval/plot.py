"""Show the validation losses of a run, from the logs of train.py and distill.py.

    python eval/plot.py --out_dir=out/stories

Prints them, a line a curve from the first step to the last, and, where there is matplotlib, draws
out_dir/loss.png. First the flow's cross-entropy by tenths of tau: early times are hard, late ones
(nearly clean text) easy. Then the flow map's loss by tenths of the length of a jump, and that of
the diagonal. Then, of a mended map, the cross-entropy of mended drafts.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # the top folder
from lib.checkpoint import read_log, replace_file
from lib.settings import configure, fail

out_dir = "out/stories"          # reads flm, fmlm and mended.jsonl here, writes loss.png

settings = configure(globals(), sys.argv[1:])
globals().update(settings)

BARS = "▁▂▃▄▅▆▇█"
panels = []                                                         # title, steps, {label: losses}
for name, bins, label, title in (
        ("flm.jsonl", "val_loss_by_tau", "tau", "Flow: cross-entropy"),
        ("fmlm.jsonl", "val_loss_by_length", "jump", "Flow map: loss of jumps by length"),
        ("mended.jsonl", "val_loss_by_length", "jump", "Mended map: loss of jumps to the end")):
    records = [record for record in read_log(Path(out_dir) / name) if bins in record]
    curves = {f"{label} {i / 10:.1f} to {(i + 1) / 10:.1f}": [record[bins][i] for record in records]
              for i in range(10)}
    if name == "fmlm.jsonl":
        curves["diagonal"] = [record["val_diagonal"] for record in records]
    if records:
        panels.append((title, [record["step"] for record in records], curves))
if not panels:
    fail(f"no log in {out_dir}; train.py writes one")

for title, steps, curves in panels:
    print(f"{title}, nats per token of held-out text, steps {steps[0]} to {steps[-1]}")
    top = max(y or 0 for curve in curves.values() for y in curve) or 1
    for label, curve in curves.items():
        known = [y for y in curve if y is not None] or [0]
        bars = "".join(" " if y is None else BARS[min(7, int(8 * y / top))]
                       for y in curve[::-(-len(curve) // 60)])
        print(f"{label:15} {bars}  {known[0]:.2f} -> {known[-1]:.2f}")

try:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
except ImportError:
    sys.exit()                                                      # it is only for the picture
figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False)
for ax, (title, steps, curves) in zip(axes[0], panels):
    for i, (label, curve) in enumerate(curves.items()):
        style = dict(color="k", ls="--") if i == 10 else dict(color=plt.cm.viridis(i / 10))
        ax.plot(steps, curve, label=label, **style)
    ax.set(title=title, xlabel="step", ylabel="nats per token, held-out text", ylim=(0, None))
    ax.legend(fontsize=7, ncols=2)
figure.tight_layout()
path = Path(out_dir) / "loss.png"
replace_file(path, lambda file: figure.savefig(file, dpi=120, format="png"))
print(f"wrote {path}")
