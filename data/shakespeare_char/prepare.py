"""Tiny Shakespeare, one token a character: V = 65, 1.1 million characters.

40,000 lines of the plays, the last tenth held out. From Andrej Karpathy's char-rnn; public domain.

    python data/shakespeare_char/prepare.py
    python data/shakespeare_char/prepare.py --file input.txt      any UTF-8 text
"""

import http.client
import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the top folder
from data import corpus, tokenizer
from lib.settings import fail

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def download(url: str) -> str:
    """The text at `url`; exits when it cannot be had within 30 seconds."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.read().decode("utf-8")
    except (OSError, ValueError, http.client.HTTPException) as error:  # a timeout is an OSError
        fail(f"cannot download {url} ({error}); give a local copy with --file")


def main() -> None:
    parser = corpus.parser(__doc__, Path(__file__).parent)
    parser.add_argument("--file", type=Path, help="a local text file instead of the download")
    args = parser.parse_args()
    settings = {"source": corpus.file_stamp(args.file, utf8=True) if args.file else URL}
    if corpus.is_ready(args.out_dir, settings, args.force):
        return
    text = args.file.read_text(encoding="utf-8") if args.file else download(URL)
    enc = tokenizer.char_encoding(text, "shakespeare_char")
    ids = tokenizer.encode_text(enc, text)
    n_train = len(ids) * 9 // 10
    corpus.write_bins(args.out_dir, enc, [ids[:n_train]], [ids[n_train:]], None, settings)


if __name__ == "__main__":
    corpus.run(main)
