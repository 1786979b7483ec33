"""Tiny Shakespeare, one token a character: V = 65, 1.1 million characters.

40,000 lines of the plays, the last tenth held out. From Andrej Karpathy's char-rnn; public domain.

    python data/shakespeare_char/prepare.py
    python data/shakespeare_char/prepare.py --file input.txt      any UTF-8 text
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the top folder
from data import corpus, tokenizer

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def main() -> None:
    parser = corpus.parser(__doc__, Path(__file__).parent)
    parser.add_argument("--file", type=Path, help="a local text file instead of the download")
    args = parser.parse_args()
    settings = {"source": corpus.file_stamp(args.file, utf8=True) if args.file else URL}
    if corpus.is_ready(args.out_dir, settings, args.force):
        return
    text = args.file.read_text(encoding="utf-8-sig") if args.file else corpus.download(URL).decode()
    enc = tokenizer.char_encoding(text, "shakespeare_char")
    ids = tokenizer.encode_text(enc, text)
    n_train = len(ids) * 9 // 10
    corpus.write_bins(args.out_dir, enc, [ids[:n_train]], [ids[n_train:]], None, settings)


if __name__ == "__main__":
    corpus.run(main)
