"""Rows of lines, and any text of your own: what data/chat, data/captions and data/text share.

A line is a row, filled up with <|endoftext|>; or a text is one stream (--tokenizer and --vocab_size
choose the tokens of either). corpus.py describes the files that come of it.
"""

import functools
import itertools
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import tiktoken

from data import corpus, tokenizer
from lib.settings import fail


def read_text(path: Path) -> str:
    """A local file as one text: of .parquet, .jsonl and .json a document a line, others as they
    are. Exits when the documents cannot be read."""
    if path.suffix in corpus.LOADERS and path.suffix != ".txt":
        return "\n".join(text or "" for text in corpus.read_documents(path)["text"])
    return path.read_text(encoding="utf-8-sig")


def every_20th(items: Sequence) -> tuple[list, list]:
    """(train, val): 5% held out, at least one item, in ten runs of neighbours over the whole
    length, since neighbours often belong together. Exits when none would be left."""
    if len(items) < 2:
        fail(f"cannot hold out one of {len(items)} lines")
    run, cycle = max(1, len(items) // 200), min(20, len(items))
    parts = [], []
    for i, item in enumerate(items):
        parts[i // run % cycle == cycle - 1].append(item)
    return parts


def line_rows(lines: Iterable[str], enc: tiktoken.Encoding, row_length: int | None) -> np.ndarray:
    """The lines that `enc` spells and that fit, a row each: (n, row_length) ids, the rest of a row
    filled with <|endoftext|>. White space becomes one space, and one is put before the line, so
    that its first word has the token it has elsewhere. row_length None: what the longest line
    needs, rounded up to a multiple of 8, at most 128. Prints how many lines were left out."""
    unknown = tokenizer.unknown_to(enc)

    @functools.cache  # the same words come again and again; no token goes beyond a space
    def spell(word: str) -> list[int] | None:
        return enc.encode_ordinary(f" {word}") if unknown(f" {word}") is None else None

    rows, unspelled = [], 0
    for line in lines:
        words = [spell(word) for word in line.split()]
        if None in words:
            unspelled += 1
        elif words:
            rows.append(list(itertools.chain.from_iterable(words)))
    if row_length is None:
        row_length = min(128, -(-max(map(len, rows), default=1) // 8) * 8)
    fitting = [ids + [enc.eot_token] * (row_length - len(ids))
               for ids in rows if len(ids) <= row_length]
    if unspelled or len(fitting) < len(rows):
        print(f"{len(fitting):,} lines kept; left out {unspelled:,} that the vocabulary cannot "
              f"spell and {len(rows) - len(fitting):,} of more than {row_length} tokens")
    return np.array(fitting, corpus.dtype_for(enc.n_vocab)).reshape(-1, row_length)


def spelled_text(lines: list[str], enc: tiktoken.Encoding) -> np.ndarray:
    """Ids (n,) of the lines that `enc` spells, one after another, line ends included. Prints how
    many were left out."""
    unknown = tokenizer.unknown_to(enc)
    kept = [line for line in lines if unknown(line) is None]
    if len(kept) < len(lines):
        print(f"{len(kept):,} lines kept; left out {len(lines) - len(kept):,} that the vocabulary "
              f"cannot spell")
    return np.array(enc.encode_ordinary("".join(kept)), dtype=np.int64)


def prepare_lines(doc: str, folder: Path, read: Callable[[Namespace], Iterable[Iterable[str]]],
                  vocab_size: int, block_size: int | None, source: str | None) -> None:
    """All of the script of a set of lines. read(args) -> groups of lines; those of a group are
    held out together. source: what is read without --file; None for any text of the user, which
    may also be a stream."""
    p = corpus.parser(doc, folder)
    p.add_argument("--file", type=Path, required=not source,
                   help="UTF-8 text, or .parquet, .jsonl or .json with a column text")
    p.add_argument("--tokenizer", choices=["word", "bpe", "char"], default="word")
    p.add_argument("--vocab_size", type=int, default=vocab_size,
                   help="V; words may be fewer, characters are as many as there are")
    if source:
        p.set_defaults(lines=True)
    else:
        p.add_argument("--lines", action="store_true", help="a line is a row; else one stream")
    p.add_argument("--block_size", type=int, default=block_size, help="tokens in a row of lines, L"
                   + ("" if block_size else "; by itself the longest line's, at most 128"))
    args = p.parse_args()
    if args.block_size is not None and (args.block_size < 1 or not args.lines):
        fail("--block_size must be at least 1 and needs --lines: a stream has no rows")
    settings = {"source": corpus.file_stamp(args.file, utf8=args.file.suffix != ".parquet")
                if args.file else source, "tokenizer": args.tokenizer,
                "vocab_size": args.vocab_size, "block_size": args.block_size, "lines": args.lines}
    if corpus.is_ready(args.out_dir, settings, args.force):
        return
    if args.lines:
        groups = [tuple(" ".join(line.split()) for line in group) for group in read(args)]
        parts = every_20th(list(dict.fromkeys(group for group in groups if any(group))))
        train, val = (dict.fromkeys(line for group in part for line in group if line)
                      for part in parts)
        val = [line for line in val if line not in train]
        print(f"{len(train) + len(val):,} different lines of {sum(map(len, groups)):,}")
        enc = corpus.learn(args.tokenizer, [f" {line}" for line in train], args.vocab_size,
                           folder.name)
        train = line_rows(train, enc, args.block_size)
        val = line_rows(val, enc, train.shape[1])
        if not (len(train) and len(val)):
            fail("too few lines are left; raise --block_size or --vocab_size")
    else:
        text = read_text(args.file)
        first = len(text) * 19 // 20  # held out, from the next line on, or the next word
        first = text.find("\n", first, -1) + 1 or text.find(" ", first) + 1 or first
        train, val = (part.splitlines(keepends=True) for part in (text[:first], text[first:]))
        enc = corpus.learn(args.tokenizer, train, args.vocab_size, folder.name, special=())
        train, val = spelled_text(train, enc), spelled_text(val, enc)
    length = train.shape[1] if args.lines else None
    corpus.write_bins(args.out_dir, enc, [train], [val], length, settings)
    if not source:  # the others have a file in config/
        dataset = folder.name if args.out_dir == folder else args.out_dir
        row = f" --block_size={length}" if length else ""
        print(f"next: python train.py --dataset={dataset} --out_dir=out/{args.out_dir.name}{row}")
