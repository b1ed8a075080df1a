"""Recipes of behaviours: templates, content items, and a function that makes a prompt of both."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

_Item = TypeVar("_Item")


class Draft(NamedTuple):
    """A prompt that has no split and template yet; the fields are those of ``behaviours.Prompt``."""

    text: str
    correct: str
    counterpart: str
    counterpart_correct: str
    items: tuple[str, ...]


class Recipe(NamedTuple):
    """The templates and content from which a behaviour's prompts are made.

    Attributes:
      templates: texts with the content's places in braces; the last is for test prompts only.
      pools: its content items, by kind.
      least: how many of each kind a split needs for a prompt and its counterpart.
      capacity: from the numbers of items of a split, by kind, how many different prompts they give of a template.
      drawer: from a random generator and a split's items, by kind, a function that drafts a prompt of a template; of
        those with an even and an odd number there should be as many.
    """

    templates: Sequence[str]
    pools: Mapping[str, Sequence]
    least: int
    capacity: Callable[..., int]
    drawer: Callable[..., Callable[[int, str], Draft]]

    def of_split(self, split: str) -> Sequence[str]:
        """Return the templates of a split; of test prompts the held-out one first, so that fewest prompts have it."""
        return self.templates[:-1] if split == "train" else self.templates[::-1]


def deal(rng: np.random.Generator, items: Sequence[_Item]) -> Iterator[_Item]:
    """Yield every item once in random order, then again in another, without end."""
    while True:
        yield from (items[i] for i in rng.permutation(len(items)))


def pick(rng: np.random.Generator, items: Sequence[_Item]) -> _Item:
    """Return a random item."""
    return items[int(rng.integers(len(items)))]
