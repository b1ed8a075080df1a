"""The compiled programs of an evaluation on the language model, split at a dictionary's target.

head                 token ids -> the stream entering the suffix, values of site and target            once per batch
constant, stand_in   the site's value -> another value of the target                                   once per variant
tail                 a value of the target -> the stream leaving the last layer                        once per variant
compare              those streams -> cross-entropies and KL divergences                               once per batch
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from saejax.evaluation.member_data import MemberData
from saejax.models import decoder
from saejax.models.config import DecoderConfig
from saejax.models.sinks import position_norms
from saejax.models.split import SplitPoint
from saejax.parallel.mesh import BY_DOCUMENT, Axis, mesh_of, sharding, spread_sharding

_LOGITS_AT_ONCE = 512  # tokens whose logits are held at a time


def _spread(mesh: Mesh | AbstractMesh, *values: jax.Array, axis: int = 0) -> list[jax.Array]:
    """Split the rows of values that all devices along ``model`` computed over these, too: see ``spread_sharding``."""
    return _place(mesh, values, axis, spread_sharding(mesh, values[0].shape[axis]).spec[0])


def _by_document(mesh: Mesh | AbstractMesh, *values: jax.Array, axis: int = 0) -> list[jax.Array]:
    """Put rows together that ``_spread`` split: layers have all rows of the device's own documents."""
    return _place(mesh, values, axis, BY_DOCUMENT)


def _place(mesh: Mesh | AbstractMesh, values: Sequence[jax.Array], axis: int, along: Axis) -> list[jax.Array]:
    """Split an axis of values along axes of the mesh; where ``model`` is one device they stay as they are."""
    if mesh.shape.get("model", 1) == 1:
        return [*values]
    where = sharding(mesh, *[None] * axis, along)
    return [lax.with_sharding_constraint(value, where) for value in values]


@functools.partial(jax.jit, static_argnums=0)
def head(
    point: SplitPoint, params: decoder.Params, ids_BxT: jax.Array, site_limit: jax.Array, target_limit: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Run the prefix of the model (``SplitPoint.run_prefix``), and find attention sinks.

    Args:
      point: where the model is split.
      params: parameters of the decoder.
      ids_BxT: prompts, padded on the right.
      site_limit: norm above which a position is an attention sink at the site.
      target_limit: the same at the target.

    Returns:
      The stream entering the suffix, the value that the dictionary reads, the target's value, each [B, T, D], and bool
      [B, T]: where neither value is a sink.
    """
    stream_BxTxX, y_BxTxO, x_BxTxD = point.run_prefix(params, ids_BxT)
    inside_BxT = (position_norms(x_BxTxD) <= site_limit) & (position_norms(y_BxTxO) <= target_limit)
    stream_BxTxX, x_BxTxD, y_BxTxO, inside_BxT = _spread(point.mesh, stream_BxTxX, x_BxTxD, y_BxTxO, inside_BxT)
    return stream_BxTxX, x_BxTxD, y_BxTxO, inside_BxT


@jax.jit
def constant(y_BxTxO: jax.Array, inside_BxT: jax.Array, value_O: jax.Array) -> jax.Array:
    """Return ``value_O`` in place of y, the target's value, ``inside``: not at sinks."""
    return jnp.where(inside_BxT[..., None], value_O[None, None].astype(y_BxTxO.dtype), y_BxTxO)


@jax.jit
def stand_in(member: MemberData, x_BxTxD: jax.Array, y_BxTxO: jax.Array, inside_BxT: jax.Array) -> jax.Array:
    """Return the output for x, the site's value, in place of y, the target's value, ``inside``: not at sinks."""
    y_hat_BxTxO = member.decode(member.encode(x_BxTxD), x_BxTxD)
    return jnp.where(inside_BxT[..., None], y_hat_BxTxO.astype(y_BxTxO.dtype), y_BxTxO)


@functools.partial(jax.jit, static_argnums=0)
def tail(point: SplitPoint, params: decoder.Params, stream_BxTxX: jax.Array, value_BxTxO: jax.Array) -> jax.Array:
    """Return the stream [B, T, D] leaving the last layer, given another value of the target."""
    whole = _by_document(point.mesh, stream_BxTxX, value_BxTxO)
    return _spread(point.mesh, point.run_suffix(params, *whole))[0]


@functools.partial(jax.jit, static_argnums=0)
def compare(
    config: DecoderConfig,
    params: decoder.Params,
    stream_ExBxTxD: jax.Array,
    ids_BxT: jax.Array,
    lengths_B: jax.Array,
    counted_BxT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return cross-entropy and KL divergence of E variants, the first of which is the clean model.

    The logits of a few positions are made at a time: those of whole documents under all variants would take
    gigabytes.

    Args:
      config: configuration of the decoder.
      params: parameters of the decoder.
      stream_ExBxTxD: the streams leaving the last layer.
      ids_BxT: the tokens.
      lengths_B: number of real tokens of each text.
      counted_BxT: bool, the positions whose predictions count; None: all.

    Returns:
      Next-token cross-entropy and KL(clean || variant), nats, each summed over the predicted tokens of a chunk of
      positions: [C, E, B].
    """
    rows, length = ids_BxT.shape
    mesh = mesh_of(ids_BxT)
    # A divisor of the length, so that all chunks have one shape and none needs padding.
    most = min(length, max(1, _LOGITS_AT_ONCE // rows))
    size = max(divisor for divisor in range(1, most + 1) if length % divisor == 0)
    next_BxT = jnp.pad(ids_BxT[:, 1:], ((0, 0), (0, 1)))
    # A text's last token predicts nothing, nor does padding.
    predicts_BxT = jnp.arange(length)[None] < lengths_B[:, None] - 1
    if counted_BxT is not None:
        predicts_BxT &= counted_BxT

    # A gradient keeps no logits of a chunk, but makes them again.
    @jax.checkpoint
    def chunk(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        def cut(values: jax.Array, axis: int) -> jax.Array:
            return lax.dynamic_slice_in_dim(values, start, size, axis)

        next_BxC, predicts_BxC = cut(next_BxT, 1), cut(predicts_BxT, 1)
        # Devices along ``model`` put rows together that each has parts of, chunk by chunk: not all before the loop.
        parts = _spread(mesh, cut(stream_ExBxTxD, 2), axis=1)
        (part_ExBxCxD,) = _by_document(mesh, *parts, axis=1)
        clean_BxCxV = decoder.unembed(config, params, part_ExBxCxD[0])
        normaliser_BxC = jax.nn.logsumexp(clean_BxCxV, axis=-1)
        p_BxCxV = jnp.exp(clean_BxCxV - normaliser_BxC[..., None])

        def sums(edited_BxCxV: jax.Array) -> tuple[jax.Array, jax.Array]:
            own_BxC = jax.nn.logsumexp(edited_BxCxV, axis=-1)
            ce_BxC = own_BxC - jnp.take_along_axis(edited_BxCxV, next_BxC[..., None], -1)[..., 0]
            # sum of p (log p - log q), with the two normalisers taken out of the sum, as p sums to 1.
            kl_BxC = jnp.sum(p_BxCxV * (clean_BxCxV - edited_BxCxV), -1) - (normaliser_BxC - own_BxC)
            ce_B, kl_B = (jnp.sum(jnp.where(predicts_BxC, part_BxC, 0.0), -1) for part_BxC in (ce_BxC, kl_BxC))
            return ce_B, kl_B

        # One variant at a time: the logits of all of them at once would be E times as large.
        edited = lax.map(lambda part_BxCxD: sums(decoder.unembed(config, params, part_BxCxD)), part_ExBxCxD[1:])
        first = (values_B[None] for values_B in sums(clean_BxCxV))
        ce_ExB, kl_ExB = (jnp.concatenate(pair) for pair in zip(first, edited, strict=True))
        return ce_ExB, kl_ExB

    return lax.map(chunk, jnp.arange(0, length, size))
