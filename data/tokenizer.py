"""Tokenizers: how text becomes ids, and how that map is kept.

A tokenizer is always a `tiktoken.Encoding`, whether GPT-2's, one trained here
or one token a character.  This file makes the last two, and stores any of them
as plain JSON data, so that the map travels inside a dataset's folder and inside
a checkpoint and no run ever depends on a name being looked up again.
"""

import base64
import binascii
import hashlib
import json
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import regex
import tiktoken

CHARACTER = r"(?s:.)"  # any one character, newline included

# GPT-2's way of cutting text into words: contractions, then a run of letters,
# of digits or of other signs with the space before it, then white space.
WORD = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def write_json(value: Any, path: str | Path) -> None:
    """Write `value` to `path`; a reader sees the old file or the new, never half of one.

    Raises OSError when the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def to_dict(enc: tiktoken.Encoding) -> dict[str, Any]:
    """The encoding as JSON-able data: name, pat_str, tokens (base64, by id), special_tokens.

    Raises ValueError when ids are missing between 0 and V - 1: a model has an
    output for every id below V, so every such id must decode.
    """
    # tiktoken has no public way to ask for these three, but its documentation
    # extends encodings by reading the same attributes.
    ranks, special = enc._mergeable_ranks, enc._special_tokens
    tokens = sorted(ranks, key=ranks.__getitem__)
    if [ranks[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError(f"encoding {enc.name!r}: ranks do not cover 0 to {len(tokens) - 1}")
    _check_special(special, len(tokens))
    return {
        "name": enc.name,
        "pat_str": enc._pat_str,
        "tokens": [base64.b64encode(token).decode("ascii") for token in tokens],
        "special_tokens": dict(special),
    }


def from_dict(d: dict[str, Any]) -> tiktoken.Encoding:
    """The encoding that `to_dict` described.  Raises ValueError, in one line, when malformed."""
    try:
        name, pattern, special = d["name"], d["pat_str"], dict(d["special_tokens"])
        tokens = [base64.b64decode(token, validate=True) for token in d["tokens"]]
    except KeyError as error:
        raise ValueError(f"tokenizer: no entry {error}") from None
    except (TypeError, ValueError, binascii.Error) as error:
        raise ValueError(f"tokenizer: malformed ({error})") from None
    if not (isinstance(name, str) and isinstance(pattern, str)):
        raise ValueError("tokenizer: 'name' and 'pat_str' must be strings")
    # Checked here because tiktoken's Rust side answers a repeated or an empty
    # vocabulary with a panic, which no `except Exception` would catch.
    if not tokens or len(set(tokens)) != len(tokens) or b"" in tokens:
        raise ValueError("tokenizer: 'tokens' must be distinct and not empty")
    _check_special(special, len(tokens))
    return _encoding(name, pattern, tokens, special)


def save(enc: tiktoken.Encoding, path: str | Path) -> None:
    """Write the encoding to a JSON file, whole or not at all.  Raises as `to_dict`, OSError."""
    write_json(to_dict(enc), path)


def load(path: str | Path) -> tiktoken.Encoding:
    """Read what `save` wrote.  Raises ValueError when it is not that, OSError when unreadable."""
    try:
        return from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except ValueError as error:  # JSON and UTF-8 errors are ValueErrors too
        raise ValueError(f"{path}: {error}") from None


def identity(d: dict[str, Any]) -> str:
    """The vocabulary's identity: 12 hex digits of all that decides the id <-> text map.

    `d` is `to_dict`'s.  The name does not count.  Ids are only numbers: data of
    another vocabulary trains without complaint into nonsense, so a run compares
    this before it starts.
    """
    decisive = [d["tokens"], sorted(d["special_tokens"].items()), d["pat_str"]]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:12]


def encode_text(enc: tiktoken.Encoding, text: str) -> np.ndarray:
    """Ids of `text` as a 1-D int64 array; special tokens in it are read as plain text.

    Raises ValueError when the vocabulary cannot spell a character.  That is
    looked up first because tiktoken would panic (see `from_dict`).
    """
    for character in sorted(set(text)):
        raw = character.encode("utf-8")
        if not (_has(enc, raw) or all(_has(enc, bytes([byte])) for byte in raw)):
            raise ValueError(
                f"vocabulary {enc.name!r} has no token for {character!r} (U+{ord(character):04X})"
            )
    return np.array(enc.encode_ordinary(text), dtype=np.int64)


def char_encoding(text: str, name: str) -> tiktoken.Encoding:
    """One token for each distinct character of `text`, in sorted order.

    A character of several bytes is one token as well: tiktoken looks a whole
    piece up before it cuts it into bytes, and here every piece is a character.
    Raises ValueError when `text` is empty.
    """
    if not text:
        raise ValueError("no text to take characters from")
    return _encoding(name, CHARACTER, [c.encode("utf-8") for c in sorted(set(text))], {})


def train_bpe(
    text: str, vocab_size: int, name: str, special: tuple[str, ...] = ("<|endoftext|>",)
) -> tiktoken.Encoding:
    """Byte-pair encoding: start from bytes, then again and again join the commonest neighbours.

    The first tokens are the bytes that occur in `text`, not all 256: a flow over
    one-hot tokens pays for every token, used or not.  So other text may hold
    characters that cannot be encoded; `encode_text` says which.

    Args:
        text: what to learn from.
        vocab_size: V, special tokens included.
        name: the encoding's name.
        special: tokens that no text produces; they get the last ids.
    Returns:
        An encoding with exactly `vocab_size` tokens.
    Raises:
        ValueError: when V cannot hold the bytes, or the text has too few merges for V.
    """
    tokens = [bytes([byte]) for byte in sorted(set(text.encode("utf-8")))]
    merges = vocab_size - len(tokens) - len(special)
    if not tokens or merges < 0:
        raise ValueError(
            f"vocab_size {vocab_size}: {len(tokens)} bytes and {len(special)} special tokens needed"
        )
    ranks = {token: rank for rank, token in enumerate(tokens)}
    # A word that occurs a thousand times is cut once and counts a thousand.
    counts = Counter(regex.findall(WORD, text))
    words = [[bytes([byte]) for byte in word.encode("utf-8")] for word in counts]
    weights = list(counts.values())

    # tiktoken knows ranked strings and no pairs: (a, bc) and (ab, c) both become
    # abc.  So neighbours are counted under what they would spell together.
    total: Counter[bytes] = Counter()
    where: defaultdict[bytes, set[int]] = defaultdict(set)

    def count(index: int, sign: int) -> None:
        word = words[index]
        for left, right in zip(word, word[1:]):
            joined = left + right
            total[joined] += sign * weights[index]
            where[joined].add(index)

    for index in range(len(words)):
        count(index, +1)
    for _ in range(merges):
        most = max(total.values(), default=0)
        if most == 0:
            raise ValueError(
                f"vocab_size {vocab_size}: the text only yields {len(ranks) + len(special)} tokens"
            )
        # Ties go to the first in byte order, so the result depends on the text alone.
        joined = min(pair for pair, n in total.items() if n == most)
        ranks[joined] = len(ranks)
        # Only words with this pair change: take them out, merge, put them back.
        for index in where.pop(joined):
            count(index, -1)
            words[index] = _merge(words[index], ranks)
            count(index, +1)
        del total[joined]
    return _encoding(name, WORD, list(ranks), {s: len(ranks) + i for i, s in enumerate(special)})


def _merge(word: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """Join neighbours, lowest rank first and leftmost first, until none can be: tiktoken's rule."""
    word = list(word)
    while True:
        known = [
            (ranks[left + right], i)
            for i, (left, right) in enumerate(zip(word, word[1:]))
            if left + right in ranks
        ]
        if not known:
            return word
        i = min(known)[1]
        word[i : i + 2] = [word[i] + word[i + 1]]


def _encoding(
    name: str, pattern: str, tokens: list[bytes], special: dict[str, int]
) -> tiktoken.Encoding:
    """A `tiktoken.Encoding` whose ids are places in `tokens`.  ValueError on a bad pattern."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding(
        name=name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
    )


def _check_special(special: dict[str, int], n: int) -> None:
    """Raise ValueError unless the special ids are n, n + 1, ... without a gap."""
    ids = list(special.values())
    if any(type(i) is not int for i in ids) or sorted(ids) != list(range(n, n + len(ids))):
        raise ValueError(f"tokenizer: special tokens must have the ids from {n} on, without a gap")


def _has(enc: tiktoken.Encoding, token: bytes) -> bool:
    """Whether `token` is one token of `enc`."""
    try:
        enc.encode_single_token(token)
    except KeyError:
        return False
    return True
