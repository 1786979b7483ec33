"""python -m pytest tests/test_properties.py

What must hold for every input, tried on random ones: the algebra of flow.py and flowmap.py, seeds,
schedules, the rows of a data set, tokenizers. Every run tries the same examples and keeps nothing.
"""

import ast
import itertools
import json
import math
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import flow
import flowmap
from data import corpus, tokenizer
from data.loader import Data, identity, tokenizer_from_dict
from flow import (Clock, by_tokens, corrupt, cross_entropy, interpolate, move, step_size,
                  stratified, sum_by_tokens)
from flowmap import kl_to_target, off_diagonal_times, semigroup_weight
from lib.machine import generator, mix
from lib.optim import learning_rate_at

settings.register_profile("reproducible", derandomize=True, database=None, deadline=None,
                          max_examples=60)
settings.load_profile("reproducible")

seeds = st.integers(0, 2 ** 63)
unit = (st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1)
        | st.floats(1e-16, 1e-6).map(lambda left: 1 - left))


def rows(*columns):
    """1 to 8 rows of such columns: what a batch is made of."""
    return st.lists(st.tuples(*columns), min_size=1, max_size=8)


def ordered(n):
    """1 to 8 rows of n sorted times, often equal ones."""
    return st.lists(st.lists(unit, min_size=n, max_size=n).map(sorted), min_size=1, max_size=8)


def columns(rows):
    return torch.tensor(rows, dtype=torch.float64).unbind(1)        # (B,) each


def normals(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def close(a, b, atol=1e-9):
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-9, atol=atol)


class Head:
    """logits = hidden W^T."""

    def __init__(self, W):
        self.W = self.weight = W
        self.bias, self.out_features = torch.zeros(len(W)).to(W), len(W)

    def __call__(self, hidden):
        return hidden @ self.W.T

    def parameters(self):
        return [self.W] if self.W.requires_grad else []


@contextmanager
def slices_of(n):
    """At most n logits, or those of one token, at once."""
    before, flow.SLICE = flow.SLICE, n
    try:
        yield
    finally:
        flow.SLICE = before


@given(knots=rows(st.integers(-1000, 1000), st.floats(-100, 100)).filter(lambda x: len(x) > 1),
       places=st.lists(st.floats(0, 1), max_size=8))
def test_interpolation_is_numpys(knots, places):
    """Between the ends and at knots: where several share an x, the last of them counts in both."""
    knots = sorted(knots, key=lambda knot: knot[0])
    xs, ys = (np.array(column) / 8 for column in zip(*knots))
    x = np.concatenate([xs, xs[0] + np.array(places) * (xs[-1] - xs[0])])
    found = interpolate(*map(torch.from_numpy, (x, xs, ys)))
    assert close(found, np.interp(x, xs, ys))


@settings(max_examples=6, phases=[Phase.generate])  # tables are too slow to look for a simpler V
@given(V=st.integers(2, 300_000), d=st.integers(1, 1024), share=st.just(0.0) | unit, seed=seeds)
def test_clock_is_a_change_of_time(V, d, share, seed):
    """Both ways 0, 1 and order stay. One after the other is the identity where the clock moves."""
    clock = Clock(V, d, share)
    x = torch.cat([clock.t, torch.rand(1000, generator=generator(seed))]).sort().values
    tau, t = clock.tau_of_t(x), clock.t_of_tau(x)
    for y in (tau, t):
        assert y[0] == 0 and y[-1] == 1 and (y.diff() >= 0).all()
    assert close(clock.tau_of_t(t), x)
    moves = (tau > 1e-6) & (tau < 1 - 1e-6)
    assert moves.any() and close(clock.t_of_tau(tau)[moves], x[moves])


@given(n=st.integers(1, 300), seed=seeds)
def test_stratified_draws_once_in_every_stratum(n, seed):
    unsorted = stratified(n, generator(seed)).double()
    draws = unsorted.sort().values
    assert n < 20 or not torch.equal(unsorted, draws)
    edges = torch.arange(n + 1) / n
    assert (edges[:-1] - 1e-6 <= draws).all() and (draws <= edges[1:] + 1e-6).all()


@given(times=ordered(3))
def test_step_sizes_compose(times):
    """What is left of the noise after two steps is what is left after one: 1 - h multiplies."""
    s, u, t = columns(times)
    h = step_size(s, t)
    assert (0 <= h).all() and (h <= 1).all()
    assert (h[(s < t) & (t == 1)] == 1).all() and (h[s == t] == 0).all()
    assert close(1 - h, (1 - step_size(s, u)) * (1 - step_size(u, t)))


@given(times=st.integers(1, 9).flatmap(ordered), seed=seeds)
def test_a_constant_target_is_reached_in_a_straight_line(times, seed):
    """From noise at t = 0, by any steps: at t, (1 - t) of the noise is left."""
    times = columns(times)                                          # (B,) each, sorted
    noise, target = normals(seed, 2, len(times[0]), 3, 4)           # (B, L, d) each
    z = noise
    for s, t in itertools.pairwise([torch.zeros_like(times[0]), *times]):
        z = move(z, target, s, t)
        assert close(z, (1 - t)[:, None, None] * noise + t[:, None, None] * target)


@given(times=rows(unit), a=st.floats(-3, 3), b=st.floats(-3, 3), seed=seeds)
def test_corruption_is_linear(times, a, b, seed):
    """In embedding and noise together; in t, a straight line from noise to embedded text."""
    (t,), y = columns(times), torch.randint(5, (len(times), 3), generator=generator(seed))
    E, F = normals(seed, 2, 5, 4)
    z, w = normals(seed + 1, 2, len(times), 3, 4)
    mixed = corrupt(a * E + b * F, y, t, a * z + b * w)
    assert close(mixed, a * corrupt(E, y, t, z) + b * corrupt(F, y, t, w))
    start, end = corrupt(E, y, 0 * t, z), corrupt(E, y, 0 * t + 1, z)
    assert torch.equal(start, z) and torch.equal(end, E[y])
    line = [(1 - u) * n + u * E[text] for u, n, text in zip(t, z, y)]
    assert close(corrupt(E, y, t, z), torch.stack(line))


shapes = dict(B=st.integers(1, 4), L=st.integers(1, 5), V=st.integers(1, 9), n=st.integers(1, 60),
              seed=seeds)


@given(**shapes)
def test_slices_change_nothing(B, L, V, n, seed):
    """by_tokens and sum_by_tokens against one call: values, gradients for hidden and weights."""
    head = Head(normals(seed, V, 3).requires_grad_())
    hidden, other = normals(seed + 1, B, L, 3).requires_grad_(), normals(seed + 2, B, L, 2)

    def function(logits, other):
        return logits.logsumexp(-1, keepdim=True) * other.sin()     # (.., 2)
    whole = function(head(hidden), other)
    with slices_of(n):
        parts = by_tokens(lambda hidden, other: function(head(hidden), other), head, hidden, other)
        total, values = sum_by_tokens(function, head, hidden, other)
        with torch.no_grad():
            assert all(map(close, sum_by_tokens(function, head, hidden, other), (total, values)))
    assert close(total, whole[..., 0].sum()) and close(values, whole) and close(parts, whole)
    for found, expected in zip(torch.autograd.grad(total * seed, [head.W, hidden]),
                               torch.autograd.grad(whole[..., 0].sum() * seed, [head.W, hidden])):
        assert close(found, expected)


@given(scale=st.floats(0, 50), **shapes)
def test_cross_entropy_is_minus_the_log_of_the_softmax(B, L, V, n, seed, scale):
    """Its gradient for the logits is the softmax minus the one-hot text."""
    logits, y = scale * normals(seed, B, L, V), torch.randint(V, (B, L), generator=generator(seed))
    exp = np.exp(logits.numpy())
    softmax = exp / exp.sum(-1, keepdims=True)
    one_hot = np.eye(V)[y]
    with slices_of(n):
        mean, losses = cross_entropy(Head(torch.eye(V).double()), logits.requires_grad_(), y)
    assert close(losses, -np.log((softmax * one_hot).sum(-1))) and close(mean, losses.mean())
    assert close(torch.autograd.grad(B * L * mean, logits)[0], softmax - one_hot)


@given(times=ordered(3), seed=seeds)
def test_two_jumps_are_one(times, seed):
    """X_{u,t} o X_{s,u} = X_{s,t} for the average of any two aims, at equal times and t = 1 too."""
    s, u, t = columns(times)
    z, first, second = normals(seed, 3, len(s), 2, 4)
    g = semigroup_weight(s, u, t)
    assert (0 <= g).all() and (g <= 1).all()
    g = g[:, None, None]
    once = move(z, g * first + (1 - g) * second, s, t)
    assert close(move(move(z, first, s, u), second, u, t), once)


@given(times=ordered(4))
def test_three_jumps_are_one_in_either_order(times):
    """((s u) v) t and s (u (v t)): the same weights for the three aims."""
    s, u, v, t = columns(times)
    early, late = semigroup_weight(s, u, v), semigroup_weight(s, v, t)
    left = torch.stack([late * early, late * (1 - early), 1 - late])
    early, late = semigroup_weight(s, u, t), semigroup_weight(u, v, t)
    right = torch.stack([early, (1 - early) * late, (1 - early) * (1 - late)])
    assert close(left, right)


@given(rows=rows(unit, unit, st.booleans()), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_jumps_lie_on_the_clock(rows, dtype):
    """In order, as long as asked, and the rest shared out before and after as asked."""
    length, place, full = (column.to(dtype) for column in columns(rows))
    tau_s, tau_t = off_diagonal_times(length, place, full > 0)
    assert (0 <= tau_s).all() and (tau_s <= tau_t).all() and (tau_t <= 1).all()
    assert torch.equal((tau_s == 0) & (tau_t == 1) | (full == 0), torch.ones_like(full > 0))
    error = 4 * torch.finfo(dtype).eps
    assert (tau_t - tau_s - length)[full == 0].abs().le(error).all()
    assert (tau_s * (1 - place) - (1 - tau_t) * place)[full == 0].abs().le(error).all()


@given(scale=st.floats(0, 20), outside=st.floats(0, 2), shift=st.floats(-100, 100), **shapes)
def test_divergence_from_a_target(B, L, V, n, seed, scale, outside, shift):
    """For targets on the simplex and off it. The gradient for the logits: softmax - target."""
    logits, V = scale * normals(seed, B, L, V + 1), V + 1
    head, away = Head(torch.eye(V).double()), normals(seed + 1, B, L, V)
    raw = normals(seed + 2, B, L, V).softmax(-1)
    raw = raw + outside * (away - away.mean(-1, keepdim=True))      # sums to one
    exp, p = np.exp(logits.numpy()), np.maximum(raw.numpy(), 0)
    q, p = exp / exp.sum(-1, keepdims=True), p / p.sum(-1, keepdims=True)
    with slices_of(n):
        mean, losses, cut = kl_to_target(head, logits.requires_grad_(), (lambda raw: raw, (raw,)))
        _, shifted, _ = kl_to_target(head, logits + shift, (lambda raw: raw, (raw,)))
        _, own, _ = kl_to_target(head, logits, (lambda own: own.softmax(-1), (logits.detach(),)))
    assert close(losses, (p * np.log(np.where(p > 0, p, 1) / q)).sum(-1))
    assert (losses >= -1e-12).all() and close(mean, losses.mean())
    assert close(torch.autograd.grad(B * L * mean, logits)[0], q - p)
    assert close(shifted, losses) and close(own, torch.zeros(B, L).double())
    assert close(cut, -np.where(raw < 0, raw, 0).sum(-1)) and (cut >= 0).all()


class Diary:
    """A model that always aims at the same text, and notes what it is asked. Coordinate k of the
    state (1, 1, n + 1) is how much of the k-th noise is in it, the last how much of the text."""

    def __init__(self, n):
        self.embed = SimpleNamespace(weight=torch.eye(n + 1)[[n, n]].double())
        self.head, self.notes = Head(torch.eye(2).double()), []

    def __call__(self, z, tau_s, tau_t):
        self.notes.append((tau_s, tau_t, z[0, 0]))
        return torch.zeros(1, 1, 2, dtype=torch.float64)


CLOCK = Clock(7)


@given(steps=st.integers(1, 10), gamma=unit)
def test_stochastic_sampling_keeps_the_amount_of_noise(steps, gamma):
    """At every call the state is t of the text plus noise of variance (1 - t)^2, some drawn anew.
    Before that, the jump went to the time that the network was told."""
    model = Diary(steps)
    noise = iter(torch.eye(steps + 1).double()[:steps, None, None])             # (1, 1, d) each
    flowmap.sample(model, CLOCK, next(noise), steps, gamma, lambda: next(noise))
    assert len(model.notes) == steps and len(list(noise)) == (0 if gamma else steps - 1)
    told = None
    for i, (tau_s, tau_t, z) in enumerate(model.notes):
        assert tau_s.item() == pytest.approx(i / steps)
        t, old, text = CLOCK.t_of_tau(tau_s), z[:max(i, 1)].norm(), z[-1]
        assert close(text, t) and close(z[:-1].square().sum(), (1 - t) ** 2)
        if i:
            landed = text / (text + old)                            # adding noise scales both
            assert close(1 - landed, (1 - t) * math.sqrt(1 - gamma ** 2))
            assert close(CLOCK.tau_of_t(landed), told)
        told = tau_t


words = st.lists(st.integers(0, 2 ** 63), max_size=4).map(tuple)


@given(several=st.lists(words, unique=True, max_size=20), bit=st.integers(0, 63), number=seeds)
def test_seeds_are_mixed(several, bit, number):
    """The same numbers, the same seed; others, another order or more of them, another seed."""
    assert len({mix(*numbers) for numbers in several}) == len(several)
    assert [mix(*numbers) for numbers in several] == [mix(*numbers) for numbers in several]
    assert mix(number, number ^ 1) != mix(number ^ 1, number)
    assert 0 <= mix(number) < 2 ** 64 and mix(0) == 0xE220A8397B1DCDAF          # as published
    flipped = mix(number) ^ mix(number ^ 1 << bit)
    assert 8 <= flipped.bit_count() <= 56                           # one bit flips half of them


@given(numbers=words, others=words)
def test_generators_depend_on_all_their_numbers(numbers, others):
    draws, same, other = (torch.rand(4, generator=generator(*key))
                          for key in (numbers, numbers, others))
    assert torch.equal(draws, same) and torch.equal(draws, other) == (numbers == others)


def run_statement(program, start, **names):
    """Run the first statement of a program that starts so, with these names; all names after."""
    tree = ast.parse((ROOT / program).read_text())
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.stmt)
                 and ast.unparse(node).startswith(start))
    exec(compile(ast.Module([found], []), program, "exec"), names)
    return names


@given(peak=st.floats(1e-6, 1), share=unit, schedule=st.sampled_from(["constant", "cosine"]),
       warmup=st.integers(0, 40), max_iters=st.integers(1, 80))
def test_learning_rate_rises_to_its_peak_and_falls_without_a_jump(
        peak, share, schedule, warmup, max_iters):
    settings = dict(learning_rate=peak, min_lr=share * peak, schedule=schedule,
                    warmup_iters=warmup, max_iters=max_iters)
    rate = np.array([learning_rate_at(step, settings)
                     for step in range(max(warmup, max_iters) + 3)]) / peak
    assert (rate >= 0).all() and (rate <= 1 + 1e-12).all() and rate[warmup] == pytest.approx(1)
    assert (np.diff(rate[:warmup]) > 0).all() and (np.diff(rate[warmup:]) <= 1e-12).all()
    assert rate[max(warmup - 1, 0)] == pytest.approx(1)             # the warm-up ends at the peak
    slopes = 1 / max(warmup, 1), math.pi / 2 * (1 - share) / max(max_iters - warmup, 1)
    assert abs(np.diff(rate)).max() <= max(slopes) + 1e-9
    assert rate[-1] == pytest.approx(share if schedule == "cosine" else 1)


@pytest.mark.parametrize("program", ["train.py", "distill.py", "baselines/distill.py"])
@given(seed=seeds, decay=st.floats(0, 0.9999), step=st.integers(0, 10 ** 6))
def test_moving_average_is_a_convex_combination(program, seed, decay, step):
    """All weights keep the same share of the old average: `decay`, but less at the start."""
    ema, model = (nn.Linear(3, 2).double().requires_grad_(False) for _ in range(2))
    old, new = normals(seed, 8), normals(seed + 1, 8)
    for weights, network in ((old, ema), (new, model)):
        nn.utils.vector_to_parameters(weights.clone(), network.parameters())
    run_statement(program, "torch._foreach_lerp_", torch=torch, ema=ema, model=model, student=model,
                  ema_decay=decay, step=step)
    after = nn.utils.parameters_to_vector(ema.parameters())
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), new)
    kept = ((after - new) @ (old - new) / (old - new).square().sum()).item()
    assert close(after, kept * old + (1 - kept) * new)
    assert min(decay, 0.1) - 1e-9 <= kept <= decay + 1e-9
    assert step > 0 or kept <= 0.1 + 1e-9
    assert step < 10 / (1 - decay) or kept == pytest.approx(decay)


LETTERS = tokenizer.char_encoding("".join(map(chr, range(0x4E00, 0x4E00 + 300))), "letters")
sizes = st.tuples(st.integers(1, 12), st.integers(12, 30) | st.integers(12, 300))   # L, all tokens


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Opens a set whose n-th token is number n, so that a row tells its place in the file."""
    folder = tmp_path_factory.mktemp("sets")

    def open_set(size, packed, seed):
        L, n = size
        n, path = n // L * L if packed else n, folder / f"{size}{packed}"
        if not path.exists():
            corpus.write_bins(path, LETTERS, [np.arange(n)], [np.arange(n)], L if packed else None)
        return Data(str(path), "train", L, seed)
    return open_set


@given(size=sizes, packed=st.booleans(), seed=seeds, epoch=st.integers(0, 1000))
def test_an_epoch_is_disjoint_spans_of_the_file(reader, size, packed, seed, epoch):
    data = reader(size, packed, seed)
    spans = data.rows(epoch * data.n_rows, data.n_rows)             # (n_rows, L)
    assert spans.shape == (data.n_rows, size[0]) and (np.diff(spans, axis=1) == 1).all()
    assert len(np.unique(spans)) == spans.size
    if packed:
        assert spans.size == len(data.tokens) and (spans[:, 0] % size[0] == 0).all()
    else:
        assert spans.size > len(data.tokens) - 2 * size[0]          # cuts move within a row


@given(L=st.integers(1, 12), packed=st.booleans(), seed=seeds)
def test_every_epoch_is_another_order(reader, L, packed, seed):
    """With every seed; and, in a continuous stream, cut elsewhere."""
    data, other = reader((L, 150), packed, seed), reader((L, 150), packed, seed + 1)
    starts = data.rows(0, 12 * data.n_rows)[:, 0].reshape(12, -1)   # (epochs, n_rows)
    assert len({tuple(order) for order in starts.argsort(1)}) > 1
    assert (len(set(starts[:, 0] % L)) > 1) == (not packed and L > 1)
    assert not np.array_equal(other.rows(0, 12 * data.n_rows)[:, 0], starts.flatten())


@given(size=sizes, packed=st.booleans(), seed=seeds,
       numbers=st.lists(st.integers(0, 99), max_size=9))
def test_a_sample_is_the_same_whenever_it_is_read(reader, size, packed, seed, numbers):
    """Sequential reading against random access: what makes resuming exact."""
    in_order, data = reader(size, packed, seed).rows(0, 100), reader(size, packed, seed)
    for n in numbers:
        assert np.array_equal(data.rows(n, 3)[:1], in_order[n:n + 1])


@given(size=sizes, packed=st.booleans(), seed=seeds, world=st.integers(1, 4), B=st.integers(1, 3))
def test_ranks_share_the_samples(reader, size, packed, seed, world, B):
    """Micro-step j goes to rank j mod world: in an epoch no row twice, the rows of one process."""
    whole = reader(size, packed, seed)
    B = min(B, whole.n_rows)
    micro_steps = whole.n_rows // B
    parts = [reader(size, packed, seed) for _ in range(world)]
    starts = [start for rank, part in enumerate(parts) for j in range(rank, micro_steps, world)
              for start in part.rows(j * B, B)[:, 0]]
    assert len(set(starts)) == len(starts) == micro_steps * B
    assert sorted(starts) == sorted(whole.rows(0, micro_steps * B)[:, 0])


characters = (st.sampled_from("\n\r\t 'abcs19.é\U0001F600\u0301\u2028")
              | st.characters(codec="utf-8"))
alphabets = st.lists(characters, min_size=6).map("".join)


@given(alphabet=alphabets, merges=st.integers(0, 3), data=st.data())
def test_tokenizers_spell_every_text_of_their_alphabet(alphabet, merges, data):
    """Text to ids and back, as trained and again through JSON."""
    text = data.draw(st.text(st.sampled_from(alphabet), min_size=20))
    learned = alphabet + " abcdabcdabcd"
    pairs = tokenizer.train_bpe(learned, len(set(learned.encode())) + merges + 1, "pairs")
    for encoding in (tokenizer.char_encoding(alphabet, "characters"), pairs):
        described = tokenizer.to_dict(encoding)
        again = tokenizer_from_dict(json.loads(json.dumps(described)))
        assert tokenizer.to_dict(again) == described
        assert identity(tokenizer.to_dict(again)) == identity(described)
        ids = tokenizer.encode_text(encoding, text)
        assert encoding.decode(ids.tolist()) == again.decode(ids.tolist()) == text
        assert np.array_equal(tokenizer.encode_text(again, text), ids)
        assert encoding is pairs or len(ids) == len(text)
