"""Agreement of dictionaries on the importance of features.

Between dictionaries of one site, which may differ in seed or kind, features must be matched first: two features are a
pair if each is the other's nearest by the cosine of their decoder rows, and the cosine is at least a threshold (Paulo
and Belrose, 2025, arXiv 2501.16615, match one to one, too, but by assignment, so that a feature need not get its
nearest).

What is compared is the causal drop of matched features: Spearman's rank correlation over the pairs. Beside it stand the
correlation where the pairs are shuffled, and where each partner is replaced by one of the ten features of its
dictionary that are nearest to it in firing rate and size: features that fire often matter more in every dictionary, and
that alone makes ranks agree.
"""

import functools
from typing import NamedTuple, Protocol

import numpy as np

from saejax.interventions.activity import coordinates, nearest_others
from saejax.matching.rows import unit
from saejax.matching.transfer.results import MatchedDrops
from saejax.results import Interval
from saejax.statistics.permutation import rank_correlations
from saejax.tasks.scoring import middle

LEAST = 0.7  # similarity of a match
DRAWS = 200  # of shuffled pairs, and of partners that fire alike
_ALIKE = 10  # nearest features that such a partner is drawn from
_CHUNK = 2**24  # similarities held at once


class Matches(NamedTuple):
    """Features of two dictionaries that are taken for the same one; arrays [M], none twice.

    Attributes:
      first_M, second_M: their numbers, those of the first rising.
      similarity_M: cosine or correlation, at most 1.
    """

    first_M: np.ndarray
    second_M: np.ndarray
    similarity_M: np.ndarray


class RankedFeatures(Protocol):
    """Features that fire, with their effects; arrays [N]."""

    @property
    def feature(self) -> np.ndarray:
        """Indices of the features, rising."""
        ...

    @property
    def drop(self) -> np.ndarray:
        """The effect by which they are ranked."""
        ...

    @property
    def firing_rate(self) -> np.ndarray:
        """The share of tokens on which each fires."""
        ...

    @property
    def mean_activation(self) -> np.ndarray:
        """The mean activation of each where it fires."""
        ...


def match_by_direction(first: np.ndarray, second: np.ndarray, least: float = LEAST) -> Matches:
    """Return the features whose decoder rows are each other's nearest by cosine.

    Args:
      first: decoder rows of the first dictionary, of any length; rows of length 0 match nothing.
      second: decoder rows of the second.
      least: smallest cosine of a match, above 0.

    Raises:
      ValueError: the widths differ.
    """
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"rows of width {first.shape[1]} and {second.shape[1]} have no cosine: expected one site")
    return _mutual(unit(first), unit(second), least)


def compare(
    first: RankedFeatures, second: RankedFeatures, matches: Matches, resamples: int = 1000, seed: int = 0
) -> MatchedDrops:
    """Return how far two dictionaries agree on the importance of matched features for one behaviour.

    Args:
      first: effects of the first dictionary's features.
      second: effects of the second's, on the same prompts.
      matches: between all features of the two; those count whose features are in both tables.
      resamples: of the bootstrap over pairs.
      seed: of the bootstrap and the controls.
    """
    kept_E = np.isin(matches.first_M, first.feature) & np.isin(matches.second_M, second.feature)
    other_M = np.searchsorted(second.feature, matches.second_M[kept_E])
    count = len(other_M)
    shares = [count / max(len(table.feature), 1) for table in (first, second)]
    similarity = float(np.median(matches.similarity_M[kept_E])) if count else None
    about = functools.partial(MatchedDrops, count, (shares[0], shares[1]), similarity)
    one_M = first.drop[np.searchsorted(first.feature, matches.first_M[kept_E])]
    two_M = second.drop[other_M]
    # Two pairs always have a rank correlation of 1 or -1.
    if count < 3 or np.ptp(one_M) == 0 or np.ptp(two_M) == 0:
        return about(None, None, None)
    rng = np.random.default_rng(seed)
    # Pairs are resampled, as they are what dictionaries agree about; prompts are the same for both.
    drawn_RxM = rng.integers(count, size=(resamples, count))
    shuffled_CxM = rng.permuted(np.tile(two_M, (DRAWS, 1)), axis=1)
    near_MxA = nearest_others(coordinates(second.firing_rate, second.mean_activation), _ALIKE)[other_M]
    picked_CxM = rng.integers(near_MxA.shape[1], size=(DRAWS, count))
    alike_CxM = second.drop[near_MxA[np.arange(count)[None, :], picked_CxM]]
    seen = rank_correlations(one_M[None], two_M[None])[0]
    return about(
        rank_correlation=_spread(rank_correlations(one_M[drawn_RxM], two_M[drawn_RxM]), seen),
        shuffled=_spread(rank_correlations(np.broadcast_to(one_M, shuffled_CxM.shape), shuffled_CxM)),
        alike=_spread(rank_correlations(np.broadcast_to(one_M, alike_CxM.shape), alike_CxM)),
    )


def _spread(values_R: np.ndarray, mean: float | None = None) -> Interval | None:
    """Return the mean, unless another is given, and the middle 95 % of the defined values; None if there are none."""
    defined = values_R[~np.isnan(values_R)]
    return middle(defined, mean) if len(defined) else None


def _mutual(first_FxD: np.ndarray, second_GxD: np.ndarray, least: float) -> Matches:
    """Return pairs of rows that have their largest product, of at least ``least``, with each other."""
    if not len(first_FxD) or not len(second_GxD):
        return Matches(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    best_F, best_G = np.zeros(len(first_FxD), np.int64), np.zeros(len(second_GxD), np.int64)
    most_F, most_G = np.full(len(first_FxD), -np.inf), np.full(len(second_GxD), -np.inf)
    # In chunks, because all similarities of two wide dictionaries take gigabytes.
    step = max(_CHUNK // len(second_GxD), 1)
    for start in range(0, len(first_FxD), step):
        product_KxG = first_FxD[start : start + step] @ second_GxD.T
        of_chunk = slice(start, start + len(product_KxG))
        best_F[of_chunk], most_F[of_chunk] = product_KxG.argmax(axis=1), product_KxG.max(axis=1)
        better_G = product_KxG.max(axis=0) > most_G
        best_G[better_G] = start + product_KxG.argmax(axis=0)[better_G]
        most_G = np.maximum(most_G, product_KxG.max(axis=0))
    matched_M = np.flatnonzero((best_G[best_F] == np.arange(len(best_F))) & (most_F >= least))
    return Matches(matched_M, best_F[matched_M], most_F[matched_M])
