"""Which features of two dictionaries are one: their rows compared pair by pair of dictionaries, on all devices.

One program looks at a block of pairs of dictionaries. Of each pair it multiplies all rows with all others, a few
hundred rows at a time, and keeps what is needed of the products: the largest of each row and of each column. The pairs
of a block are split over the devices, so that a device holds the rows of its own pairs alone. The assignment is solved
on the host by ``assignment``, which asks the same program again for what it has to know.

Rows of unit length give cosines, and activations that are centred and of unit length Pearson's correlations.
"""

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saejax.parallel import AXES
from saejax.transfer.assignment import Candidates

_ROWS = 512  # rows whose products are held at once
_CANDIDATES = 16  # of a row, at a time
_VMAPPED = 4  # pairs of an accelerator that run side by side
_EXACT = 1e-6  # largest gap at which an assignment counts as the best
_ROUNDS = 100  # at most, of one assignment

Key = TypeVar("Key")


@dataclasses.dataclass(frozen=True)
class Matched:
    """The rows of one dictionary beside those of another.

    Attributes:
      nearest_F: the largest product of each of the first one's rows; ``nearest_G``: of each of the second's.
      mutual: how many rows of the first have a nearest whose nearest they are.
      partner_F: the row of the second that each of the first is assigned to, none twice, such that the sum of products
        is largest (the Hungarian method's assignment); -1 where there are fewer.
      value_F: their products; NaN where there is none.
      gap: by how much at most the mean product of the pairs falls short of the best.
    """

    nearest_F: np.ndarray
    nearest_G: np.ndarray
    mutual: int
    partner_F: np.ndarray
    value_F: np.ndarray
    gap: float


def match(problems: Iterable[tuple[Key, np.ndarray, np.ndarray]], mesh: Mesh) -> Iterator[tuple[Key, Matched]]:
    """Matches the rows of pairs of dictionaries.

    Args:
      problems: a key, the rows of a first and those of a second dictionary [F, D] and [G, D], fp32 of length 1 at most;
        a few are asked for at a time.
      mesh: pairs are split over all its devices.

    Yields:
      A key and what was found, as they are finished, not in their order.
    """
    waiting, begun = iter(problems), list[_Problem]()
    block = mesh.devices.size * (1 if jax.default_backend() == "cpu" else _VMAPPED)
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        while True:
            while len(begun) < 2 * block and (given := next(waiting, None)) is not None:
                begun.append(_Problem(*given))
            if not begun:
                return
            now = [one for one in begun if one.shape == begun[0].shape][:block]
            begun = [one for one in begun if one not in now]
            for problem, part in zip(now, _look(now, block, mesh), strict=True):
                problem.look(*part)
            for problem in [one for one in now if one.settled]:
                yield problem.key, problem.result()
            left = [one for one in now if not one.settled]
            list(pool.map(_Problem.solve, left))
            begun += left


class _Problem:
    """The assignment of one pair, in the making; the first dictionary is turned round to be the one of fewer rows."""

    def __init__(self, key: Any, first_FxD: np.ndarray, second_GxD: np.ndarray):
        self.key, self._turned = key, len(first_FxD) > len(second_GxD)
        self.few_FxD, self.many_GxD = (second_GxD, first_FxD) if self._turned else (first_FxD, second_GxD)
        self.price_G = np.zeros(len(self.many_GxD), np.float32)
        count = len(self.few_FxD)
        diagonal_F = np.einsum("fd,fd->f", self.few_FxD, self.many_GxD[:count], dtype=np.float64)
        self._known = Candidates.diagonal(diagonal_F, len(self.many_GxD))
        self._nearest: tuple[np.ndarray, np.ndarray, int] | None = None
        self._column_F: np.ndarray | None = None
        self._gap, self._rounds = np.inf, 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows of both, and their width."""
        return (*self.few_FxD.shape, len(self.many_GxD))

    @property
    def settled(self) -> bool:
        """Whether the assignment is known to be the best, or as near to it as it will be."""
        return self._gap <= _EXACT or self._rounds >= _ROUNDS

    def look(self, top_FxC: np.ndarray, column_FxC: np.ndarray, best_G: np.ndarray) -> None:
        """Takes what the devices saw at the present prices: largest values less price, their columns, column maxima."""
        if self._nearest is None:
            self._nearest = top_FxC[:, 0], best_G, int((top_FxC[:, 0] >= best_G[column_FxC[:, 0]]).sum())
        wanted_F = np.ones(len(top_FxC), bool)
        if self._column_F is not None:
            own_F = self._own() - self.price_G[self._column_F]
            wanted_F = top_FxC[:, 0] > own_F + _EXACT / 10
            self._gap = float(np.maximum(top_FxC[:, 0].astype(np.float64) - own_F, 0).mean())
            if not wanted_F.any():
                self._gap = min(self._gap, _EXACT)
        row_N = np.repeat(np.flatnonzero(wanted_F), top_FxC.shape[1])
        column_N = column_FxC[wanted_F].reshape(-1)
        value_N = (top_FxC[wanted_F] + self.price_G[column_FxC[wanted_F]]).reshape(-1)
        self._known.add(row_N, column_N, value_N)
        self._rounds += 1

    def solve(self) -> None:
        """Solves the assignment on what is known, which gives new prices."""
        self._column_F, price_G = self._known.solve()
        self.price_G = price_G.astype(np.float32)

    def _own(self) -> np.ndarray:
        """The products of the pairs, fp64."""
        assert self._column_F is not None
        return np.einsum("fd,fd->f", self.few_FxD, self.many_GxD[self._column_F], dtype=np.float64)

    def result(self) -> Matched:
        """What was found, for the dictionaries as they were given."""
        assert self._nearest is not None and self._column_F is not None
        few_F, many_G, mutual = self._nearest
        value_F = self._own()
        if not self._turned:
            return Matched(few_F, many_G, mutual, self._column_F, value_F, self._gap)
        partner_G, value_G = np.full(len(many_G), -1), np.full(len(many_G), np.nan)
        partner_G[self._column_F], value_G[self._column_F] = np.arange(len(few_F)), value_F
        return Matched(many_G, few_F, mutual, partner_G, value_G, self._gap)


def _look(problems: Sequence[_Problem], block: int, mesh: Mesh) -> list[tuple[np.ndarray, ...]]:
    """Runs the program on some problems, the last of which fills the block up."""
    filled = [*problems, *[problems[-1]] * (block - len(problems))]
    parts = [np.stack([getattr(one, name) for one in filled]) for name in ("few_FxD", "many_GxD", "price_G")]
    placed = jax.device_put(parts, NamedSharding(mesh, PartitionSpec(AXES)))
    vmapped = 1 if jax.default_backend() == "cpu" else _VMAPPED
    found = jax.device_get(_best(mesh, vmapped, min(_CANDIDATES, len(problems[0].price_G)), *placed))
    return [tuple(part[i] for part in found) for i in range(len(problems))]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _best(
    mesh: Mesh, vmapped: int, count: int, first_PxFxD: jax.Array, second_PxGxD: jax.Array, price_PxG: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``_best_of_pair`` of every pair of a block, each on the device that holds it."""

    def here(*arrays: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return lax.map(lambda pair: _best_of_pair(count, *pair), arrays, batch_size=vmapped)

    own = PartitionSpec(AXES)
    split = jax.shard_map(here, mesh=mesh, in_specs=own, out_specs=own)
    return split(first_PxFxD, second_PxGxD, price_PxG)


def _best_of_pair(
    count: int, first_FxD: jax.Array, second_GxD: jax.Array, price_G: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The ``count`` largest products less price of each row [F, C], their columns, and the largest of each column."""
    features, rows = len(first_FxD), min(_ROWS, len(first_FxD))
    chunks = -(-features // rows)
    padded = jnp.pad(first_FxD, ((0, chunks * rows - features), (0, 0))).reshape(chunks, rows, -1)

    def chunk(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        number, rows_RxD = part
        value_RxG = jnp.matmul(rows_RxD, second_GxD.T, precision="highest")
        real_R = number * rows + jnp.arange(rows) < features
        best_G = jnp.max(jnp.where(real_R[:, None], value_RxG, -jnp.inf), axis=0)
        top_RxC, column_RxC = lax.top_k(value_RxG - price_G[None], count)
        return top_RxC, column_RxC, best_G

    top, column, best = lax.map(chunk, (jnp.arange(chunks), padded))
    top_FxC, column_FxC = (part.reshape(chunks * rows, count)[:features] for part in (top, column))
    return top_FxC, column_FxC, best.max(axis=0)
