"""Carrying targets down through the frozen layers, and reading off what each source contributes: one program.

A target is a direction that is read: by a feature, from what the transcoder of its layer reads, or by a logit, from the
stream leaving the last layer. Its cotangent starts there and goes down through the transposed layers. Nothing of a
position after the target's reaches it, and nothing of the layers above; MLPs are not run, but for the norms before
them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from saejax.attribution.frozen import FrozenModel
from saejax.attribution.sources import STEP, WIDTH, Bank
from saejax.models import decoder
from saejax.models.attention import full_reaches
from saejax.models.layers import einsum
from saejax.parallel import fitting_sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """R targets that go down together.

    Attributes:
      vector_RxD: the directions that are read.
      layer_R: int32 layer whose transcoder reads; for a direction of the stream, ``start``.
      position_R: int32 where.
      start: int32, number of layers that the highest target goes down through.
    """

    vector_RxD: jax.Array
    layer_R: jax.Array
    position_R: jax.Array
    start: jax.Array | np.int32


@functools.partial(jax.jit, static_argnums=(0, 1))
def contributions(
    frozen: FrozenModel,
    mesh: Mesh,
    params: decoder.Params,
    stream_LxTxD: jax.Array,
    skip_LxDxD: jax.Array | None,
    bank: Bank,
    first_X: jax.Array,
    stop_X: jax.Array,
    batch: Batch,
) -> jax.Array:
    """The products of all blocks of sources with the cotangents of a batch of targets, fp32 [B, R, W].

    Args:
      frozen, mesh: static.
      stream_LxTxD: the stream entering each layer, at no more positions than the targets need.
      first_X, stop_X: the blocks of each place that are at these positions.
    """
    length = stream_LxTxD.shape[1]
    reaches = full_reaches(frozen.config, length)
    at_RxT = jnp.arange(length)[None] == batch.position_R[:, None]

    def placed(where_R: jax.Array) -> jax.Array:
        """The targets' directions at their positions, for the targets of a mask; else 0."""
        return jnp.where((at_RxT & where_R[:, None])[..., None], batch.vector_RxD[:, None], 0)

    def read_off(place: jax.Array, cotangent_RxTxD: jax.Array, read_BxRxW: jax.Array) -> jax.Array:
        def body(index: jax.Array, read_BxRxW: jax.Array) -> jax.Array:
            start = first_X[place] + index * STEP
            position_C = lax.dynamic_slice_in_dim(bank.position_B, start, STEP)
            row_CxW = lax.dynamic_slice_in_dim(bank.row_BxW, start, STEP)
            at_RxCxD = cotangent_RxTxD.at[:, position_C].get(mode="fill", fill_value=0)
            products_CxRxW = einsum("rcd,cwd->crw", at_RxCxD, bank.table_UxD[row_CxW])
            return lax.dynamic_update_slice_in_dim(read_BxRxW, products_CxRxW, start, axis=0)

        return lax.fori_loop(0, (stop_X[place] - first_X[place] + STEP - 1) // STEP, body, read_BxRxW)

    def down(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        layer = batch.start - 1 - index
        cotangent_RxTxD, read_BxRxW = carry
        read_BxRxW = read_off(layer + 1, cotangent_RxTxD, read_BxRxW)
        x_TxD = lax.dynamic_index_in_dim(stream_LxTxD, layer, keepdims=False)
        skip_DxD = None if skip_LxDxD is None else lax.dynamic_index_in_dim(skip_LxDxD, layer, keepdims=False)
        _, pull = jax.vjp(lambda x_TxD: frozen.layer(params, layer, reaches, x_TxD, skip_DxD), x_TxD)
        starting_RxTxD = placed(batch.layer_R == layer)
        one = lambda out_TxD, read_TxD: pull((out_TxD, read_TxD))[0]  # noqa: E731
        return jax.vmap(one)(cotangent_RxTxD, starting_RxTxD), read_BxRxW

    cotangent_RxTxD = placed(batch.layer_R == batch.start)
    read_BxRxW = jnp.zeros((len(bank.position_B), len(batch.layer_R), WIDTH), cotangent_RxTxD.dtype)
    carry = lax.with_sharding_constraint(
        (cotangent_RxTxD, read_BxRxW),
        (
            fitting_sharding(mesh, cotangent_RxTxD.shape, "data", None, None),
            fitting_sharding(mesh, read_BxRxW.shape, None, "data", None),
        ),
    )
    cotangent_RxTxD, read_BxRxW = lax.fori_loop(0, batch.start, down, carry)
    return read_off(jnp.int32(0), cotangent_RxTxD, read_BxRxW)
