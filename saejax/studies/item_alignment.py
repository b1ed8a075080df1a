"""Agreement between two models on the items of a benchmark that depend on their top features.

Every item loses some log-likelihood under a row's top features, and some under each of its control sets. Items are
fragile: those that lose much under any change lose much in every model, so plain losses agree between models that have
nothing in common. Hence

1. Losses become ranks. The ranks of what items lose under both rows' control sets, on average, are regressed out of the
   ranks of what they lose under the top features.
2. The statistic is the correlation of what is left, with a permutation p-value.
3. The placebo is the same statistic with a control set in the place of one row's top features, and the other control
   sets of that row as its controls: what fragile items make of features that were not chosen.

Of 20 simulated pairs of rows that share nothing but the items' fragility, 5 or more have plain rank correlations of at
least 0.3, and at most one exceeds the placebo (``tests/studies/test_alignment.py``).
"""

import dataclasses

import numpy as np
from scipy.stats import rankdata

PLACEBO_QUANTILE = 0.95
_PERMUTATIONS = 9999


@dataclasses.dataclass(frozen=True)
class ItemLosses:
    """The log-likelihood that N items lose in one row, in nats.

    Attributes:
      top_N: under the top features.
      control_DxN: under each of D control sets.
    """

    top_N: np.ndarray
    control_DxN: np.ndarray

    def choose(self, items: np.ndarray) -> "ItemLosses":
        """Return the losses of some items, by their indices."""
        return ItemLosses(self.top_N[items], self.control_DxN[:, items])

    def with_control_as_top(self, draw: int) -> "ItemLosses":
        """Return the losses with a control set in the place of the top features."""
        return ItemLosses(self.control_DxN[draw], np.delete(self.control_DxN, draw, axis=0))


@dataclasses.dataclass(frozen=True)
class ItemAlignment:
    """Agreement of two rows on items.

    Attributes:
      correlation: of the ranks of losses, without what control sets explain, -1 to 1.
      p_value: share of permutations of the items in which it is as large, above 0.
      placebo: the 95 % quantile of the statistic with a control set in the place of one row's top features.
    """

    correlation: float
    p_value: float
    placebo: float


def align_items(first: ItemLosses, second: ItemLosses, seed: int) -> ItemAlignment | None:
    """Return the agreement of two rows on the same items; None with fewer than 8 items, or fewer than 2 control sets.

    Items with a loss that was not measured (NaN) are left out.

    Args:
      first: losses of a row.
      second: losses of another row under its own features, of the same items in the same order.
      seed: of the permutations.
    """
    every = [array for losses in (first, second) for array in (losses.top_N[None], losses.control_DxN)]
    measured = np.flatnonzero(np.all([np.isfinite(array).all(axis=0) for array in every], axis=0))
    first, second = first.choose(measured), second.choose(measured)
    least_sets = min(len(first.control_DxN), len(second.control_DxN))
    if len(first.top_N) < 8 or least_sets < 2 or min(np.ptp(first.top_N), np.ptp(second.top_N)) == 0:
        return None
    first_N, second_N = _residuals(first, second)
    seen, rng = float(first_N @ second_N), np.random.default_rng(seed)
    as_large = sum(float(rng.permutation(first_N) @ second_N) >= seen - 1e-12 for _ in range(_PERMUTATIONS))
    placebos = [(first.with_control_as_top(draw), second) for draw in range(len(first.control_DxN))]
    placebos += [(first, second.with_control_as_top(draw)) for draw in range(len(second.control_DxN))]
    values = [float(np.dot(*_residuals(*pair))) for pair in placebos]
    placebo = float(np.quantile(values, PLACEBO_QUANTILE, method="higher"))
    return ItemAlignment(seen, (1 + as_large) / (1 + _PERMUTATIONS), placebo)


def _residuals(first: ItemLosses, second: ItemLosses) -> tuple[np.ndarray, np.ndarray]:
    """Return the ranks of both rows' losses without what both rows' control sets explain, centred, of unit length."""
    controls = [losses.control_DxN.mean(axis=0) for losses in (first, second)]
    design_Nx3 = np.stack([np.ones(len(first.top_N)), *map(rankdata, controls)], axis=1)
    residuals = []
    for losses in (first, second):
        ranks_N = rankdata(losses.top_N)
        left_N = ranks_N - design_Nx3 @ np.linalg.lstsq(design_Nx3, ranks_N, rcond=None)[0]
        residuals.append(left_N / max(float(np.linalg.norm(left_N)), 1e-12))
    return residuals[0], residuals[1]
