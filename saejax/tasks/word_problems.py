"""The benchmark ``word_problems``: problems of one and two steps and logic of one hop, within reach of small models.

Questions are made from templates and words in ``data/word_problems.json``, which were written for this project. The
templates of a category (operation and number of steps) differ in their words and the order of their steps. The last
ones, a third of its questions, are held out: their items judge features, but choose none. The answer to a problem is
its calculation, "12 + 5 = 17"; the other choices are right calculations with other operations on the same numbers. So
what is asked is which operation the words mean. The choices of logic are the property that the question asks for and
one that it also mentions.

Choices alone say nothing: every problem of one step offers the same three forms (a + b, a - b, a * b), every problem of
two steps the same four, each form is right as often as any other, and numbers are drawn in the same way for all.
"""

import importlib.resources
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

PER_TEMPLATE = 40  # questions, where the template does not say how many
_FILE, _SEED = "word_problems.json", 42
_RANGES = dict(a=(11, 20), b=(2, 9), c=(2, 5))  # of the numbers, in their order; so no result is below 1


def read_data() -> bytes:
    """Return the file of templates and words."""
    return (importlib.resources.files(__package__) / "data" / _FILE).read_bytes()


def make_questions() -> Iterator[dict[str, Any]]:
    """Yield every question with its answer, choices, category and whether its template is held out.

    No two questions are the same; the seed is fixed.
    """
    data, rng, seen = json.loads(read_data()), np.random.default_rng(_SEED), set[str]()
    for template in (*data["problems"], *data["rules"]):
        make, count = (_problem if "steps" in template else _rule), 0
        while count < template.get("count", PER_TEMPLATE):
            question, answer, choices = make(template, data, rng, count)
            if question not in seen:
                seen.add(question)
                count += 1
                about = dict(category=template["category"], held_out=template.get("held_out", False))
                yield dict(question=question, answer=answer, choices=choices, **about)


def _problem(template: Mapping, data: Mapping, rng: np.random.Generator, number: int) -> tuple[str, str, list[str]]:
    right = template["steps"]
    forms = list(dict.fromkeys(problem["steps"] for problem in data["problems"] if len(problem["steps"]) == len(right)))
    while True:
        numbers = {letter: int(rng.integers(low, high + 1)) for letter, (low, high) in _RANGES.items()}
        values = {steps: evaluate(steps, numbers) for steps in forms}
        # Choices of equal value would make two answers right.
        if all(first != second for first, second in itertools.combinations(values.values(), 2)):
            break
    name, second_name = rng.choice(data["names"], 2, replace=False).tolist()
    question = template["text"].format(**numbers, name=name, other=second_name, thing=str(rng.choice(data["things"])))
    written = {steps: f"{_written(steps, numbers)} = {values[steps]}" for steps in forms}
    return question, written[right], sorted(written.values())


def _rule(template: Mapping, data: Mapping, rng: np.random.Generator, number: int) -> tuple[str, str, list[str]]:
    (kind, kinds), (unrelated, unrelated_plural) = (
        data["kinds"][i] for i in rng.choice(len(data["kinds"]), 2, replace=False)
    )
    properties = data["properties"][str(rng.choice(sorted(data["properties"])))]
    choices = sorted(rng.choice(properties, 2, replace=False).tolist())
    yes, no = choices[:: 1 if number % 2 else -1]  # each choice is right as often as the other
    words = dict(kind=kind, kinds=kinds, other=unrelated, others=unrelated_plural, yes=yes, no=no)
    return template["text"].format(**words, name=str(rng.choice(data["names"]))), yes, choices


def _written(steps: str, numbers: Mapping[str, int]) -> str:
    return re.sub(r"[a-z]", lambda letter: str(numbers[letter[0]]), steps)


def evaluate(steps: str, numbers: Mapping[str, int]) -> int:
    """Return the value of steps such as "c * d + b", products first."""
    terms = re.findall(r"([+-]?) ?(\w(?: \* \w)*)", steps)
    return sum(
        (-1 if sign == "-" else 1) * math.prod(numbers[letter] for letter in letters.split(" * "))
        for sign, letters in terms
    )
