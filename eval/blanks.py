"""Texts with blanks: how often a model fills them so that the story is right.

    python eval/blanks.py                                           # out/stories/fmlm.pt, one step
    python eval/blanks.py --source=out/stories/fmlm.pt,out/evidence/mdlm.pt --steps=1,2,4,8

Takes held-out stories, hides a part of each, lets the model write it, and asks the set's checker.
Hidden are, in turn: all but the first sentence; the second sentence; every second word; every noun
(names are not); every word of a class (names, adjectives and days, too); everything. The last is
ordinary sampling. The refinement of a flow map, in rounds of two jumps, stands beside its jumps
alone at equal evaluations. Masked diffusion is sampled by its own way and with the surest tokens
first. The share has Wilson's interval.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # the top folder
import flow
import flowmap
from baselines import mdlm
from data.loader import Data, find_check, text_of
from data.stories.grammar import CLASSES
from eval.metrics import wilson
from lib import checkpoint as ckpt
from lib.machine import SAMPLE_NOISE, Machine, generator
from lib.mend import noise_of, noise_of_rounds
from lib.settings import configure, fail, parse_numbers, require_in

source = "out/stories/fmlm.pt"   # checkpoints: flow maps and flows with context, mdlm
dataset = "stories"              # one with a checker
steps = "1"                      # network evaluations a text; several as 1,2,4,8
num_samples = 500
batch_size = 100                 # texts made together
out = ""                         # also write the rows here, .json
device = "auto"
dtype = "auto"
seed = 1

settings = configure(globals(), sys.argv[1:])
globals().update(settings)
require_in(settings, "[1, inf)", "num_samples", "batch_size")
wanted = parse_numbers("steps", steps, int, "1,2,4,8")
machine = Machine(device, dtype)

# ------------------------------------------------------------------------------ the blanks

data = Data(dataset, "val", Data.row_length(dataset), seed)
if data.meta.get("checker") != "data.stories.grammar":
    fail(f"{dataset}: the blanks are those of stories; leave out dataset")
check = find_check(data.meta["checker"])
encoding = ckpt.find_tokenizer(dict(tokenizer=data.tokenizer, model_config=dict(
    vocab_size=data.meta["vocab_size"])), "")
y = machine.put(data.rows(0, num_samples))                          # (n, L)
words = [encoding.decode([i]).strip() for i in range(data.meta["vocab_size"])]
in_class = lambda names: torch.tensor([
    any(word in CLASSES[name] for name in names) for word in words], device=y.device)[y]
NOUNS = "toy", "place", "room", "gift", "kin", "glue", "animal", "food"
sentence = (y == words.index(".")).cumsum(1).roll(1, 1)             # (n, L), number of each token's
sentence[:, 0] = 0
end = data.tokenizer["special_tokens"]["<|endoftext|>"]
place = torch.arange(y.size(1), device=y.device).expand_as(y)
KNOWN = {                                                           # what is told, (n, L)
    "first sentence given": sentence == 0, "second sentence blank": sentence != 1,
    "every second word blank": place % 2 == 0, "every noun blank": ~in_class(NOUNS),
    "all words of classes blank": ~in_class(CLASSES),
    "nothing given": torch.zeros_like(y, dtype=torch.bool)}

# ------------------------------------------------------------------------------ the samplers

def samplers(checkpoint: dict, net) -> Iterator[tuple[str, Callable]]:
    """Names, and functions of (y, known, steps, rng) that give tokens, all (B, L)."""
    kind, E = checkpoint["kind"], net.embed.weight.detach()
    if kind == "mdlm":
        for name, sample in (("mdlm", mdlm.sample), ("mdlm, surest first", mdlm.sample_surest)):
            yield name, lambda y, known, n, rng, sample=sample: sample(
                net, None, *y.shape, n, rng, y=y, known=known)
        return
    clock = flow.Clock(*E.shape, checkpoint["clock_embedding_share"], machine.device)
    factor, law = flow.noise_factor(E), noise_of(checkpoint)
    noise = lambda y, rng: law(E, y.shape, rng, factor)
    sample = flowmap.sample if kind == "fmlm" else flow.sample
    yield kind, lambda y, known, n, rng: sample(
        flow.Given(net, y, known), clock, noise(y, rng), n)
    if kind == "fmlm":
        yield "fmlm, refined", lambda y, known, n, rng: flowmap.refine(
            net, clock, noise_of_rounds(checkpoint, lambda: noise(y, rng)), max(1, n // 2),
            min(n, 2), y=y, known=known)


rows = []
for path in source.split(","):
    checkpoint = ckpt.load_checkpoint(path)
    if checkpoint["kind"] not in ("flm", "fmlm", "mdlm"):
        fail(f"{path} is of kind {checkpoint['kind']}; this program samples flm, fmlm and mdlm")
    if checkpoint["kind"] != "mdlm":
        ckpt.require_context(path, checkpoint)
    ckpt.require_same_vocabulary(checkpoint, data)
    ckpt.set_length(checkpoint, y.size(1), path)
    net = ckpt.build_model(checkpoint, machine.device)
    for name, sample in samplers(checkpoint, net):
        for blank, known in KNOWN.items():
            for n in wanted:
                made = []
                for i in range(0, num_samples, batch_size):
                    part, rng = slice(i, i + batch_size), generator(seed, SAMPLE_NOISE, i,
                                                                    device=machine.device)
                    with machine.autocast():
                        made += sample(y[part], known[part], n, rng).tolist()
                # Up to the last word that was told, whatever the model put before it.
                told = ((known & (y != end)) * (place + 1)).amax(1).tolist()
                right = torch.tensor([not check(text_of(encoding, row, last).strip())
                                      for row, last in zip(made, told)])
                low, high = wilson(right.numpy())
                rows.append(dict(model=name, path=path, blank=blank, steps=n,
                                 valid=right.float().mean().item(), low=low, high=high))
                print(f"{name:18}  {blank:26}  {n:4} evaluations  {rows[-1]['valid']:6.1%}  "
                      f"[{low:.1%}, {high:.1%}]", flush=True)
if out:
    ckpt.replace_file(Path(out), lambda file: file.write(json.dumps(
        dict(settings=settings, rows=rows), indent=1).encode()))
