"""TinyStories: 2.1 million children's stories by a language model, byte pairs, rows of 128.

The 4,096 byte pairs are learnt from 10 MB of the training stories, in 14 seconds. The set's own
validation split is held out. Source: roneneldan/TinyStories on the Hugging Face hub (CDLA-Sharing).

    python data/tinystories/prepare.py
    python data/tinystories/prepare.py --file mine.parquet      any stories, column `text`

With --file the last 5% of the stories are held out, or --val_docs of them. Stories with a character
that those 10 MB do not have are left out.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the top folder
from data import corpus

NAME = "roneneldan/TinyStories"

if __name__ == "__main__":
    corpus.run(lambda: corpus.prepare_packed(
        __doc__, Path(__file__).parent, 128, source=NAME, vocab_size=4096,
        from_hub=lambda val_docs: corpus.load_splits(NAME, "validation", val_docs)))
