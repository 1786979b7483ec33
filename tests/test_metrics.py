"""python -m pytest tests/test_metrics.py

metrics.py against definitions written out in loops, closed forms, sacrebleu and statistics.
"""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from pytest import approx

from eval import metrics
from eval.naive import bigrams, naive_texts

examples = settings(derandomize=True, database=None, deadline=None, max_examples=150)


@st.composite
def texts(draw, min_rows=1, min_length=1, max_length=12):
    """1 to 6 short rows of few tokens, so that repeats and copies are common."""
    n, L = draw(st.integers(min_rows, 6)), draw(st.integers(min_length, max_length))
    row = st.lists(st.integers(0, draw(st.integers(0, 3))), min_size=L, max_size=L)
    rows = draw(st.lists(row, min_size=n, max_size=n))
    return np.array(rows, dtype=draw(st.sampled_from([np.uint16, np.uint32, np.int64])))


def grams(row, n):
    return [tuple(row[i:i + n]) for i in range(len(row) - n + 1)]


# ------------------------------------------------------------------------------------------ variety

@examples
@given(texts(), st.integers(1, 4))
def test_names_are_equal_exactly_where_the_ngrams_are(samples, n):
    if n > samples.shape[1]:
        with pytest.raises(ValueError, match=f"no {n}-grams"):
            metrics.ngram_ids(samples, n)
        return
    names = metrics.ngram_ids(samples, n)
    spelled = [gram for row in samples.tolist() for gram in grams(row, n)]
    assert names.shape == (len(samples), samples.shape[1] - n + 1)
    pairs = set(zip(names.ravel().tolist(), spelled))
    assert len(pairs) == len(set(spelled)) == len(np.unique(names)) == names.max() + 1
    assert metrics.distinct_ngrams(samples, n) == len(set(spelled)) / len(spelled)


@pytest.mark.parametrize("V, dtype", [(2 ** 16, np.uint16), (2 ** 18, np.uint32)])
def test_ids_of_a_narrow_type_do_not_overflow(V, dtype):
    wide = np.random.default_rng(0).choice([0, 1, 2, V - 3, V - 2, V - 1], size=(12, 40))
    narrow = wide.astype(dtype)
    for function in (metrics.sample_entropies, metrics.self_bleu,
                     lambda ids: metrics.ngram_ids(ids, 4),
                     lambda ids: metrics.longest_copies(ids[:6], ids[6:])):
        assert np.array_equal(function(narrow), function(wide))


@examples
@given(texts())
def test_entropy_of_each_sample(samples):
    expected = [sum(-c / len(row) * math.log(c / len(row)) for c in Counter(row).values())
                for row in samples.tolist()]
    assert metrics.sample_entropies(samples) == approx(expected, abs=1e-12)


def test_entropy_in_closed_form():
    samples = np.array([[7, 7, 7, 7], [0, 1, 2, 3], [5, 0, 0, 5]])
    assert metrics.sample_entropies(samples) == approx([0, math.log(4), math.log(2)])


def bleu(rows, i, order):
    """Papineni's definition: the clipped counts of row i against every other row, one by one."""
    product = 1.0
    for k in range(1, order + 1):
        others = [Counter(grams(row, k)) for j, row in enumerate(rows) if j != i]
        own = Counter(grams(rows[i], k))
        common = sum(min(c, max(o[g] for o in others)) for g, c in own.items())
        product *= common / max(1, own.total())
    return product ** (1 / order)


@examples
@given(texts(min_rows=2, min_length=4), st.integers(1, 4))
def test_self_bleu_against_all_pairs(samples, order):
    rows = samples.tolist()
    expected = [bleu(rows, i, order) for i in range(len(rows))]
    assert metrics.self_bleu(samples, order) == approx(expected)


def test_self_bleu_agrees_with_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu", reason="run: pip install sacrebleu")
    samples = np.random.default_rng(0).zipf(1.5, (40, 30)).clip(max=50)
    lines = [" ".join(f"t{token}" for token in row) for row in samples.tolist()]
    expected = [sacrebleu.sentence_bleu(line, lines[:i] + lines[i + 1:], smooth_method="none",
                                        tokenize="none").score for i, line in enumerate(lines)]
    assert 0 == min(expected) < max(expected) < 100 and np.mean(expected) > 10      # percent
    assert 100 * metrics.self_bleu(samples) == approx(expected)


def test_self_bleu_of_copies_of_strangers_and_of_too_few():
    a, b, c = [1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [1, 2, 3, 9, 9]
    assert metrics.self_bleu(np.array([a, a, b])) == approx([1, 1, 0])
    assert metrics.self_bleu(np.array([a, c])).tolist() == [0, 0]  # no 4-gram, no smoothing
    with pytest.raises(ValueError, match="at least two"):
        metrics.self_bleu(np.array([a]))
    with pytest.raises(ValueError, match="no 4-grams"):
        metrics.self_bleu(np.array([[1, 2, 3], [1, 2, 3]]))


def test_distinct_samples_and_whole_copies():
    samples = np.array([[1, 2, 2, 1], [1, 2, 1, 2], [2, 2, 2, 2], [1, 2, 2, 1]])
    assert metrics.distinct(samples) == 3 / 4
    for training in (samples[2:], np.array([[1, 2, 2, 1], [3, 1, 2, 1], [2, 2, 2, 2]] * 99)):
        copied = metrics.verbatim(samples, training.astype(np.uint16))
        assert copied.tolist() == [True, False, True, True]


@examples
@given(texts(min_rows=2, min_length=4), st.integers(1, 3), st.data())
def test_what_follows_the_end_of_a_text_counts_nowhere(samples, n, data):
    """As if the texts were lists of unequal length, which the definitions take."""
    samples = samples.astype(np.int32)
    L = samples.shape[1]
    lengths = data.draw(st.lists(st.integers(1, L), min_size=len(samples), max_size=len(samples)))
    samples[np.arange(L) >= np.array(lengths)[:, None]] = -1
    rows = [row[:length] for row, length in zip(samples.tolist(), lengths)]
    counts, training = np.array([3, 1, 2, 1]), samples[:1]
    alone = [np.array([row]) for row in rows]
    assert metrics.sample_entropies(samples) == approx(
        [metrics.sample_entropies(row)[0] for row in alone])
    assert metrics.rare_shares(samples, counts, 2).tolist() == [
        metrics.rare_shares(row, counts, 2)[0] for row in alone]
    assert metrics.self_bleu(samples, n) == approx([bleu(rows, i, n) for i in range(len(rows))])
    assert metrics.longest_copies(samples, training).tolist() == [
        longest_copy(row, rows[:1]) for row in rows]
    spelled = [gram for row in rows for gram in grams(row, n)]
    assert metrics.distinct_ngrams(samples, n) == len(set(spelled)) / max(1, len(spelled))


# ---------------------------------------------------------------------------------- the right words

def test_rare_shares_and_ties_among_the_common():
    counts = np.array([5, 9, 5, 0, 1], dtype=np.uint32)
    samples = np.array([[1, 1, 0, 0], [2, 3, 4, 1]], dtype=np.uint16)
    assert metrics.rare_shares(samples, counts, 2).tolist() == [0, 0.75]
    assert metrics.rare_shares(samples, counts, 3).tolist() == [0, 0.5]         # 2 before 4
    assert metrics.rare_shares(samples, counts, 0).tolist() == [1, 1]


def test_unigram_kl_in_closed_form():
    """q = (2 + 1/2, 0 + 1/2) / (2 + 3 + 1): the third token, which the data lacks, gets no half."""
    expected = 3 / 4 * math.log(3 / 4 / (2.5 / 6)) + 1 / 4 * math.log(1 / 4 / (0.5 / 6))
    assert metrics.unigram_kl(np.array([3, 1, 0]), np.array([2, 0, 3])) == approx(expected)


@examples
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=8))
def test_unigram_kl_is_finite_and_not_negative(counts):
    data, samples = np.array(counts).T
    data[0] += 1
    kl = metrics.unigram_kl(data, samples)
    assert math.isfinite(kl) and kl >= -1e-12


def test_unigram_kl_of_perfect_samples_is_what_the_docstring_says():
    """(K - 1) / 2N: the chi-square law of N log-likelihood ratios, to 1/N^2 and some noise."""
    p, N = np.array([20, 10, 10, 5, 5, 20, 10, 5, 5, 10]), 1000
    draws = np.random.default_rng(0).multinomial(N, p / p.sum(), size=2000)
    mean = np.mean([metrics.unigram_kl(p, draw) for draw in draws])
    assert mean == approx((len(p) - 1) / (2 * N), rel=0.05)


# ------------------------------------------------------------------------------------------- copies

def longest_copy(row, streams):
    copied = (n for n in range(len(row), 0, -1)
              if set(grams(row, n)) & {gram for stream in streams for gram in grams(stream, n)})
    return next(copied, 0)


@examples
@given(texts(), texts(max_length=30))
def test_longest_copies_against_all_spans(samples, training):
    rows = samples.tolist()
    in_rows, in_stream = (metrics.longest_copies(samples, t) for t in (training, training.ravel()))
    assert in_rows.tolist() == [longest_copy(row, training.tolist()) for row in rows]
    assert in_stream.tolist() == [longest_copy(row, [training.ravel().tolist()]) for row in rows]


def test_longest_copies_cross_no_row_of_either_side():
    samples = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert metrics.longest_copies(samples, np.array([0, 3, 4, 5, 6, 9])).tolist() == [2, 2]
    assert metrics.longest_copies(samples, np.arange(9).reshape(3, 3)).tolist() == [2, 3]
    assert metrics.longest_copies(samples, np.array([0, 9])).tolist() == [0, 0]


def test_longest_copies_finds_what_was_planted_in_a_long_text():
    rng = np.random.default_rng(0)
    training, samples = rng.integers(1000, size=100_000), rng.integers(1000, 2000, size=(50, 64))
    lengths = rng.integers(65, size=50)
    for sample, length in zip(samples, lengths):  # tokens from 1000 up do not occur in training
        start = rng.integers(65 - length)
        place = rng.integers(100_000 - 64)
        sample[start:start + length] = training[place:place + length]
    assert metrics.longest_copies(samples, training).tolist() == lengths.tolist()


# ------------------------------------------------------------------------------- two laws, or one

def shares(row, k):
    """{k-gram: its share of the row's k-grams}; the row ends before its first -1."""
    found = Counter(grams([token for token in row if token >= 0], k))
    return {gram: count / found.total() for gram, count in found.items()}


def dots(samples):
    """The dot products of the features, from the k-grams themselves."""
    rows = [{gram: share for k in (1, 2, 3) for gram, share in shares(row, k).items()}
            for row in samples.tolist()]
    return np.array([[sum(math.sqrt(p[gram] * q[gram]) for gram in p.keys() & q) / 3 for q in rows]
                     for p in rows])


@settings(examples, max_examples=40)
@given(texts(min_rows=2, max_length=8), st.data())
def test_features_are_roots_of_ngram_shares(samples, data):
    """Of tokens of any type, and of texts that end early."""
    if data.draw(st.booleans()):
        samples = samples.astype(np.int32)
        for row in samples:
            row[data.draw(st.integers(1, len(row))):] = -1
    points = metrics.ngram_features(samples, bits=14)
    assert points @ points.T == approx(dots(samples), abs=1e-5)


def test_distance_and_its_interval_by_their_definitions():
    rng = np.random.default_rng(0)
    x, y = rng.integers(3, size=(9, 6)), rng.integers(4, size=(7, 6))
    dot = dots(np.concatenate([x[:7], y]))
    apart = np.sqrt((2 - 2 * dot).clip(0))

    def estimate(kept):
        return np.mean([apart[i, 7 + j] + apart[j, 7 + i] - apart[i, j] - apart[7 + i, 7 + j]
                        for i in kept for j in kept if i != j])
    value, (low, high) = metrics.distance(x, y)
    without = np.array([estimate([j for j in range(7) if j != i]) for i in range(7)])
    error = 1.96 * math.sqrt(6 / 7 * ((without - without.mean()) ** 2).sum())
    assert value == approx(estimate(range(7)), abs=1e-6)
    assert (low, high) == approx((value - error, value + error), abs=1e-6)
    with pytest.raises(ValueError, match="at least three"):
        metrics.distance(x[:2], y)


def toy_language(n, rng):
    """Texts of 12 tokens of 16: counting up from anywhere by a step that each text keeps."""
    return (rng.integers(16, size=(n, 1)) + rng.integers(1, 4, size=(n, 1)) * np.arange(12)) % 16


def test_distance_is_zero_for_one_law_and_positive_for_naive_texts():
    rng = np.random.default_rng(0)
    values, intervals = zip(*(metrics.distance(toy_language(50, rng), toy_language(50, rng))
                              for _ in range(50)))
    assert abs(np.mean(values)) < 3 * np.std(values) / 50 ** 0.5
    assert sum(low < 0 < high for low, high in intervals) >= 45
    training, held_out = toy_language(300, rng), toy_language(100, rng)
    found = {name: metrics.distance(rows, held_out)
             for name, rows in naive_texts(training, 100, 12, 1).items()}
    (by_heart, (low, high)) = found.pop("training rows verbatim")
    assert low < 0 < high
    assert len(found) == 3 and all(value > low > 0 for value, (low, _) in found.values())


def test_naive_texts_are_what_they_are_called():
    rng = np.random.default_rng(0)
    training = toy_language(300, rng).astype(np.uint16)
    training[:, 9:] = np.where(rng.random((300, 1)) < 0.5, 16, training[:, 9:])     # 16 ends texts
    for packed in (True, False):
        text = training if packed else training.reshape(1, -1)
        made, again, other = (naive_texts(text, 200, 12, seed, 16 if packed else None)
                              for seed in (1, 1, 2))
        assert all(np.array_equal(made[name], again[name]) for name in made)
        assert not any(np.array_equal(made[name], other[name]) for name in ("unigrams", "bigrams"))
        assert all(rows.shape == (200, 12) for rows in made.values())
        unigrams, bigrams, tiled, rows = made.values()
        stream = text.ravel().tolist()
        windows = {tuple(stream[i:i + 12]) for i in range(0, 3600 - 11, 12 if packed else 1)}
        assert {tuple(row) for row in rows.tolist()} <= windows
        repeated, = {tuple(row) for row in tiled.tolist()}
        assert repeated in windows
        pairs = {pair for row in text.tolist() for pair in grams(row, 2)}
        assert {pair for row in bigrams.tolist() for pair in grams(row, 2)} <= pairs
        counts = Counter(stream)
        if packed:
            assert np.array_equal(unigrams == 16, rows == 16)
            counts.pop(16)
        drawn = unigrams[unigrams < 16 + (not packed)]
        for token, count in counts.items():
            p = count / counts.total()
            assert np.mean(drawn == token) == approx(p, abs=4 * math.sqrt(p / drawn.size))
        own = [tuple(row) for row in unigrams.tolist()]
        assert not windows & set(own)


def test_bigrams_follow_the_shares_of_what_follows():
    """0 is followed by 1 three times of four, 1 by 0 always; 2 only ends a row."""
    training = np.array([[0, 1, 0, 1], [0, 1, 0, 2]])
    rows = bigrams(training, np.zeros(4000, np.int64), 3, np.random.default_rng(0))
    assert np.mean(rows[:, 1] == 1) == approx(3 / 4, abs=0.03)
    assert np.all(rows[rows[:, 1] == 1, 2] == 0)
    assert set(rows[rows[:, 1] == 2, 2].tolist()) == {0, 1, 2}


# ------------------------------------------------------------ perplexity, and the error of a number

def test_perplexity_weighs_tokens_not_samples():
    losses, tokens = np.array([10 * math.log(2), 30 * math.log(8)]), np.array([10, 30])
    assert metrics.perplexity(losses, tokens) == approx(2 ** ((1 + 9) / 4))
    stacked = metrics.perplexity(np.stack([losses, 2 * losses]), np.stack([tokens, tokens]))
    assert stacked == approx([2 ** 2.5, 2 ** 5])


def test_bootstrap_of_a_mean_is_the_normal_interval():
    values = np.random.default_rng(0).normal(3, 2, size=1000)
    for z, confidence in ((1.96, 0.95), (1.645, 0.90)):
        half = z * values.std() / math.sqrt(1000)
        interval = metrics.bootstrap(values, resamples=10_000, confidence=confidence)
        assert np.subtract(interval, values.mean()) == approx((-half, half), abs=0.05 * half)


def test_bootstrap_intervals_hold_the_truth_as_often_as_they_say():
    """95% of the time at n = 100, 9 of 10 times at n = 10; 1,000 trials are off by up to 0.02."""
    rng = np.random.default_rng(1)
    for n, expected in ((100, 0.945), (10, 0.90)):
        intervals = [metrics.bootstrap(rng.normal(size=n), resamples=500, seed=trial)
                     for trial in range(1000)]
        assert np.mean([low < 0 < high for low, high in intervals]) == approx(expected, abs=0.02)


def test_bootstrap_is_a_function_of_its_seed_and_draws_every_sample():
    values = np.arange(20.0)
    bootstrap = metrics.bootstrap
    assert bootstrap(values) == bootstrap(values) != bootstrap(values, seed=1)
    assert metrics.bootstrap(values, lambda drawn: drawn.min(-1))[0] == 0
    assert metrics.bootstrap(values, lambda drawn: drawn.max(-1))[1] == 19


def test_wilson_ends_where_the_share_would_be_196_deviations_off():
    for right, n in ((0, 50), (3, 50), (50, 50), (1999, 2000)):
        share = right / n
        low, high = metrics.wilson(np.arange(n) < right)
        assert 0 <= low <= share <= high <= 1
        for end in {low, high} - {0.0, 1.0}:
            assert abs(end - share) == approx(1.96 * (end * (1 - end) / n) ** 0.5)
    assert metrics.wilson(np.ones(2000))[0] == approx(0.9981, abs=1e-4)


def test_bootstrap_of_perplexity():
    """Loss and tokens are drawn together: in proportion, they give the same in every resample. Else
    the log deviates as the residuals, sd(loss - log_ppl tokens) / (mean tokens sqrt n)."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, 100, size=500)
    low, high = metrics.bootstrap(np.stack([tokens * math.log(7), tokens], 1), metrics.perplexity)
    assert (low, high) == approx((7, 7))
    losses = tokens * rng.normal(4, 0.5, size=500)
    log_ppl = math.log(metrics.perplexity(losses, tokens))
    half = 1.96 * (losses - log_ppl * tokens).std() / tokens.mean() / math.sqrt(500)
    interval = metrics.bootstrap(np.stack([losses, tokens], 1), metrics.perplexity, 10_000)
    assert np.log(interval) == approx([log_ppl - half, log_ppl + half], abs=0.07 * half)


def test_entropy_matched_interpolates_and_never_extrapolates():
    entropies, log_ppl = np.array([1.0, 2.0, 4.0]), np.array([3.0, 3.5, 7.5])
    for target, expected in ((1.0, 3.0), (1.5, 3.25), (2.0, 3.5), (3.0, 5.5), (4.0, 7.5)):
        assert metrics.entropy_matched(entropies, log_ppl, target) == approx(expected)
        assert metrics.entropy_matched(entropies[::-1], log_ppl[::-1], target) == approx(expected)
    assert metrics.entropy_matched(entropies, log_ppl, 0.99) is None
    assert metrics.entropy_matched(entropies, log_ppl, 4.01) is None
    assert metrics.entropy_matched(entropies[:1], log_ppl[:1], 1.0) is None  # no neighbour


def test_entropy_matched_takes_the_first_crossing_of_a_sweep_that_turns_back():
    assert metrics.entropy_matched([1, 3, 2, 4], [0, 10, 20, 30], 2.5) == approx(7.5)
    assert metrics.entropy_matched([2, 2, 3], [5, 6, 7], 2) == 5  # two on the target
