"""Features that fire in planted groups, and features that have to do with nothing."""

import numpy as np
from scipy import sparse

from saejax.matching.transfer.activity import Activity


def made_activity(groups: int, members: int, lone: int, tokens: int = 3000, seed: int = 0):
    """Groups whose members fire on most of the group's tokens, and other features that fire where they like.

    Returns:
      The activity, the document of each token (30 tokens each), and the group of each feature, -1 for the others.
    """
    rng = np.random.default_rng(seed)
    on_NxU = rng.random((tokens, groups)) < 0.05
    own = np.repeat(on_NxU, members, axis=1) & (rng.random((tokens, groups * members)) < 0.8)
    background = rng.random((tokens, groups * members + lone)) < np.where(
        np.arange(groups * members + lone) < groups * members, 0.005, 0.04
    )
    fires_NxF = background.copy()
    fires_NxF[:, : groups * members] |= own
    group_F = np.r_[np.repeat(np.arange(groups), members), np.full(lone, -1)]
    order = rng.permutation(len(group_F))
    f_NxF = sparse.csr_array((fires_NxF * rng.uniform(1, 2, fires_NxF.shape)).astype(np.float32)[:, order])
    return Activity(f_NxF, np.ones(tokens, bool)), np.arange(tokens) // 30, group_F[order]
