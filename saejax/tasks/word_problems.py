"""The benchmark ``word_problems``: problems of one and two steps and logic of one hop, within reach of small models.

Questions are made from templates and words in ``data/word_problems.json``, which were written for this project. The
templates of every category (operation and number of steps) differ in their words alone, and the last one of each is
held out: its items judge features, but choose none. The answer to a problem is its calculation, "12 + 5 = 17"; the
other choices are right calculations with another operation on the same numbers. So what is asked is which operation the
words mean: among bare numbers SmolLM2-135M guesses, worked examples or not. The choices of logic are the property that
the question asks for and one that it also mentions.
"""

import importlib.resources
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

PER_TEMPLATE, WRONG = 40, 2  # questions; wrong choices of a problem
_FILE, _SEED = "word_problems.json", 42
_RANGES = dict(a=(11, 20), b=(2, 9), c=(2, 5), d=(2, 9))  # of the numbers; so no result is below 1


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
        while count < PER_TEMPLATE:
            question, answer, choices = make(template, data, rng, count)
            if question not in seen:
                seen.add(question)
                count += 1
                about = dict(category=template["category"], held_out=template.get("held_out", False))
                yield dict(question=question, answer=answer, choices=choices, **about)


def _problem(template: Mapping, data: Mapping, rng: np.random.Generator, number: int) -> tuple[str, str, list[str]]:
    numbers = {letter: int(rng.integers(low, high + 1)) for letter, (low, high) in _RANGES.items()}
    name, other = rng.choice(data["names"], 2, replace=False).tolist()
    question = template["text"].format(**numbers, name=name, other=other, thing=str(rng.choice(data["things"])))
    right = template["steps"]
    values = {steps: evaluate(steps, numbers) for steps in (right, *_other_steps(right))}
    wrong = [steps for steps in values if values[steps] != values[right]]
    chosen = [right, *(wrong[i] for i in rng.choice(len(wrong), min(len(wrong), WRONG), replace=False))]
    written = {steps: f"{_written(steps, numbers)} = {values[steps]}" for steps in chosen}
    return question, written[right], sorted(written.values())


def _rule(template: Mapping, data: Mapping, rng: np.random.Generator, number: int) -> tuple[str, str, list[str]]:
    (kind, kinds), (other, others) = (data["kinds"][i] for i in rng.choice(len(data["kinds"]), 2, replace=False))
    properties = data["properties"][str(rng.choice(sorted(data["properties"])))]
    choices = sorted(rng.choice(properties, 2, replace=False).tolist())
    yes, no = choices[:: 1 if number % 2 else -1]  # each choice is right as often as the other
    words = dict(kind=kind, kinds=kinds, other=other, others=others, yes=yes, no=no)
    return template["text"].format(**words, name=str(rng.choice(data["names"]))), yes, choices


def _other_steps(steps: str) -> list[str]:
    """Return steps with one of their operations exchanged for another."""
    places = [place for place, sign in enumerate(steps) if sign in "+-*"]
    return [f"{steps[:place]}{sign}{steps[place + 1 :]}" for place in places for sign in "+-*" if sign != steps[place]]


def _written(steps: str, numbers: Mapping[str, int]) -> str:
    return re.sub(r"[a-z]", lambda letter: str(numbers[letter[0]]), steps)


def evaluate(steps: str, numbers: Mapping[str, int]) -> int:
    """Return the value of steps such as "c * d + b", products first."""
    terms = re.findall(r"([+-]?) ?(\w(?: \* \w)*)", steps)
    return sum(
        (-1 if sign == "-" else 1) * math.prod(numbers[letter] for letter in letters.split(" * "))
        for sign, letters in terms
    )
