"""The evidence: every model on the same text, transformer and number of tokens, judged alike.

    python eval/evidence.py --sets=stories                  # hours on two CPU cores
    python eval/evidence.py --sets=palindromes              # many hours
    python eval/evidence.py --report                        # no runs: tables and figures only
    python eval/evidence.py --results=mine                  # everything anew, beside ours

It runs train.py, distill.py, baselines/distill.py and eval/evaluate.py. report.py writes the
figures and README.md into `results`; ours says how models are compared. It can be stopped at any
time: a model is a checkpoint in `work`, a measurement a file in results/<set>/, and neither is made
twice unless its settings change.
"""

import json
import math
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # the top folder
from eval.report import HEADLINE, best_row, draw, measured_sets, read, write_readme
from lib.checkpoint import read_log, replace_file
from lib.settings import configure, fail, require_choice, require_in

sets = "palindromes,stories"
seeds = 3                        # runs of the models in HEADLINE; the others have one
texts = 500                      # of a model of stories, at each number of steps
work = "out/evidence"            # checkpoints and logs
results = "results"              # measurements, figures, README.md
report = False                   # only write what follows from results/

settings = configure(globals(), sys.argv[1:])
globals().update(settings)
require_in(settings, "[1, inf)", "seeds", "texts")

TEACHER = dict.fromkeys(("psd_published", "lsd_published", "esd_published"), "flm_published") | {
    "sdtt": "mdlm", "dcd": "duo", "psd": "flm", "self": "flm", "mended": "psd"}
PUBLISHED = ["--diagonal_share=0.5", "--full_jump_share=0.03125", "--full_jump_ramp=false",
             "--split=0.5", "--teacher_temperature=1"]
SAMPLERS = {"gamma": ("flm", "--gamma=0.9")}                        # another way to sample a model
RATES = (2e-3, 4e-3)
SHORT, LONG = 1 / 4, 4           # shares of the steps: to find a rate, and of psd-long
ALL = ["flm", "gamma", "psd", "mdlm", "sdtt", "duo", "dcd", "ar"]   # important ones first
ABLATIONS = ["psd-short", "self-short", "psd_published-short", "lsd_published-short",
             "esd_published-short", "mse", "noclock", "psd-long"]
FLOW, MAP, MEND = (runpy.run_path(f"config/{stage}stories.py")
                   for stage in ("", "distill_", "mend_"))
MAP["max_iters"] //= 2           # half of config/'s, which make demo has
ROWS = [stage["max_iters"] * stage["batch_size"] for stage in (FLOW, MAP, MEND)]
SETS = {  # clean: where clean tokens are read, positions as large as the rows of the embedding
    "palindromes": dict(
        iters=1000, distill_iters=5500, rival_iters=1000, optimizers=("",), fixed={},
        clean=("--position_std=0.2",), discrete=("--batch_size=128", "--optimizer=muon"),
        models=(ALL, ABLATIONS), steps="1,2,4,8,16,32,128", rivals=(),
        judging=("--num_samples=2000", "--bound=true", "--temperatures=argmax,0.3,0.5,1")),
    "stories": dict(  # rivals: the tokens of all three stages; each rate with each optimizer
        iters=FLOW["max_iters"], distill_iters=MAP["max_iters"], mend_iters=MEND["max_iters"],
        rival_iters=sum(ROWS) // FLOW["batch_size"],
        optimizers=("muon", "adamw"),
        fixed={"flm": FLOW["learning_rate"], "psd": MAP["learning_rate"],
               "mended": MEND["learning_rate"]},                    # not searched here
        clean=("--position_std=0.065", "--replaced_share=0", "--context_share=0",
               "--embed_lr_scale=1"),
        models=(["flm", "psd", "mended", "mdlm", "duo"], []),
        steps="1,2,4,8,16,64,128", rivals=("--temperatures=0.5,1",),
        judging=(f"--num_samples={texts}",))}


# ----------------------------------------------------------------------------------- one run, once

def write(path: Path, record: dict) -> None:
    replace_file(path, lambda file: file.write(json.dumps(record, indent=1).encode()))


def run(log: Path, *words, may_fail: bool = False) -> bool:
    """Run a program with its output in `log`; whether it ended well."""
    print(time.strftime("%H:%M:%S"), " ".join(words), flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file, subprocess.Popen(
            [sys.executable, *words], stdout=file, stderr=subprocess.STDOUT) as process:
        status = process.wait()  # Ctrl-C ends both: leaving the block waits for its checkpoint
    if status and not may_fail:
        fail(f"a run failed; see the end of {log}")
    return status == 0


def model(name: str, dataset: str, seed: int, rate: float, optimizer: str, share: float = 1.0,
          may_fail: bool = False) -> tuple[Path, dict]:
    """The checkpoint of a model, trained at this rate by this optimizer ("": that of the config)
    for `share` of the steps, now if need be. And a record of its run: its words, core seconds,
    whether it finished."""
    about, rival = SETS[dataset], name in ("ar", "mdlm", "duo")
    part = "-" * bool(optimizer) + optimizer + {SHORT: "-tuning", LONG: "-long"}.get(share, "")
    folder = Path(work) / dataset / f"seed{seed}" / f"rate-{rate:g}{part}"
    path, iters = folder / f"{name}.pt", about["rival_iters" if rival else "iters"]
    if name in TEACHER:
        teacher, _ = teacher_of(name, dataset, seed)
        iters = about["distill_iters"]
    if name in ("sdtt", "dcd"):
        words = ["baselines/distill.py", f"--method={name}", f"--teacher_path={teacher}",
                 *about["discrete"]]
    elif name == "mended":
        path, iters = folder / name / "mended.pt", about["mend_iters"]
        words = ["distill.py", f"config/mend_{dataset}.py", f"--start_from={teacher}",
                 f"--teacher_path={teacher_of(TEACHER[name], dataset, seed)[0]}"]
    elif name in TEACHER:
        path = folder / name / "fmlm.pt"
        objective, options = name[:3], PUBLISHED if name.endswith("published") else ()
        if name == "self":
            objective, options = "psd", ["--self_distill", "--teacher_temperature=1"]
        words = ["distill.py", f"config/distill_{dataset}.py", f"--objective={objective}",
                 *options, f"--teacher_path={teacher}"]
    else:
        method, options = f"--method={name}", about["clean"] if rival else ()
        if name == "flm_published":
            path, method, options = folder / name / "flm.pt", "--method=flm", ["--time_scale=1"]
        words = ["train.py", f"config/{dataset}.py", method, *options]
    words += [f"--out_dir={path.parent}", f"--dataset={dataset}", f"--learning_rate={rate}",
              f"--seed={seed}", f"--max_iters={int(iters * share)}"]
    words += [f"--optimizer={optimizer}"] if optimizer else []
    about_run = path.with_suffix(".run.json")
    record = read(about_run) or dict(words=words, seconds=0.0, finished=False)
    if record["words"] != words:
        fail(f"{path} was trained otherwise ({' '.join(record['words'])}); move it away")
    if not record["finished"]:
        resume, start = ["--init_from=resume"] if path.exists() else [], sum(os.times()[2:4])
        try:
            record["finished"] = run(path.with_suffix(".log"), *words, *resume,
                                     may_fail=may_fail)
        finally:
            record["seconds"] += sum(os.times()[2:4]) - start       # CPU time of child processes
            write(about_run, record)
    return path, record


def teacher_of(name: str, dataset: str, seed: int) -> tuple[Path, dict]:
    """As `model`, for the teacher of a distilled model."""
    teacher = TEACHER[name]
    return model(teacher, dataset, seed, *best_rate(teacher.partition("_")[0], dataset))


def evaluate(checkpoint: Path, dataset: str, steps: int | str, more: Iterable = ()) -> dict:
    """The result of evaluate.py."""
    out = checkpoint.with_suffix(".judged.json")
    run(checkpoint.with_suffix(".judged.log"), "eval/evaluate.py", f"--source={checkpoint}",
        f"--dataset={dataset}", f"--steps={steps}", *SETS[dataset]["judging"], *more,
        f"--out={out}")
    return read(out)


# ---------------------------------------------------------------------------------- learning rates

def attempt(key: str, name: str, dataset: str, rate: float, optimizer: str, share: float) -> float:
    """The badness of a model after a share of the steps, from results/<set>/rates.json or measured
    now. Infinite if the run diverges."""
    path = Path(results) / dataset / "rates.json"
    key, rate = f"{key}, {optimizer}" if optimizer else key, f"{rate:g}"
    tried = read(path).get(key, {})
    if rate not in tried:
        checkpoint, record = model(name, dataset, 1, float(rate), optimizer, share, may_fail=True)
        tried[rate] = badness(name, dataset, checkpoint) if record["finished"] else math.inf
        write(path, read(path) | {key: tried})
    return tried[rate]


def badness(name: str, dataset: str, checkpoint: Path) -> float:
    """What the learning rate should minimise: the validation loss, or for distilled models the
    negated share of valid texts at their HEADLINE steps."""
    if name not in TEACHER:
        return read_log(checkpoint.with_suffix(".jsonl"))[-1]["val_loss"]
    steps = HEADLINE.get(name, 1)
    return -best_row(evaluate(checkpoint, dataset, steps), steps)["valid"]["value"]


def best_rate(name: str, dataset: str) -> tuple[float, str]:
    """The best learning rate after a part of the steps, of RATES, or beyond if that is better, and
    the optimizer it goes with."""
    about, tried = SETS[dataset], {}
    if name in about["fixed"]:
        return about["fixed"][name], ""
    for optimizer in about["optimizers"]:
        of_it, rates = {}, RATES
        while rates:
            of_it |= {rate: attempt(name, name, dataset, rate, optimizer, SHORT) for rate in rates}
            best = min(of_it, key=of_it.get)
            rates = [beyond for beyond in (best / 2, best * 2) if beyond not in of_it]
        tried |= {(rate, optimizer): of_it[rate] for rate in of_it}
    best = min(tried, key=tried.get)
    if tried[best] == math.inf:
        fail(f"{name} diverges with every learning rate; see {work}")
    return best


def run_of(label: str, dataset: str) -> tuple[float, str, float]:
    """The learning rate, optimizer and share of the steps of a row. Distilled models have the best
    of three: all steps at `best_rate` or half of it, or a part, since some get worse with time."""
    name, _, length = label.partition("-")
    name = SAMPLERS.get(name, (name,))[0]
    rate, optimizer = best_rate(name, dataset)
    if length == "short" or name not in TEACHER or name in SETS[dataset]["fixed"]:
        return rate, optimizer, SHORT if length else 1
    whole = f"{name}, all steps"
    runs = {(rate, 1): whole, (rate / 2, 1): whole, (rate, SHORT): name}
    rate, share = min(runs, key=lambda run: attempt(runs[run], name, dataset, run[0], optimizer,
                                                    run[1]))
    return rate, optimizer, LONG if length == "long" else share


# ------------------------------------------------------------------------------------ measurements

def steps_of(label: str, seed: int, dataset: str) -> str:
    """All, or for ablations and further seeds of palindromes those of the claims."""
    name = label.partition("-")[0]
    if name == "ar":                                                # takes a step a token anyway
        return "1"
    if name == "gamma" and seed == 1:
        return "8,32,128"
    if dataset == "stories" or label in ALL and seed == 1:
        return SETS[dataset]["steps"]
    if name not in TEACHER:
        return "1,2,4,8,128" if seed == 1 else "128"
    return "8" if name in ("sdtt", "dcd") else "1,2,4"


def measured_so(record: dict, words: list[str], rate: float, optimizer: str, share: float) -> bool:
    """Whether it is a measurement of such a model, by evaluate.py with these words."""
    asked = dict(word[2:].split("=") for word in words)
    about_run = record.get("learning_rate"), record.get("optimizer", ""), record.get("share")
    return about_run == (rate, optimizer, share) and all(
        str(record["settings"].get(key)).lower() == value for key, value in asked.items())


def measure(dataset: str) -> None:
    """All rows of a set, the important ones first."""
    about = SETS[dataset]
    run(Path(work) / f"{dataset}.log", f"data/{dataset}/prepare.py")
    first, ablations = about["models"]
    order = [(label, 1) for label in (*first, *ablations)]
    order += [(name, seed) for seed in range(2, seeds + 1) for name in HEADLINE if name in first]
    for label, seed in order:
        out = Path(results) / dataset / f"{label}-seed{seed}.json"
        name, *more = SAMPLERS.get(label, (label.partition("-")[0],))
        more += about["rivals"] if name in ("mdlm", "duo") else ()
        rate, optimizer, share = run_of(label, dataset)
        steps = steps_of(label, seed, dataset)
        words = [f"--steps={steps}", *about["judging"], *more]
        if measured_so(read(out), words, rate, optimizer, share):
            continue
        checkpoint, training = model(name, dataset, seed, rate, optimizer, share)
        record = evaluate(checkpoint, dataset, steps, more)
        record |= dict(seconds=training["seconds"], learning_rate=rate, share=share)
        record |= dict(optimizer=optimizer) if optimizer else {}
        if name not in TEACHER:
            record["val_loss"] = read_log(checkpoint.with_suffix(".jsonl"))[-1]["val_loss"]
        while name in TEACHER:
            record["seconds"] += teacher_of(name, dataset, seed)[1]["seconds"]
            name = TEACHER[name]
        write(out, record)


# ------------------------------------------------------------------------------------- the program

for dataset in sets.split(","):
    require_choice("sets", dataset, SETS)
for dataset in sets.split(",") if not report else ():
    measure(dataset)
if not measured_sets(Path(results)):
    fail(f"no measurements in {results}; leave out --report to make them")
for folder in measured_sets(Path(results)):
    draw(folder)
write_readme(Path(results))
print(f"wrote {results}/README.md and {results}/*.png")
