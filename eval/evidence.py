"""The evidence: every model on the same text, transformer and number of tokens, judged alike.

    python eval/evidence.py --sets=palindromes              # hours, on two CPU cores
    python eval/evidence.py --scorer=SmolLM2-135M.gguf      # all sets; a foreign model judges text
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
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # the top folder
from eval.report import HEADLINE, STEPS, draw, found, measured_sets, read, score, write_readme
from lib.checkpoint import read_log, replace_file
from lib.settings import configure, fail, require_choice, require_in

sets = "palindromes,pydocs,pydocs4096"      # the last has 4,096 byte pairs, for clocks and noise
seeds = 3                        # runs of the models in HEADLINE; the others have one
work = "out/evidence"            # checkpoints and logs
results = "results"              # measurements, figures, README.md
scorer = ""                      # judges text besides our own ar.pt: anything transformers loads
report = False                   # only write what follows from results/

settings = configure(globals(), sys.argv[1:])
globals().update(settings)
require_in(settings, "[1, inf)", "seeds")

TEACHER = {"sdtt": "mdlm", "dcd": "duo", "psd": "flm", "self": "flm"} | dict.fromkeys(
    ("psd_published", "lsd_published", "esd_published"), "flm_published")
LIKE_FLM = {"clock0": "--clock_embedding_share=0", "clock1": "--clock_embedding_share=1",
            "flm_published": "--time_scale=1"}                      # at its learning rate
PUBLISHED = ["--diagonal_share=0.5", "--full_jump_share=0.03125", "--full_jump_ramp=false",
             "--split=0.5", "--teacher_temperature=1"]
SAMPLERS = {"gamma": ("flm", "--gamma=0.9")}                        # another way to sample a model
RATES = (1e-3, 2e-3, 4e-3)
LONG = 4                         # psd-long has so many times the steps of psd
ALL = ["flm", "gamma", "psd", "mdlm", "sdtt", "duo", "dcd", "ar"]   # important ones first
ABLATIONS = ["psd-short", "self-short", "psd_published-short", "lsd_published-short",
             "esd_published-short", "mse", "noclock", "psd-long"]   # short: after `tuning` of steps
SETS = {  # clean: positions as large as the rows of the embedding, where clean tokens are read
    "palindromes": dict(
        config="palindromes", iters=1000, distill_iters=5500, tuning=1 / 4, shape=(),
        clean="--position_std=0.2", discrete=("--batch_size=128", "--optimizer=muon"),
        models=(ALL, ABLATIONS), judging=("--num_samples=2000", "--temperatures=argmax,0.3,0.5,1")),
    "pydocs": dict(  # tuned on half, since masked models learn nothing in the first 1,000 steps
        config="pydocs", iters=3000, distill_iters=1500, tuning=1 / 2,
        shape=("--n_embd=128", "--block_size=32"),                  # half the demo's
        clean="--position_std=0.03", discrete=("--batch_size=64", "--optimizer=adamw"),
        models=(ALL, ["clock0", "clock1", *ABLATIONS, "dense"]),
        judging=("--num_samples=1000", "--temperatures=argmax,0.5,0.65,0.8,1,1.2,1.5",
                 "--noise_scales=0.5,0.6,0.7,0.8,0.9,1,1.1,1.3,1.6", "--sweep_samples=50",
                 "--scorer_samples=250"))}
SETS["pydocs4096"] = SETS["pydocs"] | dict(
    models=(["ar"], ["clock0", "flm", "clock1", "dense"]), rates="pydocs",      # found there
    prepare=("--vocab_size=4096", "--out_dir=data/pydocs4096"))


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


def model(name: str, dataset: str, seed: int, rate: float, share: float = 1.0,
          may_fail: bool = False) -> tuple[Path, dict]:
    """The checkpoint of a model, trained at this rate for `share` of the steps, now if need be. And
    a record of its run: its words, core seconds, whether it finished."""
    about = SETS[dataset]
    part = {about["tuning"]: "-tuning", LONG: "-long"}.get(share, "")
    folder = Path(work) / dataset / f"seed{seed}" / f"rate-{rate:g}{part}"
    path, iters = folder / f"{name}.pt", about["iters"]
    if name in TEACHER:
        teacher, _ = teacher_of(name, dataset, seed)
        iters = about["distill_iters"]
    if name in ("sdtt", "dcd"):
        words = ["baselines/distill.py", f"--method={name}", f"--teacher_path={teacher}",
                 *about["discrete"]]
    elif name in TEACHER:
        path = folder / name / "fmlm.pt"
        objective, options = name[:3], PUBLISHED if name.endswith("published") else ()
        if name == "self":
            objective, options = "psd", ["--self_distill", "--teacher_temperature=1"]
        words = ["distill.py", f"config/distill_{about['config']}.py", f"--objective={objective}",
                 *options, f"--teacher_path={teacher}"]
    else:
        method, options = f"--method={name}", [about["clean"]] * (name in ("ar", "mdlm", "duo"))
        if name in LIKE_FLM:
            path, method, options = folder / name / "flm.pt", "--method=flm", [LIKE_FLM[name]]
        words = ["train.py", f"config/{about['config']}.py", method, *options, *about["shape"]]
    words += [f"--out_dir={path.parent}", f"--dataset={dataset}", f"--learning_rate={rate}",
              f"--seed={seed}", f"--max_iters={int(iters * share)}"]
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
    rate = best_rate("flm" if teacher in LIKE_FLM else teacher, dataset)
    return model(teacher, dataset, seed, rate)


def evaluate(checkpoint: Path, dataset: str, steps: int | str, ours_only: bool = False,
             more: tuple = ()) -> dict:
    """The result of evaluate.py. Our own autoregressive model judges text, then `scorer`."""
    judges, out = [], checkpoint.with_suffix(".judged.json")
    if dataset != "palindromes":
        judges = [str(model("ar", dataset, 1, best_rate("ar", dataset))[0])]
        judges += [scorer] if scorer and not ours_only else []
    run(checkpoint.with_suffix(".judged.log"), "eval/evaluate.py", f"--source={checkpoint}",
        f"--dataset={dataset}", f"--steps={steps}", *SETS[dataset]["judging"], *more,
        f"--scorer={','.join(judges)}", f"--bound={not ours_only}", f"--out={out}")
    return read(out)


# ---------------------------------------------------------------------------------- learning rates

def attempt(key: str, name: str, dataset: str, rate: float, share: float) -> float:
    """The badness of a model after a share of the steps, from results/<set>/rates.json or measured
    now. Infinite if the run diverges."""
    path, rate = Path(results) / dataset / "rates.json", f"{rate:g}"
    tried = read(path).get(key, {})
    if rate not in tried:
        checkpoint, record = model(name, dataset, 1, float(rate), share, may_fail=True)
        tried[rate] = badness(name, dataset, checkpoint) if record["finished"] else math.inf
        write(path, read(path) | {key: tried})
    return tried[rate]


def badness(name: str, dataset: str, checkpoint: Path) -> float:
    """What the learning rate should minimise: the validation loss, or for distilled models the
    negated score at their HEADLINE steps under our own judge. A sweep that misses the data's
    entropy is worse than any perplexity, the more so the farther it stays."""
    if name not in TEACHER:
        return read_log(checkpoint.with_suffix(".jsonl"))[-1]["val_loss"]
    steps = HEADLINE.get(name, 1)
    record = evaluate(checkpoint, dataset, steps, ours_only=True)
    if value := score(record, steps):
        return -value["value"] if dataset == "palindromes" else value["value"]
    held_out, *entropies = [row["entropy"]["value"] for row in record["rows"]]
    return 1e9 * (1 + min(abs(entropy - held_out) for entropy in entropies))


def best_rate(name: str, dataset: str) -> float:
    """The best learning rate after a part of the steps: of RATES, or beyond if that is better."""
    dataset = SETS[dataset].get("rates", dataset)
    tried, rates = {}, RATES
    while rates:
        tried |= {rate: attempt(name, name, dataset, rate, SETS[dataset]["tuning"])
                  for rate in rates}
        best = min(tried, key=tried.get)
        if tried[best] == math.inf:
            fail(f"{name} diverges with every learning rate; see {work}")
        rates = [beyond for beyond in (best / 2, best * 2) if beyond not in tried]
    return best


def run_of(label: str, dataset: str) -> tuple[float, float]:
    """The learning rate and share of the steps of a row. Distilled models have the best of three:
    all steps at `best_rate` or half of it, or a part, since some get worse with time."""
    name, _, length = label.partition("-")
    name = "flm" if name in (*LIKE_FLM, *SAMPLERS) else name
    rate, part = best_rate(name, dataset), SETS[dataset]["tuning"]
    if length == "short" or name not in TEACHER:
        return rate, part if length else 1
    whole = f"{name}, all steps"
    runs = {(rate, 1): whole, (rate / 2, 1): whole, (rate, part): name}
    rate, share = min(runs, key=lambda run: attempt(runs[run], name, dataset, *run))
    return rate, LONG if length == "long" else share


# ------------------------------------------------------------------------------------ measurements

def steps_of(label: str, seed: int, dataset: str) -> str:
    """Those of the claims for ablations and further seeds, since judging is slow; or else STEPS."""
    name = label.partition("-")[0]
    if name == "ar":                                                # takes a step a token anyway
        return "1"
    if name == "gamma" and seed == 1:
        return "8,32,128"
    if label in SETS[dataset]["models"][0] and seed == 1:
        return ",".join(map(str, STEPS))
    if name not in TEACHER:
        return "1,2,4,8,128" if dataset == "palindromes" and seed == 1 else "128"
    return "8" if name in ("sdtt", "dcd") else "1,2,4"


def measured_so(record: dict, words: list[str], rate: float, share: float) -> bool:
    """Whether it is a measurement of such a model, by evaluate.py with these words."""
    asked = dict(word[2:].split("=") for word in words)
    return (record.get("learning_rate"), record.get("share")) == (rate, share) and all(
        str(record["settings"].get(key)).lower() == value for key, value in asked.items())


def require_same_judge(dataset: str) -> None:
    """Exits if text was judged by another scorer: the numbers cannot be compared."""
    asked = os.path.basename(scorer.rstrip("/")) or "ar.pt"
    for record in found(Path(results) / dataset, "*"):
        if dataset != "palindromes" and (judge := record["scorers"][-1]) != asked:
            fail(f"{results}/{dataset} was judged by {judge}; give that as --scorer=, or another "
                 "folder as --results=")


def measure(dataset: str) -> None:
    """All rows of a set, the important ones first."""
    about, log = SETS[dataset], Path(work) / f"{dataset}.log"
    for needed in dict.fromkeys((about.get("rates", dataset), dataset)):
        run(log, f"data/{about['config']}/prepare.py", *SETS[needed].get("prepare", ()))
    first, ablations = about["models"]
    order = [(label, 1) for label in (*first, *ablations)]
    order += [(name, seed) for seed in range(2, seeds + 1) for name in HEADLINE if name in first]
    for label, seed in order:
        out = Path(results) / dataset / f"{label}-seed{seed}.json"
        name, *more = SAMPLERS.get(label, (label.partition("-")[0],))
        rate, share = run_of(label, dataset)
        steps = steps_of(label, seed, dataset)
        if measured_so(read(out), [f"--steps={steps}", *about["judging"], *more], rate, share):
            continue
        require_same_judge(dataset)
        checkpoint, training = model(name, dataset, seed, rate, share)
        record = evaluate(checkpoint, dataset, steps, more=more)
        record |= dict(seconds=training["seconds"], learning_rate=rate, share=share)
        if name in TEACHER:
            record["seconds"] += teacher_of(name, dataset, seed)[1]["seconds"]
        else:
            record["val_loss"] = read_log(checkpoint.with_suffix(".jsonl"))[-1]["val_loss"]
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
