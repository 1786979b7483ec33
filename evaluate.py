"""Judge texts: those of a checkpoint, or of a .jsonl that sample.py wrote. Held-out text is the first row, to compare with.

    python evaluate.py --source=out/pydocs/fmlm.pt --steps=1,8                # with GPT-2 large, as in the papers
    python evaluate.py --source=samples.jsonl --scorer=out/pydocs/ar.pt       # with a model of ours, no download
    python evaluate.py --source=out/pydocs/mdlm.pt --steps=8 --temperatures=0.7,1,1.3
    python evaluate.py --source=out/pydocs/flm.pt --num_samples=0 --bound     # no texts: the likelihood of held-out ones

Generative perplexity is how well the scorer, another model, predicts the texts. It falls when texts get less diverse, as
they do when sampled colder. So it stands beside measures of diversity (metrics.py), and a sweep over several temperatures
is also interpolated to the entropy of held-out text, where it reaches that (`matched`). At a temperature every token is
drawn, the last ones of a flow too; `argmax` is the flow's own way, which takes the likeliest. For flow maps sweep the
noise instead (`--noise_scales=0.6,0.8,1`): less noise than the map was trained on makes more diverse texts, with more rare
tokens, that still agree with each other, as tokens drawn one by one do not. Such a sweep ends in an argmax throughout;
temperatures below 1 are for the guesses before the last, if there are any.

What the scorer sees is in scorers.py.

Likelihood is another matter: nats of held-out text under the model itself, exact for ar, a bound for flm (bound.py), mdlm
and duo (their losses). Only there is "perplexity" that of the model.
"""

import contextlib
import functools
import importlib
import json
import math
import operator
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

import common
import metrics
import scorers
import storage
from baselines import noclock
from bound import accuracy, bits_per_character, likelihood_bound, whiten
from data.loader import Data
from flow import drawn, latent_noise, most_likely, noise_factor, sample_flow, stratified
from flowmap import sample_flow_map

source = "out/pydocs/fmlm.pt"    # checkpoints (.pt, .ckpt) and texts (.jsonl), comma-separated
trust_checkpoint = False         # read checkpoints although they hold Python objects besides tensors
dataset = "pydocs"               # its held-out text is the first row, its training text is looked for copies
block_size = 0                   # tokens in a text; 0 = those of the checkpoints or of the dataset's rows, else 64
steps = "1"                      # network evaluations a text; several as 1,2,4,8
temperatures = ""                # guesses are softmax(logits / temperature); several as argmax,0.8,1; "" = argmax or 1
noise_scales = ""                # flow map only: sweep the noise it starts from; its last guess is then always an argmax
gamma = 0.0                      # of flows and flow maps: as in sample.py
sweep_samples = 0                # a first look with so many keeps what is around the data's entropy and rare tokens; 0 = all
num_samples = 1000               # of a checkpoint; 0 = none
batch_size = 100                 # texts made together
copies_from = 10_000_000         # training tokens, from the start, that are counted and that copies are looked for in
scorer = "gpt2-large"            # what transformers loads (a name, a folder, a .gguf) or an ar.pt; several with commas
scorer_samples = 0               # a model not ours reads so many of the texts, which is slow; 0 = all
bound = False                    # also the likelihood of held-out text under the checkpoints that have one
out = ""                         # also write the rows here, .json
device = "auto"
dtype = "auto"
seed = 1

settings = common.configure(globals(), sys.argv[1:])
globals().update(settings)
common.require_in(settings, "[0, inf)", "num_samples", "sweep_samples", "scorer_samples", "seed", "block_size")
common.require_in(settings, "[1, inf)", "batch_size", "copies_from")
common.require_in(settings, "[0, 1]", "gamma")
if num_samples == 1:
    common.fail("num_samples=1: one text cannot be compared with others; ask for more, or for 0 = none")
wanted = common.parse_steps(steps)
words = [word for word in temperatures.split(",") if word]
drawn_at = common.parse_positive("temperatures", [word for word in words if word != "argmax"], "argmax,0.8,1")
scales = common.parse_positive("noise_scales", [word for word in noise_scales.split(",") if word], "0.6,0.8,1")
machine = common.Machine(common.with_float64(device), dtype)
if machine.world > 1:
    common.fail("evaluate.py runs as one process; start it with python")

NEARLY_CLEAN = math.exp(12.6)                            # a signal-to-noise ratio at which a text can be read off its state
FLOWS = ("flm", "fmlm", "dense", "mse", "noclock")       # sampled by flow.py and flowmap.py; the others by baselines/
FILES = {"sdtt": "mdlm", "dcd": "duo"}                   # where distilled baselines have their sampler
RUN = ("model", "steps", "temperature", "gamma", "noise_scale")         # what texts of sample.py that belong together share


# ---------------------------------------------------------------- texts

def texts_of(checkpoint: dict, net, n_steps: int, temperature: float | str, noise_scale: float, number: int
             ) -> np.ndarray:
    """Tokens (number, L) of a checkpoint, at a temperature or, of a flow, by "argmax", from noise times noise_scale.
    The last tokens are drawn at a temperature, too, but those of a map whose sweep is over its noise."""
    kind = checkpoint["kind"]
    clock = storage.build_clock(net.config, checkpoint["clock_embedding_share"], machine.device)
    clock = noclock.NoClock(clock) if kind == "noclock" else clock
    E, rows = net.embed.weight.detach(), []
    factor = noise_factor(E)
    precision = machine.autocast if kind != "ar" else contextlib.nullcontext     # a cache holds one type of number
    for first in range(0, number, batch_size):
        B = min(batch_size, number - first)
        random = common.generator(seed, common.SAMPLE_DRAWS, first, device=machine.device)
        if kind not in FLOWS:
            sample = importlib.import_module(f"baselines.{FILES.get(kind, kind)}").sample
            with precision():
                rows.append(sample(net, clock, B, L, n_steps, random, temperature))
            continue
        normal = common.sample_normals(common.mix(seed, common.SAMPLE_NOISE), range(first, first + B), L, machine.device)
        by_argmax = temperature == "argmax" or kind == "fmlm" and scales
        last = most_likely if by_argmax else functools.partial(drawn, random=random)
        net.head.temperature = 1.0 if temperature == "argmax" else temperature
        z0 = latent_noise(E, factor, normal) * noise_scale
        with precision():
            decode = sample_flow_map if kind == "fmlm" else sample_flow
            rows.append(decode(net, clock, z0, n_steps, gamma, lambda: latent_noise(E, factor, normal), last))
    net.head.temperature = 1.0
    return torch.cat(rows).cpu().numpy()


def ways(kind: str, n_steps: int) -> tuple[list[tuple], list[tuple]]:
    """The pairs (temperature, noise scale) to sample this kind of model at: (default, sweep). The default is left out where
    temperatures are given without it, except of a map with noise_scales. The sweep is `metrics.sweep`."""
    usual = [("argmax" if kind in FLOWS else 1.0, 1.0)]
    swept = metrics.sweep(kind, n_steps, drawn_at, scales)
    if kind == "fmlm" and scales:
        unused = [x for x in drawn_at if (x, 1.0) not in swept], [x for x in scales if ("argmax", x) not in swept]
        if any(unused):
            print(f"{kind}, {n_steps} steps: not for its sweep are temperatures {unused[0]} and noise scales {unused[1]}")
        return usual, swept
    return [way for way in usual if way in swept or way[0] in words or not swept], swept


def near(checkpoint: dict, net, n_steps: int, swept: list[tuple], row: dict) -> list[tuple]:
    """Those of a sweep that a first look finds around the entropy of held-out text, of which `row` tells, or around its
    share of rare tokens."""
    if len(swept) < 3:
        return swept
    looks, chosen = [texts_of(checkpoint, net, n_steps, *way, sweep_samples) for way in swept], []
    for key, measure in (("entropy", metrics.sample_entropies), ("rare_256", rare_256)):
        values, target = [measure(tokens) for tokens in looks], row[key]["value"]
        error = 2 * max(v.std() for v in values) / sweep_samples ** 0.5
        chosen += metrics.around(swept, [v.mean() for v in values], target, error) if target else []
    return [way for way in swept if way in chosen]


def ids_of(record: dict) -> list[int]:
    """The tokens of a record: its own where they are this dataset's, which they are if they spell its text, or there is no
    text; else the text in the tokens of the dataset. Cut to L."""
    ids = list(map(operator.index, record.get("tokens") or ()))
    theirs = ids and ("text" not in record or max(ids) < V and encoding.decode(ids) == record["text"])
    return (ids if theirs else encoding.encode_ordinary(record["text"]))[:L]


def read_texts(path: str) -> dict[str, np.ndarray]:
    """Tokens (n, L) of a .jsonl, by a name for each of the runs of sample.py in it, which differ in model, steps or dials.
    Texts of fewer than L tokens are left out, saying so."""
    try:
        records = [json.loads(line) for line in Path(path).read_text().split("\n") if line]
        rows = [(tuple(record.get(key) for key in RUN), ids_of(record)) for record in records]
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        common.fail(f"{path} is no .jsonl with a text a line ({type(error).__name__}: {error})")
    whole = [(run, row) for run, row in rows if len(row) == L and 0 <= min(row) and max(row) < V]
    if len(whole) < len(rows):
        print(f"{path}: {len(rows) - len(whole)} of {len(rows)} texts have fewer than {L} tokens, or others than the "
              f"dataset, and are left out", file=sys.stderr)
    runs = dict.fromkeys(run for run, _ in whole)
    texts = {run: np.array([row for other, row in whole if other == run]) for run in runs}
    if min(map(len, texts.values()), default=0) < 2:
        common.fail(f"{path} has fewer than two texts of {L} tokens in a run; --block_size= sets another number")
    differ = [i for i in range(len(RUN)) if len({run[i] for run in runs}) > 1]
    return {" ".join([path, *(f"{RUN[i]}={run[i]}" for i in differ)]): tokens for run, tokens in texts.items()}


# ---------------------------------------------------------------- a row of the table

def rare_256(tokens: np.ndarray) -> np.ndarray:
    """Of each of the tokens (n, L) the share outside the 256 most common, (n,)."""
    return metrics.rare_shares(tokens, training_counts, 256)


def measured(value, interval) -> dict:
    return dict(value=float(value), low=interval[0], high=interval[1])


def mean(values: np.ndarray) -> dict:
    return measured(values.mean(), metrics.bootstrap(values))


def share(right: np.ndarray) -> dict:
    return measured(right.mean(), metrics.wilson(right))


def of_all(statistic, tokens: np.ndarray) -> dict:
    """A statistic of all samples together. Drawing samples twice would repeat n-grams, so instead of a bootstrap: the
    statistic of random halves. A half drawn without replacement varies around the whole as the whole around the truth:
    S^2 / (n/2) (1 - 1/2) = S^2 / n (delete-half jackknife)."""
    random, value = np.random.default_rng(0), statistic(tokens)
    halves = [statistic(tokens[random.permutation(len(tokens))[:len(tokens) // 2]]) for _ in range(50)]
    return measured(value, (value - 1.96 * np.std(halves), value + 1.96 * np.std(halves)))


def judge(name: str, tokens: np.ndarray, **facts) -> tuple[dict, dict]:
    """Everything about the tokens (n, L), and for each scorer their entropies, (n,), and nats and numbers of tokens of
    those it read. What depends on the number of samples is measured on as many as there are held-out."""
    texts, equal = [encoding.decode(row) for row in tokens.tolist()], tokens[:len(held_out_tokens)]
    def kl(tokens):
        return metrics.unigram_kl(training_counts, np.bincount(tokens.ravel(), minlength=V))
    copies = metrics.longest_copies(tokens, training_rows)
    row = dict(name=name, **facts, samples=len(tokens), entropy=mean(metrics.sample_entropies(tokens)),
               self_bleu=mean(metrics.self_bleu(equal)), unigram_kl=of_all(kl, equal),
               distinct_2=of_all(lambda t: metrics.distinct_ngrams(t, 2), equal),
               distinct_4=of_all(lambda t: metrics.distinct_ngrams(t, 4), equal),
               rare_256=mean(rare_256(tokens)),
               rare_2048=mean(metrics.rare_shares(tokens, training_counts, 2048)),
               longest_copy=mean(copies), copied=share(copies >= tokens.shape[1] // 2),
               different=of_all(metrics.distinct, tokens))
    if held_out.path.parent.name == "palindromes":
        row["valid"] = share(metrics.palindromes(tokens))
    scored = {}
    for scorer_name, score in score_of.items():
        read = slice(None if scorer_name.endswith(".pt") else scorer_samples or None)
        losses, counts = score(tokens[read], texts[read])
        scored[scorer_name] = metrics.sample_entropies(tokens), losses, counts
        row[f"perplexity {scorer_name}"] = measured(metrics.perplexity(losses, counts), metrics.bootstrap(
            np.stack([losses, counts], 1), metrics.perplexity))
    print("  ".join([f"{name:34.34}", *(f"{key} {row[key]['value']:.3g}" for key in row if isinstance(row[key], dict))]),
          flush=True)
    return row, scored


def match(runs: list[tuple], entropy: float) -> dict | None:
    """The perplexity at this entropy, from what a sweep over temperatures `scored`; its interval by drawing the samples of
    every temperature anew. None where the sweep does not reach it."""
    def at(runs):
        found = metrics.entropy_matched([h.mean() for h, _, _ in runs], [math.log(metrics.perplexity(losses, counts))
                                                                         for _, losses, counts in runs], entropy)
        return math.nan if found is None else math.exp(found)
    value, random = at(runs), np.random.default_rng(0)
    if math.isnan(value):
        return None
    def drawn_anew(entropies, losses, counts):
        i = random.integers(len(entropies), size=len(entropies))
        j = i if len(losses) == len(i) else random.integers(len(losses), size=len(losses))
        return entropies[i], losses[j], counts[j]
    again = [at([drawn_anew(*run) for run in runs]) for _ in range(500)]
    return measured(value, np.nanquantile(again, [0.025, 0.975]).tolist())


@torch.no_grad()
def likelihood(checkpoint: dict, net) -> dict | None:
    """Nats of held-out text under the model: per token, and as bits a character and perplexity a token."""
    kind, values, right = checkpoint["kind"], [], []
    if kind not in ("ar", "flm", "mdlm", "duo"):
        return None
    clock = storage.build_clock(net.config, checkpoint["clock_embedding_share"], machine.device)
    draws, E_white = 1 if kind == "ar" else 32, whiten(net.embed.weight) if kind == "flm" else None
    for first in range(0, len(held_out_tokens), batch_size):
        y = machine.put(held_out_tokens[first:first + batch_size])
        random = common.generator(seed, common.BOUND_NOISE, first, device=machine.device)
        with machine.autocast():
            if kind == "flm":
                values.append(likelihood_bound(net, clock, y, random, draws, E_white=E_white).nats)
                right.append(accuracy(net, clock, y, random, NEARLY_CLEAN, E_white))
                continue
            tau = stratified(draws * len(y), random).view(draws, -1)
            loss = importlib.import_module(f"baselines.{kind}").loss
            values.append(sum(loss(net, clock, y, times.float(), random)[1].cpu().double().sum(1) for times in tau) / draws)
    nats = torch.cat(values).cpu().double().numpy()                             # (n,)
    characters = np.array([len(encoding.decode(row)) for row in held_out_tokens.tolist()])
    L = held_out_tokens.shape[1]
    accuracies = dict(accuracy_nearly_clean=mean(torch.cat(right).cpu().numpy())) if right else {}
    return accuracies | dict(exact=kind == "ar", nats_per_token=mean(nats / L), bits_per_character=measured(
        bits_per_character(nats.sum(), characters.sum()), metrics.bootstrap(
            np.stack([nats, characters], 1), lambda n, c: bits_per_character(n.sum(-1), c.sum(-1)))),
        perplexity=measured(math.exp(nats.mean() / L), np.exp(metrics.bootstrap(nats / L))))


# ---------------------------------------------------------------- the program

sources, judges = source.split(","), [name for name in scorer.split(",") if name and num_samples]
checkpoints = {name: storage.load_checkpoint(name, trust=trust_checkpoint) for name in sources if name.endswith((".pt", ".ckpt"))}
lengths = {checkpoint["model_config"]["block_size"] for checkpoint in checkpoints.values()} | ({block_size} - {0})
if len(lengths) > 1:
    common.fail(f"texts of {' and '.join(map(str, sorted(lengths)))} tokens cannot be judged together")
L = lengths.pop() if lengths else Data.row_length(dataset) or 64
held_out, training = (Data(dataset, split, L, seed) for split in ("val", "train"))
for checkpoint in checkpoints.values():
    storage.require_same_vocabulary(checkpoint, held_out)
V, encoding = held_out.meta["vocab_size"], storage.tokenizer.from_dict(held_out.tokenizer)
if num_samples and (L < 4 or held_out.n_rows < 2):
    common.fail(f"texts of {L} tokens cannot be judged: {'they need 4' if L < 4 else 'too few are held out'}; see block_size")
held_out_tokens = held_out.rows(0, min(held_out.n_rows, num_samples or held_out.n_rows))
packed = held_out.meta["row_length"]
training_rows = np.asarray(training.tokens[:copies_from // (packed or 1) * (packed or 1)]).reshape(-1, packed or 1)
training_rows = training_rows if packed else training_rows.ravel()
training_counts = np.bincount(training_rows.ravel(), minlength=V)
if len({os.path.basename(name) for name in judges}) < len(judges):
    common.fail(f"scorer={scorer}: two of them have the same name")
score_of = {os.path.basename(name.rstrip("/")): scorers.load(name, held_out, machine) for name in judges}

rows = [judge("held-out text", held_out_tokens)[0]] if num_samples else []
likelihoods, matched = {}, {}
for name in sources:
    if name not in checkpoints:
        rows += [judge(said, tokens, source=name)[0] for said, tokens in read_texts(name).items()]
        continue
    checkpoint = checkpoints[name]
    net, kind = storage.build_model(checkpoint, machine.device), checkpoint["kind"]
    for n_steps in wanted if num_samples else ():
        usual, swept = ways(kind, n_steps)
        scored, kept_ways = {}, near(checkpoint, net, n_steps, swept, rows[0]) if sweep_samples else swept
        for way in dict.fromkeys(usual + kept_ways):  # each once
            temperature, noise_scale = way
            tokens = texts_of(checkpoint, net, n_steps, *way, num_samples)
            scale = dict(noise_scale=noise_scale) if noise_scale != 1 else {}
            said = f"{kind}, {n_steps} steps, {temperature}{f', noise x {noise_scale:g}' if scale else ''}"
            row, scored[way] = judge(said, tokens, source=name, kind=kind, steps=n_steps, temperature=temperature, **scale)
            rows.append(row)
        for key in score_of if len(kept_ways) > 1 else ():
            at = match([scored[way][key] for way in kept_ways], rows[0]["entropy"]["value"])
            matched.setdefault(name, {}).setdefault(str(n_steps), {})[key] = at
            reached = f"{at['value']:.4g}" if at else "not reached"
            print(f"  perplexity {key} at the entropy of held-out text: {reached}")
    if bound and (found := likelihood(checkpoint, net)):
        likelihoods[name] = found
        print(f"{name}: held-out text has {'' if found['exact'] else 'at most '}{found['nats_per_token']['value']:.3f} "
              f"nats a token, {found['bits_per_character']['value']:.3f} bits a character, perplexity "
              f"{found['perplexity']['value']:.4g}")
        if "accuracy_nearly_clean" in found:
            print(f"  of its tokens in almost no noise {found['accuracy_nearly_clean']['value']:.1%} are told apart")
if out:
    kept = {key: value for key, value in settings.items() if key not in (*storage.PLACES, "source", "scorer", "out")}
    record = dict(date=time.strftime("%Y-%m-%d"), machine=machine.describe(), torch=torch.__version__, settings=kept,
                  vocabulary=V, scorers=list(score_of), rows=rows, matched=matched, likelihoods=likelihoods)
    storage.replace_file(Path(out), lambda file: file.write(json.dumps(record, indent=1).encode()))
    print(f"wrote {out}")
