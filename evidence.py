"""The evidence: models on the same text, transformer and number of tokens, measured the same way. `make evidence`.

    python evidence.py --sets=palindromes                   # hours, on two CPU cores
    python evidence.py --scorer=SmolLM2-135M.gguf           # all sets, text also under a language model not ours
    python evidence.py --report                             # no runs: table, figures and README from results/ as they are
    python evidence.py --results=mine --readme=mine.md      # all of it anew, beside ours

It runs train.py, distill.py, baselines/distill.py and evaluate.py and nothing else; report.py says what came out. What is
finished is never run again: a measurement is a file in results/<set>/ (made anew where it was made with other settings), a
model a checkpoint in `work`; so it can be stopped at any time. The learning rate of every method is the best of the same
three, and, where the best is at an end, of further ones by factors of two (4,096 byte pairs: those of 1,024; flows with
another clock or time scale: that of the flow): by validation loss after a part of the steps, or, for distilled models,
by what they are for at their headline number of steps after the same part of the distillation. The objectives of
distillation are compared after that part: with the published mix of times, since ours was found for one of them, and on
a flow with the published time scale, since two of them differentiate in time. Over its whole length distillation may
want a lower rate, so half of it is tried as well; and where the short run was better than both, it is what is shown. One
flow map is distilled for four times as long, at the rate of the whole.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import common
import storage
from report import CLOCKS, EQUAL_TIME, HEADLINE, SHORT, STEPS, all_records, draw, found, measured_sets, read, score, write_readme

sets = "palindromes,pydocs,pydocs4096"  # comma-separated; the last has 4,096 byte pairs, for clocks and noise
seeds = 3                        # runs of the models in HEADLINE; the others have one
work = "out/evidence"            # checkpoints and logs
results = "results"              # measurements, figures, the table
scorer = ""                      # what transformers loads, for text: besides our own ar.pt
readme = "README.md"             # the file with the section that is written
report = False                   # only write what follows from results/

settings = common.configure(globals(), sys.argv[1:])
globals().update(settings)
common.require_in(settings, "[1, inf)", "seeds")

TRAINED = ("ar", "mdlm", "duo", "flm", "mse", "noclock", "dense", "clock0", "clock1", "flm_published")
TEACHER = {"sdtt": "mdlm", "dcd": "duo", "psd": "flm", "self": "flm", "psd_published": "flm_published",
           "lsd_published": "flm_published", "esd_published": "flm_published"}
LIKE_FLM = {"clock0": ["--clock_embedding_share=0"], "clock1": ["--clock_embedding_share=1"],
            "flm_published": ["--time_scale=1"]}                                # of its rate, and with these words
PUBLISHED = ["--diagonal_share=0.5", "--full_jump_share=0.03125", "--full_jump_ramp=false", "--split=0.5",
             "--teacher_temperature=1"]
RATES = (1e-3, 2e-3, 4e-3)
SAMPLERS = {"gamma": ("flm", "--gamma=0.9")}            # other ways to judge a model of this list
ALL = ["flm", "gamma", "psd", "mdlm", "sdtt", "duo", "dcd", "ar"]               # important ones first
LONG = 4                         # times the steps of psd has psd-long: what the map comes to with time
ABLATIONS = [*SHORT, "mse", "noclock", "dense", "psd-long"]
SETS = {  # positions of the size of the embedding's rows for models that read clean tokens, as in GPT-2
    "palindromes": dict(config="palindromes", iters=1000, distill_iters=5500, tuning=1 / 4, position_std=0.2, samples=2000,
                        batch=128, optimizer="muon", shape=(),
                        models=(ALL, [name for name in ABLATIONS if name != "dense"]),      # V < d: noise has V dimensions
                        judging=("--temperatures=argmax,0.3,0.5,1",)),
    "pydocs": dict(config="pydocs", iters=3000, distill_iters=1500, tuning=1 / 2, position_std=0.03, samples=1000, batch=64,
                   optimizer="adamw", models=(ALL, [*CLOCKS, *ABLATIONS]),      # masked ones learn nothing for 1,000 steps
                   shape=("--n_embd=128", "--block_size=32"),                   # half the demo's width and length, for time
                   judging=("--temperatures=argmax,0.5,0.65,0.8,1,1.2,1.5", "--noise_scales=0.5,0.6,0.7,0.8,0.9,1,1.1,1.3,1.6",
                            "--sweep_samples=50", "--scorer_samples=250"))}
SETS["pydocs4096"] = SETS["pydocs"] | dict(models=(["ar"], [*CLOCKS, "dense"]), rates="pydocs",      # as found there
                                           prepare=("--vocab_size=4096", "--out_dir=data/pydocs4096"))


# ---------------------------------------------------------------- one run, once

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


def core_seconds() -> float:
    """Of a CPU's cores, by all programs run so far. Threads that wait may count too: OMP_NUM_THREADS=1 spares them."""
    times = os.times()
    return times.children_user + times.children_system


def model(name: str, dataset: str, seed: int, rate: float, share: float = 1.0) -> tuple[Path, dict]:
    """The checkpoint of a model, trained now unless it is there: `share` of the steps, its learning rate as given (of a
    distilled model, not of its teacher). And about its run: the words of the command, the seconds of a core that it took,
    pauses and what else the machine does left out, and whether it finished."""
    about = SETS[dataset]
    part = {1: "", about["tuning"]: "-tuning", LONG: "-long"}.get(share, "-equal-time")
    folder = Path(work) / dataset / f"seed{seed}" / f"rate-{rate:g}{part}"
    path = folder / f"{name}.pt"
    if name in LIKE_FLM or name in TEACHER and name not in ("sdtt", "dcd"):
        path = folder / name / ("flm.pt" if name in LIKE_FLM else "fmlm.pt")
    teacher = teacher_of(name, dataset, seed)[0] if name in TEACHER else None
    words = [f"--out_dir={path.parent}", f"--dataset={dataset}", f"--learning_rate={rate}", f"--seed={seed}",
             f"--max_iters={int((about['distill_iters'] if teacher else about['iters']) * share)}"]
    if name in TRAINED:
        clean = [f"--position_std={about['position_std']}"] if name in ("ar", "mdlm", "duo") else []
        method = ["--method=flm", *LIKE_FLM[name]] if name in LIKE_FLM else [f"--method={name}"]
        words = ["train.py", f"config/{about['config']}.py", *method, *about["shape"], *clean, *words]
    elif name in ("sdtt", "dcd"):
        words = ["baselines/distill.py", f"--method={name}", f"--teacher={teacher}", f"--batch_size={about['batch']}",
                 f"--optimizer={about['optimizer']}", *words]
    else:
        alone = ["--objective=psd", "--self_distill", "--teacher_temperature=1"]
        objective = [f"--objective={name[:3]}", *(PUBLISHED if name.endswith("published") else ())]
        objective = alone if name == "self" else objective
        words = ["distill.py", f"config/distill_{about['config']}.py", *objective, f"--teacher={teacher}", *words]
    about_run = path.with_suffix(".run.json")
    record = read(about_run) or dict(words=words, seconds=0.0, finished=False)
    if record["words"] != words:
        common.fail(f"{path} was trained otherwise ({' '.join(record['words'])}); move it away")
    if not record["finished"]:
        start = core_seconds()
        try:
            resume = ["--init_from=resume"] if path.exists() else []
            record["finished"] = run(path.with_suffix(".log"), *words, *resume)
        finally:
            record["seconds"] += core_seconds() - start
            write(about_run, record)
    return path, record


def teacher_of(name: str, dataset: str, seed: int) -> tuple[Path, dict]:
    """As `model`, of what a distilled model is distilled from."""
    teacher = TEACHER[name]
    return model(teacher, dataset, seed, best_rate("flm" if teacher in LIKE_FLM else teacher, dataset))


def attempt(key: str, name: str, dataset: str, rate: float, share: float) -> float:
    """The badness of a model after a share of the steps, from results/<set>/rates.json, under `key`, or measured now.
    Infinite where the run diverges."""
    path, rate = Path(results) / dataset / "rates.json", f"{rate:g}"
    tried = read(path).get(key, {})
    if rate not in tried:
        checkpoint, record = model(name, dataset, 1, float(rate), share)
        tried[rate] = badness(name, dataset, checkpoint) if record["finished"] else math.inf
        write(path, read(path) | {key: tried})
    return tried[rate]


def best_rate(name: str, dataset: str) -> float:
    """The learning rate that is best after a part of the steps: of RATES, and beyond their ends while that gets better. A
    set may have another's."""
    dataset = SETS[dataset].get("rates", dataset)
    tried, rates = {}, list(RATES)
    while rates:
        tried |= {rate: attempt(name, name, dataset, rate, SETS[dataset]["tuning"]) for rate in rates}
        best = min(tried, key=tried.get)
        if tried[best] == math.inf:
            common.fail(f"{name} diverges with every learning rate; see {work}")
        rates = [beyond for beyond in (best / 2, best * 2) if beyond not in tried]
    return best


def best_run(name: str, dataset: str) -> tuple[float, float]:
    """The learning rate and the share of the steps that a model is shown with: all of them, if distilled at `best_rate` or
    half of it, which a longer run may want, or only the part which that was chosen after: some get worse and worse."""
    rate = best_rate(name, dataset)
    if name not in TEACHER:
        return rate, 1
    runs = {(rate, 1): f"{name}, all steps", (rate / 2, 1): f"{name}, all steps", (rate, SETS[dataset]["tuning"]): name}
    return min(runs, key=lambda run: attempt(runs[run], name, dataset, *run))


def badness(name: str, dataset: str, checkpoint: Path) -> float:
    """What `best_rate` makes small: the validation loss; for distilled models the share of invalid palindromes, or the
    perplexity at the data's entropy under our autoregressive model, in 8 steps for discrete ones and 1 for flow maps. Of one
    whose sweep does not reach that entropy a number that is larger than all perplexities, and the larger the farther it is."""
    if name in TRAINED:
        return storage.read_log(checkpoint.with_suffix(".jsonl"))[-1]["val_loss"]
    steps = HEADLINE.get(name, 1)
    record = evaluate(checkpoint, dataset, steps, ours_only=True)
    if value := score(record, steps):
        return -value["value"] if dataset == "palindromes" else value["value"]
    held_out, *entropies = [row["entropy"]["value"] for row in record["rows"]]
    return 1e9 * (1 + min(abs(entropy - held_out) for entropy in entropies))


def judging_words(dataset: str) -> list[str]:
    return [f"--num_samples={SETS[dataset]['samples']}", *SETS[dataset]["judging"]]


def measured_so(record: dict, words: list[str], rate: float, share: float) -> bool:
    """Whether a measurement is there, of a model with this learning rate and share of the steps, made with these words for
    evaluate.py."""
    asked = dict(word[2:].split("=") for word in words)
    return (record.get("learning_rate"), record.get("share")) == (rate, share) and all(
        str(record["settings"].get(key)).lower() == value for key, value in asked.items())


def require_same_judge(dataset: str) -> None:
    """Exits where measurements of text that are there were made under another scorer: they would all be made anew, one by
    one, and could not be compared until then."""
    asked = os.path.basename(scorer.rstrip("/")) or "ar.pt"
    theirs = {record["scorers"][-1] for record in all_records(Path(results) / dataset) if record["scorers"]} - {asked}
    if theirs and dataset != "palindromes":
        common.fail(f"{results}/{dataset} was judged by {' and '.join(sorted(theirs))}; give that as --scorer=, or another "
                    f"folder as --results=")


def evaluate(checkpoint: Path, dataset: str, steps: int | str, ours_only: bool = False, more: tuple = ()) -> dict:
    """What evaluate.py finds. Text is judged by our own autoregressive model, then by `scorer`."""
    judges, out = [], checkpoint.with_suffix(".judged.json")
    if dataset != "palindromes":
        judges = [str(model("ar", dataset, 1, best_rate("ar", dataset))[0]), *([scorer] if scorer and not ours_only else [])]
    log = checkpoint.with_suffix(".judged.log")
    require(run(log, "evaluate.py", f"--source={checkpoint}", f"--dataset={dataset}", f"--steps={steps}",
                *judging_words(dataset), *more,
                f"--scorer={','.join(judges)}", f"--bound={not ours_only}", f"--out={out}"), log)
    return read(out)


def run_of(label: str, dataset: str) -> tuple[float, float]:
    """Learning rate and share of the steps of a row. Clocks and time scales are compared at one rate, that of `flm`."""
    name, _, length = label.partition("-")
    if length == "short":
        return best_rate(name, dataset), SETS[dataset]["tuning"]
    if length == "long":
        return best_run(name, dataset)[0], LONG
    rate, share = best_run("flm" if name in (*LIKE_FLM, *SAMPLERS) else name, dataset)
    return rate, share * equal_time(dataset, name) if length == "equal" else share


def steps_of(name: str, seed: int, first: list, puzzle: bool) -> str:
    """The numbers of steps a model is judged at: all, or, since judging is slow, for ablations and further seeds those that
    are compared; of a puzzle, which may be too easy in many, also few. An autoregressive model takes as many as a text has
    tokens; the flow with gamma is for many. `first` are the set's models that are no ablations."""
    if name == "ar":
        return "1"
    if name == "gamma":
        return "8,32,128" if seed == 1 else "128"
    if name in first and name in HEADLINE and seed == 1:
        return ",".join(map(str, STEPS))
    if name in TRAINED:
        return "1,2,4,8,128" if puzzle and seed == 1 else str(HEADLINE["flm"])
    return "8" if name in ("sdtt", "dcd") else "1,2,4"


def measure(dataset: str) -> None:
    """All models of a set, the important ones first."""
    about, log = SETS[dataset], Path(work) / f"{dataset}.log"
    for needed in dict.fromkeys((about.get("rates", dataset), dataset)):
        require(run(log, f"data/{about['config']}/prepare.py", *SETS[needed].get("prepare", ())), log)
    first, ablations = about["models"]
    order = [(name, 1) for name in dict.fromkeys((*first, *ablations))]
    order += [(f"{name}-equal", 1) for name in EQUAL_TIME if name in first]
    order += [(name, seed) for seed in range(2, seeds + 1) for name in HEADLINE if name in first]
    for name, seed in order:
        out = Path(results) / dataset / f"{name}-seed{seed}.json"
        label, (name, _, length) = name, name.partition("-")
        trained, *more = SAMPLERS.get(name, (name,))
        rate, share = run_of(label, dataset)
        steps = str(HEADLINE[name]) if length == "equal" else steps_of(label, seed, first, dataset == "palindromes")
        if measured_so(read(out), [f"--steps={steps}", *judging_words(dataset), *more], rate, share):
            continue
        require_same_judge(dataset)
        checkpoint, training = model(trained, dataset, seed, rate, share)
        require(training["finished"], checkpoint.with_suffix(".log"))
        record = evaluate(checkpoint, dataset, steps, more=more)
        seconds, loss = training["seconds"], {}
        if name in TEACHER:
            seconds += teacher_of(name, dataset, seed)[1]["seconds"]
        else:
            loss = dict(val_loss=storage.read_log(checkpoint.with_suffix(".jsonl"))[-1]["val_loss"])
        write(out, record | dict(seconds=seconds, learning_rate=rate, share=share) | loss)


def equal_time(dataset: str, name: str) -> float:
    """How many times as long `name` can be trained in the seconds of its rival; its teacher is what it was. Exits where they
    were measured on different machines."""
    def seconds(name):
        record = found(Path(results) / dataset, name)[0]
        machines.add(record["machine"])
        return record["seconds"]
    machines = set()
    taught = seconds(TEACHER[name]) if name in TEACHER else 0
    share = (seconds(EQUAL_TIME[name]) - taught) / (seconds(name) - taught)
    if len(machines) > 1:
        common.fail(f"{name} and {EQUAL_TIME[name]} took seconds on {' and '.join(sorted(machines))}; "
                    "measure both on one machine")
    return share


# ---------------------------------------------------------------- the program

wanted, folder = sets.split(","), Path(results)
for dataset in wanted:
    common.require_choice("sets", dataset, SETS)
for dataset in wanted if not report else ():
    measure(dataset)
if not measured_sets(folder):
    common.fail(f"no measurements in {results}; leave out --report to make them")
for measured in measured_sets(folder):
    draw(measured)
write_readme(folder, Path(readme))
print(f"wrote {readme} and {results}/*.png from the measurements in {results}/")
