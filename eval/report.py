"""What the measurements of evidence.py show: tables, verdicts, figures and results/README.md.

All of it follows from the folder `results`: a folder for each set, in it a file for each model and
seed, as evaluate.py wrote it, with its learning rate and the core seconds of its training.
"""

import json
import math
import statistics
from itertools import pairwise
from pathlib import Path

import numpy as np

from eval import metrics
from lib.checkpoint import replace_file
from lib.settings import fail

STEPS = (1, 2, 4, 8, 16, 32, 128)
HEADLINE = {"flm": 128, "gamma": 128, "mdlm": 128, "duo": 128,      # the steps of the claims
            "psd": 1, "sdtt": 8, "dcd": 8}
SHOWN = {"ar": "autoregressive, a step a token", "mdlm": "MDLM", "sdtt": "SDTT", "duo": "Duo",
         "dcd": "DCD", "flm": "FLM", "gamma": "FLM, gamma 0.9", "psd": "FMLM, PSD",
         "psd-long": "FMLM, PSD, four times as long", "psd-short": "FMLM, PSD, short",
         "self-short": "FMLM, PSD without a teacher, short",
         "psd_published-short": "FMLM, PSD, short, published mix",
         "lsd_published-short": "FMLM, LSD, short, published mix",
         "esd_published-short": "FMLM, ESD, short, published mix",
         "mse": "FLM, squared error", "noclock": "FLM, no clock",
         "dense": "FLM, V-dimensional noise", "clock0": "FLM, published clock",
         "clock1": "FLM, clock of d coordinates"}
CURVES = {"mdlm": "C0o-", "sdtt": "C0o--", "duo": "C1o-", "dcd": "C1o--",   # dashed: distilled
          "flm": "C2o-", "psd": "C2o--"}
DIFFERENT, UNEVEN = 0.95, 0.1    # puzzles: least share of different texts, most KL of the letters
STUDENT = (0, 0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)    # at 0.975, by n

# ------------------------------------------------------------------------- from files to numbers

def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def found(folder: Path, name: str) -> list[dict]:
    """The measurements of a model, one a seed. "*": of all models."""
    return [read(file) for file in sorted(folder.glob(f"{name}-seed*.json"))]


def measured_sets(results: Path) -> list[Path]:
    return sorted({file.parent for file in results.glob("*/*-seed*.json")})


def is_puzzle(record: dict) -> bool:
    """Whether texts are right or wrong, as palindromes are."""
    return "valid" in record["rows"][-1]


def best_row(record: dict, steps: int) -> dict | None:
    """The temperature with the most valid texts. Those that repeat texts or neglect letters, which
    makes a puzzle easy, count only if there are no others."""
    rows = [row for row in record["rows"] if row.get("steps") == steps]
    varied = [row for row in rows if row["different"]["value"] >= DIFFERENT
              and row["unigram_kl"]["value"] <= UNEVEN]
    return max(varied or rows, key=lambda row: row["valid"]["value"], default=None)


def score(record: dict, steps: int) -> dict | None:
    """The result of a measurement as value, low and high: the share of valid texts, or the
    perplexity under the last scorer at the entropy of held-out text. None if it was not reached."""
    if is_puzzle(record):
        row = best_row(record, steps)
        return row and row["valid"]
    by_scorer = next(iter(record["matched"].values()), {}).get(str(steps), {})
    return by_scorer.get(record["scorers"][-1])


def scores(records: list[dict], steps: int) -> tuple[list[float], float]:
    return values_and_error([s for record in records if (s := score(record, steps))])


def values_and_error(have: list[dict]) -> tuple[list[float], float]:
    """The values of the seeds and half the 95% interval of their mean, from the spread of the seeds
    (Student's) or from that of the samples, whichever is larger."""
    values, n = [s["value"] for s in have], len(have)
    if not values:
        return [], math.inf
    of_samples = max((s["high"] - s["low"]) / 2 for s in have) / n ** 0.5
    spread = statistics.stdev(values) if n > 1 else 0
    return values, max(of_samples, STUDENT[min(n, len(STUDENT) - 1)] * spread / n ** 0.5)


def at_rare_share(record: dict, steps: int) -> dict | None:
    """`score` at held-out text's share of rare tokens, between measured neighbours of the sweep.
    The interval treats the errors of the rows as normal and independent."""
    row_at = {(row["temperature"], row.get("noise_scale", 1.0)): row
              for row in record["rows"][1:] if row["steps"] == steps}
    temperatures, scales = (
        sorted(float(x) for x in record["settings"][key].split(",") if x not in ("", "argmax"))
        for key in ("temperatures", "noise_scales"))
    swept = metrics.sweep(record["rows"][-1]["kind"], steps, temperatures, scales)
    pairs = [pair for pair in pairwise(swept) if all(point in row_at for point in pair)]
    columns = "rare_256", f"perplexity {record['scorers'][-1]}"
    value, low, high = (np.array([[[row_at[point][column][key] for column in columns]
                                   for point in pair] for pair in pairs])       # (k, 2, 2)
                        for key in ("value", "low", "high"))
    target = record["rows"][0]["rare_256"]["value"]

    def at(values):
        crossings = (metrics.entropy_matched(pair[:, 0], np.log(pair[:, 1].clip(1)), target)
                     for pair in values)
        return next((math.exp(x) for x in crossings if x is not None), math.nan)
    if math.isnan(at(value)):
        return None
    normal = np.random.default_rng(0).normal(size=(500, *value.shape))
    again = [at(value + (high - low) / (2 * 1.96) * noise) for noise in normal]
    low, high = np.nanquantile(again, [0.025, 0.975])
    return dict(value=at(value), low=float(low), high=float(high))


# --------------------------------------------------------------------------- from numbers to words

def entry(records: list[dict], steps: int) -> str:
    """The mean over the seeds and its error. Remarks: seeds that did not reach the entropy; puzzles
    whose samples repeat themselves or neglect letters."""
    values, error = scores(records, steps)
    records = [r for r in records if any(row.get("steps") == steps for row in r["rows"])]
    if not values:
        return "entropy not reached" if records else ""
    form, reached = ".0f", f"{len(values)} of {len(records)} seeds"
    remarks = f", {reached}" if len(values) < len(records) else ""
    if is_puzzle(records[0]):
        rows, form = [best_row(r, steps) for r in records], ".3f"
        different = min(row["different"]["value"] for row in rows)
        uneven = max(row["unigram_kl"]["value"] for row in rows)
        remarks += f", {different:.2f} different" if different < DIFFERENT else ""
        remarks += f", letters off by {uneven:.2f} nats" if uneven > UNEVEN else ""
    return f"{statistics.mean(values):{form}} ± {error:{form}}{remarks}"


def rare_entry(records: list[dict], steps: int) -> str:
    records = [r for r in records if any(row.get("steps") == steps for row in r["rows"])]
    values, error = values_and_error([x for r in records if (x := at_rare_share(r, steps))])
    if values:
        return f"{statistics.mean(values):.0f} ± {error:.0f}"
    return "not reached" if records else ""


def row_of(*cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def header(*cells) -> list[str]:
    return ["", row_of(*cells), "|---" * len(cells) + "|"]


def table(folder: Path) -> list[str]:
    """Every model at every number of steps, and its core seconds on the commonest machine."""
    lines = header("steps", *STEPS, "training, core seconds")
    machine = statistics.mode(record["machine"] for record in found(folder, "*"))
    for name, title in SHOWN.items():
        if records := found(folder, name):
            short = name in HEADLINE and records[0].get("share", 1) < 1
            seconds = [record["seconds"] for record in records if record["machine"] == machine]
            lines.append(row_of(title + " (short was best)" * short,
                                *(entry(records, steps) for steps in STEPS),
                                round(statistics.mean(seconds)) if seconds else ""))
    return lines


def rare_table(folder: Path) -> list[str]:
    cells = {title: [rare_entry(found(folder, name), steps) for steps in STEPS]
             for name, title in SHOWN.items()}
    return ["", "Perplexity at held-out text's share of rare tokens, those outside the 256 most "
            "common:", *header("steps", *STEPS),
            *(row_of(title, *row) for title, row in cells.items() if any(row))]


# ------------------------------------------------------------------------------------- the claims

def claims(puzzle: bool) -> list[tuple]:
    """What is better than what, each a model and its steps; True: no worse is enough."""
    many, ablated = [("mdlm", 128), ("duo", 128)], 4 if puzzle else 128    # 8 solve palindromes
    psd, esd, lsd = ((f"{name}_published-short", 1) for name in ("psd", "esd", "lsd"))
    return [("a flow matches discrete diffusion at many steps", ("flm", 128), many, True),
            ("and so does a flow with gamma sampling, which is ours", ("gamma", 128), many, True),
            ("one step of a flow map beats eight of distilled discrete diffusion",
             ("psd", 1), [("sdtt", 8), ("dcd", 8)], False),
            ("semigroup beats Eulerian distillation in one step", psd, [esd], False),
            ("Eulerian beats Lagrangian distillation in one step", esd, [lsd], False),
            ("cross-entropy beats squared error", ("flm", ablated), [("mse", ablated)], False),
            ("the clock is needed", ("flm", ablated), [("noclock", ablated)], False)]


def verdicts(folder: Path) -> dict[str, str]:
    """Claim: verdict and numbers, if a rival was measured. A difference counts if it exceeds both
    errors, added as of independent numbers."""
    told, puzzle = {}, is_puzzle(found(folder, "*")[0])
    for claim, ours, rivals, no_worse in claims(puzzle):
        pairs = [ours, *rivals]
        entries = [entry(found(folder, name), steps) for name, steps in pairs]
        if not any(entries[1:]):
            continue
        (values, error), *others = [scores(found(folder, name), steps) for name, steps in pairs]
        leads = [((statistics.mean(values) - statistics.mean(theirs)) * (1 if puzzle else -1),
                  math.hypot(error, their_error))
                 for theirs, their_error in others if values and theirs]
        if any(lead < -margin for lead, margin in leads):
            verdict = "does not hold"
        elif len(leads) < len(others):
            verdict = "cannot be compared at equal entropy" if all(entries) else "not measured"
        elif no_worse or all(lead > margin for lead, margin in leads):
            verdict = "holds"
        else:
            verdict = "within the error"
        numbers = ", ".join(f"{SHOWN[name]} at {steps}: {words or 'not measured'}"
                            for (name, steps), words in zip(pairs, entries))
        told[claim] = f"**{verdict}** ({numbers})"
    return told


def summary(folders: list[Path]) -> list[str]:
    told = {name_of(folder): of for folder in folders if (of := verdicts(folder))}
    return [*header("claim", *told),
            *(row_of(claim, *(of.get(claim, "not measured") for of in told.values()))
              for claim, *_ in claims(False) if any(claim in of for of in told.values()))]


# ------------------------------------------------------------------- results/README.md and figures

START, END = "<!-- from here on written by eval/evidence.py -->", "<!-- up to here -->"


def name_of(folder: Path) -> str:
    record = found(folder, "*")[0]
    return "Palindromes" if is_puzzle(record) else f"Python's prose, V = {record['vocabulary']:,}"


def section(results: Path) -> str:
    """The generated part of results/README.md."""
    lines = summary(measured_sets(results))
    for folder in measured_sets(results):
        record = found(folder, "*")[0]
        what = "Share of valid ones; larger is better."
        if not is_puzzle(record):
            what = (f"Perplexity under {record['scorers'][-1]} at the entropy of held-out text; "
                    "smaller is better.")
        lines += ["", f"## {name_of(folder)}", "", what, *table(folder)]
        lines += [] if is_puzzle(record) else rare_table(folder)
        lines += ["", f"![quality against steps]({folder.name}.png)"] if curves(folder) else []
    return "\n".join([*lines, "", ""])


def write_readme(results: Path) -> None:
    path = results / "README.md"
    text = path.read_text() if path.exists() else START + END + "\n"
    if START not in text or END not in text:
        fail(f"{path} has no lines {START} and {END} to write between")
    text = text.split(START)[0] + START + "\n" + section(results) + END + text.split(END)[1]
    replace_file(path, lambda file: file.write(text.encode()))


def curves(folder: Path) -> dict[str, list[tuple]]:
    """(steps, mean, error) of each model in the figure that was measured at several steps."""
    points = {name: [(steps, statistics.mean(values), error) for steps in STEPS
                     for values, error in [scores(found(folder, name), steps)] if values]
              for name in CURVES}
    return {name: of for name, of in points.items() if len(of) > 1}


def draw(folder: Path) -> None:
    """Quality against steps: results/<set>.png. None of a set without curves."""
    if not curves(folder):
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        fail("the figures need matplotlib; run: pip install matplotlib")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes, puzzle = figure.subplots(), is_puzzle(found(folder, "*")[0])
    for name, points in curves(folder).items():
        axes.errorbar(*zip(*points), fmt=CURVES[name], markersize=4, capsize=2, label=SHOWN[name])
    axes.set(title=name_of(folder), xlabel="steps", xscale="log",
             ylabel="share of valid texts" if puzzle else "perplexity at equal entropy")
    axes.set_xticks(STEPS, STEPS)
    axes.minorticks_off()
    figure.legend(loc="outside right center", frameon=False)
    replace_file(folder.with_suffix(".png"), lambda file: figure.savefig(file, dpi=110))
