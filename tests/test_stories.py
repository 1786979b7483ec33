"""data/stories: the grammar tells stories, the checker finds every wrong word."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest

from data.loader import tokenizer_from_dict
from data.stories import grammar

FEW = dict(weather="cold warm", time="Sunday evening", name="Ann Tom", looks="big little",
           toy="ball drum", place="lake zoo", friend="Amy Sam", sad="upset sad", happy="glad happy",
           room="attic barn", colour="blue red", gift="bell shell", kin="aunt uncle",
           glue="glue wire", nature="furry thin", animal="cat dog", food="pear plum")
FORMS = ["He She", "he she", "His Her", "him her"]       # classes, too


@pytest.fixture
def few(monkeypatch):
    """The grammar with a few words, and the set of all its stories."""
    assert FEW.keys() == grammar.CLASSES.keys()
    monkeypatch.setattr(grammar, "HE", {"Tom", "Sam"})
    for kind, words in FEW.items():
        monkeypatch.setitem(grammar.CLASSES, kind, words.split())
    told = [grammar.tell(plot, n) for plot in grammar.PLOTS for n in range(grammar.count(plot))]
    assert len(set(told)) == len(told)              # numbers and stories are one to one
    return set(told)


def test_exactly_the_wrong_words_are_found(few):
    """1,000 stories, every word replaced by every other of its classes, against the set of all."""
    classes = [words.split() for words in [*FEW.values(), *FORMS]]
    found = {True: 0, False: 0}
    for story in random.Random(0).sample(sorted(few), 1000):
        words = story.split(" ")
        for i, word in enumerate(words):
            bare = word.rstrip(",.")
            for other in {other for words in classes if bare in words for other in words} - {bare}:
                changed = " ".join(words[:i] + [other + word[len(bare):]] + words[i + 1:])
                is_story = changed in few
                assert (grammar.check(changed) is None) == is_story, changed
                found[is_story] += 1
    assert min(found.values()) > 1000               # both happen


def test_a_class_has_its_own_words_and_a_fits_before_each():
    classes = list(grammar.CLASSES.values())
    plots = {word for plot in grammar.PLOTS.values() for word in plot if not grammar.read(word)}
    words = [word for words in classes for word in words]
    assert len(set(words)) == len(words) and not plots & set(words)
    for plot in grammar.PLOTS.values():
        for word, following in zip(plot, plot[1:]):
            if word in ("a", "A"):
                slot = grammar.read(following)
                options = grammar.options(slot, {}) if slot else [following]
                assert not any(option[0] in "aeiou" for option in options)


def test_longer_shorter_and_foreign_texts_are_no_stories(few):
    for story in random.Random(1).sample(sorted(few), 50):
        words = story.split(" ")
        assert grammar.check(f"{story} Ann.").startswith("too long")
        for n in range(len(words)):
            assert grammar.check(" ".join(words[:n])) is not None
        assert grammar.check(" ".join(words[:5] + words[6:])) is not None
    assert grammar.check("") is not None
    assert grammar.check("the the the") is not None


def numbers(plot, n, seed):
    rng = random.Random(seed)
    return [rng.randrange(grammar.count(plot)) for _ in range(n)]


@pytest.mark.parametrize("plot", grammar.PLOTS)
def test_every_story_passes(plot):
    for n in [0, grammar.count(plot) - 1, *numbers(plot, 200, 2)]:
        story = grammar.tell(plot, n)
        assert grammar.check(story) is None, story
        assert 4 <= story.count(".") <= 6
        assert len(grammar.words_of(story)) < 64


def test_size_of_the_grammar():
    assert len(grammar.PLOTS) >= 8
    assert sum(map(grammar.count, grammar.PLOTS)) >= 1e8
    told = [grammar.tell(plot, n) for plot in grammar.PLOTS for n in numbers(plot, 1000, 3)]
    assert 200 <= len({word for story in told for word in grammar.words_of(story)}) <= 400


def test_people_are_he_or_she():
    """Pronouns agree with a list of our own, in sentences where only one person can be meant."""
    for word, pronoun in dict(Ann="she", Tom="he", Mia="she", Ben="he").items():
        story = next(s for n in numbers("lost", 4000, 4) if word == (
            s := grammar.tell("lost", n)).split()[3])
        assert f"and {pronoun} was" in story and f"and {pronoun} is" in story


STORY = ("One sunny evening Tom took a new kite to the park. He lost it there, and he was very "
         "sad. Then Amy found the kite and gave it right back. Now Tom has the kite, and he is "
         "glad.")


@pytest.mark.parametrize("old, new, mistake", [
    ("He lost", "She lost", "wrong pronoun: 'She' in sentence 2, but Tom is 'He'"),
    ("and he is", "and she is", "wrong pronoun: 'she' in sentence 4, but Tom is 'he'"),
    ("the kite and", "the drum and", "another toy: 'drum' in sentence 3, but it was 'kite'"),
    ("Now Tom", "Now Ann", "another name: 'Ann' in sentence 4, but it was 'Tom'"),
    ("Amy found", "Tom found", "out of place: 'Tom' in sentence 3, not a word for friend"),
    ("Amy found", "Amy lost", "out of place: 'lost' in sentence 3, not 'found'"),
    ("sunny", "sleepy", "out of place: 'sleepy' in sentence 1, not a word for weather"),
    (" Now Tom has the kite, and he is glad.", "",
     "too short: it ends before sentence 4 does"),
    ("glad.", "glad. Ann", "too long: 'Ann' follows the end"),
])
def test_mistakes_are_named(old, new, mistake):
    assert grammar.check(STORY) is None
    assert STORY.count(old) == 1
    assert grammar.check(STORY.replace(old, new)) == mistake


def test_what_is_prepared(tmp_path):
    """Rows of 64, all stories, no held-out story among the others; a second call does nothing."""
    command = [sys.executable, "data/stories/prepare.py", f"--out_dir={tmp_path}",
               "--n_train=1600", "--n_val=160"]
    subprocess.run(command, check=True)
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "already there" in again.stdout
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["checker"] == "data.stories.grammar" and meta["row_length"] == 64
    encoding = tokenizer_from_dict(json.loads((tmp_path / "tokenizer.json").read_text()))
    texts = {}
    for split, n in (("train", 1600), ("val", 160)):
        rows = np.fromfile(tmp_path / f"{split}.bin", meta["dtype"]).reshape(-1, 64)
        texts[split] = [encoding.decode(row).split("<|endoftext|>")[0] for row in rows.tolist()]
        assert len(set(texts[split])) == n
        assert all(grammar.check(text) is None for text in texts[split])
    assert not set(texts["train"]) & set(texts["val"])
