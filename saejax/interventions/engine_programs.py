"""The jitted programs of the engine: where an edit first changes a prompt, by how much, and the rows run on.

Letters: B prompts with padding, P prompts, K gathered features, S shards, R rows of a shard, N tokens of a shard.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from saejax.dictionaries import Dictionary
from saejax.dictionaries.matmul import matmul
from saejax.interventions.edits import ActivationReplacement
from saejax.interventions.split_model import active_features, of_features
from saejax.models import decoder
from saejax.models.split import PrefixKV, SharedPrefixBatch, SplitPoint
from saejax.parallel.mesh import fitting_sharding, sharding


class CleanValues(NamedTuple):
    """The parts of which rows' edited values are built: clean values, and the changes of K features.

    ``editable_BxT`` is None where no edit adds anything; ``logp_BxV`` where no readout needs it.
    """

    stream_BxTxD: jax.Array
    value_BxTxD: jax.Array
    fall_BxTxK: jax.Array
    W_dec_KxD: jax.Array
    past: PrefixKV
    logp_BxV: jax.Array | None
    editable_BxT: jax.Array | None


@functools.partial(jax.jit, static_argnums=0)
def first_change(
    point: SplitPoint, dictionary: Dictionary, source: ActivationReplacement, arrays: Sequence[jax.Array]
) -> jax.Array:
    """Return the first position at which ablating each feature changes anything, int32 [B, F]; T where there is none.

    Args:
      point: where the model is split.
      dictionary: the dictionary of the features.
      source: what replaces ablated activations.
      arrays: what is read [B, T, D] and domains [B, T] of the prompts and, for ``counterpart``, of their counterparts.
    """
    length = arrays[1].shape[1]
    position_T = jnp.arange(length, dtype=jnp.int32)

    def first(f_PxTxF: jax.Array, domain_PxT: jax.Array, *others: jax.Array) -> jax.Array:
        other_PxTxF = active_features(dictionary, *others) if others else f_PxTxF
        changes_PxTxF = source.changes(f_PxTxF, other_PxTxF, domain_PxT)
        return jnp.min(jnp.where(changes_PxTxF, position_T[None, :, None], jnp.int32(length)), axis=1)

    first_BxF = of_features(dictionary, [*arrays[:2], *arrays[1:]], first)
    return jax.lax.with_sharding_constraint(first_BxF, sharding(point.mesh))


@functools.partial(jax.jit, static_argnums=0)
def gather(
    point: SplitPoint,
    dictionary: Dictionary,
    source: ActivationReplacement,
    arrays: Sequence[jax.Array],
    features_K: jax.Array,
    prompts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return by how much the features' activations fall, f - r [B, T, K], and their directions [K, D].

    Args:
      point: as for ``first_change``.
      dictionary: as for ``first_change``.
      source: as for ``first_change``.
      arrays: as for ``first_change``.
      features_K: the features.
      prompts: number of the B rows that are prompts.
    """

    def chosen(f_PxTxF: jax.Array) -> jax.Array:
        return f_PxTxF[:, :, features_K]

    # All features are encoded, in parts, before some are chosen: a TopK's activations depend on the others.
    f_BxTxK = of_features(dictionary, arrays[:2], chosen)
    other_BxTxK = of_features(dictionary, arrays[2:], chosen) if arrays[2:] else f_BxTxK
    fall_BxTxK = source.removed(f_BxTxK, other_BxTxK, arrays[1], features_K, prompts)
    W_dec_KxD = dictionary.W_dec_FxD[...][features_K]
    return jax.lax.with_sharding_constraint((fall_BxTxK, W_dec_KxD), sharding(point.mesh))


def edit_value(
    value_xD: jax.Array,
    fall_xK: jax.Array,
    W_dec_KxD: jax.Array,
    fractions: jax.Array,
    addends: jax.Array | None = None,
) -> jax.Array:
    """Return the site's value after an edit, [..., D].

    Args:
      value_xD: the clean value.
      fall_xK: by how much ablation lowers the activation of each feature; from ``gather``.
      W_dec_KxD: directions of the features.
      fractions: share of each fall that is applied; broadcast to ``fall_xK``.
      addends: what is added to each activation, likewise; None: nothing.
    """
    fractions = fractions.astype(fall_xK.dtype)
    # Not a plain product: a feature that overflows would reach the rows that do not edit it as 0 x NaN.
    fall_xK = jnp.where(fractions != 0, fall_xK * fractions, jnp.zeros_like(fall_xK))
    if addends is not None:
        fall_xK = fall_xK - addends.astype(fall_xK.dtype)
    # The fall is subtracted from the clean value: what the dictionary does not explain stays as it is.
    fall_xD = matmul(fall_xK.astype(W_dec_KxD.dtype), W_dec_KxD)
    return (value_xD.astype(fall_xD.dtype) - fall_xD).astype(value_xD.dtype)


@functools.partial(jax.jit, static_argnums=0)
def clean_logp(point: SplitPoint, params: decoder.Params, end_BxD: jax.Array) -> jax.Array:
    """Return the clean log-probabilities of the next token, fp32 [B, V]."""
    # A program of its own: all edits of a prompt are compared with the same clean log-probabilities.
    logp_BxV = jax.nn.log_softmax(decoder.unembed(point.config, params, end_BxD))
    return jax.lax.with_sharding_constraint(logp_BxV, sharding(point.mesh))


@functools.partial(jax.jit, static_argnums=0)
def run_rows(
    point: SplitPoint,
    params: decoder.Params,
    clean: CleanValues,
    tree: SharedPrefixBatch,
    end_SxR: jax.Array,
    answers_SxRx2: jax.Array,
    fraction_SxRxK: jax.Array,
    addend_SxRxK: jax.Array | None,
) -> jax.Array:
    """Return the rows' readouts [S, R, M]: the logit difference and, given clean log-probabilities, all others.

    Args:
      point: where the model is split (static).
      params: parameters of the decoder.
      clean: the values that rows are built from.
      tree: the tokens that the rows consist of.
      end_SxR: index among its shard's tokens of each row's last one.
      answers_SxRx2: token ids of the correct and the wrong answer.
      fraction_SxRxK: share of each feature's fall that each row applies; 0 for features that its edit does not name.
      addend_SxRxK: what is added to each activation; None: nothing.
    """
    stream_SxNxD, value_SxNxD, fall_SxNxK = (array[tree.prompt_SxN, tree.position_SxN] for array in clean[:3])
    addend_SxNxK = None
    if addend_SxRxK is not None:
        assert clean.editable_BxT is not None
        editable_SxN = clean.editable_BxT[tree.prompt_SxN, tree.position_SxN]
        addend_SxNxK = jnp.where(editable_SxN[..., None], tree.per_token(addend_SxRxK), 0.0)
    edited_SxNxD = edit_value(value_SxNxD, fall_SxNxK, clean.W_dec_KxD, tree.per_token(fraction_SxRxK), addend_SxNxK)
    by_shard = fitting_sharding(point.mesh, edited_SxNxD.shape, "data", None, None)
    stream_SxNxD, edited_SxNxD = jax.lax.with_sharding_constraint((stream_SxNxD, edited_SxNxD), by_shard)
    x_SxNxD = point.run_shared_suffix(params, clean.past, tree, stream_SxNxD, edited_SxNxD)
    # Last tokens are picked before the unembedding, the logits of all others are not needed.
    x_XxD = jnp.take_along_axis(x_SxNxD, end_SxR[..., None], axis=1).reshape(-1, x_SxNxD.shape[-1])
    logp_XxV = None if clean.logp_BxV is None else clean.logp_BxV[tree.prompt_SxR.reshape(-1)]
    values_XxM = point.readouts(params, x_XxD, answers_SxRx2.reshape(-1, 2), logp_XxV)
    return jax.lax.with_sharding_constraint(values_XxM.reshape(*end_SxR.shape, -1), sharding(point.mesh))
