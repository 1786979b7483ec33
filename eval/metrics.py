"""Judging samples: the mathematics. Pure functions over arrays of token ids, no input or output.

Perplexity, how unlikely another model finds a text, is easily fooled: "the the the" is likely, and
so is a page of the training text. Each of these catches what another misses:

- **variety** in a sample (`sample_entropies`) and between samples (`self_bleu`, `distinct_ngrams`);
- **the right words** (`rare_shares`, `unigram_kl`): without rare ones, perplexity falls;
- **new text** (`longest_copies`): not the training text by heart;
- **all of it at once** (`distance`): texts and held-out text have one law, as far as n-grams tell;
- **a fair comparison** (`entropy_matched`): colder sampling lowers perplexity and entropy, so
  models are compared at the same entropy, the data's;
- **the error** (`bootstrap`): other samples would have given another number.

Shapes: n samples of L tokens, V vocabulary. `samples` (n, L) are ids of any integer type; where
texts are shorter than L, the rest of a row is negative and counts nowhere. counts (V,) are
occurrences of each token, np.bincount(tokens, minlength=V). Nats throughout.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy import ndarray

# ------------------------------------------------------------------------------------------ variety

def ngram_ids(samples: ndarray, n: int) -> ndarray:
    """A number for each n-gram, equal only for equal n-grams, 0, 1, ..: (rows, L - n + 1). -1 where
    it reaches past the end of a text.

    Exact, where hashes could collide: the number of its first n - 1 tokens and one more token are a
    pair, and pairs are numbered in turn. Raises ValueError for n > L."""
    rows, L = samples.shape
    if n > L:
        raise ValueError(f"samples of {L} tokens have no {n}-grams")
    V = int(samples.max()) + 2
    names = np.zeros((rows, L + 1), dtype=np.int64)                 # the 0-gram, in L + 1 places
    for i in range(n):
        pairs = names[:, :-1] * V + samples[:, i:] + 1              # (rows, L - i)
        names = np.unique(pairs, return_inverse=True)[1].reshape(pairs.shape)
    return np.where(samples[:, n - 1:] < 0, -1, names)


def counts_by_row(names: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """The occurrences of each name in each row of names (n, L), negative ones left out: name, row,
    count, (N,) each."""
    n = len(names)
    keys, counts = np.unique(names.astype(np.int64) * n + np.arange(n)[:, None], return_counts=True)
    keys, counts = keys[keys >= 0], counts[keys >= 0]
    return keys // n, keys % n, counts


def sample_entropies(samples: ndarray) -> ndarray:
    """H = -sum_v p_v log p_v of each sample's own tokens, p_v = (count of v) / length: (n,)."""
    _, row, count = counts_by_row(samples)
    p = count / np.bincount(row, count)[row]
    return np.bincount(row, -p * np.log(p), len(samples))


def self_bleu(samples: ndarray, order: int = 4) -> ndarray:
    """BLEU of each sample with all others as references: (n,) in [0, 1], 1 if it occurs twice.

        BLEU = (p_1 .. p_order)^(1 / order),
        p_k = sum_g min(c(g), max over the others of c'(g)) / (the number of its k-grams),

    over the sample's k-grams g, each of which it has c(g) times. No brevity penalty, as if lengths
    were equal, and no smoothing: without a match of some order it is 0. It takes no n^2
    comparisons: the largest count among the others is the largest of all, or the second largest for
    the sample that has the largest. Raises ValueError for n < 2 and for L < order."""
    n = len(samples)
    if n < 2:
        raise ValueError("self_bleu needs at least two samples")
    precisions = np.empty((order, n))
    for k in range(1, order + 1):
        gram, row, count = counts_by_row(ngram_ids(samples, k))
        gram, row, count = (column[count.argsort()] for column in (gram, row, count))
        owner, largest, second = np.zeros((3, gram.max(initial=0) + 1), dtype=np.int64)
        owner[gram], largest[gram] = row, count                     # the last one written stays
        owns = owner[gram] == row
        second[gram[~owns]] = count[~owns]
        clipped = np.minimum(count, np.where(owns, second[gram], largest[gram]))
        precisions[k - 1] = np.bincount(row, clipped, n) / np.bincount(row, count, n).clip(1)
    return precisions.prod(0) ** (1 / order)


def distinct_ngrams(samples: ndarray, n: int) -> float:
    """Different n-grams / n-grams, in all samples together. Compare equally many samples."""
    names = ngram_ids(samples, n)
    names = names[names >= 0]
    return len(np.unique(names)) / max(1, len(names))


def distinct(samples: ndarray) -> float:
    """Different samples / samples."""
    return len({row.tobytes() for row in samples}) / len(samples)


def verbatim(samples: ndarray, training: ndarray) -> ndarray:
    """Which samples are, as a whole, a row of the training text (m, L): (n,) bool. Exact."""
    sought = [row.tobytes() for row in samples.astype(training.dtype)]
    found = set(sought).intersection(row.tobytes() for row in training)
    return np.array([row in found for row in sought])


# -------------------------------------------------------------------- the right words, and new text

def rare_shares(samples: ndarray, data_counts: ndarray, k: int) -> ndarray:
    """The share of each sample's tokens outside the data's k commonest, ties by id: (n,)."""
    commonest = np.argsort(-data_counts.astype(np.int64), kind="stable")[:k]
    rare = np.ones(len(data_counts), dtype=bool)
    rare[commonest] = False
    real = samples >= 0
    return (rare[samples] & real).sum(1) / real.sum(1)


def unigram_kl(data_counts: ndarray, sample_counts: ndarray) -> float:
    """KL(data || samples) = sum_v p_v log(p_v / q_v) of single tokens: weighs what samples lack.

    1/2 is added to each count in q, or a token that the samples lack would make it infinite.
    Perfect samples do not reach 0: N tokens of K kinds give (K - 1) / 2N on average for N >> K.
    Compare equally many tokens, held-out text among them."""
    seen = data_counts > 0
    p = data_counts[seen] / data_counts.sum()
    q = (sample_counts[seen] + 0.5) / (sample_counts.sum() + 0.5 * seen.sum())
    return float((p * np.log(p / q)).sum())


def longest_copies(samples: ndarray, training: ndarray) -> ndarray:
    """The length of each sample's longest span that occurs verbatim in the training text: (n,).

    training: a stream of tokens (m,), or rows (m, L'), whose ends no span crosses. Exact, one
    length after another: a copied span starts with a shorter copied span, so few places are soon
    left. Time grows as m + n L, unless samples are copied whole."""
    n, L = samples.shape
    training = np.atleast_2d(training)
    V = 1 + max(int(tokens.max(initial=0)) for tokens in (samples, training))
    sought, text = (np.pad(np.where(tokens < 0, end, tokens.astype(np.int64)), ((0, 0), (0, 1)),
                           constant_values=end).ravel()
                    for tokens, end in ((samples, V), (training, V + 1)))       # ends never match
    at, text_at = np.arange(sought.size), np.arange(text.size)      # where copies begin, in both,
    name, text_name = np.zeros_like(at), np.zeros_like(text_at)     # and which: the empty span
    longest = np.zeros(n, dtype=np.int64)
    for length in range(1, L + 1):
        spans, name = np.unique(name * (V + 2) + sought[at + length - 1], return_inverse=True)
        longer = text_name * (V + 2) + text[text_at + length - 1]
        text_name = np.searchsorted(spans, longer).clip(max=len(spans) - 1)
        found = spans[text_name] == longer
        text_at, text_name = text_at[found], text_name[found]
        copied = np.isin(np.arange(len(spans)), text_name)
        at, name = at[copied[name]], name[copied[name]]
        if not at.size:
            break
        longest[at // (L + 1)] = length
    return longest


# -------------------------------------------------------------------------- two laws, or one

def ngram_features(samples: ndarray, order: int = 3, bits: int = 12) -> ndarray:
    """Samples (n, L) as points (n, order 2^bits) on the unit sphere: the roots of the shares of
    each sample's k-grams in each of 2^bits places, by a hash of the k-gram, for every k to the
    order. The dot product of two samples is 1 if they have the same k-grams, 0 if none is shared.
    """
    n, L = samples.shape
    points = np.zeros((n, order, 2 ** bits), np.float32)
    hashes = np.zeros((n, L + 1), np.uint64)
    for k in range(min(order, L)):  # times 2^64 / golden ratio: even in the upper bits
        hashes = (hashes[:, :-1] ^ samples[:, k:].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        places = np.where(samples[:, k:] < 0, -1, (hashes >> np.uint64(64 - bits)).astype(int))
        place, row, count = counts_by_row(places)
        points[row, k, place] = np.sqrt(count / np.bincount(row, count, n)[row] / order)
    return points.reshape(n, -1)


def distance(samples: ndarray, others: ndarray) -> tuple[float, tuple[float, float]]:
    """How far the law of the samples is from that of others, and its 95% interval (low, high):

        D = 2 E|x - y| - E|x - x'| - E|y - y'|,

    the energy distance between the `ngram_features` x of samples and y of others, the first n of
    both. It is 0 if their laws are the same, else positive. Each sample is compared as a whole, so
    it matters which n-grams stand together in a text, and how much texts differ. The estimate is
    the mean over all pairs i != j of

        h_ij = |x_i - y_j| + |x_j - y_i| - |x_i - x_j| - |y_i - y_j|,

    unbiased, so it is also negative where the laws are the same. The interval is the jackknife's:
    without i the estimate moves by 2 (D - mean_j h_ij) / (n - 2). Where the laws are the same it is
    rather too wide. Texts by heart are not far: see `longest_copies`. ValueError for n < 3."""
    n = min(len(samples), len(others))
    if n < 3:
        raise ValueError("a distance needs at least three samples")
    x, y = ngram_features(samples[:n]), ngram_features(others[:n])

    def apart(a, b):                                                # |a_i - b_j|, (n, n)
        return ((a ** 2).sum(1)[:, None] + (b ** 2).sum(1) - 2 * a @ b.T).clip(0) ** 0.5
    h = apart(x, y) + apart(y, x) - apart(x, x) - apart(y, y)
    np.fill_diagonal(h, 0)
    means = h.sum(1, dtype=float) / (n - 1)                         # mean_j h_ij
    value = float(means.mean())
    error = 1.96 * 2 / (n - 2) * float(((n - 1) / n * (means - value) ** 2).sum() ** 0.5)
    return value, (value - error, value + error)


# ------------------------------------------------------------ perplexity, and the error of a number

def perplexity(losses: ndarray, tokens: ndarray) -> ndarray | float:
    """exp(sum of losses / sum of tokens) over the last axis, (.., n) -> (..): each sample's summed
    loss in nats, and its number of tokens, which differs under another model's tokenizer."""
    return np.exp(losses.sum(-1) / tokens.sum(-1))


def bootstrap(values: ndarray, statistic: Callable = lambda values: values.mean(-1),
              resamples: int = 2000, confidence: float = 0.95, seed: int = 0
              ) -> tuple[float, float]:
    """An interval (low, high) for the statistic: its percentiles over resamples with replacement.

    values: a number for each sample (n,), or k that stay together (n, k). The statistic reduces the
    last axis of k arrays (resamples, n): bootstrap(np.stack([losses, tokens], 1), perplexity). Too
    narrow for few samples: for the mean of 10, "95%" holds the truth nine times in ten."""
    index = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    found = statistic(*np.atleast_2d(values.T)[:, index])           # (resamples,)
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def wilson(values: ndarray, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval (low, high) for a share, from values (n,) of 0 and 1. Near 0 or 1 a
    bootstrap is too narrow: from texts that are all right it only draws right ones."""
    n, p = len(values), values.mean()
    center, half = p + z ** 2 / (2 * n), z * (p * (1 - p) / n + z ** 2 / (4 * n ** 2)) ** 0.5
    low, high = (center - half) / (1 + z ** 2 / n), (center + half) / (1 + z ** 2 / n)
    return max(0.0, float(low)), min(1.0, float(high))


def entropy_matched(entropies: ndarray, log_perplexities: ndarray, target: float) -> float | None:
    """A model's log perplexity at the target entropy, from an ordered sweep, (k,) each: linear in
    entropy between the first two neighbours that have the target between them, also if the sweep
    turns back and reaches it again. None if there are none: nothing is extrapolated."""
    for (h0, log_p0), (h1, log_p1) in pairwise(zip(entropies, log_perplexities)):
        if min(h0, h1) <= target <= max(h0, h1):
            weight = (target - h0) / (h1 - h0) if h0 != h1 else 0.0
            return float(log_p0 + weight * (log_p1 - log_p0))
    return None


def sweep(kind: str, steps: int, temperatures: list, noise_scales: list) -> list[tuple]:
    """The pairs (temperature, noise scale) of a sweep, by rising entropy; both lists rise. With
    noise_scales the last guess of a flow map ("fmlm") is an argmax. Less noise makes its texts more
    diverse; temperatures below 1 in earlier guesses, or in one step more noise, less so."""
    if kind == "fmlm" and noise_scales:
        return ([(temperature, 1.0) for temperature in temperatures if temperature < 1 < steps] +
                [("argmax", scale) for scale in reversed(noise_scales) if scale <= 1 or steps == 1])
    return [(temperature, 1.0) for temperature in temperatures]
