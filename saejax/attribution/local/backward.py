"""Carrying targets down through the frozen layers, and reading off what each source contributes: one program.

A target is a direction that is read: by a feature, from what the transcoder of its layer reads, or by a logit, from the
stream leaving the last layer. Its cotangent starts there and goes down through the transposed layers. Nothing of a
position after the target's reaches it, and nothing of the layers above; MLPs are not run, but for the norms before
them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from saejax.attribution.local.layers import FrozenModel
from saejax.attribution.local.sources import STEP, WIDTH, SourceBank
from saejax.models import decoder
from saejax.models.attention import whole_prompt_tables
from saejax.models.layers import einsum
from saejax.parallel.mesh import fitting_sharding

_TOGETHER = 32  # targets whose products with a block are one, at the least, as far as there are

Pull = Callable[[tuple[jax.Array, jax.Array]], Any]  # a transposed layer, as ``jax.vjp`` gives it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TargetBatch:
    """Targets that go down together, in N chunks of R; the chunks start from high layers to low."""

    vector_NxRxD: jax.Array  #: the directions that are read
    layer_NxR: jax.Array  #: int32 layer whose transcoder reads; for a direction of the stream, that of ``start_N``
    position_NxR: jax.Array  #: int32 where
    #: int32, number of layers that the highest target of a chunk goes down through; 0 for a chunk that only fills up
    #: the batch.
    start_N: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def contributions(
    frozen: FrozenModel,
    mesh: Mesh,
    params: decoder.Params,
    stream_LxTxD: jax.Array,
    skip_LxDxD: jax.Array | None,
    bank: SourceBank,
    first_X: jax.Array,
    stops: jax.Array,
    batch: TargetBatch,
) -> jax.Array:
    """Return the products of all blocks of sources with the cotangents of a batch of targets, fp32 [B, N, R, W].

    The constants of a layer, above all its attention weights, are computed once for all chunks. A chunk joins at the
    layer where its highest target reads.

    Args:
      frozen: the model (static).
      mesh: the devices (static).
      params: parameters of the model.
      stream_LxTxD: the stream entering each layer, at no more positions than the targets need.
      skip_LxDxD: skip paths of the transcoders; None: there are none.
      bank: the sources' vectors in blocks.
      first_X: index of the first block of each place.
      stops: index after the last block of each place at these positions.
      batch: the targets.
    """
    length = stream_LxTxD.shape[1]
    tables, chunks = whole_prompt_tables(frozen.config, length), jnp.arange(len(batch.start_N))

    def placed(chunk: jax.Array, layer: jax.Array) -> jax.Array:
        """Return the directions of a chunk's targets at a layer, at their positions, else 0; [R, T, D]."""
        at_RxT = jnp.arange(length)[None] == batch.position_NxR[chunk][:, None]
        here_RxT = at_RxT & (batch.layer_NxR[chunk] == layer)[:, None]
        return jnp.where(here_RxT[..., None], batch.vector_NxRxD[chunk][:, None], 0)

    def read_off(place: jax.Array, cotangent_NxRxTxD: jax.Array, read_BxNxRxW: jax.Array) -> jax.Array:
        blocks = first_X[place], stops[place]
        return _read_off(bank, *blocks, batch.start_N >= place, cotangent_NxRxTxD, read_BxNxRxW)

    def down(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Take all chunks down through one layer."""
        layer = batch.start_N[0] - 1 - index
        x_TxD = lax.dynamic_index_in_dim(stream_LxTxD, layer, keepdims=False)
        skip_DxD = None if skip_LxDxD is None else lax.dynamic_index_in_dim(skip_LxDxD, layer, keepdims=False)
        _, pull = jax.vjp(lambda x_TxD: frozen.layer(params, layer, tables, x_TxD, skip_DxD), x_TxD)
        turned, turned_back = _turned(pull, x_TxD.shape[-1])

        def pull_chunk(chunk: jax.Array, cotangent_NxRxTxD: jax.Array) -> jax.Array:
            # Without the barrier, XLA turns them back outside of the loop.
            chunk_turned, chunk = lax.optimization_barrier((turned, chunk))
            pull = turned_back(chunk_turned)
            in_RxTxD = jax.vmap(lambda *both: pull(both)[0])(cotangent_NxRxTxD[chunk], placed(chunk, layer))
            return lax.dynamic_update_index_in_dim(cotangent_NxRxTxD, in_RxTxD, chunk, 0)

        cotangent_NxRxTxD, read_BxNxRxW = carry
        read_BxNxRxW = read_off(layer + 1, cotangent_NxRxTxD, read_BxNxRxW)
        # Chunks are in the order in which they begin, so that these are the first ones.
        begun = jnp.sum(batch.start_N > layer)
        return lax.fori_loop(0, begun, pull_chunk, cotangent_NxRxTxD), read_BxNxRxW

    carry = _by_target(mesh, jax.vmap(placed)(chunks, batch.start_N), bank)
    cotangent_NxRxTxD, read_BxNxRxW = lax.fori_loop(0, batch.start_N[0], down, carry)
    return read_off(jnp.int32(0), cotangent_NxRxTxD, read_BxNxRxW)


def _read_off(
    bank: SourceBank,
    first: jax.Array,
    stop: jax.Array,
    begun_N: jax.Array,
    cotangent_NxRxTxD: jax.Array,
    read_BxNxRxW: jax.Array,
) -> jax.Array:
    """Fill in the products of a place's blocks with all cotangents there, 0 for chunks that start further down.

    Those that start further down are the last, so they are left out as far as whole groups of chunks do.
    """
    targets = cotangent_NxRxTxD.shape[1]
    # A power of two that divides the number of chunks: groups are then whole.
    together = math.gcd(len(begun_N), 1 << max(_TOGETHER // targets, 2).bit_length() - 1)
    groups = (jnp.sum(begun_N) + together - 1) // together

    def body(index: jax.Array, read_BxNxRxW: jax.Array) -> jax.Array:
        start = first + index * STEP
        position_C = lax.dynamic_slice_in_dim(bank.position_B, start, STEP)
        row_CxW = lax.dynamic_slice_in_dim(bank.row_BxW, start, STEP)
        table_CxWxD = bank.table_UxD[row_CxW]

        def group(number: jax.Array, read_BxNxRxW: jax.Array) -> jax.Array:
            chunk = number * together
            own_GxRxTxD = lax.dynamic_slice_in_dim(cotangent_NxRxTxD, chunk, together)
            begun_G = lax.dynamic_slice_in_dim(begun_N, chunk, together)
            # Blocks that only fill up a place are at a position out of range, and read 0.
            at_GxRxCxD = own_GxRxTxD.at[:, :, position_C].get(mode="fill", fill_value=0)
            at_GxRxCxD = jnp.where(begun_G[:, None, None, None], at_GxRxCxD, 0)
            products_CxGxRxW = einsum("grcd,cwd->cgrw", at_GxRxCxD, table_CxWxD)
            return lax.dynamic_update_slice(read_BxNxRxW, products_CxGxRxW, (start, chunk, 0, 0))

        if together == len(begun_N):  # a loop of one is not free
            return group(jnp.int32(0), read_BxNxRxW)
        return lax.fori_loop(0, groups, group, read_BxNxRxW)

    return lax.fori_loop(0, (stop - first + STEP - 1) // STEP, body, read_BxNxRxW)


def _turned(pull: Pull, width: int) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Pull]]:
    """Return the residuals of a layer's transpose, matrices between stream and heads transposed; and the inverse.

    Their transposed products then read them in order. Otherwise XLA:CPU turns them over for each chunk, which takes a
    seventh of the time of the products.
    """
    kept, tree = jax.tree.flatten(pull)
    ends = [
        (2, 0) if x.shape[2:] == (width,) else (0, 2) if x.ndim == 3 and x.shape[0] == width else (0, 0) for x in kept
    ]

    def back(turned: list[jax.Array]) -> Pull:
        return jax.tree.unflatten(tree, [jnp.moveaxis(x, new, old) for x, (old, new) in zip(turned, ends, strict=True)])

    return [jnp.moveaxis(x, old, new) for x, (old, new) in zip(kept, ends, strict=True)], back


def _by_target(mesh: Mesh, cotangent_NxRxTxD: jax.Array, bank: SourceBank) -> tuple[jax.Array, jax.Array]:
    """Return the cotangents and the products, 0 at first, each chunk's targets split over ``data``."""
    chunks, targets = cotangent_NxRxTxD.shape[:2]
    read_BxNxRxW = jnp.zeros((len(bank.position_B), chunks, targets, WIDTH), cotangent_NxRxTxD.dtype)
    arrays = cotangent_NxRxTxD, read_BxNxRxW
    specs = (None, "data", None, None), (None, None, "data", None)
    fits = tuple(fitting_sharding(mesh, array.shape, *spec) for array, spec in zip(arrays, specs, strict=True))
    return lax.with_sharding_constraint(arrays, fits)
