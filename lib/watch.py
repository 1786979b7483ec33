"""Shows a text while it is made (sample.py --watch). Each guess is drawn over the last: pale where
the network is unsure of a token, bold where it was told the token."""

import contextlib
import os
import sys
import time
from shutil import get_terminal_size
from unicodedata import east_asian_width

import torch
from torch import Tensor

from flow import Given, most_likely
from flowmap import confidence

PAUSE, WHOLE = 0.1, 1.0          # seconds that a frame stays, that all of a text take at least


class Watch:
    """The first text of a batch: its first noise, then every guess of flow.decode. decoder: of
    tokens; E (V, d); name: of the model; steps: number of guesses; given (L,): tokens, or -1."""

    def __init__(self, decoder, E: Tensor, name: str, steps: int, given: Tensor):
        self.decoder, self.E, self.name, self.steps, self.given = decoder, E, name, steps, given
        self.frames = self.height = 0                               # drawn; lines of the last

    def noise(self, z: Tensor) -> Tensor:
        """z (B, L, d) as it came. At first drawn, at each place the token of nearest embedding."""
        if not self.frames:
            tokens, known = torch.cdist(z[0].float(), self.E.float()).argmin(-1), self.given >= 0
            self.draw("noise", self.given.where(known, tokens), torch.zeros(len(tokens)), known,
                      ends=False)
        return z

    def __call__(self, model, hidden: Tensor) -> None:
        """hidden (B, L, d) of `model`, which may be told tokens."""
        tokens = most_likely(model.head, hidden[:1])                # (1, L)
        sure = confidence(model.head, hidden[:1], tokens)[0]
        known = torch.zeros_like(tokens[0], dtype=torch.bool)
        if isinstance(model, Given):
            known, tokens = model.known[0], model.y[:1].where(model.known[:1], tokens)
        self.draw(f"{self.frames} of {self.steps}", tokens[0], sure, known)

    def draw(self, label: str, tokens: Tensor, sure: Tensor, known: Tensor, ends=True) -> None:
        """A frame of tokens (L,), how sure, and which are told; without a terminal a line. Without
        `ends` an end of text is nothing, and the text goes on."""
        self.last, self.frames = (tokens, sure, known), self.frames + 1
        told = max((i + 1 for i, token in enumerate(self.given.tolist()) if token >= 0), default=0)
        pieces, used = spell(self.decoder, tokens.tolist(), told, ends), 0
        lines = [f"{self.name}, {label}", ""]
        text = f"{lines[0]}:  {' '.join(''.join(pieces).split())}\n"
        screen = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        columns, rows = get_terminal_size()
        for piece, p, bold in zip(pieces, sure.tolist(), known.tolist()):
            # Greys that show on white and on black, and what is certain in the usual colour.
            style = "\x1b[0;1m" if bold else "\x1b[0m" if p > 0.9 else (
                f"\x1b[0;38;5;{240 + round(10 * p)}m")
            for i, part in enumerate(piece[:(columns - 1) // 2].split("\n")):
                size = sum(1 + (east_asian_width(c) in "WF") for c in part)
                if i or used + size >= columns:                     # the last column stays free
                    lines, used = [*lines, ""], 0
                lines[-1] += style + (part if used else part.lstrip())
                used += size
        if screen:
            up, self.height = f"\x1b[{self.height}A" * (self.height > 0), min(len(lines), rows - 1)
            text = up + "".join(f"\r{line}\x1b[0m\x1b[K\n" for line in lines[:rows - 1]) + "\x1b[J"
        with contextlib.suppress(BrokenPipeError):                  # sample.py still has to write
            print(text, end="", flush=True)
        time.sleep(max(PAUSE, WHOLE / self.steps) * screen)


def spell(decoder, tokens: list[int], told: int = 0, ends: bool = True) -> list[str]:
    """The text of each token up to an end of text, as data.loader.text_of finds it. In packed rows,
    which begin with one, it is a blank line. Without `ends` it is nothing, and does not end them.
    """
    texts = [decoder.decode(tokens[:n]).rstrip("\ufffd")            # half a character
             for n in range(len(tokens) + 1)]
    pieces, shown = [whole[len(before):] for before, whole in zip(texts, texts[1:])], []
    packed = pieces[:1] == ["<|endoftext|>"]
    for i, piece in enumerate(pieces):
        if piece.endswith("<|endoftext|>") and packed:
            piece = "\n\n" * (i > 0)
        elif piece.endswith("<|endoftext|>") and not ends:
            piece = ""
        elif piece.endswith("<|endoftext|>") and i >= told:
            break
        shown.append("".join(c for c in piece if c.isprintable() or c == "\n"))
    return shown
