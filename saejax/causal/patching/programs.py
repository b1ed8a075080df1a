"""The programs of activation patching: a run that is recorded, and rows that run from a patched value on."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from saejax.models import decoder
from saejax.models.decoder import KEYS, VALUES, run_layers
from saejax.models.split import PrefixKV, SharedPrefixBatch, SplitPoint
from saejax.parallel.mesh import fitting_sharding, sharding


class Recorded(NamedTuple):
    """A run without a patch.

    Attributes:
      stream_KxBxTxD: what enters each of the L layers, and what leaves the last one; K = L + 1.
      value_LxBxTxD: the site's values; None where the site is one of those streams.
      past: keys and values of all layers.
      diff_B: the logit difference.
    """

    stream_KxBxTxD: jax.Array
    value_LxBxTxD: jax.Array | None
    past: PrefixKV
    diff_B: jax.Array

    @property
    def patches(self) -> jax.Array:
        """The values that a patch takes, by its *entry*: the layer in which it acts, or L for the stream at the end."""
        return self.stream_KxBxTxD if self.value_LxBxTxD is None else self.value_LxBxTxD


@functools.partial(jax.jit, static_argnums=0)
def record(
    point: SplitPoint, params: decoder.Params, ids_BxT: jax.Array, last_B: jax.Array, answers_Bx2: jax.Array
) -> Recorded:
    """The program of a run without a patch of prompts as ``Pairs`` has them; of the site, the kind counts."""
    x_BxTxD = decoder.embed(point.config, params, ids_BxT)
    collect = {"resid_pre", point.site.kind, KEYS, VALUES}
    x_BxTxD, seen, _ = run_layers(point.config, params, x_BxTxD, 0, point.config.n_layers, collect=collect)
    stream_KxBxTxD = jnp.concatenate([seen["resid_pre"], x_BxTxD[None]])
    value_LxBxTxD = None if point.in_stream else seen[point.site.kind]
    past = PrefixKV(seen[KEYS], seen[VALUES])
    run = Recorded(stream_KxBxTxD, value_LxBxTxD, past, point.logit_difference(params, x_BxTxD, last_B, answers_Bx2))
    return jax.lax.with_sharding_constraint(run, sharding(point.mesh))  # patched rows pick theirs from all of these


@functools.partial(jax.jit, static_argnums=0)
def differing(point: SplitPoint, first_ExBxTxD: jax.Array, second_ExBxTxD: jax.Array) -> jax.Array:
    """Where the values of the first and the second run are not the same, to the last bit, bool [E, B, T]."""
    return jax.lax.with_sharding_constraint((first_ExBxTxD != second_ExBxTxD).any(axis=-1), sharding(point.mesh))


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_rows(
    point: SplitPoint,
    length: int,
    params: decoder.Params,
    base: Recorded,
    patch_ExBxTxD: jax.Array,
    start: jax.Array,
    entry_R: jax.Array,
    place_R: jax.Array,
    position_R: jax.Array,
    first_R: jax.Array,
    last_R: jax.Array,
    answers_Rx2: jax.Array,
) -> jax.Array:
    """The rows' logit differences [R], from ``length`` tokens of each, those from position ``first_R`` on.

    Args:
      patch_ExBxTxD: the source run's ``patches``.
      start: int32 [], the lowest of the rows' entries.
      entry_R, place_R, position_R: which of them, of which prompt and at which position each row takes.
      first_R, last_R: the first position that is run, and that of the prompt's last token.
      answers_Rx2: token ids of the correct and the wrong answer.
    """
    token_RxC = first_R[:, None] + jnp.arange(length)[None, :]
    stream_BxTxD = jax.lax.dynamic_index_in_dim(base.stream_KxBxTxD, start, keepdims=False)
    by_rows = fitting_sharding(point.mesh, (*token_RxC.shape, stream_BxTxD.shape[-1]), "data", None, None)
    x_RxCxD = jax.lax.with_sharding_constraint(stream_BxTxD[place_R[:, None], token_RxC], by_rows)
    patch_Rx1xD = patch_ExBxTxD[entry_R, place_R, position_R][:, None, :]
    here_RxCx1 = (token_RxC == position_R[:, None])[:, :, None]

    def put(layer: jax.Array | int, value: jax.Array) -> jax.Array:
        value_RxCxD = value.reshape(x_RxCxD.shape)
        put_RxCxD = jnp.where(here_RxCx1 & (entry_R == layer)[:, None, None], patch_Rx1xD, value_RxCxD)
        return put_RxCxD.reshape(value.shape)

    def hook(kind: str, layer: jax.Array | int, value: jax.Array) -> jax.Array:
        return put(layer, value) if kind == ("resid_pre" if point.in_stream else point.site.kind) else value

    data = point.mesh.shape["data"]
    shards = 1 if len(place_R) % data else data
    tree = SharedPrefixBatch.unshared(place_R, first_R, length, shards)
    x_SxNxD = x_RxCxD.reshape(shards, -1, x_RxCxD.shape[-1])
    attention = tree.attention(point.config, base.past, 0)
    layers = point.config.n_layers
    x_SxNxD = run_layers(point.config, params, x_SxNxD, start, layers, hook, None, attention=attention).x
    patched_RxCxD = put(layers, x_SxNxD).reshape(x_RxCxD.shape)
    return jax.lax.with_sharding_constraint(
        point.logit_difference(params, patched_RxCxD, last_R - first_R, answers_Rx2), sharding(point.mesh)
    )
