"""Addition: "3 4 7 + 5 8 6 = 3 3 9 0", lowest digit of the answer first. The variables are the carries.

A prompt asks for one digit. Its wrong answer is the digit with the opposite carry, and its counterpart changes only
the column below, so that it makes the opposite carry.
"""

from typing import ClassVar

import numpy as np

from saejax.ground_truth.algorithms.questions import START, Algorithm, Questions, is_fresh
from saejax.tasks.behaviours import Prompt

_NINES = 0.3  # share of columns made to sum to 9, which pass a carry on


class Addition(Algorithm):
    """Sums of two numbers."""

    required: ClassVar = dict(addition=0.99)

    def __init__(self, digits: int):
        self._digits = digits
        self.words = (START, *map(str, range(10)), "+", "=")
        self.behaviours = ("units", *(f"digit{place}" for place in range(1, digits)))

    def draw(self, kind: str, count: int, rng: np.random.Generator) -> Questions:
        """Return random questions; see ``Algorithm.draw``."""
        first_BxN, second_BxN = self._columns(count, rng)
        sum_BxM, _ = add(first_BxN, second_BxN)
        plus_Bx1, equals_Bx1 = (np.full((count, 1), word) for word in self.number("+="))
        # Numbers begin with the highest digit and answers with the lowest: a carry is made before the digit it goes
        # into.
        digits = (self.number("0123456789")[part] for part in (first_BxN[:, ::-1], second_BxN[:, ::-1], sum_BxM))
        first, second, answer = digits
        ids_BxT = np.concatenate([np.zeros((count, 1)), first, plus_Bx1, second, equals_Bx1, answer], axis=1)
        place_M = np.arange(ids_BxT.shape[1] - answer.shape[1] - 1, ids_BxT.shape[1] - 1)
        right_BxMxV = np.arange(len(self.words))[None, None] == answer[..., None]
        place_BxM = np.broadcast_to(place_M, answer.shape).astype(np.int32)
        return Questions(ids_BxT.astype(np.int32), place_BxM, right_BxMxV, self._fresh(first_BxN, second_BxN))

    def _columns(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return random digits of both numbers, lowest first, [B, N]."""
        first_BxN, second_BxN = rng.integers(10, size=(2, count, self._digits))
        return first_BxN, np.where(rng.random(first_BxN.shape) < _NINES, 9 - first_BxN, second_BxN)

    def _fresh(self, first_BxN: np.ndarray, second_BxN: np.ndarray) -> np.ndarray:
        power_N = 10 ** np.arange(self._digits)
        # One number for both, so that a question is fresh wherever it is drawn.
        return is_fresh(first_BxN @ power_N * 10**self._digits + second_BxN @ power_N)

    def prompt(self, behaviour: str, split: str, rng: np.random.Generator) -> Prompt | None:
        """Return a prompt; see ``Algorithm.prompt``."""
        first_1xN, second_1xN = self._columns(1, rng)
        if not self._fresh(first_1xN, second_1xN)[0]:
            return None
        place = self.behaviours.index(behaviour)
        sum_M, carry_M = (part[0] for part in add(first_1xN, second_1xN))
        right = int(sum_M[place])
        swapped_2xN = np.stack([first_1xN[0], second_1xN[0]])
        if place:
            wrong = (right - 1) % 10 if carry_M[place] else (right + 1) % 10
            pairs = [
                (u, v) for u in range(10) for v in range(10) if (u + v + carry_M[place - 1] > 9) != bool(carry_M[place])
            ]
            swapped_2xN[:, place - 1] = pairs[rng.integers(len(pairs))]
        else:
            # Another digit of the units, which no carry reaches.
            wrong = int((right + rng.integers(1, 10)) % 10)
            swapped_2xN[0, 0] = (wrong - swapped_2xN[1, 0]) % 10
        return Prompt(
            behaviour,
            split,
            _text(first_1xN[0], second_1xN[0], place),
            f" {right}",
            f" {wrong}",
            _text(swapped_2xN[0], swapped_2xN[1], place),
            f" {wrong}",
            labels=(
                ("carry", "yes" if carry_M[place] else "no"),
                ("column", str((first_1xN[0, place] + second_1xN[0, place]) % 10)),
            ),
        )


def add(first_BxN: np.ndarray, second_BxN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the digits of ``first_BxN`` + ``second_BxN`` and the carries into each column, [B, N + 1].

    The lowest place comes first.
    """
    count, digits = first_BxN.shape
    sum_BxM, carry_BxM = np.zeros((2, count, digits + 1), np.int64)
    for place in range(digits):
        total_B = first_BxN[:, place] + second_BxN[:, place] + carry_BxM[:, place]
        sum_BxM[:, place], carry_BxM[:, place + 1] = total_B % 10, total_B // 10
    sum_BxM[:, digits] = carry_BxM[:, digits]
    return sum_BxM, carry_BxM


def _text(first_N: np.ndarray, second_N: np.ndarray, place: int) -> str:
    """Return the question followed by the digits of the answer below a place."""
    sum_M = add(first_N[None], second_N[None])[0][0]
    return " ".join([*map(str, first_N[::-1]), "+", *map(str, second_N[::-1]), "=", *map(str, sum_M[:place])])
