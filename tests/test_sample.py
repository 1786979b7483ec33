"""python -m pytest tests/test_sample.py

What sample.py shows a person: where a text ends, the table, wrong texts, the weights that come with
the code. The texts themselves are tested in test_scripts.py.
"""

import os
import runpy
import shutil
import sys

import pytest
import torch
from conftest import ROOT
from programs import QUICK, TINY, inside, log, mistake

import flow
import flowmap
from data import corpus, loader, tokenizer
from data.lines import line_rows
from data.loader import find_check, text_of, tokenizer_from_dict
from lib import checkpoint as ckpt
from lib.watch import spell

# ------------------------------------------------------------------------------ rows to text

ENC = tokenizer.char_encoding("abcd \né", "letters", special=("<|endoftext|>",))
EOS = ENC.eot_token


@pytest.mark.parametrize("words, text", [
    (["abc", EOS, EOS], "abc"), (["abc"], "abc"), (["ab", EOS, "cd", EOS], "ab"),   # a line
    ([" ab\n", EOS], " ab\n"), (["é", EOS], "é"),
    ([EOS, "ab", EOS, "cd"], "ab\n\ncd"), ([EOS, "ab", EOS, EOS, "cd", EOS], "ab\n\ncd"),   # packed
    ([EOS, EOS], ""), ([], "")])
def test_a_text_ends_at_the_end_of_text(words, text):
    row = [i for word in words for i in ([word] if word == EOS else ENC.encode(word))]
    assert text_of(ENC, row) == text


def test_a_text_ends_after_the_last_token_that_was_told():
    a, b = ENC.encode("ab")
    assert text_of(ENC, [a, EOS, b, a, EOS, b], 3) == "a<|endoftext|>ba"
    assert text_of(ENC, [a, EOS, b], 1) == "a" and text_of(ENC, [EOS, a, EOS, b], 2) == "a\n\nb"


def test_tokenizers_without_an_end_of_text():
    plain = tokenizer.char_encoding("abcd", "letters")
    assert text_of(plain, [3, 0, 1]) == "dab"
    again = tokenizer_from_dict(tokenizer.to_dict(ENC))                 # as a checkpoint holds it
    assert text_of(again, [*again.encode("ab"), EOS, 0]) == "ab"


def test_the_text_of_each_token():
    """As --watch shows it: to the end of the text. An end of text in front begins a packed row."""
    a, b = ENC.encode("ab")
    assert spell(ENC, [a, b, EOS, a]) == ["a", "b"] and spell(ENC, []) == []
    assert spell(ENC, [a, EOS, b, EOS], 3) == ["a", "<|endoftext|>", "b"]
    assert spell(ENC, [EOS, a, EOS, b]) == ["", "a", "\n\n", "b"]
    halves = tokenizer.train_bpe("é\t", 4, "bytes")  # a letter of two tokens, a control character
    assert spell(halves, halves.encode("é\t")) == ["", "é", ""]
    assert spell(halves, [halves.encode("é")[0], halves.eot_token]) == [""]


def test_a_checkpoint_can_only_name_modules_of_data():
    assert find_check("data.palindromes.prepare")("abcddcba") is None
    for name in (None, "", 5, "os", "this", "data", "data.", "data.nothing", "data..loader",
                 "data.loader", "lib.checkpoint", "database.check"):
        assert find_check(name) is None
    assert "this" not in sys.modules

# ------------------------------------------------------------------------------ what is printed

LINES = ["abccccba", "aabbbbaa", "bbaaaabb", "ccaaaacc"] * 20


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """A run of two steps on palindromes that are lines: rows of ten, padded."""
    folder = tmp_path_factory.mktemp("lines")
    ids = line_rows(LINES, ENC, 10)
    corpus.write_bins(folder / "data", ENC, [ids], [ids[:16]], 10,
                      checker="data.palindromes.prepare")
    with pytest.MonkeyPatch.context() as patch:
        for script, words in (("train.py", [*TINY, "--block_size=10"]),
                              ("distill.py", ["--batch_size=8"])):
            inside(patch, script, *QUICK, *words, "--max_iters=2", f"--out_dir={folder}",
                   f"--dataset={folder / 'data'}")
    return folder


def said(lines, monkeypatch, capsys, texts, *words):
    """What sample.py prints if the samplers give these texts, again and again."""
    rows = [(ENC.encode(text) + [EOS] * 1000)[:1000] for text in texts]

    def sample(net, clock, z, *rest, **more):
        sample.calls.append(len(z))
        return torch.tensor([rows[i % len(rows)] for i in range(len(z))])
    sample.calls = []
    monkeypatch.setattr(flow, "sample", sample)
    monkeypatch.setattr(flowmap, "sample", sample)
    inside(monkeypatch, "sample.py", f"--out_dir={lines}", "--device=cpu", *words)
    return capsys.readouterr().out, sample.calls


def test_short_texts_one_to_a_line_and_what_is_wrong(lines, monkeypatch, capsys):
    output, _ = said(lines, monkeypatch, capsys, [" abccccba", " abccccbd"], "--num_samples=6")
    table, texts = output.split("\n\n")
    assert texts.splitlines() == [
        "abccccba", "abccccbd  [letters differ: 'a' has the partner 'd']"] * 3
    header, row, note = table.splitlines()
    assert header.split() == ["model", "steps", "ms", "a", "text", "texts/s", "valid"]
    assert row.split()[:2] == ["FMLM", "1"] and row.endswith(" 50.0%")
    assert note == "(of 6 texts; ms for one alone, texts/s in groups of 8)"


def test_the_same_noise_side_by_side(lines, monkeypatch, capsys, tmp_path):
    path = tmp_path / "texts.jsonl"
    output, _ = said(lines, monkeypatch, capsys, [" abccccba", " ab"], "--num_samples=2",
                     "--steps=1,16", "--flow_steps=256", f"--out={path}")
    table, *pairs = output.split("\n\n")
    header, *rows, note = table.splitlines()
    assert {len(line) for line in (header, *rows)} == {len(header)}             # aligned
    assert [row.split()[:2] for row in rows] == [["FMLM", "1"], ["FMLM", "16"], ["FLM", "256"]]
    assert note.endswith(f"; all 6 are in {path}")
    for text, pair in zip(("abccccba", "ab  [letters differ: 'a' has the partner 'b']"), pairs):
        assert pair.strip("\n").splitlines() == [
            f"FMLM       1  {text}", f"FMLM      16  {text}", f"FLM      256  {text}"]
    assert [record["mistake"] is None for record in log(path)] == [True, False] * 3
    assert log(path)[0]["text"] == " abccccba"


@pytest.mark.parametrize("text", ["ab\ncd", "ab" * 300])
def test_long_texts_have_a_header_each(lines, text, monkeypatch, capsys):
    output, _ = said(lines, monkeypatch, capsys, [text, "ab"], "--num_samples=2")
    shown = output.split("==== sample 1\n")[1].split("==== sample 2\n")
    assert shown[0].startswith(text) and shown[1].startswith("ab  [")
    output, _ = said(lines, monkeypatch, capsys, [text], "--num_samples=1", "--steps=1,2")
    assert f"==== sample 1\nFMLM       1\n{text}" in output and f"FMLM       2\n{text}" in output


def test_the_work_is_linear_in_the_number_of_texts(lines, monkeypatch, capsys):
    """A call of the network for every eight texts, besides two to measure one alone; every text is
    spelled, checked and printed once."""
    counts = dict(spelled=0, checked=0)
    spell, check = loader.text_of, find_check("data.palindromes.prepare")

    def count(name, function):
        def counted(*args):
            counts[name] += 1
            return function(*args)
        return counted
    monkeypatch.setattr(loader, "text_of", count("spelled", spell))
    monkeypatch.setattr("data.palindromes.prepare.check", count("checked", check))
    output, calls = said(lines, monkeypatch, capsys, ["abccccba"], "--num_samples=2001")
    assert calls == [1, 1] + [8] * 251
    assert counts == dict(spelled=2001, checked=2001) and output.count("abccccba\n") == 2001


def test_a_long_run_says_how_long_it_takes(lines, monkeypatch, capsys):
    """Every five seconds, by a clock that goes on by one whenever it is read."""
    clock = iter(range(10_000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    inside(monkeypatch, "sample.py", f"--out_dir={lines}", "--device=cpu", "--num_samples=80")
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("FMLM, steps=1: 24 of 80 texts, ") and told[0].endswith(" s left")
    assert len(told) == 3

# ------------------------------------------------------------------------------ weights/


@pytest.fixture
def clone(toy, tmp_path, monkeypatch):
    """A folder like a fresh clone: sample.py and weights/stories, packed from the toy run."""
    shutil.copy(ROOT / "sample.py", tmp_path)
    inside(monkeypatch, "weights/pack.py", toy[0] / "out", tmp_path / "weights" / "stories")
    os.utime(tmp_path / "weights" / "stories" / "fmlm.pt", (0, 0))     # git keeps no times
    monkeypatch.chdir(tmp_path)

    def sample(*words):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--device=cpu", "--dtype=float32", *words])
        return runpy.run_path("sample.py", run_name="__main__")
    return sample


def test_a_fresh_clone_reads_the_weights_that_come_with_it(clone, toy, tmp_path, capsys):
    assert next(clone("--flow_steps=2")["net"].parameters()).dtype == torch.float32
    told = capsys.readouterr()
    assert told.err == "nothing trained in out/stories yet; reading weights/stories\n"
    assert "FLM        2" in told.out
    for words in (["--out_dir=out/stories"], ["--out_dir=nowhere"], ["--init_from=none.pt"]):
        with pytest.raises(SystemExit, match="error: no checkpoint .*; train.py writes flm.pt"):
            clone(*words)
    clone(f"--init_from={toy[0] / 'out' / 'fmlm.pt'}")
    assert capsys.readouterr().err == ""
    shutil.copytree(toy[0] / "out", tmp_path / "out" / "stories")
    clone()
    assert capsys.readouterr().err == ""
    (tmp_path / "out" / "stories" / "fmlm.pt").unlink()
    clone()
    assert capsys.readouterr().err.startswith("no flow map in out/stories ")
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "weights")
    with pytest.raises(SystemExit, match="error: no checkpoint out/stories/fmlm.pt; train.py"):
        clone()


def test_packed_weights_are_the_averages_in_half_the_bytes(clone, toy, tmp_path):
    for kind in ("flm", "fmlm"):
        path, original = tmp_path / "weights/stories" / f"{kind}.pt", toy[0] / "out" / f"{kind}.pt"
        small, whole = ckpt.load_checkpoint(path, kind), ckpt.load_checkpoint(original, kind)
        assert not {"model", "optimizers", "scaler"} & small.keys()
        net = ckpt.build_model(small, torch.device("cpu"))
        for name, p in net.named_parameters():
            assert p.dtype == torch.float32
            assert torch.equal(p, whole["ema"][name].bfloat16().float())
        assert path.stat().st_size < original.stat().st_size / 3
    clone("--flow_steps=2")                             # E is the same in both to the last bit


def test_packed_weights_teach_and_are_judged_but_are_not_resumed(clone, toy, tmp_path, monkeypatch,
                                                                 capsys):
    out = tmp_path / "weights" / "stories"
    for script, file, words in (("train.py", "flm.pt", TINY),
                                ("distill.py", "fmlm.pt", ["--batch_size=8"])):
        assert mistake(monkeypatch, script, *toy[1], *words, f"--out_dir={out}",
                       "--init_from=resume") == (
            f"error: {out / file} holds averaged weights only; it can be sampled and distilled, "
            f"not resumed")
    inside(monkeypatch, "distill.py", *toy[1], "--batch_size=8", "--max_iters=1",
           f"--out_dir={tmp_path / 'out'}", f"--teacher_path={out / 'flm.pt'}")
    inside(monkeypatch, "eval/evaluate.py", f"--source={out / 'fmlm.pt'}", "--scorer=",
           "--num_samples=8", f"--dataset={toy[0] / 'data'}", "--device=cpu")
    assert "fmlm, 1 steps" in capsys.readouterr().out


def test_packing_asks_for_two_folders(monkeypatch):
    assert mistake(monkeypatch, "weights/pack.py", "out/stories").startswith("error: name a run's")
