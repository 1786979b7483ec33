"""OpenWebText: 8 million web pages, GPT-2 byte pairs (V = 50,257), rows of 1,024.

About 9 billion tokens, 18 GB in train.bin. Download and datasets cache take some 100 GB more
(HF_HOME says where). The last 100,000 documents are held out. Source: Skylion007/openwebtext on
the Hugging Face hub, its collection released as CC0; the pages belong to their authors.

    python data/owt/prepare.py
    python data/owt/prepare.py --num_proc 32
    python data/owt/prepare.py --file mine.parquet      any documents, column `text`

With --file the last 5% of the documents are held out, or --val_docs of them.
An interrupted run leaves no half-written set; the next one goes on from the cache.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the top folder
from data import corpus

NAME = "Skylion007/openwebtext"
# The main branch holds a loading script, which `datasets` 4 and later refuse. The hub keeps its
# own conversion to data files under this revision.
REVISION = "refs/convert/parquet"


def from_hub(val_docs: int | None) -> tuple:
    """The hub's documents as (train, val), the last `val_docs` (None: 100,000) held out."""
    documents = corpus.load_hub(NAME, "train", revision=REVISION)
    return corpus.hold_out(documents, 100_000 if val_docs is None else val_docs)


if __name__ == "__main__":
    corpus.run(lambda: corpus.prepare_packed(
        __doc__, Path(__file__).parent, 1024, source=f"{NAME}@{REVISION}", from_hub=from_hub))
