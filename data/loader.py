"""The reader of prepared sets: rows of tokens in an order that is a function of the seed, for train.py and distill.py."""

import json
import os
from pathlib import Path

import numpy as np

from common import fail
from data import tokenizer


HERE = Path(__file__).parent


def folder_of(dataset: str) -> Path:
    """data/<dataset>; or else a folder, where one is named: a path, or a name that is not prepared in data/."""
    here = HERE / dataset
    elsewhere = os.path.isdir(dataset) and (os.sep in dataset or not os.path.isfile(here / "meta.json"))
    return Path(dataset) if elsewhere else here


class Data:
    """data/<dataset>/<split>.bin as rows of L tokens, in an order that is a function of the seed.

    Sample number n of a run is row n mod N of epoch n // N. Each epoch shuffles the rows, and, where the file is one
    continuous stream, also moves the cuts between them; a packed file (meta.json has its row_length) keeps its rows.
    Exits with one line when the folder or a file is missing, not what prepare.py wrote, or does not fit L.
    """

    def __init__(self, dataset: str, split: str, block_size: int, seed: int):
        folder = folder_of(dataset)
        path = folder / f"{split}.bin"
        if not os.path.isfile(folder / "meta.json") or not os.path.isfile(path):  # Path's raise on too long a name
            sets = sorted(script.parent.name for script in HERE.glob("*/prepare.py"))
            fail(f"no data in {folder}; " + (f"run: python data/{dataset}/prepare.py" if dataset in sets else
                                             f"the sets that can be prepared are {', '.join(sets)}"))
        self.path, self.L, self.seed, self.epoch = path, block_size, seed, -1
        try:
            self.meta = json.loads((folder / "meta.json").read_text())
            self.tokenizer = json.loads((folder / "tokenizer.json").read_text())
            size, packed = np.dtype(self.meta["dtype"]).itemsize, self.meta["row_length"]
            n_tokens = self.meta[f"{split}_tokens"]
            if not all(type(n) is int for n in (n_tokens, packed or 0, self.meta["vocab_size"])):
                raise TypeError("meta.json has something else for a number")
            if tokenizer.identity(self.tokenizer) != self.meta["tokenizer"]:
                raise ValueError("tokenizer.json is not the one of meta.json")
        except (KeyError, OSError, TypeError, ValueError) as error:
            fail(f"{folder} is damaged ({type(error).__name__}: {error}); run its prepare.py with --force")
        found = path.stat().st_size
        if found == 0 or found % size or found != n_tokens * size or packed and n_tokens % packed:
            fail(f"{path} has {found:,} bytes where {n_tokens:,} tokens of {size} bytes were written; run its prepare.py "
                 f"with --force")
        if packed and packed != block_size:
            fail(f"{path} holds rows of {packed} tokens; set --block_size={packed}")
        if n_tokens < block_size:
            fail(f"{path} has {n_tokens:,} tokens, fewer than block_size={block_size}")
        self.tokens = np.memmap(path, np.dtype(self.meta["dtype"]), mode="r")
        self.n_rows = len(self.tokens) // block_size if packed else max(1, len(self.tokens) // block_size - 1)
        spare = len(self.tokens) - self.n_rows * block_size
        self.shifts = 1 if packed else min(block_size, spare + 1)  # how many places the first cut can be at

    @staticmethod
    def row_length(dataset: str) -> int:
        """Tokens in a row of a packed set; 0 for a continuous stream, and for what is no set."""
        try:
            return json.loads((folder_of(dataset) / "meta.json").read_text())["row_length"] or 0
        except (KeyError, OSError, TypeError, ValueError):
            return 0  # the constructor says what is wrong

    def rows(self, first: int, count: int) -> np.ndarray:
        """Samples first .. first + count - 1 as (count, L) int64 token ids."""
        return np.stack([self.row(n) for n in range(first, first + count)])

    def row(self, n: int) -> np.ndarray:
        epoch, n = divmod(n, self.n_rows)
        if epoch != self.epoch:
            random = np.random.default_rng([self.seed, epoch])
            self.epoch, self.shift, self.order = epoch, random.integers(self.shifts), random.permutation(self.n_rows)
        start = self.shift + self.order[n] * self.L
        row = self.tokens[start:start + self.L].astype(np.int64)
        if row.max() >= self.meta["vocab_size"]:
            fail(f"{self.path} holds token {row.max()}, past its vocabulary of {self.meta['vocab_size']}")
        return row
