"""Two-digit sums, `27+58=085`: V = 12 (digits, + and =), rows of 9.

All 10,000 sums of two numbers from 00 to 99. A random tenth is held out, so a model that writes
right sums of the held-out kind has learnt to add, carry included, and has not learnt the list.
Made here, no download, no licence.

    python data/sums/prepare.py
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the top folder
from data import corpus, tokenizer

ROW = len("27+58=085")


def main() -> None:
    args = corpus.parser(__doc__, Path(__file__).parent).parse_args()
    settings = {"seed": 1337}
    if corpus.is_ready(args.out_dir, settings, args.force):
        return
    text = "".join(f"{a:02}+{b:02}={a + b:03}" for a in range(100) for b in range(100))
    enc = tokenizer.char_encoding(text, "sums")
    rows = tokenizer.encode_text(enc, text).reshape(-1, ROW)        # (10000, 9)
    rows = np.random.default_rng(settings["seed"]).permutation(rows)
    n_val = len(rows) // 10
    corpus.write_bins(args.out_dir, enc, [rows[n_val:]], [rows[:n_val]], ROW, settings)


if __name__ == "__main__":
    corpus.run(main)
