"""Distil a flow language model into a flow map language model (FMLM), which writes a text in one network evaluation.

    python distill.py                                              # reads out/pydocs/flm.pt, writes fmlm.pt beside it
    torchrun --nproc_per_node=8 distill.py config/distill_owt.py

The student is the FLM with a second time embedding, which starts at zero: at first it knows where it is, not where it
should jump to. Part of every batch keeps it a denoiser (the diagonal: jumps of no length, taught by the frozen FLM); the
rest teaches jumps of every length by one of three objectives (flowmap.py), a small share of them the full jump from
noise to text. Teacher and student share the embedding E, frozen, since both must see the same noisy state.

Notable: the default objective needs forward passes only, since two short jumps are the target of a long one; the full
jump is learned last, from the inside out, as the log shows: the loss of jumps by their length.
"""

import copy
import sys
from pathlib import Path

import torch

import common
import storage
import training
from data.loader import Data
from flow import latent_noise, noise_factor, stratified
from flowmap import OBJECTIVES, distillation_loss, off_diagonal_times

# -- input and output
out_dir = "out/pydocs"           # reads flm.pt, writes fmlm.pt and fmlm.jsonl (the log)
dataset = "pydocs"               # must have the vocabulary that the FLM was trained on
teacher = ""                     # the FLM, ours or one the authors released (.ckpt); "" = out_dir/flm.pt
trust_checkpoint = False         # read the teacher although its file holds Python objects besides tensors
block_size = 0                   # tokens in a sequence; 0 = as many as the teacher was trained on
init_from = "scratch"            # from the teacher; or resume: continue out_dir/fmlm.pt exactly
eval_interval = 250              # steps between validations; each also writes the checkpoint
eval_iters = 8                   # validation batches
log_interval = 25                # steps between progress lines
wandb_project = ""               # log there too, if named
# -- method
objective = "psd"                # psd (semigroup), lsd (Lagrangian) or esd (Eulerian); the last two differentiate in time, and
                                 # want an FLM trained with time_scale = 1
self_distill = False             # the diagonal learns from the data, not the teacher; weights and E still start from its
teacher_temperature = 1.0        # above 1 the teacher's guesses are softer: a map's texts are less varied than its flow's
diagonal_share = 0.5             # of every batch; the rest learns jumps
full_jump_share = 1 / 32         # of the jumps: from noise to text in one
full_jump_ramp = False           # that share grows evenly from 0 to this over the run: the full jump builds on shorter ones
split = 0.5                      # psd: the two jumps of a target meet at this part of the way, on the clock
target_ema = False               # compute targets with the moving average instead of the student itself
dropout = 0.0                    # of the student, also when it makes its own targets; not of its average or the teacher
# -- optimization
batch_size = 64                  # sequences in a micro-step of one process
gradient_accumulation_steps = 1  # micro-steps in a step, over all processes: a multiple of their number
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
ema_decay = 0.999                # moving average of the weights: what is validated and sampled
# -- system
device = "auto"                  # cuda, mps or cpu
dtype = "auto"                   # bfloat16, float16 or float32: whichever matrix products are fast in
compile = False                  # torch.compile: worth it on a GPU, needs a C++ compiler on a CPU
seed = 1

settings = common.configure(globals(), sys.argv[1:])
globals().update(settings)
common.require_choice("objective", objective, OBJECTIVES)
training.require_trainable(settings)
common.require_in(settings, "[0, 1)", "diagonal_share")
common.require_in(settings, "[0, 1]", "full_jump_share")
common.require_in(settings, "(0, 1)", "split")
common.require_in(settings, "(0, inf)", "teacher_temperature")
common.require_in(settings, "[0, inf)", "block_size")

# ---------------------------------------------------------------- set-up

machine = common.Machine(device, dtype)
path = Path(out_dir) / "fmlm.pt"
local_steps = training.share_of_steps(gradient_accumulation_steps, machine)
sequences = batch_size * gradient_accumulation_steps  # in one optimizer step
n_diagonal = round(diagonal_share * batch_size)
if not 0 <= n_diagonal < batch_size:
    common.fail(f"diagonal_share={diagonal_share} of batch_size={batch_size} leaves no row for jumps")
if diagonal_share and not n_diagonal:
    common.fail(f"diagonal_share={diagonal_share} of batch_size={batch_size} leaves no row for the diagonal")
if objective == "psd" and not n_diagonal:
    common.fail("objective=psd learns the flow from the diagonal alone; set diagonal_share above 0")
if self_distill and teacher_temperature != 1:
    common.fail("self_distill learns from the data, not from a teacher; add --teacher_temperature=1")

teacher = teacher or str(Path(out_dir) / "flm.pt")
flm = storage.load_checkpoint(teacher, "flm", trust_checkpoint)
block_size = storage.set_length(flm, block_size, teacher)
checkpoint = storage.load_resumable(path, "fmlm", init_from, settings,
                                    ["block_size", "objective", "self_distill", "teacher_temperature",
                                     "diagonal_share", "full_jump_share", "full_jump_ramp", "split", "target_ema",
                                     "dropout", *training.FIXED], machine)
torch.manual_seed(seed)  # every process starts from the same weights
data = Data(dataset, "train", block_size, seed)
val_data = Data(dataset, "val", block_size, seed)
storage.require_same_vocabulary(flm, data)

flow = storage.build_model(flm, machine.device)
flow.head.temperature = teacher_temperature
if checkpoint:
    student = storage.build_model(checkpoint, machine.device, "model")
    if not torch.equal(student.embed.weight, flow.embed.weight):
        common.fail(f"{path} was distilled from another FLM than {teacher}; start again with --init_from=scratch")
else:
    student = storage.build_model(flm, machine.device, flow_map=True, dropout=dropout)
student.embed.weight.requires_grad_(False)
ema = copy.deepcopy(student).eval()
optimizers = training.make_optimizers(student, optimizer, learning_rate, (beta1, beta2), weight_decay, machine.dtype)
step = storage.restore_run(checkpoint, ema, optimizers, machine, data) if checkpoint else 0
resumed_at = step if checkpoint else None                                       # what was validated already
clock_embedding_share = flm["clock_embedding_share"]
del checkpoint, flm                                                             # their memory
training.require_alike(settings, data, step, machine, student, flow)

clock = storage.build_clock(flow.config, clock_embedding_share, machine.device)
E = student.embed.weight
factor = noise_factor(E)  # E is frozen: once is enough
net, teacher_net = [common.compiled(m, machine) if compile else m for m in (student, flow)]
log = storage.Log(path, machine, resumed_at is not None, step, wandb_project, settings)
if machine.main:
    training.announce(f"flow map by {objective}", student, machine, len(data.tokens), sequences * block_size, max_iters,
                      path, passes=3 + diagonal_share + (1 - diagonal_share) * (2 if objective == "psd" else 3))


def noise(samples, purpose):
    """z0 (B, L, d) for these sample numbers; training and validation draw for different purposes."""
    normal = common.sample_normals(common.mix(seed, purpose), samples, block_size, machine.device)
    return latent_noise(E, factor, normal)


def draw_times(micro_steps: int, full_share: float, random: torch.Generator):
    """tau_s and tau_t, (micro_steps, batch_size) each: the first n_diagonal of a batch equal, the others jumps. All
    are stratified over the whole optimizer step."""
    n_jumps = micro_steps * (batch_size - n_diagonal)
    diagonal = stratified(micro_steps * n_diagonal, random).view(micro_steps, -1)
    length, place, u = (stratified(n_jumps, random) for _ in range(3))
    jumps = [tau.view(micro_steps, -1) for tau in off_diagonal_times(length, place, u < full_share)]
    return [torch.cat([diagonal, tau], dim=1).float() for tau in jumps]


def loss_terms(model, target, y, tau_s, tau_t, z0):
    """The loss, to differentiate; of every row, (B,), and the mass cut off the targets, per jump (B - n_diagonal,)."""
    with machine.autocast():
        loss, losses, cut = distillation_loss(model, target, None if self_distill else teacher_net, clock, objective,
                                              y, tau_s, tau_t, z0, n_diagonal, split)
    return loss, losses.mean(1), cut.mean(1)


FULL_JUMPS_IN_VALIDATION = 1 / 8  # of the jumps, whatever the share in training: enough for a mean


@torch.no_grad()
def validate() -> tuple[float, list[float | None]]:
    """Of the moving average, on held-out text, nats a token: the loss on the diagonal, then the loss of jumps in tenths
    of their length on the clock, full jumps among the last. The same texts, times and noise at every call. Targets of
    jumps are made by the moving average, too: their losses say how well it agrees with itself, not how good it is. Texts
    of two runs can be compared, these losses cannot."""
    total = torch.zeros(2, 11, dtype=torch.float64 if machine.device.type != "mps" else torch.float32,
                        device=machine.device)                                  # losses, counts
    tau_s, tau_t = draw_times(eval_iters, FULL_JUMPS_IN_VALIDATION, common.generator(seed, common.VAL_TIMES))
    for i in range(machine.rank, eval_iters, machine.world):
        y = machine.put(val_data.rows(i * batch_size, batch_size))
        start, end = machine.put(tau_s[i]), machine.put(tau_t[i])
        _, loss, _ = loss_terms(ema, ema, y, start, end, noise(range(i * batch_size, (i + 1) * batch_size), common.VAL_NOISE))
        bins = 1 + ((end - start) * 10).long().clamp_max(9)
        bins[:n_diagonal] = 0
        total.index_add_(1, bins, torch.stack([loss, torch.ones_like(loss)]).to(total.dtype))
    losses, counts = machine.total(total).cpu()
    return (losses.sum() / counts.sum()).item(), training.bin_means(losses, counts)


def batch(n: int):
    """Micro-step n of this process, on its way to the device: the number of its first sample, tokens (B, L), times tau_s
    and tau_t (B,)."""
    at, i = divmod(n, local_steps)
    j = i * machine.world + machine.rank                                        # this micro-step among all processes'
    first = at * sequences + j * batch_size
    share = full_jump_share * (min(1, at / max_iters) if full_jump_ramp else 1)
    tau_s, tau_t = draw_times(gradient_accumulation_steps, share, common.generator(seed, common.TIMES, at))
    return first, machine.put(data.rows(first, batch_size)), machine.put(tau_s[j]), machine.put(tau_t[j])


def save() -> None:
    storage.save_run(path, "fmlm", student, ema, optimizers, machine, settings, data, clock_embedding_share, step)


# ---------------------------------------------------------------- the loop

progress = training.Progress(step, max_iters, sequences * block_size)
watch = training.LossWatch(machine, "tau_s", "tau_t")
coming = batch(step * local_steps)
while True:
    lr = training.learning_rate_at(step, learning_rate, min_lr, schedule, warmup_iters, max_iters)
    training.set_learning_rate(optimizers, lr)

    if (step % eval_interval == 0 or step == max_iters) and step != resumed_at:
        watch.check()
        mean, bins = validate()
        log.write(step, val_loss=mean, val_diagonal=bins[0], val_loss_by_length=bins[1:])
        if machine.main:
            print(f"step {step}: validation loss {mean:.3f}; diagonal {training.show(bins[:1])}; "
                  f"by length 0..1: {training.show(bins[1:])}", flush=True)
        if step > 0:
            save()
        progress.restart(step)
    if step >= max_iters or progress.should_stop(machine):
        break

    means = torch.zeros(2, device=machine.device)                               # of the loss and of the mass cut
    student.train()
    for i in range(local_steps):
        first, y, start, end = coming
        torch.manual_seed(common.mix(seed, common.DROPOUT, first))
        loss, losses, cut = loss_terms(net, ema if target_ema else net, y, start, end,
                                       noise(range(first, first + batch_size), common.NOISE))
        coming = batch(step * local_steps + i + 1)                              # while the device is busy
        machine.scaler.scale(loss / local_steps).backward()
        means += torch.stack([loss.detach(), cut.mean()]) / local_steps
        watch.see(step + 1, losses, start, end)
    norm = training.optimizer_step(student, optimizers, machine, grad_clip)
    training.update_ema(ema, student, ema_decay, step)
    step += 1

    if step % log_interval == 0:
        watch.check()                                                           # waits for the device
        value, cut = (machine.total(means) / machine.world).tolist()
        log.write(step, loss=value, lr=lr, grad_norm=norm.item(), off_simplex=cut)
        if machine.main:
            outside = f" | off simplex {cut:.1%}" if objective != "psd" else ""
            print(f"step {step}/{max_iters} | loss {value:.4f}{outside} | lr {lr:.1e} | {progress.line(step)}",
                  flush=True)

training.finish(progress, step, max_iters, path, save, machine)
