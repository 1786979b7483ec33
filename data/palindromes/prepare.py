"""Palindromes: four random letters and their mirror image, `qkzaazkq`, V = 26, rows of 8.

The smallest task that tells a joint sampler from an independent one. Every letter is uniform on
its own and certain given its partner, so drawing all eight at once but independently is right
once in 26^4 = 456,976 tries. 200,000 training rows and 10,000 held-out rows that are not among
them. Made here, no download, no licence.

    python data/palindromes/prepare.py
"""

import string
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the top folder
from data import corpus, tokenizer

HALF = 4
LETTERS = string.ascii_lowercase


def rows(codes: np.ndarray) -> np.ndarray:
    """Numbers below 26^4, read as four letters in base 26, as palindromes (n, 8) of ids. The id of
    a letter is its place in the alphabet."""
    half = codes[:, None] // len(LETTERS) ** np.arange(HALF)[::-1] % len(LETTERS)  # (n, 4)
    return np.concatenate([half, half[:, ::-1]], axis=1)


def check(text: str) -> str | None:
    """What is wrong with a text, as "kind: detail"; None for a palindrome."""
    for letter, partner in zip(text[:HALF], text[::-1]):
        if letter != partner:
            return f"letters differ: {letter!r} has the partner {partner!r}"
    return None if len(text) == 2 * HALF else f"wrong length: {len(text)} letters"


def main() -> None:
    args = corpus.parser(__doc__, Path(__file__).parent).parse_args()
    settings = {"n_train": 200_000, "n_val": 10_000, "seed": 1337}
    if corpus.is_ready(args.out_dir, settings, args.force):
        return
    rng = np.random.default_rng(settings["seed"])
    every = np.arange(len(LETTERS) ** HALF)
    train = rng.choice(every, settings["n_train"])
    val = rng.choice(np.setdiff1d(every, train), settings["n_val"], replace=False)
    enc = tokenizer.char_encoding(LETTERS, "palindromes")
    corpus.write_bins(args.out_dir, enc, [rows(train)], [rows(val)], 2 * HALF, settings,
                      checker="data.palindromes.prepare")


if __name__ == "__main__":
    corpus.run(main)
