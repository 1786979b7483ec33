"""python -m pytest tests/test_prompt.py

Prompts, blanks, refinement and guidance in sample.py, and how a text is shown while it is made. The
networks have random weights: what is known must come back, whatever they think of it.
"""

import contextlib
import os
import re
import struct
import sys
import threading

import pytest
from programs import inside, log, mistake, write_told

from data import tokenizer
from data.lines import line_rows
from data.loader import WordPieces
from lib.prompt import encode, read_patterns
from lib.watch import spell

LINES = " Tom had a big cup. He took it. Now Ann has the red cup, and Tom's dog has it too."
L = 40
WORDS = tokenizer.word_encoding(LINES, 99, "lines")
STREAM = tokenizer.word_encoding(LINES + "\n", 99, "stream", ())
PAIRS = tokenizer.train_bpe(LINES, 40, "lines")
PACKED = tokenizer.train_bpe(LINES + "\n", 40, "packed")
PAIR_STREAM = tokenizer.train_bpe(LINES + "\n", 40, "stream", special=())
LETTERS = tokenizer.char_encoding(LINES + "{}é", "letters")

# ------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("enc, fill, expected", [
    (WORDS, "Tom had  a {1} cup.", [" Tom", " had", " a", None, " cup", "."]),
    (WORDS, "{2}. Tom's {}, and", [None, None, ".", " Tom", "'s", None, ",", " and"]),
    (WORDS, "{1} {2}{1} cup {1}", [None] * 4 + [" cup", None]),
    (STREAM, "Tom had\n{} Ann", [" Tom", " had", "\n", None, " Ann"]),
    (LETTERS, " {a} {2}b", [" ", "{", "a", "}", " ", None, None, "b"])])
def test_blanks_in_tokens(enc, fill, expected):
    found = [None if i < 0 else enc.decode([i]) for i in encode(enc, fill, True, L)]
    assert found == expected + [None] * (L - len(expected))


def test_prompts_as_their_set_has_texts():
    text = "Tom had a big cup."
    for enc in (WORDS, PAIRS):
        line = line_rows([text], enc, L)[0].tolist()
        assert encode(enc, text, False, L) == [-1 if i == enc.eot_token else i for i in line]
    for enc, first in ((PAIR_STREAM, []), (PACKED, [PACKED.eot_token]), (LETTERS, [])):
        row = [*first, *enc.encode_ordinary(text), -1]
        assert encode(enc, text, False, L)[:len(row)] == row
    for layout, first in (("packed", [PAIRS.eot_token]), ("stream", [])):       # a checkpoint's
        row = [*first, *PAIRS.encode_ordinary(text), -1]
        assert encode(PAIRS, text, False, L, dict(layout=layout))[:len(row)] == row
    assert encode(PACKED, text, False, L, dict(layout="lines"))[:1] == PACKED.encode(" Tom")[:1]
    row = encode(PAIRS, "Tom {2}s {1} dog.", True, L)
    assert PAIRS.decode([i for i in row if i >= 0]) == " Toms dog."


@pytest.mark.parametrize("enc, fill, said", [
    (WORDS, "Tomm {} bigg cup .", "fill=Tomm {} bigg cup .: the vocabulary lacks 'Tomm' (nearest: "
     "Tom), 'bigg' (nearest: big, it), '.' (only without a space)"),
    (WORDS, "{}cup 7", "fill={}cup 7: the vocabulary lacks 'cup' (only after a space), '7'"),
    (WORDS, "{}, tom { 2 }", "fill={}, tom { 2 }: the vocabulary lacks 'tom' (nearest: Tom), '{', "
     "'2', '}'; a blank of three tokens is {3}, without spaces in it"),
    (LETTERS, "zèbre é{1}7", "fill=zèbre é{1}7: the vocabulary lacks 'z', 'è', '7'"),
    (PAIRS, "Zoë", "fill=Zoë: the vocabulary lacks 'Z', 'ë'"),
    (WORDS, "{40} a", "fill={40} a is too long: 41 tokens or more, where a text has 40"),
    (WORDS, "{" + "9" * 5000 + "}",
     f"fill={{{'9' * 199} is too long: 41 tokens or more, where a text has 40")])
def test_words_that_are_unknown_and_rows_that_are_full(enc, fill, said):
    with pytest.raises(SystemExit) as stopped:
        encode(enc, fill, True, L)
    assert stopped.value.code == "error: " + said
    assert encode(LETTERS, "a" * 39, False, L)[-1] == -1 != encode(WORDS, "{39} a", True, L)[-1]
    with pytest.raises(SystemExit, match="leaves nothing to write: it has 40 tokens, as a text"):
        encode(LETTERS, "a" * 40, False, L)
    with pytest.raises(SystemExit, match=r"lacks .*; for blanks use --fill$"):
        encode(WORDS, "Tom {2}", False, L)


def test_word_pieces_are_refused():
    with pytest.raises(SystemExit, match="prompt and fill do not know word pieces"):
        encode(WordPieces("bert", ["[CLS]", "cat", "##s"]), "cats", False, L)


def test_patterns_of_a_file(tmp_path):
    path = tmp_path / "fill.txt"
    path.write_text("Tom had {1}.\n\n {}{2} \n")
    assert read_patterns("", str(path)) == ["Tom had {1}.", " {}{2} "]
    path.write_text("Tom\u2028{}\n", encoding="utf-8-sig")          # with a byte-order mark
    assert read_patterns("", str(path)) == ["Tom\u2028{}"]
    with pytest.raises(SystemExit, match="the prompt is blank"):
        read_patterns("  ", "")
    path.write_text("\n")
    with pytest.raises(SystemExit, match="fill.txt is empty"):
        read_patterns("", str(path))

# ------------------------------------------------------------------------------ texts


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    for name, options in dict(fmlm={}, flm=dict(flow_map=False), other=dict(seed=1),
                              untold=dict(share=0.0), letters=dict(enc=LETTERS),
                              ending=dict(end=99)).items():
        write_told(folder / f"{name}.pt", L, **dict(enc=WORDS) | options)
    return folder


def records(monkeypatch, out, *words):
    inside(monkeypatch, "sample.py", f"--out_dir={out}", "--device=cpu", "--dtype=float32",
           f"--out={out / 'texts.jsonl'}", *words)
    return log(out / "texts.jsonl")


PROMPT, FILL = "--prompt=Tom had a big cup.", "--fill=Tom had {1} cup. {12} Now Ann has the {2},"


@pytest.mark.parametrize("pattern, way", [
    (PROMPT, "--steps=1,3"), (FILL, "--steps=3 --gamma=0.5"), (PROMPT, "--refine=2 --steps=1,2"),
    (FILL, "--refine=3 --order=random"), (FILL, "--steps=2 --guidance=2 --flow_steps=2")])
def test_known_tokens_come_back_in_as_many_texts_as_are_asked_for(pattern, way, out, monkeypatch):
    many = records(monkeypatch, out, pattern, *way.split(), "--num_samples=9")
    text = pattern.split("=")[1]
    row = encode(WORDS, text, pattern == FILL, L)
    for record in many:
        assert record["pattern"] == text
        assert all(i in (-1, j) for i, j in zip(row, record["tokens"], strict=True))
    assert len({record["text"] for record in many[-9:]}) > 1
    assert records(monkeypatch, out, pattern, *way.split(), "--num_samples=1") == many[::9]


def test_a_file_of_patterns_in_letters(out, monkeypatch, tmp_path):
    """The first pattern's texts are those it has alone; each pattern has noise of its own."""
    path, letters = tmp_path / "fill.txt", [f"--init_from={out / 'letters.pt'}", "--num_samples=3"]
    path.write_text(" Tom {4} a\n{} Tom\n{} Tom\n")
    found = records(monkeypatch, out, *letters, f"--fill={path}")
    assert [(r["sample"], r["pattern"]) for r in found] == [
        *enumerate([" Tom {4} a"] * 3 + ["{} Tom"] * 6, start=1)]
    assert all(re.match(r" Tom .{4} a|. Tom", r["text"]) for r in found)
    assert found[:3] == records(monkeypatch, out, *letters, "--fill= Tom {4} a")
    assert found[3]["text"] != found[6]["text"]


def test_guidance(out, monkeypatch):
    """1 is none. Above, both kinds of weak network change texts, the same ones every time."""
    plain = records(monkeypatch, out, "--steps=3")
    assert plain[0].items() >= dict(guidance=1, refine=0, order="confidence").items()
    assert plain[0]["pattern"] == ""
    assert records(monkeypatch, out, "--steps=3", "--guidance=1.0") == plain
    for weak in ("", out / "other.pt"):
        guided, again = (records(monkeypatch, out, "--steps=3", "--guidance=3", f"--weak={weak}",
                                 f"--num_samples={n}") for n in (4, 9))
        assert guided == again[:4] and all(
            a["tokens"] != b["tokens"] for a, b in zip(guided, plain))


def test_the_weak_network_is_told_the_same_tokens(out, monkeypatch):
    """If it is as good as the other, guidance is none."""
    plain, guided = (records(monkeypatch, out, PROMPT, "--steps=3", *more.split()) for more in (
        "", f"--guidance=3 --weak={out / 'fmlm.pt'}"))
    assert [record["tokens"] for record in plain] == [record["tokens"] for record in guided]


@pytest.mark.parametrize("one, other", [
    ("--refine=3", "--refine=3 --order=random"),
    ("--guidance=3", "--guidance=3 --weak_dropout=0.6")])
def test_settings_that_change_texts(one, other, out, monkeypatch):
    found = [records(monkeypatch, out, *way.split()) for way in (one, other)]
    assert all(a["tokens"] != b["tokens"] for a, b in zip(*found))


def test_what_was_told_is_shown_where_the_network_ends_the_text_before(out, monkeypatch, capsys):
    """So a text that lost its words never looks right."""
    found = records(monkeypatch, out, FILL, f"--init_from={out / 'ending.pt'}", "--watch")
    expected = "Tom had{} cup.{} Now Ann has the{},".format(
        *("<|endoftext|>" * n for n in (1, 12, 2)))
    assert {record["text"].strip() for record in found} == {expected}
    assert f"FMLM, 1 of 1:  {expected}\n" in capsys.readouterr().out


def test_a_map_that_was_distilled_without_known_tokens(out, monkeypatch):
    said = mistake(monkeypatch, "sample.py", PROMPT, f"--init_from={out / 'untold.pt'}")
    assert said.startswith(f"error: {out}/untold.pt was trained with context_share=0, ")

# ------------------------------------------------------------------------------ --watch


def test_noise_does_not_end_a_text():
    end, tom = WORDS.eot_token, WORDS.encode(" Tom")[0]
    assert spell(WORDS, [tom, end, tom]) == [" Tom"]
    assert spell(WORDS, [tom, end, tom], ends=False) == [" Tom", "", " Tom"]


def test_the_animations(out, monkeypatch, tmp_path):
    """A frame for each step and round. Texts of an odd length are right here, so that there is a
    wrong draft to mend."""
    image = pytest.importorskip("PIL.Image", reason="the animations need pillow")
    monkeypatch.setattr("data.loader.find_check", lambda _: lambda text: "even"[len(text) % 2 * 4:]
                        or None)
    inside(monkeypatch, "docs/story.py", f"--out_dir={out}", f"--to={tmp_path}", "--steps=3",
           "--rounds=2")
    assert [image.open(tmp_path / f"{name}.gif").n_frames for name in ("story", "refine")] == [3, 2]


@pytest.mark.parametrize("way, labels", [
    ("--steps=2", "noise/1 of 2/2 of 2"), ("--refine=3", "noise/1 of 3/2 of 3/3 of 3"),
    ("--guidance=3", "noise/1 of 1/guided")])
def test_watching_through_a_pipe(way, labels, out, monkeypatch, capsys):
    """A plain line for the noise and each guess; the last is the text."""
    text = records(monkeypatch, out, PROMPT, way, "--watch")[0]["text"]
    said = capsys.readouterr().out
    frames = [line.split(":  ") for line in said.split("model  steps")[0].splitlines()]
    assert [label for label, _ in frames] == [f"FMLM, {label}" for label in labels.split("/")]
    assert all(text.startswith("Tom had a big cup.") for _, text in frames)
    assert frames[-1][1] == text.strip() and not {"\x1b", "\r"} & set(said)


def read_from(terminal, parts):
    """All that a terminal gets until its other end is closed, which Linux calls an error."""
    with contextlib.suppress(OSError):
        while part := os.read(terminal, 65536):
            parts.append(part.decode())


@pytest.mark.parametrize("columns", [80, 33])
def test_watching_in_a_terminal(columns, out, monkeypatch):
    """A frame goes up by the lines of the one before and clears each. No line reaches the last
    column. What the prompt says is bold. The table and the texts follow."""
    fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    parts, terminal = [], open(theirs, "w")
    reader = threading.Thread(target=read_from, args=(ours, parts), daemon=True)
    reader.start()
    with monkeypatch.context() as patch:
        patch.delenv("COLUMNS", raising=False)
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "__stdout__", terminal)
        text = records(patch, out, PROMPT, "--steps=2", "--watch", "--num_samples=1")[0]["text"]
    terminal.close()
    reader.join(60)
    *frames, rest = "".join(parts).split("\x1b[J")
    assert rest.startswith("model  steps") and "\x1b" not in rest and text.strip() in rest
    up = ""
    for frame, label in zip(frames, ("noise", "1 of 2", "2 of 2"), strict=True):
        assert frame.startswith(f"{up}\rFMLM, {label}\x1b[0m\x1b[K\r\n")
        lines = frame.removeprefix(up).removesuffix("\r\n").split("\r\n")
        assert all(line[0] == "\r" and line.endswith("\x1b[0m\x1b[K") for line in lines)
        assert re.findall("\x1b\\[0;1m([^\x1b]*)", frame) == [
            "Tom", " had", " a", " big", " cup", "."]
        greys = {int(grey) for grey in re.findall("\x1b\\[0;38;5;(\\d+)m", frame)}
        assert greys == {240} if label == "noise" else greys <= {*range(240, 250)}
        shown, up = [re.sub("\x1b[^mK]*[mK]|\r", "", line) for line in lines], f"\x1b[{len(lines)}A"
        assert len(lines) > 2 and max(map(len, shown)) < columns
    assert "".join(shown[1:]).replace(" ", "") == text.replace(" ", "")
