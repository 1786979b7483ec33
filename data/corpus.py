"""What the prepare scripts share: reading documents, packing rows, writing a set.

A prepared set is a folder of four files:

    train.bin, val.bin   token ids, one after another, uint16 or uint32, no header
    tokenizer.json       the map between ids and text, see tokenizer.py
    meta.json            vocab_size, dtype, row_length, train_tokens, val_tokens,
                         tokenizer (its identity), settings (how the set was made) and checker (a
                         module whose check(text) finds mistakes, or null)

meta.json is removed before any other file is replaced, and written last. Where it exists, the
other three are whole and belong together.
"""

import http.client
import json
import os
import signal
import sys
import urllib.request
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tiktoken

from data import tokenizer
from data.loader import WordPieces, identity
from lib.settings import fail

if TYPE_CHECKING:  # slow to import, and the small sets do without it
    from datasets import Dataset

LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
BPE_SAMPLE = 10_000_000  # 14 s for 4,096 byte pairs; three times as much saved 0.05% of the tokens


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`; Ctrl-C, a full disk or a closed folder end in one line."""
    if hasattr(os, "register_at_fork"):  # the processes of `map` leave Ctrl-C to their parent
        os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    try:
        main()
    except BaseException as error:
        cause = error
        while cause and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__context__  # after Ctrl-C, `map` may raise an error of its own
        if cause:
            print("interrupted; the same command starts again", file=sys.stderr)
            sys.exit(130)  # the shell's convention for Ctrl-C
        if isinstance(error, OSError):
            fail(str(error))
        raise


def parser(doc: str, folder: Path) -> ArgumentParser:
    """A script's command line: its docstring as help, `--out_dir` and `--force`."""
    p = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--out_dir", type=Path, default=folder, help="where the set is written")
    p.add_argument("--force", action="store_true", help="make the set again even if it is there")
    return p


def file_stamp(path: Path, utf8: bool = False) -> list[str | int]:
    """Path, size and time of change of a file, for `settings`. Exits as `check_file` does."""
    check_file(path, utf8)
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def is_ready(out_dir: Path, settings: dict, force: bool) -> bool:
    """Whether the set made with `settings` is there in full (then says so); never with `force`."""
    try:
        meta = json.loads((out_dir / "meta.json").read_text(encoding="utf-8"))
        size = np.dtype(meta["dtype"]).itemsize
        whole = (out_dir / "tokenizer.json").is_file() and all(
            (out_dir / f"{split}.bin").stat().st_size == meta[f"{split}_tokens"] * size
            for split in ("train", "val"))
        ready = whole and meta["settings"] == settings and not force
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return False
    if ready:
        print(f"{out_dir}: already there, with these settings (--force makes it again)")
    return ready


# ------------------------------------------------------------------------------ writing a set


def dtype_for(vocab_size: int) -> np.dtype:
    """The smaller of uint16 and uint32 that holds the ids 0 to vocab_size - 1."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def write_bins(out_dir: Path, enc: tiktoken.Encoding | WordPieces, train_ids: Iterable[np.ndarray],
               val_ids: Iterable[np.ndarray], row_length: int | None,
               settings: dict | None = None, checker: str | None = None) -> None:
    """Write a prepared set into the folder `out_dir`, made if need be.

    The ids come in pieces of any shape, never held all at once. row_length: N when the ids are
    rows of N tokens that must not be cut elsewhere, None for a continuous stream. settings: how
    the set was made, for `is_ready`. checker: a module whose check(text) says what is wrong with a
    text, or None. An older set stays until all ids are written; from then on
    only renames are left. Raises ValueError for an id outside the vocabulary and for a split that
    is no whole number of rows; exits for a split without tokens.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    tokens = {}
    try:
        for split, pieces in (("train", train_ids), ("val", val_ids)):
            tokens[split] = write_ids(out_dir / f"{split}.bin.tmp", pieces, enc.n_vocab)
            if tokens[split] == 0:
                rows = f" (not one row of {row_length} tokens)" if row_length else ""
                fail(f"too little text for the {split} split{rows}")
            if row_length and tokens[split] % row_length:
                raise ValueError(f"{split}: {tokens[split]} tokens are no rows of {row_length}")
        (out_dir / "meta.json").unlink(missing_ok=True)
        for split in tokens:
            os.replace(out_dir / f"{split}.bin.tmp", out_dir / f"{split}.bin")
    finally:
        for split in ("train", "val"):
            (out_dir / f"{split}.bin.tmp").unlink(missing_ok=True)
    tokenizer.save(enc, out_dir / "tokenizer.json")
    meta = {"vocab_size": enc.n_vocab, "dtype": dtype_for(enc.n_vocab).name,
            "row_length": row_length, "train_tokens": tokens["train"], "val_tokens": tokens["val"],
            "tokenizer": identity(tokenizer.to_dict(enc)), "settings": settings,
            "checker": checker}
    tokenizer.write_json(meta, out_dir / "meta.json")
    shape = f", rows of {row_length}" if row_length else ""
    print(f"{out_dir}: {tokens['train']:,} train and {tokens['val']:,} val tokens, "
          f"V = {enc.n_vocab:,}{shape}")


def write_ids(path: Path, pieces: Iterable[np.ndarray], vocab_size: int) -> int:
    """Write the ids and return how many. Raises ValueError when one is not below vocab_size."""
    written = 0
    with open(path, "wb") as file:
        for piece in pieces:
            # A cast to uint16 would wrap silently, so look first.
            if piece.size and not (0 <= piece.min() and piece.max() < vocab_size):
                raise ValueError(f"an id is outside the vocabulary of {vocab_size}")
            file.write(piece.astype(dtype_for(vocab_size)).tobytes())
            written += piece.size
    return written


# ------------------------------------------------------------------------------ documents to rows


def check_file(path: Path, utf8: bool) -> None:
    """Exit when `path` is no file, is empty, or (if `utf8`) is not UTF-8 text."""
    if not path.is_file():
        fail(f"{path}: no such file")
    if path.stat().st_size == 0:
        fail(f"{path}: empty file")
    if utf8:
        try:
            with open(path, encoding="utf-8") as file:
                for _ in file:  # line by line: the file may be larger than memory
                    pass
        except UnicodeDecodeError:
            fail(f"{path}: not UTF-8 text")


def read_documents(path: Path) -> "Dataset":
    """The documents of a local file, as a dataset with a string column `text`: one a row in
    .parquet, .jsonl and .json, one a line in .txt. Exits when the file is not that."""
    if path.suffix not in LOADERS:
        fail(f"{path}: unknown kind of file, want one of {' '.join(LOADERS)}")
    # JSON is checked as well because its loader replaces bad bytes silently.
    check_file(path, utf8=path.suffix != ".parquet")
    import datasets

    # The library logs a bad file before it raises; `fail` says it once.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        # Without a byte-order mark, which is no text. The JSON loader leaves it out by itself.
        how = dict(encoding="utf-8-sig") if path.suffix == ".txt" else {}
        documents = datasets.load_dataset(LOADERS[path.suffix], data_files=str(path),
                                          split="train", **how)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        fail(f"{path}: cannot be read ({error.__cause__ or error})")
    return check_documents(documents, str(path))


def load_hub(name: str, split: str, revision: str | None = None) -> "Dataset":
    """A split of a dataset on the Hugging Face hub, downloaded once and then cached. Exits when the
    hub cannot be reached, has no such set, revision or split, or wants access asked for."""
    import datasets

    try:
        documents = datasets.load_dataset(name, split=split, revision=revision)
    except ConnectionError as error:
        fail(f"{error}; without a network, give a local copy with --file")
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError) as error:
        fail(f"{name}: {error.__cause__ or error}; a local copy goes with --file")
    return check_documents(documents, name)


def load_splits(name: str, val_split: str, val_docs: int | None) -> tuple["Dataset", "Dataset"]:
    """The hub's splits as (train, val); of val the last `val_docs` documents (None: all)."""
    train, val = load_hub(name, "train"), load_hub(name, val_split)
    first = 0 if val_docs is None else max(0, len(val) - val_docs)
    return train, val.select(range(first, len(val)))


def download(url: str) -> bytes:
    """What is at `url`; exits when it cannot be had within 30 seconds."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.read()
    except (OSError, ValueError, http.client.HTTPException) as error:  # a timeout is an OSError
        fail(f"cannot download {url} ({error}); give a local copy with --file")


def check_documents(documents: "Dataset", where: str) -> "Dataset":
    """`documents` itself; exits unless it has a string column `text`."""
    if "text" not in documents.column_names:
        fail(f"{where}: no column 'text' among {', '.join(documents.column_names)}")
    kind = getattr(documents.features["text"], "dtype", "nested")
    if kind not in ("string", "large_string"):
        fail(f"{where}: the column 'text' holds {kind}, not strings")
    return documents


def hold_out(documents: "Dataset", val_docs: int | None) -> tuple["Dataset", "Dataset"]:
    """(train, val): the last `val_docs` documents held out (None: 5%, at least 1)."""
    n = max(1, len(documents) // 20) if val_docs is None else val_docs
    if n >= len(documents):
        fail(f"cannot hold out {n:,} of {len(documents):,} documents (--val_docs)")
    first = len(documents) - n
    return documents.select(range(first)), documents.select(range(first, len(documents)))


def row_ends(enc: tiktoken.Encoding | WordPieces) -> tuple[int, int]:
    """The first and the last token of a packed row. The last one also ends every document."""
    if isinstance(enc, WordPieces):
        return enc.words.index("[CLS]"), enc.words.index("[SEP]")
    return enc.eot_token, enc.eot_token


def tokenise(documents: "Dataset", enc: tiktoken.Encoding | WordPieces, num_proc: int,
             clean: Callable[[str], str] | None = None) -> "Dataset":
    """The ids of each document that is not blank and that `enc` spells, after `clean`, EOS after
    it, in a column `ids`. They lie in the datasets cache on disk, where a second call with the same
    arguments finds them."""
    from datasets import Features, List, Value

    return documents.map(
        tokenise_batch, batched=True, fn_kwargs={"enc": enc, "clean": clean}, desc="tokenise",
        num_proc=num_proc if num_proc > 1 else None, remove_columns=documents.column_names,
        features=Features({"ids": List(Value(dtype_for(enc.n_vocab).name))}))


def tokenise_batch(batch: dict, enc: tiktoken.Encoding | WordPieces,
                   clean: Callable[[str], str] | None = None) -> dict:
    texts = [clean(text) if clean else text for text in batch["text"]
             if text and not text.isspace()]
    if isinstance(enc, WordPieces):
        encoder = tokenizer.word_piece_encoder(enc)
        ids = [found.ids for found in encoder.encode_batch(texts)]
    else:
        unknown = tokenizer.unknown_to(enc)
        known = [text for text in texts if unknown(text) is None]
        ids = enc.encode_ordinary_batch(known, num_threads=1)  # the cores go to `map`'s processes
    _, last = row_ends(enc)
    return {"ids": [document + [last] for document in ids]}


def read_ids(tokenised: "Dataset", desc: str) -> Iterator[np.ndarray]:
    """The column `ids` as one stream, a thousand documents a piece, with a progress bar."""
    import pyarrow.compute
    from tqdm import tqdm

    batches = tokenised.with_format("arrow").iter(batch_size=1000)
    for table in tqdm(batches, desc, -(-len(tokenised) // 1000), unit="k docs"):
        # Straight from Arrow's buffers: no Python integer for each of 9 billion ids.
        yield pyarrow.compute.list_flatten(table["ids"]).to_numpy()


def pack(pieces: Iterable[np.ndarray], eos: int, row_length: int, first: int | None = None
         ) -> Iterator[np.ndarray]:
    """Cut a stream of ids, in 1-D pieces of any length, into rows (n, L) = [EOS, L - 2 ids, EOS],
    with `first` for the first EOS where it is given. Ids left at the end, too few for a row, are
    dropped. Raises ValueError when L is below 3."""
    body = row_length - 2
    if body < 1:
        raise ValueError(f"row_length {row_length}: a row is EOS, at least one id, and EOS")
    rest = np.empty(0, dtype=np.int64)
    for piece in pieces:
        stream = np.concatenate([rest, piece])
        n = len(stream) // body
        rows = np.full((n, row_length), eos, dtype=stream.dtype)
        rows[:, 1:-1] = stream[:n * body].reshape(n, body)
        if first is not None:
            rows[:, 0] = first
        rest = stream[n * body:]
        yield rows


def learn(kind: str, texts: Sequence[str], vocab_size: int, name: str,
          special: tuple[str, ...] = ("<|endoftext|>",)) -> tiktoken.Encoding:
    """A tokenizer of the kind "word", "bpe" or "char" from the training texts. Byte pairs come from
    BPE_SAMPLE characters of them, drawn at random. Exits when these do not yield `vocab_size`."""
    if kind == "bpe":
        sample, size = {}, 0
        for i in np.random.default_rng(1337).permutation(len(texts)).tolist():
            if size >= BPE_SAMPLE:
                break
            sample[i] = texts[i] or ""
            size += len(sample[i])
        texts = [sample[i] for i in sorted(sample)]
    text = "".join(texts)
    try:
        if kind == "char":
            return tokenizer.char_encoding(text, name, special)
        make = tokenizer.train_bpe if kind == "bpe" else tokenizer.word_encoding
        return make(text, vocab_size, name, special)
    except ValueError as error:
        fail(str(error))


def write_packed(out_dir: Path, enc: tiktoken.Encoding | WordPieces, train: "Dataset",
                 val: "Dataset", block_size: int, num_proc: int, settings: dict | None = None,
                 clean: Callable[[str], str] | None = None) -> None:
    """Tokenise, pack and write two splits of documents as rows of `block_size` tokens. `enc` needs
    the token <|endoftext|>, or [CLS] and [SEP]; documents first go through `clean`. Memory stays at
    a few thousand documents however many there are."""
    rows, (first, last) = [], row_ends(enc)
    for split, documents in (("train", train), ("val", val)):
        tokenised = tokenise(documents, enc, num_proc, clean)
        rows.append(pack(read_ids(tokenised, f"write {split}"), last, block_size, first))
        if len(tokenised) < len(documents):
            print(f"{split}: left out {len(documents) - len(tokenised):,} documents, blank or with "
                  f"a character outside the vocabulary")
    write_bins(out_dir, enc, *rows, block_size, settings)


def prepare_packed(doc: str, folder: Path, block_size: int, source: str,
                   from_hub: Callable[[int | None], tuple["Dataset", "Dataset"]],
                   vocab_size: int | None = None, clean: Callable[[str], str] | None = None
                   ) -> None:
    """All of a packed set's script. block_size: the default. source: the hub's set and revision.
    from_hub(--val_docs) -> (train, val) is not called with --file. vocab_size: the default of byte
    pairs learnt from the training documents; None for GPT-2's vocabulary. clean: applied to
    a text before it is cut into BERT's word pieces; adds --vocabulary."""
    p = parser(doc, folder)
    p.add_argument("--file", type=Path, help="a local .parquet, .jsonl, .json or .txt instead")
    p.add_argument("--block_size", type=int, default=block_size, help="tokens in a row, L")
    p.add_argument("--val_docs", type=int, help="documents held out, the last ones")
    p.add_argument("--num_proc", type=int, default=min(8, os.cpu_count() or 1))
    if vocab_size:
        p.add_argument("--vocab_size", type=int, default=vocab_size, help="byte pairs, V")
    if clean:
        p.add_argument("--vocabulary", type=Path,
                       help="vocab.txt of bert-base-uncased: its word pieces, not GPT-2's tokens")
    args = p.parse_args()
    if args.block_size < 3:
        fail("--block_size must be at least 3: EOS, a token, EOS")
    if args.num_proc < 1 or (args.val_docs is not None and args.val_docs < 1):
        fail("--num_proc and --val_docs must be at least 1")
    settings = {"source": file_stamp(args.file) if args.file else source,
                "block_size": args.block_size, "val_docs": args.val_docs}
    if vocab_size:
        settings["vocab_size"] = args.vocab_size
    pieces = clean and args.vocabulary
    if pieces:
        settings["vocabulary"] = file_stamp(pieces, utf8=True)
    if is_ready(args.out_dir, settings, args.force):
        return
    if pieces:  # said before the download what is wrong with it
        enc = tokenizer.read_word_pieces(pieces)
        tokenizer.word_piece_encoder(enc)
    if args.file:
        train, val = hold_out(read_documents(args.file), args.val_docs)
    else:
        train, val = from_hub(args.val_docs)
    if vocab_size:
        enc = learn("bpe", train["text"], args.vocab_size, folder.name)
    elif not pieces:
        from lib.released import gpt2_encoding  # needs PyTorch, which is slow to import

        enc = gpt2_encoding()
    write_packed(args.out_dir, enc, train, val, args.block_size, args.num_proc, settings,
                 clean if pieces else None)
