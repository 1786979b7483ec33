"""Your own text: any file, one token a word, a byte pair or a character.

    python data/text/prepare.py --file mine.txt --vocab_size 2000 --lines
    python data/text/prepare.py --file mine.txt --vocab_size 1024 --tokenizer bpe

With --lines every line is a row, filled up with the end of text: for captions, names, verses. A
line that occurs again counts once; 5% are held out, in ten runs of neighbours. Without --lines the
text is a stream, as for novels; its last 5% are held out. The vocabulary comes from the rest. Lines
with a word or character outside it are left out, and rows longer than --block_size.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the top folder
from data import corpus
from data.lines import prepare_lines, read_text


if __name__ == "__main__":
    corpus.run(lambda: prepare_lines(
        __doc__, Path(__file__).parent, vocab_size=4096, block_size=None, source=None,
        read=lambda args: zip(read_text(args.file).splitlines())))
