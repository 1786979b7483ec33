"""Sentences that people wrote to each other in a chat: V = 1,000 words, rows of 16.

    i have heard it is really fun!

From the chats of chitchat-dataset (PyPI, MIT licence): the sentences of 4 to 14 words, all of them
among the commonest, lower case, without duplicates. That is 60,700 sentences; with 500 words
35,600. Of the 180,000 different sentences of any words, 2,600 hold a name or an insult and 2,900
were written by a program: they are left out. 5% of the chats are held out.

    pip install chitchat-dataset==0.9.0
    python data/chat/prepare.py
    python data/chat/prepare.py --vocab_size 500
    python data/chat/prepare.py --file dataset.json      the package's file, without the package
"""

import json
import re
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the top folder
from data import corpus
from data.lines import prepare_lines
from lib.settings import fail

PACKAGE = "chitchat-dataset==0.9.0"
# Sentences with these words are left out: first names that the chats use, and insults.
LEAVE_OUT = set(
    "adam alan alex alfredo amy andrew ben brandon brian chris claire daniel david donald elon "
    "george harry jack jackson jake james jarvis jim joe john jordan josh kevin kj kyle lucas mark "
    "matt michael natalie nelson nick ollie peter robert ron ryan sadie sam scarlet smith steve "
    "taylor ted thomas tom tony trump tyler zac "
    "ass bastard bitch crap creep creepy damn dumb fat fool freak fuck gay hell idiot idiots "
    "jerk kill loser moron porn racist retarded sex sexy shit stupid suck sucks suicide ugly "
    "wtf".split())
# What a program in the chats wrote again and again: "the odd house meowed clumsily."
FILLER = re.compile(r"the \w+ \w+ \w+ \w+ly\.")


def sentences(chat: dict) -> list[str]:
    """The sentences of 4 to 14 words of a chat, less those that are left out."""
    found = []
    for message in (message for turn in chat["messages"] for message in turn):
        text = message["text"].lower().replace("’", "'")
        for sentence in re.split(r"(?<=[.!?])\s+|\n", text):
            words = re.findall(r"[\w']+", sentence)
            if (4 <= len(words) <= 14 and LEAVE_OUT.isdisjoint(words)
                    and not FILLER.fullmatch(sentence)):
                found.append(sentence)
    return found


def read(args: Namespace) -> list[list[str]]:
    """The sentences of each chat; exits without the package, and for a file that is not its."""
    if args.file:
        path = args.file
    else:
        try:
            import chitchat_dataset
        except ImportError:
            fail(f"these chats are a package; run: pip install {PACKAGE}")
        path = Path(chitchat_dataset.__file__).parent / "dataset.json"
    try:
        return [sentences(chat) for chat in json.loads(path.read_text("utf-8-sig")).values()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        fail(f"{path}: not the chats of {PACKAGE} ({type(error).__name__}: {error})")


if __name__ == "__main__":
    corpus.run(lambda: prepare_lines(
        __doc__, Path(__file__).parent, read, vocab_size=1000, block_size=16, source=PACKAGE))
