"""Generate text.

    python sample.py --steps 1              # one network evaluation a text, with the flow map
    python sample.py --steps 1,2,4,8 --flow_steps 64    # the same noise, by flow map and flow
    python sample.py --out_dir=out/owt --num_samples=64 --out=samples.jsonl
    python sample.py --init_from=owt_fmlm.ckpt --trust_checkpoint   # a checkpoint of the authors
    python sample.py --init_from=lm1b_fmlm.ckpt --trust_checkpoint --vocabulary=vocab.txt
    python sample.py --init_from=hf:owner/name      # their model.safetensors, from the hub

Reads out_dir/fmlm.pt, or flm.pt if there is no flow map yet. Needs no data folder: the tokenizer is
in the checkpoint. Prints a table, a row for each number of steps, then the texts, those from the
same noise together. If the set has a checker, wrong texts end with what is wrong.
"""

import os
import sys
import time
import timeit
from pathlib import Path

from lib.settings import configure, fail, parse_numbers, require_choice, require_in
import torch  # after lib.settings, which says how its threads wait

import flow
import flowmap
from data.loader import find_check, text_of
from lib import checkpoint as ckpt
from lib.machine import SAMPLE_NOISE, Machine, generator

out_dir = ""                     # of train.py and distill.py; "" = out/stories, or before you have
                                 # trained there weights/stories, which comes with the code
init_from = ""                   # a checkpoint instead: ours, or one the authors released (.ckpt,
                                 # .safetensors or hf:owner/name)
trust_checkpoint = False         # read it although it holds Python objects besides tensors
n_head = 0                       # of a released checkpoint that does not say it
vocabulary = ""                  # of a released checkpoint: vocab.txt, tokenizer.json; "" = GPT-2
model = "auto"                   # fmlm, flm, or auto: fmlm if there is one
steps = "1"                      # network evaluations per text; several as 1,2,4,8
flow_steps = 0                   # also decode the same noise with the flow, in this many steps
num_samples = 4
block_size = 0                   # tokens in a text; 0 = as many as the network was trained on
noise_scale = 1.0                # of the first noise: below 1 a flow map's texts are more varied
temperature = 1.0                # of the guesses on the way: below 1 for commoner words
gamma = 0.0                      # 0 deterministic, up to 1 = all noise is fresh after every step
out = ""                         # also write a .jsonl, one object a line with the text
device = "auto"                  # cuda, mps or cpu
dtype = "auto"                   # bfloat16, float16, float32; auto: the fastest the hardware has
seed = 1

settings = configure(globals(), sys.argv[1:])
globals().update(settings)
require_in(settings, "[1, inf)", "num_samples")
require_in(settings, "[0, inf)", "block_size", "n_head", "seed")
require_in(settings, "[0, 1000000]", "flow_steps")
require_in(settings, "[0, 1]", "gamma")
require_in(settings, "[1e-3, 1e3]", "noise_scale", "temperature")  # beyond, float32 overflows
require_choice("model", model, ("auto", "flm", "fmlm"))
wanted = parse_numbers("steps", steps, int, "1,2,4,8")
if flow_steps and init_from:
    fail("flow_steps compares a flow map in out_dir with the flow beside it; leave out init_from")
if out:
    if Path(out).suffix != ".jsonl":
        fail(f"out={out}: give a name that ends in .jsonl")
    ckpt.require_writable(Path(out))

# ------------------------------------------------------------------------------ the networks

machine = Machine(device, dtype)
if machine.world > 1:
    fail("sample.py runs as one process; start it with python")
if not out_dir:
    out_dir, shipped = "out/stories", Path(__file__).parent / "weights" / "stories"
    if not init_from and shipped.exists() and not list(Path(out_dir).glob("f*lm.pt")):
        print(f"nothing trained in {out_dir} yet; reading {shipped}", file=sys.stderr)
        out_dir = shipped
flow_path, map_path = Path(out_dir) / "flm.pt", Path(out_dir) / "fmlm.pt"
if init_from:
    checkpoint = ckpt.load_checkpoint(init_from, model.replace("auto", ""), trust_checkpoint,
                                      n_head)
    if checkpoint["kind"] not in ckpt.KINDS:
        fail(f"{init_from} is a baseline ({checkpoint['kind']}), which sample.py would read as a "
             f"flow; eval/evaluate.py samples it")
elif model == "flm" or model == "auto" and flow_path.exists() and not map_path.exists():
    checkpoint = ckpt.load_checkpoint(flow_path, "flm")
    if model == "auto":
        print(f"no flow map in {out_dir} (distill.py makes one), using flm.pt: it needs tens of "
              f"steps", file=sys.stderr)
else:
    checkpoint = ckpt.load_checkpoint(map_path, "fmlm")
    if "model" in checkpoint and flow_path.exists() and (
            flow_path.stat().st_mtime > map_path.stat().st_mtime):  # not in weights/, copied by git
        print(f"{flow_path} is newer than {map_path}: run distill.py for its flow map",
              file=sys.stderr)
L = ckpt.set_length(checkpoint, block_size, init_from)
is_map = checkpoint["model_config"]["flow_map"]
net = flow_net = ckpt.build_model(checkpoint, machine.device)
if flow_steps:
    flow_net = ckpt.build_model(ckpt.load_checkpoint(flow_path, "flm"), machine.device)
    if not flow_net.embed.weight.equal(net.embed.weight):
        fail(f"{flow_path} is not the flow that {map_path} was distilled from; run distill.py "
             f"again")
clock = flow.Clock(net.config.vocab_size, net.config.n_embd, checkpoint["clock_embedding_share"],
                   machine.device)
encoding, check = ckpt.find_tokenizer(checkpoint, vocabulary), find_check(checkpoint.get("checker"))
E = net.embed.weight.detach()
factor = flow.noise_factor(E)

# ------------------------------------------------------------------------------ the samples

# Texts in a network call, always, each group with a generator of its own: so a text is the same
# however many are asked for, also in bfloat16, where other shapes round differently.
GROUP = 8


def generate(group: int, n_steps: int, with_flow: bool, size: int = GROUP) -> list[list[int]]:
    """The tokens of the texts of a group."""
    rng = generator(seed, SAMPLE_NOISE, group, device=machine.device)
    noise = lambda: flow.latent_noise(E, (size, L), rng, factor)    # (B, L, d)
    sampler, network = (flow.sample, flow_net) if with_flow else (flowmap.sample, net)
    return sampler(network, clock, noise() * noise_scale, n_steps, gamma, noise,
                   temperature=temperature).tolist()                # waits for the device


runs = [(n, not is_map) for n in wanted] + ([(flow_steps, True)] if flow_steps else [])
table, records = [], []                                             # records: a list for each run
for n_steps, with_flow in runs:
    rows, kind = [], "FLM" if with_flow else "FMLM"
    with torch.no_grad(), machine.autocast():  # one for all groups: it casts every weight once
        alone = min(timeit.repeat(lambda: generate(0, n_steps, with_flow, 1), number=1, repeat=2))
        start = told = time.perf_counter()
        for group in range(-(-num_samples // GROUP)):
            rows += generate(group, n_steps, with_flow)
            rate = len(rows) / (time.perf_counter() - start)
            if time.perf_counter() > told + 5 and len(rows) < num_samples:
                told = time.perf_counter()
                print(f"{kind}, steps={n_steps}: {len(rows):,} of {num_samples:,} texts, "
                      f"{(num_samples - len(rows)) / rate:.0f} s left", file=sys.stderr)
    dials = dict(seed=seed, gamma=gamma, temperature=temperature, noise_scale=noise_scale)
    records.append([dict(sample=i + 1, model=kind, steps=n_steps, text=text_of(encoding, row),
                         tokens=row, **dials) for i, row in enumerate(rows[:num_samples])])
    table.append(f"{kind:5} {n_steps:6} {alone * 1000:9.1f} {rate:8.1f}")
    if check:
        mistakes = [check(record["text"].strip()) for record in records[-1]]
        records[-1] = [record | dict(mistake=m) for record, m in zip(records[-1], mistakes)]
        table[-1] += f" {mistakes.count(None) / num_samples:6.1%}"

if out:
    ckpt.write_lines(Path(out), [record for run in records for record in run])
long = any("\n" in one["text"] or len(one["text"]) > 500 for run in records for one in run)
try:
    print("model  steps ms a text  texts/s" + "  valid" * bool(check), *table, sep="\n")
    print(f"(of {num_samples:,} texts; ms for one alone, texts/s in groups of {GROUP})"
          + f"; all {num_samples * len(runs):,} are in {out}" * bool(out), end="\n\n")
    for same_noise in zip(*records):
        if long:
            print(f"==== sample {same_noise[0]['sample']}")
        for record in same_noise:
            name = f"{record['model']:5} {record['steps']:6}" if len(runs) > 1 else ""
            wrong = f"  [{record['mistake']}]" if record.get("mistake") else ""
            print(name, record["text"].strip() + wrong, sep=("\n" if long else "  ") * bool(name))
        if long or len(runs) > 1:
            print()
    sys.stdout.flush()
except BrokenPipeError:  # "| head" has seen enough; what is left goes nowhere
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
