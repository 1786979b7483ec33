"""What the prepare scripts share: reading documents, packing rows, writing a set.

A prepared set is a folder of four files:

    train.bin, val.bin   token ids, one after another, uint16 or uint32, no header
    tokenizer.json       the id <-> text map, see tokenizer.py
    meta.json            vocab_size, dtype, row_length, train_tokens, val_tokens,
                         tokenizer (its identity) and settings (how it was made)

meta.json is written last, and removed before any other file is replaced: where it
exists, the other three are whole and belong together.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import tiktoken

from data import tokenizer

if TYPE_CHECKING:  # slow to import, and the small sets do without it
    from datasets import Dataset

LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}


# Running a script


def fail(message: str) -> NoReturn:
    """End with status 1 and one line on stderr, for what the user can put right."""
    sys.exit(f"error: {message}")


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`; Ctrl-C, a full disk or a closed folder end in one line."""
    parent = os.getpid()

    def interrupt(signum: int, frame: object) -> None:
        # Ctrl-C reaches the processes of `map` as well, which inherit this handler:
        # they stay quiet, and the parent ends them.
        if os.getpid() == parent:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        main()
    except BaseException as error:
        # Cleaning up after Ctrl-C, `map` may raise an error of its own on top of it.
        if _has_cause(error, KeyboardInterrupt):
            print("interrupted; the same command starts again", file=sys.stderr)
            sys.exit(130)  # the shell's convention for Ctrl-C
        if isinstance(error, OSError):
            fail(str(error))
        raise


def _has_cause(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether `error`, or an error it was raised in answer to, is of this kind."""
    return error is not None and (isinstance(error, kind) or _has_cause(error.__context__, kind))


def parser(doc: str, folder: Path) -> argparse.ArgumentParser:
    """Command line of a prepare script: its docstring as help, `--out_dir` and `--force`."""
    p = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out_dir", type=Path, default=folder, help="where the set is written")
    p.add_argument("--force", action="store_true", help="make it anew though it is there")
    return p


def file_stamp(path: Path) -> list[str | int]:
    """What tells a file from a changed one, for `settings`: path, size, time of change."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def is_ready(out_dir: Path, settings: dict[str, Any], force: bool) -> bool:
    """Whether the set made with `settings` is there in full (then says so); never with `force`."""
    if force:
        return False
    try:
        meta = json.loads((out_dir / "meta.json").read_text(encoding="utf-8"))
        size = np.dtype(meta["dtype"]).itemsize
        whole = all(
            (out_dir / f"{split}.bin").stat().st_size == meta[f"{split}_tokens"] * size
            for split in ("train", "val")
        ) and (out_dir / "tokenizer.json").is_file()
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return False
    ready = whole and meta.get("settings") == settings
    if ready:
        print(f"{out_dir}: already there, with these settings (--force makes it anew)")
    return ready


# Writing a set


def dtype_for(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds the ids 0 to `vocab_size` - 1."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def write_bins(
    out_dir: Path,
    enc: tiktoken.Encoding,
    train_ids: Iterable[np.ndarray],
    val_ids: Iterable[np.ndarray],
    row_length: int | None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Write a prepared set (see the top of this file).

    Until everything is written under another name, an older set in the folder
    stays as it was; from then on only renames are left.

    Args:
        out_dir: the folder, made if need be.
        enc: the tokenizer the ids belong to.
        train_ids, val_ids: the ids in pieces of any shape; never held all at once.
        row_length: N when the stream is rows of N tokens and must not be cut
            elsewhere, None when it may be cut anywhere.
        settings: how the set was made, for `is_ready`.
    Raises:
        ValueError: an id outside the vocabulary, or a stream of no whole rows.
        SystemExit: a split without tokens.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    dtype = dtype_for(enc.n_vocab)
    tokens = {}
    try:
        for split, pieces in (("train", train_ids), ("val", val_ids)):
            tokens[split] = _write_ids(out_dir / f"{split}.bin.tmp", pieces, enc.n_vocab)
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
    meta = {
        "vocab_size": enc.n_vocab,
        "dtype": dtype.name,
        "row_length": row_length,
        "train_tokens": tokens["train"],
        "val_tokens": tokens["val"],
        "tokenizer": tokenizer.identity(tokenizer.to_dict(enc)),
        "settings": settings,
    }
    tokenizer.write_json(meta, out_dir / "meta.json")
    shape = f", rows of {row_length}" if row_length else ""
    print(
        f"{out_dir}: {tokens['train']:,} train and {tokens['val']:,} val tokens, "
        f"V = {enc.n_vocab:,}{shape}"
    )


def _write_ids(path: Path, pieces: Iterable[np.ndarray], vocab_size: int) -> int:
    """Write the ids to `path` and return how many; ValueError when one is not below V."""
    written = 0
    with open(path, "wb") as file:
        for piece in pieces:
            # A cast to uint16 would wrap silently, so look first.
            if piece.size and not (0 <= piece.min() and piece.max() < vocab_size):
                raise ValueError(f"an id is outside the vocabulary of {vocab_size}")
            file.write(piece.astype(dtype_for(vocab_size)).tobytes())
            written += piece.size
    return written


# Reading documents


def check_file(path: Path, utf8: bool) -> None:
    """End in one line when `path` is no file, is empty, or (if `utf8`) is not UTF-8 text."""
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


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; ends in one line as `check_file` does."""
    check_file(path, utf8=True)
    return path.read_text(encoding="utf-8")


def read_documents(path: Path) -> "Dataset":
    """The documents of a local file, as a dataset with a string column `text`.

    .parquet, .jsonl and .json hold one document a row, in the column `text`; in .txt
    every line is a document.  Ends in one line when the file is not that.
    """
    if path.suffix not in LOADERS:
        fail(f"{path}: unknown kind of file, want one of {' '.join(LOADERS)}")
    # JSON is checked as well because its loader replaces bad bytes silently.
    check_file(path, utf8=path.suffix != ".parquet")
    import datasets

    # The library logs a bad file before it raises; `fail` says it once.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        documents = datasets.load_dataset(
            LOADERS[path.suffix], data_files=str(path), split="train"
        )
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        fail(f"{path}: cannot be read ({_one_line(error.__cause__ or error)})")
    return check_documents(documents, str(path))


def load_hub(name: str, split: str, revision: str | None = None) -> "Dataset":
    """A split of a dataset on the Hugging Face hub, downloaded once and then cached.

    Ends in one line when the hub cannot be reached, when the name, the revision
    or the split is gone, or when access has to be asked for.
    """
    import datasets

    try:
        documents = datasets.load_dataset(name, split=split, revision=revision)
    except ConnectionError as error:
        fail(f"{_one_line(error)}; without a network, give a local copy with --file")
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError) as error:
        fail(f"{name}: {_one_line(error.__cause__ or error)}; a local copy goes with --file")
    return check_documents(documents, name)


def check_documents(documents: "Dataset", where: str) -> "Dataset":
    """`documents` itself; ends in one line unless it has rows and a string column `text`."""
    if "text" not in documents.column_names:
        fail(f"{where}: no column 'text' among {', '.join(documents.column_names)}")
    kind = getattr(documents.features["text"], "dtype", "nested")
    if kind not in ("string", "large_string"):
        fail(f"{where}: the column 'text' holds {kind}, not strings")
    if len(documents) == 0:
        fail(f"{where}: no documents")
    return documents


def hold_out(documents: "Dataset", val_docs: int | None) -> tuple["Dataset", "Dataset"]:
    """Split off the last `val_docs` documents (None: 5%, at least 1) as (train, val)."""
    n = max(1, len(documents) // 20) if val_docs is None else val_docs
    if n >= len(documents):
        fail(f"cannot hold out {n:,} of {len(documents):,} documents (--val_docs)")
    first = len(documents) - n
    return documents.select(range(first)), documents.select(range(first, len(documents)))


def _one_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# Large sets: documents -> ids -> rows


def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's byte-pair encoding (V = 50,257); ends in one line when it cannot be downloaded."""
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        fail(
            f"cannot download GPT-2's vocabulary ({type(error).__name__}); without a network, "
            "set TIKTOKEN_CACHE_DIR to a folder where tiktoken has put it before"
        )


def tokenise(documents: "Dataset", enc: tiktoken.Encoding, num_proc: int) -> "Dataset":
    """The documents' ids, each document followed by EOS, in a column `ids`.

    Blank documents are dropped.  The result lies in the datasets cache, on disk:
    a second call with the same documents and encoding finds it there.
    """
    from datasets import Features, List, Value

    return documents.map(
        _tokenise_batch,
        batched=True,
        fn_kwargs={"enc": enc},
        remove_columns=documents.column_names,
        features=Features({"ids": List(Value(dtype_for(enc.n_vocab).name))}),
        num_proc=num_proc if num_proc > 1 else None,
        desc="tokenise",
    )


def _tokenise_batch(batch: dict[str, list[Any]], enc: tiktoken.Encoding) -> dict[str, list[Any]]:
    texts = [text for text in batch["text"] if text and not text.isspace()]
    # One thread, since the processes of `map` already share out the cores.
    ids = enc.encode_ordinary_batch(texts, num_threads=1)
    return {"ids": [document + [enc.eot_token] for document in ids]}


def read_ids(tokenised: "Dataset", desc: str) -> Iterator[np.ndarray]:
    """The column `ids` as one stream, a thousand documents a piece, with a progress bar."""
    import pyarrow.compute
    from tqdm import tqdm

    with tqdm(total=len(tokenised), unit=" docs", desc=desc) as bar:
        for table in tokenised.with_format("arrow").iter(batch_size=1000):
            # Straight from Arrow's buffers: no Python integer for each of 9 billion ids.
            yield pyarrow.compute.list_flatten(table["ids"]).to_numpy()
            bar.update(len(table))


def pack(pieces: Iterable[np.ndarray], eos: int, row_length: int) -> Iterator[np.ndarray]:
    """Cut a stream of ids into rows `[EOS] + (L - 2 ids) + [EOS]`, L = `row_length`.

    Args:
        pieces: consecutive 1-D pieces of the stream, in which each document is
            followed by EOS; where a piece ends means nothing.
        eos: the id that begins and ends every row.
        row_length: L, at least 3.
    Yields:
        Arrays (rows, L).  Ids left at the end, too few for a row, are dropped.
    Raises:
        ValueError: when L leaves no room between the two EOS.
    """
    body = row_length - 2
    if body < 1:
        raise ValueError(f"row_length {row_length}: a row is EOS, at least one id, and EOS")
    rest = np.empty(0, dtype=np.int64)
    for piece in pieces:
        stream = np.concatenate([rest, piece])
        n = len(stream) // body
        rows = np.full((n, row_length), eos, dtype=stream.dtype)
        rows[:, 1:-1] = stream[: n * body].reshape(n, body)
        rest = stream[n * body :]
        yield rows


def write_packed(
    out_dir: Path,
    enc: tiktoken.Encoding,
    train: "Dataset",
    val: "Dataset",
    block_size: int,
    num_proc: int,
    settings: dict[str, Any] | None = None,
) -> None:
    """Tokenise, pack and write two splits of documents as rows of `block_size` tokens.

    `enc` needs the special token <|endoftext|>.  Memory stays at a few thousand
    documents however large the splits are.  Raises as `write_bins` and `pack`.
    """
    rows = {
        split: pack(
            read_ids(tokenise(documents, enc, num_proc), f"write {split}"), enc.eot_token, block_size
        )
        for split, documents in (("train", train), ("val", val))
    }
    write_bins(out_dir, enc, rows["train"], rows["val"], block_size, settings)


def packed_parser(doc: str, folder: Path, block_size: int) -> argparse.ArgumentParser:
    """Command line of the packed sets, on top of `parser`."""
    p = parser(doc, folder)
    p.add_argument("--file", type=Path, help="a local .parquet, .jsonl, .json or .txt, not the hub's set")
    p.add_argument("--block_size", type=int, default=block_size, help="tokens in a row, L")
    p.add_argument("--val_docs", type=int, help="documents held out, the last ones")
    p.add_argument("--num_proc", type=int, default=min(8, os.cpu_count() or 1))
    return p


def prepare_packed(
    args: argparse.Namespace,
    source: str,
    from_hub: Callable[[int | None], tuple["Dataset", "Dataset"]],
) -> None:
    """All of a packed set's preparation, in GPT-2's vocabulary.

    Args:
        args: what `packed_parser` gave.
        source: the hub's set and revision, to tell sets apart in `settings`.
        from_hub: the hub's (train, val) for the given `--val_docs`; not called with `--file`.
    Raises:
        SystemExit: on anything the user can put right.
    """
    if args.block_size < 3:
        fail("--block_size must be at least 3: EOS, a token, EOS")
    if args.num_proc < 1 or (args.val_docs is not None and args.val_docs < 1):
        fail("--num_proc and --val_docs must be at least 1")
    if args.file and not args.file.is_file():
        fail(f"{args.file}: no such file")
    settings = {
        "source": file_stamp(args.file) if args.file else source,
        "block_size": args.block_size,
        "val_docs": args.val_docs,
    }
    if is_ready(args.out_dir, settings, args.force):
        return
    if args.file:
        train, val = hold_out(read_documents(args.file), args.val_docs)
    else:
        train, val = from_hub(args.val_docs)
    enc = gpt2_encoding()
    write_packed(args.out_dir, enc, train, val, args.block_size, args.num_proc, settings)
