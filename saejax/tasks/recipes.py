"""The demo's four behaviours: their content items, their templates, and how a prompt is made of both.

==============  ================================================  =======  =======  ==============================
behaviour       prompt                                            correct  wrong    counterpart
==============  ================================================  =======  =======  ==============================
agreement       Everyone knows that the keys near the cabinet     " are"   " is"    the subject's number (key)
capital         The capital of France is the city of              " Paris" " Rome"  another place (Italy)
greater_than    The siege lasted from '62 to '                    "75"     "35"     a year of another decade ('22)
addition        13+24=37, 58+16=74, 21+45=                        "66"     "38"     other numbers (12+26)
==============  ================================================  =======  =======  ==============================

Each behaviour has three templates. The last is held out: only test prompts are made of it, so that what train prompts
teach of their wording cannot pass for the behaviour.

Agreement: the noun beside the verb always has the other number, so following it gives 0 %; half of the subjects are
singular. Greater-than: an end in the decade after the first year's is correct, one before the first year is wrong; in
the counterpart it is the other way round as far as it can be: both decades are later, the wrong answer's is the next.
Other later decades would be right, too, so its top-1 share is low in a model that can do it.
Addition: two numbers of two digits with a sum below 100, after two worked examples that are used for nothing else,
in either order. The tens of the sums of a prompt and its counterpart differ by two or more.

Before an answer that is a number stands a mark ("'", "="), never a space or a digit: some vocabularies keep a space
with the digits after it, some do not, and some join digits by twos or threes; so every one of them begins a token where
the answer begins. Both digits of it are given; a vocabulary of single digits is asked for the first.

The words, in ``data/behaviours.json``, were written for this project. Nouns, events and places (countries and parts of
some) are those that are one token in SmolLM2, so that the prompts of a template are equally long; none was left out for
what a model makes of it.
"""

import functools
import importlib.resources
import itertools
import json
from collections.abc import Callable, Mapping

import numpy as np

from saejax.tasks.facts import Fact, draw_fact
from saejax.tasks.published_recipes import published_recipes
from saejax.tasks.recipe import Draft, Recipe, deal, pick

_PLACES = ("near", "beside", "behind")
_VERBS = (" is", " are")
_LATE_DECADES = range(2, 9)  # leaves two earlier decades and a later one
_EXAMPLES = ((13, 24), (58, 16))  # of addition


@functools.cache
def recipes() -> Mapping[str, Recipe]:
    """Return the recipe of every behaviour, those of ``published_recipes`` among them, by name."""
    words = json.loads((importlib.resources.files(__package__) / "data" / "behaviours.json").read_text("utf-8"))
    sums = [pair for pair in itertools.combinations(range(11, 90), 2) if sum(pair) < 100]
    first, second = (f"{a}+{b}={a + b}" for a, b in _EXAMPLES)
    return dict(
        agreement=Recipe(
            (
                "Everyone knows that the {subject} {place} the {other}",
                "In the picture, the {subject} {place} the {other}",
                "The {subject} that stood {place} the {other}",
            ),
            dict(nouns=list(words["nouns"].items())),
            least=2,
            capacity=lambda nouns: nouns * (nouns - 1) * len(_PLACES) * len(_VERBS),
            drawer=_agreement,
        ),
        capital=Recipe(
            (
                "The capital of {place} is the city of",
                "The government of {place} sits in its capital,",
                "They flew to {place} and spent a week in its capital,",
            ),
            dict(places=[Fact(place, f" {city}", dict(place=place)) for place, city in words["places"].items()]),
            least=2,
            capacity=lambda places: places,
            drawer=draw_fact,
        ),
        greater_than=Recipe(
            (
                "The {event} lasted from '{year} to '",
                "The {event} began in '{year} and ended in '",
                "Our records of the {event} cover the years from '{year} to '",
            ),
            dict(digits=range(10), events=words["events"]),
            least=1,
            capacity=lambda digits, events: digits * events * len(_LATE_DECADES),
            drawer=_greater_than,
        ),
        addition=Recipe(
            (
                f"{first}, {second}, {{a}}+{{b}}=",
                f"{first}\n{second}\n{{a}}+{{b}}=",
                f"We know that {first}, that {second} and that {{a}}+{{b}}=",
            ),
            dict(pairs=[pair for pair in sums if not {pair, pair[::-1]} & set(_EXAMPLES)]),
            least=366,  # of so many drawn pairs some sums are far from any other
            capacity=lambda pairs: pairs,
            drawer=_addition,
        ),
        **published_recipes(words),
    )


def _agreement(rng: np.random.Generator, nouns: list[tuple[str, str]]) -> Callable[[int, str], Draft]:
    deck = deal(rng, nouns)

    def draft(i: int, template: str) -> Draft:
        # Alternating, so that singular and plural are equally frequent and always answering one of them scores half.
        number, subject, other = i % 2, next(deck), next(deck)
        while other == subject:
            other = next(deck)
        place = pick(rng, _PLACES)
        text, counterpart = (
            template.format(subject=subject[n], place=place, other=other[1 - number]) for n in (number, 1 - number)
        )
        return Draft(text, _VERBS[number], counterpart, _VERBS[1 - number], (subject[0], other[0]))

    return draft


def _greater_than(rng: np.random.Generator, digits: list[int], events: list[str]) -> Callable[[int, str], Draft]:
    # A year and its counterpart end in the same digit, so that they differ in the decade's alone.
    digit_deck, event_deck, decade_deck = deal(rng, digits), deal(rng, events), deal(rng, _LATE_DECADES)

    def draft(i: int, template: str) -> Draft:
        digit, event, late, end = next(digit_deck), next(event_deck), next(decade_deck), int(rng.integers(10))
        early = int(rng.integers(late - 1))
        years = [f"{decade}{digit}" for decade in (late, early)]
        text, counterpart = (template.format(event=event, year=year) for year in years)
        return Draft(text, f"{late + 1}{end}", counterpart, f"{early + 1}{end}", (event, *years))

    return draft


def _addition(rng: np.random.Generator, pairs: list[tuple[int, int]]) -> Callable[[int, str], Draft]:
    deck = deal(rng, pairs)

    def draft(i: int, template: str) -> Draft:
        pair = next(deck)
        other = pick(rng, [other for other in pairs if abs(sum(other) // 10 - sum(pair) // 10) > 1])
        texts = []
        for a, b in (pair, other):
            # In random order, since pairs have the smaller number first.
            a, b = (a, b) if rng.integers(2) else (b, a)
            texts.append(template.format(a=a, b=b))
        items = tuple(f"{a}+{b}" for a, b in (pair, other))  # whatever the order in the text
        return Draft(texts[0], str(sum(pair)), texts[1], str(sum(other)), items)

    return draft
