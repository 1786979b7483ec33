"""What the measurements of evidence.py come to: tables, verdicts, figures and a section of the README, from the files in
results/ alone. `python evidence.py --report` writes them.

Functions of the folder `results`, which has a folder for every set; in it a file for every model and seed, as evaluate.py
wrote it, with its learning rate and the core seconds it was trained.
"""

import json
import math
import statistics
from itertools import pairwise
from pathlib import Path

import numpy as np

import common
import metrics
import storage

STEPS = (1, 2, 4, 8, 16, 32, 128)
HEADLINE = {"flm": 128, "gamma": 128, "mdlm": 128, "duo": 128, "psd": 1, "sdtt": 8, "dcd": 8}  # compared at these steps
SHOWN = {"ar": "autoregressive", "mdlm": "MDLM", "sdtt": "SDTT", "duo": "Duo", "dcd": "DCD", "flm": "FLM",
         "gamma": "FLM, gamma 0.9", "psd": "FMLM, PSD", "psd-long": "FMLM, PSD, four times as long",
         "psd-short": "FMLM, PSD, short", "self-short": "FMLM, PSD without a teacher, short",
         "psd_published-short": "FMLM, PSD, short, published mix",
         "lsd_published-short": "FMLM, LSD, short, published mix",
         "esd_published-short": "FMLM, ESD, short, published mix",
         "mse": "FLM, squared error", "noclock": "FLM, no clock", "dense": "FLM, V-dimensional noise"}
CLOCKS = {"clock0": "published: reads V coordinates", "flm": "mean of both, as above", "clock1": "reads d coordinates"}
SHORT = ("psd-short", "self-short", *(f"{name}_published-short" for name in ("psd", "lsd", "esd")))  # as where rates are chosen
ALL_RIGHT = 0.995                # share of valid texts from which on a puzzle tells nothing
DIFFERENT, UNEVEN = 0.95, 0.1    # of puzzles: the share of different texts at least, the KL of the letters in nats at most
STUDENT = (0, 0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)     # 0.975 quantile, by the number of seeds
EQUAL_TIME = {"mdlm": "flm", "duo": "flm", "sdtt": "psd", "dcd": "psd"}    # also trained for as many seconds as theirs


# ---------------------------------------------------------------- from files to numbers

def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def found(folder: Path, name: str) -> list[dict]:
    """The measurements of a model, one for each seed."""
    files = (folder / f"{name}-seed{seed}.json" for seed in range(1, 100))
    return [read(file) for file in files if file.exists()]


def is_puzzle(record: dict) -> bool:
    """Whether the texts of a set are right or wrong, as palindromes are."""
    return "valid" in record["rows"][-1]


def best_row(record: dict, steps: int) -> dict | None:
    """Of a puzzle the row at these steps, at whatever temperature, with the most valid texts; of those, if there are such,
    that neither repeat texts nor neglect letters, which would make it easy."""
    rows = [row for row in record["rows"] if row.get("steps") == steps]
    varied = [row for row in rows if row["different"]["value"] >= DIFFERENT and row["unigram_kl"]["value"] <= UNEVEN]
    return max(varied or rows, key=lambda row: row["valid"]["value"], default=None)


def score(record: dict, steps: int) -> dict | None:
    """What a measurement comes to, value, low and high: the share of valid texts at the best temperature, or the perplexity
    under the last scorer at the entropy of held-out text. None where there is none, or the sweep did not reach that."""
    if is_puzzle(record):
        row = best_row(record, steps)
        return row and row["valid"]
    by_scorer = next(iter(record["matched"].values()), {}).get(str(steps), {})
    return by_scorer.get(record["scorers"][-1])


def scores(records: list[dict], steps: int) -> tuple[list[float], float]:
    """The values of all seeds, and the error of their mean; see `values_and_error`."""
    return values_and_error([s for record in records if (s := score(record, steps))])


def values_and_error(have: list[dict]) -> tuple[list[float], float]:
    """The values, and half the 95% interval of their mean: Student's, from how the seeds differ, or that of the samples,
    where that is larger, as it is of one seed."""
    values, n = [s["value"] for s in have], len(have)
    if not values:
        return [], math.inf
    of_samples = max((s["high"] - s["low"]) / 2 for s in have) / n ** 0.5
    return values, max(of_samples, STUDENT[min(n, len(STUDENT) - 1)] * statistics.stdev(values) / n ** 0.5 if n > 1 else 0)


def at_rare_share(record: dict, steps: int) -> dict | None:
    """The perplexity under the last scorer at held-out text's share of rare tokens, value, low and high, between two neighbours
    of the sweep; None where no two measured ones have it between them. The interval comes from those of the rows, as if they
    were normal and independent."""
    of_way = {(row["temperature"], row.get("noise_scale", 1.0)): row for row in record["rows"][1:] if row["steps"] == steps}
    if is_puzzle(record) or not of_way:
        return None
    temperatures, scales = (sorted(float(x) for x in record["settings"][key].split(",") if x not in ("", "argmax"))
                            for key in ("temperatures", "noise_scales"))
    swept = metrics.sweep(record["rows"][-1]["kind"], steps, temperatures, scales)      # of which evaluate.py judged some
    pairs = [pair for pair in pairwise(swept) if all(way in of_way for way in pair)]
    if not pairs:
        return None
    value, low, high = (np.array([[[of_way[way][what][key] for what in ("rare_256", f"perplexity {record['scorers'][-1]}")]
                                   for way in pair] for pair in pairs]) for key in ("value", "low", "high"))    # (k, 2, 2)

    def at(values):
        target = record["rows"][0]["rare_256"]["value"]
        found = (metrics.entropy_matched(pair[:, 0], np.log(pair[:, 1].clip(1)), target) for pair in values)
        return next((math.exp(x) for x in found if x is not None), math.nan)
    if math.isnan(at(value)):
        return None
    normal = np.random.default_rng(0).normal(size=(500, *value.shape))
    again = [at(value + (high - low) / (2 * 1.96) * noise) for noise in normal]
    low, high = np.nanquantile(again, [0.025, 0.975])
    return dict(value=at(value), low=float(low), high=float(high))


# ---------------------------------------------------------------- from numbers to words

def entry(records: list[dict], steps: int) -> str:
    """The mean over the seeds and its error; how many reached the entropy, where not all did; of puzzles the share of
    different samples, where many are the same, and how far the letters are from the data's, where some are neglected."""
    values, error = scores(records, steps)
    records = [r for r in records if any(row.get("steps") == steps for row in r["rows"])]
    if not values:
        return "entropy not reached" if records else ""
    form = ".3f" if is_puzzle(records[0]) else ".0f"
    few = f", {len(values)} of {len(records)} seeds" if len(values) < len(records) else ""
    same = neglect = ""
    if is_puzzle(records[0]):
        rows = [best_row(r, steps) for r in records]
        different = min(row["different"]["value"] for row in rows)
        uneven = max(row["unigram_kl"]["value"] for row in rows)
        same = f", {different:.2f} different" if different < DIFFERENT else ""
        neglect = f", letters off by {uneven:.2f} nats" if uneven > UNEVEN else ""
    return f"{statistics.mean(values):{form}} ± {error:{form}}{few}{same}{neglect}"


def table(folder: Path) -> list[str]:
    lines = ["| steps | " + " | ".join(map(str, STEPS)) + " | training, core seconds | at equal time |",
             "|---" * (len(STEPS) + 3) + "|"]
    machine = statistics.mode(record["machine"] for record in all_records(folder))  # seconds of others would mislead
    for name, title in SHOWN.items():
        if records := found(folder, name):
            cells = [entry(records, steps) for steps in STEPS]
            cells[0] += " (one for each token)" if name == "ar" else ""
            seconds = [record["seconds"] for record in records if record["machine"] == machine]
            equal = found(folder, f"{name}-equal")
            longer = equal and f"{entry(equal, HEADLINE[name])} at {HEADLINE[name]}, as long as {SHOWN[EQUAL_TIME[name]]}"
            best = " (short was best)" if name in HEADLINE and records[0].get("share", 1) < 1 else ""
            lines.append(f"| {title}{best} | {' | '.join(cells)} | "
                         f"{round(statistics.mean(seconds)) if seconds else ''} | {longer or ''} |")
    others = sorted({record["machine"] for record in all_records(folder)} - {machine})
    if others:
        lines += ["", f"Seconds are those of runs on {machine}; runs on {' and '.join(others)} are not counted."]
    if found(folder, "mdlm"):
        lines += ["", "A step is a network evaluation, but for MDLM and SDTT, which ask the network only where a step uncovers "
                      "tokens: N steps of L tokens take N (1 - (1 - 1/N)^L) evaluations on average, and never more than L."]
    return lines


def rare_entry(records: list[dict], steps: int) -> str:
    """The mean over the seeds and its error, or that no seed reached it; empty where none was measured."""
    values, error = values_and_error([x for record in records if (x := at_rare_share(record, steps))])
    if not values:
        return "not reached" if any(row.get("steps") == steps for record in records for row in record["rows"]) else ""
    return f"{statistics.mean(values):.0f} ± {error:.0f}"


def rare_table(folder: Path) -> list[str]:
    """The same where the texts have as many rare tokens as held-out text, of which their entropy does not tell; nothing of a
    puzzle."""
    if is_puzzle(all_records(folder)[0]):
        return []
    lines = ["", "Perplexity where the share of rare tokens, those outside the 256 most common, is that of held-out text:",
             "", "| steps | " + " | ".join(map(str, STEPS)) + " |", "|---" * (len(STEPS) + 1) + "|"]
    for name, title in SHOWN.items():
        cells = [rare_entry(found(folder, name), steps) for steps in STEPS]
        if any(cells):
            cells[0] += " (one for each token)" if name == "ar" else ""
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def clock_table(folder: Path) -> list[str]:
    """What a clock does to text at 128 steps and to likelihood, of seed 1; nothing where no clocks were compared."""
    if not any(found(folder, name) for name in CLOCKS if name != "flm"):
        return []
    lines = ["", "| clock of the FLM, 128 steps, seed 1 | perplexity at equal entropy | at an equal share of rare tokens | "
                 "held-out text, nats a token, at most | tokens right in almost no noise |", "|---|---|---|---|---|"]
    for name, title in CLOCKS.items():
        if records := found(folder, name)[:1]:
            likelihood = next(iter(records[0]["likelihoods"].values()))
            nats = likelihood["nats_per_token"]
            lines.append(f"| {title} | {entry(records, 128)} | {rare_entry(records, 128)} "
                         f"| {nats['value']:.3f} ± {(nats['high'] - nats['low']) / 2:.3f} "
                         f"| {likelihood['accuracy_nearly_clean']['value']:.1%} |")
    return lines


def noise_line(folder: Path) -> list[str]:
    """What drawing noise in d dimensions instead of V does to the loss after the same steps, of seed 1; beside it what other
    seeds do to it, where there are others."""
    ours, dense = ([record["val_loss"] for record in found(folder, name) if "val_loss" in record] for name in ("flm", "dense"))
    if not (ours and dense):
        return []
    seeds = f"; with other seeds {' and '.join(f'{loss:.3f}' for loss in ours[1:])}" if len(ours) > 1 else ""
    return ["", f"Validation loss of the FLM after the same steps, at the best learning rate of each: {ours[0]:.3f} with noise "
                f"drawn in d dimensions, {dense[0]:.3f} with noise drawn in V (seed 1{seeds})."]


MATCHES = "a flow matches discrete diffusion at many steps"
WITH_GAMMA = "and with gamma sampling of the flow, which is not of the paper"
CLAIMS = [  # of the paper but the second: what is better or no worse, and than what, each a model and its number of steps
    (MATCHES, ("flm", 128), [("mdlm", 128), ("duo", 128)]),
    (WITH_GAMMA, ("gamma", 128), [("mdlm", 128), ("duo", 128)]),
    ("one step of a flow map beats eight of distilled discrete diffusion", ("psd", 1), [("sdtt", 8), ("dcd", 8)]),
    ("semigroup beats Eulerian distillation, in one step", ("psd_published-short", 1), [("esd_published-short", 1)]),
    ("Eulerian beats Lagrangian distillation, in one step", ("esd_published-short", 1), [("lsd_published-short", 1)]),
    ("cross-entropy beats squared error", ("flm", 128), [("mse", 128)]),
    ("the clock is needed", ("flm", 128), [("noclock", 128)])]


def too_easy(folder: Path, pairs: list[tuple[str, int]]) -> bool:
    """Whether models, each at its number of steps, get as good as all of a puzzle right (ALL_RIGHT)."""
    records = [found(folder, name) for name, _ in pairs]
    return all(of and is_puzzle(of[0]) and min(scores(of, steps)[0], default=0) >= ALL_RIGHT
               for of, (_, steps) in zip(records, pairs))


def verdicts(folder: Path) -> list[tuple[str, str, str]]:
    """For every claim that has a measurement the claim, the verdict, and the numbers. Ours is better, or worse, where it is
    by more than both errors together (as of independent numbers); for the first two, which ask to be no worse, within the
    error is enough. What is compared at the same number of steps, but easy for all of them there, is compared at the next
    smaller one that was measured; where there is none, the set is too easy to tell."""
    found_so = []
    for claim, ours, rivals in CLAIMS:
        pairs = [ours, *rivals]
        if len({steps for _, steps in pairs}) == 1:
            fewer = [[(name, steps) for name, _ in pairs] for steps in reversed(STEPS) if steps <= pairs[0][1]]
            fewer = [those for those in fewer if all(scores(found(folder, name), steps)[0] for name, steps in those)]
            pairs = next((those for those in fewer if not too_easy(folder, those)), pairs)
        entries = [entry(found(folder, name), steps) for name, steps in pairs]
        said = ", ".join(f"{SHOWN[name]} at {steps}: {words or 'not measured'}" for (name, steps), words in zip(pairs, entries))
        (values, error), *others = [scores(found(folder, name), steps) for name, steps in pairs]
        leads, missing = [], not values or not all(theirs for theirs, _ in others)
        for theirs, their_error in others:
            if values and theirs:
                puzzle = is_puzzle(found(folder, pairs[0][0])[0])               # shares should be large, perplexities small
                lead = (statistics.mean(values) - statistics.mean(theirs)) * (1 if puzzle else -1)
                leads.append((lead, math.hypot(error, their_error)))
        if any(lead < -margin for lead, margin in leads):
            verdict = "does not hold"
        elif missing:
            verdict = "cannot be compared at equal entropy" if all(entries) else "not measured yet"
        elif claim in (MATCHES, WITH_GAMMA) or all(lead > margin for lead, margin in leads):
            verdict = "holds"
        else:
            verdict = "too easy to tell" if too_easy(folder, pairs) else "within the error"
        if any(entries[1:]):
            found_so.append((claim, verdict, said))
    return found_so


def summary(folders: list[Path]) -> list[str]:
    """Claims against sets, the verdicts alone; sets without any are left out."""
    said = {name_of(folder): {claim: verdict for claim, verdict, _ in verdicts(folder)} for folder in folders}
    said = {name: verdict_of for name, verdict_of in said.items() if verdict_of}
    lines = ["| claim | " + " | ".join(said) + " |", "|---" * (len(said) + 1) + "|"]
    lines += [f"| {claim} | " + " | ".join(of.get(claim, "not measured yet") for of in said.values()) + " |"
              for claim, *_ in CLAIMS if any(claim in of for of in said.values())]
    return [*lines, ""] if said else []


START, END = "<!-- from here on written by evidence.py -->", "<!-- up to here -->"


def all_records(folder: Path) -> list[dict]:
    return [read(file) for file in sorted(folder.glob("*-seed*.json"))]


def name_of(folder: Path) -> str:
    record = all_records(folder)[0]
    vocabulary = f", V = {record['vocabulary']:,}" if "vocabulary" in record else ""
    return "Palindromes" if is_puzzle(record) else f"Python's prose{vocabulary}"


def title_of(folder: Path) -> str:
    records = all_records(folder)
    samples, read = records[0]["rows"][-1]["samples"], int(records[0]["settings"].get("scorer_samples", 0))
    if is_puzzle(records[0]):
        return f"{name_of(folder)}, share of valid ones among {samples:,} samples: larger is better"
    judges = {record["scorers"][-1] for record in records}
    if len(judges) > 1:
        common.fail(f"{folder} holds measurements under {' and '.join(sorted(judges))}; keep those of one")
    judge = judges.pop()
    few = f" (of which the judge reads {read:,})" if read and not judge.endswith(".pt") else ""
    return (f"{name_of(folder)}, perplexity under {judge} at the entropy of held-out text, {samples:,} samples{few}: smaller is "
            f"better")


def measured_sets(results: Path) -> list[Path]:
    return sorted(folder for folder in results.iterdir() if list(folder.glob("*-seed*.json"))) if results.exists() else []


def section(results: Path) -> str:
    """What the README says, from the files in results/ alone."""
    parts = summary(measured_sets(results))
    for folder in measured_sets(results):
        said = [f"- {claim}: **{verdict}** ({numbers})" for claim, verdict, numbers in verdicts(folder)]
        parts += [f"**{title_of(folder)}.**", "", *table(folder), *rare_table(folder), *clock_table(folder),
                  *noise_line(folder), "", *said, *([""] if said else []),
                  f"![quality against steps, and against entropy]({folder}.png)", ""]
    return "\n".join(parts)


def write_readme(results: Path, readme: Path) -> None:
    text = readme.read_text() if readme.exists() else START + END
    if START not in text or END not in text:
        common.fail(f"{readme} has no lines {START} and {END} to write between")
    before, after = text.split(START)[0], text.split(END)[1]
    storage.replace_file(readme, lambda file: file.write(f"{before}{START}\n{section(results)}{END}{after}".encode()))


def draw(folder: Path) -> None:
    """Quality against steps, and against the entropy of a sample, of every model: results/<set>.png."""
    try:
        import matplotlib
    except ImportError:
        common.fail("the figures need matplotlib; run: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    measured = [(i, name, title, found(folder, name)) for i, (name, title) in enumerate((CLOCKS | SHOWN).items())]
    measured = [(i, name, title, records) for i, name, title, records in measured if records]
    puzzle = is_puzzle(measured[0][3][0])
    what, scale = ("valid", "linear") if puzzle else ("perplexity", "log")
    for i, name, title, records in measured:
        color = plt.cm.tab20(i)
        points = [(steps, statistics.mean(values)) for steps in STEPS if (values := scores(records, steps)[0])]
        if points and name == "ar":  # as many evaluations as tokens, however it is asked
            left.axhline(points[0][1], color=color, linestyle=":", label=title)
        elif points:
            left.plot(*zip(*points), "o-", markersize=3, color=color, label=title)
        rows = records[0]["rows"][1:]
        key = next(key for key in reversed(rows[0]) if key.startswith(what))
        right.scatter([row["entropy"]["value"] for row in rows], [row[key]["value"] for row in rows], s=9, color=color)
    right.axvline(measured[0][3][0]["rows"][0]["entropy"]["value"], color="gray", linewidth=1)
    left.set(xscale="log", yscale=scale, xlabel="steps", ylabel=what)
    left.set_xticks(STEPS, STEPS)
    right.set(yscale=scale, xlabel="entropy of a sample, nats (line: held-out text)", ylabel=what)
    if left.get_legend_handles_labels()[0]:
        left.legend(fontsize=7)
    figure.tight_layout()
    storage.replace_file(folder.with_suffix(".png"), lambda file: figure.savefig(file, dpi=110, format="png"))
