"""Questions of an algorithm: for training, kept from training, and as prompts."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from saejax.tasks.behaviours import SPLITS, Prompt

START = "<s>"  # the first word of every text


@dataclasses.dataclass(frozen=True)
class Questions:
    """Questions and their answers."""

    ids_BxT: np.ndarray  #: int32 token ids, earlier answers included, padded on the right
    place_BxN: np.ndarray  #: int32 positions whose logits give an answer
    right_BxNxV: np.ndarray  #: bool, the correct words at each of these positions
    fresh_B: np.ndarray  #: bool, whether the question is kept from training

    @classmethod
    def concatenate(cls, parts: Sequence["Questions"], count: int) -> "Questions":
        """Return the first ``count`` questions of the parts in order."""
        columns = [[getattr(part, field.name) for part in parts] for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate(column)[:count] for column in columns))

    def select_fresh(self) -> "Questions":
        """Return the questions that are kept from training."""
        return Questions(*(getattr(self, field.name)[self.fresh_B] for field in dataclasses.fields(Questions)))


class Algorithm(abc.ABC):
    """An algorithm."""

    #: kind of question -> share of fresh ones that training aims to answer correctly.
    required: ClassVar[Mapping[str, float]]
    words: tuple[str, ...]  #: the vocabulary, ``START`` first
    behaviours: tuple[str, ...]  #: names of the behaviours that prompts test

    @abc.abstractmethod
    def draw(self, kind: str, count: int, rng: np.random.Generator) -> Questions:
        """Return ``count`` random questions of a kind, fresh ones among them."""

    @abc.abstractmethod
    def prompt(self, behaviour: str, split: str, rng: np.random.Generator) -> Prompt | None:
        """Return a prompt of a behaviour and split from a fresh question; None if this draw gives none."""

    def batch(self, count: int, rng: np.random.Generator) -> Questions:
        """Return random questions of all kinds in equal numbers."""
        kinds = list(self.required)
        return Questions.concatenate([self.draw(kind, -(-count // len(kinds)), rng) for kind in kinds], count)

    def fresh(self, kind: str, count: int, rng: np.random.Generator) -> Questions:
        """Return ``count`` fresh questions of a kind."""
        parts: list[Questions] = []
        while sum(len(part.fresh_B) for part in parts) < count:
            parts.append(self.draw(kind, 4 * count, rng).select_fresh())
        return Questions.concatenate(parts, count)

    def prompts(self, count: int, rng: np.random.Generator) -> list[Prompt]:
        """Return ``count`` prompts of each behaviour and split, no text twice in a behaviour."""
        prompts: list[Prompt] = []
        for behaviour in self.behaviours:
            by_text: dict[str, Prompt] = {}
            for split in SPLITS:
                wanted = len(by_text) + count
                while len(by_text) < wanted:
                    if prompt := self.prompt(behaviour, split, rng):
                        # A text of the train split is drawn again here: it counts once, and is no test prompt.
                        by_text.setdefault(prompt.text, prompt)
            prompts += by_text.values()
        return prompts

    def number(self, words: Sequence[str]) -> np.ndarray:
        """Return the token ids of words, int32."""
        return np.array([self.words.index(word) for word in words], np.int32)


def is_fresh(key_B: np.ndarray) -> np.ndarray:
    """Return which questions are kept from training, bool [B]: a tenth of them, by a hash of what they ask.

    Args:
      key_B: integers that identify the questions.
    """
    # The high bits of a product with the golden ratio: neighbouring keys get unrelated values (Knuth's hash).
    return (key_B.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)) % np.uint64(10) == 0
