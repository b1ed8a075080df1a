"""Tests of effects measured on the same prompts: permutation p-values, corrections for many tests.

An *effect* is a number per prompt, here the drop in logit difference when something is removed; effects of N features
on the same P prompts form an array [N, P]. Their intervals are in ``tasks.scoring``; q-values are scipy's. Those of
Benjamini and Hochberg (1995) bound the share of false discoveries if the tests are independent or positively dependent
(Benjamini and Yekutieli, 2001); effects of features on the same prompts need not be, so ``max_t_p`` stands beside them.
"""

import numpy as np
from scipy.stats import rankdata

from saejax.tasks.scoring import checked_effects, chunks

_EXACT = 16  # up to so many prompts all sign patterns are counted: 65,536


def sign_flip_p(effects: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Two-sided p-values [N] of the hypothesis that an effect is as likely above 0 as below, by as much.

    Under it every prompt's effect could as well have the other sign. The p-value is the share of sign patterns whose
    mean lies as far from 0 as the measured one: of all 2^P patterns for up to 16 prompts, of random ones and the
    measured one otherwise (Phipson and Smyth, 2010, so that it is never 0). An effect of exactly 0 on every prompt has
    the p-value 1; prompts on which an effect is 0 say nothing, and its smallest p-value is 2 / 2^(the others).

    Args:
      effects: [N, P], finite; P at least 1.
      draws: random patterns for more than 16 prompts, at least 1.
      seed: of the patterns.
    """
    effect_NxP = checked_effects(effects)
    count, signs_RxP = len(effect_NxP), _sign_patterns(effect_NxP.shape[1], draws, seed)
    total_N = np.abs(effect_NxP.sum(axis=1))
    rounding_N = 1e-12 * np.abs(effect_NxP).sum(axis=1)  # equal sums differ in their last bits
    p_N = np.empty(count)
    for some in chunks(count, len(signs_RxP)):
        as_far_RxC = np.abs(signs_RxP @ effect_NxP[some].T) >= (total_N - rounding_N)[some]
        p_N[some] = as_far_RxC.mean(axis=0)
    return p_N


def max_t_p(effects: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """P-values [N] of the hypotheses of ``sign_flip_p``, adjusted for testing all N: step-down maxT.

    Rejecting all <= 0.05 is wrong anywhere with a probability of at most 5 %, however the effects depend on each other:
    a sign pattern turns all effects of a prompt together, and T_n = |sum_p effect| / sqrt(sum_p effect^2) of an effect
    is compared with the largest T of itself and of all effects with a smaller one (Westfall and Young, 1993, algorithm
    4.1). An effect of 0 on every prompt has p = 1.

    Args:
      effects, draws, seed: as for ``sign_flip_p``, whose sign patterns these are.
    """
    effect_NxP = checked_effects(effects)
    length_N = np.sqrt(np.square(effect_NxP).sum(axis=1))
    unit_NxP = np.divide(effect_NxP, length_N[:, None], out=np.zeros_like(effect_NxP), where=length_N[:, None] > 0)
    signs_RxP = _sign_patterns(effect_NxP.shape[1], draws, seed)
    order_N = np.argsort(np.abs(unit_NxP.sum(axis=1)), kind="stable")  # rising
    p_N, largest_R = np.empty(len(unit_NxP)), np.zeros(len(signs_RxP))
    for some in chunks(len(order_N), len(signs_RxP)):
        t_RxC = np.abs(signs_RxP @ unit_NxP[order_N[some]].T)
        np.maximum.accumulate(t_RxC, axis=1, out=t_RxC)
        np.maximum(t_RxC, largest_R[:, None], out=t_RxC)
        seen_C = np.abs(unit_NxP[order_N[some]].sum(axis=1))
        p_N[order_N[some]] = (t_RxC >= seen_C - 1e-9).mean(axis=0)  # equal ones differ in their last bits
        largest_R = t_RxC[:, -1]
    falling_N = order_N[::-1]
    p_N[falling_N] = np.maximum.accumulate(p_N[falling_N])
    return p_N


def _sign_patterns(prompts: int, draws: int, seed: int) -> np.ndarray:
    """Sign patterns [R, P]: all of few prompts, otherwise random ones after the one seen."""
    if prompts <= _EXACT:
        return 1.0 - 2.0 * (np.arange(2**prompts)[:, None] >> np.arange(prompts)[None, :] & 1)
    drawn_RxP = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, prompts))
    return np.concatenate([np.ones((1, prompts)), drawn_RxP])


def least_p(prompts: int, draws: int) -> float:
    """The smallest p-value that ``sign_flip_p`` can give on so many ``prompts``, with so many ``draws``."""
    return 2.0 ** (1 - prompts) if prompts <= _EXACT else 1 / (1 + draws)


def holm(p_Nx: np.ndarray) -> np.ndarray:
    """Holm's adjusted p-values over the first axis: rejecting all <= 0.05 is wrong anywhere with at most 5 %.

    That of the k-th smallest of N p-values is the largest of (N - j + 1) p_j over it and all smaller ones, at most 1
    (Holm, 1979); the tests may depend on each other.
    """
    p_Nx = np.asarray(p_Nx, np.float64)
    order_Nx = np.argsort(p_Nx, axis=0, kind="stable")
    times = np.arange(len(p_Nx), 0, -1).reshape(-1, *[1] * (p_Nx.ndim - 1))
    adjusted_Nx, rising_Nx = np.empty_like(p_Nx), np.take_along_axis(p_Nx, order_Nx, axis=0) * times
    np.put_along_axis(adjusted_Nx, order_Nx, np.maximum.accumulate(rising_Nx, axis=0), axis=0)
    return np.minimum(adjusted_Nx, 1.0)


def correlations(a_RxN: np.ndarray, b_xN: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each row of a with that of b, or with its only one, [R]; NaN where one is constant."""
    defined_R = (np.ptp(a_RxN, axis=1) > 0) & (np.ptp(b_xN, axis=1) > 0)
    a_RxN, b_xN = (some - some.mean(axis=1, keepdims=True) for some in (a_RxN, b_xN))
    size_R = np.sqrt(np.square(a_RxN).sum(axis=1) * np.square(b_xN).sum(axis=1))
    return np.divide((a_RxN * b_xN).sum(axis=1), size_R, out=np.full(len(a_RxN), np.nan), where=defined_R)


def rank_correlations(a_RxN: np.ndarray, b_xN: np.ndarray) -> np.ndarray:
    """Spearman's, of a and b as for ``correlations``; NaN of rows of nothing."""
    if not a_RxN.shape[1]:
        return np.full(len(a_RxN), np.nan)
    return correlations(rankdata(a_RxN, axis=1), rankdata(b_xN, axis=1))
