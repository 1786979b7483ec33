"""The authors' released checkpoints as ours: sample.py --init_from=owt_fmlm.ckpt, and as the
teacher of distill.py.

PyTorch Lightning wrote their files. `state_dict` holds the trained weights under their network's
names (with `_orig_mod.` in them where it was compiled), `ema.shadow_params` the moving average, a
list in the same order, which they evaluate and which is read here. The shapes tell all about the
network but the soft caps, which all of theirs have, and the length; there is no vocabulary.
"""

import collections
import os
import pickle
import re
from dataclasses import asdict
from types import SimpleNamespace

import torch

from lib.settings import fail
from model import FlowTransformer, ModelConfig

RENAMED = {  # part of their name: its name in model.py; longer parts come first
    "vocab_embed.embedding": "embed.weight",
    "sigma_map_prime.mlp.0": "time_t.fc1", "sigma_map_prime.mlp.2": "time_t.fc2",
    "sigma_map.mlp.0": "time_s.fc1", "sigma_map.mlp.2": "time_s.fc2",
    "attn_qkv": "qkv", "mlp.0": "mlp_in", "mlp.2": "mlp_out",
    "output_layer.norm_final": "norm_out", "output_layer.linear": "head",
    "output_layer.adaLN_modulation": "modulation_out", "adaLN_modulation": "modulation"}

LENGTHS = {50257: 1024, 30522: 128}  # tokens in a text by V: OpenWebText, LM1B


def our_name(theirs: str) -> str | None:
    """"backbone._orig_mod.blocks.0.attn_qkv.weight" -> "blocks.0.qkv.weight"; None for names that
    are not the network's."""
    name = theirs.replace("_orig_mod.", "")
    for part, ours in RENAMED.items():
        name = name.replace(part, ours)
    return name.removeprefix("backbone.") if name.startswith("backbone.") else None


def translate(file: dict) -> dict:
    """A released file as a checkpoint of train.py or distill.py, without what only resuming needs.
    `tokenizer` and `vocabulary` are None; block_size is 0 where V does not tell it. Raises
    ValueError when the file does not hold the authors' network and its moving average, KeyError
    when it does not come near."""
    weights = {our_name(name): tensor for name, tensor in file["state_dict"].items()
               if our_name(name)}
    half_head = len(weights.pop("rotary_emb.inv_freq"))  # a buffer, the only trace of n_head
    if not file.get("ema"):
        raise ValueError("it has no moving average")
    average = file["ema"]["shadow_params"]
    if not all(tensor.is_floating_point() for tensor in average):
        raise ValueError("its moving average does not hold floating-point numbers")
    if [tensor.shape for tensor in average] != [tensor.shape for tensor in weights.values()]:
        raise ValueError("its moving average does not have the shapes of its network")
    V, d = weights["embed.weight"].shape
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    config = ModelConfig(
        V, LENGTHS.get(V, 0), len(blocks), d // (2 * half_head), d,
        len(weights["time_s.fc1.bias"]), flow_map="time_t.fc1.bias" in weights,
        learned_positions=False, time_scale=1.0, attention_softcap=50.0, logit_softcap=30.0)
    with torch.device("meta"):
        ours = {name: tensor.shape for name, tensor in FlowTransformer(config).state_dict().items()}
    theirs = {name: tensor.shape for name, tensor in weights.items()}
    wrong = sorted(ours.items() ^ theirs.items())
    if wrong:
        raise ValueError(f"{wrong[0][0]} does not fit the authors' network")
    ema = {name: tensor.float() for name, tensor in zip(weights, average)}
    return dict(format="flm-1", kind="fmlm" if config.flow_map else "flm",
                model_config=asdict(config), ema=ema, clock_embedding_share=0.0,
                settings={}, step=file.get("global_step", 0), tokenizer=None, vocabulary=None)


def gpt2_encoding():
    """GPT-2's byte-pair encoding (V = 50,257). Exits when it cannot be downloaded."""
    import tiktoken
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        fail(f"cannot download GPT-2's vocabulary ({type(error).__name__}); without a network, set "
             f"TIKTOKEN_CACHE_DIR to a folder where tiktoken has put it before")


def read_vocabulary(path: str):
    """A tokenizers.Tokenizer that decodes the file's ids: vocab.txt of a BERT (one token a line) or
    a tokenizer.json. Exits when the file or the package is missing."""
    try:
        from tokenizers import Tokenizer, decoders, models
    except ImportError:
        fail("--vocabulary needs the package tokenizers; run: pip install tokenizers")
    if not os.path.isfile(path):
        fail(f"no vocabulary {path}; bert-base-uncased has its as vocab.txt")
    try:
        if path.endswith(".json"):
            return Tokenizer.from_file(path)
        encoding = Tokenizer(models.WordPiece.from_file(path, unk_token="[UNK]"))
    except Exception as error:  # the package raises nothing narrower
        fail(f"{path} is no vocabulary ({error})")
    encoding.decoder = decoders.WordPiece(cleanup=True)
    return encoding

# ---------------------------------------------------------------- files with objects in them

class Placeholder(dict):
    """Stands for an object of a class that is not PyTorch's. Takes what a pickle gives it, and does
    nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __setstate__(self, state):
        pass

    def append(self, item):
        pass

    extend = append
    __hash__ = object.__hash__


class OnlyTorch(pickle.Unpickler):
    """Reads a pickle in which Lightning put the run's configuration, tokenizer and callbacks beside
    the tensors. Those are left out, so none of their packages has to be installed. Not proof
    against a malicious file."""

    def find_class(self, module: str, name: str):
        if re.fullmatch(r"torch|torch\._utils|torch\.storage|torch\.nn\.parameter", module):
            return super().find_class(module, name)
        return collections.OrderedDict if name == "OrderedDict" else Placeholder


# What torch.load takes for a pickle module.
only_torch = SimpleNamespace(__name__="only_torch", Unpickler=OnlyTorch)
