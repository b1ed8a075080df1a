"""The benchmark ``word_problems``: problems of one and two steps and logic of one hop, within reach of small models.

Questions are made from templates and words in ``data/word_problems.json``, which were written for this project. The
templates of every category (operation and number of steps) differ in their words alone, and the last one of each is
held out: its items judge features, but choose none. The choices of a problem are the answers to others
(``number_choices``); those of logic are the property that the question asks for and one that it also mentions.
"""

import importlib.resources
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

PER_TEMPLATE = 40  # questions
_FILE, _SEED = "word_problems.json", 42
_RANGES = dict(a=(11, 20), b=(2, 9), c=(2, 5), d=(2, 9))  # of the numbers; so no result is below 1


def read_data() -> bytes:
    """Return the file of templates and words."""
    return (importlib.resources.files(__package__) / "data" / _FILE).read_bytes()


def make_questions() -> Iterator[dict[str, Any]]:
    """Yield every question with its answer, choices (none of a number), category and whether its template is held out.

    No two questions are the same; the seed is fixed.
    """
    data, rng, seen = json.loads(read_data()), np.random.default_rng(_SEED), set[str]()
    for template in (*data["problems"], *data["rules"]):
        make, made = (_problem if "steps" in template else _rule), 0
        while made < PER_TEMPLATE:
            question, answer, choices = make(template, data, rng, made)
            if question not in seen:
                seen.add(question)
                made += 1
                about = dict(category=template["category"], held_out=template.get("held_out", False))
                yield dict(question=question, answer=answer, choices=choices, **about)


def _problem(template: Mapping, data: Mapping, rng: np.random.Generator, number: int) -> tuple[str, str, list[str]]:
    numbers = {letter: int(rng.integers(low, high + 1)) for letter, (low, high) in _RANGES.items()}
    name, other = rng.choice(data["names"], 2, replace=False).tolist()
    question = template["text"].format(**numbers, name=name, other=other, thing=str(rng.choice(data["things"])))
    return question, str(evaluate(template["steps"], numbers)), []


def _rule(template: Mapping, data: Mapping, rng: np.random.Generator, number: int) -> tuple[str, str, list[str]]:
    (kind, kinds), (other, others) = (data["kinds"][i] for i in rng.choice(len(data["kinds"]), 2, replace=False))
    properties = data["properties"][str(rng.choice(sorted(data["properties"])))]
    choices = sorted(rng.choice(properties, 2, replace=False).tolist())
    yes, no = choices[:: 1 if number % 2 else -1]  # each choice is right as often as the other
    words = dict(kind=kind, kinds=kinds, other=other, others=others, yes=yes, no=no)
    return template["text"].format(**words, name=str(rng.choice(data["names"]))), yes, choices


def evaluate(steps: str, numbers: Mapping[str, int]) -> int:
    """Return the value of steps such as "c * d + b", done from left to right."""
    first, *rest = re.findall(r"\w|[+*-]", steps)
    value = numbers[first]
    for sign, letter in zip(rest[::2], rest[1::2], strict=True):
        number = numbers[letter]
        value = value * number if sign == "*" else value + number if sign == "+" else value - number
    return value
