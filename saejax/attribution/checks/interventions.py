"""What the model does when features of its transcoders take other values: many sets of changes to one prompt at once.

A change gives a feature another activation at a position, which adds to what its layer's MLP gives there:

    mlp_out_t  ->  mlp_out_t + (value - f_t) W_dec

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
    ReadDirections,
    read_last,
    read_logits,
    read_moved,
    run_layer,
)
from saejax.attribution.checks.edits import Change, edits_by_layer
from saejax.attribution.local.replacement import Replacement
from saejax.attribution.trace.targets import Readouts
from saejax.errors import UserError
from saejax.parallel import by_row, to_host

HOLDS = ("nothing", "attention", "all", "constrained")
_STEP = 8  # rows, changes and features are filled up to a multiple of this
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
    layers, active = replacement.model.config.n_layers, replacement.active
    hold_L, chosen_J = _hold_by_layer(hold, hold_until, layers), np.asarray(features, np.int64)
    edits = edits_by_layer(replacement, rows, len(replacement.ids_P))
    if hold == "constrained" and any(hold_L[layer] not in FIXED for layer in edits):
        raise UserError(f"a feature of layer {max(edits)} is changed, and layers below {hold_until} are constrained")
    feature_RxJ = np.tile(active.value_A[chosen_J], (len(rows), 1))
    readout_RxK = np.tile(readouts.value_K, (len(rows), 1))
    if not edits:
        every = np.tile(replacement.logits_V, (len(rows), 1)) if logits else None
        return Changed(feature_RxJ, readout_RxK, every)
    chunks = _chunks(len(rows), replacement, edits)
    first = min(edits)
    most = int(np.bincount(active.layer_A[chosen_J]).max(initial=0))  # one size, so that layers share programs
    states = [_unchanged(replacement, chunk.stop - chunk.start, first) for chunk in chunks]
    for layer in range(first, layers):
        x_TxD = replacement.stream_LxTxD[layer]
        inner_K = np.flatnonzero(readouts.layer_K == layer)
        inner = ReadDirections(readouts.position_K[inner_K], readouts.vector_KxD[inner_K])
        own_J = np.flatnonzero(active.layer_A[chosen_J] == layer)
        reader = _encoders(replacement, chosen_J[own_J], most) if most else None
        transcoder = replacement.transcoders.load(layer) if layer in edits else None
        for place, chunk in enumerate(chunks):
            if len(inner_K):
                moved_RxK = to_host(read_moved(x_TxD, states[place], inner))
                readout_RxK[chunk, inner_K] += moved_RxK[: chunk.stop - chunk.start]
            same = replacement.frozen, hold_L[layer], replacement.model.params, np.int32(layer)
            edited = (transcoder, _filled(edits[layer], chunk, len(states[place]))) if transcoder is not None else None
            given = replacement.skip(layer), edited, reader, (np.int32(replacement.first), np.int32(len(x_TxD)))
            states[place], moved_RxJ = run_layer(*same, x_TxD, states[place], *given)
            if len(own_J):
                feature_RxJ[chunk, own_J] += to_host(moved_RxJ)[: chunk.stop - chunk.start, : len(own_J)]
        on_progress(layer + 1 - first, layers - first)
    final_K = np.flatnonzero(readouts.layer_K == layers)
    for chunk, x_RxTxD in zip(chunks, states, strict=True):
        moved_RxK = _moved_final(replacement, readouts, final_K, hold_L[-1], x_RxTxD)
        readout_RxK[chunk, final_K] += moved_RxK[: chunk.stop - chunk.start]
    changed = _finite(Changed(feature_RxJ, readout_RxK))
    if not logits:
        return changed
    same = replacement.frozen, hold_L[-1], replacement.model.params, replacement.last_D
    last = np.int32(len(replacement.ids_P) - 1)
    parts = [
        to_host(read_logits(*same, x_RxTxD, last))[: chunk.stop - chunk.start]
        for chunk, x_RxTxD in zip(chunks, states, strict=True)
    ]
    return dataclasses.replace(changed, logits_RxV=np.concatenate(parts))


def _finite(changed: Changed) -> Changed:
    if not (np.isfinite(changed.feature_RxJ).all() and np.isfinite(changed.readout_RxK).all()):
        raise UserError("the model is not finite after these changes: give features values that they can have")
    return changed


def _moved_final(
    replacement: Replacement, readouts: Readouts, chosen_K: np.ndarray, hold: str, x_RxTxD: jax.Array
) -> np.ndarray:
    """By how much some readouts of the stream leaving the last layer differ from the prompt's, fp32 [R, K]."""
    parts = readouts.vector_KxD[chosen_K], readouts.normed_K[chosen_K]
    last = np.int32(len(replacement.ids_P) - 1)
    return to_host(read_last(replacement.frozen, hold, replacement.last_D, x_RxTxD, last, *parts))


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


def _encoders(replacement: Replacement, places: np.ndarray, most: int) -> ReadDirections:
    """Encoder rows of active features of one layer, filled up with zeros to a number for all layers."""
    active = replacement.active
    vector_JxD = replacement.encoder_rows(places)
    room = -(-most // _STEP) * _STEP - len(places)
    return ReadDirections(np.pad(active.position_A[places], (0, room)), np.pad(vector_JxD, ((0, room), (0, 0))))


def _chunks(rows: int, replacement: Replacement, edits: Mapping[int, LayerChanges]) -> list[slice]:
    """Rows that go through a layer at once."""
    _, length, width = replacement.streams.stream_LxTxD.shape
    most = max(part.position_RxM.shape[1] for part in edits.values())  # each change has a direction of its own
    size = max(_CHUNK // (max(length, most) * width) // _STEP, 1) * _STEP
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _unchanged(replacement: Replacement, rows: int, first: int) -> jax.Array:
    """The stream entering layer ``first`` of rows in which nothing is changed yet, filled up."""
    x_TxD = replacement.streams.stream_LxTxD[first]
    filled = -(-rows // _STEP) * _STEP
    (x_RxTxD,) = by_row(replacement.model.mesh, jnp.tile(x_TxD[None], (filled, 1, 1)))
    return x_RxTxD


def _filled(edits: LayerChanges, chunk: slice, rows: int) -> LayerChanges:
    """The chunk's changes, with rows that change nothing up to the number of rows."""
    return LayerChanges(*(np.pad(array[chunk], ((0, rows - (chunk.stop - chunk.start)), (0, 0))) for array in edits))
