"""Norms of a crosscoder's decoder rows by part of the joined site: private and shared features."""

import numpy as np

PRIVATE, SHARED = 0.9, (0.4, 0.6)  # relative norms, as in Minder et al. (2025)
BINS = 20


def relative_norms(norm_PxF: np.ndarray) -> np.ndarray:
    """Return how much longer a feature's decoder row is in each part than in all others.

        relative_p = (1 + (|d_p| - max_q |d_q|) / max(|d_p|, max_q |d_q|)) / 2,    q all other parts

    With two parts this is the relative norm of Minder et al. (arXiv 2504.02922): 1 is this part alone, 0.5 equally
    long in both, 0 the other part alone.

    Args:
      norm_PxF: norms of the rows in each part, of scaled values; at least two parts.

    Returns:
      Relative norms [P, F], 0 to 1; 0.5 for a feature whose row is zero.
    """
    relative = []
    for part, norm_F in enumerate(norm_PxF):
        largest_other_F = np.delete(norm_PxF, part, axis=0).max(axis=0)
        larger_F = np.maximum(norm_F, largest_other_F)
        relative.append((1 + (norm_F - largest_other_F) / np.where(larger_F > 0, larger_F, 1.0)) / 2)
    return np.stack(relative)


def private_part(relative_PxF: np.ndarray) -> np.ndarray:
    """Return the part that each feature is private to, int [F]: its relative norm exceeds 0.9 there; -1: to none."""
    return np.where(relative_PxF.max(axis=0) > PRIVATE, relative_PxF.argmax(axis=0), -1)


def is_shared(relative_PxF: np.ndarray) -> np.ndarray:
    """Return whether a feature's rows are about equally long in the two parts where they are longest, bool [F]."""
    largest_F = relative_PxF.max(axis=0)
    return (largest_F >= SHARED[0]) & (largest_F <= SHARED[1])


def histogram(relative_F: np.ndarray) -> tuple[int, ...]:
    """Return counts of relative norms in 20 equal bins from 0 to 1."""
    return tuple(np.histogram(relative_F, BINS, (0, 1))[0].tolist())
