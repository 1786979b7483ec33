"""Short stories for children, told and checked by one grammar.

A story follows one of the PLOTS word by word. A plot is a sequence of words and slots:

    word            itself; "a" becomes "an" before a vowel
    {toy}           a word of the class `toy`, the same one wherever the slot returns
    {toy2}          another one: slots of one class never hold the same word
    {food}s         the word of the slot `food`, with an s
    {He:name}       the pronoun for the slot `name`, He or She; likewise he, his, him

So every word must agree with what was told before: who has what, where it is, what colour it has
now. `tell` numbers the stories of a plot from 0, `check` finds the first wrong word of a text.
"""

import functools
import math
import re
from typing import NamedTuple

BOYS = "Ben Dan Finn Jack Leo Max Noah Sam Tim Tom"
GIRLS = "Amy Ann Ella Eva Kate Lily Lucy Mia Rose Zoe"
MEN = "brother father grandpa uncle"
WOMEN = "aunt grandma mother sister"
HE = {*BOYS.split(), *MEN.split()}
FORMS = {"He": "She", "he": "she", "His": "Her", "his": "her", "him": "her"}
PRONOUNS = {"he", "she", "his", "her", "him"}

CLASSES = {name: words.split() for name, words in dict(
    name=f"{BOYS} {GIRLS}",
    kin=f"{MEN} {WOMEN}",
    weather="cloudy cold rainy sunny warm windy",
    time="afternoon day evening morning",
    place="beach farm lake library market museum park pond river school station zoo",
    room="attic barn bedroom cellar garage kitchen",
    cover="bed chair clock cupboard curtain door sofa table",
    toy="""ball basket bell book cup doll drum hat kite mask pillow puppet puzzle robot scarf
        whistle""",
    adjective="big blue green new old pretty red small white yellow",
    fragile="bell bowl clock cup drum lamp mirror plate robot vase",
    glue="glue paste tape wax wire",
    wood="bench boat box cart chair shelf sled stool table wagon",
    colour="black blue brown green orange pink purple red white yellow",
    animal="cat cow dog duck fox goat hen horse mouse pig rabbit sheep",
    looks="big black brown old small thin white young",
    food="apple banana carrot cookie egg muffin pear plum",
    taste="big fresh good little small",
    sad="angry sad unhappy upset",
    happy="glad happy proud").items()}

PLOTS = {name: plot.split() for name, plot in dict(
    lost="""One {weather} {time} {name} took a {adjective} {toy} to the {place} . {He:name} lost it
        there , and {he:name} was {sad} . {name2} found the {toy} and gave it back . Now {name} has
        the {adjective} {toy} again , and {he:name} is {happy} .""",
    taken="""One {weather} {time} {name} took a {adjective} {toy} to the {place} . {name2} grabbed
        the {toy} and ran to the {place2} . {name} searched the {place} , but the {toy} was at the
        {place2} . Now {name2} has the {adjective} {toy} , and {name} is {sad} .""",
    traded="""One {weather} {time} {name} had a {adjective} {toy} , and {name2} had a {adjective2}
        {toy2} . {name} wanted the {toy2} , and {name2} wanted the {toy} . So they traded . Now
        {name} has the {adjective2} {toy2} , and {name2} has the {adjective} {toy} .""",
    mended="""One {weather} {time} {name} dropped a {adjective} {fragile} , and it broke .
        {He:name} was {sad} . {His:name} {kin} mended the {fragile} with {glue} . {name} thanked
        {him:kin} . Now {name} has the {adjective} {fragile} again , and {he:name} is {happy} .""",
    hungry="""One {weather} {time} {name} saw a {looks} {animal} at the {place} . The {animal} was
        hungry . {name} gave it a {food} . It ate the {food} and followed {him:name} home . Now the
        {looks} {animal} lives with {name} , and {he:name} is {happy} .""",
    hidden="""One {weather} {time} {name} and {name2} played in the {room} . {name} hid behind the
        {cover} . {name2} looked behind the {cover2} , but {he:name} was not there . Then
        {he:name2} looked behind the {cover} and found {him:name} . Now {name2} hides , and {name}
        looks for {him:name2} .""",
    painted="""One {weather} {time} {name} found a {colour} {wood} at the {place} . {He:name} did
        not like the colour , so {he:name} painted it {colour2} . Then {he:name} showed it to
        {name2} . {name2} liked the {colour2} {wood} . Now the {wood} is {colour2} , and {name} is
        {happy} .""",
    shared="""One {weather} {time} {name} met {name2} at the {place} . {name} had two {taste}
        {food}s , but {name2} had none . So {name} gave one {food} to {him:name2} . They sat down
        and ate the {food}s . Now the {taste} {food}s are gone , and {name2} is {happy} .""",
).items()}


class Slot(NamedTuple):
    """The parts of a slot such as {him:name2} or {food}s."""
    form: str                        # of a pronoun, or ""
    name: str                        # toy2
    kind: str                        # toy, its class
    plural: str                      # "s" or ""


SLOT = re.compile(r"{(?:(\w+):)?(([a-z]+)\d?)}(s?)")


@functools.cache
def read(word: str) -> Slot | None:
    """A slot of a plot; None for a word."""
    return (match := SLOT.fullmatch(word)) and Slot(*match.groups(""))


def words_of(text: str) -> list[str]:
    """Words, and each other sign by itself."""
    return re.findall(r"\w+|[^\w\s]", text)


def in_form(form: str, person: str) -> str:
    """The pronoun for a person: ("him", "Ann") -> "her"."""
    return form if person in HE else FORMS[form]


def options(slot: Slot, said: dict[str, str]) -> list[str]:
    """The words that may fill a slot, where `said` holds the words of earlier slots by name."""
    form, name, kind, plural = slot
    if value := said.get(name):
        return [in_form(form, value) if form else value + plural]
    taken = [said[other] for other in (kind, kind + "2") if other in said]
    return [word + plural for word in CLASSES[kind] if word not in taken]


def article(following: str) -> str:
    return "an" if following[:1] in tuple("aeiou") else "a"


# ------------------------------------------------------------------------------ telling


def count(plot: str) -> int:
    """How many different stories a plot has."""
    n, said = 1, {}
    for slot in filter(None, map(read, PLOTS[plot])):
        words = options(slot, said)
        n *= len(words)
        said.setdefault(slot.name, words[0].removesuffix(slot.plural))
    return n


def tell(plot: str, number: int) -> str:
    """Story `number` of a plot, 0 <= number < count(plot). The number picks the word of each slot,
    as if it was written with one digit a slot."""
    words, said = [], {}
    for word in PLOTS[plot]:
        if slot := read(word):
            choices = options(slot, said)
            number, digit = divmod(number, len(choices))
            word = choices[digit]
            said.setdefault(slot.name, word.removesuffix(slot.plural))
        words.append(word)
    for i, following in enumerate(words[1:]):
        if words[i] == "a":
            words[i] = article(following)
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
        if word == "a":
            allowed = [article("".join(words[i + 1:i + 2]))]
        if found not in allowed:
            where = f"'{found}' in sentence {1 + words[:i].count('.')}"
            return i, complaint(where, found, word, slot, said, allowed)
        if slot:
            said.setdefault(slot.name, found.removesuffix(slot.plural))
    if len(words) > len(PLOTS[plot]):
        return i, f"too long: '{words[i + 1]}' follows the end"
    return math.inf, None


def complaint(where: str, found: str, word: str, slot: Slot | None, said: dict[str, str],
              allowed: list[str]) -> str:
    """What is wrong with the word `found`, where the plot has `word`: a slot, or a word itself."""
    if word == "a" and found in ("a", "an"):
        return f"wrong article: {where}"
    if slot and slot.form and found.lower() in PRONOUNS:
        return f"wrong pronoun: {where}, but {said[slot.name]} is '{allowed[0]}'"
    if slot and not slot.form and found.removesuffix(slot.plural) in CLASSES[slot.kind]:
        if slot.name in said:
            return f"another {slot.kind}: {where}, but it was '{allowed[0]}'"
        return f"same {slot.kind} twice: {where}"
    wanted = f"'{allowed[0]}'" if len(allowed) == 1 else f"a word for {slot.kind}"
    return f"out of place: {where}, not {wanted}"
