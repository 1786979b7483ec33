"""Two-digit sums, `27+58=085`: V = 12 (digits, + and =), rows of 9.

All 10,000 sums of two numbers from 00 to 99.  A random tenth is held out, so a model
that writes right sums of the held-out kind has learnt to add, carry included, and
has not learnt the list.  Made here, no download, no licence.

    python data/sums/prepare.py
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import corpus, tokenizer

ROW = len("27+58=085")


def all_sums() -> list[str]:
    """The 10,000 rows in order."""
    return [f"{a:02}+{b:02}={a + b:03}" for a in range(100) for b in range(100)]


def split(rows: list[str], seed: int) -> tuple[str, str]:
    """Shuffle the rows and hold out a tenth: (train, val), each as one string."""
    order = np.random.default_rng(seed).permutation(len(rows))
    n_val = len(rows) // 10
    return "".join(rows[i] for i in order[n_val:]), "".join(rows[i] for i in order[:n_val])


def main() -> None:
    """Prepare the set as the command line says."""
    args = corpus.parser(__doc__, Path(__file__).parent).parse_args()
    settings = {"seed": 1337}
    if corpus.is_ready(args.out_dir, settings, args.force):
        return
    train, val = split(all_sums(), **settings)
    enc = tokenizer.char_encoding(train + val, "sums")
    train_ids, val_ids = tokenizer.encode_text(enc, train), tokenizer.encode_text(enc, val)
    corpus.write_bins(args.out_dir, enc, [train_ids], [val_ids], ROW, settings)


if __name__ == "__main__":
    corpus.run(main)
