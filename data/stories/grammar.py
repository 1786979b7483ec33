"""Short stories for children, told and checked by one grammar.

A story follows one of the PLOTS word by word. A plot is a sequence of words and slots:

    word            itself
    {toy}           a word of the class `toy`, the same one wherever the slot returns
    {He:name}       the pronoun for the slot `name`, He or She; likewise he, His, him

So every word must agree with what was told before: who has what, where it is, what colour it has
now. No word is in two classes, and none that follows "a" starts with a vowel. `tell` numbers the
stories of a plot from 0, `check` finds the first wrong word of a text.
"""

import functools
import math
import re
from typing import NamedTuple

HE = set("Ben Dan Max Tom Finn Leo Sam Tim".split())
FORMS = {"He": "She", "he": "she", "His": "Her", "him": "her"}
PRONOUNS = {word.lower() for pair in FORMS.items() for word in pair}

CLASSES = {name: words.split() for name, words in dict(
    weather="bright calm cloudy cold foggy frosty quiet rainy snowy sunny warm windy",
    time="afternoon evening morning Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    name="Ben Dan Max Tom Ann Kate Lily Mia",
    looks="big cheap funny heavy little lovely new nice pretty shiny simple small tiny wooden",
    toy="boat car doll drum kite mask plane robot ship train",
    place="""beach bridge castle fair farm forest harbour lake library market meadow museum park
        playground pond river school zoo""",
    friend="Finn Leo Sam Tim Amy Eva Lucy Zoe",
    sad="cross gloomy glum sad unhappy upset",
    happy="cheerful delighted glad happy joyful merry pleased proud",
    room="attic barn cellar garage kitchen shed",
    colour="blue green purple red white yellow",
    gift="balloon bell feather marble ribbon shell",
    kin="brother cousin father grandpa uncle aunt grandma mother neighbour sister teacher",
    glue="cement glue paste string tape thread wire",
    nature="""fluffy furry greedy grey hairy hungry muddy naughty playful shaggy skinny spotted
        thin wild young""",
    animal="cat cow dog goat hen pig",
    food="""banana biscuit bun carrot cherry cookie cracker lemon muffin pancake peach pear plum
        potato radish tomato turnip""").items()}

OPENING = "One {weather} {time} {name} took a {looks} {toy} to the {place} . "

PLOTS = {name: (OPENING + plot).split() for name, plot in dict(
    lost="""{He:name} lost it there , and {he:name} was very {sad} . Then {friend} found the {toy}
        and gave it right back . Now {name} has the {toy} , and {he:name} is {happy} .""",
    taken="""{friend} grabbed the {toy} and ran off to the {room} . {name} searched , but the {toy}
        was in the {room} . Now {friend} has the {toy} , and {name} is {sad} .""",
    traded="""{friend} had a {colour} {gift} , and {name} wanted it . So {name} gave {friend} the
        {toy} for the {colour} {gift} . Now {friend} has the {toy} , and {name} has the {gift} .""",
    mended="""There it broke , and {he:name} was {sad} all day . {His:name} {kin} mended the {toy}
        at home with some {glue} . Now {name} has the {toy} , and {he:name} is {happy} .""",
    painted="""{He:name} did not like it and painted it all {colour} . Then {friend} came and liked
        the {colour} {toy} a lot . Now the {toy} is all {colour} , and {he:name} is {happy} .""",
    hidden="""{friend} took the {toy} and hid it in the {room} . {name} looked in the {room} and
        found the {toy} there . Now {name} hides the {toy} , and {friend} looks for it .""",
    given="""{friend} came by with no {toy} and looked very {sad} . So {name} gave the {toy} to
        {friend} and went home . Now {friend} has the {toy} , and {he:friend} is {happy} .""",
    chased="""A {nature} {animal} grabbed the {toy} and ran far away . {name} fed the {animal} a
        {food} and got it back . Now {name} has the {toy} , and the {animal} follows
        {him:name} .""",
).items()}


class Slot(NamedTuple):
    """The parts of a slot such as {him:name} or {toy}."""
    form: str                        # of a pronoun, or ""
    kind: str                        # toy, its class


SLOT = re.compile(r"{(?:(\w+):)?(\w+)}")


@functools.cache
def read(word: str) -> Slot | None:
    """A slot of a plot; None for a word."""
    return (match := SLOT.fullmatch(word)) and Slot(*match.groups(""))


def words_of(text: str) -> list[str]:
    """Words, and each other sign by itself."""
    return re.findall(r"\w+|[^\w\s]", text)


def options(slot: Slot, said: dict[str, str]) -> list[str]:
    """The words that may fill a slot, where `said` holds the words of earlier slots by class."""
    form, kind = slot
    if form:
        return [form if said[kind] in HE else FORMS[form]]
    return [said[kind]] if kind in said else CLASSES[kind]

# ------------------------------------------------------------------------------ telling


def count(plot: str) -> int:
    """How many different stories a plot has."""
    kinds = {slot.kind for slot in map(read, PLOTS[plot]) if slot}
    return math.prod(len(CLASSES[kind]) for kind in kinds)


def tell(plot: str, number: int) -> str:
    """Story `number` of a plot, 0 <= number < count(plot). The number picks the word of each slot,
    as if it was written with one digit a slot."""
    words, said = [], {}
    for word in PLOTS[plot]:
        if slot := read(word):
            choices = options(slot, said)
            number, digit = divmod(number, len(choices))
            word = choices[digit]
            said.setdefault(slot.kind, word)
        words.append(word)
    return re.sub(r" (?=[,.])", "", " ".join(words))

# ------------------------------------------------------------------------------ checking


def check(text: str) -> str | None:
    """None for a story; otherwise the first mistake, as "kind: detail", against the plot that the
    text follows the longest."""
    words = words_of(text)
    return max((follow(plot, words) for plot in PLOTS), key=lambda found: found[0])[1]


def follow(plot: str, words: list[str]) -> tuple[float, str | None]:
    """How many words agree with a plot before the first mistake, and that; or (inf, None)."""
    said = {}
    for i, word in enumerate(PLOTS[plot]):
        if i == len(words):
            return i, f"too short: it ends before sentence {1 + words.count('.')} does"
        slot, found = read(word), words[i]
        allowed = options(slot, said) if slot else [word]
        if found not in allowed:
            where = f"'{found}' in sentence {1 + words[:i].count('.')}"
            return i, complaint(where, found, slot, said, allowed)
        if slot:
            said.setdefault(slot.kind, found)
    if len(words) > len(PLOTS[plot]):
        return i, f"too long: '{words[i + 1]}' follows the end"
    return math.inf, None


def complaint(where: str, found: str, slot: Slot | None, said: dict[str, str], allowed: list[str]
              ) -> str:
    """What is wrong with the word `found` where a plot has a slot, or no slot but another word."""
    if slot and slot.form and found.lower() in PRONOUNS:
        return f"wrong pronoun: {where}, but {said[slot.kind]} is '{allowed[0]}'"
    if slot and not slot.form and found in CLASSES[slot.kind]:
        return f"another {slot.kind}: {where}, but it was '{allowed[0]}'"
    wanted = f"'{allowed[0]}'" if len(allowed) == 1 else f"a word for {slot.kind}"
    return f"out of place: {where}, not {wanted}"
