"""Generate text.

    python sample.py --steps 1              # one network evaluation a text, with the flow map
    python sample.py --steps 1,2,4,8 --flow_steps 64    # by flow map and flow
    python sample.py --prompt "One calm morning Tom took a nice kite to the fair." --watch
    python sample.py --fill "One {2} Tom took a {1} kite to the {1}. {22} Now Zoe has the {1}, and"
    python sample.py --refine=8     # each round keeps the surest words; or --steps 8 --guidance=2
    python sample.py --out_dir=out/owt --num_samples=64 --out=samples.jsonl
    python sample.py --init_from=owt_fmlm.ckpt --trust_checkpoint   # a checkpoint of the authors

Reads out_dir/mended.pt, or fmlm.pt, or flm.pt, the first there is. Needs no data folder: the
tokenizer is in the checkpoint. Prints a table, a row for each number of steps, then the texts: the
first of every row, the second of every row. With a checker, wrong texts end with what is wrong.
"""

import itertools
import os
import sys
import time
import timeit
from pathlib import Path

from lib.settings import configure, fail, parse_numbers, require_in, require_sampling
import torch  # after lib.settings, which says how its threads wait

import flow
import flowmap
from data.loader import find_check, text_of
from lib import checkpoint as ckpt
from lib.machine import DROPOUT, SAMPLE_NOISE, Machine, generator, mix
from lib.mend import noise_of, noise_of_rounds
from lib.prompt import encode, read_patterns
from lib.watch import Watch

out_dir = ""                     # of train.py and distill.py; "" = out/stories, or before you have
                                 # trained there weights/stories, which comes with the code
init_from = ""                   # a checkpoint instead: ours, or one the authors released (.ckpt,
                                 # .safetensors or hf:owner/name)
trust_checkpoint = False         # read it although it holds Python objects besides tensors
n_head = 0                       # of a released checkpoint that does not say it
vocabulary = ""                  # of a released checkpoint: vocab.txt, tokenizer.json; "" = GPT-2
model = "auto"                   # fmlm, flm, or auto: fmlm if there is one; mended.pt first
steps = "1"                      # network evaluations per text; several as 1,2,4,8
flow_steps = 0                   # also sample the map's flow, in this many steps
num_samples = 4                  # for each pattern, where fill is a file
block_size = 0                   # tokens in a text; 0 = as many as the network was trained on
temperature = 1.0                # of the guesses on the way: below 1 for commoner words
gamma = 0.0                      # 0: no fresh noise; 1: all noise is fresh after every step
prompt = ""                      # what every text begins with; needs context_share in training
fill = ""                        # or a text with blanks, {} = one token, {3} = three; or a file
refine = 0                       # rounds of posterior refinement with a flow map; 0 = off
order = "confidence"             # in which refine keeps tokens: the surest first; or random
guidance = 1.0                   # autoguidance (eta), away from a weaker network; 1 = off
weak = ""                        # its checkpoint, with the same E; "" = this one with dropout
weak_dropout = 0.1               # that dropout
watch = False                    # show the first text of each run while it is made
out = ""                         # also write a .jsonl, one object a line with the text
device = "auto"                  # cuda, mps or cpu
dtype = "auto"                   # bfloat16, float16, float32; auto: the fastest the hardware has
seed = 1

settings = configure(globals(), sys.argv[1:])
globals().update(settings)
require_sampling(settings)
wanted = parse_numbers("steps", steps, int, "1,2,4,8")
patterns = read_patterns(prompt, fill)
if out:
    if Path(out).suffix != ".jsonl":
        fail(f"out={out}: give a name that ends in .jsonl")
    ckpt.require_writable(Path(out))

# ------------------------------------------------------------------------------ the networks

machine = Machine(device, dtype)
if machine.world > 1:
    fail("sample.py runs as one process; start it with python")
path, flow_path, checkpoint = ckpt.find_network(out_dir, init_from, model, trust_checkpoint, n_head)
L = ckpt.set_length(checkpoint, block_size, init_from)
is_map = checkpoint["model_config"]["flow_map"]
require_in(settings, f"[0, {L}]", "refine")  # a round keeps a token at least
if refine and not is_map:
    fail(f"refine is for flow maps, and {path} is a flow; distill.py makes its map")
others = [(flow_path, "flm")] * (flow_steps > 0) + [(weak, checkpoint["kind"])] * (weak != "")
files = {path: checkpoint} | {name: ckpt.load_checkpoint(name, kind, trust_checkpoint, n_head)
                              for name, kind in others}
for name, file in files.items() if patterns or refine else ():
    ckpt.require_context(name, file)
nets = {name: ckpt.build_model(file, machine.device) for name, file in files.items()}
net, flow_net = nets[path], nets[flow_path if flow_steps else path]
if not all(other.embed.weight.equal(net.embed.weight) for other in nets.values()):
    fail(f"{weak} has another E than {path}; only earlier checkpoints of its distillation have the "
         f"same, those of a flow do not" if weak else f"{flow_path} is not the flow that {path} "
         f"was distilled from; run distill.py again")
weak_nets = {net: nets[weak]} if weak else {                        # each network's weaker one
    nets[name]: ckpt.build_model(file, machine.device, dropout=weak_dropout).train()
    for name, file in files.items() if guidance != 1}
clock = flow.Clock(net.config.vocab_size, net.config.n_embd, checkpoint["clock_embedding_share"],
                   machine.device)
encoding, check = ckpt.find_tokenizer(checkpoint, vocabulary), find_check(checkpoint.get("checker"))
E = net.embed.weight.detach()
factor = flow.noise_factor(E)

# ------------------------------------------------------------------------------ the samples

# A network call makes GROUP texts, always, and each group has its own generator. So a text is the
# same however many are asked for, also in bfloat16, where other shapes round differently.
GROUP = 8
given = [encode(encoding, pattern, bool(fill), L, checkpoint) for pattern in patterns] or [[-1] * L]
told = [max((i + 1 for i, token in enumerate(row) if token >= 0), default=0) for row in given]
given = torch.tensor(given, device=machine.device)                  # (n, L), -1 where unknown


def generate(n_steps, with_flow, number=0, group=0, size=GROUP, watcher=None):
    """The tokens of the texts of a group, as lists, of the pattern of that number."""
    rng = generator(seed, SAMPLE_NOISE, group + (number << 32), device=machine.device)
    law = flow.latent_noise if with_flow else noise_of(checkpoint)
    noise = lambda: law(E, (size, L), rng, factor)                  # (B, L, d)
    first = lambda: watcher.noise(noise()) if watcher else noise()
    y, known = (row.expand(size, -1) for row in (given[number].clamp_min(0), given[number] >= 0))
    if refine:
        return flowmap.refine(net, clock, noise_of_rounds(checkpoint, first), refine, n_steps,
                              rng if order == "random" else None, y, known, watcher).tolist()
    sampler, network = (flow.sample, flow_net) if with_flow else (flowmap.sample, net)
    network, weaker = (flow.Given(one, y, known) if one and patterns else one
                       for one in (network, weak_nets.get(network)))
    torch.manual_seed(mix(seed, DROPOUT, number, group))            # for the weak network
    return sampler(network, clock, first(), n_steps, gamma, noise, temperature=temperature,
                   weak=weaker, eta=guidance, watch=watcher).tolist()   # waits for the device


runs = [(n, not is_map) for n in wanted] + ([(flow_steps, True)] if flow_steps else [])
total = num_samples * len(given)
names, table, records = [], [], []                                  # records: a list for each run
for n_steps, with_flow in runs:
    rows, made, kind = [], 0, "FLM" if with_flow else "FMLM"
    names.append(f"{kind:5} " + (f"{refine}x{n_steps}" if refine else str(n_steps)).rjust(6))
    with torch.no_grad(), machine.autocast():  # one for all groups: it casts every weight once
        if watch:
            watcher = Watch(encoding, E, kind, n_steps * max(1, refine), given[0])
            text = torch.tensor(generate(n_steps, with_flow, watcher=watcher)[0])
            if guidance != 1:                   # the last guess was not guided, nor its greys
                watcher.draw("guided", text, text >= 0, watcher.last[2])
        alone = min(timeit.repeat(lambda: generate(n_steps, with_flow, size=1), number=1, repeat=2))
        start = said = time.perf_counter()
        for number, group in itertools.product(range(len(given)), range(-(-num_samples // GROUP))):
            rows += generate(n_steps, with_flow, number, group)[:num_samples - group * GROUP]
            made, passed = made + GROUP, time.perf_counter() - start
            if time.perf_counter() > said + 5 and len(rows) < total:
                said = time.perf_counter()
                print(f"{kind}, steps={n_steps}: {len(rows):,} of {total:,} texts, "
                      f"{(total / len(rows) - 1) * passed:.0f} s left", file=sys.stderr)
    dials = {key: settings[key] for key in ("seed", "gamma", "temperature", "refine", "order",
                                            "guidance", "weak", "weak_dropout")}
    records.append([dict(
        sample=i + 1, model=kind, steps=n_steps, tokens=row, **dials,
        text=text_of(encoding, row, told[i // num_samples]),
        pattern=patterns[i // num_samples] if patterns else "") for i, row in enumerate(rows)])
    table.append(f"{names[-1]} {alone * 1000:9.1f} {made / passed:8.1f}")
    if check:
        mistakes = [check(record["text"].strip()) for record in records[-1]]
        records[-1] = [record | dict(mistake=m) for record, m in zip(records[-1], mistakes)]
        table[-1] += f" {mistakes.count(None) / total:6.1%}"

if out:
    ckpt.write_lines(Path(out), [record for run in records for record in run])
long = any("\n" in one["text"] or len(one["text"]) > 500 for run in records for one in run)
try:
    print("model  steps ms a text  texts/s" + "  valid" * bool(check), *table, sep="\n")
    print(f"(of {total:,} texts; ms for one alone, texts/s in groups of {GROUP})"
          + f"; all {total * len(runs):,} are in {out}" * bool(out), end="\n\n")
    for one_of_each in zip(*records):
        if long:
            print(f"==== sample {one_of_each[0]['sample']}")
        for name, record in zip(names if len(runs) > 1 else [""], one_of_each):
            wrong = f"  [{record['mistake']}]" if record.get("mistake") else ""
            print(name, record["text"].strip() + wrong, sep=("\n" if long else "  ") * bool(name))
        if long or len(runs) > 1:
            print()
    sys.stdout.flush()
except BrokenPipeError:  # "| head" has seen enough; what is left goes nowhere
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
