"""Whether the last three words are a, b and c, compiled by Tracr."""

import numpy as np

from saejax.ground_truth.circuits import tracr
from saejax.ground_truth.circuits.cases.case import LETTERS, SEQUENCE, Case, drawn
from saejax.tasks.behaviours import Prompt

_WANTED = ("a", "b", "c")


def pattern(count: int, rng: np.random.Generator) -> Case:
    """The case.

    Args:
      count: prompts of each behaviour and split.
      rng: draws the prompts.
    """

    def draw(split: str) -> Prompt:
        letters = rng.choice(list(LETTERS[:4]), rng.integers(4, SEQUENCE + 1)).tolist()
        letters[-3:] = _WANTED
        if right := rng.random() < 0.5:
            text = " ".join(letters)
        place = int(rng.integers(1, 4))
        letters[-place] = str(rng.choice([letter for letter in LETTERS[:4] if letter != _WANTED[-place]]))
        other = " ".join(letters)
        if not right:
            text, other = other, " ".join([*letters[:-3], *_WANTED])
        correct, wrong = (" yes", " no") if right else (" no", " yes")
        return Prompt("pattern", split, text, correct, wrong, other, wrong)

    def texts(number: int, seed: int) -> list[str]:
        own = np.random.default_rng(seed)
        return [" ".join(own.choice(list(LETTERS[:4]), own.integers(3, SEQUENCE + 1))) for _ in range(number)]

    model = tracr.pattern(LETTERS[:4], "".join(_WANTED), SEQUENCE)
    return Case(model, tuple(drawn(count, draw)), None, {}, {}, (), texts)
