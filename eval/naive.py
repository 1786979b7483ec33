"""Texts that anyone can make, for evaluate.py --naive. What a measure is worth shows in how it
judges them (arXiv 2606.08417).

- unigrams: training rows with every token drawn anew, as often as in the training text: the right
  words, and no sentence;
- bigrams: every token drawn from those that follow the one before it in the training text: pairs
  read well, texts do not;
- one training row, tiled: the same text every time, perfect for a judge of single texts;
- training rows verbatim: perfect for all measures that do not look for copies.

`metrics.distance` tells the first three from held-out text. The fourth is told by `verbatim` and
`copied` alone.

training: rows (m, L) of a packed set, or a stream (1, m), where a row is L tokens from anywhere.
Texts are token ids (n, L).
"""

import numpy as np
from numpy import ndarray


def naive_texts(training: ndarray, n: int, L: int, seed: int, end: int | None = None
                ) -> dict[str, ndarray]:
    """n texts of each kind, by name. end: the token that pads rows, in a set of lines."""
    rng = np.random.default_rng(seed)
    rows = rows_of(training, n, L, rng)
    return {"unigrams": unigrams(training, rows, rng, end),
            "bigrams": bigrams(training, rows[:, 0], L, rng),
            "one training row, tiled": np.tile(rows[:1], (n, 1)),
            "training rows verbatim": rows}


def rows_of(training: ndarray, n: int, L: int, rng: np.random.Generator) -> ndarray:
    """n training rows, different ones where there are as many."""
    stream, step = training.reshape(-1), L if len(training) > 1 else 1
    places = (stream.size - L) // step + 1
    first = rng.choice(places, n, replace=places < n) * step
    return stream[first[:, None] + np.arange(L)].astype(np.int64)


def unigrams(training: ndarray, rows: ndarray, rng: np.random.Generator, end: int | None = None
             ) -> ndarray:
    """Texts as long as the rows (n, L): padding stays, and none is drawn."""
    drawn = training.reshape(-1) if end is None else training[training != end]
    return np.where(rows == end, rows, drawn[rng.integers(drawn.size, size=rows.shape)])


def bigrams(training: ndarray, first: ndarray, L: int, rng: np.random.Generator) -> ndarray:
    """Texts that begin with the tokens `first` (n,). The next token is the one after a random
    occurrence of the last one. A token that only ends rows is followed by any."""
    before, after = training[:, :-1].reshape(-1), training[:, 1:].reshape(-1)
    after = after[np.argsort(before, kind="stable")]                # by the token before
    counts = np.bincount(before, minlength=int(training.max()) + 1)
    starts = counts.cumsum() - counts
    texts = [first]
    for u in rng.random((L - 1, len(first))):
        last = texts[-1]
        place = np.where(counts[last], starts[last] + u * counts[last], u * after.size)
        texts.append(after[place.astype(np.int64)].astype(np.int64))
    return np.stack(texts, 1)
