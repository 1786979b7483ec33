"""Short stories for children, made by grammar.py: V = 237 words, rows of 64. The default set.

    One windy morning Mia took a shiny kite to the lake. She lost it there, and she was very sad.
    Then Sam found the kite and gave it right back. Now Mia has the kite, and she is happy.

As exact a test as palindromes, but it reads: `grammar.check` names the first word that does not
agree with the story. There are 17 billion stories. 240,000 are for training, 4,000 others are held
out, as many from each plot as from any other. Made here in half a minute, no download, no licence.

    python data/stories/prepare.py
"""

import sys
from hashlib import sha256
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the top folder
from data import corpus, tokenizer
from data.lines import line_rows
from data.stories import grammar
from data.stories.grammar import PLOTS, count, tell
from lib.settings import fail


def main() -> None:
    parser = corpus.parser(__doc__, Path(__file__).parent)
    parser.add_argument("--n_train", type=int, default=240_000, help="stories for training")
    parser.add_argument("--n_val", type=int, default=4_000, help="stories held out")
    args = parser.parse_args()
    settings = {"n_train": args.n_train, "n_val": args.n_val, "block_size": 64, "seed": 1337,
                "grammar": sha256(Path(grammar.__file__).read_bytes()).hexdigest()[:12]}
    if min(args.n_train, args.n_val) < len(PLOTS):
        fail(f"--n_train and --n_val must be at least {len(PLOTS)}, one story from each plot")
    if corpus.is_ready(args.out_dir, settings, args.force):
        return
    rng = np.random.default_rng(settings["seed"])
    n_train, n_val = settings["n_train"] // len(PLOTS), settings["n_val"] // len(PLOTS)
    train, val = [], []
    for plot in PLOTS:
        # Different numbers are different stories, so no held-out story is among the others.
        numbers = np.unique(rng.integers(count(plot), size=2 * (n_train + n_val)))
        stories = [tell(plot, n) for n in rng.permutation(numbers)[:n_train + n_val].tolist()]
        train += stories[:n_train]
        val += stories[n_train:]
    enc = tokenizer.word_encoding("".join(f" {story}" for story in train), 2**16, "stories")
    rows = [line_rows(rng.permutation(stories), enc, settings["block_size"])
            for stories in (train, val)]
    corpus.write_bins(args.out_dir, enc, [rows[0]], [rows[1]], settings["block_size"], settings,
                      checker="data.stories.grammar")


if __name__ == "__main__":
    corpus.run(main)
