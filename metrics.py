"""Judging samples: the mathematics. Pure functions over arrays of token ids, nothing read or written.

Perplexity, how unlikely another model finds a text, is easily fooled: "the the the" is likely, and so is a page of the
training text. Each of these catches what another lets pass:

- **variety** within a sample (`sample_entropies`) and between samples (`self_bleu`, `distinct_ngrams`);
- **the right words** (`rare_shares`, `unigram_kl`): avoiding rare ones lowers perplexity, and entropy hardly shows it;
- **new text** (`longest_copies`): not the training text by heart;
- **a fair comparison** (`entropy_matched`): sampling colder lowers perplexity and entropy together, so models are
  compared at the same entropy, the data's;
- **its error** (`bootstrap`): other samples would have given another number.

Shapes: n samples of L tokens, V vocabulary. `samples` (n, L) are ids, from 0 up, of any integer type; counts (V,) say
how often each token occurs, as np.bincount(tokens, minlength=V). Entropies and divergences are in nats.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy import ndarray

# ---------------------------------------------------------------- variety

def ngram_ids(samples: ndarray, n: int) -> ndarray:
    """A number for each n-gram, equal for equal n-grams only, from 0 up without gaps: (rows, L - n + 1).

    Exact, where hashes could collide: an n-gram is the name of its first n - 1 tokens and one token more, a pair to be
    named in turn. Raises ValueError for n > L.
    """
    rows, L = samples.shape
    if n > L:
        raise ValueError(f"samples of {L} tokens have no {n}-grams")
    V, names = int(samples.max()) + 1, np.zeros((rows, L + 1), dtype=np.int64)  # the one 0-gram, in L + 1 places
    for i in range(n):
        pairs = names[:, :-1] * V + samples[:, i:]                              # (rows, L - i)
        names = np.unique(pairs, return_inverse=True)[1].reshape(pairs.shape)
    return names


def counts_by_row(names: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """How often each name occurs in each row of names (n, L) that has it: name, row, count, (N,) each."""
    n = len(names)
    keys, counts = np.unique(names.astype(np.int64) * n + np.arange(n)[:, None], return_counts=True)
    return keys // n, keys % n, counts


def sample_entropies(samples: ndarray) -> ndarray:
    """H = -sum_v p_v log p_v of each sample's own tokens, p_v = (count of v) / L: (n,), from 0 to log min(L, V)."""
    _, row, count = counts_by_row(samples)
    p = count / samples.shape[1]
    return np.bincount(row, -p * np.log(p))


def self_bleu(samples: ndarray, order: int = 4) -> ndarray:
    """BLEU of each sample with all the others as references: (n,) in [0, 1], 1 for a sample that occurs twice.

        BLEU = (p_1 .. p_order)^(1 / order),    p_k = sum_g min(c(g), max over the others of c'(g)) / (L - k + 1),

    over the sample's k-grams g, each of which it has c(g) times. All have the same length, hence no brevity penalty; no
    smoothing either: without a match of some order it is 0. Raises ValueError for n < 2 and for L < order.

    This takes no n^2 comparisons: the largest count among the others is the largest of all, but for the one sample that
    has it, where it is the second largest.
    """
    n, L = samples.shape
    if n < 2:
        raise ValueError("self_bleu needs at least two samples")
    precisions = np.empty((order, n))
    for k in range(1, order + 1):
        gram, row, count = counts_by_row(ngram_ids(samples, k))
        gram, row, count = (column[count.argsort()] for column in (gram, row, count))
        owner, largest, second = np.zeros((3, gram.max() + 1), dtype=np.int64)  # for each k-gram
        owner[gram], largest[gram] = row, count                                 # the last one written stays
        owns = owner[gram] == row
        second[gram[~owns]] = count[~owns]
        clipped = np.minimum(count, np.where(owns, second[gram], largest[gram]))
        precisions[k - 1] = np.bincount(row, clipped) / (L - k + 1)
    return precisions.prod(0) ** (1 / order)


def distinct_ngrams(samples: ndarray, n: int) -> float:
    """Different n-grams / n-grams, in all samples together. Falls with their number: compare equally many."""
    names = ngram_ids(samples, n)
    return float(names.max() + 1) / names.size


def distinct(samples: ndarray) -> float:
    """Different samples / samples."""
    return len(np.unique(samples, axis=0)) / len(samples)


def palindromes(samples: ndarray) -> ndarray:
    """Which samples read the same backwards: (n,) bool."""
    return (samples == samples[:, ::-1]).all(1)


# ---------------------------------------------------------------- the right words, and new text

def common_tokens(data_counts: ndarray, k: int) -> ndarray:
    """The ids of the k commonest tokens, commonest first: (k,). Of equally common ones the smaller id."""
    return np.argsort(-data_counts.astype(np.int64), kind="stable")[:k]


def rare_shares(samples: ndarray, data_counts: ndarray, k: int) -> ndarray:
    """The share of each sample's tokens that are not among the data's k commonest: (n,)."""
    rare = np.ones(len(data_counts), dtype=bool)
    rare[common_tokens(data_counts, k)] = False
    return rare[samples].mean(1)


def unigram_kl(data_counts: ndarray, sample_counts: ndarray) -> float:
    """KL(data || samples) = sum_v p_v log(p_v / q_v) of single tokens: it weighs what the samples lack.

    A token that they lack altogether would make it infinite, so 1/2 is added to each count in q, not in p. Perfect samples
    do not reach 0: N tokens of K kinds give (K - 1) / 2N on average, once N is large beside K. Compare
    equally many tokens, held-out text among them.
    """
    seen = data_counts > 0
    p = data_counts[seen] / data_counts.sum()
    q = (sample_counts[seen] + 0.5) / (sample_counts.sum() + 0.5 * seen.sum())
    return float((p * np.log(p / q)).sum())


def longest_copies(samples: ndarray, training: ndarray) -> ndarray:
    """How many tokens the longest span of each sample has that occurs in the training text word for word: (n,).

    training: a stream of tokens (m,), or rows (m, L'), whose ends no span crosses.

    Exact, one length after another: a span can only be a copy where the span without its last token is one, so that
    soon few places are left. Time grows as m + n L; only where samples are copied whole, all places stay for L rounds.
    """
    n, L = samples.shape
    training = np.atleast_2d(training)
    V = 1 + max(int(tokens.max(initial=0)) for tokens in (samples, training))
    sought, text = (np.pad(tokens.astype(np.int64), ((0, 0), (0, 1)), constant_values=end).ravel()
                    for tokens, end in ((samples, V), (training, V + 1)))       # each row ends in what the other lacks
    at, text_at = np.arange(sought.size), np.arange(text.size)                  # where copies begin, in both,
    name, text_name = np.zeros_like(at), np.zeros_like(text_at)                 # and which: the empty span, everywhere
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


# ---------------------------------------------------------------- perplexity, and the error of a number

def perplexity(losses: ndarray, tokens: ndarray) -> ndarray | float:
    """exp(sum of losses / sum of tokens) over the last axis, (.., n) -> (..): from each sample's loss, summed, in nats,
    and its number of tokens, which differs once another model's tokenizer has cut it."""
    return np.exp(losses.sum(-1) / tokens.sum(-1))


def bootstrap(values: ndarray, statistic: Callable[..., ndarray] = lambda values: values.mean(-1),
              resamples: int = 2000, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """An interval (low, high) for the statistic: the percentiles of what it is on n samples drawn from the n at hand,
    with replacement, again and again.

    values: a number for each sample (n,), or k that stay together (n, k). The statistic reduces the last axis of k
    arrays (resamples, n), as in bootstrap(np.stack([losses, tokens], 1), perplexity). Too narrow for few samples: for
    the mean of 10, "95%" holds the truth nine times in ten.
    """
    index = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    found = statistic(*np.atleast_2d(values.T)[:, index])                       # (resamples,) from k (resamples, n)
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def wilson(values: ndarray, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval (low, high) for a share, from values (n,) of 0 and 1. Of a share near 0 or 1 a bootstrap says too
    little: of texts that are all right it can only draw right ones."""
    n, p = len(values), values.mean()
    center, half = p + z ** 2 / (2 * n), z * (p * (1 - p) / n + z ** 2 / (4 * n ** 2)) ** 0.5
    return max(0.0, float((center - half) / (1 + z ** 2 / n))), min(1.0, float((center + half) / (1 + z ** 2 / n)))


def entropy_matched(entropies: ndarray, log_perplexities: ndarray, target: float) -> float | None:
    """The log perplexity a model has at the target entropy, from a sweep over temperatures, (k,) each in order.

    Linear in entropy between the first two neighbours of the sweep that have the target between them, also where a
    sweep that turns back reaches it again. None where no two have: nothing is extrapolated.
    """
    for (h0, log_p0), (h1, log_p1) in pairwise(zip(entropies, log_perplexities)):
        if min(h0, h1) <= target <= max(h0, h1):
            weight = (target - h0) / (h1 - h0) if h0 != h1 else 0.0
            return float(log_p0 + weight * (log_p1 - log_p0))
    return None


def sweep(kind: str, steps: int, temperatures: list[float], noise_scales: list[float]) -> list[tuple]:
    """The pairs (temperature, noise scale) of a sweep, in the order in which entropy should rise; both lists rise. With
    noise_scales the last guess of a flow map ("fmlm") is always an argmax; less noise makes its texts more diverse, and a
    temperature below 1 in the guesses before makes them less so, or, in one step, which has none before, more noise."""
    if kind == "fmlm" and noise_scales:
        return ([(temperature, 1.0) for temperature in temperatures if temperature < 1 < steps] +
                [("argmax", scale) for scale in reversed(noise_scales) if scale <= 1 or steps == 1])
    return [(temperature, 1.0) for temperature in temperatures]


def around(temperatures: list, entropies: list[float], target: float, error: float) -> list:
    """Of a sweep over rising temperatures, those that `entropy_matched` needs: neighbours with the target between their
    entropies, or within the error of it. The nearest two where it is beyond the sweep."""
    pairs = [pair for pair, (h0, h1) in zip(pairwise(temperatures), pairwise(entropies))
             if h0 - error <= target <= h1 + error]
    beyond = temperatures[-2:] if entropies[-1] < target else temperatures[:2]
    return [t for t in temperatures if any(t in pair for pair in pairs)] or beyond
