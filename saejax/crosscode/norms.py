"""How much of a crosscoder's feature lies in which part, by its decoder rows alone."""

import numpy as np

PRIVATE, SHARED = 0.9, (0.4, 0.6)  # of Minder et al. (2025): beyond the first, and between the others


def relative_norms(norm_PxF: np.ndarray) -> np.ndarray:
    """How much longer a feature's row is in each part than in all others, [P, F], 0 to 1.

        relative_p = (1 + (|d_p| - max_q |d_q|) / max(|d_p|, max_q |d_q|)) / 2,    q all other parts

    With two parts it is the relative norm of Minder et al. (arXiv 2504.02922): 1 is this part's alone, 0.5 as long in
    the other, 0 not here. A feature without any direction has 0.5 everywhere.

    Args:
      norm_PxF: norms of the rows' parts, of scaled values; at least two parts.
    """
    found = []
    for part, own_F in enumerate(norm_PxF):
        other_F = np.delete(norm_PxF, part, axis=0).max(axis=0)
        longer_F = np.maximum(own_F, other_F)
        found.append((1 + (own_F - other_F) / np.where(longer_F > 0, longer_F, 1.0)) / 2)
    return np.stack(found)


def by_norms(relative_PxF: np.ndarray, private: float = PRIVATE) -> np.ndarray:
    """The part whose own each feature seems to be, [F]: the one where its relative norm exceeds ``private``; or -1."""
    part_F = relative_PxF.argmax(axis=0)
    return np.where(relative_PxF.max(axis=0) > private, part_F, -1)


def shared(relative_PxF: np.ndarray) -> np.ndarray:
    """Features whose rows are about as long in the two parts where they are longest, bool [F]."""
    longest_F = relative_PxF.max(axis=0)
    return (longest_F >= SHARED[0]) & (longest_F <= SHARED[1])
