"""Which features of two dictionaries are one: their rows compared pair by pair of dictionaries, on all devices.

One program looks at a block of pairs of dictionaries. Of each pair it multiplies all rows with all others, a few
hundred rows at a time, and keeps the largest of each row and, at first, of each column. The pairs of a block are split
over the devices, so that a device holds the rows of its own pairs alone. The assignment is an ``Auction`` on the host;
for the rows that wait there the program looks again, at the present prices, until none waits.

Rows of unit length give cosines, and activations that are centred and of unit length Pearson's correlations.
"""

import dataclasses
import functools
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

from saejax.parallel.mesh import AXES
from saejax.transfer.assignment import Auction

_ROWS = 512  # rows whose products are held at once
CANDIDATES = 64  # of a row, at a time
_VMAPPED = 4  # pairs of an accelerator that run side by side

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
      gap: by how much at most the mean product of the pairs falls short of the best; ``assignment.STEP`` at most.
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
    block = mesh.devices.size * side_by_side(jax.default_backend())
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
                solving[pool.submit(problem.auction.bid)] = problem
            done, _ = wait(solving, timeout=0 if ready else None, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                problem = solving.pop(future)
                if len(problem.auction.waiting):
                    ready.append(problem)
                else:
                    yield problem.key, problem.result()


def side_by_side(platform: str) -> int:
    """Pairs that a device looks at together, by the ``platform``."""
    return 1 if platform == "cpu" else _VMAPPED


class _Problem:
    """The assignment of one pair, in the making; the first dictionary is turned round to be the one of fewer rows."""

    def __init__(self, key: Any, first: np.ndarray, second: np.ndarray):
        self.key, self._turned = key, len(first) > len(second)
        self._few_FxD, self.many_GxD = (second, first) if self._turned else (first, second)
        self.auction = Auction(len(self._few_FxD), len(self.many_GxD))
        self._nearest: tuple[np.ndarray, np.ndarray, int] | None = None

    @property
    def fresh(self) -> bool:
        """Whether nothing is known yet."""
        return self._nearest is None

    @property
    def rows(self) -> int:
        """How many look next: four times those that wait, in one of few sizes, for which there are programs."""
        rows, wanted = len(self._few_FxD), 4 * len(self.auction.waiting)
        return min(rows, _ROWS * 2 ** max(0, math.ceil(math.log2(wanted / _ROWS))))

    @property
    def rows_NxD(self) -> np.ndarray:
        """Those that look next."""
        self._looking = self.auction.urgent(self.rows)
        return self._few_FxD[self._looking]

    @property
    def kind(self) -> tuple[bool | int, ...]:
        """What problems that run together have in common."""
        return (self.fresh, self.rows, *self._few_FxD.shape, len(self.many_GxD))

    def look(
        self,
        top_NxC: np.ndarray,
        column_NxC: np.ndarray,
        top_G: np.ndarray | None = None,
        row_G: np.ndarray | None = None,
    ) -> None:
        """Takes what ``_best_of_pair`` found."""
        if top_G is not None and row_G is not None:
            mutual = int((row_G[column_NxC[:, 0]] == np.arange(len(top_NxC))).sum())
            self._nearest = top_NxC[:, 0], top_G, mutual
        self.auction.look(self._looking, top_NxC, column_NxC)

    def result(self) -> Matched:
        """What was found, for the dictionaries as they were given."""
        assert self._nearest is not None
        few_F, many_G, mutual = self._nearest
        paired = np.flatnonzero(self.auction.column_F >= 0)
        column, own_F = self.auction.column_F[paired], np.zeros(len(few_F))
        own_F[paired] = np.einsum("fd,fd->f", self._few_FxD[paired], self.many_GxD[column], dtype=np.float64)
        gap = self.auction.gap(own_F)
        if not self._turned:
            partner_F, value_F = np.full(len(few_F), -1), np.full(len(few_F), np.nan)
            partner_F[paired], value_F[paired] = column, own_F[paired]
            return Matched(few_F, many_G, mutual, partner_F, value_F, gap)
        partner_G, value_G = np.full(len(many_G), -1), np.full(len(many_G), np.nan)
        partner_G[column], value_G[column] = paired, own_F[paired]
        return Matched(many_G, few_F, mutual, partner_G, value_G, gap)


def _look(problems: Sequence[_Problem], block: int, mesh: Mesh) -> Sequence[_Problem]:
    """Runs the program on some problems of a kind, which take what it found; the last one fills the block up."""
    if not problems:
        return []
    filled = [*problems, *[problems[-1]] * (block - len(problems))]
    parts = [np.stack(part) for part in zip(*((one.rows_NxD, one.many_GxD, one.auction.price_G) for one in filled))]
    placed = jax.device_put(parts, NamedSharding(mesh, PartitionSpec(AXES)))
    vmapped = side_by_side(jax.default_backend())
    found = jax.device_get(best_rows(mesh, vmapped, CANDIDATES, problems[0].fresh, *placed))
    for number, problem in enumerate(problems):
        problem.look(*(values[number] for values in found))
    return problems


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
    """``_best_of_pair`` of every pair of a block, each on the device that holds it.

    Args:
      vmapped: pairs that a device looks at together.
      count, both: as for ``_best_of_pair``.
      first_PxNxD, second_PxGxD, price_PxG: rows of the first and of the second dictionaries, and prices of the latter.
    """

    def here(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return lax.map(lambda pair: _best_of_pair(count, both, *pair), arrays, batch_size=vmapped)

    own = PartitionSpec(AXES)
    split = jax.shard_map(here, mesh=mesh, in_specs=own, out_specs=own)
    return split(first_PxNxD, second_PxGxD, price_PxG)


def _best_of_pair(
    count: int, both: bool, first_NxD: jax.Array, second_GxD: jax.Array, price_G: jax.Array
) -> tuple[jax.Array, ...]:
    """The ``count`` largest products less price of each row [N, C], and their columns.

    If ``both``, then also the largest product of each column [G], without price, and its row.
    """
    features, rows = len(first_NxD), min(_ROWS, len(first_NxD))
    chunks = -(-features // rows)
    padded = jnp.pad(first_NxD, ((0, chunks * rows - features), (0, 0))).reshape(chunks, rows, -1)
    of_row = min(count, len(second_GxD))

    def chunk(best: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array]) -> tuple:
        number, rows_RxD = part
        value_RxG = jnp.matmul(rows_RxD, second_GxD.T, precision="highest")
        if both:
            real_R = number * rows + jnp.arange(rows) < features
            known_RxG = jnp.where(real_R[:, None], value_RxG, -jnp.inf)
            top_G, row_G = best
            larger_G = known_RxG.max(axis=0) > top_G
            best = (
                jnp.where(larger_G, known_RxG.max(axis=0), top_G),
                jnp.where(larger_G, known_RxG.argmax(axis=0) + number * rows, row_G),
            )
        return best, tuple(lax.top_k(value_RxG - price_G[None], of_row))

    # Made of what differs between devices, as what is carried on from chunk to chunk is.
    nothing_G = jnp.zeros_like(price_G) * price_G
    lowest = nothing_G - jnp.inf, nothing_G.astype(jnp.int32)
    best, (top, column) = lax.scan(chunk, lowest, (jnp.arange(chunks), padded))
    top_NxC, column_NxC = (part.reshape(chunks * rows, of_row)[:features] for part in (top, column))
    return (top_NxC, column_NxC, *best) if both else (top_NxC, column_NxC)
