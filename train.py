"""Train a flow language model (FLM): noise in, text out, by a continuous flow over one-hot tokens.

    python train.py                                            # the default set, on this computer
    python train.py config/palindromes.py --max_iters=500      # a config file, then single settings
    torchrun --nproc_per_node=8 train.py config/owt.py         # the published recipe

Ends with out_dir/flm.pt, which distill.py turns into a flow map and sample.py turns into text.
Ctrl-C writes a checkpoint too; --init_from=resume continues exactly. flm.prev.pt is the one before.
Unattended: torchrun --max_restarts=3 .. train.py .. --init_from=auto. --method trains a baseline
instead (baselines/), on the same network and data, into a file of its own name.

Notable: the loss is cross-entropy at a random time, but no noise of vocabulary width is ever drawn
(flow.py). The validation loss is also shown by time: a flow learns the easy times near 1 long
before the hard ones near 0.
"""

import contextlib
import copy
import importlib
import math
import sys
from dataclasses import asdict, fields
from pathlib import Path

from lib.settings import configure, fail, require_choice, require_in, require_trainable
import torch  # after lib.settings, which says how its threads wait
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data.loader import Data
from flow import Clock, draw_known, stratified
from lib import checkpoint as ckpt
from lib.machine import (DROPOUT, NOISE, TIMES, VAL_NOISE, VAL_TIMES, Machine, Progress, generator,
                         mix)
from lib.optim import Muon, learning_rate_at
from model import FlowTransformer, ModelConfig

# -- input and output
out_dir = "out/stories"          # flm.pt and flm.jsonl (the log) go here
dataset = "stories"              # a folder of data/ that its prepare.py has filled
init_from = "scratch"            # resume: continue out_dir/flm.pt; auto: if there is one
start_from = ""                  # a checkpoint whose averages a new run starts with; "" = none
eval_interval = 250              # steps between validations; each also writes the checkpoint
keep_best = False                # also keep that of the lowest validation loss, as flm.best.pt
eval_iters = 8                   # validation batches
log_interval = 25                # steps between progress lines
wandb_project = ""               # log there too, if named
method = "flm"                   # or a file of baselines/: ar, mdlm, duo; dense, mse, noclock
# -- model
n_layer = 4
n_head = 4
n_embd = 256                     # width d; z = x E has this many dimensions instead of V
n_time = 128                     # width of the time embedding
mlp_ratio = 4                    # an MLP's hidden layer has this times n_embd units
dropout = 0.0                    # 0.1 in the paper; a short run on a CPU does not need it
block_size = 64                  # L, tokens in a sequence
learned_positions = True         # ours: pure noise carries no positions, and rotary alone sees none
position_std = 0.1               # their standard deviation at first; pure noise has 1
time_scale = 30.0                # ours: spreads tau over its sinusoids' phases; 1 in the paper
attention_softcap = 0.0          # 50 in the paper; 0 = off
logit_softcap = 0.0              # 30 in the paper; 0 = off
clock_embedding_share = 0.0      # ours: weight of a clock for d dimensions, not V; 0 = published
replaced_share = 0.0             # ours: up to this share of a row is wrong in the input
context_share = 0.0              # ours: share of rows told some tokens, for prompts and blanks
# -- optimization
batch_size = 64                  # sequences in a micro-step of one process
gradient_accumulation_steps = 1  # micro-steps of a step, over all processes
max_iters = 1000                 # optimizer steps
learning_rate = 2e-3
embed_lr_scale = 1.0             # ours: E's rate / learning_rate; the noise x0 E grows with E
schedule = "cosine"              # or constant, as published
min_lr = 1e-4                    # where the cosine ends
warmup_iters = 100
optimizer = "adamw"              # or muon, for the matrices between embedding and head
beta1 = 0.9
beta2 = 0.99
weight_decay = 0.0
grad_clip = 1.0                  # largest norm of the gradient; 0 = any
ema_decay = 0.999                # moving average of the weights: validated, sampled and distilled
# -- system
device = "auto"                  # cuda, mps or cpu
dtype = "auto"                   # bfloat16, float16, float32; auto: the fastest the hardware has
compile = False                  # torch.compile: worth it on a GPU, needs a C++ compiler on a CPU
seed = 1

settings = configure(globals(), sys.argv[1:])
globals().update(settings)
baselines = sorted(file.stem for file in Path(__file__).parent.glob("baselines/*.py"))
require_choice("method", method, ["flm", *(name for name in baselines if name != "distill")])
require_trainable(settings)
require_in(settings, "[1, inf)", "block_size", "n_layer", "n_head", "n_embd", "n_time",
           "mlp_ratio")
require_in(settings, "[0, inf)", "position_std", "time_scale", "attention_softcap", "logit_softcap",
           "embed_lr_scale")
require_in(settings, "[0, 1]", "clock_embedding_share", "replaced_share", "context_share")
for name in ("replaced_share", "context_share"):
    if settings[name] and method != "flm":
        fail(f"{name} is for method=flm; add --{name}=0 for {method}")
if replaced_share and batch_size == 1:
    fail("replaced_share takes tokens from other rows of a batch; set batch_size above 1")
if method == "ar" and attention_softcap:
    fail("method=ar has no soft cap on its attention; add --attention_softcap=0")

# ------------------------------------------------------------------------------ machine

machine = Machine(device, dtype)
if gradient_accumulation_steps % machine.world:
    fail(f"gradient_accumulation_steps={gradient_accumulation_steps} must be a multiple of the "
         f"{machine.world} processes, which share the micro-steps of a step")
local_steps = gradient_accumulation_steps // machine.world
sequences = batch_size * gradient_accumulation_steps  # in one optimizer step

# ------------------------------------------------------------------------------ data

data = Data(dataset, "train", block_size, seed)
val_data = Data(dataset, "val", block_size, seed)


def batch(n: int):
    """Micro-step n of this process, on its way to the device: its key (step, number among all
    processes' micro-steps), tokens (B, L), times (B,). All its random numbers are a function of the
    key. The times of a step are drawn together, one in each of `sequences` strata."""
    at, i = divmod(n, local_steps)
    j = i * machine.world + machine.rank
    tau = stratified(sequences, generator(seed, TIMES, at)).float().view(-1, batch_size)
    y = data.rows(at * sequences + j * batch_size, batch_size)
    return (at, j), machine.put(y), machine.put(tau[j])

# ------------------------------------------------------------------------------ model

method_module = importlib.import_module("flow" if method == "flm" else f"baselines.{method}")
path = Path(out_dir) / f"{method}.pt"
model_args = {field.name: settings[field.name] for field in fields(ModelConfig)
              if field.name in settings} | dict(context=context_share > 0)
fixed = (*model_args, "clock_embedding_share", "replaced_share", "context_share", "embed_lr_scale",
         *ckpt.FIXED)                                               # in a resumed run
checkpoint = start = ckpt.load_resumable(path, method, init_from, settings, fixed, machine)
if start_from and not checkpoint:
    start = ckpt.load_start(start_from, method, model_args, clock_embedding_share)
torch.manual_seed(seed)
if start:
    ckpt.require_same_vocabulary(start, data)
    model = ckpt.build_model(start, machine.device, "model" if checkpoint else "ema",
                             context=context_share > 0)
else:
    vocab_size = data.meta["vocab_size"] + getattr(method_module, "MORE_TOKENS", 0) # mdlm's mask
    try:
        model = FlowTransformer(ModelConfig(vocab_size, **model_args)).to(machine.device)
    except ValueError as error:
        fail(str(error))
model.head.compiled = compile                                       # its loss, too
ema = copy.deepcopy(model).eval()
clock = Clock(model.config.vocab_size, n_embd, clock_embedding_share, machine.device)


class Loss(nn.Module):
    """The loss as a module. DistributedDataParallel sees only what a forward pass uses, and the
    loss also uses the head and E outside the network's forward pass."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, y, tau, rng):
        extra = {"replaced_share": replaced_share} if replaced_share else {}    # not of baselines
        if context_share:
            extra["known"] = draw_known(y.shape, context_share, rng)            # (B, L)
        with machine.autocast():
            return method_module.loss(self.net, clock, y, tau, rng, **extra)


training_loss = Loss(torch.compile(model, dynamic=False) if compile else model)
if machine.world > 1:
    training_loss = DistributedDataParallel(training_loss, gradient_as_bucket_view=True)

# ------------------------------------------------------------------------------ optimizer

muon = [p for name, p in model.named_parameters() if optimizer == "muon" and p.ndim == 2
        and not name.startswith(("embed", "positions", "head"))]
scaled = [model.embed.weight] if embed_lr_scale != 1 else []
rest = [p for p in model.parameters() if not any(p is other for other in muon + scaled)]
groups = [dict(params=rest)] + [dict(params=[p], lr_scale=embed_lr_scale) for p in scaled]
optimizers = [torch.optim.AdamW(groups, learning_rate, (beta1, beta2), weight_decay=weight_decay,
                                fused=machine.device.type != "mps")]
if muon:  # steps of the size of AdamW's: one learning rate serves both
    optimizers.append(Muon(muon, learning_rate, weight_decay, machine.dtype == "bfloat16"))

# ------------------------------------------------------------------------------ resume, save

step = ckpt.restore_run(checkpoint, ema, optimizers, machine, data) if checkpoint else 0
saved_at = step if checkpoint else None                           # validated already
del checkpoint, start                                               # their memory
log = ckpt.Log(path, machine, saved_at is not None, step, wandb_project, settings)


def save(best: bool = False) -> None:
    if machine.main:
        ckpt.save_checkpoint(path, best=best, checkpoint=dict(
            format="flm-1", kind=method, model_config=asdict(model.config), step=step,
            model=model.state_dict(), ema=ema.state_dict(), settings=settings,
            optimizers=[opt.state_dict() for opt in optimizers],
            scaler=machine.scaler.state_dict(), clock_embedding_share=clock_embedding_share,
            train_tokens=len(data.tokens), tokenizer=data.tokenizer, layout=data.layout,
            vocabulary=data.meta["tokenizer"], checker=data.meta.get("checker")))


@torch.no_grad()
def validate() -> tuple[float, list[float]]:
    """The mean loss of the moving average on held-out text, nats per token, and its mean in tenths
    of tau; every call has the same texts, times and noise. For a flow it is no likelihood (that is
    eval/bound.py's), for ar the negative log-likelihood, for mdlm and duo a bound on it."""
    total = torch.zeros(2, 10, device=machine.device)               # losses, counts
    tau = stratified(eval_iters * batch_size, generator(seed, VAL_TIMES)).float()
    for i in range(machine.rank, eval_iters, machine.world):
        y = machine.put(val_data.rows(i * batch_size, batch_size))  # (B, L)
        times = machine.put(tau[i * batch_size:(i + 1) * batch_size])           # (B,)
        rng = generator(seed, VAL_NOISE, i, device=machine.device)
        with machine.autocast():
            _, losses = method_module.loss(ema, clock, y, times, rng)
        loss = losses.mean(1)                                       # (B,)
        total.index_add_(1, (times * 10).long().clamp_max(9),
                         torch.stack([loss, torch.ones_like(loss)]))
    losses, counts = machine.total(total).cpu()
    return (losses.sum() / counts.sum()).item(), (losses / counts).tolist()

# ------------------------------------------------------------------------------ loop

if machine.main:
    n_params = sum(p.numel() for p in model.parameters())
    n_tokens = max_iters * sequences * block_size
    print(f"{method}: {n_params / 1e6:.2f} M parameters, V = {model.config.vocab_size:,}, "
          f"L = {block_size}; {machine.describe()}")
    print(f"{max_iters:,} steps of {sequences * block_size:,} tokens = {n_tokens / 1e6:.1f} M "
          f"tokens ({n_tokens / len(data.tokens):.1f} epochs) -> {path}", flush=True)
skipped = 0                                                         # steps in a row
progress = Progress(step, max_iters, sequences * block_size)
next_batch = batch(step * local_steps)
while True:
    lr = learning_rate_at(step, settings)
    for group in (group for opt in optimizers for group in opt.param_groups):
        group["lr"] = lr * group.get("lr_scale", 1)

    if (step % eval_interval == 0 or step == max_iters) and step != saved_at:
        mean, bins = validate()
        ckpt.require_finite(mean, step)
        log.write(step, val_loss=mean, val_loss_by_tau=[None if math.isnan(x) else x for x in bins])
        if machine.main:
            print(f"step {step}: validation loss {mean:.3f}; by tau 0..1: "
                  + " ".join(f"{x:.2f}" for x in bins).replace("nan", "-"), flush=True)
        if step > 0:
            save(best=keep_best and log.new_best(mean))
            saved_at = step
        progress.restart(step)
    if step >= max_iters or progress.should_stop(machine):
        break

    model.train()
    step_loss = torch.zeros((), device=machine.device)
    for i in range(local_steps):
        key, y, tau = next_batch
        rng = generator(seed, NOISE, *key, device=machine.device)
        torch.manual_seed(mix(seed, DROPOUT, *key))
        # Processes average their gradients once a step, during its last backward pass.
        wait = machine.world > 1 and i < local_steps - 1
        with training_loss.no_sync() if wait else contextlib.nullcontext():
            loss, _ = training_loss(y, tau, rng)
            next_batch = batch(step * local_steps + i + 1)          # while the device is busy
            machine.scaler.scale(loss / local_steps).backward()
        step_loss += loss.detach() / local_steps
    for opt in optimizers:
        machine.scaler.unscale_(opt)
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    # float16: the scaler checks each optimizer alone and might step only one. Skip both.
    overflow = machine.scaler.is_enabled() and not norm.isfinite()
    skipped = skipped + 1 if overflow else 0
    ckpt.require_progress(skipped, step)
    for opt in optimizers:
        if not overflow:
            machine.scaler.step(opt)
        opt.zero_grad()
    machine.scaler.update()
    # The average forgets its start: its decay rises to ema_decay.
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()),
                             1 - min(ema_decay, (1 + step) / (10 + step)))
    step += 1

    if step % log_interval == 0:
        value = machine.total(step_loss).item() / machine.world     # waits for the device
        ckpt.require_finite(value, step)
        log.write(step, loss=value, lr=lr, grad_norm=norm.item())
        if machine.main:
            print(f"step {step}/{max_iters} | loss {value:.3f} | lr {lr:.1e} | "
                  f"{progress.line(step)}", flush=True)

stopped = step < max_iters
if stopped and step != saved_at:
    save()
machine.total(torch.zeros(1))  # all wait for the file: torchrun would end them soon after the first
if machine.main:
    print(f"stopped at step {step}, saved {path}; continue with --init_from=resume" if stopped
          else f"done: {path}", file=sys.stderr if stopped else sys.stdout)
if machine.world > 1:
    dist.destroy_process_group()
if stopped:
    sys.exit(130)
