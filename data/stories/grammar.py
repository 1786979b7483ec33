"""Short stories for children, told and checked by one grammar.

A story follows one of the PLOTS word by word. A plot is a sequence of words and slots:

    word            itself
    {toy}           a word of the class `toy`, the same one wherever the slot returns
    {He:name}       the pronoun for the slot `name`, He or She; likewise he, his, him

So every word must agree with what was told before: who has what, where it is, what colour it has
now. No word is in two classes, and none that follows "a" starts with a vowel. `tell` numbers the
stories of a plot from 0, `check` finds the first wrong word of a text.
"""

import functools
import math
import re
from typing import NamedTuple

HE = set("Ben Dan Jack Max Tom Finn Leo Noah Sam Tim brother father grandpa uncle".split())
FORMS = {"He": "She", "he": "she", "His": "Her", "his": "her", "him": "her"}
PRONOUNS = {"he", "she", "his", "her", "him"}

CLASSES = {name: words.split() for name, words in dict(
    weather="cloudy cold rainy sunny warm windy",
    time="afternoon day evening morning",
    name="Ben Dan Jack Max Tom Ann Kate Lily Mia Rose",
    size="big little new nice pretty shiny small wooden",
    toy="boat car doll drum flute horn kite mask plane puppet robot ship sled train truck wagon",
    place="beach farm lake market museum park pond river school zoo",
    friend="Finn Leo Noah Sam Tim Amy Ella Eva Lucy Zoe",
    sad="angry sad upset",
    happy="glad happy proud",
    room="attic barn cellar garage garden kitchen shed tent",
    colour="blue brown green pink purple red white yellow",
    gift="balloon bell book feather marble ribbon shell stamp",
    kin="brother father grandpa uncle aunt grandma mother sister",
    glue="glue paste tape wire",
    cover="bush fence gate hedge rock statue tree wall",
    low="bench blanket bridge log table",
    looks="fluffy furry grey hungry skinny spotted thin young",
    animal="cat cow dog duck goat hen horse pig",
    food="banana carrot cookie lemon muffin pear plum").items()}

OPENING = "One {weather} {time} {name} took a {size} {toy} to the {place} . "

PLOTS = {name: (OPENING + plot).split() for name, plot in dict(
    lost="""{He:name} lost it there , and {he:name} was {sad} . {friend} found the {toy} and gave it
        back . Now {name} has the {size} {toy} again , and {he:name} is {happy} .""",
    taken="""{friend} grabbed the {toy} and ran to the {room} . {name} searched the {place} , but
        the {toy} was in the {room} . Now {friend} has the {size} {toy} , and {name} is {sad} .""",
    traded="""{friend} had a {colour} {gift} there . {name} wanted the {gift} , and {friend} wanted
        the {toy} . So they traded . Now {name} has the {colour} {gift} , and {friend} has the
        {size} {toy} .""",
    mended="""There it broke , and {he:name} was {sad} . {His:name} {kin} mended the {toy} with
        {glue} . {name} thanked {him:kin} . Now {name} has the {size} {toy} again , and {he:name} is
        {happy} .""",
    painted="""{He:name} did not like how it looked , so {he:name} painted it {colour} . Then
        {he:name} showed it to {friend} . {friend} liked the {colour} {toy} . Now the {size} {toy}
        is {colour} , and {name} is {happy} .""",
    hidden="""{friend} hid it behind the {cover} . {name} looked under the {low} , but it was not
        there . Then {he:name} looked behind the {cover} and found it . Now {name} hides the {size}
        {toy} , and {friend} looks for it .""",
    given="""There {he:name} met {friend} . {friend} had no {toy} and was {sad} . So {name} gave
        {him:friend} the {toy} . Now {friend} has the {size} {toy} , and {he:friend} is {happy}
        .""",
    chased="""A {looks} {animal} grabbed it and ran away . {name} called the {animal} and gave it a
        {food} . It ate the {food} and dropped the {toy} . Now {name} has the {size} {toy} again ,
        and the {looks} {animal} follows {him:name} home .""",
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
