"""Generate text.

    python sample.py --steps 1              # one network evaluation a text, with the flow map
    python sample.py --steps 1,2,4,8        # the same noise, decoded in more and more steps
    python sample.py --out_dir=out/owt --num_samples=64 --out=samples.jsonl
    python sample.py --init_from=owt_fmlm.ckpt --trust_checkpoint   # a checkpoint of the authors
    python sample.py --init_from=lm1b_fmlm.ckpt --trust_checkpoint --vocabulary=vocab.txt

Reads out_dir/fmlm.pt, or flm.pt if there is no flow map yet. Needs no data folder: the tokenizer is
in the checkpoint.
"""

import os
import sys
import time
from pathlib import Path

import torch

import flow
import flowmap
from lib import checkpoint as ckpt
from lib.machine import SAMPLE_NOISE, Machine, generator
from lib.settings import configure, fail, parse_numbers, require_choice, require_in

out_dir = "out/pydocs"           # where train.py and distill.py wrote
init_from = ""                   # a checkpoint instead: ours, or one the authors released (.ckpt)
trust_checkpoint = False         # read it although it holds Python objects besides tensors
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
require_in(settings, "[0, inf)", "block_size", "seed")
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
flow_path, map_path = Path(out_dir) / "flm.pt", Path(out_dir) / "fmlm.pt"
if init_from:
    checkpoint = ckpt.load_checkpoint(init_from, model.replace("auto", ""), trust_checkpoint)
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
    if flow_path.exists() and flow_path.stat().st_mtime > map_path.stat().st_mtime:
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
encoding = ckpt.find_tokenizer(checkpoint, vocabulary)
E = net.embed.weight.detach()
factor = flow.noise_factor(E)

# ------------------------------------------------------------------------------ the samples

# Texts in a network call, always, each group with a generator of its own: so a text is the same
# however many are asked for, also in bfloat16, where other shapes round differently.
GROUP = 8


def generate(group: int, n_steps: int, with_flow: bool) -> list[list[int]]:
    """The tokens of the texts of a group."""
    rng = generator(seed, SAMPLE_NOISE, group, device=machine.device)

    def noise():
        return flow.latent_noise(E, (GROUP, L), rng, factor)        # (B, L, d)
    sampler, network = (flow.sample, flow_net) if with_flow else (flowmap.sample, net)
    tokens = sampler(network, clock, noise() * noise_scale, n_steps, gamma, noise,
                     temperature=temperature)
    return tokens.tolist()                                          # waits for the device


runs = [(n, not is_map) for n in wanted] + ([(flow_steps, True)] if flow_steps else [])
said, records = [], []                                              # records: a list for each run
for n_steps, with_flow in runs:
    rows, start = [], time.perf_counter()
    with torch.no_grad(), machine.autocast():  # one for all groups: it casts every weight once
        for group in range(-(-num_samples // GROUP)):
            rows += generate(group, n_steps, with_flow)
    milliseconds = (time.perf_counter() - start) / len(rows) * 1000
    name = "FLM" if with_flow else "FMLM"
    said.append(f"{name}: {n_steps} network evaluation{'s' * (n_steps > 1)} and "
                f"{milliseconds:.1f} ms per sample, in groups of {GROUP}")
    dials = dict(seed=seed, gamma=gamma, temperature=temperature, noise_scale=noise_scale)
    records.append([dict(sample=i + 1, model=name, steps=n_steps, text=encoding.decode(row),
                         tokens=row, **dials) for i, row in enumerate(rows[:num_samples])])

if out:
    ckpt.write_lines(Path(out), [record for run in records for record in run])
    said.append(f"wrote {num_samples * len(runs)} samples to {out}")
try:
    print(*said, sep="\n")
    for same_noise in zip(*records):
        print(f"\n==== sample {same_noise[0]['sample']}")
        for record in same_noise:
            if len(runs) > 1:
                print(f"-- {record['model']}, {record['steps']} step{'s' * (record['steps'] > 1)}")
            print(record["text"].strip())
    sys.stdout.flush()
except BrokenPipeError:  # "| head" has seen enough; what is left goes nowhere
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
