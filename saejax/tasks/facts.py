"""Prompts that ask for a fact of their content item, such as the capital of a country."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from saejax.tasks.recipe import Draft, deal, pick


class Fact(NamedTuple):
    """A content item and what is known of it.

    Attributes:
      item: its name.
      answer: what a prompt asks for, as it goes on from the text.
      fields: what stands at the template's places.
    """

    item: str
    answer: str
    fields: Mapping[str, str]


def draw_fact(rng: np.random.Generator, **pools: list[Fact]) -> Callable[[int, str], Draft]:
    """Return the drafter of prompts whose counterpart asks for a fact of the same pool, with another answer."""
    deck = deal(rng, [(fact, pool) for pool in pools.values() for fact in pool])

    def draft(i: int, template: str) -> Draft:
        here, pool = next(deck)
        others = [fact for fact in pool if fact.answer != here.answer]
        # Another first letter is another first token in every tokenizer.
        there = pick(rng, [fact for fact in others if fact.answer[1] != here.answer[1]] or others)
        text, counterpart = (template.format(**fact.fields) for fact in (here, there))
        return Draft(text, here.answer, counterpart, there.answer, (here.item, there.item))

    return draft
