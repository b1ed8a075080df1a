"""What the model does when features of its transcoders take other values: many sets of changes to one prompt at once.

A change gives a feature another activation at a position, which adds to what its layer's MLP gives there:

    mlp_out_t  ->  mlp_out_t + (value - f_t) W_dec

and, with a cross-layer transcoder, likewise to what later layers' MLPs give: where nothing is held, to what they
compute anew of the changed stream, as in circuit-tracer.

What stays as it was in the prompt is a choice. With ``hold`` "nothing" the model runs on from there, and f_t is the
activation in that run, after all earlier changes. With "attention" the attention weights are those of the prompt. With
"all" the factors of norms and the outputs of MLPs are, too: then all is linear, f_t is the prompt's own activation, and
what a change does to a target is what the graph's edge from the feature to the target says. It may stay so in the lower
layers alone (``hold_until``); above them the model runs freely.

Layers are the outer loop: each transcoder is read once, and only where something changes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saejax.attribution.checks.changed_layers import (
    FIXED,
    LayerChanges,
    read_last,
    read_logits,
    read_moved,
    run_layer,
)
from saejax.attribution.checks.edits import Change, edits_by_layer
from saejax.attribution.local.replacement import Replacement, padded
from saejax.attribution.local.written import Written
from saejax.attribution.trace.targets import Readouts
from saejax.errors import UserError
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import by_row

HOLDS = ("nothing", "attention", "all", "constrained")
_STEP = 8  # least size to which rows are filled up
_CHUNK = 2**21  # numbers of the streams of the rows that go through a layer at once


@dataclasses.dataclass(frozen=True)
class Changed:
    """What each row reads, fp32.

    Attributes:
      feature_RxJ: pre-activations of the features that were asked for.
      readout_RxK: the readouts, as ``Readouts.value_K`` has them.
      logits_RxV: all logits at the last position; None: not asked for.
    """

    feature_RxJ: np.ndarray
    readout_RxK: np.ndarray
    logits_RxV: np.ndarray | None = None


def intervene(
    replacement: Replacement,
    rows: Sequence[Sequence[Change]],
    readouts: Readouts,
    features: Sequence[int] | np.ndarray = (),
    hold: str = "nothing",
    hold_until: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    logits: bool = False,
) -> Changed:
    """Runs the prompt with the changes of each row.

    Args:
      replacement: of the prompt.
      rows: changes that are made together; a row without any is the prompt itself.
      readouts: what is read at the end, from ``targets.read_targets``.
      features: active features, as places in ``replacement.active``, whose pre-activations are read.
      hold: one of ``HOLDS``.
      hold_until: the layer from which on the model runs freely; their number: the final norm alone does. None: nothing
        does, ``hold`` goes for all.
      on_progress: called with the layers done and of all; may raise to stop.
      logits: whether all logits are read, too.

    Returns:
      What each row reads.

    Raises:
      UserError: a feature does not exist, is changed where it is not used or twice in a row, or what is read is not
        finite.
    """
    layers = replacement.model.config.n_layers
    holds = _hold_by_layer(hold, hold_until, layers)
    edits = edits_by_layer(replacement, rows, len(replacement.ids_P))
    if hold == "constrained" and any(holds[layer] not in FIXED for layer in edits):
        raise UserError(f"a feature of layer {max(edits)} is changed, and layers below {hold_until} are constrained")
    every = np.tile(replacement.logits_V, (len(rows), 1)) if logits else None
    run = _ChangedRun(replacement, readouts, np.asarray(features, np.int64), edits, len(rows), every)
    if edits:
        first = min(edits)
        for layer in range(first, layers):
            run.read_stream(layer)
            run.go_through(layer, holds[layer])
            on_progress(layer + 1 - first, layers - first)
        run.read_end(holds[-1])
    changed = run.changed
    if not (np.isfinite(changed.feature_RxJ).all() and np.isfinite(changed.readout_RxK).all()):
        raise UserError("the model is not finite after these changes: give features values that they can have")
    return changed


class _ChangedRun:
    """The rows on their way up, some at a time beside each other, and what was read of them.

    Args:
      replacement, readouts: see ``intervene``.
      chosen_J: active features whose pre-activations are read.
      edits: the changes of all rows, by layer.
      rows: their number.
      logits_RxV: the prompt's, for each row; None: they are not asked for.

    Attributes:
      changed: what each row reads; at first what the prompt does.
    """

    def __init__(
        self,
        replacement: Replacement,
        readouts: Readouts,
        chosen_J: np.ndarray,
        edits: Mapping[int, LayerChanges],
        rows: int,
        logits_RxV: np.ndarray | None,
    ):
        self._replacement, self._readouts, self._edits, self._chosen_J = replacement, readouts, edits, chosen_J
        active = replacement.active
        value_J = active.value_A[chosen_J]
        self.changed = Changed(np.tile(value_J, (rows, 1)), np.tile(readouts.value_K, (rows, 1)), logits_RxV)
        self._layer_J = active.layer_A[chosen_J]
        self._chunks = _chunks(rows, replacement, edits) if edits else []
        self._states = [_unchanged(replacement, chunk.stop - chunk.start, min(edits)) for chunk in self._chunks]
        self._below = [Written(replacement.dictionaries, *x_RxTxD.shape[:2]) for x_RxTxD in self._states]

    def read_stream(self, layer: int) -> None:
        """Reads what is read of the stream entering a layer, where the rows are now."""
        own_K = np.flatnonzero(self._readouts.layer_K == layer)
        if len(own_K):
            inner = self._readouts.position_K[own_K], self._readouts.vector_KxD[own_K]
            x_TxD = self._replacement.stream_LxTxD[layer]
            for chunk, x_RxTxD in zip(self._chunks, self._states, strict=True):
                moved_RxK = read_moved(x_TxD, x_RxTxD, *inner)
                self.changed.readout_RxK[chunk, own_K] += moved_RxK[: chunk.stop - chunk.start]

    def go_through(self, layer: int, hold: str) -> None:
        """Takes the rows through a layer, with their changes there, and reads the layer's features."""
        replacement, own_J = self._replacement, np.flatnonzero(self._layer_J == layer)
        x_TxD, edits = replacement.stream_LxTxD[layer], self._edits.get(layer)
        same = replacement.frozen, hold, replacement.model.params, np.int32(layer), x_TxD
        places = self._chosen_J[own_J]
        position_J, vector_JxD = replacement.active.position_A[places], replacement.encoder_rows(places)
        transcoder = replacement.transcoder(layer) if edits else None
        bounds = np.int32(replacement.first), np.int32(len(x_TxD))
        for place, chunk in enumerate(self._chunks):
            x_RxTxD = self._states[place]
            edited = (transcoder, _filled(edits, chunk, len(x_RxTxD))) if transcoder is not None and edits else None
            given = replacement.skip(layer), edited, bounds, self._below[place].at(layer)
            self._states[place], read, change_RxM = run_layer(*same, x_RxTxD, *given)
            if edited:
                self._below[place].add(layer, edited[1].places(len(x_TxD)), edited[1].feature_RxM, change_RxM)
            if len(own_J):
                moved_RxJ = read_moved(read[0], read[1], position_J, vector_JxD)
                self.changed.feature_RxJ[chunk, own_J] += moved_RxJ[: chunk.stop - chunk.start]

    def read_end(self, hold: str) -> None:
        """Reads what is read of the stream leaving the last layer."""
        replacement, last = self._replacement, np.int32(len(self._replacement.ids_P) - 1)
        frozen, own_K = replacement.frozen, np.flatnonzero(self._readouts.layer_K == replacement.model.config.n_layers)
        vectors = self._readouts.vector_KxD[own_K], self._readouts.normed_K[own_K]
        for chunk, x_RxTxD in zip(self._chunks, self._states, strict=True):
            own = slice(chunk.stop - chunk.start)
            moved_RxK = read_last(frozen, hold, replacement.last_D, x_RxTxD, last, *vectors)
            self.changed.readout_RxK[chunk, own_K] += moved_RxK[own]
            if self.changed.logits_RxV is not None:
                logits_RxV = read_logits(frozen, hold, replacement.model.params, replacement.last_D, x_RxTxD, last)
                self.changed.logits_RxV[chunk] = to_host(logits_RxV)[own]


def _hold_by_layer(hold: str, hold_until: int | None, layers: int) -> list[str]:
    """What each layer holds, and after them the final norm.

    Raises:
      UserError: there is no such way to hold, or no such layer.
    """
    if hold not in HOLDS:
        raise UserError(f"hold is {hold!r}: expected one of {', '.join(HOLDS)}")
    if hold_until is not None and not 0 <= hold_until <= layers:
        raise UserError(f"hold_until is {hold_until}: expected a layer, 0 to {layers - 1}, or {layers}")
    until = layers + 1 if hold_until is None else hold_until
    if hold == "constrained":
        hold, after = ("all", "all") if until >= layers else (hold, "attention")
    else:
        after = "nothing"
    return [hold if layer < until else after for layer in range(layers + 1)]


def _chunks(rows: int, replacement: Replacement, edits: Mapping[int, LayerChanges]) -> list[slice]:
    """Rows that go through a layer at once."""
    _, length, width = replacement.stream_LxTxD.shape
    most = max(part.position_RxM.shape[1] for part in edits.values())  # each change has a direction of its own
    size = max(_CHUNK // (max(length, most) * width) // _STEP, 1) * _STEP
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _unchanged(replacement: Replacement, rows: int, first: int) -> jax.Array:
    """The stream entering layer ``first`` of rows in which nothing is changed yet, filled up."""
    x_TxD = replacement.stream_LxTxD[first]
    filled = padded(rows, _STEP)
    (x_RxTxD,) = by_row(replacement.model.mesh, jnp.tile(x_TxD[None], (filled, 1, 1)))
    return x_RxTxD


def _filled(edits: LayerChanges, chunk: slice, rows: int) -> LayerChanges:
    """The chunk's changes, with rows that change nothing up to the number of rows."""
    return LayerChanges(*(np.pad(array[chunk], ((0, rows - (chunk.stop - chunk.start)), (0, 0))) for array in edits))
