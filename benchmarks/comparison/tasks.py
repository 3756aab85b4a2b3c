"""The comparison's generated tasks: twelve to pretrain on, four to fine-tune on, and a little text.

A task draws a question and its only right answer. The questions of a test are kept out of the
training rows.
"""

import itertools
import random
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from olmoe_jax.quickstart import NAMES, TEMPLATES, THINGS

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CITIES = "Bergen Cairo Delhi Lima Lyon Milan Osaka Oslo Paris Porto Quito Riga Rome Turin"
COLOURS = "black blue brown gold green grey pink red white yellow"
MONTHS = "January February March April May June July August September October November December"
UNITS = {"m cm": 100, "km m": 1000, "kg g": 1000, "h min": 60, "weeks days": 7, "pairs socks": 2}
BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def _dictionary(english: str, other: str) -> dict[str, str]:
    return dict(zip(english.split(), other.split(), strict=True))


NOUNS = _dictionary(
    "bird boy cat cow dog fish girl goose horse king mouse queen",
    "avo bubo kato bovo hundo fiso knabi ansero cevalo rego muso regi",
)
ADJECTIVES = _dictionary(
    "big cold fast good old red small young", "granda frida rapa bona mala rubi eta juna"
)
VERBS = _dictionary("calls finds follows hears likes sees", "vokas trovas sekvas audas satas vidas")

TEXT = """\
Four score and seven years ago our fathers brought forth on this continent, a new nation, \
conceived in Liberty, and dedicated to the proposition that all men are created equal.
Now we are engaged in a great civil war, testing whether that nation, or any nation so conceived \
and so dedicated, can long endure. We are met on a great battle-field of that war.
We have come to dedicate a portion of that field, as a final resting place for those who here gave \
their lives that that nation might live.
It is altogether fitting and proper that we should do this. But, in a larger sense, we can not \
dedicate, we can not consecrate, we can not hallow this ground.
Shall I compare thee to a summer's day? Thou art more lovely and more temperate: Rough winds do \
shake the darling buds of May, And summer's lease hath all too short a date.
So long as men can breathe or eyes can see, So long lives this, and this gives life to thee.
It is a truth universally acknowledged, that a single man in possession of a good fortune, must be \
in want of a wife.
It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of \
foolishness.
Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my \
purse, I thought I would sail about a little and see the watery part of the world.
""".splitlines()
"""Public-domain passages (Lincoln, Shakespeare, Austen, Dickens, Melville), a line each."""


class Task(NamedTuple):
    """A task: what it asks, in a few words, and a function that draws a question and its answer."""

    about: str
    draw: Callable[[random.Random], tuple[str, str]]


def _add(r: random.Random) -> tuple[str, str]:
    a, b = r.randint(1, 99), r.randint(1, 99)
    return f"add {a} and {b}:", f"{a + b}"


def _subtract(r: random.Random) -> tuple[str, str]:
    a, b = sorted((r.randint(1, 99), r.randint(1, 99)))
    return f"subtract {a} from {b}:", f"{b - a}"


def _largest(r: random.Random) -> tuple[str, str]:
    numbers = r.sample(range(10, 100), 3)
    return f"largest of {', '.join(map(str, numbers))}:", f"{max(numbers)}"


def _story(r: random.Random) -> tuple[str, str]:
    text, sign = r.choice(TEMPLATES)
    name, things = r.choice(NAMES.split()), r.choice(THINGS.split())
    a, b = r.randint(1, 12), r.randint(1, 12)
    a, result = (a + b, a) if sign == "-" else (a, a + b)
    return text.format(name=name, things=things, a=a, b=b), f"{result} {things}"


def _letters(r: random.Random) -> list[str]:
    return r.sample(LETTERS, 5)


def _sort(r: random.Random) -> tuple[str, str]:
    letters = _letters(r)
    return f"sort {' '.join(letters)}:", " ".join(sorted(letters))


def _count(r: random.Random) -> tuple[str, str]:
    letters, wanted = r.choices("abc", k=8), r.choice("abc")
    return f"count {wanted} in {' '.join(letters)}:", f"{letters.count(wanted)}"


def _convert(r: random.Random) -> tuple[str, str]:
    units, n = r.choice(list(UNITS)), r.randint(1, 99)
    one, other = units.split()
    return f"convert {n} {one} to {other}:", f"{n * UNITS[units]} {other}"


def _look_up(r: random.Random) -> tuple[str, str]:
    table = {colour: r.randint(0, 9) for colour in r.sample(COLOURS.split(), 4)}
    wanted = r.choice(list(table))
    entries = ", ".join(f"{colour} {value}" for colour, value in table.items())
    return f"in {entries} find {wanted}:", f"{table[wanted]}"


def _date(r: random.Random) -> tuple[str, str]:
    year, month, day = r.randint(1900, 2099), r.randint(1, 12), r.randint(1, 28)
    return f"write {year}-{month:02}-{day:02}:", f"{day} {MONTHS.split()[month - 1]} {year}"


def _sentence(r: random.Random) -> tuple[str, str]:
    """Returns an English sentence and the same in a language that puts the verb last."""
    (who, whom), verb = r.sample(list(NOUNS), 2), r.choice(list(VERBS))
    how, which = r.choice(list(ADJECTIVES)), r.choice(list(ADJECTIVES))
    english = f"the {how} {who} {verb} the {which} {whom}"
    words = NOUNS[who], ADJECTIVES[how], NOUNS[whom], ADJECTIVES[which], VERBS[verb]
    return english, " ".join(words)


def _translate(r: random.Random) -> tuple[str, str]:
    english, other = _sentence(r)
    return f"translate {english}:", other


def _extract(r: random.Random) -> tuple[str, str]:
    name, age, city = r.choice(NAMES.split()), r.randint(10, 99), r.choice(CITIES.split())
    return (
        f"extract {name}, {age}, {city}:",
        f'{{"name": "{name}", "age": {age}, "city": "{city}"}}',
    )


def _close(r: random.Random) -> tuple[str, str]:
    opened = r.choices(list(BRACKETS), k=r.randint(4, 8))
    return f"close {' '.join(opened)} :", " ".join(BRACKETS[b] for b in reversed(opened))


def _descend(r: random.Random) -> tuple[str, str]:
    letters = _letters(r)
    return f"sort down {' '.join(letters)}:", " ".join(sorted(letters, reverse=True))


def _order(r: random.Random) -> tuple[str, str]:
    name, things, n = r.choice(NAMES.split()), r.choice(THINGS.split()), r.randint(2, 99)
    asked, intent = r.choice((("wants to buy", "buy"), ("sends back", "return")))
    slots = f'{{"who": "{name}", "number": {n}, "what": "{things}"}}'
    return f"{name} {asked} {n} {things}:", f'{{"intent": "{intent}", "slots": {slots}}}'


def _back(r: random.Random) -> tuple[str, str]:
    english, other = _sentence(r)
    return f"translate back {other}:", english


def _cipher(r: random.Random) -> tuple[str, str]:
    letters = _letters(r)
    shifted = (LETTERS[(LETTERS.index(letter) + 3) % 26] for letter in letters)
    return f"encode {' '.join(letters)}:", " ".join(shifted)


TASKS = {
    "add": Task("sums up to 198", _add),
    "subtract": Task("differences below 99", _subtract),
    "largest": Task("the largest of three numbers", _largest),
    "story": Task("word problems", _story),
    "sort": Task("five letters in order", _sort),
    "count": Task("one letter among eight", _count),
    "convert": Task("units", _convert),
    "look_up": Task("a table of four entries", _look_up),
    "date": Task("a date in words", _date),
    "translate": Task("a toy language", _translate),
    "extract": Task("JSON of three fields", _extract),
    "close": Task("brackets, closed in order", _close),
}
"""The tasks of pretraining."""

TARGETS = {
    "descend": Task("letters in falling order: a known task in another form", _descend),
    "order": Task("JSON of nested fields: a known task in another form", _order),
    "back": Task("the toy language into English: a known task the other way round", _back),
    "cipher": Task("each letter three further: a task never seen", _cipher),
}
"""The tasks of fine-tuning."""


def rows(task: Task, count: int, seed: int) -> list[dict[str, str]]:
    """Returns `count` rows with distinct questions, each a prompt and a completion."""
    found: dict[str, dict[str, str]] = {}
    draws = _draws(task, seed)
    while len(found) < count:
        found.update([next(draws)])
    return list(found.values())


def stream(
    task: Task, count: int, seed: int, without: Collection[str] = ()
) -> list[dict[str, str]]:
    """Returns `count` rows like `rows`, but questions may come again, but those of `without`."""
    draws = ((question, row) for question, row in _draws(task, seed) if question not in without)
    return [row for _, row in itertools.islice(draws, count)]


def _draws(task: Task, seed: int) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields questions and their rows for ever."""
    r = random.Random(f"{task.about} {seed}")
    while True:
        question, answer = task.draw(r)
        yield question, {"prompt": question, "completion": answer}
