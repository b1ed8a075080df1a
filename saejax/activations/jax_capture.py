"""The JAX backend of capture: our decoder, on the mesh, up to the last site that is wanted."""

import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from saejax.activations.plan import Batch, CapturedValues, Take
from saejax.models.config import DecoderConfig
from saejax.models.language_model import SiteValues, forward
from saejax.models.loading import load_model
from saejax.models.parity import needs_check
from saejax.models.sites import AnySite, Site
from saejax.models.source import ModelSource
from saejax.models.weights import load_params
from saejax.parallel.mesh import BY_DOCUMENT, everywhere, sharding, spread_sharding

_BLOCK = 32  # numbers that are added one after the other
_Measured = tuple[jax.Array, jax.Array, jax.Array]  # vectors_BxTxD, norms_BxT, train_sum_BxD of a site


class DecoderReader:
    """A reader that runs a model up to the last of some sites and hands over the value at each.

    Batches are padded to few shapes, each of which is compiled once. While the host stores one batch, the devices run
    the next. They also round the values and compute their norms and sums. Nothing is computed, and no layer's
    parameters are read, after the last site.

    Args:
      source: the model's files.
      config: configuration of the whole model.
      sites: what to read, at least one.
      mesh: the devices; documents are split over ``member`` and ``data``, heads and MLP over ``model``.
      dtype: "float32" or "bfloat16", of parameters and products.
      hand_over: dtype of the values that are handed over.

    Attributes:
      config, mesh: as given.
      widths: width of the values at every site.
      params: parameters of ``parameters.parameter_table``, with only the layers that are needed.
    """

    def __init__(
        self, source: ModelSource, config: DecoderConfig, sites: Sequence[Site], mesh: Mesh, dtype: str, hand_over: str
    ):
        self.config, self._sites, self.mesh = config, tuple(sites), mesh
        # Each device has whole vectors of its own documents, which go to the host without being put together.
        measure = functools.partial(measure_sites, hand_over)
        self._measured = functools.cache(lambda where: jax.jit(measure, out_shardings=where))
        self.widths: dict[AnySite, int] = {site: site.width(config) for site in sites}
        if needs_check(source, dtype):
            load_model(source.name, source.revision or "main", dtype, mesh)  # which compares it with transformers
        self.params = load_params(source.folder, config, mesh, dtype, layers=1 + max(site.layer for site in sites))

    def read(self, batches: Iterable[Batch], take: Take) -> None:
        """See ``plan.Reader``."""
        running: tuple[Batch, Sequence[_Measured]] | None = None
        for batch in batches:
            started = batch, self._start(batch)
            self._give(running, take)
            running = started
        self._give(running, take)

    def pad_batch(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids [B, T] and lengths [B] of a batch in its shape, whose rows the mesh divides."""
        extra, longer = np.subtract(batch.shape, batch.ids_BxT.shape)
        ids_BxT = np.pad(batch.ids_BxT, ((0, extra), (0, longer)))
        return ids_BxT, np.pad(batch.stop_B, (0, extra), constant_values=1).astype(np.int32)

    def close(self) -> None:
        """Give back the devices' memory; the reader cannot be used afterwards."""
        self.params = {}

    def _start(self, batch: Batch) -> Sequence[_Measured]:
        """Send a batch to the devices, without waiting for it."""
        ids_BxT, lengths_B = (everywhere(self.mesh, array, BY_DOCUMENT) for array in self.pad_batch(batch))
        values = read_sites(self.mesh, self.config, self._sites, self.params, ids_BxT, lengths_B)
        # Documents that are held out, or only fill up the batch, count from a position that they do not have.
        first_B = np.full(len(lengths_B), ids_BxT.shape[1], np.int32)
        first_B[: len(batch.first_B)] = np.where(batch.train_B, batch.first_B, ids_BxT.shape[1])
        measure = self._measured(spread_sharding(self.mesh, len(lengths_B)))
        return measure(values, everywhere(self.mesh, first_B, BY_DOCUMENT), lengths_B)

    def _give(self, running: tuple[Batch, Sequence[_Measured]] | None, take: Take) -> None:
        """Wait for the values of a batch and hand them over."""
        if running is not None:
            batch, of_sites = running
            for site, (vectors, norms, sums) in zip(self._sites, of_sites, strict=True):
                take(batch, site, CapturedValues(_pieces(vectors), np.asarray(norms), np.asarray(sums)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def read_sites(
    mesh: Mesh,
    config: DecoderConfig,
    sites: tuple[Site, ...],
    params: dict[str, jax.Array],
    ids_BxT: jax.Array,
    lengths_B: jax.Array,
) -> SiteValues:
    """Run a model up to the last of some sites and return the value [B, T, D] at each.

    Devices along ``model`` compute the same values: each keeps those of its part of the rows where their number allows
    it, so that the values of many sites take an eighth of the memory on eight devices, whatever the mesh.

    Args:
      mesh: the devices (static).
      config: the decoder (static).
      sites: at least one (static).
      params: parameters of ``parameters.parameter_table``.
      ids_BxT: int32, padded on the right, rows split over ``member`` and ``data``.
      lengths_B: number of tokens of each row.
    """
    _, values = forward(config, sites, False, params, ids_BxT, lengths_B)
    rows = spread_sharding(mesh, len(lengths_B)).spec[0]
    return jax.tree.map(
        lambda value: lax.with_sharding_constraint(value, sharding(mesh, *[None] * (value.ndim - 3), rows)), values
    )


def measure_sites(dtype: str, values: Sequence[jax.Array], first_B: jax.Array, stop_B: jax.Array) -> list[_Measured]:
    """Round values as they are stored, and return their norms and sums.

    Args:
      dtype: "float32" or "bfloat16", as stored.
      values: [B, T, D] of each site.
      first_B: position of each row from which on it counts in the sum.
      stop_B: the position at which it ends.

    Returns:
      For each site the rounded values, their norms, float32 [B, T], and the sum over the positions of each row, float32
      [B, D]. Both are added up in blocks: their errors are below 1e-6 of the norm, and of the sum of magnitudes.
    """
    position_1xT = jnp.arange(values[0].shape[1])[None]
    counts_BxT = (position_1xT >= first_B[:, None]) & (position_1xT < stop_B[:, None])
    measured = []
    for value_BxTxD in values:
        stored_BxTxD = value_BxTxD.astype(dtype)
        wide_BxTxD = stored_BxTxD.astype(jnp.float32)
        # Relative to the largest: squares of finite values would overflow.
        largest_BxT = jnp.max(jnp.abs(wide_BxTxD), axis=-1)
        scale_BxT = jnp.where(largest_BxT > 0, largest_BxT, 1)
        squares_BxT = _sum_in_blocks(jnp.square(wide_BxTxD / scale_BxT[..., None]), 2)
        sums_BxD = _sum_in_blocks(jnp.where(counts_BxT[..., None], wide_BxTxD, 0), 1)
        measured.append((stored_BxTxD, scale_BxT * jnp.sqrt(squares_BxT), sums_BxD))
    return measured


def _sum_in_blocks(x: jax.Array, axis: int) -> jax.Array:
    """Sum over an axis, blocks first: a CPU adds one number after the other, whose errors would add up."""
    size = x.shape[axis]
    padded = jnp.pad(x, [(0, -size % _BLOCK if i == axis else 0) for i in range(x.ndim)])
    blocks = padded.reshape(*x.shape[:axis], -1, _BLOCK, *x.shape[axis + 1 :])
    # The barrier keeps the compiler from making one sum of both.
    return lax.optimization_barrier(blocks.sum(axis + 1)).sum(axis)


def _pieces(vectors_BxTxD: jax.Array) -> list[np.ndarray]:
    """Return the host's copies of an array's parts, each of some rows, in order; a CPU's are no copies."""
    shards = [shard for shard in vectors_BxTxD.addressable_shards if shard.replica_id == 0]
    return [np.asarray(shard.data) for shard in sorted(shards, key=lambda shard: shard.index[0].start or 0)]
