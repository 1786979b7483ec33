"""Descriptions of pictures by their viewers: V = 4,096 words, rows of 16.

    a boy jumping off a trampoline into a lake.

145,000 English captions of Multi30k, five of each picture, lower case; captions with rarer words or
more than 16 tokens are left out. 5% of the pictures are held out with all their captions. From
github.com/multi30k/dataset, under Flickr30k's terms (research).

    python data/captions/prepare.py
    python data/captions/prepare.py --vocab_size 8192 --block_size 24
    python data/captions/prepare.py --file mine.txt      one caption a line; or .parquet

With --file ten runs of neighbouring lines are held out, 5% in all: captions of one picture stay
together where they follow each other.
"""

import gzip
import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the top folder
from data import corpus
from data.lines import prepare_lines, read_text

URL = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task2/raw/train.{}.en.gz"


def read(args: Namespace) -> Iterable[tuple[str, ...]]:
    """The captions of each picture: line n of each of the five files describes picture n."""
    texts = ([read_text(args.file)] if args.file else
             [gzip.decompress(corpus.download(URL.format(n))).decode() for n in range(1, 6)])
    return zip(*(text.lower().splitlines() for text in texts))


if __name__ == "__main__":
    corpus.run(lambda: prepare_lines(
        __doc__, Path(__file__).parent, read, vocab_size=4096, block_size=16, source=URL))
