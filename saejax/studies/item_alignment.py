"""Agreement between two models on the items of a benchmark that depend on their top features.

Every item loses some log-likelihood under a row's top features, and some under each of its control sets. Models that
share no feature still agree on plain losses: items are fragile, those that lose much under any change lose much in
every model; and items of one kind have answers of one form (a calculation, a word) and length, with more or less to
lose. Hence

1. Losses become ranks within each category of items. Out of the ranks of what items lose under the top features are
   regressed the ranks of their answers' lengths and of what they lose under both rows' control sets, on average.
2. The statistic is the correlation of the residuals, with a p-value from permutations within categories.
3. The placebo is the same statistic with a control set in the place of one row's top features, and the other control
   sets of that row as its controls: what fragile items make of features that were not chosen.

``tests/studies/test_alignment.py`` simulates pairs of rows that share nothing but fragility, categories or lengths.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

PLACEBO_QUANTILE = 0.95
_PERMUTATIONS = 9999


@dataclasses.dataclass(frozen=True)
class ItemLosses:
    """The log-likelihood that N items lose in one row, in nats."""

    top_N: np.ndarray  #: under the top features
    control_DxN: np.ndarray  #: under each of D control sets

    def choose(self, items: np.ndarray) -> "ItemLosses":
        """Return the losses of some items, by their indices."""
        return ItemLosses(self.top_N[items], self.control_DxN[:, items])

    def with_control_as_top(self, draw: int) -> "ItemLosses":
        """Return the losses with a control set in the place of the top features."""
        return ItemLosses(self.control_DxN[draw], np.delete(self.control_DxN, draw, axis=0))


@dataclasses.dataclass(frozen=True)
class ItemAlignment:
    """Agreement of two rows on items."""

    correlation: float  #: of the ranks of losses, without what categories, lengths and control sets explain, -1 to 1
    p_value: float  #: share of permutations of the items within categories in which it is as large, above 0
    placebo: float  #: the 95 % quantile of the statistic with a control set in the place of one row's top features


def align_items(
    first: ItemLosses, second: ItemLosses, categories: Sequence[str], lengths: Sequence[int], seed: int
) -> ItemAlignment | None:
    """Return the agreement of two rows on the same items; None with fewer than 8 items, or fewer than 2 control sets.

    Items with a loss that was not measured (NaN) are left out.

    Args:
      first: losses of a row.
      second: losses of another row under its own features, of the same items in the same order.
      categories: category of each item.
      lengths: length of each item's right answer, in characters.
      seed: of the permutations.
    """
    every = [array for losses in (first, second) for array in (losses.top_N[None], losses.control_DxN)]
    measured = np.flatnonzero(np.all([np.isfinite(array).all(axis=0) for array in every], axis=0))
    first, second = first.choose(measured), second.choose(measured)
    least_sets = min(len(first.control_DxN), len(second.control_DxN))
    if len(first.top_N) < 8 or least_sets < 2 or min(np.ptp(first.top_N), np.ptp(second.top_N)) == 0:
        return None
    _, category_N = np.unique(np.asarray(categories)[measured], return_inverse=True)
    length_N = np.asarray(lengths)[measured]
    first_N, second_N = _residuals(first, second, category_N, length_N)
    seen, rng = float(first_N @ second_N), np.random.default_rng(seed)
    by_category = np.argsort(category_N, kind="stable")
    as_large = 0
    for _ in range(_PERMUTATIONS):
        # Sorted by category first and a random number next: a permutation within categories.
        order_N = np.lexsort((rng.random(len(category_N)), category_N))
        as_large += float(first_N[order_N] @ second_N[by_category]) >= seen - 1e-12
    placebos = [(first.with_control_as_top(draw), second) for draw in range(len(first.control_DxN))]
    placebos += [(first, second.with_control_as_top(draw)) for draw in range(len(second.control_DxN))]
    values = [float(np.dot(*_residuals(*pair, category_N, length_N))) for pair in placebos]
    placebo = float(np.quantile(values, PLACEBO_QUANTILE, method="higher"))
    return ItemAlignment(seen, (1 + as_large) / (1 + _PERMUTATIONS), placebo)


def _residuals(
    first: ItemLosses, second: ItemLosses, category_N: np.ndarray, length_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ranks of both rows' losses without what lengths and control sets explain, of unit length."""
    controls = [losses.control_DxN.mean(axis=0) for losses in (first, second)]
    design_NxC = np.stack([_ranks(value_N, category_N) for value_N in (length_N, *controls)], axis=1)
    residuals = []
    for losses in (first, second):
        ranks_N = _ranks(losses.top_N, category_N)
        left_N = ranks_N - design_NxC @ np.linalg.lstsq(design_NxC, ranks_N, rcond=None)[0]
        residuals.append(left_N / max(float(np.linalg.norm(left_N)), 1e-12))
    return residuals[0], residuals[1]


def _ranks(value_N: np.ndarray, category_N: np.ndarray) -> np.ndarray:
    """Return centred ranks within categories, from -1/2 to 1/2, so that a large category has no larger ones."""
    ranks_N = np.empty(len(value_N))
    for category in np.unique(category_N):
        here = category_N == category
        ranks_N[here] = (rankdata(value_N[here]) - 0.5) / here.sum() - 0.5
    return ranks_N
