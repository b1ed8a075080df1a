"""The rows of a graph while it is made, in memory that does not follow the number of active features for ever.

A row has a number for each source, and most sources of a long prompt are active features that never get a row: 1,024
tokens with 540 active features each have 550,000, which for 8,192 rows is 18 GB. So rows are whole only until they have
``WHOLE`` numbers together. Then features keep a column if they have a row already or are among the most influential so
far, several times as many as rows are wanted; no other gets a row any more. What the features without a column
contribute to a row is kept as one sum. Errors, tokens and biases always have their columns.
"""

import numpy as np

from saejax.attribution.local.rows import Put

WHOLE = 1 << 28  # numbers that whole rows may have together: 1 GiB
_SPARE = 4  # features with a column for each that gets a row
_LEAST = 1 << 15  # features with a column, at the least
_LEAST_ROWS = 256  # that are whole, at the least
_BLOCK = 1 << 20  # numbers that are copied at once


def columns_kept(rows: int, active: int, others: int) -> int:
    """Return how many columns the rows have in the end.

    Args:
      rows: their number.
      active: number of active features.
      others: number of other sources.
    """
    if rows * (active + others) <= WHOLE:
        return active + others
    return min(active, max(_SPARE * rows, _LEAST)) + others


class RowStore:
    """Rows of features, in the order in which they come, and rows of targets that are no features, which stand last.

    Args:
      count: features that get a row.
      others: rows of no feature, K.
      active: active features, which are the first of the sources.
      sources: their number S.

    Attributes:
      row_BxC: fp32 rows that there is room for, over the sources that have a column.
      column_C: which sources these are, ascending.
      dropped_R, size_R: fp32 sums, and sums of absolute values, over the sources that have none.
    """

    def __init__(self, count: int, others: int, active: int, sources: int):
        self._count, self._others, self._active = count, others, active
        self._room = columns_kept(count + others, active, sources - active)
        first = count if self._room == sources else min(count, max(WHOLE // sources - others, _LEAST_ROWS))
        self.row_BxC = np.zeros((first + others, sources), np.float32)
        self.column_C = np.arange(sources)
        self.dropped_R, self.size_R = np.zeros((2, count + others), np.float32)
        self._left_X = np.empty(0, np.int64)

    def room(self, done: int) -> int:
        """Return how many feature rows still fit after ``done`` of them, before columns have to be given up."""
        return len(self.row_BxC) - self._others - done

    def put(self, start: int | None) -> Put:
        """Return the writer of the rows from ``start`` on, or (None) of the rows that belong to no feature."""
        first = len(self.row_BxC) - self._others if start is None else start

        def write(row_B: np.ndarray, value_BxS: np.ndarray) -> None:
            if len(self._left_X):
                self._write_narrow(first + row_B, value_BxS)
            else:
                self.row_BxC[first + row_B] = value_BxS

        return write

    def _write_narrow(self, row_B: np.ndarray, value_BxS: np.ndarray) -> None:
        left_BxX = value_BxS[:, self._left_X]
        self.row_BxC[row_B] = value_BxS[:, self.column_C]
        self.dropped_R[row_B], self.size_R[row_B] = left_BxX.sum(axis=1), np.abs(left_BxX).sum(axis=1)

    def narrow(self, ranked_A: np.ndarray, done: int) -> None:
        """Give up columns of features, and make room for the remaining rows.

        Args:
          ranked_A: active features, those that are to keep their column first.
          done: rows of features that there are.
        """
        old, sources = self.row_BxC, len(self.column_C)
        others = sources - self._active
        kept_S = np.ones(sources, bool)
        kept_S[: self._active] = False
        kept_S[ranked_A[: self._room - others]] = True
        self.column_C, self._left_X = np.flatnonzero(kept_S), np.flatnonzero(~kept_S)
        self.row_BxC = np.zeros((self._count + self._others, len(self.column_C)), np.float32)
        for row in (*range(done), *range(-self._others, 0)):  # one by one: there is no room for copies
            self._write_narrow(np.array([row]), old[row][None])

    def sort(self, order_F: np.ndarray) -> None:
        """Reorder the rows of features in place: there is no room for a second copy.

        Args:
          order_F: which row comes to each place.
        """
        rows_FxC, step = self.row_BxC[: self._count], max(_BLOCK // self._count, 1)
        for start in range(0, rows_FxC.shape[1], step):
            columns = slice(start, start + step)
            rows_FxC[:, columns] = rows_FxC[order_F, columns]
        for sum_R in (self.dropped_R, self.size_R):
            sum_R[: self._count] = sum_R[: self._count][order_F]

    def leave_out(self, left_X: np.ndarray) -> None:
        """Drop columns when all rows are there, in place: there is no room for a second copy.

        Args:
          left_X: the places of those that go; ``dropped_R`` gets what they contribute.
        """
        kept = np.delete(np.arange(len(self.column_C)), left_X)
        flat, width = self.row_BxC.reshape(-1), len(kept)
        for row, values in enumerate(self.row_BxC):  # where its new place ends, no row begins that is still to be read
            self.dropped_R[row] += values[left_X].sum()
            flat[row * width : (row + 1) * width] = values[kept]
        # refcheck=False: the loop's views of rows still exist, and are not used any more.
        self.row_BxC.resize((len(self.row_BxC), width), refcheck=False)
        self.column_C = self.column_C[kept]
