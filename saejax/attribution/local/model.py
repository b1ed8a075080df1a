"""``LocalModel``: the local replacement model of a prompt, and what can be done with it.

    local = saejax.LocalModel(lm, transcoders, "The capital of France is")
    local.run([[saejax.Change(layer=3, position=4, feature=17, value=0.0)]])    # the prompt with features edited
    local.pullback(layer_R, position_R, vector_RxD)                             # what each source adds to each target
    local.pushforward(added)                                                    # what vectors change, layer by layer

Attention patterns and norm scales are those of the prompt, so both ``pullback`` and ``pushforward`` are linear; the
first goes from targets down to all sources, the second from sources up. ``run`` computes the model again, with as much
of it frozen as is asked for.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saejax.attribution.local import layers
from saejax.attribution.local.edits import Change, ChangeEdits, Circuit, CircuitEdits
from saejax.attribution.local.layers import FIXED, FREEZE_MODES
from saejax.attribution.local.prompt_run import LocalRun, prompt_ids
from saejax.attribution.local.readouts import Readouts, padded, read_changes, read_last, read_logits
from saejax.attribution.local.rows import RowTracer
from saejax.attribution.local.sources import Sources
from saejax.attribution.local.state import LocalState
from saejax.attribution.local.transcoders import LayerTranscoders, open_transcoders
from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.models.language_model import LanguageModel
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import by_row

AnySet = LayerTranscoders | Sequence[Dictionary] | str | Path


@dataclasses.dataclass(frozen=True)
class Continuation:
    """A greedy continuation: the new tokens, int32 [N], and the logits from which each was taken, fp32 [N, V]."""

    ids_N: np.ndarray
    logits_NxV: np.ndarray


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Vectors [E, D] of nodes, added or read at positions [E] and layers [E]; int32 and fp32."""

    #: which node each belongs to, ascending from 0; a node has several where it writes to several layers.
    node_E: np.ndarray
    #: the layer whose entering stream a vector is added to; or, of what is read, the layer whose transcoder reads it,
    #: or L for the stream leaving the last layer.
    layer_E: np.ndarray
    position_E: np.ndarray  #: where
    vector_ExD: np.ndarray  #: the vectors

    def choose(self, nodes_B: np.ndarray) -> "Vectors":
        """Return the vectors of some nodes, which are numbered anew."""
        number_N = np.full(max(self.node_E.max(initial=0), nodes_B.max(initial=0)) + 1, -1)
        number_N[nodes_B] = np.arange(len(nodes_B))
        here = np.flatnonzero(number_N[self.node_E] >= 0)
        return Vectors(number_N[self.node_E[here]], self.layer_E[here], self.position_E[here], self.vector_ExD[here])

    def at(self, layer: int, count: int, length: int) -> np.ndarray:
        """Return the vectors that each of ``count`` nodes has at a layer, of ``length`` positions, [N, T, D]."""
        value_NxTxD = np.zeros((count, length, self.vector_ExD.shape[1]), np.float32)
        here = np.flatnonzero(self.layer_E == layer)
        # Not by +=, as a node may have several vectors at one layer and position.
        np.add.at(value_NxTxD, (self.node_E[here], self.position_E[here]), self.vector_ExD[here])
        return value_NxTxD


class LocalModel(LocalState):
    """The local replacement model of one prompt; ``LocalState`` has its attributes.

    Args:
      lm: the language model.
      transcoders: an open set, dictionaries of all layers in memory, or what ``open_transcoders`` opens.
      prompt: a text, or its token ids, which are taken as they are; see ``prompt_ids``.
      chat: put a text into the tokenizer's chat template, as a user's turn.

    Raises:
      UserError: the set does not belong to the model, or the prompt cannot be run; see ``LocalState``.
    """

    def __init__(
        self,
        lm: LanguageModel,
        transcoders: AnySet,
        prompt: str | Sequence[int] | np.ndarray,
        *,
        chat: bool = False,
    ):
        super().__init__(lm, open_set(transcoders), prompt_ids(lm, prompt, chat))

    @functools.cached_property
    def sources(self) -> Sources:
        """The sources of the graph, biases among them."""
        return Sources.of(self)

    def run(
        self,
        edits: Sequence[Sequence[Change]] | Sequence[Circuit],
        freeze: str = "none",
        *,
        readouts: Readouts | None = None,
        features: Sequence[int] | np.ndarray = (),
        freeze_until: int | None = None,
        logits: bool = True,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> LocalRun:
        """Run the prompt with each row of edits.

        Args:
          edits: rows of changes that are made together (an empty row is the prompt itself), or circuits that are run
            alone.
          freeze: what stays as in the prompt: "none"; "attention", the attention patterns; "all", norm scales and MLP
            outputs too, so that all is linear and a change has the effect that the graph's edges say; "constrained",
            circuit-tracer's mode, which freezes attention patterns and MLP outputs up to ``freeze_until``.
          readouts: what is read at the end, from ``read_targets``; None: nothing.
          features: active features, as indices into ``active``, whose pre-activations are read.
          freeze_until: the layer from which on the model runs freely; the number of layers: only the final norm does.
            None: ``freeze`` applies to all.
          logits: whether to compute all logits at the last position.
          on_progress: called with the layers done and of all; may raise to stop.

        Raises:
          UserError: a feature does not exist or is changed twice in a row, there is no such mode, or what is read is
            not finite.
        """
        n_layers, length, last = self.model.config.n_layers, self.stream_LxTxD.shape[1], len(self.ids_P) - 1
        index_J = np.asarray(features, np.int64)
        modes, plan = _freeze_by_layer(freeze, freeze_until, n_layers), self._plan(edits, freeze)
        changed = plan.layers if isinstance(plan, ChangeEdits) else set()
        if freeze == "constrained" and any(modes[layer] not in FIXED for layer in changed):
            raise UserError(
                f"a feature of layer {max(changed)} is changed, and layers below {freeze_until} are constrained"
            )
        # The prompt's own values, to which changes are added: a small effect keeps its digits.
        feature_RxJ = np.tile(self.active.value_A[index_J], (len(edits), 1))
        readout_RxK = np.tile(readouts.value_K if readouts else np.empty(0, np.float32), (len(edits), 1))
        logits_RxV = np.tile(self.logits_V, (len(edits), 1)) if logits else None
        layer_J, position_J = self.active.layer_A[index_J], self.active.position_A[index_J]
        # From the lowest layer that is changed: below it all rows are the prompt.
        first = n_layers if plan.first_layer is None or not len(edits) else plan.first_layer
        states = []
        for rows in plan.padded if first < n_layers else ():
            states += by_row(self.model.mesh, jnp.tile(self.stream_LxTxD[first][None], (rows, 1, 1)))
        for layer in range(first, n_layers):
            here = np.flatnonzero(layer_J == layer)
            encoded = position_J[here], self.encoder_rows(index_J[here])
            for number, chunk in enumerate(plan.chunks):
                count = chunk.stop - chunk.start
                # The prompt goes along as the first row: what is frozen is taken from it.
                streams = jnp.concatenate([self.stream_LxTxD[layer][None], states[number]])
                leaving, read, out = layers.run_layer(self.frozen, modes[layer], np.int32(layer), streams, length)
                difference = plan.difference(number, layer, modes[layer], read[1:], out[1:])
                states[number] = leaving[1:] if difference is None else leaving[1:] + difference
                if len(here):
                    feature_RxJ[chunk, here] += read_changes(read[0], read[1:], *encoded)[:count]
            on_progress(layer + 1 - first, n_layers - first)
        for chunk, state in zip(plan.chunks, states, strict=False):
            leaving, count = state[:, last], chunk.stop - chunk.start
            if readouts:
                vectors = readouts.vector_KxD
                readout_RxK[chunk] += read_last(self.frozen, modes[-1], self.last_D, leaving, vectors)[:count]
            if logits_RxV is not None:
                row_logits = read_logits(self.frozen, modes[-1], self.last_D, leaving)
                logits_RxV[chunk] = to_host(row_logits)[:count]
        # Only what is read is checked: an activation that no feature can have overflows somewhere on the way.
        if not (np.isfinite(feature_RxJ).all() and np.isfinite(readout_RxK).all()):
            raise UserError("the model is not finite after these changes: give features values that they can have")
        return LocalRun(feature_RxJ, readout_RxK, logits_RxV)

    def _plan(self, edits: Sequence[Any], freeze: str) -> ChangeEdits | CircuitEdits:
        if not any(isinstance(row, Circuit) for row in edits):
            return ChangeEdits(self, edits, len(self.ids_P))
        if freeze != "none":
            raise UserError(f"freeze is {freeze!r}: circuits run freely, expected none")
        return CircuitEdits(self, edits)

    def generate(self, changes: Sequence[Change], max_new_tokens: int, freeze: str = "none") -> Continuation:
        """Continue the prompt greedily with changes.

        A change at a position is made there in every pass; one at a slice without an end goes on at the new tokens.
        With frozen attention, the prompt's own tokens attend as in the prompt, new ones as in the changed run. The
        prompt is run again for each token, so this is for tens of tokens.

        Args:
          changes: made together; a slice without an end, such as ``slice(3, None)``, also means the new tokens.
          max_new_tokens: 1 or more; fewer are made where the model's context ends.
          freeze: "none" or "attention".

        Raises:
          UserError: a feature or position does not exist, or there is no such mode.
        """
        if freeze not in ("none", "attention") or max_new_tokens < 1:
            raise UserError(
                f"freeze is {freeze!r} and max_new_tokens {max_new_tokens}: expected none or attention, and 1 or more"
            )
        length, ids, logits = len(self.ids_P), self.ids_P.tolist(), list[np.ndarray]()
        bounded = [
            change._replace(position=slice(*change.position.indices(length)))
            if isinstance(change.position, slice) and change.position.stop is not None
            else change
            for change in changes
        ]
        while len(ids) < min(length + max_new_tokens, self.model.config.context):
            plan = ChangeEdits(self, [bounded], len(ids))
            # Padded, so that a program serves several lengths.
            ids_T = np.pad(np.array(ids, np.int32), (0, padded(len(ids)) - len(ids)))
            x_BxTxD = jnp.tile(layers.embed(self.frozen, ids_T)[None], (2, 1, 1))  # the first row is unchanged
            for layer in range(self.model.config.n_layers):
                x_BxTxD, read, out = layers.run_layer(self.frozen, freeze, np.int32(layer), x_BxTxD, length)
                if (difference := plan.difference(0, layer, freeze, read[1:], out[1:])) is not None:
                    x_BxTxD = x_BxTxD.at[1:].add(difference)
            last_BxD = x_BxTxD[:, len(ids) - 1]
            logits.append(to_host(read_logits(self.frozen, "none", last_BxD[0], last_BxD[1:]))[0])
            ids.append(int(logits[-1].argmax()))
        none = np.empty((0, self.model.config.vocab), np.float32)
        return Continuation(np.array(ids[length:], np.int32), np.stack(logits) if logits else none)

    def pullback(
        self,
        layer_R: np.ndarray,
        position_R: np.ndarray,
        vector_RxD: np.ndarray,
        in_stream: bool = False,
    ) -> np.ndarray:
        """Return what each source adds to each target: the rows of a graph, fp32 [R, S].

        Args:
          layer_R: int32 layer whose transcoder reads; or, of directions of the stream, the layer that it enters.
          position_R: int32 positions.
          vector_RxD: the directions that are read.
          in_stream: whether the directions are of the stream.
        """
        row_RxS = np.zeros((len(layer_R), len(self.sources.nodes)), np.float32)
        rows = RowTracer(self, self.sources, len(layer_R))
        rows(layer_R, position_R, vector_RxD, row_RxS.__setitem__, in_stream)
        return row_RxS

    def pushforward(self, added: Vectors, count: int) -> Iterator[tuple[int, jax.Array, jax.Array]]:
        """Push vectors up through the linear layers.

        Args:
          added: vectors of ``count`` nodes, by the layer whose entering stream they are added to.
          count: number of nodes, padding included.

        Yields:
          Each layer from the lowest vector on; the changes of the stream entering it, [S, T, D]; and of the values that
          its heads mix, [N, T, K, S].
        """
        length = self.stream_LxTxD.shape[1]
        change_SxTxD = jnp.zeros((count, length, self.model.config.d_model), jnp.float32)
        first = int(added.layer_E.min()) if len(added.layer_E) else 0
        for layer in range(first, self.model.config.n_layers):
            change_SxTxD = change_SxTxD + added.at(layer, count, length)
            inputs = np.int32(layer), self.stream_LxTxD[layer], change_SxTxD
            leaving_SxTxD, values_NxTxKxS = layers.push_layer(self.frozen, *inputs)
            yield layer, change_SxTxD, values_NxTxKxS
            change_SxTxD = leaving_SxTxD

    def pull_values(self, read: Vectors, count: int) -> Iterator[tuple[int, jax.Array]]:
        """Pull vectors that are read down through the linear layers.

        Args:
          read: vectors of ``count`` nodes, by what reads them; see ``Vectors``.
          count: number of nodes, padding included.

        Yields:
          Each layer from the last down to 0, and the cotangents of the values by the head that mixes them,
          [N, R, G, T, K].
        """
        n_layers, length = self.model.config.n_layers, self.stream_LxTxD.shape[1]
        cotangent_RxTxD = jnp.asarray(read.at(n_layers, count, length))
        for layer in reversed(range(n_layers)):
            inputs = self.stream_LxTxD[layer], cotangent_RxTxD, read.at(layer, count, length)
            cotangent_RxTxD, wanted = layers.pull_layer(self.frozen, np.int32(layer), *inputs)
            yield layer, wanted


def open_set(transcoders: AnySet) -> LayerTranscoders:
    """Return an open set of transcoders of a path, of dictionaries in memory, or of itself."""
    if isinstance(transcoders, str | Path):
        return open_transcoders(transcoders)
    return transcoders if isinstance(transcoders, LayerTranscoders) else LayerTranscoders.of(transcoders)


def intervene(local: LocalModel, edits: Sequence[Sequence[Change]], freeze: str = "none") -> np.ndarray:
    """Return the logits at a prompt's last position with each row of changes, fp32 [R, V]; see ``LocalModel.run``."""
    logits_RxV = local.run(edits, freeze).logits_RxV
    assert logits_RxV is not None
    return logits_RxV


def _freeze_by_layer(freeze: str, freeze_until: int | None, n_layers: int) -> list[str]:
    """Return what each layer keeps of the prompt, and after them the final norm.

    Raises:
      UserError: there is no such mode, or no such layer.
    """
    if freeze not in FREEZE_MODES:
        raise UserError(f"freeze is {freeze!r}: expected one of {', '.join(FREEZE_MODES)}")
    if freeze_until is not None and not 0 <= freeze_until <= n_layers:
        raise UserError(f"freeze_until is {freeze_until}: expected a layer, 0 to {n_layers - 1}, or {n_layers}")
    until = n_layers + 1 if freeze_until is None else freeze_until
    after = "none"
    if freeze == "constrained":
        freeze, after = ("all", "all") if until >= n_layers else (freeze, "attention")
    return [freeze if layer < until else after for layer in range(n_layers + 1)]
