"""Distil a discrete diffusion model into one of fewer steps, for comparison with distill.py: mdlm.pt into sdtt.pt by
self-distillation through time, duo.pt into dcd.pt by discrete consistency distillation.

    python baselines/distill.py --method=sdtt --out_dir=out/palindromes --dataset=palindromes
    python baselines/distill.py --method=dcd --out_dir=out/palindromes --dataset=palindromes

In rounds, as published: the student begins as its teacher, learns to do in one step what the teacher does in several
(baselines/mdlm.py, duo.py), and becomes the teacher of the next round, with steps twice as long. Its moving average is that
teacher, and what is sampled: the weights themselves, at a high learning rate, get worse from round to round. After every
round the checkpoint is written; --init_from=resume goes on from there, so a stopped run loses at most the round it is in.
"""

import copy
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402  (after the path)
import storage  # noqa: E402
import training  # noqa: E402
from data.loader import Data  # noqa: E402
from flow import stratified  # noqa: E402

out_dir = "out/pydocs"           # reads mdlm.pt or duo.pt, writes sdtt.pt or dcd.pt and their logs
dataset = "pydocs"               # must have the vocabulary that the teacher was trained on
method = "sdtt"                  # or dcd
teacher = ""                     # another file than out_dir/mdlm.pt or duo.pt
init_from = "scratch"            # or resume: after the last round that was finished
rounds = 5                       # the teacher's steps grow from first_step to 2^(rounds - 1) times that
first_step = 1 / 128             # length of the teacher's steps in the first round; tau runs from 0 to 1
log_interval = 100
batch_size = 64
max_iters = 1500                 # optimizer steps, all rounds together
learning_rate = 1e-3
schedule = "cosine"              # over all rounds; constant as published
min_lr = 2e-5
warmup_iters = 100
optimizer = "adamw"
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.0
grad_clip = 1.0
ema_decay = 0.999
device = "auto"
dtype = "auto"
seed = 1

settings = common.configure(globals(), sys.argv[1:])
globals().update(settings)
TEACHERS = {"sdtt": "mdlm", "dcd": "duo"}
common.require_choice("method", method, TEACHERS)
common.require_choice("optimizer", optimizer, ("adamw", "muon"))
common.require_choice("schedule", schedule, ("constant", "cosine"))
common.require_in(settings, "[1, inf)", "rounds", "batch_size", "max_iters", "log_interval")
common.require_in(settings, "(0, 1)", "first_step")
common.require_in(settings, "(0, inf)", "learning_rate")
common.require_in(settings, "[0, inf)", "min_lr", "warmup_iters", "weight_decay", "grad_clip", "seed")
common.require_in(settings, "[0, 1)", "beta1", "beta2", "ema_decay")
training.require_falling(settings)
if max_iters < rounds:
    common.fail(f"max_iters={max_iters} is less than one step for each of {rounds} rounds")
if first_step * 2 ** (rounds - 1) > 1:
    common.fail(f"first_step={first_step} in {rounds} rounds ends in steps longer than all of time; lower one of them")

machine = common.Machine(common.with_float64(device), dtype)
if machine.world > 1:
    common.fail("baselines/distill.py runs as one process; start it with python")
kind, path = TEACHERS[method], Path(out_dir) / f"{method}.pt"
teacher = teacher or str(Path(out_dir) / f"{kind}.pt")
source = storage.load_checkpoint(teacher, kind)
data = Data(dataset, "train", source["model_config"]["block_size"], seed)
storage.require_same_vocabulary(source, data)
fixed = ("rounds", "first_step", "max_iters", "optimizer", "beta1", "beta2", "weight_decay", "batch_size", "seed")
checkpoint = storage.load_resumable(path, method, init_from, settings, fixed, machine)
student = storage.build_model(checkpoint or source, machine.device, "model" if checkpoint else "ema")
ema = copy.deepcopy(student).eval()
optimizers = training.make_optimizers(student, optimizer, learning_rate, (beta1, beta2), weight_decay, machine.dtype)
done = storage.restore_run(checkpoint, ema, optimizers, machine, data) if checkpoint else 0             # rounds
clock = storage.build_clock(student.config, source["clock_embedding_share"], machine.device)
distillation_loss = importlib.import_module(f"baselines.{kind}").distillation_loss
log = storage.Log(path, machine, bool(checkpoint), done * (max_iters // rounds), "", settings)
watch = training.LossWatch(machine, "tau")
progress = training.Progress(done * (max_iters // rounds), max_iters, batch_size * data.L)
training.announce(f"baseline {method}", student, machine, len(data.tokens), batch_size * data.L, max_iters, path, passes=5)

for round_number in range(done, rounds):
    frozen = copy.deepcopy(ema)
    for i in range(max_iters // rounds):
        step = round_number * (max_iters // rounds) + i
        training.set_learning_rate(optimizers, training.learning_rate_at(step, learning_rate, min_lr, schedule, warmup_iters,
                                                                         max_iters))
        y = machine.put(data.rows(step * batch_size, batch_size))               # (B, L)
        tau = machine.put(stratified(batch_size, common.generator(seed, common.TIMES, step)).float())     # (B,)
        random = common.generator(seed, common.NOISE, step, device=machine.device)
        with machine.autocast():
            loss, losses = distillation_loss(student, frozen, clock, y, tau, first_step * 2 ** round_number, random)
        machine.scaler.scale(loss).backward()
        watch.see(step + 1, losses.mean(1), tau)
        training.optimizer_step(student, optimizers, machine, grad_clip)
        training.update_ema(ema, student, ema_decay, step)
        if progress.should_stop(machine):
            print(f"stopped in round {round_number + 1}; --init_from=resume begins it anew", file=sys.stderr)
            sys.exit(130)
        if (step + 1) % log_interval == 0:
            watch.check()
            log.write(step + 1, loss=loss.item())
            print(f"round {round_number + 1}/{rounds}, step {step + 1}/{max_iters} | loss {loss.item():.4f} | "
                  f"{progress.line(step + 1)}", flush=True)
    watch.check()
    storage.save_run(path, method, student, ema, optimizers, machine, settings, data, source["clock_embedding_share"],
                     round_number + 1)
print(f"done: {path}")
