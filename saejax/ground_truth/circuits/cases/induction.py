"""The word that came after this one before: a head finds it, and a neuron of the layer above says which it is."""

import numpy as np

from saejax.ground_truth.circuits.cases.case import FULL, LETTERS, MARGIN, SEQUENCE, Case, drawn, places
from saejax.ground_truth.circuits.handset import START, Directions, HandSet, Head, Layer, Neuron
from saejax.tasks.behaviours import Prompt

_BACK = 6  # words


def induction(count: int, rng: np.random.Generator) -> Case:
    """The case.

    Args:
      count: prompts of each behaviour and split.
      rng: draws the prompts.
    """
    model = _model()

    def draw(split: str) -> Prompt:
        letters = rng.permutation(list(LETTERS))[:SEQUENCE].tolist()
        asked = int(rng.integers(SEQUENCE - 1))
        other = int(rng.choice([place for place in range(SEQUENCE) if place not in (asked, asked + 1)]))
        swapped = list(letters)
        swapped[asked + 1], swapped[other] = letters[other], letters[asked + 1]
        right, wrong = f" {letters[asked + 1]}", f" {letters[other]}"
        text, turned = (" ".join([*one, letters[asked]]) for one in (letters, swapped))
        return Prompt("induction", split, text, right, wrong, turned, wrong)

    def texts(number: int, seed: int) -> list[str]:
        own = np.random.default_rng(seed)
        orders = [own.permutation(list(LETTERS))[:SEQUENCE].tolist() for _ in range(number)]
        return [" ".join([*letters, str(own.choice(letters[:-1]))]) for letters in orders]

    layer = model.layers[1]
    causes = dict(induction=places(layer, "found"))
    idle = {"the word two back": places(layer, "2 back")}
    return Case(model, tuple(drawn(count, draw)), 1, causes, idle, ("answer",), texts)


def _model() -> HandSet:
    """Heads tell which words stood before, and a head of the next layer finds the word asked for among them."""
    length = SEQUENCE + 2
    back = tuple(
        Head(
            tuple((f"at {place}", f"at {place - far}") for place in range(far + 1, length)),
            tuple((f"is {letter}", f"{far} back is {letter}") for letter in LETTERS),
        )
        for far in range(1, _BACK + 1)
    )
    named = tuple(
        Neuron(f"is {letter}", {f"is {letter}": 1.0}, {f"named {letter}": FULL}, -MARGIN) for letter in LETTERS
    )
    find = Head(
        tuple((f"is {letter}", f"1 back is {letter}") for letter in LETTERS),
        tuple((f"named {letter}", f"found {letter}") for letter in LETTERS),
    )
    found = tuple(
        Neuron(f"found {letter}", {f"found {letter}": 1.0}, {f"next {letter}": FULL}, -MARGIN) for letter in LETTERS
    )
    seen = tuple(
        Neuron(f"{far} back is {letter}", {f"{far} back is {letter}": 1.0}, {f"seen {far} {letter}": FULL}, -MARGIN)
        for far in range(1, _BACK + 1)
        for letter in LETTERS
    )
    words: dict[str, Directions] = {START: {START: 1.0}, **{letter: {f"is {letter}": 1.0} for letter in LETTERS}}
    return HandSet(
        words,
        tuple({f"at {place}": 1.0} for place in range(length)),
        (Layer(back, named), Layer((find,), found + seen)),
        {letter: {f"next {letter}": 8.0} for letter in LETTERS},
    )
