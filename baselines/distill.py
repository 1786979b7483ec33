"""Distil a discrete diffusion model into one of fewer steps, for comparison with distill.py.

    python baselines/distill.py --method=sdtt --out_dir=out/palindromes --dataset=palindromes
    python baselines/distill.py --method=dcd --out_dir=out/palindromes --dataset=palindromes

sdtt turns mdlm.pt into sdtt.pt, dcd turns duo.pt into dcd.pt; mdlm.py and duo.py explain how. Both
go in rounds, as published: the student starts as its teacher, learns to do in one step what the
teacher does in several, and becomes the teacher of the next round, with steps twice as long. That
teacher, and what is sampled, is the moving average of the weights: at a high learning rate the
weights themselves get worse from round to round. Each round ends with a checkpoint; a run that is
stopped loses the round it is in.
"""

import copy
import importlib
import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the top folder

from data.loader import Data
from flow import stratified
from lib import checkpoint as ckpt
from lib.machine import NOISE, TIMES, Machine, generator, with_float64
from lib.optim import Muon, learning_rate_at
from lib.settings import configure, fail, require_choice, require_in, require_trainable

out_dir = "out/stories"          # reads mdlm.pt or duo.pt, writes sdtt.pt or dcd.pt and their logs
dataset = "stories"              # must have the vocabulary of the teacher
method = "sdtt"                  # or dcd
teacher_path = ""                # "" = out_dir/mdlm.pt or duo.pt
init_from = "scratch"            # or resume: after the last finished round
rounds = 5                       # the teacher's steps grow from first_step to 2^(rounds - 1) of it
first_step = 1 / 128             # length of the teacher's steps in the first round, in tau
log_interval = 100
batch_size = 64
max_iters = 1500                 # optimizer steps, all rounds together
learning_rate = 1e-3
schedule = "cosine"              # over all rounds; or constant, as published
min_lr = 2e-5
warmup_iters = 100
optimizer = "adamw"              # or muon
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.0
grad_clip = 1.0
ema_decay = 0.999
device = "auto"
dtype = "auto"
seed = 1

settings = configure(globals(), sys.argv[1:])
globals().update(settings)
TEACHERS = {"sdtt": "mdlm", "dcd": "duo"}
require_choice("method", method, TEACHERS)
require_in(settings, "[1, inf)", "rounds")
require_in(settings, "(0, 1)", "first_step")
require_trainable(dict(gradient_accumulation_steps=1, eval_interval=1, eval_iters=1, dropout=0.0)
                  | settings)
per_round = max_iters // rounds
if per_round == 0:
    fail(f"max_iters={max_iters} is less than one step for each of {rounds} rounds")
if first_step * 2 ** (rounds - 1) > 1:
    fail(f"first_step={first_step} in {rounds} rounds ends in steps longer than all of time")

machine = Machine(with_float64(device), dtype)
if machine.world > 1:
    fail("baselines/distill.py runs as one process; start it with python")
kind, path = TEACHERS[method], Path(out_dir) / f"{method}.pt"
distillation_loss = importlib.import_module(f"baselines.{kind}").distillation_loss
source = ckpt.load_checkpoint(teacher_path or Path(out_dir) / f"{kind}.pt", kind)
data = Data(dataset, "train", source["model_config"]["block_size"], seed)
ckpt.require_same_vocabulary(source, data)
checkpoint = ckpt.load_resumable(path, method, init_from, settings,
                                 ["rounds", "first_step", "max_iters", *ckpt.FIXED], machine)
student = ckpt.build_model(checkpoint or source, machine.device, "model" if checkpoint else "ema")
ema = copy.deepcopy(student).eval()

muon = [p for name, p in student.named_parameters() if optimizer == "muon" and p.ndim == 2
        and not name.startswith(("embed", "positions", "head"))]
rest = [p for p in student.parameters() if not any(p is matrix for matrix in muon)]
optimizers = [torch.optim.AdamW(rest, learning_rate, (beta1, beta2), weight_decay=weight_decay,
                                fused=True)]
if muon:
    optimizers.append(Muon(muon, learning_rate, weight_decay, machine.dtype == "bfloat16"))
done = ckpt.restore_run(checkpoint, ema, optimizers, machine, data) if checkpoint else 0  # rounds

log = ckpt.Log(path, machine, bool(checkpoint), done * per_round, "", settings)
print(f"{method}: {rounds} rounds of {per_round:,} steps, {machine.describe()}", flush=True)
for step in range(done * per_round, rounds * per_round):
    k, i = divmod(step, per_round)                                  # step i of round k
    if i == 0:
        frozen = copy.deepcopy(ema)
    lr = learning_rate_at(step, settings)
    for group in (group for opt in optimizers for group in opt.param_groups):
        group["lr"] = lr

    y = machine.put(data.rows(step * batch_size, batch_size))       # (B, L)
    tau = machine.put(stratified(batch_size, generator(seed, TIMES, step)).float())  # (B,)
    rng = generator(seed, NOISE, step, 0, device=machine.device)
    with machine.autocast():
        loss, _ = distillation_loss(student, frozen, None, y, tau, first_step * 2 ** k, rng)
    machine.scaler.scale(loss).backward()
    for opt in optimizers:
        machine.scaler.unscale_(opt)
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), grad_clip or math.inf)
    overflow = machine.scaler.is_enabled() and not norm.isfinite()  # of float16: see train.py
    for opt in optimizers:
        if not overflow:
            machine.scaler.step(opt)
        opt.zero_grad()
    machine.scaler.update()
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(student.parameters()),
                             1 - min(ema_decay, (1 + step) / (10 + step)))

    ends = i == per_round - 1
    if (step + 1) % log_interval == 0 or ends:
        value = loss.item()                                         # waits for the device
        if not math.isfinite(value):
            fail(f"the loss is not finite at step {step + 1}; the last checkpoint is untouched; "
                 f"try a lower learning_rate")
        log.write(step + 1, loss=value)
        print(f"round {k + 1}/{rounds}, step {step + 1}/{max_iters} | loss {value:.4f}", flush=True)
    if ends:
        ckpt.save_checkpoint(path, dict(
            format="flm-1", kind=method, model_config=asdict(student.config),
            model=student.state_dict(), ema=ema.state_dict(),
            optimizers=[opt.state_dict() for opt in optimizers],
            scaler=machine.scaler.state_dict(), settings=settings, step=k + 1,
            clock_embedding_share=source["clock_embedding_share"], train_tokens=len(data.tokens),
            tokenizer=data.tokenizer, vocabulary=data.meta["tokenizer"]))
print(f"done: {path}")
