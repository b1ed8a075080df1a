"""The one-to-one assignment of rows to columns with the largest sum of values.

``Auction`` finds it from sparse candidates, and proves it near the optimum. Rows bid for columns, whose prices rise
from zero (Bertsekas, 1988, "The auction algorithm", Annals of Operations Research 14). A row bids for the column of
largest profit (value minus price): as much as makes the second-best column equally profitable, plus ``STEP``. Who held
the column must bid again. At the end no row could gain more than ``STEP`` elsewhere, and no unassigned column has a
price, so by duality the sum is within ``STEP`` per row of the optimum.

The table of all values [F, G] is never needed as a whole. A row knows its best columns, and that when it looked, all
others were no more profitable than the last of these; prices only rise, so that stays true. It bids while its best
known column is better than that, and otherwise waits to be shown its best columns at the present prices.

This file imports no JAX.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

STEP = 5e-4  # increment of a bid; values are at most 1


def assign_table(value_FxG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the assignment with the largest sum of a small table of values (scipy's dense solver).

    Returns:
      Rows and columns of the pairs, int [min(F, G)].
    """
    return linear_sum_assignment(value_FxG, maximize=True)


class Auction:
    """F rows and G columns, F at most G. A row may stay unassigned, which has the value 0.

    Attributes:
      price_G: prices of the columns, fp32; 0 for unassigned columns.
      column_F: column of each row; -1: unassigned.
      waiting: rows that must look before they bid; at first all, in the end none.
    """

    def __init__(self, rows: int, columns: int):
        self.price_G, self._row_G = np.zeros(columns, np.float32), np.full(columns, -1)
        self.column_F, self.waiting = np.full(rows, -1), np.arange(rows)
        self._unknown_F = np.zeros(rows, np.float32)  # upper bound of the profit of columns that the row does not know
        self._known_FxC, self._value_FxC = np.empty((2, rows, 0))

    def urgent(self, count: int) -> np.ndarray:
        """Return ``count`` rows to look next: those that wait first, then those that are nearest to waiting."""
        # argpartition takes no count beyond the last row.
        if count == len(self.column_F):
            return np.arange(count)
        margin_F = self._best_profit() - self._unknown_F
        # Rows that wait come first; others that are nearly out of known columns look along, as they would wait next.
        margin_F[self.waiting] = -np.inf
        return np.sort(np.argpartition(margin_F, count - 1)[:count])

    def look(self, row_N: np.ndarray, profit_NxC: np.ndarray, column_NxC: np.ndarray) -> None:
        """Show rows their most profitable columns.

        Args:
          row_N: the rows, among them all that wait.
          profit_NxC: their largest values minus present prices, descending, fp32; of all columns if there are fewer.
          column_NxC: the columns of these.
        """
        if not self._known_FxC.size:
            shape = len(self.column_F), column_NxC.shape[1]
            self._known_FxC, self._value_FxC = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        knows_all = column_NxC.shape[1] == len(self.price_G)
        # Prices only rise, so what was shown last bounds all that was not shown for good.
        self._unknown_F[row_N] = 0.0 if knows_all else np.maximum(profit_NxC[:, -1], 0)
        self._known_FxC[row_N] = column_NxC
        # Values are kept instead of profits, as prices go on changing.
        self._value_FxC[row_N] = profit_NxC + self.price_G[column_NxC]

    def bid(self) -> None:
        """Bid until all rows are assigned, unassigned by choice, or waiting."""
        left, waits = self.waiting, list[np.ndarray]()
        while len(left):
            row_N = left
            known_NxC, number_N = self._known_FxC[row_N], np.arange(len(row_N))
            profit_NxC = self._value_FxC[row_N] - self.price_G[known_NxC]
            place_N = profit_NxC.argmax(axis=1)
            best_N = profit_NxC[number_N, place_N]
            profit_NxC[number_N, place_N] = -np.inf
            unknown_N = self._unknown_F[row_N]
            bids_N = (best_N >= unknown_N) & (best_N > 0)  # a row without profit stays unassigned
            if not bids_N.all():
                waits.append(row_N[(best_N < unknown_N) & (unknown_N > 0)])
            # Without the STEP two rows that want two equal columns would raise nothing, for ever.
            raise_N = best_N - np.maximum(profit_NxC.max(axis=1), unknown_N) + np.float32(STEP)
            left = self._sell(row_N[bids_N], known_NxC[number_N, place_N][bids_N], raise_N[bids_N])
        self.waiting = np.concatenate([*waits, left])

    def _sell(self, row_N: np.ndarray, column_N: np.ndarray, raise_N: np.ndarray) -> np.ndarray:
        """Give each column to the highest bidder; return the rows that have none now."""
        order_N = raise_N.argsort()
        row_N, column_N, raise_N = row_N[order_N], column_N[order_N], raise_N[order_N]
        before_N, price_N = self._row_G[column_N], self.price_G[column_N] + raise_N
        self._row_G[column_N], self.price_G[column_N] = row_N, price_N  # of several bids the last, the highest, stays
        won_N = self._row_G[column_N] == row_N
        outbid_M = before_N[won_N & (before_N >= 0)]
        self.column_F[row_N[won_N]], self.column_F[outbid_M] = column_N[won_N], -1
        return np.concatenate([row_N[~won_N], outbid_M])

    def gap(self, value_F: np.ndarray) -> float:
        """Return an upper bound of the distance of the mean over rows to that of the best assignment.

        Args:
          value_F: value of each row's column, 0 for unassigned rows.
        """
        paid_F = np.where(self.column_F >= 0, self.price_G[self.column_F], 0)
        best_F = np.maximum(self._best_profit(), self._unknown_F)
        return float(np.maximum(np.maximum(best_F, 0) - (value_F - paid_F), 0).mean())

    def _best_profit(self) -> np.ndarray:
        """Return the largest profit among the columns that each row knows."""
        return (self._value_FxC - self.price_G[self._known_FxC]).max(axis=1)
