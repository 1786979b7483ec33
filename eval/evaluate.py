"""Judge texts, of a checkpoint or of a .jsonl that sample.py wrote, beside held-out text.

    python eval/evaluate.py --steps=1,2,8                               # stories, right or wrong
    python eval/evaluate.py --source=out/owt/fmlm.pt --dataset=owt      # judged by GPT-2 large
    python eval/evaluate.py --source=samples.jsonl --scorer=out/stories/ar.pt
    python eval/evaluate.py --source=out/chat/mdlm.pt --dataset=chat --steps=8 --temperatures=0.7,1
    python eval/evaluate.py --source=out/stories/flm.pt --num_samples=0 --bound # likelihood only
    python eval/evaluate.py --source= --naive                           # no model: the measures

Some sets name a checker in meta.json, which finds what is wrong with a text. Of those the table has
the shares of valid texts, of different ones and of those that stand verbatim in the training text,
and every kind of mistake with an example; no scorer, unless one is named. Other texts are judged
by a scorer.

In sets of lines a row is padded with ends of text. The text ends before the first of them, and
nothing after it counts: not in perplexity, entropy, the share of rare tokens, or copies. Only the
likelihood, which is that of the row, includes it.

Generative perplexity is how well the scorer, another model, predicts the texts (scorers.py). It
falls when texts get less diverse, as they do when sampled colder. So it stands beside measures of
diversity (metrics.py), and a sweep over temperatures is also interpolated to the entropy of
held-out text, where it reaches that (`matched`). At a temperature every token is drawn, the last
ones of a flow too; `argmax`, the flow's own way, takes the likeliest.

`distance` is one number for both, how far the distribution of the texts is from that of held-out
text (metrics.py). It compares with other held-out text, so the first row has a distance, too.
--naive adds rows of texts that anyone can make: they show what fools which measure (naive.py).

--protocol=paper scores, and samples with gamma, as the authors do (scorers.py). Only such numbers
compare with published ones.

Sweep the noise of a flow map instead (--noise_scales=0.6,0.8,1). Less noise than in training makes
its texts more diverse, and their tokens still agree with each other; tokens drawn one by one do
not. In such a sweep the last guess is an argmax; temperatures below 1 are for those before it.

The likelihood of held-out text is exact for ar, a bound for flm (bound.py), mdlm and duo (their
losses). Only there is "perplexity" that of the model itself.
"""

import contextlib
import importlib
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # the top folder
import flow
import flowmap
from baselines import noclock
from data.loader import Data, find_check, text_of, tokenizer_from_dict
from data.tokenizer import encode_text
from eval import metrics, scorers
from eval.bound import accuracy, bits_per_character, likelihood_bound, whiten
from eval.naive import naive_texts
from lib import checkpoint as ckpt
from lib import released
from lib.machine import BOUND_NOISE, SAMPLE_NOISE, Machine, generator, with_float64
from lib.mend import noise_of
from lib.settings import configure, fail, parse_numbers, require_choice, require_in

source = "out/stories/fmlm.pt"   # checkpoints (.pt; released ones: .ckpt, .safetensors or
                                 # hf:owner/name) and texts (.jsonl), comma-separated
trust_checkpoint = False         # read checkpoints although they hold Python objects
n_head = 0                       # of released checkpoints that do not say it
dataset = "stories"              # held-out text: the first row; training text: for copies
block_size = 0                   # tokens in a text; 0 = those of the checkpoints or the set, or 64
steps = "1"                      # network evaluations a text; several as 1,2,4,8
temperatures = ""                # several as argmax,0.8,1; "" = argmax for flows, 1 for others
noise_scales = ""                # flow maps: sweep the noise; 1 is the size it was trained on
gamma = 0.0                      # flows and flow maps: as in sample.py, or the authors' by protocol
num_samples = -1                 # of a checkpoint; 0 = none; -1 = 1000, or 1024 by protocol=paper
batch_size = 100                 # texts made together
copies_from = 10_000_000         # first tokens of the training text, to count and to seek copies
                                 # in; all of them where there is a checker
scorer = "auto"                  # what transformers loads, or an ar.pt; several with commas; auto:
                                 # gpt2-large, or none where there is a checker
scorer_samples = 0               # texts read by a scorer that is not ours, which is slow; 0 = all
protocol = "ours"                # or paper: scored and sampled the authors' way; see scorers.py
naive = False                    # also rows of texts that anyone can make; see naive.py
bound = False                    # also the likelihood of held-out text, where there is one
out = ""                         # also write the rows here, .json
device = "auto"
dtype = "auto"
seed = 1

settings = configure(globals(), sys.argv[1:])
globals().update(settings)
require_choice("protocol", protocol, ("ours", "paper"))
require_in(settings, "[0, inf)", "scorer_samples", "seed", "block_size", "n_head")
require_in(settings, "[-1, inf)", "num_samples")
require_in(settings, "[1, inf)", "batch_size", "copies_from")
require_in(settings, "[0, 1]", "gamma")
ours = protocol == "ours"
if num_samples == -1:
    settings["num_samples"] = num_samples = 1000 if ours else 1024
if naive and not num_samples:
    fail("naive rows are texts; set num_samples above 1")
if num_samples == 1:
    fail("num_samples=1: one text cannot be compared with others; ask for more, or for 0 = none")
wanted = parse_numbers("steps", steps, int, "1,2,4,8")
words = [word for word in temperatures.split(",") if word]
listed = ",".join(word for word in words if word != "argmax")
numbers = sorted(parse_numbers("temperatures", listed, float, "0.8,1")) if listed else []
scales = sorted(parse_numbers("noise_scales", noise_scales, float, "0.6,1")) if noise_scales else []
machine = Machine(with_float64(device), dtype)
if machine.world > 1:
    fail("eval/evaluate.py runs as one process; start it with python")

NEARLY_CLEAN = math.exp(12.6)    # a signal-to-noise ratio at which a text can be read off its state
MOST = 500                       # texts for the distance, which compares all pairs
FLOWS = "flm", "fmlm", "dense", "mse", "noclock"  # sampled by flow.py and flowmap.py
FILES = {"sdtt": "mdlm", "dcd": "duo"}            # where distilled baselines have their sampler
# What the texts of one run of sample.py share.
RUN = "model", "steps", "temperature", "gamma", "refine", "order", "guidance"


# ------------------------------------------------------------------------------ texts


def clock_of(checkpoint: dict, net) -> flow.Clock | noclock.NoClock:
    clock = flow.Clock(net.config.vocab_size, net.config.n_embd,
                       checkpoint["clock_embedding_share"], machine.device)
    return noclock.NoClock(clock) if checkpoint["kind"] == "noclock" else clock


def texts_of(checkpoint: dict, net, n_steps: int, temperature: float | str, noise_scale: float,
             number: int) -> np.ndarray:
    """Tokens (number, L), at a temperature or, of a flow, by "argmax", from noise_scale x noise."""
    kind, E = checkpoint["kind"], net.embed.weight.detach()
    clock, factor, rows = clock_of(checkpoint, net), flow.noise_factor(E), []
    autocast = contextlib.nullcontext if kind == "ar" else machine.autocast    # it caches one dtype
    law = noise_of(checkpoint)
    by_argmax = temperature == "argmax" or kind == "fmlm" and scales
    for group in range(math.ceil(number / batch_size)):
        B = min(batch_size, number - group * batch_size)
        rng = generator(seed, SAMPLE_NOISE, group, device=machine.device)
        noise = lambda: law(E, (B, L), rng, factor)                 # (B, L, d)
        draw = lambda head, hidden: flow.draw_tokens(head, hidden, rng, temperature)
        with autocast():
            if kind not in FLOWS:
                baseline = importlib.import_module(f"baselines.{FILES.get(kind, kind)}")
                rows.append(baseline.sample(net, clock, B, L, n_steps, rng, temperature))
                continue
            sample = flowmap.sample if kind == "fmlm" else flow.sample
            rows.append(sample(net, clock, noise() * noise_scale, n_steps, gamma, noise,
                               last=flow.most_likely if by_argmax else draw, rescale=ours,
                               temperature=1.0 if temperature == "argmax" else temperature))
    return torch.cat(rows).cpu().numpy()


def ways(kind: str, n_steps: int) -> tuple[list[tuple], list[tuple]]:
    """Pairs (temperature, noise scale): the default, unless the temperatures given lack it, and the
    sweep. For a map with noise_scales always both."""
    default = ("argmax" if kind in FLOWS else 1.0, 1.0)
    swept = metrics.sweep(kind, n_steps, numbers, scales)
    wants = default in swept or default[0] in words or not swept or kind == "fmlm" and scales
    return [default] if wants else [], swept


def ids_of(record: dict) -> list[int]:
    """The tokens of a record, at most L: its own if they spell its text in this vocabulary or there
    is no text; otherwise the text is encoded, and a line is padded."""
    ids = [int(i) for i in record.get("tokens") or ()]
    if ids and ("text" not in record or max(ids) < V and record["text"].strip() in (
            encoding.decode(ids).strip(), text_of(encoding, ids).strip())):
        return ids[:L]
    if eos is None:
        return encode_text(encoding, record["text"]).tolist()[:L]
    ids = encode_text(encoding, " " + record["text"].strip()).tolist()
    return (ids + [eos] * (L - len(ids)))[:L]


def read_texts(path: str) -> dict[str, np.ndarray]:
    """Tokens (n, L) of a .jsonl by the name of each run of sample.py in it: runs differ in RUN."""
    try:
        records = [json.loads(line) for line in Path(path).read_text().split("\n") if line]
        rows = [(tuple(record.get(key) for key in RUN), ids_of(record)) for record in records]
        rescaled = any(0 < float(record.get("gamma") or 0) < 1 for record in records)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        fail(f"{path} is no .jsonl with a text a line ({type(error).__name__}: {error})")
    if rescaled and not ours:
        fail(f"{path}: protocol=paper wants the authors' gamma sampling, and sample.py does ours; "
             f"give the checkpoint, with --gamma")
    whole = [(run, row) for run, row in rows if len(row) == L and 0 <= min(row) and max(row) < V]
    if left := len(rows) - len(whole):
        print(f"{path}: {left} texts left out, not of {L} known tokens", file=sys.stderr)
    texts = {}
    for run, row in whole:
        texts.setdefault(run, []).append(row)
    if min(map(len, texts.values()), default=0) < 2:
        fail(f"{path} has fewer than two texts of {L} tokens in a run; see block_size")
    differ = [i for i in range(len(RUN)) if len({run[i] for run in texts}) > 1]
    return {" ".join([path, *(f"{RUN[i]}={run[i]}" for i in differ)]): np.array(tokens)
            for run, tokens in texts.items()}


# ------------------------------------------------------------------------------ a row of the table


def measured(value, interval) -> dict:
    return dict(value=float(value), low=interval[0], high=interval[1])


def mean(values: np.ndarray, interval=metrics.bootstrap) -> dict:
    return measured(values.mean(), interval(values))


def of_all(statistic, tokens: np.ndarray) -> dict:
    """A statistic of all samples together. A bootstrap would repeat n-grams. So the interval comes
    from random halves: S^2 / (n/2) (1 - 1/2) = S^2 / n (delete-half jackknife)."""
    rng, n, value = np.random.default_rng(0), len(tokens), statistic(tokens)
    error = 1.96 * np.std([statistic(tokens[rng.permutation(n)[:n // 2]]) for _ in range(50)])
    return measured(value, (value - error, value + error))


def without_padding(rows: np.ndarray) -> np.ndarray:
    """Rows (n, L), those of lines with -1 from their first end of text on. A row that begins with
    one is whole, as `text_of` has it."""
    ended = np.logical_or.accumulate(rows == (-1 if eos is None else eos), 1)
    return np.where(ended & ~ended[:, :1], -1, rows.astype(np.int32))


def spell(rows: np.ndarray) -> list[str]:
    """The texts of rows (n, L)."""
    return [encoding.decode(row) if eos is None else text_of(encoding, row).strip()
            for row in rows.tolist()]


def kinds_of(mistakes: list[str | None], texts: list[str]) -> list[dict]:
    """The kinds of mistakes, the commonest first: how many texts have it, and one of them."""
    kinds = [mistake and mistake.partition(":")[0] for mistake in mistakes]
    return [dict(kind=kind, count=count, mistake=mistakes[kinds.index(kind)],
                 text=texts[kinds.index(kind)])
            for kind, count in Counter(filter(None, kinds)).most_common()]


def print_values(name: str, row: dict) -> None:
    print(f"{name:34}", *(f"{key} {entry['value']:.4g}" for key, entry in row.items()
                          if isinstance(entry, dict)), sep="  ", flush=True)


def judge(name: str, rows: np.ndarray, **facts) -> tuple[dict, dict]:
    """All about rows (n, L); for each scorer entropies, and nats and lengths of what it read."""
    texts, tokens, row = spell(rows), without_padding(rows), dict(name=name, **facts)
    equal = tokens[:len(held_out_tokens)]  # for what depends on the number of samples
    kl = lambda x: metrics.unigram_kl(training_counts, np.bincount(x[x >= 0], minlength=V))
    entropies, row["samples"] = metrics.sample_entropies(tokens if ours else rows), len(tokens)
    if check:
        mistakes = [check(text) for text in texts]
        row["valid"] = mean(np.array([mistake is None for mistake in mistakes]), metrics.wilson)
        row["mistakes"] = kinds_of(mistakes, texts)
    row["different"] = of_all(metrics.distinct, tokens)
    if packed > 1:
        row["verbatim"] = mean(metrics.verbatim(tokens, training_rows), metrics.wilson)
    row |= dict(entropy=mean(entropies), unigram_kl=of_all(kl, equal))
    if min(len(tokens), len(others)) > 2:
        row["distance"] = measured(*metrics.distance(tokens, others))
    if not check:
        copies = metrics.longest_copies(tokens, training_rows)
        row |= dict(
            self_bleu=mean(metrics.self_bleu(equal)),
            distinct_2=of_all(lambda x: metrics.distinct_ngrams(x, 2), equal),
            distinct_4=of_all(lambda x: metrics.distinct_ngrams(x, 4), equal),
            **{f"rare_{k}": mean(metrics.rare_shares(tokens, training_counts, k))
               for k in (256, 2048)},
            longest_copy=mean(copies),
            copied=mean(2 * copies >= (tokens >= 0).sum(1), metrics.wilson))
    scored, spelled = {}, texts if ours else [encoding.decode(ids) for ids in rows.tolist()]
    for scorer_name, score in score_of.items():
        read = slice(None if scorer_name.endswith(".pt") else scorer_samples or None)
        losses, counts = score(tokens[read], spelled[read])
        scored[scorer_name] = entropies, losses, counts
        row[f"perplexity {scorer_name}"] = measured(
            metrics.perplexity(losses, counts),
            metrics.bootstrap(np.stack([losses, counts], 1), metrics.perplexity))
    print_values(name, row)
    for kind in row.get("mistakes", ()):
        print(f"  {kind['count']:6}  {kind['mistake']}\n          {kind['text']}", flush=True)
    return row, scored


def match(runs: list[tuple], entropy: float) -> dict | None:
    """The perplexity at this entropy, from what a sweep `scored`; its interval by drawing the
    samples anew at every temperature. None where the sweep does not reach it."""
    def at(runs):
        found = metrics.entropy_matched(
            [entropies.mean() for entropies, *_ in runs],
            [math.log(metrics.perplexity(*scores)) for _, *scores in runs], entropy)
        return math.nan if found is None else math.exp(found)

    def drawn_anew(entropies, losses, counts):
        i = rng.integers(len(entropies), size=len(entropies))
        read = i[i < len(losses)]  # by the scorer, the first ones
        return entropies[i], losses[read], counts[read]
    value, rng = at(runs), np.random.default_rng(0)
    if math.isnan(value):
        return None
    again = [at([drawn_anew(*run) for run in runs]) for _ in range(500)]
    return measured(value, np.nanquantile(again, [0.025, 0.975]).tolist())


@torch.no_grad()
def likelihood(checkpoint: dict, net) -> dict:
    """Nats of held-out text under the model: per token, as bits a character, as perplexity."""
    kind, values, right = checkpoint["kind"], [], []
    clock, draws = clock_of(checkpoint, net), 1 if kind == "ar" else 32
    E_white = whiten(net.embed.weight) if kind == "flm" else None
    for first in range(0, len(held_out_tokens), batch_size):
        y = machine.put(held_out_tokens[first:first + batch_size])
        rng = generator(seed, BOUND_NOISE, first, device=machine.device)
        with machine.autocast():
            if kind == "flm":
                values.append(likelihood_bound(net, clock, y, rng, draws, E_white=E_white).nats)
                right.append(accuracy(net, clock, y, rng, NEARLY_CLEAN, E_white))
                continue
            loss = importlib.import_module(f"baselines.{kind}").loss
            times = flow.stratified(draws * len(y), rng).float().view(draws, -1)
            values.append(sum(loss(net, clock, y, tau, rng)[1].cpu().double().sum(1)
                              for tau in times) / draws)
    nats = torch.cat(values).cpu().double().numpy()                 # (n,)
    characters = np.array([len(text) for text in spell(held_out_tokens)])
    bits = metrics.bootstrap(np.stack([nats, characters], 1),
                             lambda n, c: bits_per_character(n.sum(-1), c.sum(-1)))
    accuracies = dict(accuracy_nearly_clean=mean(torch.cat(right).cpu().numpy())) if right else {}
    return accuracies | dict(
        exact=kind == "ar", nats_per_token=mean(nats / L),
        bits_per_character=measured(bits_per_character(nats.sum(), characters.sum()), bits),
        perplexity=measured(math.exp(nats.mean() / L), np.exp(metrics.bootstrap(nats / L))))


# ------------------------------------------------------------------------------ the program

sources = [name for name in source.split(",") if name]
checkpoints = {name: ckpt.load_checkpoint(name, trust=trust_checkpoint, n_head=n_head)
               for name in sources
               if name.startswith("hf:") or name.endswith((".pt", ".ckpt", ".safetensors"))}
lengths = {c["model_config"]["block_size"] for c in checkpoints.values()
           if c["model_config"]["learned_positions"] or not block_size}    # others take any length
lengths = (lengths | {block_size}) - {0}                            # 0: a released file says none
if len(lengths) > 1:
    fail(f"texts of {' and '.join(map(str, sorted(lengths)))} tokens cannot be judged together")
L = lengths.pop() if lengths else Data.row_length(dataset) or 64
held_out, training = (Data(dataset, split, L, seed) for split in ("val", "train"))
for name, checkpoint in checkpoints.items():
    ckpt.set_length(checkpoint, L, name)
    ckpt.require_same_vocabulary(checkpoint, held_out)
V = max([held_out.meta["vocab_size"]] + [                           # released ones may have padding
    c["model_config"]["vocab_size"] for c in checkpoints.values() if c["kind"] in ckpt.KINDS])
if V == released.GPT2 and any(name.endswith(".jsonl") for name in sources):
    V = released.GPT2_PADDED                                        # texts may have it, too
encoding = tokenizer_from_dict(held_out.tokenizer)
if num_samples and (L < 4 or held_out.n_rows < 2):
    fail(f"texts of {L} tokens cannot be judged: they need 4 tokens and two held-out texts")
held_out_tokens = held_out.rows(0, min(held_out.n_rows, num_samples or held_out.n_rows))
packed, checker = held_out.meta["row_length"] or 1, held_out.meta.get("checker")
check = find_check(checker)                                         # text -> what is wrong, or None
if checker and not check:
    fail(f"{held_out.path.parent}/meta.json names the checker {checker}, which has no check(text)")
training_rows = np.asarray(training.tokens[:None if check else copies_from // packed * packed])
training_rows = training_rows.reshape(-1, packed) if packed > 1 else training_rows[None]
eos = held_out.tokenizer["special_tokens"].get("<|endoftext|>") if packed > 1 else None
if eos == training.tokens[0]:
    eos = None                                                      # rows of packed documents
raw, training_rows = training_rows, without_padding(training_rows)
n_others = min(MOST, len(held_out_tokens), held_out.n_rows // 2)    # other than those of the row
others = without_padding(held_out.rows(held_out.n_rows - n_others, n_others)) if n_others else []
training_counts = np.bincount(training_rows[training_rows >= 0], minlength=V)
if scorer == "auto":
    scorer = "" if check else "gpt2-large"
judges = [name for name in scorer.split(",") if name and num_samples]
score_of = {Path(name).name: scorers.load(name, held_out, machine, protocol) for name in judges}
if len(score_of) < len(judges):
    fail(f"scorer={scorer}: two of them have the same name")

rows = [judge("held-out text", held_out_tokens)[0]] if num_samples else []
for name, tokens in naive_texts(raw, num_samples, L, seed, eos).items() if naive else ():
    rows.append(judge(f"naive: {name}", tokens)[0])
likelihoods, matched = {}, {}
for name in sources:
    if name not in checkpoints:
        rows += [judge(run, tokens, source=name)[0] for run, tokens in read_texts(name).items()]
        continue
    checkpoint = checkpoints[name]
    net, kind = ckpt.build_model(checkpoint, machine.device), checkpoint["kind"]
    for n_steps in wanted if num_samples else ():
        default, swept = ways(kind, n_steps)
        scored = {}
        for way in dict.fromkeys(default + swept):                  # each once
            temperature, noise_scale = way
            row, scored[way] = judge(
                f"{kind}, {n_steps} steps, {temperature}, noise x {noise_scale:g}",
                texts_of(checkpoint, net, n_steps, *way, num_samples), source=name, kind=kind,
                steps=n_steps, temperature=temperature, noise_scale=noise_scale)
            rows.append(row)
        for key in score_of if len(swept) > 1 else ():
            at = match([scored[way][key] for way in swept], rows[0]["entropy"]["value"])
            matched.setdefault(name, {}).setdefault(str(n_steps), {})[key] = at
            print(f"  {key} at held-out entropy:", f"{at['value']:.4g}" if at else "not reached")
    if bound and kind in ("ar", "flm", "mdlm", "duo"):
        likelihoods[name] = found = likelihood(checkpoint, net)
        print_values(f"{name}, likelihood ({'exact' if found['exact'] else 'a bound'})", found)
if out:
    kept = {key: value for key, value in settings.items()
            if key not in (*ckpt.PLACES, "source", "scorer", "out")}
    record = dict(date=time.strftime("%Y-%m-%d"), machine=machine.describe(),
                  torch=torch.__version__, settings=kept, vocabulary=V, scorers=list(score_of),
                  rows=rows, matched=matched, likelihoods=likelihoods)
    ckpt.replace_file(Path(out), lambda file: file.write(json.dumps(record, indent=1).encode()))
    print(f"wrote {out}")
