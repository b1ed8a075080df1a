"""Prompts that ask for a fact of their content item, such as the capital of a country."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from saejax.tasks.recipe import Draft, deal, pick


class Fact(NamedTuple):
    """A content item with the answer to a prompt about it.

    Attributes:
      item: its name.
      answer: the answer that a prompt asks for, as it follows the text, with its leading space.
      fields: values of the template's fields, by name.
    """

    item: str
    answer: str
    fields: Mapping[str, str]


def draw_fact(rng: np.random.Generator, **pools: list[Fact]) -> Callable[[int, str], Draft]:
    """Return the drafter of prompts whose counterpart asks for a fact of the same pool, with another answer."""
    deck = deal(rng, [(fact, pool) for pool in pools.values() for fact in pool])

    def draft(i: int, template: str) -> Draft:
        fact, pool = next(deck)
        others = [candidate for candidate in pool if candidate.answer != fact.answer]
        # Another first letter is another first token in every tokenizer.
        other = pick(rng, [candidate for candidate in others if candidate.answer[1] != fact.answer[1]] or others)
        text, counterpart = template.format(**fact.fields), template.format(**other.fields)
        return Draft(text, fact.answer, counterpart, other.answer, (fact.item, other.item))

    return draft
