"""Draw the pictures of the README. Needs both networks of config/palindromes.py.

    python docs/figures.py           # into docs/; --seed=2 for another text

clock.png      the chance that argmax x_t is the right token, on t and on the clock
emerging.png   one palindrome from noise: eight steps of the flow above, one jump of its map below
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # the top folder
import flow
from lib import checkpoint as ckpt
from lib.machine import SAMPLE_NOISE, generator
from lib.settings import configure, fail

out_dir = "out/palindromes"      # where train.py and distill.py wrote
to = "docs"                      # the folder of the pictures
seed = 1                         # of the noise: another seed, another text

settings = configure(globals(), sys.argv[1:])
globals().update(settings)
try:
    import matplotlib
except ImportError:
    fail("the figures need matplotlib; run: pip install matplotlib")
matplotlib.use("Agg")
from matplotlib import pyplot as plt

STEPS = 8                        # of the flow: as many as the pictures have room for
INK, PALE, FLOW, MAP = "#1f2933", "#7b8794", "#1f5fa8", "#c2410c"
plt.rcParams.update({"font.size": 13, "axes.edgecolor": PALE, "savefig.dpi": 160})

# ------------------------------------------------------------------------------ the clock

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
even = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)         # tau, in equal steps
for V, color, width in (26, "#f2a541", 6.5), (1024, "#2a9d8f", 4), (50257, "#1d3557", 1.6):
    clock = flow.Clock(V)
    for panel, line, dots in (left, clock.t, clock.t_of_tau(even)), (right, clock.tau, even):
        panel.plot(line, (1 + (V - 1) * clock.tau) / V, color=color, lw=width, label=f"V = {V:,}")
        panel.plot(dots, (1 + (V - 1) * even) / V, "o", color=color, ms=width + 4, mec="white")
        panel.spines[["top", "right"]].set_visible(False)
left.set(xlabel="time t, the share of text in $x_t$", title="By time t: nothing, then all at once",
         ylabel="chance that argmax $x_t$\nis the right token")
right.set(xlabel="clock τ", title="By the clock τ: three straight lines")
left.legend(frameon=False, loc="upper left")
right.text(0.98, 0.04, "Dots, left and right:\neight equal steps of τ", ha="right")
figure.suptitle("On its clock, every vocabulary is decoded at the same pace", size=17, weight=700)
ckpt.replace_file(Path(to) / "clock.png", figure.savefig)

# ------------------------------------------------------------------------------ a text, two ways

files = [ckpt.load_checkpoint(Path(out_dir) / f"{kind}.pt", kind) for kind in ("flm", "fmlm")]
flow_net, map_net = (ckpt.build_model(file, torch.device("cpu")) for file in files)
V, L, d = (getattr(flow_net.config, key) for key in ("vocab_size", "block_size", "n_embd"))
if (V, L) != (26, 8):
    fail(f"{out_dir} has texts of {L} tokens out of {V}; the pictures have room for palindromes")
clock = flow.Clock(V, d, files[0]["clock_embedding_share"])
letters = [ckpt.find_tokenizer(files[0], "").decode([i]) for i in range(V)]


def guess(net, x: torch.Tensor, *taus: torch.Tensor) -> torch.Tensor:
    """The distributions (B, L, V) that a network gives for states x (B, L, V) at times (1,)."""
    return net.head(net(x @ net.embed.weight, *taus)).softmax(-1)


with torch.no_grad():  # with 26 letters the state can be held, and drawn, as x instead of z = x E
    noise = x = torch.randn(256, L, V, generator=generator(seed, SAMPLE_NOISE, 0))
    jump, guesses = guess(map_net, x, even[:1], even[-1:]), []      # delta_{0,1}
    for here, there in zip(even[:-1].split(1), even[1:].split(1)):
        guesses.append(guess(flow_net, x, here))                    # D_s
        x = flow.move(x, guesses[-1], clock.t_of_tau(here), clock.t_of_tau(there))
text = jump.argmax(-1)                                              # (B, L)
good = ((text == text.flip(1)) & (text == guesses[-1].argmax(-1))).all(1)
if not good.any():
    fail(f"from none of {len(good)} noises both networks write the same palindrome; train longer")
pick = good.int().argmax()                                          # the first
noise = (noise[pick] + 2) / 5                                       # about 0 to 1 for the eye
jump, *guesses = (p[pick].sqrt() for p in (jump, *guesses))         # small ones to be seen


def draw(panel, array: torch.Tensor, hue: str, y: float, size: float, color: str) -> None:
    """A heat map of an array (L, V), a column for each position, and its largest letters at y."""
    shades = matplotlib.colors.LinearSegmentedColormap.from_list("", ["white", hue])
    panel.imshow(array.T, shades, vmin=0, vmax=1, aspect="auto")
    panel.set(xticks=[], yticks=range(0, V, 5), yticklabels=letters[::5])
    for i, token in enumerate(array.argmax(-1)):
        panel.text((i + 0.5) / L, y, letters[token], transform=panel.transAxes, ha="center",
                   va="center", family="monospace", weight=700, size=size, color=color)


labels = ["noise", "τ = 0", *(f"τ = {i}/8" for i in range(1, STEPS)), "τ: 0 → 1"]
title = "One jump lands where eight steps do"
figure = plt.figure(figsize=(10, 6.6))
figure.suptitle(title, size=20, weight=700, y=0.985)
flow_row = [(0, i, array) for i, array in enumerate([noise, *guesses])]
for row, i, array in [*flow_row, (1, 0, noise), (1, STEPS, jump)]:
    x, y = 0.035 + 0.1095 * i, 0.525 - 0.46 * row
    panel = figure.add_axes((x, y, 0.085, 0.29))
    hue = (INK, FLOW, MAP)[min(i, 1 + row)]
    draw(panel, array, hue, -0.065, 12.5, hue if i == STEPS else PALE)
    panel.set_title(labels[-1 if row and i else i], size=13)
    if i:
        panel.set_yticks([])
        figure.text(x - 0.0222, y + 0.133, "" if row else "→", size=17, color=FLOW)
panel.annotate("", (0.905, 0.205), (0.13, 0.205), "figure fraction",
               arrowprops=dict(color=MAP, width=5, headwidth=18))
bold = dict(size=16, weight=700)
figure.text(0.1445, 0.88, "The flow: eight network evaluations, step by step", color=FLOW, **bold)
figure.text(0.1445, 0.25, "The flow map: one network evaluation, one jump", color=MAP, **bold)
figure.text(0.0685, 0.43, "↕ the same noise", size=16)
figure.text(0.9625, 0.43, "the same text ↕", size=16, ha="right")
figure.text(0.1445, 0.085, "Columns: the eight positions. Rows: the letters a to z,\n"
            "the darker, the likelier. Below: the likeliest letters.")
ckpt.replace_file(Path(to) / "emerging.png", figure.savefig)
print(f"wrote 2 pictures to {to}; both networks agree on {good.sum()} of {len(good)} texts")
