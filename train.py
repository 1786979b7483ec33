"""Train a flow language model (FLM): noise in, text out, by a continuous flow over one-hot tokens.

    python train.py                                                # the default set, on whatever this computer has
    python train.py config/palindromes.py --max_iters=500          # a config file, then single settings
    torchrun --nproc_per_node=8 train.py config/owt.py             # the published recipe

Ends with out_dir/flm.pt, which distill.py turns into a flow map and sample.py turns into text. Ctrl-C writes a
checkpoint too; continue with --init_from=resume. --method trains one of the models of baselines/ instead, on the same
network and data, into a file of its own name.

Notable: the loss is plain cross-entropy at a random time, but no noise of vocabulary width is ever drawn (flow.py); the
validation loss is also shown by time, since a flow learns its late, easy times long before its early, hard ones.
"""

import copy
import importlib
import sys
from dataclasses import fields
from pathlib import Path

import torch

import common
import storage
import training
from data.loader import Data
from flow import flow_loss, latent_noise, noise_factor, stratified
from model import ModelConfig

# -- input and output
out_dir = "out/pydocs"           # flm.pt and flm.jsonl (the log) go here
dataset = "pydocs"               # a folder of data/ that its prepare.py has filled
init_from = "scratch"            # or resume: continue out_dir/flm.pt exactly
eval_interval = 250              # steps between validations; each also writes the checkpoint
eval_iters = 8                   # validation batches
log_interval = 25                # steps between progress lines
wandb_project = ""               # log there too, if named
method = "flm"                   # or a file of baselines/, for comparison: ar, mdlm, duo; dense, mse, noclock
# -- model
n_layer = 4
n_head = 4
n_embd = 256                     # width d; z = x E has this many dimensions instead of V
n_time = 128                     # width of the time embedding
dropout = 0.0                    # 0.1 in the paper; a short run on a CPU does not need it
block_size = 64                  # L, tokens in a sequence
learned_positions = True         # ours: pure noise carries no positions, rotary attention alone cannot tell them apart
position_std = 0.1               # their standard deviation at first; pure noise has 1
time_scale = 30.0                # ours: spreads tau over the phases of its sinusoids; 1 in the paper
attention_softcap = 0.0          # 50 in the paper; 0 = off
logit_softcap = 0.0              # 30 in the paper; 0 = off
clock_embedding_share = 0.0      # share of a clock that counts what the d-dimensional network sees; 0 = published
# -- optimization
batch_size = 64                  # sequences in a micro-step of one process
gradient_accumulation_steps = 1  # micro-steps in a step, over all processes: a multiple of their number
max_iters = 1000                 # optimizer steps
learning_rate = 2e-3
schedule = "cosine"              # or constant, as published
min_lr = 1e-4                    # where the cosine ends
warmup_iters = 100
optimizer = "adamw"              # or muon, for the matrices between embedding and head
beta1 = 0.9
beta2 = 0.99
weight_decay = 0.0
grad_clip = 1.0                  # largest norm of the gradient; 0 = any
ema_decay = 0.999                # moving average of the weights: what is validated, sampled and distilled
# -- system
device = "auto"                  # cuda, mps or cpu
dtype = "auto"                   # bfloat16, float16 or float32: whichever matrix products are fast in
compile = False                  # torch.compile: worth it on a GPU, needs a C++ compiler on a CPU
seed = 1

settings = common.configure(globals(), sys.argv[1:])
globals().update(settings)
common.require_choice("method", method, ("flm", *training.BASELINES))
training.require_trainable(settings)
if method == "ar" and attention_softcap:
    common.fail("method=ar has no soft cap on its attention; add --attention_softcap=0")
common.require_in(settings, "[1, inf)", "block_size", "n_layer", "n_head", "n_embd", "n_time")
common.require_in(settings, "[0, inf)", "position_std", "time_scale", "attention_softcap", "logit_softcap")
common.require_in(settings, "[0, 1]", "clock_embedding_share")

# ---------------------------------------------------------------- set-up

machine = common.Machine(device, dtype)
path = Path(out_dir) / f"{method}.pt"
baseline = importlib.import_module(f"baselines.{method}") if method != "flm" else None
data = Data(dataset, "train", block_size, seed)
val_data = Data(dataset, "val", block_size, seed)
local_steps = training.share_of_steps(gradient_accumulation_steps, machine)
sequences = batch_size * gradient_accumulation_steps  # in one optimizer step

shape = {field.name: settings[field.name] for field in fields(ModelConfig) if field.name in settings}
checkpoint = storage.load_resumable(path, method, init_from, settings,
                                    [*shape, "clock_embedding_share", *training.FIXED], machine)
torch.manual_seed(seed)  # every process starts from the same weights
if checkpoint:
    storage.require_same_vocabulary(checkpoint, data)
    model = storage.build_model(checkpoint, machine.device, "model")
else:
    model = storage.new_model(data.meta["vocab_size"] + getattr(baseline, "MORE_TOKENS", 0), shape, machine.device)
ema = copy.deepcopy(model).eval()
optimizers = training.make_optimizers(model, optimizer, learning_rate, (beta1, beta2), weight_decay, machine.dtype)
step = storage.restore_run(checkpoint, ema, optimizers, machine, data) if checkpoint else 0
resumed_at = step if checkpoint else None                                       # what was validated already
del checkpoint                                                                  # its memory
training.require_alike(settings, data, step, machine, model)

clock = storage.build_clock(model.config, clock_embedding_share, machine.device)
net = common.compiled(model, machine) if compile else model  # same weights, faster
log = storage.Log(path, machine, resumed_at is not None, step, wandb_project, settings)
if machine.main:
    training.announce(f"baseline {method}" if baseline else "flow language model", model, machine, len(data.tokens),
                      sequences * block_size, max_iters, path, passes=3)


def loss_terms(net, factor, y, times, first, purpose):
    """The loss, to differentiate, and that of each token, (B, L), of the samples from number `first` on. Training and
    validation draw noise for different purposes."""
    if baseline:
        random = common.generator(seed, purpose, first, device=machine.device)
        with machine.autocast():
            return baseline.loss(net, clock, y, times, random)
    normal = common.sample_normals(common.mix(seed, purpose), range(first, first + batch_size), block_size, machine.device)
    z0 = latent_noise(net.embed.weight, factor, normal)
    with machine.autocast():
        return flow_loss(net, clock, y, times, z0)


@torch.no_grad()
def validate() -> tuple[float, list[float | None]]:
    """The mean loss of the moving average on held-out text, nats a token, and its mean in tenths of tau. Of a flow a
    cross-entropy, whose mean over the clock is no likelihood (that is bound.py's); of ar the negative log-likelihood, of
    mdlm and duo a bound on it. The same texts, times and noise at every call."""
    total = torch.zeros(2, 10, dtype=torch.float64 if machine.device.type != "mps" else torch.float32,
                        device=machine.device)                                  # losses, counts
    tau = stratified(eval_iters * batch_size, common.generator(seed, common.VAL_TIMES))
    factor = None if baseline else noise_factor(ema.embed.weight, eval_iters * batch_size * block_size)
    for i in range(machine.rank, eval_iters, machine.world):
        y = machine.put(val_data.rows(i * batch_size, batch_size))              # (B, L)
        times = machine.put(tau[i * batch_size:(i + 1) * batch_size].float())   # (B,)
        _, losses = loss_terms(ema, factor, y, times, i * batch_size, common.VAL_NOISE)  # (B, L)
        loss = losses.mean(1)                                                   # (B,)
        total.index_add_(1, (times * 10).long().clamp_max(9),
                         torch.stack([loss, torch.ones_like(loss)]).to(total.dtype))
    losses, counts = machine.total(total).cpu()
    return (losses.sum() / counts.sum()).item(), training.bin_means(losses, counts)


def batch(n: int):
    """Micro-step n of this process, on its way to the device: the number of its first sample, tokens (B, L), times (B,).
    The times of an optimizer step are drawn together, one in each of `sequences` strata."""
    at, i = divmod(n, local_steps)
    j = i * machine.world + machine.rank                                        # this micro-step among all processes'
    first = at * sequences + j * batch_size
    tau = stratified(sequences, common.generator(seed, common.TIMES, at)).float().view(-1, batch_size)
    return first, machine.put(data.rows(first, batch_size)), machine.put(tau[j])


def save() -> None:
    storage.save_run(path, method, model, ema, optimizers, machine, settings, data, clock_embedding_share, step)


# ---------------------------------------------------------------- the loop

progress = training.Progress(step, max_iters, sequences * block_size)
watch = training.LossWatch(machine, "tau")
coming = batch(step * local_steps)
while True:
    lr = training.learning_rate_at(step, learning_rate, min_lr, schedule, warmup_iters, max_iters)
    training.set_learning_rate(optimizers, lr)

    if (step % eval_interval == 0 or step == max_iters) and step != resumed_at:
        watch.check()
        mean, bins = validate()
        log.write(step, val_loss=mean, val_loss_by_tau=bins)
        if machine.main:
            print(f"step {step}: validation loss {mean:.3f}; by tau 0..1: {training.show(bins)}", flush=True)
        if step > 0:
            save()
        progress.restart(step)
    if step >= max_iters or progress.should_stop(machine):
        break

    model.train()
    step_loss = torch.zeros((), device=machine.device)
    # The noise factor is computed once a step. Micro-steps differentiate with respect to a leaf of its value ...
    factor = None if baseline else noise_factor(model.embed.weight, sequences * block_size)
    leaf = None if factor is None else factor.detach().requires_grad_()
    for i in range(local_steps):
        first, y, times = coming
        torch.manual_seed(common.mix(seed, common.DROPOUT, first))
        loss, losses = loss_terms(net, leaf, y, times, first, common.NOISE)
        coming = batch(step * local_steps + i + 1)                              # while the device is busy
        machine.scaler.scale(loss / local_steps).backward()
        step_loss += loss.detach() / local_steps
        watch.see(step + 1, losses.mean(1), times)
    if factor is not None:
        factor.backward(leaf.grad)                                              # ... whose gradient goes on to E, once
    norm = training.optimizer_step(model, optimizers, machine, grad_clip)
    training.update_ema(ema, model, ema_decay, step)
    step += 1

    if step % log_interval == 0:
        watch.check()                                                           # waits for the device
        value = machine.total(step_loss).item() / machine.world
        log.write(step, loss=value, lr=lr, grad_norm=norm.item())
        if machine.main:
            print(f"step {step}/{max_iters} | loss {value:.3f} | lr {lr:.1e} | {progress.line(step)}", flush=True)

training.finish(progress, step, max_iters, path, save, machine)
