"""What a step costs: ours, the textbook's, and that of any language model of the same size.

    python eval/bench.py train                        # seconds and memory of a training step
    python eval/bench.py train --n_layer=4 --n_head=4 --n_embd=256  # where the vocabulary dominates
    python eval/bench.py distill                      # the same of a distillation step
    python eval/bench.py sample --batch_size=1        # one-step text, and a decoder with a KV cache
    python eval/bench.py head                         # the head's loss and gradient, in four ways
    python eval/bench.py scaling                      # against V, B L and sampling steps: an hour
    python eval/bench.py plot                         # the scaling as a figure, out_dir/scaling.png
    python eval/bench.py estimate --gpus=8 --nodes=4  # what many GPUs would wait for: estimate.py
    python eval/bench.py train --other=../old --paths=other,ours    # before and after a change

The paths:

    ours     flow.py and flowmap.py as train.py and distill.py use them
    dense    the textbook: noise, one-hot text and log-probabilities as arrays (B, L, V)
    floor    the transformer as a plain classifier of clean tokens, which every language model is
    whole    the floor with all logits at once, (B, L, V), as most language models are trained
    ar       sampling only: the transformer decoding token by token with a cache
    other    ours of another checkout, measured by the bench.py there
    checkpointed, builtin, online    the head only: see heads.py

Each path runs in fresh processes of its own, for its peak memory. They take turns, every other time
in reverse, so that a drift of the machine hits all alike. A time is the median over all steps, a
ratio that of two medians; brackets hold the smallest and the largest ratio within a turn. Every run
appends a line to out_dir/<command>.jsonl.
"""

import copy
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # the top folder
import flow
import flowmap
from baselines import ar, dense
from eval import heads
from eval.estimate import estimate, table
from lib.checkpoint import replace_file
from lib.machine import Machine, generator, with_float64
from lib.settings import configure, fail, require_choice, require_in
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
# -- estimate
gpus = 8                         # of a node
nodes = 1
speed = 142_000.0                # tokens/s of one GPU alone; that of an H100 in docs/speed.md
# -- the measurement
paths = ""                       # comma-separated, the last is compared with; "" = as in COMMANDS
other = ""                       # the folder of another checkout
turns = 3                        # processes of each path
steps = 5                        # timed steps of a process, after one or two that are not
out_dir = "out/bench"
profile = False                  # also print where the time of a step of each path goes
# -- system
device = "auto"
dtype = "auto"
compile = False
retain = True                    # keep freed memory on a CPU, as train.py does; false: live peaks
seed = 1
worker = ""                      # set by bench.py itself: the path this process measures

COMMANDS = {"train": "ours,dense,floor", "distill": "ours,dense,floor", "sample": "ours,ar",
            "head": "ours,checkpointed,builtin,whole", "scaling": "",
            "plot": "", "estimate": ""}
_words = sys.argv[1:]
_command = _words.pop(0) if _words and not _words[0].startswith("-") else ""    # _: no setting
settings = configure(globals(), _words)
globals().update(settings)
command = _command
if command not in COMMANDS:
    fail(f"bench.py {command}: choose {', '.join(COMMANDS)}; --help lists the settings")
require_in(settings, "[1, inf)", "vocab_size", "block_size", "batch_size", "n_layer", "n_head",
           "gradient_accumulation_steps", "n_embd", "n_time", "sampling_steps", "turns", "steps",
           "gpus", "nodes")
require_in(settings, "(0, inf)", "speed")
require_in(settings, "[0, 1)", "diagonal_share")
default = COMMANDS[command].split(",")
chosen = paths.split(",") if paths else default
for name in chosen:
    require_choice("paths", name, default + ["whole"] * (command in ("train", "distill"))
                   + ["other"] * bool(other))
tokens_per_step = gradient_accumulation_steps * batch_size * block_size


# ------------------------------------------------------------------------------ one path


def network(machine, **extra):
    """All weights are random: with the zeros it would start from, products are faster on a GPU."""
    config = ModelConfig(vocab_size, block_size, n_layer, n_head, n_embd, n_time, dropout=0.0,
                         attention_softcap=attention_softcap, logit_softcap=logit_softcap, **extra)
    model = FlowTransformer(config).to(machine.device)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    model.head.compiled = compile
    return model


def compiled(model):
    return torch.compile(model, dynamic=False) if compile else model


def train_loss(path, net, clock, y, tau, rng):
    if path in ("ours", "dense"):
        return (flow if path == "ours" else dense).loss(net, clock, y, tau, rng)[0]
    hidden = net(F.embedding(y, net.embed.weight), torch.ones_like(tau))
    head_loss = heads.whole if path == "whole" else lambda *x: flow.cross_entropy(*x)[0]
    return head_loss(net.head, hidden, y)


def distill_loss(path, net, teacher, clock, y, tau_s, tau_t, rng, n, factor):
    if path == "ours":
        return flowmap.loss(net, net, teacher, clock, "psd", y, tau_s, tau_t, rng, n, factor)[0]
    x0 = torch.randn(*y.shape, vocab_size, generator=rng, device=y.device)
    return dense.semigroup_loss(net, teacher, clock, y, tau_s, tau_t, x0, n)


def training_step(path, machine):
    """A function that makes one optimizer step of the path."""
    distilling = command == "distill" and path in ("ours", "dense")
    model = network(machine, flow_map=distilling)
    model.embed.weight.requires_grad_(not distilling)
    ema, net = copy.deepcopy(model), compiled(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-4,
                                  weight_decay=0.0, fused=machine.device.type != "mps")
    clock, count = flow.Clock(vocab_size, device=machine.device), itertools.count()
    if distilling:
        teacher = compiled(network(machine).eval())
        n, factor = round(diagonal_share * batch_size), flow.noise_factor(model.embed.weight)

    def step():
        for _ in range(gradient_accumulation_steps):
            key = seed, next(count)
            of_data, rng = generator(*key), generator(*key, device=machine.device)
            y = machine.put(torch.randint(vocab_size, (batch_size, block_size), generator=of_data))
            tau, place = machine.put(torch.rand(2, batch_size, generator=of_data))
            with machine.autocast():
                if distilling:
                    tau_s, tau_t = flowmap.off_diagonal_times(tau, place, tau < 1 / 32)
                    tau_t[:n] = tau_s[:n]
                    loss = distill_loss(path, net, teacher, clock, y, tau_s, tau_t, rng, n, factor)
                else:
                    loss = train_loss(path, net, clock, y, tau, rng)
            machine.scaler.scale(loss / gradient_accumulation_steps).backward()
        machine.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        machine.scaler.step(optimizer)
        machine.scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1e-4)
    return step


def sampling_step(path, machine):
    """A function that makes one batch of texts."""
    if path == "ar":  # all in one dtype: no casts to wait for
        model = network(machine).eval().to(getattr(torch, machine.dtype))
        return lambda: ar.sample(model, None, batch_size, block_size, block_size, None)
    model = compiled(network(machine, flow_map=True).eval())
    clock, E = flow.Clock(vocab_size, device=machine.device), model.embed.weight.detach()
    factor, rng = flow.noise_factor(E), generator(seed, device=machine.device)

    def step():
        with machine.autocast():
            z0 = flow.latent_noise(E, (batch_size, block_size), rng, factor)
            return flowmap.sample(model, clock, z0, sampling_steps)
    return step


def head_step(path, machine):
    """A function that differentiates the loss of a head once."""
    head, (B, L) = network(machine).head, (batch_size, block_size)
    hidden = torch.randn(B, L, n_embd, device=machine.device, requires_grad=True)
    y = torch.randint(vocab_size, (B, L), device=machine.device)

    def step():
        with machine.autocast():
            loss = (flow.cross_entropy(head, hidden, y)[0] if path == "ours"
                    else compiled(getattr(heads, path))(head, hidden, y))
        return torch.autograd.grad(loss, [hidden, *head.parameters()])
    return step


STEPS = {"train": training_step, "distill": training_step, "sample": sampling_step,
         "head": head_step}


def measure(path) -> None:
    """What a worker does: it prints seconds of all steps, peak bytes and the machine as JSON."""
    machine = Machine(with_float64(device) if command == "sample" else device, dtype, retain)
    torch.manual_seed(seed)
    step, cuda = STEPS[command](path, machine), machine.device.type == "cuda"
    for _ in range(1 if command == "sample" else 2):  # memory settles, torch.compile compiles
        step()
    seconds = [clocked(step, machine) for _ in range(steps)]
    if cuda:
        peak = torch.cuda.max_memory_allocated()
    else:  # of the process, in KiB, on macOS in bytes
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
    table = ""
    if profile:
        with torch.profiler.profile() as recorded:
            clocked(step, machine)
        table = recorded.key_averages().table(
            sort_by=f"self_{'cuda' if cuda else 'cpu'}_time_total", row_limit=20,
            max_name_column_width=40)
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
    step()
    if machine.device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - start


# ------------------------------------------------------------------------------ several paths


def run_worker(name: str, path: str, **changes) -> dict:
    """What `measure` prints, from a fresh process with these settings."""
    program, values = Path(__file__), {**settings, **changes, "paths": "", "worker": path}
    if path == "other":
        program = Path(other, "eval/bench.py")
        program = program if program.exists() else Path(other, "bench.py")
        if not program.exists():
            fail(f"no {program}")
        known = re.findall(r"^(\w+) = ", program.read_text().split("settings = ")[0], re.M)
        values = {key: values[key] for key in known if key in values} | {"worker": "ours"}
    words = [sys.executable, program, name]
    words += [f"--{key}={value}" for key, value in values.items() if value != ""]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        fail(f"path {path} ended with status {done.returncode} (-9: out of memory); see above")
    return json.loads(done.stdout.splitlines()[-1])


def compare() -> None:
    """Measure the chosen paths, print the table, add a line to the results."""
    results = {path: [] for path in chosen}
    for turn in range(turns):
        for path in chosen if turn % 2 == 0 else reversed(chosen):
            results[path].append(run_worker(command, path))
    base, rows = chosen[-1], {}
    produced = batch_size * block_size if command == "sample" else tokens_per_step
    for path, runs in results.items():
        seconds = statistics.median(second for run in runs for second in run["seconds"])
        rows[path] = dict(seconds=seconds, tokens_per_second=produced / seconds,
                          turns=[statistics.median(run["seconds"]) for run in runs],
                          peak_gib=max(run["peak"] for run in runs) / 2 ** 30)
    for row in rows.values():
        ratios = [mine / theirs for mine, theirs in zip(row["turns"], rows[base]["turns"])]
        row |= dict(time_ratio=row["seconds"] / rows[base]["seconds"], smallest=min(ratios),
                    largest=max(ratios), memory_ratio=row["peak_gib"] / rows[base]["peak_gib"])
    where = f"{results[base][0]['machine']}, torch {torch.__version__}, {date.today()}"
    print(f"{command}: {n_layer} layers, width {n_embd}, V = {vocab_size:,}, L = {block_size}, "
          f"{produced:,} tokens a step\n{where}; {turns} turns of {steps} steps\n")
    print(f"{'path':8}{'s/step':>10}{'tokens/s':>10}{'GiB':>7}   time / {base:12} memory / {base}")
    for path, row in rows.items():
        print(f"{path:8}{row['seconds']:10.3f}{row['tokens_per_second']:10.0f}{row['peak_gib']:7.2f}"
              f"   {row['time_ratio']:.2f} ({row['smallest']:.2f} to {row['largest']:.2f})   "
              f"{row['memory_ratio']:.2f}")
    for path, runs in results.items() if profile else ():
        print(f"\n{path}\n{runs[-1]['profile']}")
    append(command, dict(settings=settings, where=where, paths=rows))


def append(name: str, record: dict) -> None:
    path = Path(out_dir) / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(f"\nadded to {path}")


# ------------------------------------------------------------------------------ scaling


def scale() -> None:
    """A training step against V at 2,048 tokens and against B L; sampling against its steps."""
    three = "ours", "dense", "floor"
    points = [("V", V, "train", path, dict(vocab_size=V, batch_size=max(1, 2048 // block_size)))
              for V in (1024, 4096, 16384, 50257, 131072) for path in three]
    points += [("B L", B * block_size, "train", path, dict(batch_size=B))
               for B in (8, 16, 32, 64) for path in three]
    points += [("steps", n, "sample", "ours", dict(batch_size=8, sampling_steps=n))
               for n in (1, 2, 4, 8, 16, 32, 64)]
    for axis, value, name, path, changes in points * turns:
        run = run_worker(name, path, **changes)
        seconds, peak = statistics.median(run["seconds"]), run["peak"] / 2 ** 30
        print(f"{axis} = {value:<8} {path:6} {seconds:8.3f} s {peak:7.2f} GiB", flush=True)
        where = f"{run['machine']}, torch {torch.__version__}, {date.today()}"
        append("scaling", dict(axis=axis, value=value, path=path, seconds=seconds, peak_gib=peak,
                               settings=settings, where=where))


def plot() -> None:
    """The points in scaling.jsonl as a figure, medians where one was measured several times."""
    source = Path(out_dir) / "scaling.jsonl"
    if not source.exists():
        fail(f"no {source}; run: python eval/bench.py scaling")
    try:
        import matplotlib
    except ImportError:
        fail("the figure needs matplotlib; run: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    records = [json.loads(line) for line in source.read_text().splitlines()]
    used, where, points = records[-1]["settings"], records[-1]["where"], {}
    for record in records:
        if any(record["settings"][key] != used[key]
               for key in ("n_layer", "n_embd", "block_size", "vocab_size")):
            fail(f"{source} holds measurements of different networks; keep those of one")
        points.setdefault((record["axis"], record["path"], record["value"]), []).append(record)
    figure, panels = plt.subplots(2, 3, figsize=(12, 6.5), sharex="col")
    titles = {"V": "training step of 2,048 tokens, against V",
              "B L": f"training step at V = {used['vocab_size']:,}, against B L",
              "steps": "eight texts, against sampling steps"}
    for column, (axis, title) in zip(panels.T, titles.items()):
        xs = sorted({value for a, _, value in points if a == axis})
        for panel, key, unit in zip(column, ("seconds", "peak_gib"),
                                    ("seconds", "peak memory, GiB")):
            for path in ("ours", "dense", "floor"):
                medians = {x: statistics.median(record[key] for record in points[axis, path, x])
                           for x in xs if (axis, path, x) in points}
                if medians:
                    panel.plot(*zip(*medians.items()), "o-", label=path)
            panel.set(xscale="log", yscale="log", ylabel=unit)
            panel.set_xticks(xs, [f"{x:,}" for x in xs], fontsize=7)
            panel.xaxis.minorticks_off()
            panel.grid(alpha=0.3, which="both")
            panel.legend()
        column[0].set_title(title, fontsize=10)
        column[1].set_xlabel(axis)
    network = f"{used['n_layer']} layers, width {used['n_embd']}, L = {used['block_size']}"
    figure.suptitle(f"{network}; {where}", fontsize=9)
    figure.tight_layout()
    path = source.with_suffix(".png")
    replace_file(path, lambda file: figure.savefig(file, dpi=120, format="png"))
    print(f"wrote {path}")


if worker:
    measure(worker)
elif command == "scaling":
    scale()
elif command == "plot":
    plot()
elif command == "estimate":
    with torch.device("meta"):  # no memory
        model = FlowTransformer(ModelConfig(vocab_size, block_size, n_layer, n_head, n_embd,
                                            n_time))
    total, E, head = (sum(p.numel() for p in module.parameters())
                      for module in (model, model.embed, model.head))
    step, last = tokens_per_step / speed, batch_size * block_size / speed
    print(f"{nodes} x {gpus} GPUs, each {tokens_per_step:,} tokens in {step * 1000:.0f} ms; "
          f"{total / 1e6:.1f} M gradients, {total * 4 / 1e9:.2f} GB in float32\n")
    print(table(estimate(E, head, total - E - head, step, last, gpus, nodes)))
else:
    compare()
