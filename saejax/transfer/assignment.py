"""The one-to-one assignment of rows to columns with the largest sum, found by an auction and proved near to the best.

Rows bid for columns, whose prices rise from zero (Bertsekas, 1988, "The auction algorithm", Annals of Operations
Research 14). A row bids for the column of largest value less price: as much as makes another column as good to it, and
``STEP`` more. Whoever had the column must bid again. At the end no row could gain more than ``STEP`` elsewhere, and no
column without a row has a price, so the sum is within ``STEP`` a row of the best (duality of linear programs).

The table of all values [F, G] is never needed as a whole. A row knows its best columns, and that when it looked all
others were no better than the last of these; prices only rise, so that stays true. It bids while the best of those it
knows is above that, and then waits to be shown its best columns at the present prices.

This file imports no JAX.
"""

import numpy as np

STEP = 5e-4  # that a bid adds; of values of 1 at most


class Auction:
    """F rows and G columns, F at most G. A row may stay alone, which has the value 0.

    Attributes:
      price_G: of the columns, fp32, at least 0; 0 of those that no row has.
      column_F: of each row; -1 for rows that have none.
      waiting: the rows that must look before they bid; at first all, in the end none.
    """

    def __init__(self, rows: int, columns: int):
        self.price_G, self._row_G = np.zeros(columns, np.float32), np.full(columns, -1)
        self.column_F, self.waiting = np.full(rows, -1), np.arange(rows)
        self._others_F = np.zeros(rows, np.float32)  # what a column that the row does not know is worth, at most
        self._known_FxC, self._value_FxC = np.empty((2, rows, 0))

    def urgent(self, count: int) -> np.ndarray:
        """So many rows, those that wait first, then those that are nearest to it."""
        if count == len(self.column_F):
            return np.arange(count)
        margin_F = self._best() - self._others_F
        margin_F[self.waiting] = -np.inf
        return np.sort(np.argpartition(margin_F, count - 1)[:count])

    def look(self, row_N: np.ndarray, profit_NxC: np.ndarray, column_NxC: np.ndarray) -> None:
        """Shows rows their best columns, among them those that wait.

        Args:
          row_N: the rows.
          profit_NxC: their largest values less present price, descending, fp32; of all columns if they are fewer.
          column_NxC: whose these are.
        """
        if not self._known_FxC.size:
            shape = len(self.column_F), column_NxC.shape[1]
            self._known_FxC, self._value_FxC = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        every = column_NxC.shape[1] == len(self.price_G)
        self._others_F[row_N] = 0.0 if every else np.maximum(profit_NxC[:, -1], 0)
        self._known_FxC[row_N] = column_NxC
        self._value_FxC[row_N] = profit_NxC + self.price_G[column_NxC]

    def bid(self) -> None:
        """Bids until all rows wait or are content."""
        left, waits = self.waiting, list[np.ndarray]()
        while len(left):
            row_N = left
            known_NxC, number_N = self._known_FxC[row_N], np.arange(len(row_N))
            profit_NxC = self._value_FxC[row_N] - self.price_G[known_NxC]
            place_N = profit_NxC.argmax(axis=1)
            best_N = profit_NxC[number_N, place_N]
            profit_NxC[number_N, place_N] = -np.inf
            others_N = self._others_F[row_N]
            bids_N = (best_N >= others_N) & (best_N > 0)  # who has nothing to gain stays alone
            if not bids_N.all():
                waits.append(row_N[(best_N < others_N) & (others_N > 0)])
            raise_N = best_N - np.maximum(profit_NxC.max(axis=1), others_N) + np.float32(STEP)
            left = self._sell(row_N[bids_N], known_NxC[number_N, place_N][bids_N], raise_N[bids_N])
        self.waiting = np.concatenate([*waits, left])

    def _sell(self, row_N: np.ndarray, column_N: np.ndarray, raise_N: np.ndarray) -> np.ndarray:
        """Gives each column to the row that raises its price most; returns the rows that have none now."""
        order_N = raise_N.argsort()
        row_N, column_N, raise_N = row_N[order_N], column_N[order_N], raise_N[order_N]
        before_N, price_N = self._row_G[column_N], self.price_G[column_N] + raise_N
        self._row_G[column_N], self.price_G[column_N] = row_N, price_N  # of several the last one, the highest, stays
        won_N = self._row_G[column_N] == row_N
        left_M = before_N[won_N & (before_N >= 0)]
        self.column_F[row_N[won_N]], self.column_F[left_M] = column_N[won_N], -1
        return np.concatenate([row_N[~won_N], left_M])

    def gap(self, own_F: np.ndarray) -> float:
        """By how much at most the mean over the rows falls short of the best assignment's.

        Args:
          own_F: what each row has, 0 where it is alone.
        """
        paid_F = np.where(self.column_F >= 0, self.price_G[self.column_F], 0)
        return float(np.maximum(np.maximum(self._best(), self._others_F) - (own_F - paid_F), 0).mean())

    def _best(self) -> np.ndarray:
        """The largest value less price among the columns that each row knows."""
        return (self._value_FxC - self.price_G[self._known_FxC]).max(axis=1)
