"""Whether the decoder rows of matched features lie to one another in one dictionary as they do in the other.

SVCCA (Raghu et al., 2017, arXiv 1706.05806): canonical correlations of the leading principal components of both. RSA:
Spearman's correlation between the correlations of all pairs of rows in the one and in the other. Both are used on
matched features of two models by Lan et al., 2024 (arXiv 2410.06981). With few rows for each component even shuffled
pairs correlate, so that both stand beside what they are when the pairs are shuffled.
"""

import numpy as np
from scipy.stats import rankdata

from saejax.tasks.scoring import middle
from saejax.transfer.results import SpaceSimilarity

_COMPONENTS = 20  # leading ones of each dictionary
FEWEST = 50  # pairs: more than twice the components
_MOST = 600  # pairs that are looked at, drawn from all
_SHUFFLES = 20


def similarity(first_MxD: np.ndarray, second_MxK: np.ndarray, seed: int) -> SpaceSimilarity | None:
    """How alike the spaces of matched rows are; None of fewer than 50 pairs.

    Args:
      first_MxD, second_MxK: decoder rows, row by row a pair; the widths may differ.
      seed: of the pairs that are drawn, and of the shuffles.
    """
    if len(first_MxD) < FEWEST:
        return None
    rng = np.random.default_rng(seed)
    kept = np.sort(rng.permutation(len(first_MxD))[:_MOST])
    first_MxC, second_MxC = _components(first_MxD[kept]), _components(second_MxK[kept])
    rank_MxM, other_MxM = _ranks(first_MxD[kept]), _ranks(second_MxK[kept])
    orders = [rng.permutation(len(kept)) for _ in range(_SHUFFLES)]
    svcca = [_canonical(first_MxC, second_MxC[order]) for order in orders]
    rsa = [float((rank_MxM * other_MxM[np.ix_(order, order)]).sum()) for order in orders]
    return SpaceSimilarity(
        pairs=len(kept),
        svcca=_canonical(first_MxC, second_MxC),
        svcca_null=middle(svcca),
        rsa=float((rank_MxM * other_MxM).sum()),
        rsa_null=middle(rsa),
    )


def _components(rows_MxD: np.ndarray) -> np.ndarray:
    """Coordinates of rows along their leading principal components, each of length 1."""
    off_MxD = rows_MxD.astype(np.float64) - rows_MxD.mean(axis=0, dtype=np.float64)[None]
    left_MxC, size_C, _ = np.linalg.svd(off_MxD, full_matrices=False)
    kept = size_C > 1e-9 * max(size_C[0], 1e-30)
    return left_MxC[:, kept][:, :_COMPONENTS]


def _canonical(first_MxC: np.ndarray, second_MxC: np.ndarray) -> float:
    """Mean canonical correlation of two sets of orthonormal columns."""
    found = np.linalg.svd(first_MxC.T @ second_MxC, compute_uv=False)
    return float(np.minimum(found, 1.0).mean()) if len(found) else 0.0


def _ranks(rows_MxD: np.ndarray) -> np.ndarray:
    """Ranks of the correlations between rows, [M, M], 0 on the diagonal; less their mean, of length 1 together."""
    count = len(rows_MxD)
    correlation_MxM = np.nan_to_num(np.corrcoef(rows_MxD.astype(np.float64)))
    above = np.triu_indices(count, 1)
    rank_N = rankdata(correlation_MxM[above])
    rank_N -= rank_N.mean()
    length = np.linalg.norm(rank_N) * np.sqrt(2)  # every pair stands twice
    found_MxM = np.zeros((count, count))
    found_MxM[above] = rank_N / length if length else 0.0
    return found_MxM + found_MxM.T
