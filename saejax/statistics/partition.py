"""Random partitions of a pool into disjoint sets."""

import numpy as np


def disjoint_sets(pool: np.ndarray, size: int, max_sets: int, seed: int) -> np.ndarray:
    """Return random disjoint subsets of a pool: it is shuffled once and cut.

    Args:
      pool: distinct integers, ``[C]``.
      size: size of each set, at least 1.
      max_sets: maximum number of sets.
      seed: seed of the shuffle; the order of the pool does not matter.

    Returns:
      Array ``[m, size]`` with m = min(floor(C / size), max_sets).

    Raises:
      ValueError: the pool holds an element twice.
    """
    sorted_C = np.unique(pool)
    if len(sorted_C) != len(pool):
        raise ValueError("expected distinct elements in the pool")
    count = min(len(sorted_C) // size, max_sets)
    return np.random.default_rng(seed).permutation(sorted_C)[: count * size].reshape(count, size)
