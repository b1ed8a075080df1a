"""Edits of a run, which set features to other activations; and what is read in it.

They change what a layer's MLP adds to the stream, so an edit is a difference that is added to the stream leaving the
layer, the sum over edited features of (value - f) W_dec, with f the activation in the edited run (with MLPs frozen: in
the prompt). Features of cross-layer transcoders write to later layers, too.

``Readings`` reads features and targets in edited runs as differences from the prompt.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from saejax.arguments import as_index, as_numbers
from saejax.attribution.local.dictionaries import FeatureOutputs
from saejax.attribution.local.rows import Readouts
from saejax.attribution.local.state import (
    AT_ONCE,
    FIXED,
    RELP,
    FrozenModel,
    LocalRun,
    LocalState,
    PromptRun,
    activations,
    check_finite,
    padded,
)
from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.models.layers import einsum, norm
from saejax.parallel.collectives import to_host

CHUNK = 2**21  # numbers of the streams of the rows that go through a layer at once
TOGETHER = 2**26  # numbers of the chunks that go up layer by layer together, so that each encoder is read once for them
_ROWS = 8  # least size to which rows are padded
_CHANGES = 16  # least size to which the changes of a layer, and their features, are padded
_READ = 128  # directions that are read at once, so that layers and prompts share a program


class Change(NamedTuple):
    """Sets a feature to an activation, at a position or at all positions of a slice.

    Also at the first position and other attention sinks, where a trace has no features: they are set from 0 there.
    """

    layer: int
    position: int | slice
    feature: int
    value: float


def as_rows(edits: Any) -> list[list[Change]]:
    """Return edits as a list of rows, each a list of changes; a change alone is a row of its own.

    Raises:
      UserError: they are something else.
    """
    if isinstance(edits, Change):
        return [[edits]]
    rows: list[Any]
    try:
        rows = [row if isinstance(row, Change) else list(row) for row in edits]
    except TypeError:  # no rows, or one that holds nothing
        rows = [None]
    if not all(isinstance(row, list) and all(isinstance(change, Change) for change in row) for row in rows):
        raise UserError("edits are rows of changes that are made together: expected such as [[Change(...)], []]")
    return rows


def placed_changes(rows: Sequence[Sequence[Change]], tokens: int, features: Mapping[int, int]) -> np.ndarray:
    """Return rows of changes as a table, with a line for each position of a slice.

    Args:
      rows: of each row, the changes that are made together.
      tokens: of the run, which slices of positions refer to.
      features: number of features of each layer that has a dictionary.

    Returns:
      float64 [N, 5]: row, layer, position, feature, value.

    Raises:
      UserError: a feature or a position does not exist, or is changed twice in a row.
    """
    changes_at = [
        (row, change.layer, position, change.feature, change.value)
        for row, changes in enumerate(rows)
        for change in changes
        for position in _positions(change, tokens)
    ]
    entries, places = list[tuple[float, ...]](), set[tuple[int, ...]]()
    for row, *numbers, value in changes_at:
        layer, position, feature = map(as_index, numbers)
        if not 0 <= feature < features.get(layer, 0) or not _is_finite(value):
            raise UserError(
                f"feature {numbers[2]} of layer {numbers[0]} cannot be set to {value!r:.60} at position {numbers[1]}: "
                f"expected one of {max(features.values())} features of the layers {', '.join(map(str, features))}, and "
                "a finite number"
            )
        if not 0 <= position < tokens:
            raise UserError(f"position {numbers[1]}: this prompt has the positions 0 to {tokens - 1}")
        if (row, layer, position, feature) in places:
            raise UserError(f"row {row} changes a feature twice at one position: give it one value")
        places.add((row, layer, position, feature))
        entries.append((row, layer, position, feature, float(value)))
    return np.array(entries, np.float64).reshape(-1, 5)


def place_in_texts(change: Change, prompt: int) -> Change:
    """Return a change as it is made in texts that go on behind a prompt, where new tokens come with each pass.

    Args:
      change: a slice of its positions counts from the prompt's end if it starts below 0; without an end it goes on at
        the new tokens, and may start at one.
      prompt: tokens of the prompt.

    Raises:
      UserError: a slice with an end has no position in the prompt.
    """
    if not isinstance(change.position, slice):
        return change
    start, stop, step = _ends(change.position, prompt)
    if change.position.stop is None:
        return change._replace(position=slice(max(start, change.position.start or 0), None, step))
    _positions(change, prompt)
    return change._replace(position=slice(start, stop, step))


def has_begun(change: Change, tokens: int) -> bool:
    """Return whether a change is made in a text of so many tokens: a slice may start behind them."""
    return not isinstance(change.position, slice) or change.position.start < tokens


def _is_finite(value: Any) -> bool:
    """Return whether this is a number that is finite in fp32."""
    number = as_numbers(value)
    return number is not None and not number.ndim and abs(float(number)) <= float(np.finfo(np.float32).max)


def _ends(positions: slice, tokens: int) -> tuple[int, int, int]:
    """Return start, stop and step of a slice of positions, counted from the start."""
    try:
        return positions.indices(tokens)
    except (TypeError, ValueError) as error:  # its ends are no whole numbers, or its step is 0
        raise UserError(f"{positions} is no slice of positions: {error}") from None


def _positions(change: Change, tokens: int) -> Sequence[int]:
    """Return the positions of a change among so many; a slice has one at least, as its change would do nothing."""
    if not isinstance(change.position, slice):
        return [change.position]
    positions = range(*_ends(change.position, tokens))
    if not positions:
        raise UserError(f"{change.position} has no position: this prompt has the positions 0 to {tokens - 1}")
    return positions


def plan_edits(state: LocalState, edits: Sequence[Sequence[Change]]) -> "list[tuple[slice, ChangeEdits]]":
    """Split rows of changes to the prompt of a ``state`` into chunks that go through the layers together.

    Raises:
      UserError: a change does not fit the prompt.
    """
    _, length, width = state.stream_LxTxD.shape
    size = max(CHUNK // (length * width) // _ROWS, 1) * _ROWS
    chunks = [slice(start, min(start + size, len(edits))) for start in range(0, len(edits), size)]
    plans = [(rows, ChangeEdits(state, edits[rows], len(state.ids_P))) for rows in chunks]
    for _, plan in plans:
        plan.warn_of_sinks()
    return plans


class ChangeEdits:
    """Rows of changes to a prompt, made in runs side by side.

    Args:
      state: of the prompt.
      rows: of each row, the changes that are made together.
      tokens: of the run, which slices of positions refer to.

    Attributes:
      rows: number of rows that run, padding included.

    Raises:
      UserError: a feature or a position does not exist, or is changed twice in a row.
    """

    def __init__(self, state: LocalState, rows: Sequence[Sequence[Change]], tokens: int):
        self._state, self.rows = state, padded(len(rows), _ROWS)
        self._outputs: FeatureOutputs | None = None
        sizes = {layer: config.n_features for layer, config in enumerate(state.dictionaries.configs)}
        table_Nx5 = placed_changes(rows, tokens, sizes)
        self._row_N, self._layer_N, self._position_N, self._feature_N = table_Nx5[:, :4].T.astype(np.int32)
        self._value_N = table_Nx5[:, 4].astype(np.float32)

    def warn_of_sinks(self) -> None:
        """Count the rows that change nothing, since no feature is used at attention sinks: there each one is 0."""
        is_idle_N = self._is_unused(self._layer_N, self._position_N) & (self._value_N == 0)
        if idle := {*self._row_N.tolist()} - {*self._row_N[~is_idle_N].tolist()}:
            logging.warning(
                "%d of %d rows of changes change nothing: they set features to 0 at attention sinks alone (the first "
                "tokens, %d here, and others of such a norm), where no feature is used",
                len(idle), len({*self._row_N.tolist()}), self._state.first,
            )  # fmt: skip

    def _is_unused(self, layer: int | np.ndarray, position_N: np.ndarray) -> np.ndarray:
        """Return which positions are first ones, or sinks of the prompt, where no feature is used, bool [N]."""
        sink_LxP = self._state.sink_LxP
        in_prompt_N = np.minimum(position_N, sink_LxP.shape[1] - 1)
        return (position_N < self._state.first) | ((position_N == in_prompt_N) & sink_LxP[layer, in_prompt_N])

    @property
    def layers(self) -> Collection[int]:
        """The layers in which features are changed."""
        return set(self._layer_N.tolist())

    def difference(self, layer: int, freeze: str, read_RxTxD: jax.Array) -> np.ndarray | None:
        """Return what the edits add to the stream leaving a layer, [R, T, D]; None: nothing.

        Args:
          layer: its number; layers come in order.
          freeze: what the layer keeps of the prompt, one of ``state.FREEZE_MODES``.
          read_RxTxD: what the transcoder reads in the runs.
        """
        rows, length = read_RxTxD.shape[:2]
        # Kept from layer to layer: features of cross-layer transcoders write to layers that come later.
        outputs = self._outputs = self._outputs or FeatureOutputs(self._state.dictionaries, rows, length)
        here = np.flatnonzero(self._layer_N == layer)
        if len(here):
            row_M, position_M, feature_M = self._row_N[here], self._position_N[here], self._feature_N[here]
            if freeze in FIXED:  # a feature keeps the activation that it has in the prompt
                active = self._state.active
                places = zip(position_M.tolist(), feature_M.tolist(), strict=True)
                index_M = np.array([active.index_of.get((layer, *place), -1) for place in places])
                old_M = np.append(active.value_A, np.float32(0))[index_M]
            else:
                acts_M = self._activations(layer, row_M, position_M, feature_M, read_RxTxD)
                # Sinks are the prompt's: a change below may have made a position longer.
                old_M = np.where(self._is_unused(layer, position_M), 0, acts_M)
            outputs.add(layer, row_M * length + position_M, feature_M, self._value_N[here] - old_M)
        return outputs.pop(layer) if layer in outputs else None

    def _activations(
        self, layer: int, row_M: np.ndarray, position_M: np.ndarray, feature_M: np.ndarray, read_RxTxD: jax.Array
    ) -> np.ndarray:
        """Return the activations of the changed features in the runs, of which only these are encoded if possible."""
        encoder, column_M = self._state.encoder(layer), feature_M
        if encoder.kind.is_elementwise():  # TopK compares features with each other, and needs all of them
            feature_U, index_M = np.unique(feature_M, return_inverse=True)
            # Filled up with copies, whose activations nobody reads, so that layers share programs.
            room = padded(len(feature_U), _CHANGES) - len(feature_U)
            encoder = encoder.restrict(np.pad(feature_U, (0, room), mode="edge"))
            column_M = index_M.astype(np.int32)
        # A position is encoded once, however many of its features are changed.
        place_N, index_M = np.unique(row_M * read_RxTxD.shape[1] + position_M, return_inverse=True)
        size = min(padded(len(place_N), _CHANGES), max(AT_ONCE // encoder.config.n_features, 1))
        acts_M = np.empty(len(row_M), np.float32)
        for start in range(0, len(place_N), size):
            here = np.flatnonzero((index_M >= start) & (index_M < start + size))
            count = padded(len(here), _CHANGES)
            places = np.divmod(np.resize(place_N[start : start + size], size), read_RxTxD.shape[1])
            picked = np.resize(index_M[here] - start, count), np.resize(column_M[here], count)
            inputs = encoder, read_RxTxD, *places, *picked, np.int32(len(self._state.ids_P))
            acts_M[here] = to_host(_encode_places(*inputs))[: len(here)]
        return acts_M


@jax.jit
def _encode_places(
    encoder: Dictionary,
    read_RxTxD: jax.Array,
    row_N: jax.Array,
    position_N: jax.Array,
    index_M: jax.Array,
    column_M: jax.Array,
    prompt: jax.Array,
) -> jax.Array:
    """Return single activations at N positions of rows, [M]; of each the index of its position, and its feature.

    Those that new tokens make sinks are 0; of the first ``prompt`` positions, the prompt says which are.
    """
    read_NxD = read_RxTxD[row_N, position_N]
    in_prompt_Nx1 = position_N[:, None] < prompt
    return jnp.where(in_prompt_Nx1, encoder.encode(read_NxD), activations(encoder, read_NxD))[index_M, column_M]


class Readings:
    """Values read from edited runs of a prompt, kept as the prompt's own values plus what changes.

    So a small effect keeps its digits: it is no difference of numbers that came from two programs.

    Args:
      run: of the prompt.
      rows: number of edited runs.
      readouts: what is read at the end; None: nothing.
      features: active features, as indices into ``run.active``, whose pre-activations are read.
      logits: whether ``logits_RxV`` is there.

    Attributes:
      layers: in which features are read, ascending.
      logits_RxV: fp32 logits at the last position, at first the prompt's; None: not requested.

    Raises:
      UserError: an index is none of an active feature.
    """

    def __init__(
        self,
        run: PromptRun,
        rows: int,
        readouts: Readouts | None,
        features: Sequence[int] | np.ndarray,
        logits: bool,
    ):
        self._readouts, self._wanted = readouts, run.active[_checked_indices(run, features)]
        wanted = self._wanted
        self._encoder_JxD = run.dictionaries.rows_of("W_enc", wanted.layer_A, wanted.feature_A)
        self._feature_RxJ = np.tile(wanted.value_A, (rows, 1))
        self._readout_RxK = np.tile(readouts.value_K if readouts else np.empty(0, np.float32), (rows, 1))
        self.logits_RxV = np.tile(run.logits_V, (rows, 1)) if logits else None
        self.layers: list[int] = np.unique(wanted.layer_A).tolist()

    def read_layer(self, rows: slice, layer: int, read_BxTxD: jax.Array) -> None:
        """Read features of a layer.

        Args:
          rows: which edited runs these are.
          layer: its number.
          read_BxTxD: what its dictionary reads in the prompt, which comes first, and in the rows; padding may follow.
        """
        here = np.flatnonzero(self._wanted.layer_A == layer)
        if len(here):
            places = self._wanted.position_A[here], self._encoder_JxD[here]
            changes_RxJ = read_changes(read_BxTxD[0], read_BxTxD[1:], *places)
            self._feature_RxJ[rows, here] += changes_RxJ[: rows.stop - rows.start]

    def read_last(self, rows: slice, frozen: FrozenModel, freeze: str, last_D: jax.Array, x_RxD: jax.Array) -> None:
        """Read the readouts.

        Args:
          rows: which edited runs these are.
          frozen: the model.
          freeze: what the final norm keeps, one of ``state.FREEZE_MODES``.
          last_D: the stream of the prompt at the last position, leaving the last layer.
          x_RxD: the same stream in the rows; padding may follow.
        """
        readouts = self._readouts
        if not readouts:
            return
        vector_KxD = readouts.vector_KxD  # pulled back through the final norm with the prompt's scale
        if freeze != "all":
            # Each row has its own scale. The columns were picked once: the unembedding is not read again for a run.
            x_BxD = _final_norm(frozen, jnp.concatenate([last_D[None], x_RxD]))
            last_D, x_RxD, vector_KxD = x_BxD[0], x_BxD[1:], readouts.column_KxD
        changes_RxK = read_changes(last_D[None], x_RxD[:, None], np.zeros(len(readouts), np.int32), vector_KxD)
        self._readout_RxK[rows] += changes_RxK[: rows.stop - rows.start]

    def checked(self) -> LocalRun:
        """Return what was read, or refuse it if a value is not finite; see ``check_finite``."""
        for array in (self._feature_RxJ, self._readout_RxK, self.logits_RxV):
            if array is not None:
                check_finite(array)
        return LocalRun(self._feature_RxJ, self._readout_RxK, self.logits_RxV)


def _checked_indices(run: PromptRun, features: Any) -> np.ndarray:
    """Return indices into ``run.active``, int64 [J]; raise a ``UserError`` if some are none."""
    indices = np.asarray(features)
    is_index = not indices.size or indices.dtype.kind in "iu"
    if indices.ndim != 1 or not is_index or ((indices < 0) | (indices >= len(run.active))).any():
        raise UserError(
            f"features is {features!r:.60}: expected a list of places in the active features, 0 to "
            f"{len(run.active) - 1}"
        )
    return indices.astype(np.int64)


def read_changes(x_TxD: jax.Array, x_RxTxD: jax.Array, position_J: np.ndarray, vector_JxD: np.ndarray) -> np.ndarray:
    """Return how much dot products of directions with a stream differ from the prompt's, [R, J].

    Args:
      x_TxD: the stream of the prompt.
      x_RxTxD: the same stream in the rows.
      position_J: positions that are read.
      vector_JxD: directions that are read there.
    """
    count, parts = len(position_J), []
    for start in range(0, count, _READ):
        room = max(start + _READ - count, 0)
        position_X = np.pad(position_J[start : start + _READ], (0, room))
        vector_XxD = np.pad(vector_JxD[start : start + _READ], ((0, room), (0, 0)))
        parts.append(to_host(_read_changes(x_TxD, x_RxTxD, position_X, vector_XxD)))
    return np.concatenate(parts, axis=1)[:, :count]


@jax.jit
def _read_changes(x_TxD: jax.Array, x_RxTxD: jax.Array, position_J: jax.Array, vector_JxD: jax.Array) -> jax.Array:
    # The difference first: a difference of two nearly equal products would be rounding.
    return einsum("rjd,jd->rj", (x_RxTxD - x_TxD[None])[:, position_J], vector_JxD)


@jax.jit
def _final_norm(frozen: FrozenModel, x_BxD: jax.Array) -> jax.Array:
    return norm(frozen.config, RELP, frozen.params, "final_norm", x_BxD)
