"""The rows of the buffer in progress, on the devices: the model's pass writes them where training reads them.

Only token ids and row numbers go there, and only the rows' norms come back, once a buffer: 4 bytes for each site and
token, where values that pass through the host take 2 d (bfloat16) or 4 d of them twice. The documents of a batch are
split over all of ``member`` and ``data``, a buffer's rows over ``data``, its sites over ``member`` and its vectors over
``model``. All processes of a run work on the same batch together.
"""

import collections
import functools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from saejax.activations.batches import Parts, sites_of
from saejax.activations.jax_capture import DecoderReader
from saejax.activations.plan import Batch
from saejax.activations.store import DTYPES
from saejax.errors import UserError
from saejax.models.config import DecoderConfig
from saejax.models.language_model import forward
from saejax.models.sites import Site
from saejax.parallel.mesh import BY_DOCUMENT, everywhere, fitting_sharding, free_bytes, sharding

_BITS = dict(float32=jnp.float32, bfloat16=jnp.uint16)
_AHEAD = 2  # batches that are sent before the one that runs is waited for: a request to stop is heard between them


class DeviceBuffers:
    """The vectors of the buffer in progress, on the devices.

    Args:
      reader: the model, with its mesh.
      parts: the sites of every part of a batch, each of the reader's.
      rows: number of rows of the largest buffer.
      dtype: dtype of the values, "float32" or "bfloat16".

    Attributes:
      parts: for each part an array [sites, rows, d], rows filled up to a multiple of the ``data`` axis; bfloat16 as
        uint16, which a CPU scatters 20 times as fast.

    Raises:
      UserError: they do not fit on the devices.
    """

    def __init__(self, reader: DecoderReader, parts: Parts, rows: int, dtype: str):
        self._reader, self._sites, self._dtype = reader, sites_of(parts), DTYPES[dtype]
        shapes, norms = buffer_shapes(reader.config, reader.mesh, parts, rows, dtype)
        self._rows = norms.shape[1]
        # Before anything is allocated: an error here names a remedy, XLA's would not.
        part_bytes = (math.prod(part.sharding.shard_shape(part.shape)) * part.dtype.itemsize for part in shapes)
        check_room(reader.mesh, self._rows, sum(part_bytes))
        zeros = functools.partial(jax.tree.map, lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding))
        self.parts, self._norms_SxR = zeros((shapes, norms))
        self._places = {site: (i, part.index(site)) for i, part in enumerate(parts) for site in part}
        self._write = buffer_writer(reader.config, reader.mesh, parts, rows, dtype)
        whole = sharding(reader.mesh)
        self._take = jax.jit(lambda part_SxRxD, site, rows_N: part_SxRxD[site][rows_N], out_shardings=whole)

    def fill(self, batches: Iterable[Batch]) -> None:
        """Run the batches, in their order. If iterating over them raises, the buffer holds nothing of use."""
        sent: collections.deque[jax.Array] = collections.deque()
        for batch in batches:
            ids_BxT, lengths_B = self._reader.pad_batch(batch)
            rows_BxT = np.full(ids_BxT.shape, self._rows, np.int32)  # beyond the buffer: not written
            # strict=False: rows that only fill up the batch belong to no document and stay unwritten.
            for rows_T, first, stop, rows in zip(rows_BxT, batch.first_B, batch.stop_B, batch.rows_B, strict=False):
                rows_T[first:stop] = rows
            placed = [everywhere(self._reader.mesh, array, BY_DOCUMENT) for array in (ids_BxT, lengths_B)]
            arguments = (self._reader.params, self.parts, self._norms_SxR, *placed, rows_BxT)
            self.parts, self._norms_SxR, done = self._write(*arguments)
            # Waited for by a result of its own: the buffers are donated to the next batch and gone by then.
            sent.append(done)
            if len(sent) > _AHEAD:
                sent.popleft().block_until_ready()

    def norms(self) -> dict[str, np.ndarray]:
        """Return the norm of every row at every site, once all batches ran: float32, NaN or infinite if a value is."""
        return dict(zip(self._sites, np.asarray(self._norms_SxR), strict=True))

    def read(self, site: str, rows: np.ndarray) -> np.ndarray:
        """Return the vectors [n, d] of ``rows`` at a ``site``, on the host."""
        part, place = self._places[site]
        return np.asarray(self._take(self.parts[part], place, rows.astype(np.int32))).view(self._dtype)


def check_room(mesh: Mesh, rows: int, needed: int) -> None:
    """Raise a ``UserError`` unless a buffer of ``rows`` rows, of ``needed`` bytes on each device, fits on the mesh."""
    free = free_bytes(mesh)
    if needed > free:
        raise UserError(
            f"a buffer of {rows:,} tokens takes {needed / 1e9:.2f} GB on each device, of which {free / 1e9:.2f} GB are "
            "free: lower --train.buffer_rows, or use more devices on --mesh.data or --mesh.model"
        )


def buffer_shapes(
    config: DecoderConfig, mesh: Mesh, parts: Parts, rows: int, dtype: str
) -> tuple[tuple[jax.ShapeDtypeStruct, ...], jax.ShapeDtypeStruct]:
    """Return shapes and shardings of a buffer's parts, [sites, rows, d], and of its rows' norms, [sites, rows].

    As many rows as the largest buffer has, rounded up to a multiple of the ``data`` axis; values are "float32" or
    "bfloat16", the ``dtype``.
    """
    rows = -(-rows // mesh.shape["data"]) * mesh.shape["data"]
    shapes = [(len(part), rows, Site.parse(part[0]).width(config)) for part in parts]
    placements = [fitting_sharding(mesh, shape, "member", "data", "model") for shape in shapes]
    norms = jax.ShapeDtypeStruct((len(sites_of(parts)), rows), jnp.float32, sharding=sharding(mesh))
    parts_of_buffer = tuple(
        jax.ShapeDtypeStruct(shape, _BITS[dtype], sharding=placement)
        for shape, placement in zip(shapes, placements, strict=True)
    )
    return parts_of_buffer, norms


def buffer_writer(config: DecoderConfig, mesh: Mesh, parts: Parts, rows: int, dtype: str) -> Callable:
    """Return a batch's program: (params, parts, norms, ids_BxT, lengths_B, rows_BxT) -> parts, norms, done.

    ``rows_BxT`` says which row of the buffer every token becomes; rows beyond the last are not written. ``done`` is
    ready when the batch is written. For the arguments see ``buffer_shapes``.
    """
    shapes, norms = buffer_shapes(config, mesh, parts, rows, dtype)
    sites = sites_of(parts)
    where = [list(map(sites.index, part)) for part in parts]
    all_sites = tuple(map(Site.parse, sites))

    def write(
        params: dict[str, jax.Array],
        parts: tuple[jax.Array, ...],
        norms_SxR: jax.Array,
        ids_BxT: jax.Array,
        lengths_B: jax.Array,
        rows_BxT: jax.Array,
    ) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
        _, at_sites = forward(config, all_sites, False, params, ids_BxT, lengths_B)
        rows_N = rows_BxT.reshape(-1)
        values = [value.reshape(-1, value.shape[-1]).astype(dtype) for value in at_sites]
        # Norms of the rounded values, which are what training reads and what a store would record.
        norms_SxN = jnp.stack([jnp.linalg.norm(value.astype(jnp.float32), axis=-1) for value in values])
        written = []
        for part_SxRxD, sites_of_part in zip(parts, where, strict=True):
            for place, site in enumerate(sites_of_part):
                bits_NxD = lax.bitcast_convert_type(values[site], part_SxRxD.dtype)
                part_SxRxD = part_SxRxD.at[place, rows_N].set(bits_NxD, mode="drop")
            written.append(part_SxRxD)
        return tuple(written), norms_SxR.at[:, rows_N].set(norms_SxN, mode="drop"), jnp.sum(lengths_B)

    placements = jax.tree.map(lambda shape: shape.sharding, (shapes, norms, norms))
    # Donated: the buffers take most of the memory, and there is no room for a second copy.
    return jax.jit(write, donate_argnums=(1, 2), out_shardings=placements)
