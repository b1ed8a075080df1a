"""Running a prompt with some of the features and errors alone: circuits side by side, layer by layer."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saejax.attribution.checks.changed_layers import read_last
from saejax.attribution.local.active import AT_ONCE, activations
from saejax.attribution.local.frozen import RELP, FrozenModel
from saejax.attribution.local.replacement import Replacement
from saejax.attribution.local.written import Written
from saejax.attribution.trace.targets import Readouts
from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.models import decoder
from saejax.models.attention import whole_prompts
from saejax.parallel.collectives import to_host

_STEP = 64  # least size to which the features of a layer are filled up


class Circuit(NamedTuple):
    """Which features are kept [A], of ``Replacement.active``, and which errors [L, P]."""

    features_A: np.ndarray
    errors_LxP: np.ndarray

    def complement(self) -> "Circuit":
        """All that is not in it."""
        return Circuit(~self.features_A, ~self.errors_LxP)


def run_circuits(
    replacement: Replacement,
    circuits: Sequence[Circuit],
    readouts: Readouts,
    means: Mapping[int, np.ndarray] | None = None,
) -> np.ndarray:
    """The readouts [C, K] of each circuit alone, fp32.

    Args:
      circuits: what is kept; a feature that is not active in the prompt is not in any.
      readouts: of the last layer's output.
      means: by layer, activations [F] that stand in place of those of features that are active in the prompt and not
        kept, such as ``mean_activations``; None: zeros.

    Raises:
      UserError: a readout is not of the last layer's output, or not finite.
    """
    config, active = replacement.model.config, replacement.active
    if (readouts.layer_K != config.n_layers).any():
        raise UserError("a circuit is judged by logits, or by a direction of the stream that leaves the last layer")
    length, tokens = replacement.stream_LxTxD.shape[1], len(replacement.ids_P)
    most = replacement.filled("active", int(np.bincount(active.layer_A).max()), _STEP)
    size = max(AT_ONCE // (length * replacement.dictionaries.configs[0].n_features), 1)
    chunks = [slice(start, min(start + size, len(circuits))) for start in range(0, len(circuits), size)]
    states = [jnp.tile(replacement.stream_LxTxD[0][None], (min(size, len(circuits)), 1, 1)) for _ in chunks]
    below = [[Written(replacement.dictionaries, *x.shape[:2]) for _ in range(2)] for x in states]  # kept, and all
    for layer in range(config.n_layers):
        transcoder = replacement.transcoder(layer)
        for number, chunk in enumerate(chunks):
            states[number], *acts = run_layer(
                replacement.frozen,
                replacement.model.params,
                np.int32(layer),
                states[number],
                transcoder,
                *_kept(replacement, circuits[chunk], layer, len(states[number]), most),
                None if means is None else means[layer],
                (np.int32(replacement.first), np.int32(tokens)),
                tuple(written.at(layer) for written in below[number]) if replacement.dictionaries.cross_layer else None,
            )
            for written, acts_CxTxF in zip(below[number], acts, strict=False):
                where = np.nonzero(acts_CxTxF := to_host(acts_CxTxF))
                place_E = np.ravel_multi_index(where[:2], acts_CxTxF.shape[:2])
                written.add(layer, place_E, where[2], acts_CxTxF[where])
    last = np.int32(tokens - 1)
    parts = readouts.vector_KxD, readouts.normed_K
    found = [
        read_last(replacement.frozen, "nothing", replacement.last_D, x, last, *parts)[: c.stop - c.start]
        for x, c in zip(states, chunks, strict=True)
    ]
    readout_CxK = readouts.value_K[None] + np.concatenate(found)
    if not np.isfinite(readout_CxK).all():
        raise UserError("the model is not finite with a part of its features: try --model.dtype=float32")
    return readout_CxK


def _kept(
    replacement: Replacement, circuits: Sequence[Circuit], layer: int, rows: int, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of a layer, its active positions and features [A], and whether each circuit keeps these [C, A] and errors [C, T].

    Features are filled up (out of range) to ``most``, a number for all layers; circuits by empty ones to ``rows``.
    """
    active, features = replacement.active, replacement.dictionaries.configs[0].n_features
    own = slice(*np.searchsorted(active.layer_A, [layer, layer + 1]))
    kept_CxA = np.zeros((rows, most), bool)
    error_CxT = np.zeros((rows, replacement.stream_LxTxD.shape[1]), bool)
    for row, circuit in enumerate(circuits):
        kept_CxA[row, : own.stop - own.start] = circuit.features_A[own]
        error_CxT[row, : len(replacement.ids_P)] = circuit.errors_LxP[layer]
    room = most - (own.stop - own.start)
    position_A, feature_A = (
        np.pad(place[own], (0, room), constant_values=features) for place in (active.position_A, active.feature_A)
    )
    return position_A, feature_A, kept_CxA, error_CxT


def mean_activations(replacements: Iterable[Replacement]) -> dict[int, np.ndarray]:
    """Mean activations of all features over the positions of some prompts where features are used, by layer; fp32 [F].

    Args:
      replacements: of the prompts, one model and one set; used one at a time.
    """
    total: dict[int, np.ndarray] = {}
    count = 0
    for replacement in replacements:
        active, count = replacement.active, count + len(replacement.ids_P) - replacement.first
        for layer, config in enumerate(replacement.dictionaries.configs):
            own = slice(*np.searchsorted(active.layer_A, [layer, layer + 1]))
            sum_F = np.bincount(active.feature_A[own], weights=active.value_A[own], minlength=config.n_features)
            total[layer] = total.get(layer, 0) + sum_F
    return {layer: (sum_F / count).astype(np.float32) for layer, sum_F in total.items()}


@functools.partial(jax.jit, static_argnums=0)
def run_layer(
    frozen: FrozenModel,
    params: decoder.Params,
    layer: jax.Array,
    x_CxTxD: jax.Array,
    dictionary: Dictionary,
    position_A: jax.Array,
    feature_A: jax.Array,
    kept_CxA: jax.Array,
    error_CxT: jax.Array,
    mean_F: jax.Array | None,
    used: tuple[jax.Array, jax.Array],
    below: tuple[jax.Array | None, jax.Array | None] | None,
) -> tuple[jax.Array, ...]:
    """One layer of all circuits.

    Args:
      x_CxTxD: the stream entering it.
      position_A, feature_A: the layer's active features; those out of range fill up.
      kept_CxA: which of them each circuit keeps; a feature that is not active in the prompt is not kept.
      error_CxT: at which positions the error is kept.
      mean_F: activations of the active features that are not kept; None: 0.
      used: the first position at which features are used, and the end of the prompt.
      below: of a cross-layer transcoder, what kept features of lower layers write to this one, and what all do
        [C, T, D] (None: nothing); of per-layer ones None.

    Returns:
      The stream leaving it [C, T, D]; of a cross-layer transcoder also activations of kept features, and of all
      [C, T, F].
    """
    seen: dict[str, jax.Array] = {}
    acts: tuple[jax.Array, ...] = ()
    position_T = jnp.arange(x_CxTxD.shape[1])
    used_T = (position_T >= used[0]) & (position_T < used[1])

    def hook(kind: str, value_CxTxD: jax.Array) -> jax.Array:
        nonlocal acts
        seen[kind] = value_CxTxD
        if kind != "mlp_out":
            return value_CxTxD
        read_CxTxD = frozen.read(params, layer, seen)
        acts_CxTxF = activations(dictionary, read_CxTxD)
        error_CxTxD = value_CxTxD - dictionary.decode(acts_CxTxF, read_CxTxD)
        kept_CxTxF = _only_kept(acts_CxTxF, position_A, feature_A, kept_CxA, mean_F)
        rebuilt_CxTxD = dictionary.decode(kept_CxTxF, read_CxTxD)
        if below is not None:
            rebuilt_CxTxD += 0 if below[0] is None else below[0]
            error_CxTxD -= 0 if below[1] is None else below[1]
            acts = kept_CxTxF, jnp.where(used_T[None, :, None], acts_CxTxF, jnp.zeros_like(acts_CxTxF))
        kept_CxTxD = rebuilt_CxTxD + jnp.where(error_CxT[..., None], error_CxTxD, jnp.zeros_like(error_CxTxD))
        return jnp.where(used_T[None, :, None], kept_CxTxD.astype(value_CxTxD.dtype), value_CxTxD)

    tables = whole_prompts(frozen.config, x_CxTxD.shape[1])
    return decoder.run_layer(frozen.config, RELP, params, layer, x_CxTxD, tables, hook), *acts


def _only_kept(
    acts_CxTxF: jax.Array, position_A: jax.Array, feature_A: jax.Array, kept_CxA: jax.Array, mean_F: jax.Array | None
) -> jax.Array:
    """The activations of what is kept, the means of what is active in the prompt and not kept, 0 elsewhere."""
    place = jnp.arange(len(acts_CxTxF))[:, None], position_A[None], feature_A[None]
    mask_CxTxF = jnp.zeros(acts_CxTxF.shape, bool).at[place].set(kept_CxA, mode="drop")
    rest_CxTxF = jnp.zeros_like(acts_CxTxF)
    if mean_F is not None:
        mean_CxA = jnp.broadcast_to(mean_F[feature_A].astype(rest_CxTxF.dtype)[None], kept_CxA.shape)
        rest_CxTxF = rest_CxTxF.at[place].set(mean_CxA, mode="drop")
    return jnp.where(mask_CxTxF, acts_CxTxF, rest_CxTxF)
