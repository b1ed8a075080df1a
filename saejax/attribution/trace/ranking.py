"""Ranking of features by their influence on the targets, from the rows computed so far.

Influences are those of ``graph.pruning``. Between two rounds they are looked for anew, while the devices wait: so a
row's weights are summed once, when it is new, and read only where it may have any, from features of lower layers.
"""

from collections.abc import Iterator

import numpy as np

from saejax.attribution.graph.pruning import SMALLEST
from saejax.attribution.local.prompt_run import PromptRun
from saejax.attribution.local.readouts import Readouts
from saejax.attribution.trace.row_store import RowStore

_BLOCK = 1 << 16  # numbers of the rows that are worked on at once: they stay in a core's cache


class Ranking:
    """Ranks the active features by their influence through those that have a row.

    Args:
      run: of the prompt.
      readouts: what is explained.
      store: the rows; those of the readouts are there already.
      scored: number of sources, the first ones, that take part in influences.
    """

    def __init__(self, run: PromptRun, readouts: Readouts, store: RowStore, scored: int):
        self._layer_A, self._store, self._scored = run.active.layer_A, store, scored
        self._weight_K = readouts.weight_K.astype(np.float64)
        self._sum_F = np.empty(0)  # of the rows of features that were there before
        self._sum_K = self._sums(np.arange(len(store.row_BxC) - len(self._weight_K), len(store.row_BxC)))

    def __call__(self, chosen_F: np.ndarray) -> np.ndarray:
        """Return the features that may get a row, the most influential first.

        Args:
          chosen_F: indices of the features that have a row already, in the order of their rows.
        """
        store, done = self._store, len(chosen_F)
        self._sum_F = np.concatenate([self._sum_F, self._sums(np.arange(len(self._sum_F), done))])
        features = np.searchsorted(store.column_C, len(self._layer_A))
        layer_C, layer_F = self._layer_A[store.column_C[:features]], self._layer_A[chosen_F]
        column_F, influence_C = np.searchsorted(store.column_C, chosen_F), np.zeros(features)
        last = np.arange(len(store.row_BxC) - len(self._sum_K), len(store.row_BxC))
        # The targets first, as influence goes down from them.
        self._add(influence_C, last, self._weight_K / self._sum_K)
        for layer in np.unique(layer_F)[::-1]:
            layer_rows = np.flatnonzero(layer_F == layer)
            below = influence_C[: np.searchsorted(layer_C, layer)]
            self._add(below, layer_rows, influence_C[column_F[layer_rows]] / self._sum_F[layer_rows])
        # Features that have a row come last: no other influence is below 0.
        influence_C[column_F] = -1
        order = np.argsort(-influence_C, kind="stable")[: features - done]
        return store.column_C[order]

    def _sums(self, rows: np.ndarray) -> np.ndarray:
        """Return sums of the absolute weights of some rows, float64."""
        store, scored = self._store, int(np.searchsorted(self._store.column_C, self._scored))
        sums, elsewhere_R = np.empty(len(rows)), store.size_R[: len(store.row_BxC)]
        for part, size_BxC in self._sizes(rows, scored):
            # Columns that were given up still count in what a row sums to.
            sums[part] = size_BxC.sum(axis=1, dtype=np.float64) + elsewhere_R[rows[part]]
        return np.maximum(sums, SMALLEST)

    def _add(self, influence_C: np.ndarray, rows: np.ndarray, factor_R: np.ndarray) -> None:
        """Add what sources have of the influence of some rows, in place."""
        for part, size_BxC in self._sizes(rows, len(influence_C)):
            # Not ``@``: for so few numbers BLAS wakes threads, which then wait busily while the devices' work.
            influence_C += np.einsum("b,bc->c", factor_R[part].astype(np.float32), size_BxC)

    def _sizes(self, rows: np.ndarray, columns: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Return the absolute weights of some rows in the first columns, a few rows at a time."""
        step = max(_BLOCK // max(columns, 1), 1)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            yield part, np.abs(self._store.row_BxC[rows[part], :columns])
