"""One Billion Word benchmark (LM1B): shuffled news sentences, rows of 128 tokens.

30 million sentences in GPT-2's byte pairs (V = 50,257), packed one after another. The test split,
300,000 more, is held out. Source: statmt.org's benchmark, as the data files of dvruette/lm1b on
the Hugging Face hub (the benchmark's own repository there holds none); Chelba et al. 2013, arXiv
1312.3005, for research use.

The networks that the authors of the paper released for this set read word pieces (V = 30,522). For
those give --vocabulary=vocab.txt, the one of bert-base-uncased. The sentences are then detokenized,
each is followed by [SEP], and a row is [CLS], 126 tokens, [SEP]. This needs the package tokenizers.

    python data/lm1b/prepare.py
    python data/lm1b/prepare.py --num_proc 32
    python data/lm1b/prepare.py --file mine.parquet     any sentences, column `text`
    python data/lm1b/prepare.py --vocabulary=vocab.txt --out_dir=data/lm1b_bert

With --file the last 5% of the sentences are held out, or --val_docs of them.
An interrupted run leaves no half-written set; the next one goes on from the cache.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the top folder
from data import corpus

NAME = "dvruette/lm1b"
# The benchmark has a space around every sign. These take out, in this order, those that people do
# not write.
SPACED = (
    (r"\b(https?) : / / ", r"\1://"),
    (r" '(?=\w)", "'"),                                 # He 's, don 't
    (r" ([.,:;?!])(?= |$)", r"\1"),
    (r" / ", "/"),
    (r'" ([^"]+) "', r'"\1"'), (r"' ([^']+) '", r"'\1'"),
    (r"\( ([^()]+) \)", r"(\1)"), (r"\[ ([^][]+) \]", r"[\1]"),
    (r"([$£]) ", r"\1"))


def detokenized(text: str) -> str:
    """`He said : " I 'm in . "` -> `He said: "I'm in."`. BERT cuts at every sign anyway, so
    of its tokens this changes only those after a pound sign, which to BERT is none. Where its
    tokens stay the same, this may differ from what the authors' code writes."""
    for spaced, written in SPACED:
        text = re.sub(spaced, written, text)
    return text


if __name__ == "__main__":
    corpus.run(lambda: corpus.prepare_packed(
        __doc__, Path(__file__).parent, 128, source=NAME,
        from_hub=lambda val_docs: corpus.load_splits(NAME, "test", val_docs), clean=detokenized))
