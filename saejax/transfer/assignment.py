"""The one-to-one assignment of rows to columns with the largest sum, found on a few candidates of each row and proved.

The table of all values [F, G] is never needed as a whole. The assignment is solved on the candidates known so far,
which gives every column a price. It is the best of all if no row has a value, less its column's price, above what it
gets now (duality of linear programs). Rows that have one bring their best columns as further candidates, and it is
solved again. So the end is exact, or the distance to it is known: no assignment exceeds the sum over rows of the
largest value less price, plus all prices.

This file imports no JAX: processes that solve assignments start quickly.
"""

import dataclasses

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

_SHIFT = 2.0  # makes values of -1 to 1 positive: a weight of 0 would be no candidate
_TOLERANCE = 1e-7  # below which a value does not count as larger


@dataclasses.dataclass
class Candidates:
    """Pairs of a row and a column with their values, for F rows and G columns, F at most G.

    Each row has a column of its own behind the G, of value 0: it may stay alone. Without these, rows that have nothing
    in common with any column would compete for them.

    Attributes:
      value_FxG: sparse, each value plus a constant.
    """

    value_FxG: sparse.csr_array

    @classmethod
    def alone(cls, rows: int, columns: int) -> "Candidates":
        """Of so many rows and columns, no pair of which is known yet."""
        row_F = np.arange(rows)
        return cls(sparse.csr_array((np.full(rows, _SHIFT), (row_F, columns + row_F)), (rows, columns + rows)))

    def add(self, row_N: np.ndarray, column_N: np.ndarray, value_N: np.ndarray) -> None:
        """Takes in pairs; those that are known stay as they are."""
        rows, columns = self.value_FxG.shape
        known = self.value_FxG.tocoo()
        key_N = np.concatenate(
            [known.coords[0] * np.int64(columns) + known.coords[1], row_N * np.int64(columns) + column_N]
        )
        value_N = np.concatenate([known.data, value_N.astype(np.float64) + _SHIFT])
        key_U, first_U = np.unique(key_N, return_index=True)
        self.value_FxG = sparse.csr_array((value_N[first_U], (key_U // columns, key_U % columns)), (rows, columns))

    def solve(self) -> tuple[np.ndarray, np.ndarray]:
        """The best assignment on these candidates.

        Returns:
          The column of each row [F], G or above for those that stay alone, and prices of the columns [G + F], at least
          0, and 0 for those that no row has.
        """
        row_F, column_F = min_weight_full_bipartite_matching(self.value_FxG, maximize=True)
        assert np.array_equal(row_F, np.arange(len(row_F)))
        return column_F, prices(self.value_FxG, column_F)


def prices(value_FxG: sparse.csr_array, column_F: np.ndarray) -> np.ndarray:
    """The smallest prices of columns [G] at which every row likes its own column best.

    Args:
      value_FxG: of the candidates.
      column_F: the best assignment on them.
    """
    by_column = value_FxG.tocsc()
    row_N, starts = by_column.indices, by_column.indptr
    own_F = np.empty(len(column_F))
    table = value_FxG.tocoo()
    mine = column_F[table.coords[0]] == table.coords[1]
    own_F[table.coords[0][mine]] = table.data[mine]
    more_N = by_column.data - own_F[row_N]  # what a row would gain by another column, before prices
    price_G, some = np.zeros(value_FxG.shape[1]), np.diff(starts) > 0
    for _ in range(len(column_F)):
        least_G = np.zeros_like(price_G)
        least_G[some] = np.maximum.reduceat(price_G[column_F][row_N] + more_N, starts[:-1][some])
        if not (least_G > price_G + _TOLERANCE).any():
            break
        price_G = np.maximum(price_G, least_G)
    return price_G
