"""The reader of prepared sets: rows of tokens in an order that is a function of the seed, for train.py and distill.py."""

import json
from pathlib import Path

import numpy as np

from common import fail


class Data:
    """data/<dataset>/<split>.bin as rows of L tokens, in an order that is a function of the seed.

    Sample number n of a run is row n mod N of epoch n // N. Each epoch shuffles the rows, and, where the file is one
    continuous stream, also moves the cuts between them; a packed file (meta.json has its row_length) keeps its rows.
    Exits with one line when the folder or a file is missing or does not fit L.
    """

    def __init__(self, dataset: str, split: str, block_size: int, seed: int):
        folder = Path(__file__).parent / dataset if not Path(dataset).is_dir() else Path(dataset)
        path = folder / f"{split}.bin"
        if not (folder / "meta.json").is_file() or not path.is_file():
            fail(f"no data in {folder}; run: python data/{dataset}/prepare.py")
        self.meta = json.loads((folder / "meta.json").read_text())
        self.tokenizer = json.loads((folder / "tokenizer.json").read_text())
        self.tokens = np.memmap(path, np.dtype(self.meta["dtype"]), mode="r")
        self.path, self.L, self.seed, self.epoch = path, block_size, seed, -1
        packed = self.meta["row_length"]
        if packed and packed != block_size:
            fail(f"{path} holds rows of {packed} tokens; set --block_size={packed}")
        if len(self.tokens) < block_size:
            fail(f"{path} has {len(self.tokens):,} tokens, fewer than block_size={block_size}")
        self.n_rows = len(self.tokens) // block_size if packed else max(1, len(self.tokens) // block_size - 1)
        spare = len(self.tokens) - self.n_rows * block_size
        self.shifts = 1 if packed else min(block_size, spare + 1)  # how many places the first cut can be at

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
