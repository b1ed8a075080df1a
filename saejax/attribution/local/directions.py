"""Directions that features write to, of which only the rows in use are read.

``fill_table`` puts the directions of a prompt's sources into one table on the devices, each of which holds a part of
its width. Those of features come out of their transcoders some at a time and go straight to their place, so the host
never has more of them than that, and each row of a large set is there once. ``FeatureOutputs`` sums what features write
to the outputs of MLPs.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from scipy.sparse import csr_array

from saejax.attribution.local.dictionaries import LayerDictionaries
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import fitting_sharding

CHUNK = 512  # rows that go to the devices together
READ_AT_ONCE = 1 << 26  # numbers that are read of a transcoder at once


def read_directions(transcoders: LayerTranscoders, features: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Return what features write: for each one after the other the rows of all layers that it writes to, fp32 [X, D].

    Args:
      transcoders: the set.
      features: of each layer those that are asked for.
    """
    for layer, features_U in enumerate(features):
        each = transcoders.written_layers(layer) * transcoders.configs[0].d_in
        size = max(READ_AT_ONCE // each, 1)
        for start in range(0, len(features_U), size):
            writes_UxXxD = transcoders.writes(layer, features_U[start : start + size])
            yield writes_UxXxD.reshape(-1, writes_UxXxD.shape[2])


def fill_table(mesh: Mesh, first: list[jax.Array], parts: Iterator[np.ndarray], rows: int) -> jax.Array:
    """Return a table of rows that are on the devices already and then rows that come in parts, padded with zeros.

    Args:
      mesh: the devices, over whose axis ``model`` the table's width is split.
      first: arrays with the first rows, each [U, D].
      parts: arrays with the next rows, fp32 [X, D].
      rows: number of rows reserved for ``parts``, ``CHUNK`` more than they have at the least.

    Returns:
      fp32 [U, D].
    """
    start, width = sum(map(len, first)), first[0].shape[1]
    where = fitting_sharding(mesh, (start + rows, width), None, "model")
    by_width = fitting_sharding(mesh, (CHUNK, width), None, "model")
    table_UxD = _begun(where, rows, first)
    for part_XxD in parts:
        for begin in range(0, len(part_XxD), CHUNK):
            # Whole chunks, so that one program writes them all: the next one overwrites what fills this one up.
            chunk_CxD = np.zeros((CHUNK, width), np.float32)
            chunk_CxD[: len(part_XxD) - begin] = part_XxD[begin : begin + CHUNK]
            # ``jax.device_put`` would ask all processes each time whether they have the same.
            placed_CxD = jax.make_array_from_callback(chunk_CxD.shape, by_width, chunk_CxD.__getitem__)
            table_UxD = _written(where, table_UxD, placed_CxD, np.int32(start + begin))
        start += len(part_XxD)
    return table_UxD


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begun(where: NamedSharding, rows: int, first: list[jax.Array]) -> jax.Array:
    """Return the table with its first rows, and so many empty ones."""
    return lax.with_sharding_constraint(jnp.pad(jnp.concatenate(first), ((0, rows), (0, 0))), where)


# Donated: the table is the largest array here, and is written in place.
@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _written(where: NamedSharding, table_UxD: jax.Array, chunk_CxD: jax.Array, start: jax.Array) -> jax.Array:
    """Return the table with some rows in their place."""
    table_UxD = lax.dynamic_update_slice_in_dim(table_UxD, chunk_CxD, start, 0)
    return lax.with_sharding_constraint(table_UxD, where)


class FeatureOutputs:
    """The outputs of features to their own layer and, in cross-layer transcoders, to later ones.

    Sums are made as runs go up through the layers: ``add`` a layer's features, then ``pop`` its sum.

    Args:
      dictionaries: the set.
      shape: of the runs' positions, such as (R, T).
    """

    def __init__(self, dictionaries: LayerDictionaries, *shape: int):
        self._dictionaries, self._shape = dictionaries, shape
        self._sums: dict[int, np.ndarray] = {}

    def add(self, layer: int, places: np.ndarray, features: np.ndarray, values: np.ndarray | jax.Array) -> None:
        """Add what features of a layer write.

        Args:
          layer: of the features.
          places: flat indices into ``shape``, where the features are active.
          features: indices of the features, in the same shape.
          values: their activations, in the same shape.
        """
        if not places.size:
            return
        written, width = self._dictionaries.written_layers(layer), self._dictionaries.configs[0].d_in
        # A decoder row is read once, however many positions its feature is active at.
        features_U, index_E = np.unique(features.reshape(-1), return_inverse=True)
        entries = to_host(values).reshape(-1).astype(np.float32), (places.reshape(-1), index_E.reshape(-1))
        # By columns, as features are cut into parts below.
        acts_NxU = csr_array(entries, (int(np.prod(self._shape)), len(features_U))).tocsc()
        size = max(READ_AT_ONCE // (written * width), 1)
        for start in range(0, len(features_U), size):
            chunk = slice(start, start + size)
            writes_UxX = self._dictionaries.writes(layer, features_U[chunk]).reshape(-1, written * width)
            sum_NxLxD = (acts_NxU[:, chunk] @ writes_UxX).reshape(-1, written, width)
            for above, sum_NxD in enumerate(np.moveaxis(sum_NxLxD, 1, 0)):
                self._sums[layer + above] = self._sums.get(layer + above, np.float32(0)) + sum_NxD

    def pop(self, layer: int) -> np.ndarray:
        """Return what was written to a layer, fp32 [..., D], and forget it."""
        shape = *self._shape, self._dictionaries.configs[0].d_in
        return self._sums.pop(layer).reshape(shape) if layer in self._sums else np.zeros(shape, np.float32)
