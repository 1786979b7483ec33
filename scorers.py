"""Language models that read texts: how surprised they are is what generative perplexity is made of. For evaluate.py.

A scorer is a function of tokens (n, L) and the same as texts, n of them: the nats that each costs and the number of tokens
that it is for the scorer, (n,) each. A model of ours reads the tokens as they are. Any other sees the decoded text in its
own tokens, after its begin-of-text token, so that the first token is scored too; what does not fit its context is cut off
on the right; an end-of-text token inside a text is scored like any other.
"""

import functools
import os
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

import storage
from baselines import ar
from common import Machine, fail
from data.loader import Data

TOKENS = 8192  # read at a time, so that logits stay small


def load(name: str, data: Data, machine: Machine) -> Callable[[np.ndarray, list[str]], tuple[np.ndarray, np.ndarray]]:
    """The scorer of a checkpoint by train.py --method=ar (.pt), for texts in the tokens and of the length of `data`; or of
    what transformers loads: a name, a folder or a .gguf. Exits where it does not fit or cannot be loaded."""
    if name.endswith(".pt"):
        checkpoint = storage.load_checkpoint(name, "ar")
        storage.require_same_vocabulary(checkpoint, data)
        if checkpoint["model_config"]["block_size"] < data.L:
            fail(f"{name} reads {checkpoint['model_config']['block_size']} tokens, the texts have {data.L}")
        return functools.partial(score_ours, storage.build_model(checkpoint, machine.device), machine)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        fail("a scorer that is not ours needs transformers; run: pip install transformers (and gguf for a .gguf); "
             "--scorer= for none")
    file = dict(gguf_file=os.path.basename(name)) if name.endswith(".gguf") else {}
    folder = os.path.dirname(name) or "." if file else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **file)
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file).to(machine.device).eval()
    except Exception as error:  # the package raises whatever it meets on the way
        fail(f"scorer {name!r} cannot be loaded ({type(error).__name__}: {error}); --scorer= for none")
    return functools.partial(score_foreign, tokenizer, network, machine)


@torch.no_grad()
def score_ours(network, machine: Machine, tokens: np.ndarray, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    losses = []
    for part in torch.from_numpy(tokens).split(max(1, TOKENS // tokens.shape[1])):
        with machine.autocast():
            losses.append(ar.loss(network, None, machine.put(part), torch.ones(len(part), device=machine.device), None)[1])
    return torch.cat(losses).cpu().double().sum(1).numpy(), np.full(len(tokens), tokens.shape[1])


@torch.no_grad()
def score_foreign(tokenizer, network, machine: Machine, tokens: np.ndarray, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """In texts of like length together, padded on the right."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    room = getattr(network.config, "max_position_embeddings", 1024) - 1
    ids = [[start, *tokenizer(text, add_special_tokens=False)["input_ids"][:room]] for text in texts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    losses, counts = np.zeros(len(ids)), np.array([len(row) - 1 for row in ids])
    at = 0
    while at < len(ids):
        n = max(1, TOKENS // len(ids[order[at]]))                               # texts
        rows = [torch.tensor(ids[i]) for i in order[at:at + n]]
        x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(machine.device)  # (B, longest)
        with machine.autocast():
            logits = network(x.clamp_min(0), attention_mask=(x >= 0).long()).logits[:, :-1].float()
        each = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), ignore_index=-1, reduction="none")
        losses[order[at:at + n]] = each.view(len(rows), -1).cpu().double().sum(1)
        at += n
    return losses, counts
