"""Activations on the devices: what they take there, and how they get there."""

import functools
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np

from saejax.activations.batches import Parts
from saejax.parallel.mesh import part_size
from saejax.training.step import Trainer


class Rows(Protocol):
    """What rows on the devices are read from: a ``Store``, or a ``ModelStream``."""

    @property
    def dtype(self) -> np.dtype:
        """Of the values."""
        ...

    def d(self, site: str) -> int:
        """Width of a site."""
        ...

    def read(self, site: str, rows: np.ndarray) -> np.ndarray:
        """The vectors [n, d] of rows at a site."""
        ...


def resident_bytes(trainer: Trainer, store: Rows, parts: Parts, rows: int) -> int:
    """Bytes of activations that each device would hold of this number of rows."""
    shapes = [_shape(trainer, store, part, rows) for part in parts]
    spec = trainer.batch_sharding.spec
    return sum(part_size(trainer.mesh.shape, shape, *spec) for shape in shapes) * store.dtype.itemsize


def _shape(trainer: Trainer, store: Rows, part: Sequence[str], rows: int) -> tuple[int, int, int]:
    """Sites, rows filled up to a multiple of the ``data`` axis, width."""
    devices = trainer.mesh.shape["data"]
    return len(part), -(-rows // devices) * devices, store.d(part[0])


def placed(trainer: Trainer, store: Rows, part: Sequence[str], rows_R: np.ndarray, size: int = 0) -> jax.Array:
    """Rows of a part's sites on the devices, [sites, rows, d], in the store's dtype, split over the ``data`` axis.

    Every process reads what its own devices hold. Zeros fill up to ``size`` rows, and to a multiple of the axis.
    """
    shape = _shape(trainer, store, part, max(size, len(rows_R)))

    @functools.lru_cache(maxsize=1)  # devices that differ in the ``model`` axis alone hold the same
    def read(first_site: int, last_site: int, first_row: int, last_row: int) -> np.ndarray:
        rows = rows_R[first_row:last_row]
        values = np.zeros((last_site - first_site, last_row - first_row, shape[2]), store.dtype)
        for place, site in enumerate(part[first_site:last_site]):
            values[place, : len(rows)] = store.read(site, rows)
        return values

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        sites, rows = (axis.indices(size)[:2] for axis, size in zip(index[:2], shape[:2], strict=True))
        return read(*sites, *rows)

    return jax.make_array_from_callback(shape, trainer.batch_sharding, shard)
