"""What a step costs: ours, beside the same network fed one-hot arrays, and beside an ordinary language model of its size.

    python bench.py train                                          # seconds and memory of a training step
    python bench.py train --n_layer=4 --n_head=4 --n_embd=256      # where the vocabulary dominates
    python bench.py distill                                        # of a distillation step
    python bench.py sample --batch_size=1                          # one-step text against a decoder with a KV cache
    python bench.py head                                           # of the loss and its gradient alone, in four ways
    python bench.py average                                        # of the average embedding that a sampling step needs
    python bench.py scaling                                        # against V, against B L, against steps: an hour
    python bench.py plot                                           # the scaling as a figure, out_dir/scaling.png
    python bench.py --estimate                                     # on paper: what an H100 would need

The paths:

    ours     flow.py and flowmap.py as train.py and distill.py use them
    dense    the textbook: noise, one-hot text, their mixture and all log-probabilities as arrays (B, L, V)
    floor    the same transformer as a plain classifier of clean tokens: what any language model of this size must pay
    whole    the floor with all logits at once, (B, L, V), as most language models are trained
    ar       sampling only: the same transformer decoding one token after the other with a cache of keys and values
    checkpointed, builtin, online    the head only: other ways to hold no (B, L, V), see baselines/heads.py

Every path runs in fresh processes of its own, for its peak memory; they take turns, in an order that is reversed every
time, so that a drift of the machine hits all alike. A path's time is the median over all its steps, a ratio is that of
two medians, and in brackets stand the smallest and the largest ratio within one turn. Every run appends a line to
out_dir/<command>.jsonl.
"""

import contextlib
import copy
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

import common
import storage
import training
from baselines import ar, dense, heads
from flow import Clock, cross_entropy, expected_embedding, flow_loss, latent_noise, noise_factor
from flowmap import distillation_loss, off_diagonal_times, sample_flow_map
from head import SLICE
from model import FlowTransformer, ModelConfig

# -- the network and the batch
vocab_size = 50257
block_size = 128                 # L, tokens in a sequence
batch_size = 32                  # B, sequences in a micro-step
gradient_accumulation_steps = 1  # micro-steps in a step
n_layer = 12
n_head = 12
n_embd = 768
n_time = 128
attention_softcap = 0.0
logit_softcap = 0.0
diagonal_share = 0.5             # distill: of the batch
sampling_steps = 1               # sample: network evaluations a text
# -- the measurement
paths = ""                       # comma-separated, the last one compared with; "" = those of COMMANDS
turns = 3                        # processes of each path
steps = 5                        # timed steps of a process, after one or two that are not
out_dir = "out/bench"
profile = False                  # also print where the time of a step of each path goes
estimate = False                 # no measurement: the arithmetic of a step on an H100
# -- system
device = "auto"
dtype = "auto"
compile = False
retain = True                    # on a CPU, keep freed memory, as train.py does: faster; without it peaks are of live memory
seed = 1
worker = ""                      # set by bench.py itself, in the process that measures this path

COMMANDS = {"train": "ours,dense,floor", "distill": "ours,dense,floor", "sample": "ours,ar",
            "head": "ours,checkpointed,builtin,whole", "average": "ours,online", "scaling": "", "plot": ""}  # and their paths
_words = sys.argv[1:]
_command = _words.pop(0) if _words and not _words[0].startswith("-") else ""    # the underscores: these are no settings
settings = common.configure(globals(), _words)
globals().update(settings)
command = _command
if command not in COMMANDS and not estimate:
    common.fail(f"bench.py {command}: choose {', '.join(COMMANDS)} or --estimate; --help lists the settings")
common.require_in(settings, "[1, inf)", "vocab_size", "block_size", "batch_size", "gradient_accumulation_steps",
                  "n_layer", "n_head", "n_embd", "n_time", "sampling_steps", "turns", "steps")
common.require_in(settings, "[0, 1)", "diagonal_share")
chosen = paths.split(",") if paths else COMMANDS.get(command, "").split(",")
known = COMMANDS.get(command, "").split(",") + (["whole"] if command in ("train", "distill") else [])
for name in chosen:
    common.require_choice("paths", name, known)
tokens_per_step = gradient_accumulation_steps * batch_size * block_size


# ---------------------------------------------------------------- one path, in its own process

def network(machine, **extra):
    """A network with random weights everywhere: with the zeros it would start from, products are faster on a GPU."""
    config = ModelConfig(vocab_size, block_size, n_layer, n_head, n_embd, n_time, dropout=0.0,
                         attention_softcap=attention_softcap, logit_softcap=logit_softcap, **extra)
    model = FlowTransformer(config).to(machine.device)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return model


def train_loss(path, net, clock, y, tau, leaf, normal):
    E = net.embed.weight
    if path == "ours":
        return flow_loss(net, clock, y, tau, latent_noise(E, leaf, normal))[0]
    if path == "dense":
        return dense.flow_losses(net, clock, y, tau, torch.randn(*y.shape, vocab_size, device=y.device)).mean()
    hidden = net(F.embedding(y, E), torch.ones_like(tau))
    if path == "floor":
        return cross_entropy(net.head, hidden, y)[0] / y.numel()
    return F.cross_entropy(net.head(hidden).flatten(0, 1), y.flatten())


def distill_loss(path, net, teacher, clock, y, tau_s, tau_t, n, factor, normal):
    if path == "ours":
        z0 = latent_noise(net.embed.weight, factor, normal)
        return distillation_loss(net, net, teacher, clock, "psd", y, tau_s, tau_t, z0, n)[0]
    x0 = torch.randn(*y.shape, vocab_size, device=y.device)
    return dense.semigroup_loss(net, teacher, clock, y, tau_s, tau_t, x0, n)


def training_step(path, machine):
    """A function that makes one optimizer step of the path."""
    distilling = command == "distill" and path in ("ours", "dense")
    model = network(machine, flow_map=distilling)
    model.embed.weight.requires_grad_(not distilling)
    ema = copy.deepcopy(model)
    optimizers = training.make_optimizers(model, "adamw", 3e-4, (0.9, 0.999), 0.0, machine.dtype)
    clock = Clock(vocab_size, device=machine.device)
    net = common.compiled(model, machine) if compile else model
    E = model.embed.weight
    if distilling:
        teacher = network(machine).eval()
        teacher = common.compiled(teacher, machine) if compile else teacher
        fixed = noise_factor(E)
    count = itertools.count()

    def step():
        learns_factor = command == "train" and path == "ours"
        factor = noise_factor(E, tokens_per_step) if learns_factor else None
        leaf = None if factor is None else factor.detach().requires_grad_()
        for _ in range(gradient_accumulation_steps):
            random = common.generator(seed, next(count))
            y = machine.put(torch.randint(vocab_size, (batch_size, block_size), generator=random))
            tau, place = (machine.put(torch.rand(batch_size, generator=random)) for _ in range(2))
            normal = common.sample_normals(next(count), range(batch_size), block_size, machine.device)
            with machine.autocast():
                if distilling:
                    n = round(diagonal_share * batch_size)
                    tau_s, tau_t = off_diagonal_times(tau, place, tau < 1 / 32)
                    tau_t[:n] = tau_s[:n]
                    loss = distill_loss(path, net, teacher, clock, y, tau_s, tau_t, n, fixed, normal)
                else:
                    loss = train_loss(path, net, clock, y, tau, leaf, normal)
            (loss / gradient_accumulation_steps).backward()
        if factor is not None:
            factor.backward(leaf.grad)
        training.optimizer_step(model, optimizers, machine, grad_clip=1.0)
        training.update_ema(ema, model, 0.9999, step=10 ** 6)
    return step


def sampling_step(path, machine):
    """A function that makes one batch of texts."""
    if path == "ar":
        model = network(machine).eval().to(getattr(torch, machine.dtype))       # all of it: no casts to wait for
        return lambda: ar.sample(model, None, batch_size, block_size, block_size, None)
    model = network(machine, flow_map=True).eval()
    model = common.compiled(model, machine) if compile else model
    clock, E = Clock(vocab_size, device=machine.device), model.embed.weight.detach()
    factor, count = noise_factor(E), itertools.count()

    def step():
        z0 = latent_noise(E, factor, common.sample_normals(next(count), range(batch_size), block_size, machine.device))
        return sample_flow_map(model, clock, z0, sampling_steps)
    return step


def head_step(path, machine):
    """A function that differentiates the loss of a head once: in `dtype` products, as the trainers do."""
    head = network(machine).head
    hidden = torch.randn(batch_size, block_size, n_embd, device=machine.device, requires_grad=True)
    y = torch.randint(vocab_size, (batch_size, block_size), device=machine.device)

    def step():
        with machine.autocast():
            loss = cross_entropy(head, hidden, y)[0] / y.numel() if path == "ours" else getattr(heads, path)(head, hidden, y)
        return torch.autograd.grad(loss, [hidden, *head.parameters()])
    return step


def average_step(path, machine):
    """A function that averages the embedding once, in slices of tokens (ours) or of the vocabulary (online)."""
    model = network(machine)
    E, hidden = model.embed.weight.detach(), torch.randn(batch_size, block_size, n_embd, device=machine.device)
    average = expected_embedding if path == "ours" else heads.online

    def step():
        with machine.autocast():
            return average(model.head, hidden, E)
    return step


STEPS = {"train": training_step, "distill": training_step, "sample": sampling_step, "head": head_step,
         "average": average_step}


def measure(path) -> None:
    """The whole life of a worker: prints seconds of every step, peak bytes and the machine, as JSON."""
    machine = common.Machine(common.with_float64(device) if command == "sample" else device, dtype, retain)
    torch.manual_seed(seed)
    with machine.autocast() if command == "sample" and path == "ours" else contextlib.nullcontext():
        step = STEPS[command](path, machine)
        for _ in range(1 if command == "sample" else 2):  # memory settles, weights are cast, torch.compile compiles
            step()
        seconds = [clocked(step, machine) for _ in range(steps)]
    if machine.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:  # of the process, in KiB, on macOS in bytes
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    table = ""
    if profile:
        with torch.profiler.profile() as recorded:
            clocked(step, machine)
        table = recorded.key_averages().table(sort_by="self_cpu_time_total" if machine.device.type == "cpu" else
                                              "self_cuda_time_total", row_limit=20, max_name_column_width=40)
    print(json.dumps(dict(seconds=seconds, peak=peak, machine=machine.describe(), profile=table)))


def clocked(step, machine) -> float:
    """Seconds of one step, on CUDA by the device's own clock."""
    if machine.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    result = step()
    if machine.device.type == "mps":
        torch.mps.synchronize()
    del result
    return time.perf_counter() - start


# ---------------------------------------------------------------- several paths, in turns

def run_worker(name: str, path: str, **changes) -> dict:
    """What `measure` prints, from a fresh process with these settings."""
    words = [f"--{key}={value}" for key, value in {**settings, **changes, "worker": path}.items() if value != ""]
    done = subprocess.run([sys.executable, __file__, name, *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        common.fail(f"bench.py {name}, path {path}, ended with status {done.returncode}; see above (-9: out of memory)")
    return json.loads(done.stdout.splitlines()[-1])


def compare() -> None:
    """Measure the chosen paths, print the table, add a line to the results."""
    results = {path: [] for path in chosen}
    for turn in range(turns):
        for path in chosen if turn % 2 == 0 else reversed(chosen):
            results[path].append(run_worker(command, path))
    base = chosen[-1]
    produced = batch_size * block_size if command == "sample" else tokens_per_step
    rows = {}
    for path, runs in results.items():
        medians = [statistics.median(run["seconds"]) for run in runs]
        seconds = statistics.median(second for run in runs for second in run["seconds"])
        rows[path] = dict(seconds=seconds, tokens_per_second=produced / seconds, turns=medians,
                          peak_gib=max(run["peak"] for run in runs) / 2 ** 30)
    for row in rows.values():
        ratios = [mine / other for mine, other in zip(row["turns"], rows[base]["turns"])]
        row |= dict(time_ratio=row["seconds"] / rows[base]["seconds"], smallest=min(ratios), largest=max(ratios),
                    memory_ratio=row["peak_gib"] / rows[base]["peak_gib"])
    where = f"{results[base][0]['machine']}, torch {torch.__version__}, {date.today()}"
    print(f"{command}: {n_layer} layers, width {n_embd}, V = {vocab_size:,}, L = {block_size}, "
          f"{produced:,} tokens a step\n{where}; {turns} turns of {steps} steps\n")
    print(f"{'path':8}{'s a step':>10}{'tokens/s':>10}{'peak GiB':>10}   time / {base:16} memory / {base}")
    for path, row in rows.items():
        print(f"{path:8}{row['seconds']:10.3f}{row['tokens_per_second']:10.0f}{row['peak_gib']:10.2f}   "
              f"{row['time_ratio']:.2f} ({row['smallest']:.2f} to {row['largest']:.2f})       {row['memory_ratio']:.2f}")
    if profile:
        for path, runs in results.items():
            print(f"\n{path}\n{runs[-1]['profile']}")
    append(command, dict(settings=settings, where=where, paths=rows))


def append(name: str, record: dict) -> None:
    path = Path(out_dir) / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(f"\nadded to {path}")


# ---------------------------------------------------------------- scaling

def scale() -> None:
    """Time and memory of a training step against V at 2,048 tokens and against B L, and of sampling against its steps: all
    points, then all again, `turns` times."""
    points = [("V", V, "train", path, dict(vocab_size=V, batch_size=max(1, 2048 // block_size)))
              for V in (1024, 4096, 16384, 50257, 131072) for path in ("ours", "dense", "floor")]
    points += [("B L", B * block_size, "train", path, dict(batch_size=B))
               for B in (8, 16, 32, 64) for path in ("ours", "dense", "floor")]
    points += [("steps", n, "sample", "ours", dict(batch_size=8, sampling_steps=n)) for n in (1, 2, 4, 8, 16, 32, 64)]
    for axis, value, name, path, changes in points * turns:
        run = run_worker(name, path, **changes)
        seconds, peak = statistics.median(run["seconds"]), run["peak"] / 2 ** 30
        print(f"{axis} = {value:<8} {path:6} {seconds:8.3f} s {peak:7.2f} GiB", flush=True)
        append("scaling", dict(axis=axis, value=value, path=path, seconds=seconds, peak_gib=peak, settings=settings,
                               where=f"{run['machine']}, torch {torch.__version__}, {date.today()}"))


def plot() -> None:
    """The points in scaling.jsonl as a figure, medians where one was measured several times."""
    source = Path(out_dir) / "scaling.jsonl"
    if not source.exists():
        common.fail(f"no {source}; run: python bench.py scaling")
    try:
        import matplotlib
    except ImportError:
        common.fail("the figure needs matplotlib; run: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    records = [json.loads(line) for line in source.read_text().splitlines()]
    used, where = records[-1]["settings"], records[-1]["where"]
    shape = ("n_layer", "n_embd", "block_size", "vocab_size")
    if any(record["settings"][key] != used[key] for record in records for key in shape):
        common.fail(f"{source} holds measurements of different networks; keep those of one")
    points = {}
    for record in records:
        points.setdefault((record["axis"], record["path"], record["value"]), []).append(record)
    figure, panels = plt.subplots(2, 3, figsize=(12, 6.5), sharex="col")
    for column, (axis, title) in enumerate([("V", "training step of 2,048 tokens, against V"),
                                            ("B L", f"training step at V = {used['vocab_size']:,}, against B L"),
                                            ("steps", "eight texts, against sampling steps")]):
        xs = sorted({value for a, _, value in points if a == axis})
        for panel, key, unit in zip(panels[:, column], ("seconds", "peak_gib"), ("seconds", "peak memory, GiB")):
            for path in ("ours", "dense", "floor"):
                found = sorted(value for a, p, value in points if (a, p) == (axis, path))
                if found:
                    panel.plot(found, [statistics.median(r[key] for r in points[axis, path, x]) for x in found],
                               "o-", label=path)
            panel.set(xscale="log", yscale="log", ylabel=unit)
            panel.set_xticks(xs, [f"{x:,}" for x in xs], fontsize=7)
            panel.xaxis.minorticks_off()
            panel.grid(alpha=0.3, which="both")
            panel.legend()
        panels[0, column].set_title(title, fontsize=10)
        panels[1, column].set_xlabel(axis)
    figure.suptitle(f"{used['n_layer']} layers, width {used['n_embd']}, L = {used['block_size']}; {where}", fontsize=9)
    figure.tight_layout()
    storage.replace_file(Path(out_dir) / "scaling.png", lambda file: figure.savefig(file, dpi=120, format="png"))
    print(f"wrote {Path(out_dir) / 'scaling.png'}")


# ---------------------------------------------------------------- on paper

def on_paper() -> None:
    """Operations and bytes of a training step on an H100 (SXM: 989 TFLOP/s in bfloat16, 67 in float32, 3.35 TB/s), from
    the shapes alone. Eager PyTorch: every operation reads its inputs from memory and writes its output there. A part
    takes at least its operations or its bytes, whichever is longer; no kernel reaches either peak."""
    B, L, d, V, N = batch_size, block_size, n_embd, vocab_size, batch_size * block_size
    weights = n_layer * 12 * d * d + 2 * V * d
    slices = math.ceil(N * V / (4 * SLICE))
    parts = {  # name: bfloat16 operations, float32 operations, bytes, all of a step
        "blocks": (3 * N * n_layer * (24 * d * d + 4 * L * d), 0, N * n_layer * 19 * d * 2 * 5),
        # 19 d numbers a layer and token, in 2 bytes: written and read, then read again, and their gradients twice
        "head": (3 * 2 * N * V * d, 0, N * V * (4 + 4 + 12 + 8 + 8 + 6 + 4)),
        # bfloat16 logits out and in, float32 out; log-softmax reads twice and writes; exp and the scale in place; back to
        # bfloat16; into two products
        "weights": (0, 0, weights * 58),  # bfloat16 copies 6, norm and scale of gradients 12, Adam 28, moving average 12
        "noise": (0, 2 * 2 * N * d * d + 2 * 2 * V * d * d, N * d * 4 * 8 + V * d * 4 * 4),
        # xi C^T and the gradient for C; E^T E and the gradient for E
        "slices": (0, 0, (slices - 1) * V * d * 20),  # the head's gradient: written, cast, added, for every slice
        "one-hot": (0, 2 * 2 * N * V * d, N * V * (4 + 20 + 8 + 8 + 12 + 4 + 4)),
        # noise; one-hot integers, then floats; the two terms of the mixture and their sum; x E and the gradient for E
        "log p": (0, 0, N * V * (12 + 4 + 8 + 12 - 16)),  # times one-hot, summed, and back twice; instead of in place
    }
    paths = dict(ours=("blocks", "head", "slices", "noise", "weights"),
                 dense=("blocks", "head", "log p", "one-hot", "weights"), floor=("blocks", "head", "slices", "weights"))
    print(f"ESTIMATE, not a measurement: an H100, {n_layer} layers, width {d}, V = {V:,}, B = {B}, L = {L}\n")
    print(f"{'':10}{'MFLOP a token':>15}{'in float32':>12}{'kB a token':>12}{'ms a step, at least':>21}")
    least = {name: max(low / 989e12 + full / 67e12, moved / 3.35e12) for name, (low, full, moved) in parts.items()}
    for path, names in {**paths, **{f". {name}": (name,) for name in parts}}.items():
        low, full, moved = (sum(parts[name][i] for name in names) for i in range(3))
        print(f"{path:10}{(low + full) / N / 1e6:15.1f}{full / N / 1e6:12.2f}{moved / N / 1e3:12.0f}"
              f"{sum(least[name] for name in names) * 1e3:21.1f}")


if worker:
    measure(worker)
elif estimate:
    on_paper()
elif command == "scaling":
    scale()
elif command == "plot":
    plot()
else:
    compare()
