"""python -m pytest tests/test_data.py -q

The data folder: tokenizers, packing, what a prepared set holds, and the errors a user sees.
Offline; nothing is written outside pytest's temporary folder.
"""

import http.client
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken

from data import corpus, loader, tokenizer

os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read when `datasets` is first imported
ROOT = Path(__file__).resolve().parents[1]
TEXT = "the cat sat on the mat; the cat's hat, naïve façade: 12 cats\n\n  and 345 hats.\n" * 3


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep the datasets cache inside the test's folder, here and in subprocesses."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))


def script(name):
    """data/<name>/prepare.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare(name, out_dir, *options, **environment):
    """Run data/<name>/prepare.py from another folder, as a user would."""
    return subprocess.run(
        [sys.executable, ROOT / "data" / name / "prepare.py", "--out_dir", out_dir, *options],
        cwd=out_dir.parent, env={**os.environ, **environment}, capture_output=True, text=True,
    )


def read_set(out_dir):
    """(meta, encoding, train ids, val ids) of a prepared set."""
    meta = json.loads((out_dir / "meta.json").read_text())
    enc = loader.tokenizer_from_dict(json.loads((out_dir / "tokenizer.json").read_text()))
    train, val = (np.fromfile(out_dir / f"{s}.bin", meta["dtype"]) for s in ("train", "val"))
    assert (len(train), len(val)) == (meta["train_tokens"], meta["val_tokens"])
    assert loader.identity(tokenizer.to_dict(enc)) == meta["tokenizer"]
    assert enc.n_vocab == meta["vocab_size"]
    return meta, enc, train, val


# Tokenizers


def test_char_encoding_is_one_token_a_character():
    text = "añ€😀\nz"
    enc = tokenizer.char_encoding(text, "c")
    ids = tokenizer.encode_text(enc, text)
    assert [sorted(text)[i] for i in ids] == list(text)
    assert enc.decode(ids.tolist()) == text and enc.n_vocab == 6


def test_bpe_round_trip_through_a_file(tmp_path):
    enc = tokenizer.train_bpe(TEXT, 60, "b")
    tokenizer.save(enc, tmp_path / "t.json")
    again = loader.tokenizer_from_dict(json.loads((tmp_path / "t.json").read_text()))
    ids = tokenizer.encode_text(again, TEXT)
    assert again.decode(ids.tolist()) == TEXT
    assert ids.tolist() == enc.encode_ordinary(TEXT)
    assert (enc.n_vocab, again.eot_token) == (60, 59)
    assert [p.name for p in tmp_path.glob("t.json*")] == ["t.json"]


def naive_bpe(text, vocab_size):
    """Byte-pair ranks, all recounted at every step, with tiktoken itself as the merger."""
    ranks = {bytes([b]): i for i, b in enumerate(sorted(set(text.encode())))}
    while len(ranks) < vocab_size:
        enc = tiktoken.Encoding("n", pat_str=tokenizer.WORD, mergeable_ranks=ranks,
                                special_tokens={})
        pairs = Counter()
        for word in regex.findall(tokenizer.WORD, text):
            spelt = enc.decode_tokens_bytes(enc.encode_ordinary(word))
            pairs.update(left + right for left, right in zip(spelt, spelt[1:]))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks = {**ranks, best: len(ranks)}
    return ranks


@pytest.mark.parametrize("text", [TEXT, "aaaa aaab abab baab bbbb aabba " * 2,
                                  (ROOT / "data/corpus.py").read_text()[:3000]])
def test_bpe_learns_what_a_naive_trainer_learns(text):
    n = len(set(text.encode())) + 12
    assert tokenizer.train_bpe(text, n, "b", special=())._mergeable_ranks == naive_bpe(text, n)


def test_bpe_refuses_sizes_it_cannot_reach():
    with pytest.raises(ValueError, match="vocab_size 3: 2 bytes and 2 special tokens needed"):
        tokenizer.train_bpe("ab", 3, "b", special=("<a>", "<b>"))
    with pytest.raises(ValueError, match="vocab_size 9: the text only yields 3 tokens"):
        tokenizer.train_bpe("ab", 9, "b", special=())


def test_text_outside_the_vocabulary_is_named():
    pairs = tokenizer.train_bpe("abé", 4, "v", special=())
    for enc in (tokenizer.char_encoding("abé", "v"), pairs):
        assert len(tokenizer.encode_text(enc, "éab")) >= 3
        with pytest.raises(ValueError) as error:
            tokenizer.encode_text(enc, "aè")  # shares its first byte with é
        assert str(error.value) == "vocabulary 'v' has no token for 'è' (U+00E8)"


def test_identity_is_of_the_map_and_not_of_the_name():
    d = tokenizer.to_dict(tokenizer.train_bpe(TEXT, 60, "one"))
    same = loader.identity({**d, "name": "two"})
    others = [loader.identity({**d, **change}) for change in (
        {"tokens": [*d["tokens"][1:], d["tokens"][0]]}, {"pat_str": tokenizer.CHARACTER},
        {"special_tokens": {"<eos>": 59}})]
    assert same == loader.identity(d) and len(same) == 12
    assert len({same, *others}) == 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": ["YQ==", "YQ=="]}, "tokenizer: 'tokens' must be distinct and not empty"),
        ({"tokens": []}, "tokenizer: 'tokens' must be distinct and not empty"),
        ({"tokens": ["?"]}, "tokenizer: malformed "),
        ({"tokens": 3}, "tokenizer: malformed "),
        ({"name": None}, "tokenizer: 'name' and 'pat_str' must be strings"),
        ({"special_tokens": {"<e>": 7}}, "tokenizer: special tokens must have the ids from 2 on"),
    ],
)
def test_malformed_tokenizers_are_value_errors(change, message):
    d = {"name": "n", "pat_str": ".", "tokens": ["YQ==", "Yg=="], "special_tokens": {}}
    assert loader.tokenizer_from_dict(d).decode([0, 1]) == "ab"
    with pytest.raises(ValueError) as error:
        loader.tokenizer_from_dict({**d, **change})
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_missing_entry_and_a_gap_between_ids_are_value_errors():
    with pytest.raises(ValueError, match="tokenizer: no entry 'name'"):
        loader.tokenizer_from_dict({})
    gaps = ({b"a": 0, b"b": 2}, {}), ({b"a": 0}, {"<e>": 2}), ({b"a": 1}, {"<e>": 0})
    for ranks, special in gaps:
        enc = tiktoken.Encoding("gap", pat_str=".", mergeable_ranks=ranks, special_tokens=special)
        with pytest.raises(ValueError, match="encoding 'gap': the ids must be 0 to"):
            tokenizer.to_dict(enc)


# Packing and writing


@pytest.mark.parametrize("cuts", [[], [3], [1, 2, 7], range(1, 9)])
def test_pack_against_rows_written_by_hand(cuts):
    # Documents 1 2 3, 4 5, 6 with EOS = 0 after each; rows of 5 hold 3 of the stream.
    stream = np.array([1, 2, 3, 0, 4, 5, 0, 6, 0, 7])
    rows = np.concatenate(list(corpus.pack(np.split(stream, list(cuts)), 0, 5)))
    assert rows.tolist() == [[0, 1, 2, 3, 0], [0, 0, 4, 5, 0], [0, 0, 6, 0, 0]]  # 7 is dropped


def test_pack_refuses_rows_without_room():
    with pytest.raises(ValueError, match="row_length 2"):
        list(corpus.pack([np.array([1])], 0, 2))


def test_smallest_dtype():
    assert corpus.dtype_for(65536) == np.uint16 and corpus.dtype_for(65537) == np.uint32


ABC = tokenizer.char_encoding("abc", "abc")


def test_frequency_of_tokens(tmp_path):
    corpus.write_bins(tmp_path, ABC, [np.array([0, 2, 2, 2, 1])], [np.array([1, 0])], None)
    data = loader.Data(str(tmp_path), "train", 2, 1)
    assert data.frequency().tolist() == pytest.approx([0.2, 0.2, 0.6])
    assert data.frequency(most=2).tolist() == [0.5, 0, 0.5]


def test_write_bins(tmp_path):
    pieces = [np.array([0, 1]), np.array([[2, 2]])]
    corpus.write_bins(tmp_path / "a" / "b", ABC, pieces, [np.array([1, 0])], 2)
    meta, _, train, val = read_set(tmp_path / "a" / "b")
    assert train.tolist() == [0, 1, 2, 2] and val.tolist() == [1, 0]
    assert (meta["dtype"], meta["row_length"]) == ("uint16", 2)
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
        "meta.json", "tokenizer.json", "train.bin", "val.bin"
    ]


def test_an_interrupt_while_writing_leaves_the_old_set(tmp_path):
    corpus.write_bins(tmp_path, ABC, [np.array([0])], [np.array([1])], None)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def interrupted():
        yield np.array([2, 2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        corpus.write_bins(tmp_path, ABC, [np.array([2])], interrupted(), None)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("victim", ["train.bin", "val.bin", "tokenizer.json", "meta.json"])
def test_an_interrupt_while_renaming_leaves_no_meta(tmp_path, monkeypatch, victim):
    corpus.write_bins(tmp_path, ABC, [np.array([0])], [np.array([1])], None, {"n": 1})
    assert corpus.is_ready(tmp_path, {"n": 1}, force=False)
    replace = os.replace

    def stop_at_victim(source, target):
        if Path(target).name == victim:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop_at_victim)
    with pytest.raises(KeyboardInterrupt):
        corpus.write_bins(tmp_path, ABC, [np.array([2])], [np.array([2])], None, {"n": 1})
    assert not (tmp_path / "meta.json").exists()
    assert not corpus.is_ready(tmp_path, {"n": 1}, force=False)


def test_ready_only_with_the_same_settings_and_whole_files(tmp_path):
    corpus.write_bins(tmp_path, ABC, [np.array([0, 1])], [np.array([1])], None, {"n": 1})
    assert corpus.is_ready(tmp_path, {"n": 1}, force=False)
    assert not corpus.is_ready(tmp_path, {"n": 1}, force=True)
    assert not corpus.is_ready(tmp_path, {"n": 2}, force=False)
    (tmp_path / "train.bin").write_bytes(b"\0\0")
    assert not corpus.is_ready(tmp_path, {"n": 1}, force=False)


def test_write_bins_refuses_what_a_model_could_not_read(tmp_path):
    good = [np.array([1, 2])]
    with pytest.raises(ValueError, match="outside the vocabulary of 3"):
        corpus.write_bins(tmp_path, ABC, [np.array([3])], good, None)
    with pytest.raises(ValueError, match="val: 3 tokens are no rows of 2"):
        corpus.write_bins(tmp_path, ABC, good, [np.array([0, 1, 2])], 2)
    with pytest.raises(SystemExit) as error:
        corpus.write_bins(tmp_path, ABC, good, [], 2)
    assert error.value.code == "error: too little text for the val split (not one row of 2 tokens)"
    assert list(tmp_path.glob("*.bin*")) == []


# The sets made here


def test_palindromes(tmp_path):
    rows = script("palindromes").rows(np.array([0, 26**3 + 2]))
    assert rows.tolist() == [[0] * 8, [1, 0, 0, 2, 2, 0, 0, 1]]
    done = prepare("palindromes", tmp_path / "p")
    assert (done.returncode, done.stderr) == (0, "")
    meta, enc, train, val = read_set(tmp_path / "p")
    assert (meta["vocab_size"], meta["row_length"]) == (26, 8)
    train, val = train.reshape(-1, 8), val.reshape(-1, 8)
    assert (len(train), len(val)) == (200_000, 10_000)
    for rows in (train, val):
        assert (rows == rows[:, ::-1]).all()
        # Uniform letters: each place's mean within six standard errors of 12.5.
        assert (abs(rows.mean(0) - 12.5) < 6 * 7.5 / len(rows) ** 0.5).all()
    seen = {row.tobytes() for row in train}
    assert len({row.tobytes() for row in val} - seen) == 10_000
    word = enc.decode(train[0].tolist())
    assert word == word[::-1] and word.isalpha() and len(word) == 8


def test_a_second_run(tmp_path):
    assert prepare("palindromes", tmp_path).returncode == 0
    written = (tmp_path / "train.bin").stat().st_mtime_ns
    again = prepare("palindromes", tmp_path)
    assert again.returncode == 0 and "already there" in again.stdout
    assert (tmp_path / "train.bin").stat().st_mtime_ns == written
    assert "already there" not in prepare("palindromes", tmp_path, "--force").stdout


def test_shakespeare_from_a_file(tmp_path):
    (tmp_path / "in.txt").write_text("To be,\nor not.\n" * 10)
    done = prepare("shakespeare_char", tmp_path / "s", "--file", tmp_path / "in.txt")
    assert (done.returncode, done.stderr) == (0, "")
    _, enc, train, val = read_set(tmp_path / "s")
    assert (len(train), len(val)) == (135, 15)
    assert enc.decode([*train.tolist(), *val.tolist()]) == "To be,\nor not.\n" * 10


@pytest.mark.parametrize("reason, said", [
    (OSError("no route"), "no route"),
    (http.client.IncompleteRead(b"12345", 95), "IncompleteRead(5 bytes read, 95 more expected)")])
def test_a_failed_download_is_one_line(monkeypatch, reason, said):
    def urlopen(url, timeout):
        raise reason

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(SystemExit) as error:
        corpus.download("http://x/y")
    assert error.value.code == (
        f"error: cannot download http://x/y ({said}); give a local copy with --file")


def test_a_set_is_found_by_name_before_a_folder_and_by_path_always(tmp_path, monkeypatch):
    """A run's out_dir of the name of a set does not hide it."""
    monkeypatch.setattr(loader, "HERE", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums").mkdir()
    assert loader.folder_of("nowhere") == tmp_path / "data" / "nowhere"
    assert loader.folder_of("sums") == Path("sums")  # nothing is prepared in data/ yet
    (tmp_path / "data" / "sums").mkdir(parents=True)
    (tmp_path / "data" / "sums" / "meta.json").touch()
    assert loader.folder_of("sums") == tmp_path / "data" / "sums"
    for path in ("./sums", str(tmp_path / "sums")):
        assert loader.folder_of(path).samefile(tmp_path / "sums")


# The packed sets


def write_documents(folder, name, texts):
    """A file of documents in the format its suffix says."""
    import datasets

    path, table = folder / name, datasets.Dataset.from_dict({"text": texts})
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix in (".jsonl", ".json"):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        path.write_text("".join(text + "\n" for text in texts))
    return path


@pytest.mark.parametrize("name", ["d.parquet", "d.jsonl", "d.json", "d.txt"])
def test_packed_pipeline(tmp_path, name):
    texts = ["the cat", "", "sat on", "  ", "the mat", "the hat"]
    enc = tokenizer.train_bpe(" ".join(texts), 14, "tiny")
    train, val = corpus.hold_out(corpus.read_documents(write_documents(tmp_path, name, texts)), 2)
    corpus.write_packed(tmp_path / "out", enc, train, val, block_size=4, num_proc=1)
    meta, enc, train_ids, val_ids = read_set(tmp_path / "out")
    assert meta["row_length"] == 4
    for ids, kept in ((train_ids, ["the cat", "sat on"]), (val_ids, ["the mat", "the hat"])):
        rows = ids.reshape(-1, 4)
        stream = [i for text in kept for i in [*enc.encode_ordinary(text), enc.eot_token]]
        assert (rows[:, [0, -1]] == enc.eot_token).all()
        assert rows[:, 1:-1].reshape(-1).tolist() == stream[: len(stream) // 2 * 2]


@pytest.mark.parametrize("name", ["d.txt", "d.jsonl"])
def test_a_byte_order_mark_is_no_text(name, tmp_path):
    path = write_documents(tmp_path, name, ["the cat", "sat"])
    path.write_bytes("\ufeff".encode() + path.read_bytes())
    assert corpus.read_documents(path)["text"][:] == ["the cat", "sat"]


@pytest.mark.parametrize("row_length, first, layout", [
    (None, 0, "stream"), (4, 0, "lines"), (4, 2, "packed")])
def test_the_layout_of_a_set(row_length, first, layout, tmp_path):
    enc = tokenizer.char_encoding("ab", "letters", ("<|endoftext|>",))
    ids = np.array([[first, 0, 1, 2]] * 4, np.int64)
    corpus.write_bins(tmp_path, enc, [ids], [ids], row_length)
    assert loader.Data(str(tmp_path), "train", 4, 1).layout == layout


def test_hold_out_takes_the_last(tmp_path):
    path = write_documents(tmp_path, "d.txt", [str(i) for i in range(50)])
    documents = corpus.read_documents(path)
    train, val = corpus.hold_out(documents, None)
    assert train["text"][:] == [str(i) for i in range(48)] and val["text"][:] == ["48", "49"]
    with pytest.raises(SystemExit) as error:
        corpus.hold_out(documents, 50)
    assert error.value.code == "error: cannot hold out 50 of 50 documents (--val_docs)"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("gone.txt", None, "no such file"),
        ("a.csv", b"text\n", "unknown kind of file, want one of .parquet .jsonl .json .txt"),
        ("a.txt", b"", "empty file"),
        ("a.txt", b"caf\xe9\n", "not UTF-8 text"),
        ("a.jsonl", b'{"text": "\xff"}\n', "not UTF-8 text"),
        ("a.jsonl", b'{"body": "x"}\n', "no column 'text' among body"),
        ("a.jsonl", b'{"text": 1}\n', "the column 'text' holds int64, not strings"),
        ("a.jsonl", b"{oops\n", "cannot be read (JSON parse error"),
        ("a.parquet", b"oops", "cannot be read (Parquet file size is 4 bytes"),
    ],
)
def test_bad_files_end_in_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as error:
        corpus.read_documents(tmp_path / name)
    assert error.value.code.startswith(f"error: {tmp_path / name}: {message}")
    assert "\n" not in error.value.code


@pytest.mark.parametrize("name, hub", [
    ("owt", "Skylion007/openwebtext"), ("lm1b", "dvruette/lm1b")])
def test_no_hub_is_one_line(tmp_path, name, hub):
    done = prepare(name, tmp_path / "out")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: Couldn't reach '{hub}' on the Hub")
    assert done.stderr.endswith("; without a network, give a local copy with --file\n")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_hub_refusals_are_one_line(monkeypatch):
    import datasets

    for error in (
        datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."),
        RuntimeError("Dataset scripts are no longer supported, but found b.py"),
    ):
        def refuse(*args, error=error, **options):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", refuse)
        with pytest.raises(SystemExit) as end:
            corpus.load_hub("a/b", "train")
        assert end.value.code == f"error: a/b: {error}; a local copy goes with --file"


def test_no_vocabulary_download_is_one_line(monkeypatch):
    from lib.released import gpt2_encoding

    def no_network(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(SystemExit) as error:
        gpt2_encoding()
    assert error.value.code.startswith("error: cannot download GPT-2's vocabulary")
    assert "TIKTOKEN_CACHE_DIR" in error.value.code


@pytest.mark.parametrize("cleanup", [None, RuntimeError("pool")])
def test_ctrl_c_is_one_line(capsys, cleanup):
    def main():
        try:
            raise KeyboardInterrupt
        finally:
            if cleanup:
                raise cleanup  # as `Dataset.map` does while it closes its processes

    with pytest.raises(SystemExit) as error:
        corpus.run(main)
    assert error.value.code == 130
    assert capsys.readouterr().err == "interrupted; the same command starts again\n"


def test_other_errors_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        corpus.run(lambda: 1 / 0)


def test_gpt2_stand_ins(tmp_path):
    shared = ROOT.parent / "shared" / "tiktoken_cache"
    if not shared.is_dir():
        pytest.skip(f"no copy of GPT-2's vocabulary at {shared}")
    texts = [f"Sentence {n} says that {n} plus one is {n + 1}." for n in range(2000)]
    path = write_documents(tmp_path, "d.jsonl", texts)
    done = prepare("lm1b", tmp_path / "out", "--file", path, "--num_proc", "2",
                   TIKTOKEN_CACHE_DIR=str(shared))
    assert done.returncode == 0, done.stderr
    meta, enc, train, val = read_set(tmp_path / "out")
    assert (meta["vocab_size"], meta["dtype"], meta["row_length"]) == (50257, "uint16", 128)
    for ids, kept in ((train, texts[:1900]), (val, texts[1900:])):
        rows = ids.reshape(-1, 128)
        assert (rows[:, [0, -1]] == 50256).all()
        stream = [i for text in kept for i in [*enc.encode_ordinary(text), 50256]]
        assert len(rows) == len(stream) // 126
        assert rows[:, 1:-1].reshape(-1).tolist() == stream[:126 * len(rows)]
