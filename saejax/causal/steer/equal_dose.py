"""Two curves of effect against dose, compared over the doses that both reach."""

from collections.abc import Callable

import numpy as np

from saejax.causal.results import EqualDose
from saejax.results import Interval

Over = Callable[[np.ndarray], Interval]  # the mean of a number per prompt, with its bootstrap interval


def equal_dose(
    features: tuple[np.ndarray, np.ndarray], basis: tuple[np.ndarray, np.ndarray], over: Over
) -> EqualDose | None:
    """Return the areas under two curves over the doses that both reach; None where one reaches none.

    Args:
      features, basis: doses [S] and effects [S, P] of each.
    """
    reach = min(float(dose_S.max(initial=0.0)) for dose_S, _ in (features, basis))
    if not reach > 0:
        return None
    own_P, other_P = (mean_effect(dose_S, effect_SxP, reach) for dose_S, effect_SxP in (features, basis))
    return EqualDose(reach, float(own_P.mean()), float(other_P.mean()), over(own_P - other_P))


def mean_effect(dose_S: np.ndarray, effect_SxP: np.ndarray, reach: float) -> np.ndarray:
    """Return the area under each prompt's curve of effect against dose from 0 to ``reach``, by ``reach``, [P].

    The curve is piecewise linear through no effect at dose 0 and the points in order of their doses.
    """
    order_S = np.argsort(dose_S, kind="stable")
    dose_K = np.concatenate([[0.0], dose_S[order_S]])
    effect_KxP = np.concatenate([np.zeros((1, effect_SxP.shape[1])), effect_SxP[order_S]])
    inside_K = dose_K < reach
    at_reach_P = np.array([np.interp(reach, dose_K, effect_K) for effect_K in effect_KxP.T])
    knots_N = np.concatenate([dose_K[inside_K], [reach]])
    effects_NxP = np.concatenate([effect_KxP[inside_K], at_reach_P[None]])
    return np.trapezoid(effects_NxP, knots_N, axis=0) / reach
