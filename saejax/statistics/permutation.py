"""Family-wise p-values of many effects on the same prompts, and correlations of many rows.

References:
  Westfall and Young, Resampling-based multiple testing, 1993, algorithm 4.1 (step-down maxT).
  Phipson and Smyth, Permutation p-values should never be zero, 2010.
"""

from collections.abc import Sequence

import numpy as np

_EXACT = 16  # up to this many prompts all sign patterns are counted: 65,536
_CHUNK = 2**23  # numbers of a product held at once: 64 MB


def max_t_p(effects: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Return p-values of N effects, adjusted for testing all of them: step-down maxT over sign flips.

    The hypothesis is that an effect is as likely above 0 as below, by as much; then the effects of every prompt could
    as well have the other sign. Rejecting all p <= 0.05 rejects any true hypothesis with a probability of at most 5 %,
    however the effects depend on each other: a sign pattern turns all effects of a prompt together, and T_n = |sum_p
    effect| / sqrt(sum_p effect^2) is compared with the largest T of itself and of all effects with a smaller one.

    Args:
      effects: ``[N, P]``, finite, P at least 1.
      draws: random sign patterns for more than 16 prompts; of fewer all 2^P patterns are counted.
      seed: seed of the patterns.

    Returns:
      ``[N]``; 1 for an effect of 0 on every prompt.

    Raises:
      ValueError: an effect is not finite, or there is no prompt.
    """
    effect_NxP = np.asarray(effects, np.float64)
    if effect_NxP.ndim != 2 or not effect_NxP.shape[1] or not np.isfinite(effect_NxP).all():
        raise ValueError(f"expected finite effects [N, P] on at least one prompt: got an array {effect_NxP.shape}")
    length_N = np.sqrt(np.square(effect_NxP).sum(axis=1))
    unit_NxP = np.divide(effect_NxP, length_N[:, None], out=np.zeros_like(effect_NxP), where=length_N[:, None] > 0)
    signs_RxP = _sign_patterns(effect_NxP.shape[1], draws, seed)
    # Rising: an effect is compared with the largest statistic among itself and the smaller ones, a running maximum.
    order_N = np.argsort(np.abs(unit_NxP.sum(axis=1)), kind="stable")  # rising
    p_N, largest_R = np.empty(len(unit_NxP)), np.zeros(len(signs_RxP))
    size = max(1, _CHUNK // len(signs_RxP))
    for start in range(0, len(order_N), size):
        some_C = order_N[start : start + size]
        t_RxC = np.abs(signs_RxP @ unit_NxP[some_C].T)
        np.maximum.accumulate(t_RxC, axis=1, out=t_RxC)
        np.maximum(t_RxC, largest_R[:, None], out=t_RxC)
        measured_C = np.abs(unit_NxP[some_C].sum(axis=1))
        p_N[some_C] = (t_RxC >= measured_C - 1e-9).mean(axis=0)  # equal ones differ in their last bits
        largest_R = t_RxC[:, -1]
    # An effect cannot be significant where a larger one is not: p-values may not fall with the effect.
    falling_N = order_N[::-1]
    p_N[falling_N] = np.maximum.accumulate(p_N[falling_N])
    return p_N


def _sign_patterns(prompts: int, draws: int, seed: int) -> np.ndarray:
    """Return sign patterns [R, P]: all of few prompts, otherwise random ones after the measured one."""
    if prompts <= _EXACT:
        return 1.0 - 2.0 * (np.arange(2**prompts)[:, None] >> np.arange(prompts)[None, :] & 1)
    # The measured pattern is one of the possible ones, so p is never 0 (Phipson and Smyth).
    drawn_RxP = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, prompts))
    return np.concatenate([np.ones((1, prompts)), drawn_RxP])


def label_correlations(
    value_NxF: np.ndarray, has_NxL: np.ndarray, order_SxN: Sequence[np.ndarray] | np.ndarray = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Return the correlation of numbers of N items with labels of theirs, and the largest of all where labels move.

    The largest of a permutation corrects a correlation for the number of features and labels (Westfall and Young).

    Args:
      value_NxF: numbers of the items; constant ones correlate with nothing.
      has_NxL: whether an item has each label.
      order_SxN: permutations of the items.

    Returns:
      Float64 ``[F, L]`` and ``[S]``.
    """
    unit_NxF, unit_NxL = (_centred_unit(np.asarray(some_NxC, np.float64)) for some_NxC in (value_NxF, has_NxL))
    # The correlations of one permutation are in memory at a time, for all features with all labels.
    largest_S = [(unit_NxF.T @ unit_NxL[order_N]).max(initial=-np.inf) for order_N in order_SxN]
    return unit_NxF.T @ unit_NxL, np.array(largest_S)


def _centred_unit(value_NxC: np.ndarray) -> np.ndarray:
    centred_NxC = value_NxC - value_NxC.mean(axis=0)
    return centred_NxC / np.maximum(np.linalg.norm(centred_NxC, axis=0), 1e-12)


def correlations(a_RxN: np.ndarray, b_xN: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of each row of a with the row of b, or with b's only row, [R]; NaN if constant."""
    # By the range: rounding gives a constant row a variance above 0, and its correlation would be noise.
    defined_R = (np.ptp(a_RxN, axis=1) > 0) & (np.ptp(b_xN, axis=1) > 0)
    a_RxN, b_xN = (some - some.mean(axis=1, keepdims=True) for some in (a_RxN, b_xN))
    size_R = np.sqrt(np.square(a_RxN).sum(axis=1) * np.square(b_xN).sum(axis=1))
    return np.divide((a_RxN * b_xN).sum(axis=1), size_R, out=np.full(len(a_RxN), np.nan), where=defined_R)
