"""python -m pytest tests/test_text.py -q

Sets of lines and any text: chat, captions, tinystories, text; the tokenizer of words.
"""

import gzip
import json
import runpy
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
from test_data import own_cache, read_set, write_documents  # noqa: F401  a fixture and two helpers

from data import corpus, loader, tokenizer
from data.lines import every_20th, line_rows

ROOT = Path(__file__).resolve().parents[1]
ODD = ["Tom's  cat   was here.\n\nHe said \"don’t\"!\n", "नमस्ते दुनिया\t x-ray e.g. 3.14 ?!", "a",
       "  a b\r\nc\u2028d\x0b\x85e \n f", "I'll say 'twas\n\n\n  it. 😀 naïve"]


@pytest.fixture
def prepare(monkeypatch, capsys, tmp_path):
    """prepare(name, *options) runs data/<name>/prepare.py in this process, into tmp_path / "out":
    (the one line of its error or "", what it printed)."""
    monkeypatch.setattr(corpus, "run", lambda main: main())  # without its handling of Ctrl-C

    def call(name, *options):
        words = ["prepare.py", "--out_dir", tmp_path / "out", *options]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        error = ""
        try:
            runpy.run_path(str(ROOT / "data" / name / "prepare.py"), run_name="__main__")
        except SystemExit as end:
            error = end.code
            assert "\n" not in error and not (tmp_path / "out" / "meta.json").exists()
        return error, capsys.readouterr().out

    return call


def texts_of(enc, ids, row_length):
    """The text of each row; after the first end of text there is nothing else."""
    texts = []
    for row in ids.reshape(-1, row_length).tolist():
        n = row.index(enc.eot_token) if enc.eot_token in row else row_length
        assert set(row[n:]) <= {enc.eot_token}
        texts.append(loader.text_of(enc, row))
        assert texts[-1] == enc.decode(row[:n])
    return texts


# The tokenizer of words


@pytest.mark.parametrize("text", ODD)
def test_every_tokenizer_gives_the_text_back_also_through_a_file(text, tmp_path):
    size = len(set(text.encode())) + 1
    for enc in (tokenizer.word_encoding(text, 100, "w"), tokenizer.train_bpe(text, size, "b"),
                tokenizer.char_encoding(text, "c"),
                tokenizer.char_encoding(text, "c", special=("<|endoftext|>",))):
        tokenizer.save(enc, tmp_path / "t.json")
        again = loader.tokenizer_from_dict(json.loads((tmp_path / "t.json").read_text()))
        ids = tokenizer.encode_text(again, text)
        assert again.decode(ids.tolist()) == text and ids.max() < again.n_vocab


@pytest.mark.parametrize("text", ODD)
def test_words_are_counted_as_if_the_whole_text_were_cut(text):
    counts = Counter(regex.findall(tokenizer.WHOLE_WORD, text))
    enc = tokenizer.word_encoding(text, 100, "w")
    words = [token.decode() for token in sorted(enc._mergeable_ranks, key=enc._mergeable_ranks.get)]
    assert words == sorted(counts, key=lambda word: (-counts[word], word))
    assert len(tokenizer.encode_text(enc, text)) == sum(counts.values())
    assert enc.eot_token == enc.n_vocab - 1 == len(words)


def test_a_word_has_the_space_before_it():
    text = " Tom's dog, said Tom. Tom's!"
    enc = tokenizer.word_encoding(text, 99, "w")
    assert [enc.decode([i]) for i in tokenizer.encode_text(enc, text)] == [
        " Tom", "'s", " dog", ",", " said", " Tom", ".", " Tom", "'s", "!"]
    assert tokenizer.word_encoding(text, 3, "w").token_byte_values() == [b" Tom", b"'s"]
    with pytest.raises(ValueError, match="no text to take tokens from"):
        tokenizer.word_encoding("", 9, "w")
    with pytest.raises(ValueError, match="vocab_size 1: no room for a word"):
        tokenizer.word_encoding(text, 1, "w")


def test_an_unknown_word_is_not_spelt_by_letters():
    enc = tokenizer.word_encoding("a\nb\n a b", 99, "w")
    for text, piece in (("a\nab", "'ab'"), (" a ba", "' ba'")):
        with pytest.raises(ValueError, match=f"vocabulary 'w' has no token for {piece}$"):
            tokenizer.encode_text(enc, text)


# Rows of lines


def test_rows_of_lines_and_how_many_were_left_out(capsys):
    enc = tokenizer.word_encoding(" a b c.", 99, "w")
    lines = ["a b.", "", " c \t b ", "a x", "a b c a b", "a.b", "a b c a"]
    rows = line_rows(lines, enc, 4)
    assert rows.dtype == np.uint16 and texts_of(enc, rows, 4) == [" a b.", " c b", " a b c a"]
    # "a.b" has "b" without a space, another word than " b".
    assert capsys.readouterr().out == (
        "3 lines kept; left out 2 that the vocabulary cannot spell and 1 of more than 4 tokens\n")
    assert line_rows(["x"], enc, 4).shape == (0, 4)


@pytest.mark.parametrize("words, row_length", [(1, 8), (8, 8), (9, 16), (128, 128), (200, 128)])
def test_rows_as_long_as_the_longest_line(words, row_length):
    enc = tokenizer.word_encoding(" a", 2, "w")
    rows = line_rows(["a", " ".join("a" * words)], enc, None)
    assert rows.shape == (2 if words <= 128 else 1, row_length)


@pytest.mark.parametrize("n, held", [(2, [1]), (7, [6]), (20, [19]), (100, [19, 39, 59, 79, 99])])
def test_held_out_items(n, held):
    train, val = every_20th(range(n))
    assert val == held and sorted(train + val) == list(range(n))


def test_held_out_runs_of_neighbours():
    _, val = every_20th(range(4000))
    assert val == [i for run in range(380, 4000, 400) for i in range(run, run + 20)]


def test_byte_pairs_come_from_a_sample(monkeypatch):
    texts = ["ab cd ", "ef gh "] * 10 + ["xyz"]
    whole = tokenizer.train_bpe("".join(texts), 14, "b")
    assert tokenizer.to_dict(corpus.learn("bpe", texts, 14, "b")) == tokenizer.to_dict(whole)
    monkeypatch.setattr(corpus, "BPE_SAMPLE", 50)
    few = corpus.learn("bpe", [*texts, None], 10, "b")
    assert b"x" not in few.token_byte_values()


# data/text


LINES = [f"{name} has {n} {thing}s." for name in ("Ann", "Tom", "Zoë") for n in range(2, 10)
         for thing in ("cat", "dog", "hen")]  # 72 lines


@pytest.mark.parametrize("kind, size, V", [
    ("word", 15, 15), ("word", 999, 17), ("bpe", 50, 50), ("char", 4096, 26)])
def test_own_text_as_lines(prepare, tmp_path, kind, size, V):
    (tmp_path / "my.txt").write_text("\n".join([*LINES * 7, ""]) + "\n", encoding="utf-8")
    error, out = prepare("text", "--file", tmp_path / "my.txt", "--tokenizer", kind, "--lines",
                         "--vocab_size", size)
    assert error == "" and "72 different lines of 505\n" in out
    meta, enc, train, val = read_set(tmp_path / "out")
    L = meta["row_length"]
    assert meta["vocab_size"] == V
    train, val = texts_of(enc, train, L), texts_of(enc, val, L)
    assert set(train + val) <= {f" {line}" for line in LINES}
    assert len(set(train + val)) == len(train + val) and val
    lost = 72 - len(train + val)
    assert (lost > 0) == ("left out" in out) == (size == 15)
    counts = [int(n) for n in regex.findall(r"left out (\d+) that .* and 0 of more", out)]
    assert sum(counts) == lost
    assert f"next: python train.py --dataset={tmp_path / 'out'} --out_dir=out/out " in out
    assert f"--block_size={L}\n" in out


@pytest.mark.parametrize("kind, size", [("word", 999), ("bpe", 50), ("char", 4096)])
def test_own_text_as_a_stream(prepare, tmp_path, kind, size):
    text = "\n\n".join(LINES) + "\n"
    (tmp_path / "my.txt").write_text(text, encoding="utf-8")
    assert prepare("text", "--file", tmp_path / "my.txt", "--tokenizer", kind,
                   "--vocab_size", size)[0] == ""
    meta, enc, train, val = read_set(tmp_path / "out")
    assert meta["row_length"] is None and enc._special_tokens == {}
    train, val = enc.decode(train.tolist()), enc.decode(val.tolist())
    assert train + val == text and 0 <= len(train) - 0.95 * len(text) <= 15
    assert train.endswith("\n")


def test_a_stream_leaves_out_lines_with_rare_words(prepare, tmp_path):
    (tmp_path / "my.txt").write_text("a b\n" * 50 + "a rare b\n" + "b a\n" * 50)
    _, out = prepare("text", "--file", tmp_path / "my.txt", "--vocab_size", 5)
    assert out.startswith("95 lines kept; left out 1 that the vocabulary cannot spell\n")
    meta, enc, train, _ = read_set(tmp_path / "out")
    assert enc.decode(train.tolist()) == "a b\n" * 50 + "b a\n" * 45
    assert meta["vocab_size"] == 5


@pytest.mark.parametrize("content, options, message", [
    (None, "", "{}: no such file"),
    (b"", "", "{}: empty file"),
    (b"caf\xe9", "", "{}: not UTF-8 text"),
    (b"\n \n\t\n", "--lines", "cannot hold out one of 0 lines"),
    (b"a", "--lines", "cannot hold out one of 1 lines"),
    (b"a b\n" * 9, "", "too little text for the val split"),
    (b"a b\nb a\n", "--vocab_size 0", "vocab_size 0: no room for a word"),
    (b"a b\nb a\n", "--lines --vocab_size 1", "vocab_size 1: no room for a word"),
    (b"a b\nb a\n", "--lines --tokenizer bpe --vocab_size 2",
     "vocab_size 2: 3 bytes and 1 special tokens needed"),
    (b"a b\nb a\n", "--lines --tokenizer bpe --vocab_size 99",
     "vocab_size 99: the text only yields "),
    (b"a b\nb a\n", "--lines --vocab_size 2",
     "too few lines are left; raise --block_size or --vocab_size"),
    (b"a b\nb a\n", "--lines --block_size 1",
     "too few lines are left; raise --block_size or --vocab_size"),
    (b"a b\n", "--lines --block_size 0", "--block_size must be at least 1 and needs --lines"),
    (b"a b\n", "--block_size 8", "--block_size must be at least 1 and needs --lines"),
])
def test_mistakes_end_in_one_line(prepare, tmp_path, content, options, message):
    path = tmp_path / "my.txt"
    if content is not None:
        path.write_bytes(content)
    error, _ = prepare("text", "--file", path, *options.split())
    assert error.startswith("error: " + message.format(path))


# data/captions


def test_captions_of_a_picture_stay_together(prepare, tmp_path, monkeypatch):
    """Line n of each of the five files describes picture n."""
    pictures = [f"{tens} {ones}" for tens in "ABCD" for ones in "klmnopqrst"]

    def download(url):
        view = url[-len("1.en.gz")]
        return gzip.compress("".join(f"{picture} {view} .\n" for picture in pictures).encode())

    monkeypatch.setattr(corpus, "download", download)
    assert prepare("captions")[0] == ""
    meta, enc, train, val = read_set(tmp_path / "out")
    assert meta["row_length"] == 16
    train, val = texts_of(enc, train, 16), texts_of(enc, val, 16)
    assert sorted(val) == sorted(f" {p} {view} ." for p in ("b t", "d t") for view in range(1, 6))
    assert {text[:4] for text in train} == {f" {p.lower()}" for p in pictures} - {" b t", " d t"}


def test_captions_of_a_file(prepare, tmp_path):
    captions = [f"A {size} Dog on a {place} ." for size in ("big", "small") for place in LINES[:20]]
    path = write_documents(tmp_path, "c.parquet", [*captions, captions[3]])
    error, out = prepare("captions", "--file", path, "--block_size", 12, "--vocab_size", 20)
    assert error == "" and "40 different lines of 41\n" in out
    meta, enc, train, val = read_set(tmp_path / "out")
    assert (meta["vocab_size"], meta["row_length"]) == (20, 12)
    train, val = texts_of(enc, train, 12), texts_of(enc, val, 12)
    assert val and not set(train) & set(val)
    assert set(train + val) <= {f" {caption.lower()}" for caption in captions}


def test_captions_without_a_network(prepare, monkeypatch):
    def refuse(url, timeout):
        raise OSError("no route")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    error, _ = prepare("captions")
    assert error.startswith("error: cannot download https://raw.githubusercontent.com/multi30k/")
    assert error.endswith("/train.1.en.gz (no route); give a local copy with --file")


# data/chat


def chats(*turns):
    """The package's dataset.json: as many chats as turns, a message a text."""
    return {str(i): {"messages": [[{"text": text, "sender": "a"} for text in turn]]}
            for i, turn in enumerate(turns)}


def test_chat_of_a_file(prepare, tmp_path):
    good = ["I like it. Do you like  it too?\nyes I do", "Do you like it ?", "we don’t like it"]
    bad = ["I like Kyle a lot", "You are an idiot haha", "The odd dog slept gracefully.",
           "not four words", "one " * 15]
    (tmp_path / "d.json").write_text(json.dumps(chats(*[[*good, *bad]] * 3, ["do you like it"])))
    error, out = prepare("chat", "--file", tmp_path / "d.json")
    assert error == "" and "4 different lines of 10\n" in out
    meta, enc, train, val = read_set(tmp_path / "out")
    assert meta["row_length"] == 16
    assert texts_of(enc, train, 16) == [
        " do you like it too?", " do you like it ?", " we don't like it"]
    assert texts_of(enc, val, 16) == [" do you like it"]


@pytest.mark.parametrize("content", ["[]", "{", '{"a": {}}', '{"a": {"messages": [[{}]]}}', "3"])
def test_a_file_that_is_not_the_chats(prepare, tmp_path, content):
    (tmp_path / "d.json").write_text(content)
    error, _ = prepare("chat", "--file", tmp_path / "d.json")
    assert error.startswith(f"error: {tmp_path / 'd.json'}: not the chats of chitchat-dataset==")


def test_chat_without_its_package(prepare, monkeypatch):
    monkeypatch.setitem(sys.modules, "chitchat_dataset", None)
    assert prepare("chat")[0] == ("error: these chats are a package; run: pip install "
                                  "chitchat-dataset==0.9.0")


def test_the_chats_of_the_package(prepare, tmp_path, monkeypatch):
    """A tenth of them, since all take 5 s."""
    package = pytest.importorskip("chitchat_dataset", reason="chitchat-dataset is not installed")
    chats = json.loads((Path(package.__file__).parent / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(dict(list(chats.items())[::10])))
    monkeypatch.setattr(package, "__file__", str(tmp_path / "__init__.py"))
    error, _ = prepare("chat")
    meta, enc, train, val = read_set(tmp_path / "out")
    assert error == "" and meta["vocab_size"] == 1000
    train, val = set(texts_of(enc, train, 16)), set(texts_of(enc, val, 16))
    assert len(train) * 16 == meta["train_tokens"] and not train & val
    assert 5000 < len(train) < 10_000 and len(val) > 200
    assert not any({"adam", "harry", "dumb"} & set(text.split()) for text in train | val)


# data/tinystories


STORY = "Once upon a time there was a {} cat. It sat on the {}."


def test_tinystories(prepare, tmp_path, monkeypatch):
    stories = [STORY.format(a, b) for a in ("big", "old", "red", "sad") for b in LINES[:10]]
    monkeypatch.setattr(corpus, "BPE_SAMPLE", 2000)  # of 2,600: the last one drawn is not in it
    last = np.random.default_rng(1337).permutation(42)[-1]
    told = [*stories[:last], "Zoé.", *stories[last:], ""]
    path = write_documents(tmp_path, "s.parquet", [*told, "It sat. " * 9])
    options = "--file", path, "--vocab_size", 80, "--block_size", 8, "--val_docs", 1
    error, out = prepare("tinystories", *options, "--num_proc", 1)
    assert error == "" and "train: left out 2 documents, blank or with a character" in out
    meta, enc, train, val = read_set(tmp_path / "out")
    assert (meta["vocab_size"], meta["row_length"], enc.eot_token) == (80, 8, 79)
    rows = train.reshape(-1, 8)
    assert (rows[:, [0, -1]] == 79).all()
    told = enc.decode(rows[:, 1:-1].reshape(-1).tolist()).split("<|endoftext|>")
    assert told[:-1] == stories[:len(told) - 1] and len(told) >= 40
    assert "already there" in prepare("tinystories", *options, "--num_proc", 1)[1]


def test_tinystories_without_room(prepare, tmp_path):
    path = write_documents(tmp_path, "s.parquet", ["a b", "b a"])
    for size, message in ((2, "vocab_size 2: 3 bytes and 1 special tokens needed"),
                          (99, "vocab_size 99: the text only yields ")):
        error, _ = prepare("tinystories", "--file", path, "--vocab_size", size, "--force")
        assert error.startswith(f"error: {message}")


# The configurations


@pytest.mark.parametrize("name", ["chat", "captions", "tinystories"])
def test_a_set_and_its_two_configurations_fit(name, monkeypatch, capsys):
    flow, flow_map = (runpy.run_path(str(ROOT / "config" / f"{stage}{name}.py"))
                      for stage in ("", "distill_"))
    assert flow["dataset"] == flow_map["dataset"] == name
    assert flow["out_dir"] == flow_map["out_dir"] == f"out/{name}"
    assert flow["block_size"] == {"chat": 16, "captions": 16, "tinystories": 128}[name]
