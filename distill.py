"""Distil a flow language model into a flow map (FMLM), which writes a text in one evaluation.

    python distill.py                                   # out/stories/flm.pt -> fmlm.pt there
    python distill.py config/mend_stories.py            # fmlm.pt there -> mended.pt
    torchrun --nproc_per_node=8 distill.py config/distill_owt.py

The student is the FLM with a second time embedding, which starts at zero: it does not know yet
where to jump. Part of every batch keeps it a denoiser (the diagonal: jumps of no length, taught by
the frozen FLM). The rest teaches jumps of every length, some of them full, from noise to text, by
one of three objectives (flowmap.py). Both read the same noisy state, so E is shared and frozen.

Notable: the default objective needs forward passes only, since two short jumps are the target of a
long one. Long jumps are learned last; the log shows the loss by jump length.
"""

import contextlib
import copy
import math
import sys
from dataclasses import asdict
from pathlib import Path

from lib.settings import configure, fail, require_choice, require_in, require_trainable
import torch  # after lib.settings, which says how its threads wait
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import flowmap
from data.loader import Data
from flow import Clock, draw_known, noise_factor, stratified
from lib import checkpoint as ckpt
from lib.machine import (DROPOUT, NOISE, TIMES, VAL_NOISE, VAL_TIMES, Machine, Progress, generator,
                         mix)
from lib.mend import mending_loss
from lib.optim import Muon, learning_rate_at

# -- input and output
out_dir = "out/stories"          # reads flm.pt, writes fmlm.pt, or with mend mended.pt, and a log
dataset = "stories"              # must have the vocabulary that the FLM was trained on
teacher_path = ""                # the FLM or, with mend, a map; "" = out_dir/flm.pt, or fmlm.pt
trust_checkpoint = False         # read the teacher although its file holds other Python objects
n_head = 0                       # of a released teacher that does not say it
block_size = 0                   # tokens in a sequence; 0 = as many as the teacher was trained on
init_from = "scratch"            # or resume: continue the file it wrote; or auto, if there is one
start_from = ""                  # with mend: the flow map to start with; "" = teacher_path
eval_interval = 250              # steps between validations; each also writes the checkpoint
keep_best = False                # also fmlm.best.pt, which agrees best with itself: see validate
eval_iters = 8                   # validation batches
log_interval = 25                # steps between progress lines
wandb_project = ""               # log there too, if named
# -- method
mend = False                     # ours: a second stage, for fewer steps; see lib/mend.py
objective = "psd"                # or lsd, esd: they differentiate in tau; train with time_scale = 1
self_distill = False             # the diagonal learns from the data; the start is still the FLM
teacher_temperature = 1.0        # above 1 the teacher is softer: maps are less varied than flows
diagonal_share = 0.5             # of every batch; the rest learns jumps
full_jump_share = 1 / 32         # of the jumps: from noise to text in one
full_jump_ramp = False           # let it grow from 0: the full jump builds on shorter ones
split = 0.5                      # psd: the two jumps of a target meet at this part of the way
context_share = 0.0              # share of rows told some tokens, if the teacher was, too
target_ema = False               # targets by the moving average instead of the student itself
dropout = 0.0                    # of the student, not of its average or the teacher
# -- optimization
batch_size = 64                  # sequences in a micro-step of one process
gradient_accumulation_steps = 1  # micro-steps of a step, over all processes
max_iters = 1500                 # optimizer steps
learning_rate = 1e-3
schedule = "cosine"              # or constant, as published
min_lr = 1e-4                    # where the cosine ends
warmup_iters = 100
optimizer = "adamw"              # or muon, for the matrices between embedding and head
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.0
grad_clip = 1.0                  # largest norm of the gradient; 0 = any
ema_decay = 0.999                # moving average of the weights: validated and sampled
# -- system
device = "auto"                  # cuda, mps or cpu
dtype = "auto"                   # bfloat16, float16, float32; auto: the fastest the hardware has
compile = False                  # torch.compile: worth it on a GPU, needs a C++ compiler on a CPU
seed = 1

settings = configure(globals(), sys.argv[1:])
globals().update(settings)
require_choice("objective", objective, flowmap.OBJECTIVES)
require_trainable(settings)
require_in(settings, "[0, 1)", "diagonal_share")
require_in(settings, "[0, 1]", "full_jump_share", "context_share")
require_in(settings, "(0, 1)", "split")
require_in(settings, "(0, inf)", "teacher_temperature")
require_in(settings, "[0, inf)", "block_size", "n_head")
n_diagonal = round(diagonal_share * batch_size)
if n_diagonal == batch_size or (diagonal_share and not n_diagonal):
    fail(f"diagonal_share={diagonal_share} of batch_size={batch_size} leaves no row for "
         f"{'jumps' if n_diagonal else 'the diagonal'}")
if mend and (n_diagonal or self_distill or not target_ema or
             (objective, split, teacher_temperature) != ("psd", 0.5, 1)):
    fail("mend has a loss of its own, on the student's drafts; set diagonal_share=0, target_ema; "
         "leave out objective, self_distill, split, teacher_temperature")
if start_from and not mend:
    fail("start_from is the flow map that mend improves; add --mend, or leave it out")
if objective == "psd" and not n_diagonal and not mend:
    fail("objective=psd learns the flow from the diagonal alone; set diagonal_share above 0")
if self_distill and teacher_temperature != 1:
    fail("self_distill learns from the data, not from a teacher; add --teacher_temperature=1")

# ------------------------------------------------------------------------------ machine

machine = Machine(device, dtype)
if gradient_accumulation_steps % machine.world:
    fail(f"gradient_accumulation_steps={gradient_accumulation_steps} must be a multiple of the "
         f"{machine.world} processes, which share the micro-steps of a step")
local_steps = gradient_accumulation_steps // machine.world
sequences = batch_size * gradient_accumulation_steps  # in one optimizer step

# ------------------------------------------------------------------------------ teacher, data

path = Path(out_dir) / ("mended.pt" if mend else "fmlm.pt")
teacher_path = teacher_path or str(Path(out_dir) / ("fmlm.pt" if mend else "flm.pt"))
start_from = start_from or teacher_path
source = ckpt.load_checkpoint(teacher_path, "" if mend else "flm", trust_checkpoint, n_head)
start = ckpt.load_checkpoint(start_from, "fmlm", trust_checkpoint, n_head) if mend else source
for file, name in ((start, start_from), (source, teacher_path)):
    block_size = ckpt.set_length(file, block_size, name)
    if context_share and not ckpt.has_context(file):
        fail(f"{name} was trained with context_share=0; distil it with --context_share=0")
data = Data(dataset, "train", block_size, seed)
val_data = Data(dataset, "val", block_size, seed)
ckpt.require_same_vocabulary(source, data)
if source.get("mended"):
    fail(f"{teacher_path} is mended already; give the map before, or its flow, as --teacher_path")


def draw_times(micro_steps: int, full_share: float, rng: torch.Generator):
    """tau_s and tau_t, (micro_steps, B) each: the first n_diagonal of a batch are equal, the others
    jumps, with mend to the end. All are stratified over the optimizer step."""
    n_jumps = micro_steps * (batch_size - n_diagonal)
    diagonal = stratified(micro_steps * n_diagonal, rng).view(micro_steps, -1)
    length, place, u = (stratified(n_jumps, rng) for _ in range(3))
    jumps = [tau.view(micro_steps, -1)
             for tau in flowmap.off_diagonal_times(length, place, u < full_share)]
    jumps[1] = torch.ones_like(jumps[0]) if mend else jumps[1]
    return [torch.cat([diagonal, tau], dim=1).float() for tau in jumps]


def batch(n: int):
    """Micro-step n of this process: its key, tokens (B, L), times tau_s and tau_t (B,)."""
    at, i = divmod(n, local_steps)
    j = i * machine.world + machine.rank
    share = full_jump_share * (min(1, at / max_iters) if full_jump_ramp else 1)
    rng = generator(seed, TIMES, at)
    tau_s, tau_t = draw_times(gradient_accumulation_steps, share, rng)
    y = data.rows(at * sequences + j * batch_size, batch_size)
    return (at, j), machine.put(y), machine.put(tau_s[j]), machine.put(tau_t[j])

# ------------------------------------------------------------------------------ student

fixed = ("block_size", "mend", "objective", "self_distill", "teacher_temperature",
         "diagonal_share", "full_jump_share", "full_jump_ramp", "split", "context_share",
         "target_ema", "dropout", *ckpt.FIXED)
checkpoint = ckpt.load_resumable(path, "fmlm", init_from, settings, fixed, machine)
torch.manual_seed(seed)
teacher = ckpt.build_model(source, machine.device)
more = {} if checkpoint or mend else dict(flow_map=True)            # a second time embedding
student = ckpt.build_model(checkpoint or start, machine.device, "model" if checkpoint else "ema",
                           dropout=dropout, **more)
bias = teacher.head.bias.cpu()
if not torch.equal(student.embed.weight, teacher.embed.weight) or not torch.equal(
        (checkpoint or {}).get("teacher", bias), bias):
    fail(f"{path if checkpoint else start_from} was distilled from another network than "
         f"{teacher_path}; give that as --teacher_path, or distil anew with --init_from=scratch")
student.embed.weight.requires_grad_(False)
student.head.compiled = compile                                     # its loss, too
ema = copy.deepcopy(student).eval()
clock_embedding_share = source["clock_embedding_share"]
clock = Clock(*student.embed.weight.shape, clock_embedding_share, machine.device)
factor = noise_factor(student.embed.weight)  # E is frozen: once is enough
frequency = machine.put(data.frequency()) if mend else torch.zeros(0)           # (V,)
draft_bias = machine.put((checkpoint or {}).get("draft_bias", torch.zeros(len(frequency))))
del source, start                                                   # their memory
net, teacher = (torch.compile(n, dynamic=False) if compile else n for n in (student, teacher))


def loss_of(net, target_net, y, tau_s, tau_t, rng, bias, known=None):
    with machine.autocast():
        if mend:
            return mending_loss(net, target_net, teacher, clock, y, tau_s, rng, frequency, bias,
                                factor, known, teacher.config.flow_map)
        return flowmap.loss(net, target_net, None if self_distill else teacher, clock, objective, y,
                            tau_s, tau_t, rng, n_diagonal, factor, split, teacher_temperature,
                            known)


class Loss(nn.Module):
    """The loss as a module for DistributedDataParallel. Targets come from unwrapped networks."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.register_buffer("bias", draft_bias)  # all processes have that of the first

    def forward(self, y, tau_s, tau_t, rng):
        known = draw_known(y.shape, context_share, rng) if context_share else None
        return loss_of(self.net, ema if target_ema else net, y, tau_s, tau_t, rng, self.bias, known)


training_loss = Loss(net)
if machine.world > 1:
    training_loss = DistributedDataParallel(training_loss, gradient_as_bucket_view=True)

# ------------------------------------------------------------------------------ optimizer

learned = {name: p for name, p in student.named_parameters() if p.requires_grad}
muon = [p for name, p in learned.items() if optimizer == "muon" and p.ndim == 2
        and not name.startswith(("positions", "head"))]
rest = [p for p in learned.values() if not any(p is matrix for matrix in muon)]
optimizers = [torch.optim.AdamW(rest, learning_rate, (beta1, beta2), weight_decay=weight_decay,
                                fused=machine.device.type != "mps")]
if muon:
    optimizers.append(Muon(muon, learning_rate, weight_decay, machine.dtype == "bfloat16"))

# ------------------------------------------------------------------------------ resume, save

step = ckpt.restore_run(checkpoint, ema, optimizers, machine, data) if checkpoint else 0
saved_at = step if checkpoint else None
del checkpoint
log = ckpt.Log(path, machine, saved_at is not None, step, wandb_project, settings)


def save(best: bool = False) -> None:
    if machine.main:
        ckpt.save_checkpoint(path, best=best, checkpoint=dict(
            format="flm-1", kind="fmlm", model_config=asdict(student.config), step=step,
            model=student.state_dict(), ema=ema.state_dict(), settings=settings,
            optimizers=[opt.state_dict() for opt in optimizers],
            scaler=machine.scaler.state_dict(), clock_embedding_share=clock_embedding_share,
            mended=mend, draft_bias=draft_bias, teacher=teacher.head.bias,
            train_tokens=len(data.tokens), tokenizer=data.tokenizer, layout=data.layout,
            vocabulary=data.meta["tokenizer"], checker=data.meta.get("checker")))


@torch.no_grad()
def validate() -> tuple[float, list[float]]:
    """Of the moving average, on held-out text, nats per token: the mean loss; the loss on the
    diagonal, then the loss of jumps in tenths of their length on the clock, full jumps among the
    last. Every call uses the same texts, times and noise. The moving average makes the targets of
    jumps, too: their losses say how well it agrees with itself, not how good it is. Compare the
    texts of two runs, not these losses."""
    total = torch.zeros(2, 11, device=machine.device)               # losses, counts
    tau_s, tau_t = draw_times(eval_iters, 1 / 8, generator(seed, VAL_TIMES))    # 1 in 8 is full
    for i in range(machine.rank, eval_iters, machine.world):
        y = machine.put(val_data.rows(i * batch_size, batch_size))
        start, end = machine.put(tau_s[i]), machine.put(tau_t[i])
        rng = generator(seed, VAL_NOISE, i, device=machine.device)
        losses = loss_of(ema, ema, y, start, end, rng, draft_bias.clone())[1].mean(1)       # (B,)
        bins = 1 + ((end - start) * 10).long().clamp_max(9)
        bins[:n_diagonal] = 0
        total.index_add_(1, bins, torch.stack([losses, torch.ones_like(losses)]))
    losses, counts = machine.total(total).cpu()
    return (losses.sum() / counts.sum()).item(), (losses / counts).tolist()

# ------------------------------------------------------------------------------ loop

if machine.main:
    n_tokens = max_iters * sequences * block_size
    print(f"flow map of {teacher_path}{f', from {start_from}' * mend}; {machine.describe()}; "
          f"{max_iters:,} steps, {n_tokens / len(data.tokens):.1f} epochs -> {path}", flush=True)
skipped = 0                                                         # steps in a row
progress = Progress(step, max_iters, sequences * block_size)
next_batch = batch(step * local_steps)
while True:
    lr = learning_rate_at(step, settings)
    for group in (group for opt in optimizers for group in opt.param_groups):
        group["lr"] = lr

    if (step % eval_interval == 0 or step == max_iters) and step != saved_at:
        mean, bins = validate()
        ckpt.require_finite(mean, step)
        kept = [None if math.isnan(x) else x for x in bins]         # NaN: no jump of this length
        log.write(step, val_loss=mean, val_diagonal=kept[0], val_loss_by_length=kept[1:])
        if machine.main:
            print(f"step {step}: validation loss {mean:.3f}; diagonal {bins[0]:.2f}; by length "
                  f"0..1: {' '.join(f'{x:.2f}' for x in bins[1:])}".replace("nan", "-"), flush=True)
        if step > 0:
            save(best=keep_best and log.new_best(mean))
            saved_at = step
        progress.restart(step)
    if step >= max_iters or progress.should_stop(machine):
        break

    student.train()
    means = torch.zeros(2, device=machine.device)                   # of the loss, of the mass cut
    for i in range(local_steps):
        key, y, tau_s, tau_t = next_batch
        rng = generator(seed, NOISE, *key, device=machine.device)
        torch.manual_seed(mix(seed, DROPOUT, *key))
        wait = machine.world > 1 and i < local_steps - 1
        with training_loss.no_sync() if wait else contextlib.nullcontext():
            loss, _, cut = training_loss(y, tau_s, tau_t, rng)
            next_batch = batch(step * local_steps + i + 1)
            machine.scaler.scale(loss / local_steps).backward()
        means += torch.stack([loss.detach(), cut.mean()]) / local_steps
    for opt in optimizers:
        machine.scaler.unscale_(opt)
    norm = nn.utils.clip_grad_norm_(student.parameters(), grad_clip or math.inf)
    overflow = machine.scaler.is_enabled() and not norm.isfinite()
    skipped = skipped + 1 if overflow else 0
    ckpt.require_progress(skipped, step)
    for opt in optimizers:
        if not overflow:
            machine.scaler.step(opt)
        opt.zero_grad()
    machine.scaler.update()
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(student.parameters()),
                             1 - min(ema_decay, (1 + step) / (10 + step)))
    step += 1

    if step % log_interval == 0:
        value, cut = (machine.total(means) / machine.world).tolist()
        ckpt.require_finite(value, step)
        log.write(step, loss=value, lr=lr, grad_norm=norm.item(), off_simplex=cut)
        if machine.main:
            outside = f" | off simplex {cut:.1%}" if objective != "psd" else ""
            print(f"step {step}/{max_iters} | loss {value:.4f}{outside} | lr {lr:.1e} | "
                  f"{progress.line(step)}", flush=True)

stopped = step < max_iters
if stopped and step != saved_at:
    save()
machine.total(torch.zeros(1))
if machine.main:
    print(f"stopped at step {step}, saved {path}; continue with --init_from=resume" if stopped
          else f"done: {path}", file=sys.stderr if stopped else sys.stdout)
if machine.world > 1:
    dist.destroy_process_group()
if stopped:
    sys.exit(130)
