"""Which features of two dictionaries are one: their rows compared pair by pair of dictionaries, on all devices.

One program looks at a block of pairs of dictionaries. Of each pair it multiplies all rows with all others, a few
hundred rows at a time, and keeps the largest of each row and, at first, of each column. The pairs of a block are split
over the devices, so that a device holds the rows of its own pairs alone. The assignment is solved on the host by
``assignment``, and the program looks again at its prices, until there is none better.

Rows of unit length give cosines, and activations that are centred and of unit length Pearson's correlations.
"""

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saejax.parallel import AXES
from saejax.transfer.assignment import Candidates

_ROWS = 512  # rows whose products are held at once
_CANDIDATES = 32  # of a row or a column, at a time
_VMAPPED = 4  # pairs of an accelerator that run side by side
EXACT = 2e-4  # largest gap at which an assignment counts as the best
_ROUNDS = 100  # at most, of one assignment

Key = TypeVar("Key")


@dataclasses.dataclass(frozen=True)
class Matched:
    """The rows of one dictionary beside those of another.

    Attributes:
      nearest_F: the largest product of each of the first one's rows; ``nearest_G``: of each of the second's.
      mutual: how many rows of the first have a nearest whose nearest they are.
      partner_F: the row of the second that each of the first is assigned to, none twice, such that the sum of products
        is largest (the Hungarian method's assignment); -1 where there are fewer, or where staying alone, which counts
        0, is better.
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

    While assignments are solved on the host, the devices look at other pairs.

    Args:
      problems: a key, the rows of a first and those of a second dictionary [F, D] and [G, D], fp32 of length 1 at most;
        a few are asked for at a time.
      mesh: pairs are split over all its devices.

    Yields:
      A key and what was found, as they are finished, not in their order.
    """
    waiting = iter(problems)
    block = mesh.devices.size * (1 if jax.default_backend() == "cpu" else _VMAPPED)
    ready, solving = list[_Problem](), dict[Future, _Problem]()
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        while True:
            while len(ready) + len(solving) < 2 * block and (given := next(waiting, None)) is not None:
                ready.append(_Problem(*given))
            if not ready and not solving:
                return
            now = [one for one in ready if one.kind == ready[0].kind][:block]
            ready = [one for one in ready if one not in now]
            for problem in _look(now, block, mesh):
                if problem.settled:
                    yield problem.key, problem.result()
                else:
                    solving[pool.submit(problem.solve)] = problem
            done, _ = wait(solving, timeout=0 if ready else None, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                ready.append(solving.pop(future))


class _Problem:
    """The assignment of one pair, in the making; the first dictionary is turned round to be the one of fewer rows."""

    def __init__(self, key: Any, first_FxD: np.ndarray, second_GxD: np.ndarray):
        self.key, self._turned = key, len(first_FxD) > len(second_GxD)
        self.few_FxD, self.many_GxD = (second_GxD, first_FxD) if self._turned else (first_FxD, second_GxD)
        self.price_G = np.zeros(len(self.many_GxD), np.float32)
        self._known = Candidates.alone(len(self.few_FxD), len(self.many_GxD))
        self._nearest: tuple[np.ndarray, np.ndarray, int] | None = None
        self._column_F = np.full(len(self.few_FxD), len(self.many_GxD))  # all alone
        self._gap, self._rounds = np.inf, 0

    @property
    def fresh(self) -> bool:
        """Whether nothing is known yet."""
        return self._nearest is None

    @property
    def kind(self) -> tuple[bool, int, int, int]:
        """What problems that run together have in common."""
        return (self.fresh, *self.few_FxD.shape, len(self.many_GxD))

    @property
    def settled(self) -> bool:
        """Whether the assignment is known to be the best, or as near to it as it will be."""
        return self._gap <= EXACT or self._rounds >= _ROUNDS

    def begin(self, top_FxC: np.ndarray, column_FxC: np.ndarray, top_GxC: np.ndarray, row_GxC: np.ndarray) -> None:
        """Takes the largest values of each row and their columns, and those of each column and their rows."""
        mutual = int((row_GxC[column_FxC[:, 0], 0] == np.arange(len(top_FxC))).sum())
        self._nearest = top_FxC[:, 0], top_GxC[:, 0], mutual
        own_FxC, own_GxC = (np.arange(len(part))[:, None] + 0 * part for part in (column_FxC, row_GxC))
        self._known.add(own_FxC.reshape(-1), column_FxC.reshape(-1), top_FxC.reshape(-1))
        self._known.add(row_GxC.reshape(-1), own_GxC.reshape(-1), top_GxC.reshape(-1))

    def look(self, top_FxC: np.ndarray, column_FxC: np.ndarray) -> None:
        """Takes the largest values less price of each row and their columns, at the present prices."""
        own_F = self._own()
        own_F[self._paired] -= self.price_G[self._column_F[self._paired]]
        self._gap = float(np.maximum(top_FxC[:, 0] - own_F, 0).mean())
        better_FxC = top_FxC > own_F[:, None]
        row_N, place_N = np.nonzero(better_FxC)
        column_N = column_FxC[row_N, place_N]
        self._known.add(row_N, column_N, top_FxC[row_N, place_N] + self.price_G[column_N])
        self._rounds += 1

    def solve(self) -> None:
        """Solves the assignment on what is known, which gives new prices."""
        self._column_F, price = self._known.solve()
        self.price_G = price[: len(self.many_GxD)].astype(np.float32)

    @property
    def _paired(self) -> np.ndarray:
        """The rows that do not stay alone."""
        return np.flatnonzero(self._column_F < len(self.many_GxD))

    def _own(self) -> np.ndarray:
        """The products of the pairs, fp64; 0 for rows that stay alone."""
        own_F, paired = np.zeros(len(self.few_FxD)), self._paired
        others = self.many_GxD[self._column_F[paired]]
        own_F[paired] = np.einsum("fd,fd->f", self.few_FxD[paired], others, dtype=np.float64)
        return own_F

    def result(self) -> Matched:
        """What was found, for the dictionaries as they were given."""
        assert self._nearest is not None
        few_F, many_G, mutual = self._nearest
        paired, own_F = self._paired, self._own()
        column = self._column_F[paired]
        if not self._turned:
            partner_F, value_F = np.full(len(few_F), -1), np.full(len(few_F), np.nan)
            partner_F[paired], value_F[paired] = column, own_F[paired]
            return Matched(few_F, many_G, mutual, partner_F, value_F, self._gap)
        partner_G, value_G = np.full(len(many_G), -1), np.full(len(many_G), np.nan)
        partner_G[column], value_G[column] = paired, own_F[paired]
        return Matched(many_G, few_F, mutual, partner_G, value_G, self._gap)


def _look(problems: Sequence[_Problem], block: int, mesh: Mesh) -> Sequence[_Problem]:
    """Runs the program on some problems of a kind, which take what it found; the last one fills the block up."""
    if not problems:
        return []
    filled = [*problems, *[problems[-1]] * (block - len(problems))]
    parts = [np.stack([getattr(one, name) for one in filled]) for name in ("few_FxD", "many_GxD", "price_G")]
    placed = jax.device_put(parts, NamedSharding(mesh, PartitionSpec(AXES)))
    vmapped = 1 if jax.default_backend() == "cpu" else _VMAPPED
    found = jax.device_get(_best(mesh, vmapped, _CANDIDATES, problems[0].fresh, *placed))
    for number, problem in enumerate(problems):
        part = [values[number] for values in found]
        if problem.fresh:
            problem.begin(*part)
        else:
            problem.look(*part)
    return problems


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _best(
    mesh: Mesh,
    vmapped: int,
    count: int,
    both: bool,
    first_PxFxD: jax.Array,
    second_PxGxD: jax.Array,
    price_PxG: jax.Array,
) -> tuple[jax.Array, ...]:
    """``_best_of_pair`` of every pair of a block, each on the device that holds it."""

    def here(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return lax.map(lambda pair: _best_of_pair(count, both, *pair), arrays, batch_size=vmapped)

    own = PartitionSpec(AXES)
    split = jax.shard_map(here, mesh=mesh, in_specs=own, out_specs=own)
    return split(first_PxFxD, second_PxGxD, price_PxG)


def _best_of_pair(
    count: int, both: bool, first_FxD: jax.Array, second_GxD: jax.Array, price_G: jax.Array
) -> tuple[jax.Array, ...]:
    """The ``count`` largest products less price of each row [F, C], and their columns.

    If ``both``, then also the largest products of each column [G, C], without price, and their rows.
    """
    features, rows = len(first_FxD), min(_ROWS, len(first_FxD))
    chunks = -(-features // rows)
    padded = jnp.pad(first_FxD, ((0, chunks * rows - features), (0, 0))).reshape(chunks, rows, -1)
    of_row, of_column = min(count, len(second_GxD)), min(count, rows)

    def chunk(best: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array]) -> tuple:
        number, rows_RxD = part
        value_RxG = jnp.matmul(rows_RxD, second_GxD.T, precision="highest")
        if both:
            real_R = number * rows + jnp.arange(rows) < features
            top_GxC, row_GxC = lax.top_k(jnp.where(real_R[:, None], value_RxG, -jnp.inf).T, of_column)
            found = (top_GxC, row_GxC + number * rows)
            wider = [jnp.concatenate(pair, axis=1) for pair in zip(best, found, strict=True)]
            top_GxC, place_GxC = lax.top_k(wider[0], of_column)
            best = top_GxC, jnp.take_along_axis(wider[1], place_GxC, axis=1)
        return best, tuple(lax.top_k(value_RxG - price_G[None], of_row))

    # Made of what differs between devices, as what is carried on from chunk to chunk is.
    nothing_Gx1 = jnp.zeros_like(price_G)[:, None] * price_G[:, None]
    lowest = jnp.tile(nothing_Gx1 - jnp.inf, (1, of_column)), jnp.tile(nothing_Gx1.astype(jnp.int32), (1, of_column))
    best, (top, column) = lax.scan(chunk, lowest, (jnp.arange(chunks), padded))
    top_FxC, column_FxC = (part.reshape(chunks * rows, of_row)[:features] for part in (top, column))
    return (top_FxC, column_FxC, *best) if both else (top_FxC, column_FxC)
