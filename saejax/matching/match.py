"""Matching of the features of two dictionaries by their rows.

1. One program multiplies the rows of a block of pairs of dictionaries, a few hundred rows at a time, and keeps the
   largest products of each row and, the first time, of each column. The pairs of a block are split over the devices.
   Products of sparse rows are made on the host, where only features that fire together meet. If all of them fit into
   memory, they are assigned there and then, exactly (Jonker and Volgenant, 1987, as SciPy has it).
2. An ``Auction`` assigns rows to columns on the host from these candidates.
3. For the rows that wait there, step 1 looks again at the present prices, until none waits.

Rows of unit length give cosines; centred activations of unit length (``CentredRows``) give Pearson's correlations. Rows
of zeros stay unassigned: zero the rows of features that must not be compared.

Rows bid for columns, whose prices rise from zero (Bertsekas, 1988, "The auction algorithm", Annals of Operations
Research 14). A row bids for the column of largest profit (value minus price): as much as makes the second-best column
equally profitable, plus ``STEP``. Who held the column must bid again. At the end no row could gain more than ``STEP``
elsewhere, and no unassigned column has a price, so by duality the sum is within ``STEP`` per row of the optimum.

The table of all values [F, G] is never needed as a whole. A row knows its best columns, and that when it looked, all
others were no more profitable than the last of these; prices only rise, so that stays true. It bids while its best
known column is better than that, and otherwise waits to be shown its best columns at the present prices.
"""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy import sparse
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from saejax.matching.rows import CentredRows, Rows, paired_products
from saejax.parallel.mesh import AXES, read_parts

STEP = 5e-4  # increment of a bid; values are at most 1
_ROWS = 512  # rows whose products are in memory at once
CANDIDATES = 64  # columns that a row is shown at a time
_AT_ONCE = 1 << 24  # products of sparse rows, up to which all are in memory, in half a gigabyte
_VMAPPED = 4  # pairs that an accelerator multiplies side by side
_AHEAD_BYTES = 4 << 30  # rows of waiting pairs, beyond which no more are read

Key = TypeVar("Key")


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
        """Return ``count`` rows to look next: waiting rows first, then the rows nearest to waiting."""
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
        """Return an upper bound of the distance of the mean over rows to the best assignment's mean.

        Args:
          value_F: value of each row's column, 0 for unassigned rows.
        """
        paid_F = np.where(self.column_F >= 0, self.price_G[self.column_F], 0)
        best_F = np.maximum(self._best_profit(), self._unknown_F)
        return float(np.maximum(np.maximum(best_F, 0) - (value_F - paid_F), 0).mean())

    def _best_profit(self) -> np.ndarray:
        """Return the largest profit among the columns that each row knows."""
        return (self._value_FxC - self.price_G[self._known_FxC]).max(axis=1)


@dataclasses.dataclass(frozen=True)
class Matched:
    """The matching of the rows of two dictionaries."""

    nearest_F: np.ndarray  #: largest product of each row of the first; of sparse rows at least 0
    nearest_G: np.ndarray  #: the same of each row of the second
    #: row of the second assigned to each row of the first, none twice, with the largest sum of products (the Hungarian
    #: method's assignment); -1: unassigned, which counts 0.
    partner_F: np.ndarray
    value_F: np.ndarray  #: products of the pairs; NaN where there is none
    #: upper bound of the distance of the mean product of the pairs to the optimum; at most ``STEP``.
    gap: float


def match(problems: Iterable[tuple[Key, Rows, Rows]], mesh: Mesh) -> Iterator[tuple[Key, Matched]]:
    """Match the rows of pairs of dictionaries.

    While assignments are solved on the host, the devices multiply other pairs.

    Args:
      problems: (key, rows of the first [F, D], rows of the second [G, D]), fp32 of length at most 1, both dense or both
        sparse; read a few at a time, so that memory does not grow with their number.
      mesh: pairs of dense rows are split over all its devices.

    Yields:
      (key, matching), in the order in which they finish.
    """
    waiting = iter(problems)
    block = mesh.devices.size * side_by_side(jax.default_backend())
    ready, solving = list[_Problem](), dict[Future, _Problem]()

    def has_room() -> bool:
        problems = [*ready, *solving.values()]
        row_bytes = {id(rows): rows.nbytes for problem in problems for rows in (problem.few, problem.many)}
        # Twice a block: the devices multiply one while the host solves the other.
        return not problems or (len(problems) < 2 * block and sum(row_bytes.values()) < _AHEAD_BYTES)

    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        while True:
            while has_room() and (next_problem := next(waiting, None)) is not None:
                problem = _Problem(*next_problem)
                if isinstance(problem.few, CentredRows):
                    solving[pool.submit(problem.assign_sparse)] = problem
                else:
                    ready.append(problem)
            if not ready and not solving:
                return
            # One shape per block, since a block is one program.
            batch = [problem for problem in ready if problem.kind == ready[0].kind][:block]
            ready = [problem for problem in ready if problem not in batch]
            for problem in _look(batch, block, mesh):
                solving[pool.submit(problem.auction.bid)] = problem
            # While the devices have work, solved problems are only collected; without work there is nothing to do but
            # wait.
            done, _ = wait(solving, timeout=0 if ready else None, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                problem = solving.pop(future)
                if len(problem.auction.waiting):
                    ready.append(problem)
                else:
                    yield problem.key, problem.result()


def measure_pairs(matched: Matched, first: Rows, second: Rows) -> Matched:
    """Return an assignment with the products of other rows of the same features, which had no part in the choice.

    An assignment picks what correlates by chance, too.

    Args:
      matched: the assignment.
      first: other rows of the first dictionary, such as activations on other text.
      second: the same of the second.
    """
    paired = np.flatnonzero(matched.partner_F >= 0)
    value_F = np.full(len(matched.partner_F), np.nan)
    value_F[paired] = paired_products(first, paired, second, matched.partner_F[paired])
    return dataclasses.replace(matched, value_F=value_F)


def side_by_side(platform: str) -> int:
    """Return the number of pairs that a device multiplies together."""
    return 1 if platform == "cpu" else _VMAPPED


class _Problem:
    """The assignment of one pair in progress; the pair is swapped so that the first dictionary has fewer rows."""

    def __init__(self, key: Any, first: Any, second: Any):
        self.key, self._swapped = key, len(first) > len(second)
        self.few, self.many = (second, first) if self._swapped else (first, second)
        self.auction = Auction(len(self.few), len(self.many))
        self._nearest: tuple[np.ndarray, np.ndarray] | None = None
        self._is_exact = False

    @property
    def fresh(self) -> bool:
        """True if no products have been computed yet."""
        return self._nearest is None

    @property
    def rows(self) -> int:
        """Number of rows to look next: four times the waiting ones, rounded up to one of few sizes of programs."""
        rows, wanted = len(self.few), 4 * len(self.auction.waiting)
        # More rows than wait are shown, as their neighbours will wait soon; sizes are powers of two for few programs.
        return min(rows, _ROWS * 2 ** max(0, math.ceil(math.log2(wanted / _ROWS))))

    @property
    def rows_NxD(self) -> np.ndarray:
        """The rows to look next."""
        self._looking = self.auction.urgent(self.rows)
        return self.few if len(self._looking) == len(self.few) else self.few[self._looking]

    @property
    def kind(self) -> tuple[bool | int, ...]:
        """Shapes that problems in one block share."""
        return (self.fresh, self.rows, *self.few.shape, len(self.many))

    def look(self, top_NxC: np.ndarray, column_NxC: np.ndarray, top_G: np.ndarray | None = None) -> None:
        """Take the results of ``_best_of_pair``."""
        if top_G is not None:
            # Only the first look has no prices in it: later ones do not give the nearest rows.
            self._nearest = top_NxC[:, 0], top_G
        self.auction.look(self._looking, top_NxC, column_NxC)

    def assign_sparse(self) -> None:
        """Assign sparse rows, whose products are made here: exactly, or by looking and bidding until no row waits."""
        every = np.arange(len(self.few))
        if self.few.bound_products(self.many, every).sum() <= _AT_ONCE:
            product = sparse.vstack([*self.few.products(self.many, every)], format="csr")
            self._nearest = tuple(np.maximum(product.max(axis=axis).toarray(), 0) for axis in (1, 0))
            self.auction.column_F, self._is_exact = _assign_exactly(product), True
            self.auction.waiting = every[:0]
            return
        # Where many rows are alike, as those of features that fire at one token, prices rise slowly.
        while len(self.auction.waiting):
            self._looking = self.auction.urgent(self.rows)
            top_NxC, column_NxC, top_G = _best_sparse(self.few, self.many, self._looking, self.auction.price_G)
            if self.fresh:
                self._nearest = np.maximum(top_NxC[:, 0], 0), top_G
            self.auction.look(self._looking, top_NxC, column_NxC)
            self.auction.bid()

    def result(self) -> Matched:
        """Return the matching of the dictionaries in the given order."""
        assert self._nearest is not None
        few_F, many_G = self._nearest
        paired = np.flatnonzero(self.auction.column_F >= 0)
        column, own_F = self.auction.column_F[paired], np.zeros(len(few_F))
        # Anew from the rows, since values minus prices plus prices have lost digits.
        own_F[paired] = paired_products(self.few, paired, self.many, column)
        gap = 0.0 if self._is_exact else self.auction.gap(own_F)
        if not self._swapped:
            partner_F, value_F = np.full(len(few_F), -1), np.full(len(few_F), np.nan)
            partner_F[paired], value_F[paired] = column, own_F[paired]
            return Matched(few_F, many_G, partner_F, value_F, gap)
        partner_G, value_G = np.full(len(many_G), -1), np.full(len(many_G), np.nan)
        partner_G[column], value_G[column] = paired, own_F[paired]
        return Matched(many_G, few_F, partner_G, value_G, gap)


def _assign_exactly(product_FxG: sparse.csr_array) -> np.ndarray:
    """Return the column of each row in the assignment of the largest sum; -1: none, which counts 0.

    Args:
      product_FxG: values of all pairs that are above 0; those below are dropped in place.
    """
    rows, columns = product_FxG.shape
    product_FxG.data[product_FxG.data < 0] = 0
    product_FxG.eliminate_zeros()
    # Each row may have a column of its own, which counts 0. All count 1 more, as zeros are no edges.
    value_FxC = sparse.hstack([product_FxG, sparse.eye_array(rows)], format="csr", dtype=np.float64)
    value_FxC.data[value_FxC.indices < columns] += 1
    _, column_F = min_weight_full_bipartite_matching(value_FxC, maximize=True)
    return np.where(column_F < columns, column_F, -1)


def _best_sparse(
    first: CentredRows, second: CentredRows, row_N: np.ndarray, price_G: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the same as ``_best_of_pair``, of some rows of the first; products that are not above 0 may be missing."""
    count = min(CANDIDATES, len(second))
    # Where a row has fewer products, -inf: a column that nobody bids for.
    top_NxC, column_NxC = np.full((len(row_N), count), -np.inf, np.float32), np.zeros((len(row_N), count), np.int64)
    top_G, n = np.zeros(len(second), np.float32), 0
    for product in first.products(second, row_N):
        np.maximum.at(top_G, product.indices, product.data)
        profit_X = product.data - price_G[product.indices]
        for start, end in itertools.pairwise(product.indptr):
            of_row = slice(start, end)
            best = np.argsort(-profit_X[of_row], kind="stable")[:count]
            top_NxC[n, : len(best)] = profit_X[of_row][best]
            column_NxC[n, : len(best)] = product.indices[of_row][best]
            n += 1
    return top_NxC, column_NxC, top_G


def _look(problems: Sequence[_Problem], block: int, mesh: Mesh) -> Sequence[_Problem]:
    """Find the best columns of the problems' next rows; rows of zeros fill the block."""
    if not problems:
        return []
    arrays = [(problem.rows_NxD, problem.many, problem.auction.price_G) for problem in problems]
    placed = [_place_block(of_problems, block, mesh) for of_problems in zip(*arrays, strict=True)]
    vmapped = side_by_side(jax.default_backend())
    best = jax.device_get(best_rows(mesh, vmapped, CANDIDATES, problems[0].fresh, *placed))
    for number, problem in enumerate(problems):
        problem.look(*(values[number] for values in best))
    return problems


def _place_block(arrays: Sequence[np.ndarray], block: int, mesh: Mesh) -> jax.Array:
    """Stack arrays on the devices, some on each, filled up with zeros so that a smaller block needs no own program.

    On the host there are copies of one device's part at a time, and none of what fills the block.
    """

    def read(index: tuple[slice, ...]) -> np.ndarray:
        part = arrays[index[0]]
        filled = np.zeros((len(range(block)[index[0]]), *arrays[0].shape), arrays[0].dtype)
        for place, array in zip(filled, part, strict=False):
            place[...] = array
        return filled

    return read_parts((block, *arrays[0].shape), NamedSharding(mesh, PartitionSpec(AXES)), read)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def best_rows(
    mesh: Mesh,
    vmapped: int,
    count: int,
    both: bool,
    first_PxNxD: jax.Array,
    second_PxGxD: jax.Array,
    price_PxG: jax.Array,
) -> tuple[jax.Array, ...]:
    """Return ``_best_of_pair`` of every pair of a block, each on its device.

    Args:
      mesh: the devices.
      vmapped: pairs that a device multiplies together.
      count: as for ``_best_of_pair``.
      both: as for ``_best_of_pair``.
      first_PxNxD: rows of the first dictionaries.
      second_PxGxD: rows of the second dictionaries.
      price_PxG: prices of the latter.
    """

    def here(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        # Not one vmap over all pairs: the products of a few pairs at a time have to fit into memory.
        return lax.map(lambda pair: _best_of_pair(count, both, *pair), arrays, batch_size=vmapped)

    spec = PartitionSpec(AXES)
    split = jax.shard_map(here, mesh=mesh, in_specs=spec, out_specs=spec)
    return split(first_PxNxD, second_PxGxD, price_PxG)


def _best_of_pair(
    count: int, both: bool, first_NxD: jax.Array, second_GxD: jax.Array, price_G: jax.Array
) -> tuple[jax.Array, ...]:
    """Return the ``count`` largest products minus price of each row [N, C], and their columns.

    If ``both``, also return the largest product of each column [G], without price.
    """
    features, rows = len(first_NxD), min(_ROWS, len(first_NxD))
    chunks = -(-features // rows)
    padded = jnp.pad(first_NxD, ((0, chunks * rows - features), (0, 0))).reshape(chunks, rows, -1)
    of_row = min(count, len(second_GxD))

    def chunk(top_G: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple:
        number, rows_RxD = part
        # In full float32, as near ties decide who is nearest to whom.
        value_RxG = jnp.matmul(rows_RxD, second_GxD.T, precision="highest")
        if both:
            real_R = number * rows + jnp.arange(rows) < features
            # Rows that only fill the chunk have products of 0, which would beat negative ones.
            top_G = jnp.maximum(top_G, jnp.where(real_R[:, None], value_RxG, -jnp.inf).max(axis=0))
        return top_G, tuple(lax.top_k(value_RxG - price_G[None], of_row))

    # Derived from an array that differs between devices, as the scan's carry must be in shard_map.
    lowest_G = jnp.zeros_like(price_G) * price_G - jnp.inf
    top_G, (top, column) = lax.scan(chunk, lowest_G, (jnp.arange(chunks), padded))
    top_NxC, column_NxC = (part.reshape(chunks * rows, of_row)[:features] for part in (top, column))
    return (top_NxC, column_NxC, top_G) if both else (top_NxC, column_NxC)
