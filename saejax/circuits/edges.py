"""From effects on prompts to the edges that are drawn: a pure function of the measured arrays.

An edge is *drawn* if four things hold, each at the level 0.05 over the number of edges that are tested together:

1. the interval of its mean effect over prompts excludes 0, and the effect is at least ``LEAST_EFFECT``: what rounding
   leaves is as clear as it is small;
2. the interval of the effect minus the random sets' effect, in the direction of the effect, lies above 0;
3. the same of the placebo sets;
4. the effect exceeds the mean of either kind by more than such sets differ from each other: by Student's prediction
   limit, with the variance between the sets of a prompt, the larger of both kinds. What a group does, it does in every
   prompt. So without this, many prompts make sure of any small difference, and half of all sets of arbitrary features
   are above their mean. Sets are drawn anew for each prompt, so what a set does on average varies no more than that.

Where control sets reach less than ``LEAST_DOSE`` of the group's dose they are no fair comparison: the edge is not
drawn, and is not testable. Nor is one that was measured on fewer than ``LEAST_PROMPTS`` prompts, unless it is drawn.
An interval covers the bootstrap interval over prompts within templates (``statistics.bootstrap``) and Student's t
interval over prompts: a bootstrap of few prompts excludes 0 whenever these happen to agree.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from saejax.circuits.groups import ANSWER
from saejax.circuits.measure import CONTROL_SETS, CONTROLS, EDITS, PromptEffects
from saejax.interventions.answers import LEAST_PROMPTS
from saejax.results import Interval
from saejax.statistics.bootstrap import percentile_interval, resampling_weights

LEAST_DOSE = 0.9
LEAST_EFFECT = 1e-2  # logits, or share of a group's activation
_LEVEL = 0.05
_ROUNDING = 1e-5  # groups with smaller effects alone cannot reach the target


@dataclasses.dataclass(frozen=True)
class Edge:
    """A measured effect of a group on another group or on the answer."""

    source: str  #: name of the group
    target: str  #: name of another group, or "answer"
    edit: str  #: total, direct or swap
    effect: Interval  #: fall of the logit difference, or share of the target's activation that vanishes; over prompts
    random: float  #: the same of random sets of equal dose
    placebo: float  #: the same of placebo sets of equal dose
    random_spread: float  #: standard deviation between the random sets of a prompt
    placebo_spread: float  #: the same of placebo sets
    over_random: Interval  #: effect minus the random sets' effect
    over_placebo: Interval  #: effect minus the placebo sets' effect
    dose: float  #: share of the group's dose that control sets reach, the smaller of both kinds
    level: float  #: coverage of the intervals
    prompts: int  #: number of prompts
    drawn: bool  #: whether it is an edge of the circuit

    @property
    def is_testable(self) -> bool:
        """False where it is not drawn because its controls are too weak, or its prompts too few."""
        return self.drawn or (self.dose >= LEAST_DOSE and self.prompts >= LEAST_PROMPTS)

    def in_unit(self, show: Callable[..., str], value: Any) -> str:
        """Return one of its values as ``show`` writes it: in logits, or in % of the activation of a group."""
        return show(value) if self.target == ANSWER else f"{show(value, 0, 100)} %"


def judge_edges(
    names: Sequence[str],
    effects: Sequence[PromptEffects],
    templates: Sequence[str],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> list[Edge]:
    """Return every measured effect with its controls, ``total`` first, then ``direct``, then ``swap``.

    Args:
      names: names of the G groups.
      effects: effects on each prompt.
      templates: template of each prompt.
      resamples: number of bootstrap samples of the prompts.
      seed: seed of the bootstrap.
    """
    effect_PxExGxSxH, dose_PxExGxS = (np.stack(arrays) for arrays in zip(*effects, strict=True))
    kept = []
    for e, g, h in np.ndindex(len(EDITS), len(names), len(names) + 1):
        # Groups act on each other while all others are held; the answer, last, is read under every edit.
        if EDITS[e] != "direct" and h < len(names):
            continue
        value_PxS, dose_PxS = effect_PxExGxSxH[:, e, g, :, h], dose_PxExGxS[:, e, g]
        # A group has no effect on itself, a silent one cannot be lost, and not every prompt has something to swap.
        finite_P = np.isfinite(value_PxS).all(axis=1)
        if finite_P.sum() > 1 and np.abs(value_PxS[finite_P]).max() > _ROUNDING:
            # Drawn from the prompts that are left, in their templates: a group may be silent on some.
            weight_RxP = resampling_weights(np.asarray(templates)[finite_P], resamples, seed)
            ends = names[g], [*names, ANSWER][h], EDITS[e]
            kept.append((ends, value_PxS[finite_P], dose_PxS[finite_P], weight_RxP))
    # All edges of a behaviour hold together: the level is divided by their number (Bonferroni).
    edges = [_judge(*case, level=1 - _LEVEL / len(kept)) for case in kept]
    return sorted(edges, key=lambda edge: (EDITS.index(edge.edit), edge.target != ANSWER))


def _judge(
    ends: tuple[str, str, str], value_PxS: np.ndarray, dose_PxS: np.ndarray, weight_RxP: np.ndarray, level: float
) -> Edge:
    """Return an edge from the values and doses of a group and its control sets on each prompt."""
    from scipy.stats import t

    def controls(array_PxS: np.ndarray) -> np.ndarray:
        """Return the values of the control sets, [P, K, C], of K kinds."""
        return array_PxS[:, 1:].reshape(len(array_PxS), len(CONTROLS), -1)

    def by_kind(array_PxS: np.ndarray) -> np.ndarray:
        """Return the values of the group, and the means of its random and placebo sets, [3, P]."""
        return np.stack([array_PxS[:, 0], *controls(array_PxS).mean(axis=2).T])

    def interval(value_P: np.ndarray) -> Interval:
        mean, low, high = float(value_P.mean()), *percentile_interval(weight_RxP @ value_P, level)
        error = float(value_P.std(ddof=1)) / len(value_P) ** 0.5 * float(t.ppf((1 + level) / 2, len(value_P) - 1))
        # The wider of both: each alone is too narrow somewhere.
        return Interval(mean, min(low, mean - error), max(high, mean + error))

    group_P, random_P, placebo_P = by_kind(value_PxS)
    parts = effect, over_random, over_placebo = [
        interval(part_P) for part_P in (group_P, group_P - random_P, group_P - placebo_P)
    ]
    dose, *control_doses = by_kind(dose_PxS).mean(axis=1).tolist()
    reached = min(control_doses) / dose if dose > 0 else 0.0
    sign = 1 if effect.mean > 0 else -1
    # In the direction of the effect: a group that inhibits must do so more than its controls.
    is_clear = all(min(sign * part.low, sign * part.high) > 0 for part in parts)
    spread_K = np.sqrt(controls(value_PxS).var(axis=2, ddof=1).mean(axis=0))
    values = len(value_PxS) * CONTROL_SETS  # of each kind
    # The larger spread, as sets of few candidates resemble each other. The mean of the sets adds its own error.
    limit = float(t.ppf(level, values - len(value_PxS)) * spread_K.max() * (1 + 1 / values) ** 0.5)
    is_beyond = min(sign * over_random.mean, sign * over_placebo.mean) > limit
    is_large = abs(effect.mean) >= LEAST_EFFECT and reached >= LEAST_DOSE
    means, (random_spread, placebo_spread) = (float(random_P.mean()), float(placebo_P.mean())), spread_K.tolist()
    return Edge(
        *ends, effect, *means, random_spread, placebo_spread, over_random, over_placebo, reached, level,
        len(group_P), is_clear and is_beyond and is_large,
    )  # fmt: skip
