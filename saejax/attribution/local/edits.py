"""Edits of a run: features set to other activations, or all features left out but those of a circuit.

Both change what a layer's MLP adds to the stream, so an edit is a difference that is added to the stream leaving the
layer:

    set      sum over edited features of (value - f) W_dec
    circuit  sum over kept features of f W_dec + b_dec + skip(read) + error if it is kept - mlp_out

with f the activation in the edited run (with MLPs frozen: in the prompt) and error what the transcoder leaves of the
run's own MLP output. Features of cross-layer transcoders write to later layers, too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.attribution.local.directions import FeatureOutputs
from saejax.attribution.local.layers import FIXED, FrozenModel
from saejax.attribution.local.prompt_run import AT_ONCE, activations, encode_used
from saejax.attribution.local.readouts import padded
from saejax.attribution.local.state import LocalState
from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.parallel.collectives import to_host

CHUNK = 2**21  # numbers of the streams of the rows that go through a layer at once
_ROWS = 8  # least size to which rows are padded


class Change(NamedTuple):
    """Sets a feature to an activation, at a position or at all positions of a slice."""

    layer: int
    position: int | slice
    feature: int
    value: float


class Circuit(NamedTuple):
    """Masks of the features [A] of ``LocalState.active``, and of the errors [L, P], that are kept."""

    features_A: np.ndarray
    errors_LxP: np.ndarray

    def complement(self) -> "Circuit":
        """Return all that is not in it."""
        return Circuit(~self.features_A, ~self.errors_LxP)


class LayerChanges(NamedTuple):
    """The changes of R rows in one layer, arrays [R, M]; padding sets features to 0 where they are: position 0."""

    #: position_RxM and feature_RxM: int32.
    position_RxM: np.ndarray
    feature_RxM: np.ndarray
    value_RxM: np.ndarray  #: fp32 new activations
    old_RxM: np.ndarray  #: fp32 activations in the prompt


class ChangeEdits:
    """Rows of changes to a prompt, made in runs side by side.

    Args:
      state: of the prompt.
      rows: of each row, the changes that are made together.
      tokens: of the run, which slices of positions refer to.

    Attributes:
      chunks: the rows that go through a layer at once.
      padded: the size to which the rows of each chunk are padded.
      first_layer: the lowest that is changed; None: nothing is.

    Raises:
      UserError: a feature or a position does not exist, or is changed twice in a row.
    """

    def __init__(self, state: LocalState, rows: Sequence[Sequence[Change]], tokens: int):
        self._state, self._by_layer = state, _changes_by_layer(state, rows, tokens)
        self.first_layer = min(self._by_layer, default=None)
        _, length, width = state.stream_LxTxD.shape
        most = max((part.position_RxM.shape[1] for part in self._by_layer.values()), default=1)
        # By whichever is longer, tokens or changes: a layer's arrays hold both.
        size = max(CHUNK // (max(length, most) * width) // _ROWS, 1) * _ROWS
        self.chunks = [slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
        self.padded = [padded(chunk.stop - chunk.start, _ROWS) for chunk in self.chunks]
        self._outputs: dict[int, FeatureOutputs] = {}

    @property
    def layers(self) -> set[int]:
        """The layers in which features are changed."""
        return set(self._by_layer)

    def difference(
        self, number: int, layer: int, freeze: str, read_RxTxD: jax.Array, out_RxTxD: jax.Array
    ) -> np.ndarray | None:
        """Return what the edits of a chunk add to the stream leaving a layer, [R, T, D]; None: nothing.

        Args:
          number: of the chunk.
          layer: its number.
          freeze: what the layer keeps of the prompt, one of ``layers.FREEZE_MODES``.
          read_RxTxD: what the transcoder reads in the runs.
          out_RxTxD: what the MLP adds in the runs.
        """
        rows, length = read_RxTxD.shape[:2]
        # Kept from layer to layer: features of cross-layer transcoders write to layers that come later.
        outputs = self._outputs.setdefault(number, FeatureOutputs(self._state.dictionaries, rows, length))
        if layer in self._by_layer:
            chunk = self.chunks[number]
            filler = ((0, rows - (chunk.stop - chunk.start)), (0, 0))
            changes = LayerChanges(*(np.pad(array[chunk], filler) for array in self._by_layer[layer]))
            old_RxM = changes.old_RxM
            # With frozen MLPs a feature keeps the activation that it has in the prompt.
            if freeze not in FIXED:
                acts_RxM = self._activations(layer, changes, read_RxTxD)
                old_RxM = np.where(changes.position_RxM >= self._state.first, acts_RxM, 0)
            places = np.arange(rows)[:, None] * length + changes.position_RxM
            outputs.add(layer, places, changes.feature_RxM, changes.value_RxM - old_RxM)
        return outputs.pop(layer)

    def _activations(self, layer: int, changes: LayerChanges, read_RxTxD: jax.Array) -> np.ndarray:
        """Return the activations of the changed features in each row, of which only these are encoded if possible."""
        feature_U, index = np.unique(changes.feature_RxM, return_inverse=True)
        room = padded(len(feature_U), 16) - len(feature_U)  # so that layers share programs
        # Filled up with copies, whose activations nobody reads.
        encoder, columns = self._state.encoder(layer), np.pad(feature_U, (0, room), mode="edge")
        if encoder.kind.is_elementwise():  # TopK compares features with each other, and needs all of them
            encoder, columns = encoder.restrict(columns), np.arange(len(columns))
        column_RxM = columns[index.reshape(changes.feature_RxM.shape)].astype(np.int32)
        return to_host(_encode_places(encoder, changes.position_RxM, column_RxM, read_RxTxD))


class CircuitEdits:
    """Circuits run side by side; see ``ChangeEdits`` for its interface. All layers are edited.

    Args:
      state: of the prompt.
      circuits: what is kept; a feature that is not active in the prompt is in none.
    """

    first_layer = 0

    def __init__(self, state: LocalState, circuits: Sequence[Circuit]):
        self._state, self._circuits = state, circuits
        length = state.stream_LxTxD.shape[1]
        size = max(AT_ONCE // (length * state.dictionaries.configs[0].n_features), 1)
        self.chunks = [slice(start, min(start + size, len(circuits))) for start in range(0, len(circuits), size)]
        # One size for all chunks, whose rows then share programs.
        self.padded = [min(size, len(circuits))] * len(self.chunks)
        self._outputs: dict[int, FeatureOutputs] = {}

    def difference(
        self, number: int, layer: int, freeze: str, read_RxTxD: jax.Array, out_RxTxD: jax.Array
    ) -> jax.Array:
        """Return what leaving out all but the circuits adds to the stream leaving a layer, [R, T, D]."""
        state, (rows, length) = self._state, read_RxTxD.shape[:2]
        circuits = self._circuits[self.chunks[number]]
        outputs = self._outputs.setdefault(number, FeatureOutputs(state.dictionaries, 2, rows, length))
        used_T = (np.arange(length) >= state.first) & (np.arange(length) < len(state.ids_P))
        acts_RxTxF = to_host(encode_used(state.encoder(layer), read_RxTxD, used_T))
        # Which features of the prompt are kept in each row; one that is not active in the prompt is in no circuit.
        kept_RxTxF, error_RxT = np.zeros(acts_RxTxF.shape, bool), np.zeros((rows, length), bool)
        here = state.active.of_layer(layer)
        position_A, feature_A = state.active.position_A[here], state.active.feature_A[here]
        for row, circuit in enumerate(circuits):
            kept_RxTxF[row, position_A, feature_A] = circuit.features_A[here]
            error_RxT[row, : len(state.ids_P)] = circuit.errors_LxP[layer]
        row_E, position_E, feature_E = np.nonzero(acts_RxTxF)
        value_E, kept_E = acts_RxTxF[row_E, position_E, feature_E], kept_RxTxF[row_E, position_E, feature_E]

        # One sum has all features, the other the kept ones.
        place_E = row_E * length + position_E
        places = np.concatenate([place_E, place_E[kept_E] + rows * length])
        features, values = (np.concatenate([part, part[kept_E]]) for part in (feature_E, value_E))
        outputs.add(layer, places, features, values)
        sums = outputs.pop(layer)
        if sums is None:
            sums = np.zeros((2, *out_RxTxD.shape), np.float32)
        return _circuit_difference(
            state.frozen, np.int32(layer), state.b_dec_LxD[layer], read_RxTxD, out_RxTxD, sums, error_RxT, used_T
        )


@jax.jit
def _circuit_difference(
    frozen: FrozenModel,
    layer: jax.Array,
    b_dec_D: jax.Array,
    read_RxTxD: jax.Array,
    out_RxTxD: jax.Array,
    sums_2xRxTxD: jax.Array,
    error_RxT: jax.Array,
    used_T: jax.Array,
) -> jax.Array:
    all_RxTxD, kept_RxTxD = sums_2xRxTxD
    fixed_RxTxD = jnp.broadcast_to(b_dec_D, out_RxTxD.shape) + frozen.skip(layer, read_RxTxD)
    error_RxTxD = jnp.where(error_RxT[..., None], out_RxTxD - all_RxTxD - fixed_RxTxD, 0)
    return jnp.where(used_T[None, :, None], kept_RxTxD + fixed_RxTxD + error_RxTxD - out_RxTxD, 0)


@jax.jit
def _encode_places(
    encoder: Dictionary, position_RxM: jax.Array, column_RxM: jax.Array, read_RxTxD: jax.Array
) -> jax.Array:
    """Return the activations of columns of the encoder at positions of each row, [R, M]."""
    row_R, length = jnp.arange(len(read_RxTxD)), read_RxTxD.shape[1]
    # Change by change: the activations of all positions would be [R, T, F].
    if position_RxM.shape[1] <= length:

        def encode_change(place: tuple[jax.Array, jax.Array]) -> jax.Array:
            position_R, column_R = place
            acts_RxF = activations(encoder, read_RxTxD[row_R, position_R])
            return jnp.take_along_axis(acts_RxF, column_R[:, None], axis=1)[:, 0]

        return lax.map(encode_change, (position_RxM.T, column_RxM.T)).T

    # With more changes than positions, each position is encoded once.
    def encode_position(acts_RxM: jax.Array, position: jax.Array) -> tuple[jax.Array, None]:
        here_RxM = jnp.take_along_axis(activations(encoder, read_RxTxD[:, position]), column_RxM, axis=1)
        return jnp.where(position_RxM == position, here_RxM.astype(acts_RxM.dtype), acts_RxM), None

    return lax.scan(encode_position, jnp.zeros(position_RxM.shape, read_RxTxD.dtype), jnp.arange(length))[0]


def _changes_by_layer(state: LocalState, rows: Sequence[Sequence[Change]], tokens: int) -> dict[int, LayerChanges]:
    """Return the changes of all rows by layer, slices as their positions."""
    active, configs = state.active, state.dictionaries.configs
    entries = [
        (row, change.layer, position, change.feature, change.value)
        for row, changes in enumerate(rows)
        for change in changes
        for position in (
            range(*change.position.indices(tokens)) if isinstance(change.position, slice) else [change.position]
        )
    ]
    by_layer: dict[int, list[dict[tuple[int, int], tuple[float, float]]]] = {}
    for row, layer, position, feature, value in entries:
        exists = 0 <= layer < len(configs) and 0 <= feature < configs[layer].n_features
        if not (exists and np.isfinite(value)):
            raise UserError(
                f"feature {feature} of layer {layer} cannot be set to {value}: expected one of {len(configs)} layers, "
                f"of {configs[0].n_features} features, and a finite number"
            )
        if not 0 <= position < tokens:
            raise UserError(f"position {position}: this prompt has the positions 0 to {tokens - 1}")
        of_row = by_layer.setdefault(int(layer), [{} for _ in rows])[row]
        if (position, feature) in of_row:
            raise UserError(f"row {row} changes a feature twice at one position: give it one value")
        index = active.index_of.get((layer, position, feature))
        of_row[position, feature] = value, 0.0 if index is None else active.value_A[index]
    # One size for all layers, so that these share their programs.
    most = max((len(of_row) for by_row in by_layer.values() for of_row in by_row), default=0)
    changes_by_layer = {}
    for layer, by_row in by_layer.items():
        table_RxMx4 = np.zeros((len(rows), most, 4))
        for row, of_row in enumerate(by_row):
            if of_row:
                table_RxMx4[row, : len(of_row)] = [(*place, *values) for place, values in of_row.items()]
        columns, dtypes = np.moveaxis(table_RxMx4, 2, 0), [np.int32] * 2 + [np.float32] * 2
        changes_by_layer[layer] = LayerChanges(*(c.astype(dtype) for c, dtype in zip(columns, dtypes, strict=True)))
    return changes_by_layer
