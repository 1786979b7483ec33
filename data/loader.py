"""Reads prepared sets and their tokenizers. Writes nothing; corpus.py describes the files."""

import base64
import binascii
import hashlib
import importlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tiktoken

from lib.settings import fail

HERE = Path(__file__).parent
WORD_PIECES = "WordPiece"  # stands for pat_str in the tokenizer.json of a BERT's vocabulary


def folder_of(dataset: str) -> Path:
    """data/<dataset>; or a folder elsewhere: a path, or a name that is not prepared in data/."""
    here = HERE / dataset
    prepared = os.path.isfile(here / "meta.json")  # Path.is_file raises on too long a name
    elsewhere = os.path.isdir(dataset) and (os.sep in dataset or not prepared)
    return Path(dataset) if elsewhere else here


class Data:
    """data/<dataset>/<split>.bin as rows of L tokens, in an order that is a function of the seed.

    Sample n of a run is row n mod N of epoch n // N. Each epoch shuffles the rows. In a continuous
    stream it also moves the cuts between them; a packed file (row_length in meta.json) keeps its
    rows. Exits when the set is missing or damaged, or does not fit L.
    """

    def __init__(self, dataset: str, split: str, block_size: int, seed: int):
        folder = folder_of(dataset)
        path = folder / f"{split}.bin"
        if not os.path.isfile(folder / "meta.json") or not os.path.isfile(path):
            sets = sorted(script.parent.name for script in HERE.glob("*/prepare.py"))
            fail(f"no data in {folder}; " + (
                f"run: python data/{dataset}/prepare.py" if dataset in sets
                else f"the sets that can be prepared are {', '.join(sets)}"))
        self.path, self.L, self.seed, self.epoch = path, block_size, seed, -1
        try:
            self.meta = json.loads((folder / "meta.json").read_text())
            self.tokenizer = json.loads((folder / "tokenizer.json").read_text())
            dtype, packed = np.dtype(self.meta["dtype"]), self.meta["row_length"]
            n_tokens = self.meta[f"{split}_tokens"]
            if not all(type(n) is int for n in (n_tokens, packed or 0, self.meta["vocab_size"])):
                raise TypeError("meta.json has something else for a number")
            if identity(self.tokenizer) != self.meta["tokenizer"]:
                raise ValueError("tokenizer.json is not the one of meta.json")
        except (KeyError, OSError, TypeError, ValueError) as error:
            fail(f"{folder} is damaged ({type(error).__name__}: {error}); "
                 f"run its prepare.py with --force")
        found = path.stat().st_size
        if found == 0 or found != n_tokens * dtype.itemsize or packed and n_tokens % packed:
            fail(f"{path} has {found:,} bytes where {n_tokens:,} tokens of {dtype.itemsize} bytes "
                 f"were written; run its prepare.py with --force")
        if packed and packed != block_size:
            fail(f"{path} holds rows of {packed} tokens; set --block_size={packed}")
        if n_tokens < block_size:
            fail(f"{path} has {n_tokens:,} tokens, fewer than block_size={block_size}")
        self.tokens = np.memmap(path, dtype, mode="r")
        self.n_rows = n_tokens // block_size if packed else max(1, n_tokens // block_size - 1)
        spare = n_tokens - self.n_rows * block_size
        self.shifts = 1 if packed else min(block_size, spare + 1)  # places of the first cut

    @staticmethod
    def row_length(dataset: str) -> int:
        """Tokens in a row of a packed set; 0 for a continuous stream, and for what is no set."""
        try:
            return json.loads((folder_of(dataset) / "meta.json").read_text())["row_length"] or 0
        except (KeyError, OSError, TypeError, ValueError):
            return 0  # the constructor says what is wrong

    @property
    def layout(self) -> str:
        """"stream": cut anywhere; "packed": documents one after another, an end of text in front of
        each row; "lines": a text a row."""
        end = self.tokenizer["special_tokens"].get("<|endoftext|>")
        in_rows = "packed" if end is not None and self.tokens[0] == end else "lines"
        return in_rows if self.meta["row_length"] else "stream"

    def frequency(self, most: int = 10_000_000) -> np.ndarray:
        """How often each token stands among the first `most`, as shares (V,) in float32."""
        counts = np.bincount(self.tokens[:most], minlength=self.meta["vocab_size"])
        return (counts / counts.sum()).astype(np.float32)

    def rows(self, first: int, count: int) -> np.ndarray:
        """Samples first .. first + count - 1 as (count, L) int64 token ids."""
        return np.stack([self.row(n) for n in range(first, first + count)])

    def row(self, n: int) -> np.ndarray:
        epoch, n = divmod(n, self.n_rows)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.epoch, self.shift = epoch, rng.integers(self.shifts)
            self.order = rng.permutation(self.n_rows)
        start = self.shift + self.order[n] * self.L
        row = self.tokens[start:start + self.L].astype(np.int64)
        if row.max() >= self.meta["vocab_size"]:
            fail(f"{self.path} holds token {row.max()}, past its vocabulary of "
                 f"{self.meta['vocab_size']}")
        return row


class Encoding(tiktoken.Encoding):
    """Decodes ids past its tokens to nothing: a network may have one more, for padding."""

    def decode(self, tokens: list[int], errors: str = "replace") -> str:
        return super().decode([i for i in tokens if i < self.n_vocab], errors)


class WordPieces:
    """The vocabulary of a BERT, by id: words, and pieces that go on with a word, such as "##s"."""

    def __init__(self, name: str, words: list[str]):
        self.name, self.words, self.n_vocab = name, words, len(words)

    def decode(self, ids: list[int]) -> str:
        """Pieces are joined. No space stays before . , ? ! or the end of a contraction, or around
        an apostrophe."""
        text = " ".join(self.words[i] for i in ids if i < self.n_vocab).replace(" ##", "")
        text = re.sub(r" ([.,?!])", r"\1", text).replace(" ' ", "'")
        return re.sub(r" (n't|'(?:m|s|ve|re))", r"\1", text)


def tokenizer_from_dict(d: dict) -> Encoding | WordPieces:
    """The encoding that tokenizer.to_dict described. Raises ValueError, in one line, otherwise."""
    try:
        name, pattern, special = d["name"], d["pat_str"], dict(d["special_tokens"])
        tokens = [base64.b64decode(token, validate=True) for token in d["tokens"]]
    except KeyError as error:
        raise ValueError(f"tokenizer: no entry {error}") from None
    except (TypeError, ValueError, binascii.Error) as error:
        raise ValueError(f"tokenizer: malformed ({error})") from None
    if not (isinstance(name, str) and isinstance(pattern, str)):
        raise ValueError("tokenizer: 'name' and 'pat_str' must be strings")
    # tiktoken would panic at a repeated or an empty token, past any `except Exception`.
    if not tokens or len(set(tokens)) != len(tokens) or b"" in tokens:
        raise ValueError("tokenizer: 'tokens' must be distinct and not empty")
    n, ids = len(tokens), list(special.values())
    if any(type(i) is not int for i in ids) or sorted(ids) != list(range(n, n + len(ids))):
        raise ValueError(f"tokenizer: special tokens must have the ids from {n} on, without a gap")
    if pattern == WORD_PIECES:
        return WordPieces(name, [token.decode() for token in tokens])
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def text_of(encoding: Encoding | WordPieces, row: list[int], told: int = 0) -> str:
    """The text of a row of ids. It ends at the first <|endoftext|> after the first `told` ids,
    where the last that the network was told stands. But a row that begins with an <|endoftext|> is
    packed: its documents are joined by a blank line."""
    if (whole := encoding.decode(row)).startswith("<|endoftext|>"):
        return "\n\n".join(filter(None, whole.split("<|endoftext|>")))
    return encoding.decode(row[:told]) + encoding.decode(row[told:]).split("<|endoftext|>")[0]


def find_check(name: str | None) -> Callable[[str], str | None] | None:
    """`check` of the module that a set or a checkpoint names: what is wrong with a text, or None.
    None without a name, and for anything but a module of data/ with a `check`."""
    try:
        return importlib.import_module(name).check if name.startswith("data.") else None
    except (AttributeError, ImportError, TypeError, ValueError):
        return None


def identity(d: dict) -> str:
    """12 hex digits of all that decides the map from ids to text in `d`, as tokenizer.to_dict gives
    it; the name does not count. Runs compare it, since a model trains without complaint on the ids
    of another vocabulary."""
    decisive = [d["tokens"], sorted(d["special_tokens"].items()), d["pat_str"]]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:12]
