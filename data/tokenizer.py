"""Makes and saves tokenizers: how text becomes ids.

A tokenizer is a `tiktoken.Encoding` (GPT-2's, byte pairs trained here, or one token a character or
a word) or the `WordPieces` of a BERT. It is stored as JSON data in a set's folder and in every
checkpoint, so that no run depends on a name being looked up again.
"""

import base64
import functools
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import regex
import tiktoken

from data.loader import WORD_PIECES, WordPieces, identity, tokenizer_from_dict  # noqa: F401
from lib.settings import fail

CHARACTER = r"(?s:.)"  # any one character, newline included

# GPT-2's way of cutting text into words: contractions, then a run of letters, of digits or of
# other signs with the space before it, then white space.
WORD = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# The same where a word is one token: every other sign and every further space stands alone, and a
# word keeps its combining marks. A space always begins a piece, so a text may be cut before any.
WHOLE_WORD = (r"['’](?:[sdmt]|ll|ve|re)| ?[\p{L}\p{M}]+| ?\p{N}+"
              r"| ?[^\s\p{L}\p{M}\p{N}]|\s")


def char_encoding(text: str, name: str, special: tuple[str, ...] = ()) -> tiktoken.Encoding:
    """One token for each distinct character of `text`, in sorted order, then the `special` ones. A
    character of several bytes is one token too: tiktoken looks a whole piece up before it cuts it
    into bytes, and here every piece is a character. Raises ValueError when `text` is empty."""
    return encoding(name, CHARACTER, sorted(set(text)), special)


def word_encoding(text: str, vocab_size: int, name: str,
                  special: tuple[str, ...] = ("<|endoftext|>",)) -> tiktoken.Encoding:
    """One token a word with the space before it (" Tom", ".", "'s"): the commonest words of `text`,
    commonest first, then the `special` tokens. `vocab_size` tokens in all, fewer if the text has
    fewer words. Raises ValueError when `text` is empty or no word fits."""
    if vocab_size <= len(special):
        raise ValueError(f"vocab_size {vocab_size}: no room for a word")
    # Cut into words only what stands between two spaces, and each such piece once: ten times as
    # fast as cutting the whole text.
    spaced, counts = Counter(), Counter()
    for line in text.splitlines(keepends=True):
        first, *others = line.split(" ")
        counts.update(regex.findall(WHOLE_WORD, first))
        spaced.update(others)
    for piece, n in spaced.items():
        for word in regex.findall(WHOLE_WORD, " " + piece):
            counts[word] += n
    words = sorted(counts, key=lambda word: (-counts[word], word))  # ties in alphabetical order
    return encoding(name, WHOLE_WORD, words[:vocab_size - len(special)], special)


def encoding(name: str, pattern: str, tokens: list[str], special: tuple[str, ...]
             ) -> tiktoken.Encoding:
    """The ids 0, 1, ... for `tokens`, each a whole piece of `pattern`, then for the `special` ones.
    Raises ValueError when there is no token."""
    if not tokens:
        raise ValueError("no text to take tokens from")
    return tiktoken.Encoding(
        name, pat_str=pattern,
        mergeable_ranks={token.encode(): rank for rank, token in enumerate(tokens)},
        special_tokens={token: len(tokens) + i for i, token in enumerate(special)})


def train_bpe(text: str, vocab_size: int, name: str, special: tuple[str, ...] = ("<|endoftext|>",)
              ) -> tiktoken.Encoding:
    """Byte-pair encoding with exactly `vocab_size` tokens: start from bytes, then join the
    commonest neighbours again and again. The `special` tokens, which no text produces, come last.

    The first tokens are the bytes that occur in `text`, not all 256: a flow over one-hot tokens
    pays for every token, used or not. So other text may hold characters that cannot be encoded;
    `encode_text` says which. Raises ValueError when `vocab_size` cannot hold the bytes, or the
    text has too few merges for it.
    """
    ranks = {bytes([byte]): rank for rank, byte in enumerate(sorted(set(text.encode())))}
    merges = vocab_size - len(ranks) - len(special)
    if not ranks or merges < 0:
        raise ValueError(f"vocab_size {vocab_size}: {len(ranks)} bytes and {len(special)} special "
                         f"tokens needed")
    # A word that occurs a thousand times is cut once and counts a thousand.
    counts = Counter(regex.findall(WORD, text))
    words = [[bytes([byte]) for byte in word.encode()] for word in counts]
    weights = list(counts.values())
    # tiktoken knows ranked strings and no pairs: (a, bc) and (ab, c) both become abc. So
    # neighbours are counted under what they would spell together.
    total, where = Counter(), defaultdict(set)  # how often it occurs, in which words

    def count(index: int, sign: int) -> None:
        for left, right in zip(words[index], words[index][1:]):
            total[left + right] += sign * weights[index]
            where[left + right].add(index)

    for index in range(len(words)):
        count(index, +1)
    for _ in range(merges):
        most = max(total.values(), default=0)
        if most == 0:
            raise ValueError(f"vocab_size {vocab_size}: the text only yields "
                             f"{len(ranks) + len(special)} tokens")
        # Ties go to the first in byte order, so the result depends on the text alone.
        joined = min(pair for pair, n in total.items() if n == most)
        ranks[joined] = len(ranks)
        for index in where.pop(joined):  # only words with this pair change
            count(index, -1)
            merge(words[index], ranks)
            count(index, +1)
        del total[joined]
    last = {token: len(ranks) + i for i, token in enumerate(special)}
    return tiktoken.Encoding(name, pat_str=WORD, mergeable_ranks=ranks, special_tokens=last)


def merge(word: list[bytes], ranks: dict[bytes, int]) -> None:
    """Join neighbours in place, lowest rank first and leftmost first, as tiktoken does."""
    while True:
        known = [(ranks[left + right], i) for i, (left, right) in enumerate(zip(word, word[1:]))
                 if left + right in ranks]
        if not known:
            return
        i = min(known)[1]
        word[i:i + 2] = [word[i] + word[i + 1]]


def read_word_pieces(path: str | Path) -> WordPieces:
    """The vocabulary in a vocab.txt, a token a line. Exits when it is none."""
    try:
        words = Path(path).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        fail(f"{path} is no vocabulary ({error})")
    if "" in words or len(set(words)) < len(words):
        fail(f"{path} is no vocabulary (a line is empty or there twice)")
    return WordPieces("wordpiece", words)


@functools.cache
def word_piece_encoder(enc: WordPieces):
    """What cuts text into word pieces as bert-base-uncased does, a `tokenizers.Tokenizer`. Exits
    when that package is missing, or a token that it needs."""
    try:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    except ImportError:
        fail("cutting text into word pieces needs the package tokenizers; run: pip install "
             "tokenizers")
    special = "[UNK]", "[CLS]", "[SEP]"
    if missing := set(special) - set(enc.words):
        fail(f"the vocabulary has no {min(missing)}; bert-base-uncased has its as vocab.txt")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # prepare.py has processes instead
    encoder = Tokenizer(models.WordPiece({word: i for i, word in enumerate(enc.words)},
                                         unk_token="[UNK]"))
    encoder.normalizer = normalizers.BertNormalizer()         # lower case, no accents
    encoder.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # every sign stands alone
    encoder.add_special_tokens(list(special))
    return encoder


def unknown_to(enc: tiktoken.Encoding) -> Callable[[str], str | None]:
    """A function of a text: the first character (of a vocabulary of words: the first word), in
    sorted order, that `enc` has no tokens for, or None. tiktoken itself panics at one."""
    known, words = set(enc.token_byte_values()), enc._pat_str == WHOLE_WORD

    def unknown(text: str) -> str | None:
        for piece in sorted(set(regex.findall(WHOLE_WORD, text) if words else text)):
            raw = piece.encode()
            # A word must be one token, even where there is a token for each of its letters.
            if raw not in known and (words or not all(bytes([byte]) in known for byte in raw)):
                return piece
        return None

    return unknown


def encode_text(enc: tiktoken.Encoding | WordPieces, text: str) -> np.ndarray:
    """Ids of `text`, 1-D int64; special tokens in it are read as plain text. Raises ValueError
    when the vocabulary cannot spell a character or a word. Word pieces spell all, some by [UNK];
    there [CLS] and [SEP] stay tokens."""
    if isinstance(enc, WordPieces):
        return np.array(word_piece_encoder(enc).encode(text).ids, dtype=np.int64)
    piece = unknown_to(enc)(text)
    if piece is not None:
        code = f" (U+{ord(piece):04X})" if len(piece) == 1 else ""
        raise ValueError(f"vocabulary {enc.name!r} has no token for {piece!r}{code}")
    return np.array(enc.encode_ordinary(text), dtype=np.int64)


def to_dict(enc: tiktoken.Encoding | WordPieces) -> dict:
    """The encoding as JSON data: name, pat_str, tokens (base64, by id), special_tokens.

    Raises ValueError when ids are missing between 0 and V - 1: a model has an output for every id
    below V, so every such id must decode.
    """
    if isinstance(enc, WordPieces):
        tokens = [base64.b64encode(word.encode()).decode() for word in enc.words]
        return {"name": enc.name, "pat_str": WORD_PIECES, "tokens": tokens, "special_tokens": {}}
    # tiktoken has no public way to ask for these three. Its documentation extends encodings by
    # reading the same attributes.
    ranks, special = enc._mergeable_ranks, enc._special_tokens
    if [*sorted(ranks.values()), *sorted(special.values())] != list(range(enc.n_vocab)):
        raise ValueError(f"encoding {enc.name!r}: the ids must be 0 to {enc.n_vocab - 1} without a "
                         f"gap, special tokens last")
    return {
        "name": enc.name,
        "pat_str": enc._pat_str,
        "tokens": [base64.b64encode(token).decode() for token in sorted(ranks, key=ranks.get)],
        "special_tokens": dict(special),
    }


def save(enc: tiktoken.Encoding | WordPieces, path: str | Path) -> None:
    """Write the encoding to a JSON file. Raises as `to_dict` and `write_json` do."""
    write_json(to_dict(enc), path)


def write_json(value: dict, path: str | Path) -> None:
    """Write a JSON file. A reader sees the old file or the new one, never half of one. Raises
    OSError when the folder cannot be written."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
