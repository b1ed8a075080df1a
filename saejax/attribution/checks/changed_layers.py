"""The programs of ``interventions``: streams through one layer with changed features, and what is read of them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.attribution.local.active import activations
from saejax.attribution.local.frozen import FrozenModel
from saejax.attribution.local.replacement import padded
from saejax.dictionaries import Dictionary
from saejax.models import decoder
from saejax.models.attention import AttentionTables, attend, whole_prompts
from saejax.models.config import RunRules
from saejax.models.layers import einsum
from saejax.parallel.collectives import to_host

_STEP = 16  # least size to which directions that are read at the end are filled up
_READ = 128  # directions that are read at once in other places
FIXED = ("all", "constrained")  # ways to hold a layer with which its MLP gives what it gave in the prompt


class LayerChanges(NamedTuple):
    """The changes of R rows in one layer, arrays [R, M]; what fills up sets features to 0 where they are: position 0.

    Attributes:
      position_RxM, feature_RxM: int32.
      value_RxM: fp32, the new activations.
      own_RxM: fp32, those of the prompt.
    """

    position_RxM: np.ndarray
    feature_RxM: np.ndarray
    value_RxM: np.ndarray
    own_RxM: np.ndarray

    def places(self, length: int) -> np.ndarray:
        """Where they are among the positions of all rows, one row of ``length`` after the other; [R, M]."""
        return np.arange(len(self.position_RxM))[:, None] * length + self.position_RxM


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_layer(
    frozen: FrozenModel,
    hold: str,
    params: decoder.Params,
    layer: jax.Array,
    x_TxD: jax.Array,
    x_RxTxD: jax.Array,
    skip_DxD: jax.Array | None,
    edited: tuple[Dictionary, LayerChanges] | None,
    bounds: tuple[jax.Array, jax.Array],
    written_RxTxD: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array | None]:
    """One layer of all rows.

    Args:
      frozen: static.
      hold: what the layer holds, one of ``interventions.HOLDS``; static.
      layer: its number.
      x_TxD, x_RxTxD: the stream entering the layer, of the prompt and of the rows.
      skip_DxD: the skip path of its transcoder; None: there is none.
      edited: the layer's transcoder, and what is changed there; None: nothing.
      bounds: the first position at which features are used, before which their activations are 0; and up to which
        position attention is held where it is.
      written_RxTxD: what changes of lower layers write to this one, of cross-layer transcoders; None: nothing.

    Returns:
      The stream leaving the layer; what its transcoder reads of the prompt [T, D] and of the rows [R, T, D]; and by how
      much the activations of changed features differ from the prompt's, [R, M].
    """
    config, rules = frozen.config, RunRules(first_fixes=hold == "all")
    seen: dict[str, jax.Array] = {}
    changes: list[jax.Array] = []

    def hook(kind: str, value_BxTxD: jax.Array) -> jax.Array:
        seen[kind] = value_BxTxD
        if kind != "mlp_out":
            return value_BxTxD
        read_BxTxD = frozen.read(params, layer, seen, rules)
        if hold in FIXED:  # of what the MLP gives, the skip path alone reacts
            skip = 0 if skip_DxD is None else einsum("btd,de->bte", read_BxTxD - read_BxTxD[:1], skip_DxD)
            value_BxTxD = jnp.broadcast_to(value_BxTxD[:1], value_BxTxD.shape) + skip
        if written_RxTxD is not None:
            value_BxTxD = value_BxTxD.at[1:].add(written_RxTxD.astype(value_BxTxD.dtype))
        if edited is None:
            return value_BxTxD
        changes.append(_changes(*edited, None if hold in FIXED else read_BxTxD[1:], bounds[0]))
        return value_BxTxD.at[1:].add(_added(*edited, changes[0], value_BxTxD[1:]))

    def of_prompt(q: jax.Array, k: jax.Array, v: jax.Array, tables: AttentionTables) -> jax.Array:
        first_q, first_k = (jnp.broadcast_to(part[:1], part.shape) for part in (q, k))  # the prompt's weights
        held_T = jnp.arange(len(x_TxD)) < bounds[1]
        held = attend(config, rules, first_q, first_k, v, tables)
        return jnp.where(held_T[None, :, None, None], held, attend(config, rules, q, k, v, tables))

    x_BxTxD = jnp.concatenate([x_TxD[None], x_RxTxD])  # the prompt comes first
    tables, function = whole_prompts(config, len(x_TxD)), of_prompt if hold in ("attention", "constrained") else None
    x_BxTxD = decoder.run_layer(config, rules, params, layer, x_BxTxD, tables, hook, function)
    read_BxTxD = frozen.read(params, layer, seen, rules)
    return x_BxTxD[1:], (read_BxTxD[0], read_BxTxD[1:]), changes[0] if changes else None


def _changes(dictionary: Dictionary, edits: LayerChanges, read_RxTxD: jax.Array | None, first: jax.Array) -> jax.Array:
    """By how much activations change [R, M]; ``read_RxTxD`` None: from those of the prompt."""
    if read_RxTxD is None:
        return edits.value_RxM - edits.own_RxM
    own_RxM = _activations(dictionary, edits, read_RxTxD)
    return edits.value_RxM - jnp.where(edits.position_RxM >= first, own_RxM, 0)


def _added(dictionary: Dictionary, edits: LayerChanges, change_RxM: jax.Array, like_RxTxD: jax.Array) -> jax.Array:
    """What the changes add to the MLP's output [R, T, D]."""
    row_Rx1 = jnp.arange(len(edits.position_RxM))[:, None]
    added_RxMxD = change_RxM[..., None] * dictionary.W_dec_FxD[...][edits.feature_RxM]
    return jnp.zeros_like(like_RxTxD).at[row_Rx1, edits.position_RxM].add(added_RxMxD.astype(like_RxTxD.dtype))


def _activations(dictionary: Dictionary, edits: LayerChanges, read_RxTxD: jax.Array) -> jax.Array:
    """Those that the features that are changed have in each row [R, M]."""
    row_R, length = jnp.arange(len(read_RxTxD)), read_RxTxD.shape[1]
    if edits.position_RxM.shape[1] <= length:

        def of_change(places: tuple[jax.Array, jax.Array]) -> jax.Array:
            position_R, feature_R = places
            acts_RxF = activations(dictionary, read_RxTxD[row_R, position_R])
            return jnp.take_along_axis(acts_RxF, feature_R[:, None], axis=1)[:, 0]

        return lax.map(of_change, (edits.position_RxM.T, edits.feature_RxM.T)).T

    def at_position(own_RxM: jax.Array, position: jax.Array) -> tuple[jax.Array, None]:  # encodes less often
        acts_RxM = jnp.take_along_axis(activations(dictionary, read_RxTxD[:, position]), edits.feature_RxM, axis=1)
        return jnp.where(edits.position_RxM == position, acts_RxM.astype(own_RxM.dtype), own_RxM), None

    return lax.scan(at_position, jnp.zeros_like(edits.own_RxM), jnp.arange(length))[0]


def read_moved(x_TxD: jax.Array, x_RxTxD: jax.Array, position_J: np.ndarray, vector_JxD: np.ndarray) -> np.ndarray:
    """By how much the products of directions with some stream differ from the prompt's, [R, J].

    They are read some at a time, always as many, so that layers and prompts share a program.

    Args:
      x_TxD, x_RxTxD: that stream, of the prompt and of the rows.
      position_J, vector_JxD: the directions, and where they are read.
    """
    count, found = len(position_J), []
    for start in range(0, count, _READ):
        room = max(start + _READ - count, 0)
        position_X = np.pad(position_J[start : start + _READ], (0, room))
        vector_XxD = np.pad(vector_JxD[start : start + _READ], ((0, room), (0, 0)))
        found.append(to_host(_read_moved(x_TxD, x_RxTxD, position_X, vector_XxD)))
    return np.concatenate(found, axis=1)[:, :count]


@jax.jit
def _read_moved(x_TxD: jax.Array, x_RxTxD: jax.Array, position_J: jax.Array, vector_JxD: jax.Array) -> jax.Array:
    return einsum("rjd,jd->rj", (x_RxTxD - x_TxD[None])[:, position_J], vector_JxD)


def read_last(
    frozen: FrozenModel,
    hold: str,
    last_D: jax.Array,
    x_RxTxD: jax.Array,
    last: np.int32,
    vector_KxD: np.ndarray,
    normed_K: np.ndarray,
) -> np.ndarray:
    """By how much readouts of the stream leaving the last layer differ from the prompt's, [R, K].

    Their directions are pulled back through the final norm with the prompt's factor. Unless all is frozen, the factor
    is that of each row, which multiplies what is read.

    Args:
      frozen: static.
      hold: what the final norm holds, one of ``interventions.HOLDS``; static.
      last_D: the prompt's stream leaving the last layer, at its last position.
      x_RxTxD: the rows' streams leaving it.
      last: that position.
      vector_KxD: the readouts' directions.
      normed_K: whether they were pulled back through the final norm.
    """
    count, room = len(vector_KxD), padded(len(vector_KxD), _STEP) - len(vector_KxD)
    filled = np.pad(vector_KxD, ((0, room), (0, 0))), np.pad(normed_K, (0, room))
    return to_host(_read_last(frozen, hold, last_D, x_RxTxD, last, *filled))[:, :count]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read_last(
    frozen: FrozenModel,
    hold: str,
    last_D: jax.Array,
    x_RxTxD: jax.Array,
    last: jax.Array,
    vector_KxD: jax.Array,
    normed_K: jax.Array,
) -> jax.Array:
    x_RxD, config = x_RxTxD[:, last], frozen.config
    if hold == "all":
        return einsum("rd,kd->rk", x_RxD - last_D[None], vector_KxD)

    def factor(x_RxD: jax.Array) -> jax.Array:
        centred_RxD = x_RxD - jnp.mean(x_RxD, axis=-1, keepdims=True) if config.norm == "layer" else x_RxD
        return lax.rsqrt(jnp.mean(jnp.square(centred_RxD), axis=-1, keepdims=True) + config.norm_eps)

    ratio_RxK = jnp.where(normed_K[None], factor(x_RxD) / factor(last_D[None]), 1.0)
    return einsum("rd,kd->rk", x_RxD, vector_KxD) * ratio_RxK - einsum("rd,kd->rk", last_D[None], vector_KxD)


@functools.partial(jax.jit, static_argnums=(0, 1))
def read_logits(
    frozen: FrozenModel, hold: str, params: decoder.Params, last_D: jax.Array, x_RxTxD: jax.Array, last: jax.Array
) -> jax.Array:
    """The logits of the rows at the last position, [R, V]; see ``read_last``."""
    x_BxD = jnp.concatenate([last_D[None], x_RxTxD[:, last]])  # the prompt comes first
    return decoder.unembed(frozen.config, params, x_BxD[:, None], RunRules(first_fixes=hold == "all"))[1:, 0]
