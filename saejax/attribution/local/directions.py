"""The directions of a prompt's sources, in one table on the devices, each of which holds a part of its width.

Those of features come out of their transcoders some at a time and go straight to their place, so the host never has
more of them than that, and each row of a large set is there once.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

from saejax.attribution.local.transcoders import LayerTranscoders
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
