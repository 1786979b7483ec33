"""Generate text.

    python sample.py --steps 1                    # one network evaluation a text, with the flow map in out_dir
    python sample.py --steps 1,2,4,8              # the same noise, decoded in more and more steps
    python sample.py --out_dir=out/owt --num_samples=64 --out=samples.jsonl
    python sample.py --init_from=owt_fmlm.ckpt --steps 1                              # a checkpoint the authors released
    python sample.py --init_from=lm1b_fmlm.ckpt --vocabulary=vocab.txt --steps 1      # with bert-base-uncased's tokens

Reads out_dir/fmlm.pt, or flm.pt if there is no flow map yet. Needs no data folder: the tokenizer is in the checkpoint.
"""

import os
import sys
import time
from pathlib import Path

import common
import storage
from flow import latent_noise, noise_factor, sample_flow
from flowmap import sample_flow_map

out_dir = "out/pydocs"           # where train.py and distill.py wrote
init_from = ""                   # a checkpoint instead of those in out_dir: ours, or one the authors released (.ckpt)
trust_checkpoint = False         # read it although it holds Python objects besides tensors
vocabulary = ""                  # a released checkpoint's tokens: vocab.txt or tokenizer.json; GPT-2's need no file
model = "auto"                   # fmlm, flm, or auto: fmlm if there is one
steps = "1"                      # network evaluations a text; several as 1,2,4,8
flow_steps = 0                   # beside a flow map, also decode the same noise with the flow, in this many steps
num_samples = 4
block_size = 0                   # tokens in a text; 0 = as many as the network was trained on
noise_scale = 1.0                # times the standard deviation of the first noise: less makes a flow map's texts more varied
temperature = 1.0                # of the guesses on the way: below 1 for commoner words; no effect in one step
gamma = 0.0                      # 0 deterministic, up to 1 = fresh noise, of full size, after every step but the last
out = ""                         # also write a .jsonl, one object a line with the text
device = "auto"                  # cuda, mps or cpu
dtype = "auto"                   # bfloat16, float16 or float32: whichever matrix products are fast in
seed = 1

settings = common.configure(globals(), sys.argv[1:])
globals().update(settings)
common.require_in(settings, "[1, inf)", "num_samples")
common.require_in(settings, "[0, inf)", "block_size", "seed")
common.require_in(settings, "[0, 1000000]", "flow_steps")
common.require_in(settings, "[0, 1]", "gamma")
common.require_in(settings, "[1e-3, 1e3]", "noise_scale", "temperature")         # beyond, float32 overflows

# ---------------------------------------------------------------- set-up

wanted = common.parse_steps(steps)
if flow_steps and init_from:
    common.fail("flow_steps compares a flow map in out_dir with the flow beside it; leave out init_from")
if out:
    if Path(out).suffix != ".jsonl":
        common.fail(f"out={out}: give a name that ends in .jsonl")
    storage.require_writable(Path(out))
machine = common.Machine(device, dtype)
if machine.world > 1:
    common.fail("sample.py runs as one process; start it with python")
checkpoint = storage.find_checkpoint(Path(out_dir), model, init_from, trust_checkpoint)
L = storage.set_length(checkpoint, block_size, init_from)
is_map = checkpoint["model_config"]["flow_map"]
net = storage.build_model(checkpoint, machine.device)
if flow_steps:
    flow = storage.build_model(storage.load_checkpoint(Path(out_dir) / "flm.pt", "flm"), machine.device)
    if not flow.embed.weight.equal(net.embed.weight):
        common.fail(f"{out_dir}/flm.pt is not the flow that the flow map was distilled from; run distill.py again")
clock = storage.build_clock(net.config, checkpoint["clock_embedding_share"], machine.device)
encoding = storage.find_tokenizer(checkpoint, vocabulary)
E = net.embed.weight.detach()
factor = noise_factor(E)


def generate(samples: range, n_steps: int, with_flow: bool) -> list[list[int]]:
    """The tokens of the texts with these numbers. Each has its own random numbers."""
    normal = common.sample_normals(common.mix(seed, common.SAMPLE_NOISE), samples, L, machine.device)
    z0 = latent_noise(E, factor, normal) * noise_scale                          # (B, L, d)
    network, decode = (flow if flow_steps else net, sample_flow) if with_flow else (net, sample_flow_map)
    network.head.temperature = temperature
    tokens = decode(network, clock, z0, n_steps, gamma, lambda: latent_noise(E, factor, normal))
    return tokens.tolist()                                                      # waits for the device


# ---------------------------------------------------------------- the samples

GROUP = 8  # texts in a network call, always, so that a text is the same however many are asked for: with other shapes
           # matrix products round differently, and in bfloat16 now and then another token wins

runs = [(n, not is_map) for n in wanted] + ([(flow_steps, True)] if flow_steps else [])
records, said = [], []
for n_steps, with_flow in runs:
    rows, start = [], time.perf_counter()
    with machine.autocast():  # one for all groups: it casts every weight once
        for first in range(0, num_samples, GROUP):
            rows += generate(range(first, first + GROUP), n_steps, with_flow)
    seconds = (time.perf_counter() - start) / len(rows)
    name = "FLM" if with_flow else "FMLM"
    said.append(f"{name}: {n_steps} network evaluation{'s' * (n_steps > 1)} and {seconds * 1000:.1f} ms a sample, in groups "
                f"of {GROUP}")
    records += [dict(sample=i + 1, model=name, steps=n_steps, text=encoding.decode(row), tokens=row, seed=seed, gamma=gamma,
                     temperature=temperature, noise_scale=noise_scale)
                for i, row in enumerate(rows[:num_samples])]

if out:
    storage.write_lines(Path(out), records)
    said.append(f"wrote {len(records)} samples to {out}")
try:
    print(*said, sep="\n")
    for i in range(1, num_samples + 1):  # the same noise side by side
        print(f"\n==== sample {i}")
        for record in records:
            if record["sample"] == i:
                if len(runs) > 1:
                    print(f"-- {record['model']}, {record['steps']} step{'s' * (record['steps'] > 1)}")
                print(record["text"].strip())
    sys.stdout.flush()
except BrokenPipeError:  # "| head" has seen enough; what Python would still write at its end goes nowhere
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
