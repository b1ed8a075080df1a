"""The four behaviours: their content items, and how a prompt is made of them.

==============  ==============================================  =======  =======  =================================
behaviour       prompt                                          correct  wrong    counterpart
==============  ==============================================  =======  =======  =================================
agreement       Everyone knows that the keys near the cabinet   " are"   " is"    the subject's number (key) swapped
capital         The capital of France is the city of            " Paris" " Rome"  another country (Italy)
greater_than    The siege lasted from 1762 to 17                "7"      "3"      a year of another decade (1722)
addition        9 + 4 = 13, 7 + 1 = 8, 2 + 6 =                  "8"      "5"      other digits (1 + 4)
==============  ==============================================  =======  =======  =================================

Agreement: the noun beside the verb always has the other number, so following it gives 0 %; half of the subjects are
singular. Greater-than: an end in the decade after the first year's is correct, one before the first year is wrong; in
the counterpart it is the other way round as far as it can be: both decades are later, the wrong answer's is the next.
Other later decades would be right, too, so its top-1 share is low in a model that can do it.
Addition: two worked examples, one with a sum of two digits, out of four that are used for nothing else. Where the sum
has two digits, the prompt ends with the first of them ("7 + 8 = 1"), so that the answer is always one digit.

The words, in ``data/behaviours.json``, were written for this project. Nouns, events and countries are those that are
one token in SmolLM2, so that a behaviour's prompts are equally long; none was left out for what a model makes of it.
"""

import functools
import importlib.resources
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

_PLACES = ("near", "beside", "behind")
_VERBS = (" is", " are")
_CENTURIES = range(11, 19)
_LATE_DECADES = range(2, 9)  # leaves two earlier decades and a later one
_ONE_DIGIT_EXAMPLES, _TWO_DIGIT_EXAMPLES = ((2, 3), (7, 1)), ((6, 8), (9, 4))
_Item = TypeVar("_Item")


class Draft(NamedTuple):
    """A prompt that has no split yet; the fields are those of ``behaviours.Prompt``."""

    text: str
    correct: str
    counterpart: str
    counterpart_correct: str
    items: tuple[str, ...]


class Recipe(NamedTuple):
    """How a behaviour's prompts are made.

    Attributes:
      pools: its content items, by kind.
      least: how many of each kind a split needs for a prompt and its counterpart.
      capacity: from the numbers of items of a split, by kind, how many different prompts they give.
      drawer: from a random generator and a split's items, by kind, a function that drafts prompt number i.
    """

    pools: Mapping[str, Sequence]
    least: int
    capacity: Callable[..., int]
    drawer: Callable[..., Callable[[int], Draft]]


@functools.cache
def recipes() -> Mapping[str, Recipe]:
    """The recipe of every behaviour, by name."""
    words = json.loads((importlib.resources.files(__package__) / "data" / "behaviours.json").read_text("utf-8"))
    reserved = (*_ONE_DIGIT_EXAMPLES, *_TWO_DIGIT_EXAMPLES)
    pairs = [pair for pair in itertools.product(range(10), repeat=2) if pair not in reserved]
    return dict(
        agreement=Recipe(
            dict(nouns=list(words["nouns"].items())),
            least=2,
            capacity=lambda nouns: nouns * (nouns - 1) * len(_PLACES) * len(_VERBS),
            drawer=_agreement,
        ),
        capital=Recipe(
            dict(countries=list(words["countries"].items())),
            least=2,
            capacity=lambda countries: countries,
            drawer=_capital,
        ),
        greater_than=Recipe(
            dict(columns=list(itertools.product(_CENTURIES, range(10))), events=words["events"]),
            least=1,
            capacity=lambda columns, events: columns * events * len(_LATE_DECADES),
            drawer=_greater_than,
        ),
        addition=Recipe(
            dict(
                one_digit=[pair for pair in pairs if sum(pair) < 10],
                two_digits=[pair for pair in pairs if sum(pair) >= 10],
            ),
            least=11,  # no sum has more than ten pairs, so that there is always another sum
            capacity=lambda one_digit, two_digits: (one_digit + two_digits) * 2 * 2 * 2,
            drawer=_addition,
        ),
    )


def _agreement(rng: np.random.Generator, nouns: list[tuple[str, str]]) -> Callable[[int], Draft]:
    deck = _deal(rng, nouns)

    def draft(i: int) -> Draft:
        number, subject, distractor = i % 2, next(deck), next(deck)
        while distractor == subject:
            distractor = next(deck)
        rest = f"{_pick(rng, _PLACES)} the {distractor[1 - number]}"
        text, counterpart = (f"Everyone knows that the {subject[n]} {rest}" for n in (number, 1 - number))
        return Draft(text, _VERBS[number], counterpart, _VERBS[1 - number], (subject[0], distractor[0]))

    return draft


def _capital(rng: np.random.Generator, countries: list[tuple[str, str]]) -> Callable[[int], Draft]:
    deck = _deal(rng, countries)

    def draft(i: int) -> Draft:
        here = next(deck)
        others = [other for other in countries if other != here]
        # Another first letter is another first token in every tokenizer.
        there = _pick(rng, [other for other in others if other[1][0] != here[1][0]] or others)
        text, counterpart = (f"The capital of {country} is the city of" for country in (here[0], there[0]))
        return Draft(text, f" {here[1]}", counterpart, f" {there[1]}", (here[0], there[0]))

    return draft


def _greater_than(
    rng: np.random.Generator, columns: list[tuple[int, int]], events: list[str]
) -> Callable[[int], Draft]:
    # A column is the years of a century that end in the same digit, so that a year and its counterpart differ in the
    # decade's digit alone.
    column_deck, event_deck, decade_deck = _deal(rng, columns), _deal(rng, events), _deal(rng, _LATE_DECADES)

    def draft(i: int) -> Draft:
        (century, unit), event, late = next(column_deck), next(event_deck), next(decade_deck)
        early = int(rng.integers(late - 1))
        years = [f"{century}{decade}{unit}" for decade in (late, early)]
        text, counterpart = (f"The {event} lasted from {year} to {century}" for year in years)
        return Draft(text, str(late + 1), counterpart, str(early + 1), (event, *years))

    return draft


def _addition(
    rng: np.random.Generator, one_digit: list[tuple[int, int]], two_digits: list[tuple[int, int]]
) -> Callable[[int], Draft]:
    deck = _deal(rng, one_digit + two_digits)

    def draft(i: int) -> Draft:
        pair = next(deck)
        alike = one_digit if sum(pair) < 10 else two_digits
        other = _pick(rng, [other for other in alike if sum(other) != sum(pair)])
        examples = [_pick(rng, _ONE_DIGIT_EXAMPLES), _pick(rng, _TWO_DIGIT_EXAMPLES)]
        if rng.integers(2):
            examples.reverse()
        shown = "".join(f"{a} + {b} = {a + b}, " for a, b in examples)
        text, counterpart = (f"{shown}{a} + {b} = {'1' if a + b >= 10 else ''}" for a, b in (pair, other))
        items = tuple(f"{a} + {b}" for a, b in (pair, other))
        return Draft(text, str(sum(pair) % 10), counterpart, str(sum(other) % 10), items)

    return draft


def _deal(rng: np.random.Generator, items: Sequence[_Item]) -> Iterator[_Item]:
    """Every item once in random order, then again in another, without end."""
    while True:
        yield from (items[i] for i in rng.permutation(len(items)))


def _pick(rng: np.random.Generator, items: Sequence[_Item]) -> _Item:
    return items[int(rng.integers(len(items)))]
