"""Rank tests against control sets, and Holm's correction.

P-values follow Phipson and Smyth (Permutation p-values should never be zero, 2010), the correction follows Holm
(A simple sequentially rejective multiple test procedure, 1979).
"""

import math
from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np

KeyT = TypeVar("KeyT", bound=Hashable)
_ROUNDING = 1e-9  # relative: equal effects differ in their last bits


def rank_p(tested: float, controls: np.ndarray) -> float:
    """Return the p-value of a tested effect among the effects of control sets.

    p = (1 + #{j: controls_j >= tested_j}) / (1 + N). If the tested set is one more random set, each of the 1 + N is as
    likely to have the largest effect, so that p <= a with a probability of at most a.

    Args:
      tested: effect of the tested set.
      controls: effects of the control sets, ``[N]``, finite.

    Raises:
      ValueError: an effect is not finite.
    """
    control_N = np.asarray(controls, np.float64)
    if not (np.isfinite(control_N).all() and np.isfinite(tested)):
        raise ValueError("expected finite effects")
    rounding_N = _ROUNDING * np.maximum(abs(tested), np.abs(control_N))
    return float((1 + np.sum(control_N >= tested - rounding_N)) / (1 + len(control_N)))


def min_controls(tests: int, level: float = 0.05) -> int:
    """Return the number of control sets below which no p-value can pass Holm's correction over ``tests`` tests.

    The smallest p is 1 / (1 + N) and Holm multiplies it by the number of tests: N >= tests / level - 1, at a level of
    0.05 20 tests - 1.
    """
    return math.ceil(tests / level - 1e-9) - 1


def holm(p_values: np.ndarray) -> np.ndarray:
    """Return Holm's adjusted p-values of N tests, however they depend on each other.

    Of the sorted p_(1) <= ... <= p_(N), the k-th becomes max over j <= k of (N - j + 1) p_(j), at most 1. Rejecting all
    that are <= a rejects any true hypothesis with a probability of at most a.

    Args:
      p_values: ``[N]``, in (0, 1].
    """
    p_N = np.asarray(p_values, np.float64)
    order_N = np.argsort(p_N, kind="stable")
    adjusted_N = np.empty_like(p_N)
    adjusted_N[order_N] = np.maximum.accumulate(p_N[order_N] * np.arange(len(p_N), 0, -1))
    return np.minimum(adjusted_N, 1.0)


def holm_by_key(p_values: Mapping[KeyT, float]) -> dict[KeyT, float]:
    """Return Holm's adjusted p-values of tests that are named by a key."""
    return dict(zip(p_values, holm(np.array(list(p_values.values()), np.float64)).tolist(), strict=True))
