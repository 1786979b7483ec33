"""Generate text.

    python sample.py --steps 1                    # one network evaluation a text, with the flow map in out_dir
    python sample.py --steps 1,2,4,8              # the same noise, decoded in more and more steps
    python sample.py --out_dir=out/owt --num_samples=64 --out=samples.jsonl

Reads out_dir/fmlm.pt, or flm.pt if there is no flow map yet. Needs no data folder: the tokenizer is in the checkpoint.
"""

import sys
import time
from pathlib import Path

import torch

import common
from data import tokenizer
from flow import latent_noise, noise_factor, sample_flow
from flowmap import sample_flow_map

out_dir = "out/pydocs"           # where train.py and distill.py wrote
model = "auto"                   # fmlm, flm, or auto: fmlm if there is one
steps = "1"                      # network evaluations a text; several as 1,2,4,8
num_samples = 4
batch_size = 64                  # texts generated at once; does not change them
gamma = 0.0                      # flow map only: 0 deterministic, up to 1 = fresh noise after every step
out = ""                         # also write a .jsonl, one object a line with the text
device = "auto"                  # cuda, mps or cpu
dtype = "auto"                   # bfloat16, float16 or float32: whichever matrix products are fast in
seed = 1

settings = common.configure(globals(), sys.argv[1:])
globals().update(settings)

# ---------------------------------------------------------------- set-up

machine = common.Machine(device, dtype)
wanted = common.parse_steps(steps)
if not 0 <= gamma <= 1:
    common.fail(f"gamma={gamma}: must lie between 0 and 1")
checkpoint = common.find_checkpoint(Path(out_dir), model, machine.device)
config = checkpoint["model_config"]
net = common.build_model(checkpoint, machine.device)
clock = common.build_clock(checkpoint, machine.device)
encoding = tokenizer.from_dict(checkpoint["tokenizer"])
E, L = net.embed.weight.detach(), config["block_size"]
factor = noise_factor(E, num_samples * L)
if gamma and not config["flow_map"]:
    common.fail("gamma needs a flow map; this checkpoint is a flow: run distill.py first, or set --gamma=0")


def generate(first: int, count: int, n_steps: int) -> torch.Tensor:
    """Tokens (count, L) of samples first .. first + count - 1. Each has its own random numbers, whatever the batch."""
    normal = common.sample_noise(common.mix(seed, 7), range(first, first + count), L, machine.device)
    z0 = latent_noise(E, factor, normal)                                        # (count, L, d)
    with machine.autocast():
        if config["flow_map"]:
            return sample_flow_map(net, clock, z0, n_steps, gamma, lambda: latent_noise(E, factor, normal))
        return sample_flow(net, clock, z0, n_steps)


# ---------------------------------------------------------------- the samples

records = []
for n_steps in wanted:
    texts, start = [], time.perf_counter()
    for first in range(0, num_samples, batch_size):
        tokens = generate(first, min(batch_size, num_samples - first), n_steps)
        texts += [encoding.decode(row) for row in tokens.tolist()]              # .tolist() waits for the device
    seconds = (time.perf_counter() - start) / num_samples
    kind = "FMLM" if config["flow_map"] else "FLM"
    print(f"\n==== {kind}, {n_steps} network evaluation{'s' * (n_steps > 1)} and {seconds * 1000:.1f} ms a sample")
    for i, text in enumerate(texts):
        print(f"\n-- {i + 1}\n{text.strip()}")
        records.append(dict(text=text, sample=i, steps=n_steps, model=kind, seed=seed, gamma=gamma))

if out:
    common.write_lines(Path(out), records)
    print(f"\nwrote {len(records)} samples to {out}")
