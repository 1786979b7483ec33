"""Prompts and texts with blanks (sample.py --prompt and --fill) as tokens.

A blank is {n}, n unknown tokens, or {}, one. In vocabularies of words and byte pairs a token
includes the space before it. So the space before a blank belongs to the blank, and in sets of lines
a text starts with a space. In vocabularies of characters nothing is changed.
"""

import difflib
import itertools
import os
import re
from pathlib import Path

import regex
import tiktoken

from data.loader import WordPieces
from data.tokenizer import CHARACTER, WHOLE_WORD, unknown_to
from lib.settings import fail


def read_patterns(prompt: str, fill: str) -> list[str]:
    """The texts to complete: the prompt; or `fill`; or the lines of a file of that name; or none.
    Exits for two of them, for a file without any, for a fill without a blank or with a wrong one.
    """
    if prompt and fill:
        fail("give prompt or fill, not both; a fill may begin with words, and need not end a text")
    if prompt and not prompt.strip():
        fail("the prompt is blank; leave it out")
    is_file, patterns = os.path.isfile(fill), [fill] if fill else []
    if is_file:
        try:
            text = Path(fill).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            fail(f"cannot read {fill} ({getattr(error, 'strerror', None) or 'not UTF-8 text'})")
        patterns = list(filter(str.strip, text.split("\n"))) or fail(f"{fill} is empty")
    for pattern in patterns:
        if re.search(r"\{([0-9]+(?![0-9}])|$)", pattern):
            fail(f"fill={pattern}: a {{ is not closed; {{3}} is a blank of three tokens")
        if re.search(r"\{0+\}", pattern):
            fail(f"fill={pattern}: a blank needs a token at least; {{}} is one, {{3}} three")
        if not re.search(r"\{[0-9]*\}", pattern):
            fail(f"fill={pattern} has no blank{'' if is_file else ' and is no file'}; {{}} is one "
                 f"token, {{3}} three; use --prompt for the beginning of a text")
    return [prompt] if prompt else patterns


def encode(enc: tiktoken.Encoding, pattern: str, blanks: bool, L: int,
           checkpoint: dict | None = None) -> list[int]:
    """A prompt or a text with blanks as L tokens, -1 where unknown, laid out as the rows that the
    network of the checkpoint was trained on. Exits when there is no room for it, or for an unknown
    token after a prompt, and when the vocabulary lacks a word of it."""
    if isinstance(enc, WordPieces):
        fail("prompt and fill do not know word pieces; train on another vocabulary")
    characters, name = enc._pat_str == CHARACTER, "fill" if blanks else "prompt"
    layout = (checkpoint or {}).get("layout")
    if not layout:  # an older checkpoint: see data/lines.py and data/corpus.py
        rest = "packed" if enc._special_tokens else "stream"
        layout = rest if b"\n" in enc.token_byte_values() else "lines"
    of_lines, packed = (not characters and layout == name for name in ("lines", "packed"))
    text = " ".join(pattern.split()) if of_lines else pattern
    text = " " + text if of_lines or enc._pat_str == WHOLE_WORD else text
    texts, numbers = [text], []
    if blanks:
        texts, numbers = (re.split(r"\{([0-9]*)\}", text)[i::2] for i in (0, 1))
    if not characters:
        texts[:-1] = [text.removesuffix(" ") for text in texts[:-1]]
    require_spelled(enc, texts, f"{name}={pattern[:200]}")
    row = [enc.eot_token] if packed else []                         # as corpus.pack begins a row
    for text, number in itertools.zip_longest(texts, numbers, fillvalue="0"):
        row += enc.encode_ordinary(text) + [-1] * min(int(number[:9] or 1), L + 1)
    if len(row) > L:
        fail(f"{name}={pattern[:200]} is too long: {len(row)} tokens or more, where a text has {L}")
    if -1 not in row and len(row) == L:
        fail(f"{name}={pattern[:200]} leaves nothing to write: it has {L} tokens, as a text has")
    return row + [-1] * (L - len(row))


def require_spelled(enc: tiktoken.Encoding, texts: list[str], name: str) -> None:
    """Exits when the vocabulary lacks words of the texts, or characters where it is not one of
    words: names all, with the nearest that it has."""
    unknown, by_words, said = unknown_to(enc), enc._pat_str == WHOLE_WORD, []
    words = {token.decode().strip(): token for token in enc.token_byte_values() if by_words}
    pieces = itertools.chain(*(regex.findall(WHOLE_WORD, text) if by_words else text
                               for text in texts))
    for piece in dict.fromkeys(piece for piece in pieces if unknown(piece) is not None):
        word = piece.strip() or piece
        near = ([other for other in words if other.lower() == word.lower()]
                or difflib.get_close_matches(word, words, cutoff=0.3))
        where = "after" if words.get(word, b"").startswith(b" ") else "without"
        said.append(repr(word) + (f" (only {where} a space)" if word in words else
                                  f" (nearest: {', '.join(near)})" if near else ""))
    if said:
        hint = "" if not {"'{'", "'}'"} & set(said) else (
            "; for blanks use --fill" if name.startswith("prompt") else
            "; a blank of three tokens is {3}, without spaces in it")
        fail(f"{name}: the vocabulary lacks {', '.join(said)}{hint}")
