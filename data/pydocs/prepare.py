"""Python's own documentation: English prose that every Python carries, so no download.

The paragraphs of the language reference (`pydoc_data.topics`) and of the standard library's
docstrings that read as prose. About 5,900 paragraphs and 0.97 MB, or 320,000 tokens of a
byte-pair vocabulary of 1,024 learnt from the training part; the figures move a little with the
version of Python. The last 5% of the shuffled paragraphs are held out. Licence: Python's own (PSF).

    python data/pydocs/prepare.py
    python data/pydocs/prepare.py --vocab_size 512
    python data/pydocs/prepare.py --tokenizer char
"""

import ast
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the top folder
from data import corpus, tokenizer
from lib.settings import fail

# Installed packages are not Python's. The others are left out of some systems' Python or of later
# ones, and the docstrings of tests are labels rather than prose. The codecs of `encodings` repeat
# one sentence a hundred times.
SKIP = set("site-packages dist-packages test tests idlelib turtledemo lib2to3 distutils ensurepip "
           "encodings".split())


def topics() -> list[str]:
    """The pages of the language reference; exits where Python came without them."""
    try:
        from pydoc_data.topics import topics as pages
    except ImportError:
        fail("this Python came without its documentation (pydoc_data); one from python.org has it")
    return list(pages.values())


def docstrings(folder: Path) -> Iterator[str]:
    """Docstrings of all modules, classes and functions under `folder`, in sorted order. The files
    are parsed and never imported, so nothing in them runs."""
    for path in sorted(folder.rglob("*.py")):
        if SKIP.isdisjoint(path.relative_to(folder).parts):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in string literals
                tree = ast.parse(path.read_bytes())
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef
                              | ast.AsyncFunctionDef):
                    yield ast.get_docstring(node) or ""


def is_prose(paragraph: str) -> bool:
    """Over 60 ASCII characters, a capital first, over 90% letters and spaces: no table, no code."""
    plain = sum(c.isalpha() or c == " " for c in paragraph)
    return (len(paragraph) > 60 and paragraph.isascii() and paragraph[0].isupper()
            and plain > 0.9 * len(paragraph))


def paragraphs(texts: Iterable[str]) -> list[str]:
    """The prose paragraphs of `texts`, each on one line, without duplicates, in order."""
    blocks = (" ".join(b.split()) for text in texts for b in re.split(r"\n\s*\n", text))
    return list(dict.fromkeys(block for block in blocks if is_prose(block)))


def split(lines: list[str], seed: int) -> tuple[str, str]:
    """Shuffle the lines and hold out the last 5%: (train, val), a newline after each line."""
    order = np.random.default_rng(seed).permutation(len(lines))
    shuffled = [lines[i] + "\n" for i in order]
    n_train = len(lines) - len(lines) // 20
    return "".join(shuffled[:n_train]), "".join(shuffled[n_train:])


def main() -> None:
    parser = corpus.parser(__doc__, Path(__file__).parent)
    parser.add_argument("--tokenizer", choices=["bpe", "char"], default="bpe")
    parser.add_argument("--vocab_size", type=int, default=1024, help="tokens of --tokenizer bpe")
    args = parser.parse_args()
    bpe = args.tokenizer == "bpe"
    settings = {"python": sys.version.split()[0], "tokenizer": args.tokenizer,
                "vocab_size": args.vocab_size if bpe else None, "seed": 1337}
    if corpus.is_ready(args.out_dir, settings, args.force):
        return
    lines = paragraphs([*topics(), *docstrings(Path(sysconfig.get_path("stdlib")))])
    train, val = split(lines, settings["seed"])
    print(f"{len(lines):,} paragraphs, {len(train + val) / 1e6:.2f} MB")
    try:
        # From the training part alone: merges chosen to suit the held-out text would make it look
        # easier than it is. No special token: a newline ends a paragraph.
        enc = (tokenizer.train_bpe(train, args.vocab_size, "pydocs_bpe", special=()) if bpe
               else tokenizer.char_encoding(train, "pydocs_char"))
        train_ids, val_ids = tokenizer.encode_text(enc, train), tokenizer.encode_text(enc, val)
    except ValueError as error:  # also when the held-out part has a character of its own
        fail(str(error))
    corpus.write_bins(args.out_dir, enc, [train_ids], [val_ids], None, settings)


if __name__ == "__main__":
    corpus.run(main)
