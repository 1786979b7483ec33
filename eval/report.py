"""What the measurements of evidence.py show: tables, verdicts, figures and results/README.md.

All of it follows from the folder `results`: a folder for each set, in it a file for each model and
seed, as evaluate.py wrote it, with its learning rate and the core seconds of its training.
"""

import json
import math
import statistics
from pathlib import Path

from lib.checkpoint import replace_file
from lib.settings import fail

TITLES = {"palindromes": "Palindromes", "stories": "Stories"}       # the sets, by folder
HEADLINE = {"flm": 128, "gamma": 128, "mdlm": 128, "duo": 128,      # the steps of the claims
            "psd": 1, "mended": 1, "sdtt": 8, "dcd": 8}
SHOWN = {"ar": "autoregressive, a step a token",                    # @: at this temperature alone
         "mdlm": "MDLM", "mdlm@1": "MDLM, temperature 1", "mdlm@0.5": "MDLM, temperature 0.5",
         "sdtt": "SDTT", "duo": "Duo", "duo@1": "Duo, temperature 1",
         "duo@0.5": "Duo, temperature 0.5", "dcd": "DCD", "flm": "FLM", "gamma": "FLM, gamma 0.9",
         "psd": "FMLM, PSD", "mended": "FMLM, PSD, mended (ours)",
         "psd-long": "FMLM, PSD, four times as long", "psd-short": "FMLM, PSD, short",
         "self-short": "FMLM, PSD without a teacher, short",
         "psd_published-short": "FMLM, PSD, short, published mix",
         "lsd_published-short": "FMLM, LSD, short, published mix",
         "esd_published-short": "FMLM, ESD, short, published mix",
         "mse": "FLM, squared error", "noclock": "FLM, no clock"}
CURVES = {"mdlm": "C0o-", "sdtt": "C0o--", "duo": "C1o-", "dcd": "C1o--",   # dashed: distilled
          "flm": "C2o-", "psd": "C2o--", "mended": "C3o--"}
DIFFERENT, UNEVEN = 0.95, 0.1    # the least share of different texts, the most KL of the tokens
STUDENT = (0, 0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)    # at 0.975, by n

# ------------------------------------------------------------------------- from files to numbers

def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def found(folder: Path, name: str) -> list[dict]:
    """The measurements of a model, one a seed; of "model@T" the rows at temperature T. "*": of all
    models."""
    name, _, temperature = name.partition("@")
    records = [read(file) for file in sorted(folder.glob(f"{name}-seed*.json"))]
    for record in records if temperature else ():
        record["rows"] = [row for row in record["rows"]
                          if row.get("temperature") == float(temperature)]
    return records


def measured_sets(results: Path) -> list[Path]:
    return [results / name for name in TITLES if any((results / name).glob("*-seed*.json"))]


def steps_in(folder: Path) -> list[int]:
    """All numbers of steps that were measured."""
    return sorted({row["steps"] for record in found(folder, "*") for row in record["rows"]
                   if "steps" in row})


def best_row(record: dict, steps: int) -> dict | None:
    """The temperature with the most valid texts. Those that repeat texts or neglect tokens, which
    makes the task easy, count only if there are no others."""
    rows = [row for row in record["rows"] if row.get("steps") == steps]
    varied = [row for row in rows if row["different"]["value"] >= DIFFERENT
              and row["unigram_kl"]["value"] <= UNEVEN]
    return max(varied or rows, key=lambda row: row["valid"]["value"], default=None)


def best_rows(records: list[dict], steps: int) -> list[dict]:
    return [row for record in records if (row := best_row(record, steps))]


def scores(records: list[dict], steps: int) -> tuple[list[float], float]:
    return values_and_error([row["valid"] for row in best_rows(records, steps)])


def values_and_error(have: list[dict]) -> tuple[list[float], float]:
    """The values of the seeds and half the 95% interval of their mean, from the spread of the seeds
    (Student's) or from that of the samples, whichever is larger."""
    values, n = [s["value"] for s in have], len(have)
    if not values:
        return [], math.inf
    of_samples = max((s["high"] - s["low"]) / 2 for s in have) / n ** 0.5
    spread = statistics.stdev(values) if n > 1 else 0
    return values, max(of_samples, STUDENT[min(n, len(STUDENT) - 1)] * spread / n ** 0.5)


# --------------------------------------------------------------------------- from numbers to words

def entry(records: list[dict], steps: int) -> str:
    """The mean over the seeds and its error. Remarks: samples that repeat themselves or neglect
    tokens."""
    rows, (values, error) = best_rows(records, steps), scores(records, steps)
    if not rows:
        return ""
    different = min(row["different"]["value"] for row in rows)
    uneven = max(row["unigram_kl"]["value"] for row in rows)
    return (f"{statistics.mean(values):.3f} ± {error:.3f}"
            + f", {different:.2f} different" * (different < DIFFERENT)
            + f", tokens off by {uneven:.2f} nats" * (uneven > UNEVEN))


def row_of(*cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def header(*cells) -> list[str]:
    return ["", row_of(*cells), "|---" * len(cells) + "|"]


def table(folder: Path) -> list[str]:
    """Every model at every number of steps, and its core seconds on the commonest machine."""
    columns = steps_in(folder)
    lines = header("steps", *columns, "training, core seconds")
    machine = statistics.mode(record["machine"] for record in found(folder, "*"))
    for name, title in SHOWN.items():
        cells = [entry(found(folder, name), steps) for steps in columns]
        if any(cells):
            records = found(folder, name)
            short = name in HEADLINE and records[0].get("share", 1) < 1
            seconds = [record["seconds"] for record in records if record["machine"] == machine]
            lines.append(row_of(title + " (short was best)" * short, *cells,
                                round(statistics.mean(seconds)) if seconds else ""))
    return lines


# ------------------------------------------------------------------------------------- the claims

# What is better than what, each a model and its steps; True: no worse is enough. Four steps where
# flows are compared with each other, since in eight all write palindromes.
PSD, ESD, LSD = ((f"{name}_published-short", 1) for name in ("psd", "esd", "lsd"))
CLAIMS = [
    ("a flow matches discrete diffusion in 128 steps", ("flm", 128), [("mdlm", 128), ("duo", 128)],
     True),
    ("and so does a flow with gamma sampling, which is ours", ("gamma", 128),
     [("mdlm", 128), ("duo", 128)], True),
    ("one step of a flow map beats eight of discrete diffusion", ("psd", 1),
     [("mdlm", 8), ("duo", 8)], False),
    ("two steps of a flow map beat sixteen of discrete diffusion", ("psd", 2),
     [("mdlm", 16), ("duo", 16)], False),
    ("one step of a mended flow map, ours, beats eight of discrete diffusion", ("mended", 1),
     [("mdlm", 8), ("duo", 8)], False),
    ("two steps of a mended flow map, ours, beat sixteen of discrete diffusion", ("mended", 2),
     [("mdlm", 16), ("duo", 16)], False),
    ("one step of a flow map beats eight of distilled discrete diffusion", ("psd", 1),
     [("sdtt", 8), ("dcd", 8)], False),
    ("semigroup beats Eulerian distillation in one step", PSD, [ESD], False),
    ("Eulerian beats Lagrangian distillation in one step", ESD, [LSD], False),
    ("cross-entropy beats squared error", ("flm", 4), [("mse", 4)], False),
    ("the clock is needed", ("flm", 4), [("noclock", 4)], False)]


def verdicts(folder: Path) -> dict[str, str]:
    """Claim: verdict and numbers, if it and a rival were measured. A difference counts if it
    exceeds both errors, added as of independent numbers."""
    told = {}
    for claim, ours, rivals, no_worse in CLAIMS:
        pairs = [ours, *rivals]
        entries = [entry(found(folder, name), steps) for name, steps in pairs]
        if not entries[0] or not any(entries[1:]):
            continue
        (values, error), *others = [scores(found(folder, name), steps) for name, steps in pairs]
        leads = [(statistics.mean(values) - statistics.mean(theirs), math.hypot(error, their_error))
                 for theirs, their_error in others if values and theirs]
        if any(lead < -margin for lead, margin in leads):
            verdict = "does not hold"
        elif len(leads) < len(others):
            verdict = "not measured"
        elif no_worse or all(lead > margin for lead, margin in leads):
            verdict = "holds"
        else:
            verdict = "within the error"
        numbers = ", ".join(f"{SHOWN[name]} at {steps}: {words or 'not measured'}"
                            for (name, steps), words in zip(pairs, entries))
        told[claim] = f"**{verdict}** ({numbers})"
    return told


def summary(folders: list[Path]) -> list[str]:
    told = {TITLES[folder.name]: of for folder in folders if (of := verdicts(folder))}
    return [*header("claim", *told),
            *(row_of(claim, *(of.get(claim, "not measured") for of in told.values()))
              for claim, *_ in CLAIMS if any(claim in of for of in told.values()))]


# ------------------------------------------------------------------- results/README.md and figures

START, END = "<!-- from here on written by eval/evidence.py -->", "<!-- up to here -->"


def section(results: Path) -> str:
    """The generated part of results/README.md."""
    lines = summary(measured_sets(results))
    for folder in measured_sets(results):
        lines += ["", f"## {TITLES[folder.name]}", "",
                  "Share of valid ones, at the best temperature where none is named; larger is "
                  "better.", *table(folder)]
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
    points = {name: [(steps, statistics.mean(values), error) for steps in steps_in(folder)
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
    axes = figure.subplots()
    for name, points in curves(folder).items():
        axes.errorbar(*zip(*points), fmt=CURVES[name], markersize=4, capsize=2, label=SHOWN[name])
    axes.set(title=TITLES[folder.name], xlabel="steps", xscale="log",
             ylabel="share of valid texts")
    axes.set_xticks(steps_in(folder), steps_in(folder))
    axes.minorticks_off()
    figure.legend(loc="outside right center", frameon=False)
    replace_file(folder.with_suffix(".png"), lambda file: figure.savefig(file, dpi=110))
