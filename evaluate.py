"""Judge texts: those of a checkpoint, or of a .jsonl that sample.py wrote. Held-out text is the first row, to compare with.

    python evaluate.py --source=out/pydocs/fmlm.pt --steps=1,8                # with GPT-2 large, as in the papers
    python evaluate.py --source=samples.jsonl --scorer=out/pydocs/ar.pt       # with a model of ours, no download
    python evaluate.py --source=out/pydocs/mdlm.pt --steps=8 --temperatures=0.7,0.85,1
    python evaluate.py --source=out/pydocs/flm.pt --num_samples=0 --bound     # no texts: the likelihood of held-out ones

Generative perplexity is how well the scorer, another model, predicts the texts. It can be bought: colder sampling lowers
it, and the variety of the texts with it. So it stands beside measures of variety (metrics.py), and with several
temperatures it is also read off where the texts are as varied as the data, if the sweep reaches that (`matched`).

What the scorer sees: the decoded text in its own tokens, after its begin-of-text token, so that the first token is scored
too; what does not fit its context is cut off on the right; an end-of-text token inside a text is scored like any other.

Likelihood is another matter: nats of held-out text under the model itself, exact for ar, a bound for flm (bound.py), mdlm
and duo (their losses). Only there is "perplexity" that of the model.
"""

import contextlib
import functools
import importlib
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import common
import metrics
import storage
from baselines import ar, noclock
from bound import bits_per_character, likelihood_bound, whiten
from data.loader import Data
from flow import drawn, latent_noise, most_likely, noise_factor, sample_flow, stratified
from flowmap import sample_flow_map

source = "out/pydocs/fmlm.pt"    # checkpoints (.pt) and texts (.jsonl), comma-separated
dataset = "pydocs"               # its held-out text is the first row, its training text is looked for copies
steps = "1"                      # network evaluations a text; several as 1,2,4,8
temperatures = "1"               # every guess is softmax(logits / temperature); several as 0.8,1
draw_last = False                # flows: draw the tokens of the last step instead of taking the likeliest
gamma = 0.0                      # flow map only: as in sample.py
num_samples = 1000               # of a checkpoint; 0 = none
batch_size = 100                 # texts made and scored together
scorer = "gpt2-large"            # what transformers loads (a name, a folder, a .gguf) or an ar.pt; several with commas
bound = False                    # also the likelihood of held-out text under the checkpoints that have one
out = ""                         # also write the rows here, .json
device = "auto"
dtype = "auto"
seed = 1

settings = common.configure(globals(), sys.argv[1:])
globals().update(settings)
common.require_in(settings, "[0, inf)", "num_samples", "seed")
common.require_in(settings, "[1, inf)", "batch_size")
common.require_in(settings, "[0, 1]", "gamma")
machine = common.Machine(device, dtype)

FLOWS = ("flm", "fmlm", "dense", "mse", "noclock")       # sampled by flow.py and flowmap.py; the others by baselines/
FILES = {"sdtt": "mdlm", "dcd": "duo"}                   # where distilled baselines have their sampler


# ---------------------------------------------------------------- texts

def texts_of(checkpoint: dict, net, n_steps: int, temperature: float) -> np.ndarray:
    """Tokens (num_samples, L) of a checkpoint."""
    kind, L = checkpoint["kind"], net.config.block_size
    clock = storage.build_clock(net.config, checkpoint["clock_embedding_share"], machine.device)
    clock = noclock.NoClock(clock) if kind == "noclock" else clock
    E, rows = net.embed.weight.detach(), []
    factor = noise_factor(E, E.size(1))
    for first in range(0, num_samples, batch_size):
        B = min(batch_size, num_samples - first)
        random = common.generator(seed, 9, first, device=machine.device)
        if kind not in FLOWS:
            sample = importlib.import_module(f"baselines.{FILES.get(kind, kind)}").sample
            rows.append(sample(net, clock, B, L, n_steps, random, temperature))
            continue
        normal = common.sample_normals(common.mix(seed, 7), range(first, first + B), L, machine.device)
        last = functools.partial(drawn, random=random) if draw_last else most_likely
        net.head.temperature = temperature
        z0 = latent_noise(E, factor, normal)
        if kind == "fmlm":
            rows.append(sample_flow_map(net, clock, z0, n_steps, gamma, lambda: latent_noise(E, factor, normal), last))
        else:
            rows.append(sample_flow(net, clock, z0, n_steps, last))
    net.head.temperature = 1.0
    return torch.cat(rows).cpu().numpy()


def read_texts(path: str, encoding, L: int) -> np.ndarray:
    """Tokens (n, L) of the texts in a .jsonl, in the tokens of the dataset; those of fewer than L are left out, saying so."""
    try:
        rows = [encoding.encode_ordinary(json.loads(line)["text"])[:L] for line in Path(path).read_text().splitlines()]
    except (KeyError, OSError, TypeError, ValueError) as error:
        common.fail(f"{path} is no .jsonl with a text a line ({type(error).__name__}: {error})")
    whole = [row for row in rows if len(row) == L]
    if len(whole) < len(rows):
        print(f"{path}: {len(rows) - len(whole)} of {len(rows)} texts have fewer than {L} tokens and are left out",
              file=sys.stderr)
    if not whole:
        common.fail(f"{path} has no text of {L} tokens")
    return np.array(whole)


# ---------------------------------------------------------------- scorers

def load_scorer(name: str):
    """A function from tokens (n, L) and texts to nats and numbers of tokens, (n,) each."""
    if name.endswith(".pt"):
        checkpoint = storage.load_checkpoint(name, "ar")
        storage.require_same_vocabulary(checkpoint, held_out)
        return functools.partial(score_ours, storage.build_model(checkpoint, machine.device))
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        common.fail("a scorer that is not ours needs transformers; run: pip install transformers (and gguf for a .gguf)")
    file = dict(gguf_file=os.path.basename(name)) if name.endswith(".gguf") else {}
    folder = os.path.dirname(name) if file else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **file)
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file).to(machine.device).eval()
    except Exception as error:  # the package raises whatever it meets on the way
        common.fail(f"scorer {name!r} cannot be loaded ({str(error).splitlines()[0]}); --scorer= for none")
    return functools.partial(score_foreign, tokenizer, network)


@torch.no_grad()
def score_ours(network, tokens: np.ndarray, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    losses = []
    for part in torch.from_numpy(tokens).split(batch_size):
        with machine.autocast():
            losses.append(ar.loss(network, None, machine.put(part), torch.ones(len(part), device=machine.device), None)[1])
    return torch.cat(losses).double().sum(1).cpu().numpy(), np.full(len(tokens), tokens.shape[1])


@torch.no_grad()
def score_foreign(tokenizer, network, tokens: np.ndarray, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """In texts of like length together, padded on the right."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    room = getattr(network.config, "max_position_embeddings", 1024) - 1
    ids = [[start, *tokenizer(text, add_special_tokens=False)["input_ids"][:room]] for text in texts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    losses, counts = np.zeros(len(ids)), np.array([len(row) - 1 for row in ids])
    for at in range(0, len(ids), batch_size):
        rows = [torch.tensor(ids[i]) for i in order[at:at + batch_size]]
        x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(machine.device)  # (B, longest)
        with machine.autocast():
            logits = network(x.clamp_min(0), attention_mask=(x >= 0).long()).logits[:, :-1].float()
        each = F.cross_entropy(logits.transpose(1, 2), x[:, 1:], ignore_index=-1, reduction="none")     # (B, longest - 1)
        losses[order[at:at + batch_size]] = each.double().sum(1).cpu()
    return losses, counts


# ---------------------------------------------------------------- a row of the table

def measured(value, interval) -> dict:
    return dict(value=float(value), low=interval[0], high=interval[1])


def mean(values: np.ndarray) -> dict:
    return measured(values.mean(), metrics.bootstrap(values))


def of_all(statistic, tokens: np.ndarray) -> dict:
    """A statistic of all samples together. Drawing samples twice would repeat n-grams, so instead of a bootstrap: the
    statistic of random halves, whose spread around their mean is that of the whole (delete-half jackknife)."""
    random, value = np.random.default_rng(0), statistic(tokens)
    halves = [statistic(tokens[random.permutation(len(tokens))[:len(tokens) // 2]]) for _ in range(50)]
    return measured(value, (value - 1.96 * np.std(halves), value + 1.96 * np.std(halves)))


def judge(name: str, tokens: np.ndarray, **facts) -> dict:
    """Everything about the tokens (n, L). What depends on their number is measured on as many as there are held-out."""
    texts, equal = [encoding.decode(row) for row in tokens.tolist()], tokens[:len(held_out_tokens)]
    def kl(tokens):
        return metrics.unigram_kl(training_counts, np.bincount(tokens.ravel(), minlength=V))
    copies = metrics.longest_copies(tokens, training_rows)
    row = dict(name=name, **facts, samples=len(tokens), entropy=mean(metrics.sample_entropies(tokens)),
               self_bleu=mean(metrics.self_bleu(equal)), unigram_kl=of_all(kl, equal),
               distinct_2=of_all(lambda t: metrics.distinct_ngrams(t, 2), equal),
               distinct_4=of_all(lambda t: metrics.distinct_ngrams(t, 4), equal),
               rare_256=mean(metrics.rare_shares(tokens, training_counts, 256)),
               rare_2048=mean(metrics.rare_shares(tokens, training_counts, 2048)),
               longest_copy=mean(copies), copied=mean(copies >= tokens.shape[1] // 2), different=metrics.distinct(tokens))
    if dataset_name == "palindromes":
        row["valid"] = mean(metrics.palindromes(tokens))
    for scorer_name, score in scorers.items():
        losses, counts = score(tokens, texts)
        row[f"perplexity {scorer_name}"] = measured(metrics.perplexity(losses, counts), metrics.bootstrap(
            np.stack([losses, counts], 1), metrics.perplexity))
    print("  ".join([f"{name:34.34}", *(f"{key} {row[key]['value']:.3g}" for key in row if isinstance(row[key], dict))]),
          flush=True)
    return row


@torch.no_grad()
def likelihood(checkpoint: dict, net) -> dict | None:
    """Nats of held-out text under the model: per token, and as bits a character and perplexity a token."""
    kind, values = checkpoint["kind"], []
    if kind not in ("ar", "flm", "mdlm", "duo"):
        return None
    clock = storage.build_clock(net.config, checkpoint["clock_embedding_share"], machine.device)
    draws, E_white = 1 if kind == "ar" else 32, whiten(net.embed.weight) if kind == "flm" else None
    for first in range(0, len(held_out_tokens), batch_size):
        y = machine.put(held_out_tokens[first:first + batch_size])
        random = common.generator(seed, 10, first, device=machine.device)
        with machine.autocast():
            if kind == "flm":
                values.append(likelihood_bound(net, clock, y, random, draws, E_white=E_white).nats)
                continue
            tau = stratified(draws * len(y), random).view(draws, -1)
            loss = importlib.import_module(f"baselines.{kind}").loss
            values.append(sum(loss(net, clock, y, times.float(), random)[1].double().sum(1) for times in tau) / draws)
    nats = torch.cat(values).double().cpu().numpy()                             # (n,)
    characters = np.array([len(encoding.decode(row)) for row in held_out_tokens.tolist()])
    L = held_out_tokens.shape[1]
    return dict(exact=kind == "ar", nats_per_token=mean(nats / L), bits_per_character=measured(
        bits_per_character(nats.sum(), characters.sum()), metrics.bootstrap(
            np.stack([nats, characters], 1), lambda n, c: bits_per_character(n.sum(-1), c.sum(-1)))),
        perplexity=measured(math.exp(nats.mean() / L), np.exp(metrics.bootstrap(nats / L))))


# ---------------------------------------------------------------- the program

sources = source.split(",")
checkpoints = {name: storage.load_checkpoint(name) for name in sources if name.endswith(".pt")}
first = next(iter(checkpoints.values()), None)
L = first["model_config"]["block_size"] if first else 0
held_out, training = (Data(dataset, split, L or 64, seed) for split in ("val", "train"))
for checkpoint in checkpoints.values():
    storage.require_same_vocabulary(checkpoint, held_out)
L, V, dataset_name = held_out.L, held_out.meta["vocab_size"], held_out.path.parent.name
encoding = storage.tokenizer.from_dict(held_out.tokenizer)
held_out_tokens = held_out.rows(0, min(held_out.n_rows, num_samples or held_out.n_rows))
packed = held_out.meta["row_length"]
training_rows = np.asarray(training.tokens).reshape(-1, packed) if packed else np.asarray(training.tokens)
training_counts = np.bincount(training_rows.ravel(), minlength=V)
wanted, sweep = common.parse_steps(steps), [float(word) for word in temperatures.split(",")]
scorers = {os.path.basename(name): load_scorer(name) for name in scorer.split(",") if name} if num_samples else {}

rows = [judge("held-out text", held_out_tokens)] if num_samples else []
likelihoods, matched = {}, {}
for name in sources:
    if name not in checkpoints:
        rows.append(judge(name, read_texts(name, encoding, L)))
        continue
    checkpoint = checkpoints[name]
    net = storage.build_model(checkpoint, machine.device)
    for n_steps in wanted if num_samples else ():
        runs = []
        for temperature in sweep:
            with machine.autocast() if checkpoint["kind"] != "ar" else contextlib.nullcontext():
                tokens = texts_of(checkpoint, net, n_steps, temperature)
            runs.append(judge(f"{checkpoint['kind']} {n_steps} steps, temperature {temperature:g}", tokens, kind=checkpoint["kind"], steps=n_steps, temperature=temperature))
        rows += runs
        for key in (f"perplexity {scorer_name}" for scorer_name in scorers):
            at = metrics.entropy_matched([r["entropy"]["value"] for r in runs], [math.log(r[key]["value"]) for r in runs],
                                         rows[0]["entropy"]["value"])
            matched[f"{checkpoint['kind']} {n_steps} {key}"] = None if at is None else math.exp(at)
            print(f"  {key} at the entropy of held-out text: {'not reached' if at is None else f'{math.exp(at):.4g}'}")
    if bound:
        found = likelihood(checkpoint, net)
        if found:
            likelihoods[checkpoint["kind"]] = found
            print(f"{name}: held-out text has {'' if found['exact'] else 'at most '}{found['nats_per_token']['value']:.3f} "
                  f"nats a token, {found['bits_per_character']['value']:.3f} bits a character, perplexity "
                  f"{found['perplexity']['value']:.4g}")
if out:
    kept = {key: value for key, value in settings.items() if key not in (*storage.PLACES, "source", "scorer", "out")}
    record = dict(settings=kept, rows=rows, matched=matched, likelihoods=likelihoods)
    storage.replace_file(Path(out), lambda file: file.write(json.dumps(record, indent=1).encode()))
    print(f"wrote {out}")
