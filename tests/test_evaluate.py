"""python -m pytest tests/test_evaluate.py

The baselines and eval/evaluate.py as programs: trained, distilled and judged at toy size.
"""

import importlib
import itertools
import json
import math
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from programs import QUICK, TINY, inside, log, mistake, quick_run, same, write_set

import baselines.ar
import flow
from data import corpus, loader, tokenizer
from data.loader import Data, tokenizer_from_dict
from eval import metrics, scorers
from lib import checkpoint as ckpt, released
from lib.machine import Machine

CPU = "--device=cpu", "--dtype=float32"
DISTILL, EVALUATE = "baselines/distill.py", "eval/evaluate.py"


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """A folder with the toy's flow and flow map and every baseline; and the toy's data."""
    folder, _, _, _ = toy
    out = tmp_path_factory.mktemp("baselines")
    for name in ("flm.pt", "fmlm.pt"):
        shutil.copy(folder / "out" / name, out)
    places = [f"--dataset={folder / 'data'}", f"--out_dir={out}"]
    for method in ("ar", "mdlm", "duo", "dense", "mse", "noclock"):
        quick_run("train.py", *places, *QUICK, *TINY, f"--method={method}")
    for method in ("sdtt", "dcd"):
        quick_run(DISTILL, *places, *CPU, f"--method={method}", "--rounds=2", "--max_iters=4",
                  "--log_interval=1", "--batch_size=8")
    return out, folder / "data"


def judged(trained, tmp_path, *words):
    """What evaluate.py printed, and wrote."""
    out, data = trained
    text = quick_run(EVALUATE, f"--dataset={data}", *CPU, "--num_samples=12", "--batch_size=5",
                     f"--scorer={out / 'ar.pt'}", f"--out={tmp_path / 'rows.json'}", *words)
    return text, json.loads((tmp_path / "rows.json").read_text())


def names(out, *kinds):
    """The setting --source."""
    return "--source=" + ",".join(str(out / f"{kind}.pt") for kind in kinds)


def test_every_baseline_learns_and_is_judged(trained, tmp_path):
    out, _ = trained
    kinds = "flm", "fmlm", "ar", "mdlm", "duo", "dense", "mse", "noclock", "sdtt", "dcd"
    for kind in kinds[2:8]:
        losses = [r["val_loss"] for r in log(out / f"{kind}.jsonl") if "val_loss" in r]
        assert losses[-1] < losses[0], kind
    text, record = judged(trained, tmp_path, names(out, *kinds), "--steps=1,3", "--bound")
    rows = record["rows"]
    assert [row["name"] for row in rows[:2]] == ["held-out text", "flm, 1 steps, argmax, noise x 1"]
    assert len(rows) == 1 + 2 * len(kinds) and {row.get("kind") for row in rows[1:]} == set(kinds)
    for row in rows:
        for key in ("entropy", "unigram_kl", "distinct_2", "rare_256", "longest_copy",
                    "perplexity ar.pt"):
            assert row[key]["low"] <= row[key]["value"] <= row[key]["high"], (row["name"], key)
    assert rows[0]["copied"]["value"] == 1  # the toy's held-out text is in its training text
    found = {Path(path).stem: values for path, values in record["likelihoods"].items()}
    assert {kind: values["exact"] for kind, values in found.items()} == dict(
        flm=False, ar=True, mdlm=False, duo=False)
    assert text.count("likelihood (exact)") == 1 and text.count("likelihood (a bound)") == 3
    assert 0 <= found["flm"]["accuracy_nearly_clean"]["value"] <= 1
    assert "accuracy_nearly_clean" not in found["mdlm"]
    assert str(out) not in json.dumps(record["settings"])


def test_scored_likelihood_is_the_validation_loss(trained, tmp_path):
    """Held-out text under ar.pt: as evaluate.py's scorer, as its likelihood, and computed here."""
    out, data = trained
    _, record = judged(trained, tmp_path, names(out, "ar"), "--bound")
    net = ckpt.build_model(ckpt.load_checkpoint(out / "ar.pt", "ar"), torch.device("cpu"))
    y = torch.from_numpy(Data(str(data), "val", 8, 1).rows(0, 12))
    x = torch.cat([torch.zeros(12, 1, 16), net.embed(y)[:, :-1]], dim=1)
    with torch.no_grad():
        logits = net.head(net(x, torch.ones(12), attention="causal"))
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
    likelihood = record["likelihoods"][str(out / "ar.pt")]
    assert likelihood["nats_per_token"]["value"] == pytest.approx(nats, rel=1e-4)
    perplexity = record["rows"][0]["perplexity ar.pt"]["value"]
    assert perplexity == pytest.approx(math.exp(nats), rel=1e-4)


def test_likelihoods_of_a_uniform_guess_are_the_logarithm_of_the_vocabulary(toy, tmp_path):
    """Exact or bounds, however many times are drawn for one; a character of the toy is a token."""
    kinds = "mdlm", "duo", "ar"
    for method in kinds:
        quick_run("train.py", *toy[1], *TINY, f"--out_dir={tmp_path}", "--max_iters=1",
                  "--learning_rate=1e-6", "--min_lr=0", f"--method={method}")
    quick_run(EVALUATE, names(tmp_path, *kinds), "--num_samples=0", "--bound", *CPU,
              f"--dataset={toy[0] / 'data'}", "--scorer=", f"--out={tmp_path / 'rows.json'}")
    record = json.loads((tmp_path / "rows.json").read_text())
    for found in record["likelihoods"].values():
        nats = found["nats_per_token"]["value"]
        assert nats == pytest.approx(math.log(16), rel=0.2)
        assert found["perplexity"]["value"] == pytest.approx(math.exp(nats))
        assert found["bits_per_character"]["value"] == pytest.approx(nats / math.log(2))


def test_rows_are_measured_against_the_training_text(toy, monkeypatch):
    """Token frequencies, not the other way around; and the interval of a statistic of all samples,
    which for a mean is known."""
    judge = inside(monkeypatch, EVALUATE, names(toy[0] / "out", "flm"), "--scorer=", "--device=cpu",
                   f"--dataset={toy[0] / 'data'}", "--num_samples=20")
    counts = np.bincount(Data(str(toy[0] / "data"), "train", 8, 1).tokens, minlength=16)
    held_out = np.bincount(judge["held_out_tokens"].ravel(), minlength=16)
    assert judge["rows"][0]["unigram_kl"]["value"] == metrics.unigram_kl(counts, held_out)
    x = np.random.default_rng(1).normal(size=(400, 1))
    found = judge["of_all"](lambda rows: rows.mean(), x)
    half = (found["high"] - found["low"]) / 2
    assert half == pytest.approx(1.96 * x.std() / 20, rel=0.25)


def test_a_flow_without_a_clock_is_sampled_without_one(toy, tmp_path, monkeypatch):
    real, clocks = flow.sample, []
    monkeypatch.setattr(flow, "sample", lambda net, clock, *rest, **options:
                        clocks.append(clock) or real(net, clock, *rest, **options))
    quick_run("train.py", *toy[1], *TINY, f"--out_dir={tmp_path}", "--method=noclock",
              "--max_iters=1")
    inside(monkeypatch, EVALUATE, names(tmp_path, "noclock"), f"--dataset={toy[0] / 'data'}",
           "--scorer=", "--num_samples=4", "--steps=3", "--device=cpu")
    t = torch.rand(5).double()
    assert len(clocks) == 1 and torch.equal(clocks[0].t_of_tau(t), t)


class Foreign(torch.nn.Module):
    """A causal model as transformers has them. Its next byte depends on this one alone."""

    def __init__(self):
        super().__init__()
        self.table = torch.randn(128, 128, generator=torch.Generator().manual_seed(5))
        self.config = SimpleNamespace(max_position_embeddings=7)

    def forward(self, ids, attention_mask):
        return SimpleNamespace(logits=self.table[ids])


@pytest.mark.parametrize("read", [0, 7])
def test_a_foreign_scorer_sees_text_in_its_own_tokens(trained, tmp_path, monkeypatch, read):
    """Begin-of-text first, six tokens at most, texts of any length in one batch; the first `read`
    texts, or all."""
    out, data = trained

    def tokenizer(text, add_special_tokens):
        assert not add_special_tokens
        return dict(input_ids=[ord(c) for c in text.replace("th", "T")])  # of different lengths
    tokenizer.bos_token_id, tokenizer.eos_token_id = 1, 2
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(
        AutoTokenizer=SimpleNamespace(from_pretrained=lambda name: tokenizer),
        AutoModelForCausalLM=SimpleNamespace(from_pretrained=lambda name, dtype: Foreign())))
    row = inside(monkeypatch, EVALUATE, names(out, "ar"), f"--dataset={data}", "--num_samples=20",
                 "--scorer=some/lm", f"--scorer_samples={read}", *CPU)["rows"][0]
    held_out = Data(str(data), "val", 8, 1)
    encoding, log_p = tokenizer_from_dict(held_out.tokenizer), Foreign().table.log_softmax(-1)
    nats, count = 0.0, 0
    for tokens in held_out.rows(0, 20)[:read or 20].tolist():
        ids = [1] + [ord(c) for c in encoding.decode(tokens).replace("th", "T")][:6]
        nats -= sum(log_p[a, b].item() for a, b in zip(ids, ids[1:]))
        count += len(ids) - 1
    assert row["perplexity lm"]["value"] == pytest.approx(math.exp(nats / count), rel=1e-4)


# ---------------------------------------------------------------------- the paper's protocol


END = 2                                                             # the fake judge's end of text


def fake_judge(monkeypatch, context):
    """Bytes as tokens, "#" as end of text; `Foreign` predicts. Its log-probabilities."""
    def tokenizer(text, add_special_tokens):
        assert not add_special_tokens
        text = text.replace("<|endoftext|>", "#")
        return dict(input_ids=[END if c == "#" else ord(c) for c in text])
    tokenizer.bos_token_id, tokenizer.eos_token_id = 1, END
    model = Foreign()
    model.config.max_position_embeddings = context
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(
        AutoTokenizer=SimpleNamespace(from_pretrained=lambda name: tokenizer),
        AutoModelForCausalLM=SimpleNamespace(from_pretrained=lambda name, dtype: model)))
    return tokenizer, model


@pytest.mark.parametrize("text, counted", [
    ("abcdefgh", "bcdefgh"),  # the longest has no padding
    ("abcdefghij", "bcdefgh"),  # cut to eight tokens
    ("abc", "bc#"),  # the first padding is the first end of text
    ("ab#", "b#"),  # the text's own end; then padding, which is not the first
    ("a#cd#f", "#cdf"),  # ordinary tokens after an end count, a second end does not
    ("#bc#", "bc"),  # the first end counts, but the first token is not scored
    ("##", ""),
    ("", ""),
])
def test_tokens_that_count_in_the_papers(text, counted, monkeypatch):
    """`counted` are the tokens by hand. Each text stands beside seven of eight tokens."""
    tokenizer, model = fake_judge(monkeypatch, 8)
    texts, machine = [*["abcdefgh"] * 7, text], Machine("cpu", "float32")
    losses, counts = scorers.score_as_published(tokenizer, model, machine, np.zeros((8, 8)), texts)
    ids = tokenizer(text + "#" * 8, add_special_tokens=False)["input_ids"][:8]
    log_p, left = model.table.log_softmax(-1), [END if c == "#" else ord(c) for c in counted]
    nats = 0.0
    for before, token in zip(ids, ids[1:]):  # the counted ones in their order
        if left and token == left[0]:
            nats -= log_p[before, left.pop(0)].item()
    assert not left and counts[-1] == len(counted)
    assert losses[-1] == pytest.approx(nats, rel=1e-5)


def test_the_papers_protocol(tmp_path, monkeypatch):
    """A judge in whole batches of eight, texts with their special tokens, in a row's entropy too.
    1,024 texts unless told otherwise; ours is the default."""
    lines = ["abab", "aabc", "c", "bb", "abcabcab"] * 8
    enc = write_lines_set(tmp_path / "lines", lines)
    texts = ["abab", "abcc", "c", "bb", "abcabcab", "ca", "ba", "aabc", "cccc", "b"]
    write_texts(tmp_path / "texts.jsonl", texts)
    _, model = fake_judge(monkeypatch, 9)
    words = [EVALUATE, f"--source={tmp_path / 'texts.jsonl'}", *CPU, "--scorer=some/lm",
             f"--dataset={tmp_path / 'lines'}"]
    found = inside(monkeypatch, *words, "--protocol=paper")
    row = found["rows"][1]
    assert found["num_samples"] == found["settings"]["num_samples"] == 1024
    log_p, nats, count = model.table.log_softmax(-1), 0.0, 0
    for text in texts[:8]:                                          # ten do not fill two batches
        ids = [ord(c) for c in f" {text}"] + [END] * (8 - len(text))
        scored = list(zip(ids, ids[1:]))[:len(text) + 1]            # with one end of text
        nats -= sum(log_p[a, b].item() for a, b in scored)
        count += len(scored)
    assert row["perplexity lm"]["value"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    rows = [enc.encode(f" {text}") + [enc.eot_token] * (8 - len(text)) for text in texts]
    entropies = [sum(-c / 9 * math.log(c / 9) for c in Counter(row).values()) for row in rows]
    assert row["entropy"]["value"] == pytest.approx(np.mean(entropies))
    default = inside(monkeypatch, *words)
    assert default["num_samples"] == 1000
    assert default["rows"][1]["entropy"]["value"] != row["entropy"]["value"]
    assert default["rows"][1]["perplexity lm"]["value"] != row["perplexity lm"]["value"]


def test_the_papers_protocol_samples_the_authors_way(trained, tmp_path, monkeypatch):
    """A flow and a flow map, for gamma between 0 and 1."""
    out, data = trained
    words = [EVALUATE, names(out, "flm", "fmlm"), f"--dataset={data}", "--num_samples=12",
             "--scorer=", "--steps=3", *CPU]
    found = {}
    for protocol, gamma in itertools.product(("ours", "paper"), (0.6, 1)):
        rows = inside(monkeypatch, *words, f"--protocol={protocol}", f"--gamma={gamma}")["rows"]
        found[protocol, gamma] = [row["unigram_kl"] for row in rows[1:]]
    assert found["ours", 1] == found["paper", 1] and len(found["ours", 1]) == 2
    for ours, theirs in zip(found["ours", 0.6], found["paper", 0.6]):
        assert ours != theirs


# ------------------------------------------------------------------------------ naive texts


def test_our_scorer_reads_padding_as_the_last_token(trained):
    """A released network may have one token more than the scorer."""
    net = ckpt.build_model(ckpt.load_checkpoint(trained[0] / "ar.pt"), torch.device("cpu"))
    V, machine = net.config.vocab_size, Machine("cpu", "float32")
    (padded, plain), counts = scorers.score_ours(net, machine, np.array([
        [1, V, 2, -1], [1, V - 1, 2, -1]]), ["", ""])
    assert padded == plain and counts.tolist() == [3, 3]


def test_naive_rows_have_the_measures_of_a_model(trained, tmp_path, monkeypatch):
    """On the toy, whose held-out text is in its training text. No model need be there."""
    said, record = judged(trained, tmp_path, names(trained[0], "flm"), "--naive")
    again = inside(monkeypatch, EVALUATE, "--source=", "--naive", "--block_size=8", *CPU,
                   f"--dataset={trained[1]}", f"--scorer={trained[0] / 'ar.pt'}",
                   "--num_samples=12")["rows"]
    rows = {row["name"]: row for row in record["rows"]}
    naive = [row for name, row in rows.items() if name.startswith("naive: ")]
    assert [row["name"] for row in record["rows"]][0] == "held-out text"
    assert record["rows"][1:5] == naive == again[1:]
    for row in naive:
        assert row.keys() == rows["held-out text"].keys()
        assert rows["flm, 1 steps, argmax, noise x 1"].keys() >= row.keys()
        assert f"{row['name']:34}  different " in said and row["distance"]["low"] is not None
    unigrams, bigrams, tiled, verbatim = naive
    assert unigrams["perplexity ar.pt"]["value"] > verbatim["perplexity ar.pt"]["value"]
    assert tiled["distance"]["low"] > 0 and unigrams["distance"]["low"] > 0
    assert verbatim["distance"]["low"] < 0 < verbatim["distance"]["high"]
    assert tiled["copied"]["value"] == verbatim["copied"]["value"] == 1
    assert tiled["different"]["value"] == 1 / 12 and bigrams["copied"]["value"] < 1


# ------------------------------------------------------------------------------ released files


def test_a_released_file_of_any_vocabulary_is_judged(tmp_path, monkeypatch):
    """It does not say its length: 64 then, or --block_size, also where V tells another."""
    V, generator = 90, torch.Generator().manual_seed(0)

    def wider(t):
        return torch.randn(V, *t.shape[1:], generator=generator) if len(t) == 12 else t
    for kind in ("flm", "fmlm"):
        file = torch.load(ROOT / "tests" / "fixtures" / f"released_{kind}.ckpt")
        file["state_dict"] = {name: wider(t) for name, t in file["state_dict"].items()}
        file["ema"]["shadow_params"] = [wider(t) for t in file["ema"]["shadow_params"]]
        torch.save(file, tmp_path / f"{kind}.ckpt")
    write_set(tmp_path / "data", "".join(map(chr, range(33, 33 + V))) * 20)
    for kind, words, length in (("fmlm", (), 64), ("flm", ("--block_size=16", "--bound"), 16)):
        monkeypatch.setitem(released.LENGTHS, V, 32 if kind == "flm" else 0)
        found = inside(monkeypatch, EVALUATE, f"--source={tmp_path / kind}.ckpt", "--num_samples=4",
                       "--scorer=", f"--dataset={tmp_path / 'data'}", *words, *CPU)
        assert [row.get("kind") for row in found["rows"]] == [None, kind]
        assert found["rows"][0]["longest_copy"]["value"] == length == found["L"]
        assert len(found["likelihoods"]) == (kind == "flm")


GROUPS = ["--num_samples=16", "--batch_size=8"]  # in the groups of sample.py the texts are the same


def test_every_run_in_a_file_is_a_row(trained, tmp_path):
    """Several numbers of steps, of flow map and flow, as sample.py writes them into one file, are
    judged apart, and like those of the checkpoint."""
    out, _ = trained
    path = tmp_path / "texts.jsonl"
    quick_run("sample.py", f"--out_dir={out}", "--steps=1,2", "--flow_steps=2", "--num_samples=16",
              f"--out={path}", *CPU)
    _, record = judged(trained, tmp_path, names(out, "fmlm", "flm") + f",{path}", "--steps=1,2",
                       *GROUPS)
    rows = {row["name"]: row["perplexity ar.pt"] for row in record["rows"]}
    assert rows[f"{path} model=FMLM steps=1"] == rows["fmlm, 1 steps, argmax, noise x 1"]
    assert rows[f"{path} model=FMLM steps=2"] == rows["fmlm, 2 steps, argmax, noise x 1"]
    assert rows[f"{path} model=FLM steps=2"] == rows["flm, 2 steps, argmax, noise x 1"]


def test_tokens_of_another_vocabulary_are_not_taken_for_ours(trained, tmp_path):
    """Small numbers fit every vocabulary. Where they do not spell their text, the text counts."""
    _, data = trained
    held_out = Data(str(data), "val", 8, 1)
    encoding = tokenizer_from_dict(held_out.tokenizer)
    texts = [encoding.decode(row) for row in held_out.rows(0, 12).tolist()]
    paths = [tmp_path / "none.jsonl", tmp_path / "theirs.jsonl"]
    for path, ids in zip(paths, ({}, dict(tokens=[0, 1, 2, 3, 4, 5, 6, 7]))):
        path.write_text("\n".join(json.dumps(dict(text=text, **ids)) for text in texts))
    _, record = judged(trained, tmp_path, f"--source={paths[0]},{paths[1]}", "--block_size=8")
    held, none, theirs = (row["perplexity ar.pt"]["value"] for row in record["rows"])
    assert held == none == theirs


# ------------------------------------------------------------------------------ lines


def write_lines_set(folder, lines, checker=None):
    """A set of lines as rows of 9 characters, the first four also held out. Its encoding."""
    enc = tokenizer.char_encoding("".join(lines) + " ", "lines", ("<|endoftext|>",))
    rows = np.full((len(lines), 9), enc.eot_token)
    for row, line in zip(rows, lines):
        ids = enc.encode(f" {line}")
        row[:len(ids)] = ids
    corpus.write_bins(folder, enc, [rows], [rows[:4]], 9, checker=checker)
    return enc


def write_texts(path, texts):
    path.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))


def judge_texts(tmp_path, texts, *words):
    """What evaluate.py printed, and the row of the texts, beside the set tmp_path / "lines"."""
    write_texts(tmp_path / "texts.jsonl", texts)
    said = quick_run(EVALUATE, f"--source={tmp_path / 'texts.jsonl'}", *CPU, *words,
                     f"--dataset={tmp_path / 'lines'}", f"--out={tmp_path / 'rows.json'}")
    return said, json.loads((tmp_path / "rows.json").read_text())["rows"][1]


def test_a_checker_finds_every_mistake_without_a_scorer(tmp_path):
    write_lines_set(tmp_path / "lines", ["abcddcba", "aabbbbaa", "bbaaaabb", "ccaaaacc"] * 3,
                    "data.palindromes.prepare")
    texts = ["abccccba", "abccccba", "abcddcba", "dbccccba", "abccccbd", "abc", "a", "abcdabcd"]
    said, row = judge_texts(tmp_path, texts)
    assert row["samples"] == 8 and row["valid"]["value"] == 3 / 8
    assert (row["valid"]["low"], row["valid"]["high"]) == metrics.wilson(np.arange(8) < 3)
    assert row["different"]["value"] == 7 / 8 and row["verbatim"]["value"] == 1 / 8
    check = importlib.import_module("data.palindromes.prepare").check
    kinds = [(kind["kind"], kind["count"], kind["text"]) for kind in row["mistakes"]]
    assert kinds == [("letters differ", 4, "dbccccba"), ("wrong length", 1, "a")]
    for kind in row["mistakes"]:
        assert kind["mistake"] == check(kind["text"])
        assert f"{kind['count']:6}  {kind['mistake']}\n          {kind['text']}" in said
    assert not any("perplexity" in key for key in row)


def test_padding_counts_nowhere(tmp_path):
    """Texts of a set of lines end before the first end of text. Two texts differ only after it."""
    lines = ["abab", "aabc", "c", "bbbbbbbb", "abcabcab", "cc"]
    enc = write_lines_set(tmp_path / "lines", lines)
    eos, a, space = enc.eot_token, *enc.encode("a ")
    records = [dict(text="a", tokens=[space, a, eos, *[tail] * 6]) for tail in (eos, a)]
    (tmp_path / "tokens.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    quick_run(EVALUATE, f"--source={tmp_path / 'tokens.jsonl'}", "--scorer=", *CPU,
              f"--dataset={tmp_path / 'lines'}", f"--out={tmp_path / 'rows.json'}")
    held_out, row = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["different"]["value"] == 1 / 2 and row["entropy"]["value"] == math.log(2)
    assert row["longest_copy"]["value"] == 2 and row["verbatim"]["value"] == 0
    entropies = [metrics.sample_entropies(np.array([enc.encode(f" {line}")]))[0]
                 for line in lines[:4]]
    assert held_out["entropy"]["value"] == pytest.approx(np.mean(entropies))
    assert held_out["verbatim"]["value"] == 1
    assert held_out["entropy"] == judge_texts(tmp_path, lines[:4], "--scorer=")[1]["entropy"]


def test_a_scorer_reads_lines_without_their_padding(tmp_path, monkeypatch):
    """A foreign one their text; ours the tokens before the first end of text."""
    enc = write_lines_set(tmp_path / "lines", lines := ["abab", "aabc", "c", "bb"] * 8)
    quick_run("train.py", f"--dataset={tmp_path / 'lines'}", f"--out_dir={tmp_path}", *QUICK,
              *TINY[:-2], "--block_size=9", "--batch_size=8", "--method=ar")
    net = ckpt.build_model(ckpt.load_checkpoint(tmp_path / "ar.pt", "ar"), torch.device("cpu"))
    nats, count = 0.0, 0
    for line in lines[:4]:
        y = torch.tensor([enc.encode(f" {line}") + [enc.eot_token] * (8 - len(line))])
        with torch.no_grad():
            nats += baselines.ar.loss(net, None, y, torch.ones(1), None)[1][0, :len(line) + 1].sum()
        count += len(line) + 1
    _, row = judge_texts(tmp_path, lines[:4], f"--scorer={tmp_path / 'ar.pt'}")
    assert row["perplexity ar.pt"]["value"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    read = []

    def tokenizer(text, add_special_tokens):
        read.append(text)
        return dict(input_ids=[ord(c) for c in text])
    tokenizer.bos_token_id = tokenizer.eos_token_id = 1
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(
        AutoTokenizer=SimpleNamespace(from_pretrained=lambda name: tokenizer),
        AutoModelForCausalLM=SimpleNamespace(from_pretrained=lambda name, dtype: Foreign())))
    inside(monkeypatch, EVALUATE, f"--source={tmp_path / 'texts.jsonl'}", *CPU, "--scorer=some/lm",
           f"--dataset={tmp_path / 'lines'}")
    assert sorted(read) == sorted(lines[:4] * 2)                    # held out, and of the file


def test_a_checker_that_is_none_is_one_line(tmp_path, monkeypatch):
    for checker in ("data.nothing", "data.loader", 5):
        write_lines_set(tmp_path / "lines", ["abab", "aabc"] * 3, checker)
        assert f"names the checker {checker}, which has no check(text)" in mistake(
            monkeypatch, EVALUATE, f"--source={tmp_path}/x.jsonl",
            f"--dataset={tmp_path / 'lines'}")


def test_temperatures_are_matched(trained, tmp_path):
    """The perplexity where the sweep crosses the data's entropy lies between its neighbours, also
    for a one-step flow, whose tokens are drawn."""
    out, _ = trained
    _, record = judged(trained, tmp_path, names(out, "mdlm", "fmlm"), "--steps=1",
                       "--temperatures=argmax,0.0005,50", "--num_samples=40")
    target = record["rows"][0]["entropy"]["value"]
    for kind in ("mdlm", "fmlm"):
        rows = [row for row in record["rows"] if row.get("kind") == kind]
        assert [row["temperature"] for row in rows] == ["argmax"] * (kind == "fmlm") + [0.0005, 50]
        cold, hot = (row["entropy"]["value"] for row in rows[-2:])
        assert cold < hot - 0.1, kind
        found = record["matched"][str(out / f"{kind}.pt")]["1"]["ar.pt"]
        assert (found is not None) == (cold <= target <= hot), kind
        if found:
            low, high = sorted(row["perplexity ar.pt"]["value"] for row in rows[-2:])
            assert low <= found["value"] <= high, kind
            assert found["low"] <= found["value"] <= found["high"], kind


def test_a_flow_map_is_swept_by_the_size_of_its_noise(trained, tmp_path):
    """By argmax from smaller noise, and from guesses on the way at a temperature below 1. In one
    step, which has no way, from larger noise. sample.py makes the same texts at a temperature."""
    out, _ = trained

    def ways(record):
        return [(row["kind"], row["temperature"], row["noise_scale"]) for row in record["rows"][1:]]
    _, record = judged(trained, tmp_path, names(out, "mdlm", "fmlm"), "--steps=2", *GROUPS,
                       "--temperatures=argmax,0.001,2", "--noise_scales=0.5,1,2")
    assert ways(record) == [("mdlm", 0.001, 1), ("mdlm", 2, 1), ("fmlm", "argmax", 1),
                            ("fmlm", 0.001, 1), ("fmlm", "argmax", 0.5)]
    ours = [row["perplexity ar.pt"] for row in record["rows"][3:]]
    assert ours[2] != ours[0]
    path = tmp_path / "same.jsonl"
    quick_run("sample.py", f"--out_dir={out}", "--steps=2", "--num_samples=16",
              "--temperature=0.001", f"--out={path}", *CPU)
    _, of_file = judged(trained, tmp_path, f"--source={path}", "--block_size=8")
    assert of_file["rows"][1]["perplexity ar.pt"] == ours[1] != ours[0]
    _, record = judged(trained, tmp_path, names(out, "fmlm"), "--steps=1",
                       "--temperatures=argmax,0.5", "--noise_scales=0.5,1,2")
    assert ways(record) == [("fmlm", "argmax", scale) for scale in (1, 2, 0.5)]


def test_blanks_of_stories(tmp_path, monkeypatch, capsys):
    """What each blank tells of a held-out story, and that it is told: what networks that have
    learned nothing write has these words."""
    data, out = tmp_path / "stories", tmp_path / "out"
    inside(monkeypatch, "data/stories/prepare.py", f"--out_dir={data}", "--n_train=64",
           "--n_val=16")
    tiny = [f"--dataset={data}", f"--out_dir={out}", *QUICK, "--max_iters=1", "--eval_iters=1",
            "--batch_size=8"]
    for method in ("flm", "mdlm"):
        quick_run("train.py", f"--method={method}", *tiny, *TINY[:4], "--block_size=64",
                  f"--context_share={0.5 * (method == 'flm')}")
    quick_run("distill.py", *tiny, "--context_share=0.5")
    written, ends, text_of = [], [], loader.text_of
    monkeypatch.setattr(loader, "text_of", lambda encoding, row, told: (
        written.append(row), ends.append(told), text_of(encoding, row, told))[2])
    told = inside(monkeypatch, "eval/blanks.py", f"--source={out}/fmlm.pt,{out}/mdlm.pt",
                  f"--dataset={data}", "--num_samples=4", "--batch_size=3", "--steps=1,2", *CPU,
                  f"--out={tmp_path / 'rows.json'}")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["model"], row["blank"], row["steps"]) for row in rows] == list(itertools.product(
        ("fmlm", "fmlm, refined", "mdlm", "mdlm, surest first"), told["KNOWN"], (1, 2)))
    y, known = told["y"], list(told["KNOWN"].values())
    for i in range(0, len(written), 4):
        blank = known[i // 8 % 6]
        assert torch.equal(torch.tensor(written[i:i + 4])[blank], y[blank])
    words = [told["words"][token] for token in y[0]]
    first = words.index(".") + 1
    assert ends[0] == first and ends[-1] == 0                       # the first blank, and the last
    second = first + words[first:].index(".") + 1
    nouns, listed = ({word for name in names for word in told["CLASSES"][name]} for names in (
        "toy place room gift kin glue animal food".split(), told["CLASSES"]))
    assert [row[0].tolist() for row in known] == [
        [place < first for place in range(64)],
        [not first <= place < second for place in range(64)], [True, False] * 32,
        [word not in nouns for word in words], [word not in listed for word in words],
        [False] * 64]


def test_gamma_draws_fresh_noise_for_flows_and_flow_maps(trained, tmp_path):
    source = names(trained[0], "flm", "fmlm")
    still, again, stirred = (judged(trained, tmp_path, source, "--steps=8", f"--gamma={gamma}")[1]
                             ["rows"] for gamma in (0, 0, 0.7))
    for kind in (1, 2):
        assert still[kind] == again[kind]
        assert still[kind]["perplexity ar.pt"] != stirred[kind]["perplexity ar.pt"]


def test_discrete_distillation_resumes_after_a_round(trained, tmp_path, monkeypatch):
    """Stopped after the first of two rounds and continued: as if never stopped."""
    out, data = trained
    words = [DISTILL, "--method=sdtt", f"--dataset={data}", f"--teacher_path={out / 'mdlm.pt'}",
             "--rounds=2", "--max_iters=4", "--batch_size=8", *CPU]
    quick_run(*words, f"--out_dir={tmp_path / 'whole'}")
    real = ckpt.save_checkpoint

    def stop(path, checkpoint):
        real(path, checkpoint)
        sys.exit("stopped")
    monkeypatch.setattr(ckpt, "save_checkpoint", stop)
    assert mistake(monkeypatch, *words, f"--out_dir={tmp_path / 'parts'}") == "stopped"
    assert ckpt.load_checkpoint(tmp_path / "parts" / "sdtt.pt")["step"] == 1
    quick_run(*words, f"--out_dir={tmp_path / 'parts'}", "--init_from=resume")
    whole, parts = (ckpt.load_checkpoint(tmp_path / name / "sdtt.pt", "sdtt")
                    for name in ("whole", "parts"))
    teacher = ckpt.load_checkpoint(out / "mdlm.pt")["ema"]
    assert whole["step"] == 2 and not same(whole["model"], teacher)
    assert all(same(whole[key], parts[key]) for key in ("model", "ema", "optimizers"))


def test_a_discrete_distillation_that_diverges_says_so(trained, tmp_path):
    out, data = trained
    said = quick_run(DISTILL, f"--dataset={data}", f"--out_dir={tmp_path}", *CPU, "--rounds=1",
                     f"--teacher_path={out / 'mdlm.pt'}", "--learning_rate=1e30", "--max_iters=20",
                     "--log_interval=5", "--warmup_iters=0", "--batch_size=8", status=1)
    assert "error: the loss is not finite at step 5" in said
    assert not (tmp_path / "sdtt.pt").exists()


@pytest.mark.parametrize("program, words, complaint", [
    (EVALUATE, "--source=nowhere.pt", "no checkpoint nowhere.pt"),
    (EVALUATE, "--source=nowhere.jsonl --scorer=", "nowhere.jsonl is no .jsonl with a text"),
    (EVALUATE, "--source=LINES --scorer=", "LINES is no .jsonl with a text a line (ValueError: "),
    (EVALUATE, "--source=OUT/flm.pt --scorer=OUT/flm.pt", "what is needed here is a baseline (ar)"),
    (EVALUATE, "--source=OUT/flm.pt --scorer=nowhere/lm", "--scorer= for none"),
    (EVALUATE, "--source=OUT/flm.pt --block_size=16", "8 and 16 tokens cannot be judged together"),
    (EVALUATE, "--source=x.jsonl --scorer= --block_size=3", "texts of 3 tokens cannot be judged"),
    (EVALUATE, "--source=x.jsonl --scorer= --block_size=390", "two held-out texts"),
    (EVALUATE, "--protocol=theirs", "protocol=theirs: choose ours, paper"),
    (EVALUATE, "--source= --scorer=OUT/ar.pt --protocol=paper", "ar.pt is a model of ours, which"),
    (EVALUATE, "--source=OUT/gamma.jsonl --scorer= --protocol=paper",
     "protocol=paper wants the authors' gamma sampling, and sample.py does ours"),
    (EVALUATE, "--num_samples=1", "num_samples=1: one text cannot be compared"),
    (EVALUATE, "--device=mps", "device=mps: drawing tokens takes float64, which Apple GPUs lack"),
    (EVALUATE, "--temperatures=warm", "expected positive numbers up to 1,000,000, such as 0.8,1"),
    (EVALUATE, "--noise_scales=1,-1", "noise_scales=1,-1: expected positive numbers up to"),
    (DISTILL, "--max_iters=4", "max_iters=4 is less than one step for each of 5 rounds"),
    (DISTILL, "--first_step=0.1", "first_step=0.1 in 5 rounds ends in steps longer than all of"),
    (DISTILL, "--learning_rate=1e-6", "the cosine would rise from learning_rate=1e-06 to min_lr="),
    (DISTILL, "--method=psd", "method=psd: choose sdtt, dcd"),
    (DISTILL, "--teacher_path=OUT/flm.pt", "what is needed here is a baseline (mdlm)"),
    ("train.py", "--method=ar --attention_softcap=50", "method=ar has no soft cap on its"),
    ("train.py", "--method=gan", "choose flm, ar, dense, duo, mdlm, mse, noclock"),
    ("sample.py", "--init_from=OUT/mdlm.pt", "is a baseline (mdlm), which sample.py would read as"),
    ("eval/evidence.py", "--report --results=nowhere", "no measurements in nowhere"),
    ("eval/evidence.py", "--sets=mnist --report", "sets=mnist: choose palindromes, stories"),
])
def test_mistakes(program, words, complaint, trained, monkeypatch):
    out, data = trained
    lines = out / "lines.jsonl"
    lines.write_text('{"tokens": ["a", "b"]}\n')
    (out / "gamma.jsonl").write_text('{"tokens": [1, 2], "gamma": 0.5}\n' * 3)
    words = words.replace("OUT", str(out)).replace("LINES", str(lines)).split()
    words += [f"--dataset={data}"] * (program == EVALUATE)
    assert complaint.replace("LINES", str(lines)) in mistake(monkeypatch, program, *words)
