"""Matching of features of two dictionaries of one site by direction, each other's nearest.

Two features are a pair if each is the other's nearest by the cosine of their decoder rows, and the cosine is at least a
threshold (Paulo and Belrose, 2025, arXiv 2501.16615, match one to one, too, but by assignment, so that a feature need
not get its nearest).
"""

from typing import NamedTuple

import numpy as np

from saejax.matching.rows import unit

LEAST = 0.7  # similarity of a match
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


def _mutual(first_FxD: np.ndarray, second_GxD: np.ndarray, least: float) -> Matches:
    """Return pairs of rows that have their largest product, of at least ``least``, with each other."""
    if not len(first_FxD) or not len(second_GxD):
        return Matches(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    best_F, best_G = np.zeros(len(first_FxD), np.int64), np.zeros(len(second_GxD), np.int64)
    most_F, most_G = np.full(len(first_FxD), -np.inf), np.full(len(second_GxD), -np.inf)
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
