"""The rows of a graph while it is traced, and the ranking of the features that get the next ones.

Rows. A row has a number for each source, and most sources of a long prompt are active features that never get a row:
1,024 tokens with 540 active features each have 550,000, which for 8,192 rows is 18 GB. So rows are whole only until
they have ``WHOLE`` numbers together. Then features keep a column if they have a row already or are among the most
influential so far, several times as many as rows are wanted; no other gets a row any more. What the features without a
column contribute to a row is kept as one sum. Errors, tokens and biases always have their columns.

Rankings. Influences are defined in ``graph.pruning``. Between two rounds they are looked for anew, while the devices
wait: so a row's weights are summed once, when it is written, and read only where it may have any, from features of
lower layers.
"""

import numpy as np

from saejax.attribution.graph.pruning import logit_weights, sweep
from saejax.attribution.local.rows import Put

WHOLE = 1 << 28  # numbers that whole rows may have together: 1 GiB
_SPARE = 4  # features with a column for each that gets a row
_LEAST = 1 << 15  # features with a column, at the least
_LEAST_ROWS = 256  # that are whole, at the least
_BLOCK = 1 << 20  # numbers that are copied at once
_IN_CACHE = 1 << 16  # numbers of rows that a ranking works on at once: they stay in a core's cache
ROUNDS, ROUND_ROWS = 4, 2048  # rankings, at the least, and features that are attributed between two, at the most


def columns_kept(rows: int, active: int, other_sources: int) -> int:
    """Return how many columns the rows have in the end.

    Args:
      rows: their number.
      active: number of active features.
      other_sources: number of sources that are no features.
    """
    if rows * (active + other_sources) <= WHOLE:
        return active + other_sources
    return min(active, max(_SPARE * rows, _LEAST)) + other_sources


class RowStore:
    """Rows of features, in the order in which they come, and rows of targets that are no features, which stand last.

    Args:
      count: features that get a row.
      targets: rows of targets that are no features, K.
      active: active features, which are the first of the sources.
      scored: number of sources, the first ones, that take part in influences.
      sources: their number S.

    Attributes:
      row_BxC: fp32 rows that there is room for, over the sources that have a column.
      column_C: which sources these are, ascending.
      dropped_R: fp32 sums over the sources that have none.
      size_R: float64 sums of absolute values over all scored sources.
    """

    def __init__(self, count: int, targets: int, active: int, scored: int, sources: int):
        self._count, self._targets, self._active, self._scored = count, targets, active, scored
        self._room = columns_kept(count + targets, active, sources - active)
        first = count if self._room == sources else min(count, max(WHOLE // sources - targets, _LEAST_ROWS))
        self.row_BxC = np.zeros((first + targets, sources), np.float32)
        self.column_C = np.arange(sources)
        self.dropped_R, self.size_R = np.zeros(count + targets, np.float32), np.empty(count + targets)
        self._left_X = np.empty(0, np.int64)

    def room(self, done: int) -> int:
        """Return how many feature rows still fit after ``done`` of them, before columns have to be given up."""
        return len(self.row_BxC) - self._targets - done

    def put(self, start: int | None) -> Put:
        """Return the writer of the rows from ``start`` on, or (None) of the rows that belong to no feature."""
        first = -self._targets if start is None else start

        def write(row_B: np.ndarray, value_BxS: np.ndarray) -> None:
            size_B = np.abs(value_BxS[:, : self._scored]).sum(axis=1, dtype=np.float64)
            self.size_R[first + row_B] = np.where(size_B > 0, size_B, 1.0)  # nothing to divide
            self._write(first + row_B, value_BxS)

        return write

    def _write(self, row_B: np.ndarray, value_BxS: np.ndarray) -> None:
        if not len(self._left_X):
            self.row_BxC[row_B] = value_BxS
            return
        self.row_BxC[row_B] = value_BxS[:, self.column_C]
        self.dropped_R[row_B] = value_BxS[:, self._left_X].sum(axis=1)

    def narrow(self, ranked_A: np.ndarray, done: int) -> None:
        """Give up columns of features, and make room for the remaining rows.

        Args:
          ranked_A: active features, first the features that are to keep their column.
          done: rows of features that there are.
        """
        old, sources = self.row_BxC, len(self.column_C)
        kept_S = np.ones(sources, bool)
        kept_S[: self._active] = False
        kept_S[ranked_A[: self._room - (sources - self._active)]] = True
        self.column_C, self._left_X = np.flatnonzero(kept_S), np.flatnonzero(~kept_S)
        self.row_BxC = np.zeros((self._count + self._targets, len(self.column_C)), np.float32)
        for row in (*range(done), *range(-self._targets, 0)):  # one by one: there is no room for copies
            self._write(np.array([row]), old[row][None])

    def sort(self, order_F: np.ndarray) -> None:
        """Reorder the rows of features in place: there is no room for a second copy.

        Args:
          order_F: which row comes to each place.
        """
        rows_FxC, step = self.row_BxC[: self._count], max(_BLOCK // self._count, 1)
        for start in range(0, rows_FxC.shape[1], step):
            columns = slice(start, start + step)
            rows_FxC[:, columns] = rows_FxC[order_F, columns]
        for values_R in (self.dropped_R, self.size_R):
            values_R[: self._count] = values_R[order_F]

    def leave_out(self, left_X: np.ndarray) -> None:
        """Drop columns when all rows are there, in place: there is no room for a second copy.

        Args:
          left_X: the places of features that go; ``dropped_R`` gets their contributions.
        """
        kept = np.delete(np.arange(len(self.column_C)), left_X)
        flat, width = self.row_BxC.reshape(-1), len(kept)
        for row, values in enumerate(self.row_BxC):  # where its new place ends, no row begins that is still to be read
            self.dropped_R[row] += values[left_X].sum()
            flat[row * width : (row + 1) * width] = values[kept]
        # refcheck=False: the loop's views of rows still exist, and are not used any more.
        self.row_BxC.resize((len(self.row_BxC), width), refcheck=False)
        self.column_C = self.column_C[kept]


def rank(store: RowStore, layer_A: np.ndarray, chosen_F: np.ndarray, weight_K: np.ndarray) -> np.ndarray:
    """Rank the active features that may get a row by their influence through features that have one, largest first.

    Args:
      store: the rows; the readouts' rows are there already.
      layer_A: layers of the active features.
      chosen_F: indices of the features that have a row, in the order of their rows.
      weight_K: weights of the readouts.
    """
    features = int(np.searchsorted(store.column_C, len(layer_A)))
    layer_C, column_F = layer_A[store.column_C[:features]], np.searchsorted(store.column_C, chosen_F)
    count, above, influence_C = len(chosen_F), 1 + int(layer_A.max(initial=0)), np.zeros(features)
    row_R = np.concatenate([np.arange(count), np.arange(-len(weight_K), 0)])  # the readouts' rows stand last

    def add(layer: int, targets: np.ndarray, passed_on: np.ndarray) -> None:
        rows, columns = row_R[targets], int(np.searchsorted(layer_C, layer))  # of lower layers
        factor_R, step = (passed_on / store.size_R[rows]).astype(np.float32), max(_IN_CACHE // max(columns, 1), 1)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            size_BxX = np.abs(store.row_BxC[rows[part], :columns])
            # Not ``@``: for so few numbers BLAS wakes threads, which then wait busily while the devices' work.
            influence_C[:columns] += np.einsum("b,bc->c", factor_R[part], size_BxX)

    layer_R = np.concatenate([layer_A[chosen_F], np.full(len(weight_K), above)])
    column_R = np.concatenate([column_F, np.full(len(weight_K), -1)])
    sweep(layer_R, column_R, np.concatenate([np.zeros(count), logit_weights(weight_K)]), influence_C, add)
    # Features that have a row come last: no other influence is below 0.
    influence_C[column_F] = -1
    return store.column_C[np.argsort(-influence_C, kind="stable")[: features - count]]
