"""The authors' released checkpoints as ours: for sample.py, as the teacher of distill.py, and for
eval/evaluate.py.

PyTorch Lightning wrote their .ckpt files. `state_dict` holds the trained weights under their
network's names (with `_orig_mod.` in them where it was compiled), and those of other modules, which
are left out. `ema.shadow_params` is the moving average, a list in the same order, which they
evaluate and which is read here. A .safetensors file, their export to the Hugging Face hub
(hf:owner/name), holds one set of weights, under names with or without `backbone.`.

Three facts are not in the shapes. All of their networks have the same soft caps. The number of
heads follows from the rotary buffer, else from a config.json (`told_beside`), else from --n_head.
The length is the one of config.json, else the published one, else --block_size. There is no
vocabulary.
"""

import collections
import json
import os
import pickle
import re
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch

from data.loader import WORD_PIECES, Encoding, WordPieces
from data.tokenizer import read_word_pieces
from lib.settings import fail
from model import FlowTransformer, ModelConfig

RENAMED = {  # part of their name: its name in model.py; longer parts come first
    "vocab_embed.embedding": "embed.weight",
    "sigma_map_prime.mlp.0": "time_t.fc1", "sigma_map_prime.mlp.2": "time_t.fc2",
    "sigma_map.mlp.0": "time_s.fc1", "sigma_map.mlp.2": "time_s.fc2",
    "attn_qkv": "qkv", "mlp.0": "mlp_in", "mlp.2": "mlp_out",
    "output_layer.norm_final": "norm_out", "output_layer.linear": "head",
    "output_layer.adaLN_modulation": "modulation_out", "adaLN_modulation": "modulation"}

MODULES = "vocab_embed", "sigma_map", "sigma_map_prime", "rotary_emb", "blocks", "output_layer"
ROTARY = "rotary_emb.inv_freq"  # a buffer, of one frequency for two channels of a head

# OpenWebText's V, without and with the [PAD] that their tokenizer adds to GPT-2's tokens, and
# LM1B's, which are bert-base-uncased's.
GPT2, GPT2_PADDED, BERT = 50257, 50258, 30522
LENGTHS = {GPT2: 1024, GPT2_PADDED: 1024, BERT: 128}  # tokens in a text

# ------------------------------------------------------------------------------ weights

def module_of(theirs: str) -> str:
    return theirs.removeprefix("backbone.").split(".")[0]


def our_name(theirs: str) -> str:
    """"backbone.blocks.0.attn_qkv.weight" -> "blocks.0.qkv.weight"."""
    for part, ours in RENAMED.items():
        theirs = theirs.replace(part, ours)
    return theirs.removeprefix("backbone.")


def translate(file: dict, path: str, n_head: int = 0) -> dict:
    """A released file, read from `path`, as a checkpoint of train.py or distill.py, without what
    only resuming needs. `tokenizer` and `vocabulary` are None; block_size is 0 where nothing tells
    it. Names other modules that it leaves out in one line. Raises ValueError when the file does not
    hold the authors' network and its moving average, KeyError when an entry is missing;
    exits when nothing tells the heads."""
    theirs = {name.replace("_orig_mod.", ""): tensor for name, tensor in file["state_dict"].items()}
    backbone = {name: tensor for name, tensor in theirs.items()
                if name.startswith("backbone.")} or theirs
    network = {name: tensor for name, tensor in backbone.items() if module_of(name) in MODULES}
    shapes = {our_name(name): tensor.shape for name, tensor in network.items()}
    if "embed.weight" not in shapes:
        raise ValueError("it has no vocab_embed.embedding")
    if not file.get("ema"):
        raise ValueError("it has no moving average")
    ema = average_of(file["ema"]["shadow_params"], (theirs, backbone, network))
    V, d = ema["embed.weight"].shape
    blocks = {name.split(".")[1] for name in ema if name.startswith("blocks.")}
    heads, length = told_beside(path)
    if ROTARY in shapes:
        heads = d // (2 * shapes[ROTARY][0])
    if not (heads or n_head):
        fail(f"{path} does not say how many heads its attention has; give --n_head (the published "
             f"networks have 12)")
    if heads and n_head not in (0, heads):
        fail(f"n_head={n_head}: the network of {path} has {heads} heads; leave it at 0")
    config = ModelConfig(
        V, length or LENGTHS.get(V, 0), len(blocks), heads or n_head, d,
        len(ema["time_s.fc1.bias"]), flow_map="time_t.fc1.bias" in ema,
        learned_positions=False, time_scale=1.0, attention_softcap=50.0, logit_softcap=30.0)
    with torch.device("meta"):
        ours = {name: tensor.shape for name, tensor in FlowTransformer(config).state_dict().items()}
    wrong = sorted(ours.items() ^ {name: tensor.shape for name, tensor in ema.items()}.items())
    if wrong:
        raise ValueError(f"{wrong[0][0]} does not fit the authors' network")
    others = {module_of(name) for name in theirs} - set(MODULES)
    if others and os.environ.get("RANK", "0") == "0":  # of several processes one says it
        print(f"{path}: left out what is not the network's: {', '.join(sorted(others))}",
              file=sys.stderr)
    return dict(format="flm-1", kind="fmlm" if config.flow_map else "flm",
                model_config=asdict(config), ema=ema, clock_embedding_share=0.0,
                settings={}, step=file.get("global_step", 0), tokenizer=None, vocabulary=None)


def average_of(average: list, modules: tuple[dict, ...]) -> dict:
    """The network's part of the moving average, in float32, under our names. The average covers all
    modules of the file, the backbone with its others, or the network alone. The first of these
    whose shapes stand side by side in it, at one place, tells which tensor is which."""
    if not all(tensor.is_floating_point() for tensor in average):
        raise ValueError("its moving average does not hold floating-point numbers")
    found = [tensor.shape for tensor in average]
    for weights in modules:
        shapes = {name: tensor.shape for name, tensor in weights.items()
                  if not name.endswith("inv_freq")}
        places = [i for i in range(len(found) - len(shapes) + 1)
                  if found[i:i + len(shapes)] == list(shapes.values())]
        if len(places) == 1:
            named = zip(shapes, average[places[0]:])
            return {our_name(name): tensor.float() for name, tensor in named
                    if module_of(name) in MODULES}
    raise ValueError("its moving average does not have the shapes of its network")


def told_beside(path: str) -> tuple[int, int]:
    """The heads and the length in a config.json, at any depth of it; 0 if not there. It lies beside
    the file, or above it in a repository that `fetch` got."""
    folders = list(Path(path).parents[:3])
    fetched = len(folders) == 3 and folders[2].name == "snapshots"  # hub/../snapshots/revision/..
    places = (folder / "config.json" for folder in folders[:1 + fetched])
    config = next(filter(Path.is_file, places), None)
    if not config:
        return 0, 0
    try:
        parts = [dict(json.loads(config.read_text(encoding="utf-8")))]
    except (OSError, TypeError, ValueError):  # damaged, so it tells nothing
        return 0, 0
    for part in parts:  # it grows
        parts += [value for value in part.values() if isinstance(value, dict)]
    return tuple(next((part[key] for part in parts for key in keys
                       if type(part.get(key)) is int and part[key] > 0), 0)
                 for keys in (("n_heads", "n_head", "num_heads", "num_attention_heads"),
                              ("length", "model_length", "block_size", "max_position_embeddings")))


def read_export(path: str) -> dict:
    """A .safetensors file as if Lightning had written it: its weights are the average. Exits when
    the package is missing, raises what that raises for another file."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        fail(f"{path} needs the package safetensors; run: pip install safetensors")
    weights = {name: tensor for name, tensor in load_file(path).items()
               if tensor.is_floating_point()}
    average = [tensor for name, tensor in weights.items() if not name.endswith("inv_freq")]
    return {"state_dict": weights, "ema": {"shadow_params": average}}


def fetch(name: str) -> str:
    """Where the .safetensors file of hf:owner/name lies, with its config.json beside it: fetched
    from the Hugging Face hub once, then cached. Exits when it cannot be had."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        fail(f"{name} needs the package huggingface_hub; run: pip install huggingface_hub")
    try:
        folder = snapshot_download(name.removeprefix("hf:"),
                                   allow_patterns=["*.safetensors", "*config.json"])
    except Exception as error:  # the package raises many kinds
        fail(f"cannot fetch {name} from the Hugging Face hub ({type(error).__name__}); check the "
             f"name, or give the path of a copy, with its config.json beside it")
    files = list(Path(folder).rglob("*.safetensors"))
    if len(files) != 1:
        fail(f"{name} has {len(files)} .safetensors files, not one; download what you want and "
             f"give its path")
    return str(files[0])

# ------------------------------------------------------------------------------ vocabularies

def find_tokenizer(V: int, vocabulary: str):
    """What decodes the V tokens of a released network: GPT-2's encoding, or the file `vocabulary`.
    The padding of a network of 50,258 is decoded to nothing."""
    known = GPT2 if V == GPT2_PADDED else V
    if vocabulary:
        encoding = read_vocabulary(vocabulary, known)
        if encoding.n_vocab not in (known, V):
            fail(f"{vocabulary} has {encoding.n_vocab} tokens, the checkpoint {V}")
        return encoding
    if known != GPT2:
        fail(f"the checkpoint does not hold its {V} tokens; give --vocabulary=vocab.txt (for LM1B "
             f"the one of bert-base-uncased)")
    gpt2 = gpt2_encoding()
    return Encoding("gpt2", pat_str=gpt2._pat_str, mergeable_ranks=gpt2._mergeable_ranks,
                    special_tokens=gpt2._special_tokens)


def may_be_of(V: int, vocab_size: int, tokenizer: dict) -> bool:
    """Whether a released network of V tokens may read a set: the numbers of tokens are equal, but
    for padding, and those of the published networks are of the right kind."""
    V = GPT2 if V == GPT2_PADDED else V
    return V == vocab_size and not (V == GPT2 and tokenizer["name"] != "gpt2") and not (
        V == BERT and tokenizer["pat_str"] != WORD_PIECES)


def gpt2_encoding():
    """GPT-2's byte-pair encoding (V = 50,257). Exits when it cannot be downloaded."""
    import tiktoken
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        fail(f"cannot download GPT-2's vocabulary ({type(error).__name__}); without a network, set "
             f"TIKTOKEN_CACHE_DIR to a folder where tiktoken has put it before")


class FromFile:
    """Decodes by a tokenizer.json. Special tokens stay in the text, since they say where it ends.
    Ids from n on are padding."""

    def __init__(self, tokenizer, n: int):
        self.tokenizer, self.n, self.n_vocab = tokenizer, n, tokenizer.get_vocab_size()

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode([i for i in ids if i < self.n], skip_special_tokens=False)


def read_vocabulary(path: str, n: int) -> WordPieces | FromFile:
    """What decodes a file's ids: those of vocab.txt of a BERT (one token a line), or of a
    tokenizer.json, by the package tokenizers; ids from n on to nothing. Word pieces are read alike
    from both. Exits when the file or the package is missing."""
    if not os.path.isfile(path):
        fail(f"no vocabulary {path}; bert-base-uncased has its as vocab.txt")
    if not path.endswith(".json"):
        return read_word_pieces(path)
    try:
        from tokenizers import Tokenizer
    except ImportError:
        fail("a tokenizer.json needs the package tokenizers; run: pip install tokenizers")
    try:
        found = Tokenizer.from_file(path)
    except Exception as error:  # the package raises nothing narrower
        fail(f"{path} is no vocabulary ({error})")
    if type(found.model).__name__ != "WordPiece":
        return FromFile(found, n)
    return WordPieces("wordpiece", [found.id_to_token(i) for i in range(found.get_vocab_size())])

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
