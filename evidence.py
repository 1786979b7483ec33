"""The evidence: every model on the same text, transformer and number of tokens, measured the same way. `make evidence`.

    python evidence.py --sets=palindromes                   # hours, on two CPU cores
    python evidence.py --scorer=SmolLM2-135M.gguf           # both sets, text also under a language model not ours
    python evidence.py --report                             # no runs: table, figures and README from results/ as they are
    python evidence.py --results=mine --readme=mine.md      # all of it anew, beside ours

It runs train.py, distill.py, baselines/distill.py and evaluate.py and nothing else. What is finished is never run again:
a measurement is a file in results/<set>/, a model a checkpoint in `work`; so it can be stopped at any time. The learning
rate of every method is the best of the same three, by validation loss after a quarter of the steps, or, for distilled
models, by what they are for at their headline number of steps after a quarter of the distillation.
"""

import json
import math
import signal
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
HEADLINE = {"flm": 128, "mdlm": 128, "duo": 128, "psd": 1, "sdtt": 8, "dcd": 8}    # and the steps they are compared at
TRAINED = ("ar", "mdlm", "duo", "flm", "mse", "noclock", "dense")
SHOWN = {"ar": "autoregressive", "mdlm": "MDLM", "sdtt": "SDTT", "duo": "Duo", "dcd": "DCD", "flm": "FLM", "psd": "FMLM, PSD",
         "lsd": "FMLM, LSD", "esd": "FMLM, ESD", "self": "FMLM, PSD without a teacher", "mse": "FLM, squared error",
         "noclock": "FLM, no clock", "dense": "FLM, V-dimensional noise"}
TEACHER = {"sdtt": "mdlm", "dcd": "duo", "psd": "flm", "lsd": "flm", "esd": "flm", "self": "flm"}
EQUAL_TIME = {"mdlm": "flm", "duo": "flm", "sdtt": "psd", "dcd": "psd"}    # also trained for as many seconds as theirs
RATES = (1e-3, 2e-3, 4e-3)
SETS = {  # positions of the size of the embedding's rows for models that read clean tokens, as in GPT-2
    "palindromes": dict(iters=1000, distill_iters=5500, position_std=0.2, samples=2000, batch=128, optimizer="muon",
                        shape=(), judging=("--temperatures=argmax,1",)),
    "pydocs": dict(iters=1500, distill_iters=1500, position_std=0.03, samples=1000, batch=64, optimizer="adamw",
                   shape=("--n_embd=128", "--block_size=32"),                   # half the demo's width and length, for time
                   judging=("--temperatures=argmax,0.5,0.65,0.8,0.9,1,1.15", "--sweep_samples=100", "--scorer_samples=250"))}


# ---------------------------------------------------------------- one run, once

def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, record: dict) -> None:
    storage.replace_file(path, lambda file: file.write(json.dumps(record, indent=1).encode()))


def run(log: Path, *words) -> bool:
    """A program of ours, its output in `log`: whether it ended well. Ctrl-C lets it write its checkpoint, then ends us."""
    words = [str(word) for word in words]
    print(time.strftime("%H:%M:%S"), " ".join(words), flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *words], stdout=file, stderr=subprocess.STDOUT)
        stopped = []
        signal.signal(signal.SIGINT, lambda *_: stopped.append(True))           # the terminal tells the program as well
        status = process.wait()
    if stopped:
        sys.exit(130)
    return status == 0


def require(ended_well: bool, log: Path) -> None:
    if not ended_well:
        common.fail(f"a run failed; its last words are in {log}")


def model(name: str, dataset: str, seed: int, rate: float, share: float = 1.0) -> tuple[Path, dict]:
    """The checkpoint of a model, trained now unless it is there: `share` of the steps, its learning rate as given (of a
    distilled model, not of its teacher). And about its run: the words of the command, the seconds it took, with pauses left out, and whether it finished."""
    about = SETS[dataset]
    part = {1: "", 0.25: "-quarter"}.get(share, "-equal-time")
    folder = Path(work) / dataset / f"seed{seed}" / f"rate-{rate:g}{part}"
    path = folder / name / "fmlm.pt" if TEACHER.get(name) == "flm" else folder / f"{name}.pt"
    teacher = model(TEACHER[name], dataset, seed, best_rate(TEACHER[name], dataset))[0] if name in TEACHER else None
    words = [f"--out_dir={path.parent}", f"--dataset={dataset}", f"--learning_rate={rate}", f"--seed={seed}",
             f"--max_iters={int((about['distill_iters'] if teacher else about['iters']) * share)}"]
    if name in TRAINED:
        clean = [f"--position_std={about['position_std']}"] if name in ("ar", "mdlm", "duo") else []
        words = ["train.py", f"config/{dataset}.py", f"--method={name}", *about["shape"], *clean, *words]
    elif name in ("sdtt", "dcd"):
        words = ["baselines/distill.py", f"--method={name}", f"--teacher={teacher}", f"--batch_size={about['batch']}",
                 f"--optimizer={about['optimizer']}", *words]
    else:
        objective = ["--objective=psd", "--self_distill"] if name == "self" else [f"--objective={name}"]
        words = ["distill.py", f"config/distill_{dataset}.py", *objective, f"--teacher={teacher}", *words]
    about_run = path.with_suffix(".run.json")
    record = read(about_run) or dict(words=words, seconds=0.0, finished=False)
    if record["words"] != words:
        common.fail(f"{path} was trained otherwise ({' '.join(record['words'])}); move it away")
    if not record["finished"]:
        start = time.perf_counter()
        try:
            resume = ["--init_from=resume"] if path.exists() else []
            record["finished"] = run(path.with_suffix(".log"), *words, *resume)
        finally:
            record["seconds"] += time.perf_counter() - start
            write(about_run, record)
    return path, record


def best_rate(name: str, dataset: str) -> float:
    """The learning rate of the three that is best after a quarter of the steps, from results/<set>/rates.json. One with
    which the run diverges counts as infinitely bad."""
    path = Path(results) / dataset / "rates.json"
    tried = read(path).get(name, {})
    for rate in RATES:
        if f"{rate:g}" not in tried:
            checkpoint, record = model(name, dataset, 1, rate, 0.25)
            tried[f"{rate:g}"] = badness(name, dataset, checkpoint) if record["finished"] else math.inf
            write(path, read(path) | {name: tried})
    if min(tried.values()) == math.inf:
        common.fail(f"{name} diverges with every learning rate; see {work}")
    return float(min(tried, key=tried.get))


def badness(name: str, dataset: str, checkpoint: Path) -> float:
    """What `best_rate` makes small: the validation loss; for distilled models the share of invalid palindromes, or the
    perplexity at the data's entropy under our autoregressive model, in 8 steps for discrete ones and 1 for flow maps."""
    if name in TRAINED:
        return storage.read_log(checkpoint.with_suffix(".jsonl"))[-1]["val_loss"]
    steps = HEADLINE.get(name, 1)
    record = evaluate(checkpoint, dataset, steps, ours_only=True)
    value = score(dataset, record, steps)
    return math.inf if value is None else -value["value"] if dataset == "palindromes" else value["value"]


def evaluate(checkpoint: Path, dataset: str, steps: int | str, ours_only: bool = False) -> dict:
    """What evaluate.py finds. Text is judged by our own autoregressive model, then by `scorer`."""
    judges, out = [], checkpoint.with_suffix(".judged.json")
    if dataset != "palindromes":
        judges = [str(model("ar", dataset, 1, best_rate("ar", dataset))[0]), *([scorer] if scorer and not ours_only else [])]
    log = checkpoint.with_suffix(".judged.log")
    require(run(log, "evaluate.py", f"--source={checkpoint}", f"--dataset={dataset}", f"--steps={steps}",
                f"--num_samples={SETS[dataset]['samples']}", *SETS[dataset]["judging"],
                f"--scorer={','.join(judges)}", f"--bound={not ours_only}", f"--out={out}"), log)
    return read(out)


def measure(dataset: str) -> None:
    """All models of a set, the important ones first."""
    log = Path(work) / f"{dataset}.log"
    require(run(log, f"data/{dataset}/prepare.py"), log)
    order = [(name, 1) for name in ("flm", "mdlm", "duo", "ar", "psd", "sdtt", "dcd")]
    order += [(name, seed) for seed in range(2, seeds + 1) for name in HEADLINE]
    order += [(name, 1) for name in ("lsd", "esd", "self", "mse", "noclock", "dense")]
    for name, seed in [*order, *((f"{name}-equal", 1) for name in EQUAL_TIME)]:
        out = Path(results) / dataset / f"{name}-seed{seed}.json"
        if not out.exists():
            name, equal = name.removesuffix("-equal"), name.endswith("-equal")
            rate = best_rate("flm" if name == "dense" else name, dataset)       # the same expected loss, more slowly
            checkpoint, training = model(name, dataset, seed, rate, equal_time(dataset, name) if equal else 1)
            require(training["finished"], checkpoint.with_suffix(".log"))
            steps = "1" if name == "ar" else ",".join(map(str, STEPS))          # ar takes as many as a text has tokens
            record = evaluate(checkpoint, dataset, HEADLINE[name] if equal else steps)
            seconds = training["seconds"]
            if name in TEACHER:
                seconds += model(TEACHER[name], dataset, seed, best_rate(TEACHER[name], dataset))[1]["seconds"]
            write(out, record | dict(seconds=seconds, learning_rate=rate))


def equal_time(dataset: str, name: str) -> float:
    """How many times as long `name` can be trained in the seconds of its rival; its teacher is what it was."""
    own, rival = (found(dataset, other)[0]["seconds"] for other in (name, EQUAL_TIME[name]))
    taught = found(dataset, TEACHER[name])[0]["seconds"] if name in TEACHER else 0
    return (rival - taught) / (own - taught)


# ---------------------------------------------------------------- the report

def found(dataset: str, name: str) -> list[dict]:
    """The measurements of a model, one for each seed."""
    files = (Path(results) / dataset / f"{name}-seed{seed}.json" for seed in range(1, 100))
    return [read(file) for file in files if file.exists()]


def score(dataset: str, record: dict, steps: int) -> dict | None:
    """What a measurement comes to, value, low and high: the share of valid palindromes, or the perplexity under the last
    scorer at the entropy of held-out text. None where there is none, or the sweep over temperatures did not reach that."""
    if dataset == "palindromes":  # the first row at these steps is the model's usual sampler
        return next((row["valid"] for row in record["rows"] if row.get("steps") == steps), None)
    by_scorer = next(iter(record["matched"].values()), {}).get(str(steps), {})
    return by_scorer.get(record["scorers"][-1])


def scores(dataset: str, name: str, steps: int) -> tuple[list[float], float]:
    """The values of all seeds, and the error of their mean: half its interval, or half of what the seeds differ by."""
    have = [s for record in found(dataset, name) if (s := score(dataset, record, steps))]
    values = [s["value"] for s in have]
    if not values:
        return [], math.inf
    return values, max((max(values) - min(values)) / 2, max((s["high"] - s["low"]) / 2 for s in have) / len(have) ** 0.5)


def entry(dataset: str, name: str, steps: int) -> str:
    """The mean over the seeds and its error; how many reached the entropy, where not all did; and the share of different
    samples, where many are the same."""
    (values, error), records = scores(dataset, name, steps), found(dataset, name)
    records = [r for r in records if any(row.get("steps") == steps for row in r["rows"])]
    if not values:
        return "entropy not reached" if records else ""
    form = ".3f" if dataset == "palindromes" else ".0f"
    few = f", {len(values)} of {len(records)} seeds" if len(values) < len(records) else ""
    different = min(next(row for row in r["rows"] if row.get("steps") == steps)["different"]["value"] for r in records)
    same = f", {different:.2f} different" if different < 0.95 else ""
    return f"{statistics.mean(values):{form}} ± {error:{form}}{few}{same}"


def table(dataset: str) -> list[str]:
    lines = ["| evaluations | " + " | ".join(map(str, STEPS)) + " | training, s | at equal time |",
             "|---" * (len(STEPS) + 3) + "|"]
    for name, title in SHOWN.items():
        if records := found(dataset, name):
            cells = [entry(dataset, name, steps) for steps in STEPS]
            cells[0] += " (one for each token)" if name == "ar" else ""
            seconds = statistics.mean(record["seconds"] for record in records)
            equal = f"{name}-equal"
            longer = found(dataset, equal) and (f"{entry(dataset, equal, HEADLINE[name])} at {HEADLINE[name]}, "
                                                f"as long as {SHOWN[EQUAL_TIME[name]]}")
            lines.append(f"| {title} | {' | '.join(cells)} | {seconds:.0f} | {longer or ''} |")
    return lines


CLAIMS = [  # of the paper: what is better or no worse, and than what, each a model and its number of steps
    ("a flow matches discrete diffusion at many steps", ("flm", 128), [("mdlm", 128), ("duo", 128)]),
    ("one step of a flow map beats eight of distilled discrete diffusion", ("psd", 1), [("sdtt", 8), ("dcd", 8)]),
    ("semigroup beats Eulerian distillation, in one step", ("psd", 1), [("esd", 1)]),
    ("Eulerian beats Lagrangian distillation, in one step", ("esd", 1), [("lsd", 1)]),
    ("cross-entropy beats squared error", ("flm", 128), [("mse", 128)]),
    ("the clock is needed", ("flm", 128), [("noclock", 128)])]


def verdicts(dataset: str) -> list[str]:
    """A line for every claim. Ours is better, or worse, where it is by more than both errors together (as of independent
    numbers); for "matches", which asks for no more than that, within the error is enough."""
    lines = []
    sign = 1 if dataset == "palindromes" else -1                                # shares should be large, perplexities small
    for claim, ours, others in CLAIMS:
        said = ", ".join(f"{SHOWN[name]} at {steps}: {entry(dataset, name, steps) or 'not measured'}"
                         for name, steps in (ours, *others))
        values, error = scores(dataset, *ours)
        verdict = "holds"
        for pair in others:
            theirs, their_error = scores(dataset, *pair)
            if not values or not theirs:
                measured = all(entry(dataset, *p) for p in (ours, *others))
                verdict = "cannot be compared at equal entropy" if measured else "not measured yet"
                break
            lead = sign * (statistics.mean(values) - statistics.mean(theirs))
            if lead < -math.hypot(error, their_error):
                verdict = "does not hold"
                break
            if lead <= math.hypot(error, their_error) and "matches" not in claim:
                verdict = "within the error"
        lines.append(f"- {claim}: **{verdict}** ({said})")
    return lines


START, END = "<!-- from here on written by evidence.py -->", "<!-- up to here -->"


def title_of(dataset: str) -> str:
    files = [read(file) for file in sorted((Path(results) / dataset).glob("*-seed*.json"))]
    samples = f"{SETS[dataset]['samples']:,} samples"
    if dataset == "palindromes":
        return f"Palindromes, share of valid ones among {samples}: larger is better"
    judges = {record["scorers"][-1] for record in files}
    if len(judges) > 1:
        common.fail(f"{results}/{dataset} holds measurements under {' and '.join(sorted(judges))}; keep those of one")
    return f"Python's prose, perplexity under {judges.pop()} at the entropy of held-out text, {samples}: smaller is better"


def measured_sets() -> list[str]:
    return [dataset for dataset in SETS if list((Path(results) / dataset).glob("*-seed*.json"))]


def section() -> str:
    """What the README says, from the files in results/ alone."""
    parts = []
    for dataset in measured_sets():
        parts += [f"**{title_of(dataset)}.**", "", *table(dataset), "", *verdicts(dataset), "",
                  f"![quality against steps, and against entropy]({results}/{dataset}.png)", ""]
    return "\n".join(parts)


def write_readme() -> None:
    text = Path(readme).read_text() if Path(readme).exists() else START + END
    if START not in text or END not in text:
        common.fail(f"{readme} has no lines {START} and {END} to write between")
    before, after = text.split(START)[0], text.split(END)[1]
    storage.replace_file(Path(readme), lambda file: file.write(f"{before}{START}\n{section()}{END}{after}".encode()))


def draw(dataset: str) -> None:
    """Quality against steps, and against the entropy of a sample, of every model: results/<set>.png."""
    try:
        import matplotlib
    except ImportError:
        common.fail("the figures need matplotlib; run: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    what = "valid" if dataset == "palindromes" else "perplexity"
    for i, (name, title) in enumerate(SHOWN.items()):
        records, color = found(dataset, name), plt.cm.tab20(i)
        points = [(steps, statistics.mean(values)) for steps in STEPS if (values := scores(dataset, name, steps)[0])]
        if points and name == "ar":  # as many evaluations as tokens, however it is asked
            left.axhline(points[0][1], color=color, linestyle=":", label=title)
        elif points:
            left.plot(*zip(*points), "o-", markersize=3, color=color, label=title)
        rows = [row for record in records[:1] for row in record["rows"][1:]]
        if rows:
            key = next(key for key in reversed(rows[0]) if key.startswith(what))
            right.scatter([row["entropy"]["value"] for row in rows], [row[key]["value"] for row in rows], s=9, color=color)
    held_out = next(record["rows"][0] for name in SHOWN for record in found(dataset, name))
    right.axvline(held_out["entropy"]["value"], color="gray", linewidth=1)
    scale = "linear" if dataset == "palindromes" else "log"
    left.set(xscale="log", yscale=scale, xlabel="network evaluations", ylabel=what)
    left.set_xticks(STEPS, STEPS)
    right.set(yscale=scale, xlabel="entropy of a sample, nats (line: held-out text)", ylabel=what)
    left.legend(fontsize=7)
    figure.tight_layout()
    storage.replace_file(Path(results) / f"{dataset}.png", lambda file: figure.savefig(file, dpi=110, format="png"))


for dataset in sets.split(","):
    common.require_choice("sets", dataset, SETS)
    if not report:
        measure(dataset)
if not measured_sets():
    common.fail(f"no measurements in {results}; leave out --report to make them")
for dataset in measured_sets():
    draw(dataset)
write_readme()
print(f"wrote {readme} and {results}/*.png from the measurements in {results}/")
