"""The transformers that are set by hand, their prompts, and which of their neurons stand for which variable."""

from collections.abc import Callable, Mapping

import numpy as np

from saejax.ground_truth.circuits.cases.case import Case
from saejax.ground_truth.circuits.cases.chain import chain
from saejax.ground_truth.circuits.cases.induction import induction
from saejax.ground_truth.circuits.cases.logic import logic
from saejax.ground_truth.circuits.cases.pattern import pattern

CASES: Mapping[str, Callable[[int, np.random.Generator], Case]] = dict(
    chain=chain, induction=induction, logic=logic, pattern=pattern
)


def make_case(name: str, count: int, seed: int) -> Case:
    """A transformer of the catalogue.

    Args:
      name: one of ``CASES``.
      count: prompts of each behaviour and split.
      seed: of the prompts, and of the weights of the chain.
    """
    return CASES[name](count, np.random.default_rng([seed, *name.encode()]))
