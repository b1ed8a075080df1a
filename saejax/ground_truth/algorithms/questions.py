"""What an algorithm is to its transformer: questions to train on, fresh ones to be judged by, and prompts."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from saejax.errors import UserError
from saejax.tasks.behaviours import SPLITS, Prompt

START = "<s>"  # the first word of every text
_TRIES = 500  # draws for each that is wanted, before it is said that there are too few
_ADVICE = "lower --algorithm.prompts, or raise --algorithm.digits, nodes or edges"


@dataclasses.dataclass(frozen=True)
class Questions:
    """Questions and their answers.

    Attributes:
      ids_BxT: int32 words, with answers that stand before others; padded on the right.
      place_BxN: int32 positions from which an answer is read.
      right_BxNxV: bool, which words are right there.
      fresh_B: bool, whether the question is kept from training.
    """

    ids_BxT: np.ndarray
    place_BxN: np.ndarray
    right_BxNxV: np.ndarray
    fresh_B: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence["Questions"], count: int) -> "Questions":
        """The first ``count`` questions of the parts, one part after the other."""
        columns = [[getattr(part, field.name) for part in parts] for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate(column)[:count] for column in columns))


class Algorithm(abc.ABC):
    """An algorithm.

    Attributes:
      wanted: sort of question -> the share of fresh ones that must be answered.
      words: the vocabulary, ``START`` first.
    """

    wanted: ClassVar[Mapping[str, float]]
    words: tuple[str, ...]

    @abc.abstractmethod
    def draw(self, sort: str, count: int, rng: np.random.Generator) -> Questions:
        """``count`` questions of a sort, fresh ones among them."""

    @abc.abstractmethod
    def prompt(self, behaviour: str, split: str, rng: np.random.Generator) -> Prompt | None:
        """A prompt of a behaviour and split from a fresh question; None if the draw has none."""

    @property
    @abc.abstractmethod
    def behaviours(self) -> tuple[str, ...]:
        """What prompts test."""

    def batch(self, count: int, rng: np.random.Generator) -> Questions:
        """Questions of all sorts."""
        sorts = list(self.wanted)
        return Questions.joined([self.draw(sort, -(-count // len(sorts)), rng) for sort in sorts], count)

    def fresh(self, sort: str, count: int, rng: np.random.Generator) -> Questions:
        """``count`` fresh questions of a sort; a ``UserError`` if there are next to none."""
        kept: list[Questions] = []
        for _ in range(_TRIES):
            drawn = self.draw(sort, 4 * count, rng)
            arrays = (getattr(drawn, field.name)[drawn.fresh_B] for field in dataclasses.fields(Questions))
            kept.append(Questions(*arrays))
            if sum(len(part.fresh_B) for part in kept) >= count:
                break
        else:
            raise UserError(f"there are too few questions of the sort {sort} to keep some from training: {_ADVICE}")
        return Questions.joined(kept, count)

    def prompts(self, count: int, rng: np.random.Generator) -> list[Prompt]:
        """So many prompts of each behaviour and split, no text twice in a behaviour.

        Raises:
          UserError: there are too few.
        """
        found: list[Prompt] = []
        for behaviour in self.behaviours:
            own: dict[str, Prompt] = {}
            for split in SPLITS:
                wanted = len(own) + count
                for _ in range(_TRIES * count):
                    if prompt := self.prompt(behaviour, split, rng):
                        own.setdefault(prompt.text, prompt)
                    if len(own) == wanted:
                        break
                else:
                    raise UserError(f"there are too few different prompts of {behaviour}: {_ADVICE}")
            found += own.values()
        return found

    def number(self, words: Sequence[str]) -> np.ndarray:
        """The words' numbers, int32."""
        place = {word: index for index, word in enumerate(self.words)}
        return np.array([place[word] for word in words], np.int32)


def kept_fresh(key_B: np.ndarray) -> np.ndarray:
    """Which questions are kept from training, a tenth of them, by whole numbers that say which they are; bool."""
    return (key_B.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)) % np.uint64(10) == 0
