"""How far the importance of features depends on what it was measured with: on the prompts."""

import numpy as np
from scipy.stats import rankdata

from saejax.causal.ablate.importance import correlations

SPLITS = 100  # of the prompts in random halves


def between_halves(drop_NxP: np.ndarray, seed: int) -> dict[str, float | None]:
    """How well half of the prompts ranks the features as the other half does.

    Returns:
      ``rank_correlation``: Spearman's, of the mean drops on two random halves (an odd prompt is left out), mean over
      100 splits; ``spearman_brown``: what it would be between two samples as large as this one, 2 r / (1 + r)
      (Spearman, 1910; Brown, 1910). None with one prompt, or where a half sees no difference between features.
    """
    rng = np.random.default_rng(seed)
    prompts = drop_NxP.shape[1]
    found: list[float] = []
    for _ in range(SPLITS if prompts > 1 else 0):
        halves_2xH = rng.permutation(prompts)[: prompts // 2 * 2].reshape(2, -1)
        ranks_2xN = rankdata([drop_NxP[:, half_H].mean(axis=1) for half_H in halves_2xH], axis=1)
        found.extend(correlations(ranks_2xN[:1], ranks_2xN[1]).tolist() if len(drop_NxP) else [])
    defined = [value for value in found if not np.isnan(value)]
    r = float(np.mean(defined)) if defined else None
    return dict(rank_correlation=r, spearman_brown=None if r is None or r <= -1 else 2 * r / (1 + r))
