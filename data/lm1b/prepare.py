"""One Billion Word benchmark (LM1B): shuffled news sentences, rows of 128 tokens.

30 million sentences in GPT-2's byte pairs (V = 50,257), packed one after another. The test split,
300,000 more, is held out. Source: statmt.org's benchmark, as the data files of dvruette/lm1b on
the Hugging Face hub (the benchmark's own repository there holds none); Chelba et al. 2013, arXiv
1312.3005, for research use.

    python data/lm1b/prepare.py
    python data/lm1b/prepare.py --num_proc 32
    python data/lm1b/prepare.py --file mine.parquet     any sentences, column `text`

With --file the last 5% of the sentences are held out, or --val_docs of them.
An interrupted run leaves no half-written set; the next one goes on from the cache.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the top folder
from data import corpus

NAME = "dvruette/lm1b"

if __name__ == "__main__":
    corpus.run(lambda: corpus.prepare_packed(
        __doc__, Path(__file__).parent, 128, source=NAME,
        from_hub=lambda val_docs: corpus.load_splits(NAME, "test", val_docs)))
