"""The ways to steer: at which strengths, and what each changes in prompts of given turns."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from saejax.causal.steer.directions import AnswerTexts, Turn
from saejax.causal.steer.programs import SteeredTexts
from saejax.settings import SteerConfig

FACTORS = (1.0, 2.0, 4.0, 8.0)  # of the level that features are clamped to


class Method(NamedTuple):
    """A way to steer some prompts: its strengths, rising, and what each changes, a row for every prompt."""

    strengths: Sequence[float]
    changes: Sequence[SteeredTexts]


MethodOf = Callable[[Sequence[Turn]], Method]  # given the prompts' turns


def methods_of(texts: AnswerTexts, tops: Mapping[Turn, Sequence[int]], config: SteerConfig) -> dict[str, MethodOf]:
    """All methods; those of features only where a turn has some.

    Args:
      texts: what they are learned on.
      tops: the top features of every turn.
      config: of the stage; its ``doses`` and ``top`` are used.
    """
    doses = config.doses

    def added(directions: Callable[[Sequence[Turn]], np.ndarray], turns: Sequence[Turn]) -> Method:
        return Method(doses, [SteeredTexts.adding(dose * texts.length * directions(turns)) for dose in doses])

    def clamped(turns: Sequence[Turn]) -> Method:
        used, levels = [tops[turn] for turn in turns], [texts.level(turn, tops[turn]) for turn in turns]
        width = texts.value_NxD.shape[1]
        changes = [
            SteeredTexts.clamping(used, [factor * one for one in levels], width, config.top) for factor in FACTORS
        ]
        return Method(FACTORS, changes)

    def of_features(turns: Sequence[Turn]) -> np.ndarray:
        return texts.of_features(turns, [tops[turn] for turn in turns])

    found: dict[str, MethodOf] = {}
    if any(tops.values()):
        found = dict(features=functools.partial(added, of_features), clamp=clamped)
    means = {name: functools.partial(texts.between, name) for name in ("difference", "gradient")}
    return found | {name: functools.partial(added, directions) for name, directions in means.items()}


def best(diff_SxP: np.ndarray, fits_S: np.ndarray) -> int:
    """The strength that turns most prompts, of those that fit; of equal ones that of the lowest logit difference.

    Args:
      diff_SxP: logit differences of prompts at S rising strengths.
      fits_S: which may be chosen; where none fits, it is the first.
    """
    order = sorted(np.flatnonzero(fits_S), key=lambda s: (-(diff_SxP[s] < 0).mean(), diff_SxP[s].mean()))
    return int(order[0]) if order else 0
