"""The evidence: every model on the same text, transformer and number of tokens, measured the same way. `make evidence`.

    python evidence.py --sets=palindromes                   # an hour and a half on two CPU cores
    python evidence.py --scorer=SmolLM2-135M.gguf           # both sets, text also under a language model not ours: hours
    python evidence.py --report                             # no runs: table, figures and README from results/ as they are

It runs train.py, distill.py, baselines/distill.py and evaluate.py and nothing else. What is finished is never run again:
a measurement is a file in results/<set>/, a model a checkpoint in `work`; so it can be stopped at any time. The learning
rate of every method is the best of the same three, by validation loss after a quarter of the steps (flows and baselines),
or by what the distilled model is for (its headline number of steps) after a quarter of the distillation.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import common
import storage

sets = "palindromes,pydocs"      # comma-separated
seeds = 3                        # runs of the models in HEADLINE; the others have one
work = "out/evidence"            # checkpoints and logs
results = "results"              # measurements, figures, the table
scorer = ""                      # what transformers loads, for text: besides our own ar.pt
readme = "README.md"             # the file with the section that is written
report = False                   # only write what follows from results/

settings = common.configure(globals(), sys.argv[1:])
globals().update(settings)
common.require_in(settings, "[1, inf)", "seeds")

STEPS = (1, 2, 4, 8, 16, 32, 128)
HEADLINE = ("flm", "mdlm", "duo", "psd", "sdtt", "dcd")
TRAINED = ("ar", "mdlm", "duo", "flm", "mse", "noclock", "dense")
SHOWN = {"ar": "autoregressive", "mdlm": "MDLM", "sdtt": "SDTT", "duo": "Duo", "dcd": "DCD", "flm": "FLM", "psd": "FMLM, PSD",
         "lsd": "FMLM, LSD", "esd": "FMLM, ESD", "self": "FMLM, PSD without a teacher", "mse": "FLM, squared error",
         "noclock": "FLM, no clock", "dense": "FLM, V-dimensional noise"}
TEACHER = {"sdtt": "mdlm", "dcd": "duo", "psd": "flm", "lsd": "flm", "esd": "flm", "self": "flm"}
SETS = {  # positions of the size of the embedding's rows for models that read clean tokens, as in GPT-2
    "palindromes": dict(iters=1000, distill_iters=5500, position_std=0.2, rates=(1e-3, 3e-3, 1e-2), samples=2000,
                        batch=128, optimizer="muon", temperatures="1"),
    "pydocs": dict(iters=1500, distill_iters=1500, position_std=0.03, rates=(1e-3, 2e-3, 4e-3), samples=1000, batch=64,
                   optimizer="adamw", temperatures="0.7,0.85,1")}


# ---------------------------------------------------------------- one run, once

def run(log: Path, *words) -> float:
    """A program of ours, its output in `log`; how many seconds it took. Ends with its error when it fails."""
    words = [str(word) for word in words]
    print(time.strftime("%H:%M:%S"), " ".join(words), flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with log.open("w") as file:
        status = subprocess.run([sys.executable, *words], stdout=file, stderr=subprocess.STDOUT).returncode
    if status:
        common.fail(f"{words[0]} ended with status {status}; see {log}")
    return time.perf_counter() - start


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, record: dict) -> None:
    storage.replace_file(path, lambda file: file.write(json.dumps(record, indent=1).encode()))


def model(name: str, dataset: str, seed: int, rate: float, share: float = 1.0) -> Path:
    """The checkpoint of a model, trained now unless it is there: `share` of the steps, its learning rate as given."""
    about, grid = SETS[dataset], "" if share == 1 else f"grid/{rate:g}"
    folder = Path(work) / dataset / f"seed{seed}" / grid
    path = folder / name / "fmlm.pt" if TEACHER.get(name) == "flm" else folder / f"{name}.pt"
    finished = path.with_suffix(".seconds")
    if finished.exists():
        return path
    teacher = model(TEACHER[name], dataset, seed, best_rate(TEACHER[name], dataset)) if name in TEACHER else None
    common_words = (f"--out_dir={path.parent}", f"--dataset={dataset}", f"--learning_rate={rate}", f"--seed={seed}")
    if name in TRAINED:
        clean = () if name in ("flm", "mse", "noclock", "dense") else (f"--position_std={about['position_std']}",)
        words = ("train.py", f"config/{dataset}.py", f"--method={name}", *clean, f"--max_iters={int(about['iters'] * share)}")
    elif name in ("sdtt", "dcd"):
        words = ("baselines/distill.py", f"--method={name}", f"--teacher={teacher}", f"--batch_size={about['batch']}",
                 f"--optimizer={about['optimizer']}", f"--max_iters={int(about['distill_iters'] * share)}")
    else:
        objective = ("--objective=psd", "--self_distill") if name == "self" else (f"--objective={name}",)
        words = ("distill.py", f"config/distill_{dataset}.py", *objective, f"--teacher={teacher}",
                 f"--max_iters={int(about['distill_iters'] * share)}")
    seconds = run(path.with_suffix(".log"), *words, *common_words, *(["--init_from=resume"] if path.exists() else []))
    write(finished, dict(seconds=seconds))
    return path


def best_rate(name: str, dataset: str) -> float:
    """The learning rate of the three that is best after a quarter of the steps, from results/<set>/rates.json."""
    path = Path(results) / dataset / "rates.json"
    tried = read(path).get(name, {})
    for rate in SETS[dataset]["rates"]:
        if f"{rate:g}" not in tried:
            checkpoint = model(name, dataset, 1, rate, 0.25)
            tried[f"{rate:g}"] = quality(name, dataset, checkpoint)
            write(path, read(path) | {name: tried})
    return float(min(tried, key=tried.get))


def quality(name: str, dataset: str, checkpoint: Path) -> float:
    """What `best_rate` makes small. For distilled models the share of invalid palindromes, or the perplexity under our
    autoregressive model, at their headline number of steps: 8 for discrete models, 1 for flow maps."""
    if name in TRAINED:
        return storage.read_log(checkpoint.with_suffix(".jsonl"))[-1]["val_loss"]
    found = checkpoint.with_suffix(".tried.json")
    evaluate(checkpoint, dataset, 8 if name in ("sdtt", "dcd") else 1, "1", found)
    row = read(found)["rows"][-1]
    return 1 - row["valid"]["value"] if dataset == "palindromes" else row["perplexity ar.pt"]["value"]


def evaluate(checkpoint: Path, dataset: str, steps: int, temperatures: str, out: Path) -> None:
    judges = []
    if dataset != "palindromes":
        judges = [str(model("ar", dataset, 1, best_rate("ar", dataset))), *([scorer] if scorer else [])]
    run(checkpoint.with_suffix(".judged.log"), "evaluate.py", f"--source={checkpoint}", f"--dataset={dataset}",
        f"--steps={steps}", f"--temperatures={temperatures}", f"--num_samples={SETS[dataset]['samples']}",
        f"--scorer={','.join(judges)}", f"--bound={steps == 1}", f"--out={out}")


def measure(dataset: str) -> None:
    """All models of a set, the important ones first."""
    run(Path(work) / f"{dataset}.log", f"data/{dataset}/prepare.py")
    order = [("flm", 1), ("psd", 1), ("mdlm", 1), ("sdtt", 1), ("duo", 1), ("dcd", 1), ("ar", 1)]
    order += [(name, seed) for seed in range(2, seeds + 1) for name in HEADLINE]
    order += [(name, 1) for name in ("lsd", "esd", "self", "mse", "noclock", "dense")]
    for name, seed in order:
        for steps in (STEPS if name != "ar" else (1,)):  # ar takes as many as the text has tokens
            out = Path(results) / dataset / f"{name}-seed{seed}-{steps}.json"
            if not out.exists():
                rate = best_rate("flm" if name == "dense" else name, dataset)  # the same expected loss, more slowly
                checkpoint = model(name, dataset, seed, rate)
                evaluate(checkpoint, dataset, steps, SETS[dataset]["temperatures"], out)
                write(out, read(out) | dict(training=read(checkpoint.with_suffix(".seconds")) | dict(learning_rate=rate)))


# ---------------------------------------------------------------- the report

def found(dataset: str, name: str, steps: int) -> list[dict]:
    """The measurements of a model, one for each seed."""
    files = (Path(results) / dataset / f"{name}-seed{seed}-{steps}.json" for seed in range(1, 100))
    return [read(file) for file in files if file.exists()]


def score(dataset: str, record: dict) -> float | None:
    """What a measurement comes to: the share of valid palindromes, or the perplexity under the last scorer at the entropy
    of held-out text; None where the sweep over temperatures did not reach that."""
    if dataset == "palindromes":
        return record["rows"][-1]["valid"]["value"]
    return list(record["matched"].values())[-1]


def scores(dataset: str, name: str, steps: int) -> list[float]:
    return [value for record in found(dataset, name, steps) if (value := score(dataset, record)) is not None]


def entry(dataset: str, name: str, steps: int) -> str:
    """The mean over seeds, in brackets the smallest and the largest."""
    values, form = scores(dataset, name, steps), ".3f" if dataset == "palindromes" else ".0f"
    if not values:
        return "no match" if found(dataset, name, steps) else ""
    spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def table(dataset: str) -> list[str]:
    lines = ["| evaluations | " + " | ".join(map(str, STEPS)) + " | training, s |", "|---" * (len(STEPS) + 2) + "|"]
    for name, title in SHOWN.items():
        records = [record for steps in STEPS for record in found(dataset, name, steps)]
        if records:
            cells = [entry(dataset, name, steps) for steps in STEPS]
            cells[0] += " (one for each token)" if name == "ar" else ""
            lines.append(f"| {title} | {' | '.join(cells)} | {records[0]['training']['seconds']:.0f} |")
    return lines


CLAIMS = [  # of the paper: what is better or no worse, and than what, each a model and its number of steps
    ("a flow matches discrete diffusion at many steps", ("flm", 128), [("mdlm", 128), ("duo", 128)]),
    ("one step of a flow map beats eight of distilled discrete diffusion", ("psd", 1), [("sdtt", 8), ("dcd", 8)]),
    ("semigroup beats Eulerian distillation, in one step", ("psd", 1), [("esd", 1)]),
    ("Eulerian beats Lagrangian distillation, in one step", ("esd", 1), [("lsd", 1)]),
    ("cross-entropy beats squared error", ("flm", 128), [("mse", 128)]),
    ("the clock is needed", ("flm", 128), [("noclock", 128)])]


def verdicts(dataset: str) -> list[str]:
    lines = []
    for claim, ours, others in CLAIMS:
        values = {pair: scores(dataset, *pair) for pair in (ours, *others)}
        said = ", ".join(f"{SHOWN[name]} at {steps} {entry(dataset, name, steps) or 'not measured'}"
                         for name, steps in values)
        if not all(values.values()):
            verdict = "not measured yet"
        else:
            sign = 1 if dataset == "palindromes" else -1                        # shares should be large, perplexities small
            best = max(sign * statistics.mean(values[pair]) for pair in others)
            verdict = "holds" if sign * statistics.mean(values[ours]) >= best else "does not hold"
        lines.append(f"- {claim}: **{verdict}** ({said})")
    return lines


MEASURE = {"palindromes": "Palindromes, share of valid ones among 2,000 samples: larger is better",
           "pydocs": "Python's prose, perplexity at the entropy of held-out text: smaller is better"}
START, END = "<!-- from here on written by evidence.py -->", "<!-- up to here -->"


def section() -> str:
    """What the README says, from the files in results/ alone."""
    parts = []
    for dataset, title in MEASURE.items():
        if list((Path(results) / dataset).glob("*-seed*.json")):
            parts += [f"**{title}.**", "", *table(dataset), "", *verdicts(dataset), "",
                      f"![quality against steps]({results}/{dataset}.png)", ""]
    return "\n".join(parts)


def write_readme() -> None:
    before, rest = Path(readme).read_text().split(START)
    text = f"{before}{START}\n{section()}{END}{rest.split(END)[1]}"
    storage.replace_file(Path(readme), lambda file: file.write(text.encode()))


def draw(dataset: str) -> None:
    """Quality against steps, and against the entropy of a sample, of every model: results/<set>.png."""
    try:
        import matplotlib
    except ImportError:
        common.fail("the figures need matplotlib; run: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    for i, (name, title) in enumerate(SHOWN.items()):
        style = dict(color=plt.cm.tab20(i), marker="o", markersize=3, label=title)
        points = [(steps, statistics.mean(values)) for steps in STEPS if (values := scores(dataset, name, steps))]
        if points:
            left.plot(*zip(*points), **style)
        rows = [row for steps in STEPS for record in found(dataset, name, steps)[:1] for row in record["rows"][1:]]
        if rows:
            key = "valid" if dataset == "palindromes" else [k for k in rows[0] if k.startswith("perplexity")][-1]
            right.scatter([r["entropy"]["value"] for r in rows], [r[key]["value"] for r in rows], s=9,
                          **{k: style[k] for k in ("color", "label")})
    held_out = next(record["rows"][0] for record in map(read, (Path(results) / dataset).glob("*-seed*.json")))
    right.axvline(held_out["entropy"]["value"], color="gray", linewidth=1, label="held-out text")
    scale = "linear" if dataset == "palindromes" else "log"
    left.set(xscale="log", yscale=scale, xlabel="network evaluations", ylabel=MEASURE[dataset].split(":")[0].split(", ")[1])
    right.set(yscale=scale, xlabel="entropy of a sample, nats", ylabel="valid" if scale == "linear" else "perplexity")
    left.legend(fontsize=7)
    figure.tight_layout()
    storage.replace_file(Path(results) / f"{dataset}.png", lambda file: figure.savefig(file, dpi=110, format="png"))


for dataset in sets.split(","):
    common.require_choice("sets", dataset, SETS)
    if not report:
        measure(dataset)
    if list((Path(results) / dataset).glob("*-seed*.json")):
        draw(dataset)
write_readme()
print(f"wrote {readme} and {results}/*.png from the measurements in {results}/")
