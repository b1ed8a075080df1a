"""The sources of a local replacement model, laid out so that they are read off cotangents by products of matrices.

A source is a direction that is added at a place and a position. Place 0 is the stream entering layer 0, where tokens
come in; place l + 1 is the output of layer l's MLP, for features, errors, biases, and for the whole output at the first
positions, where no features are used. What a source contributes to a target is the dot product of its direction with
the target's cotangent there.

Directions at one place and position stand together, W of them in a block: one product with the cotangents of a whole
batch of targets. Blocks name rows of a table, so a feature that is active at many positions is there once. Directions
of features come out of their transcoders some at a time and go straight to their place in the table, so the host never
has more of them than that; each device holds a part of the table's width.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

from saejax.attribution.graph.nodes import BIAS, ERROR, FIRST_MLP, TOKEN, Nodes
from saejax.attribution.local.dictionaries import READ_AT_ONCE, LayerDictionaries
from saejax.attribution.local.state import LocalState
from saejax.parallel.mesh import fitting_sharding, sharding

WIDTH = 32  # directions in a block
STEP = 4  # blocks that are read at once
CHUNK = 512  # rows of the table that go to the devices together
_BLOCKS = 64  # least number of blocks; see ``LocalState.padded_size``
_NOWHERE = np.iinfo(np.int32).max  # position of a block that fills up its place


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SourceBank:
    """Blocks of directions, on the devices."""

    table_UxD: jax.Array  #: directions
    row_BxW: jax.Array  #: int32 rows of the table in each block; slots that are left over name any
    position_B: jax.Array  #: int32 position of each block, rising within a place


@dataclasses.dataclass(frozen=True)
class Sources:
    """The sources and where they are in the bank."""

    nodes: Nodes  #: the S sources; features first, biases last
    bank: SourceBank  #: their directions
    first_X: np.ndarray  #: int32 first block of each place, and the end of the last
    #: slot of each entry among all; the entries are the sources in order, but a bias has one at each position, a
    #: first_mlp one at each of the first positions, and a feature one in each layer that it writes to.
    at_E: np.ndarray
    factor_E: np.ndarray  #: fp32 factor of the direction: a feature's activation
    start_S: np.ndarray  #: int64 first entry of each source

    @classmethod
    def of(cls, state: LocalState) -> "Sources":
        """Lay out the sources of a local replacement model."""
        of_features, features = _features(state)
        non_features = [_errors(state), _tokens(state), _first_mlps(state), _biases(state)]
        first = [part.table_UxD for part in non_features]  # features come last in the table, and first of the sources
        parts, ends = [of_features, *non_features], np.cumsum([0, *map(len, first)])
        starts = zip(parts, [ends[-1], *ends], strict=False)
        row_E = np.concatenate([part.row_E + start for part, start in starts])
        place_E = np.concatenate([part.place_E for part in parts])
        position_E = np.concatenate([part.position_E for part in parts])
        factor_E = np.ones(len(place_E), np.float32)
        # A row of the table serves all positions of a feature, whose activations differ.
        factor_E[: len(of_features.place_E)] = np.repeat(state.active.value_A, of_features.count_S)
        at_E, first_X, row_BxW, position_B = _blocks(state, place_E, position_E, row_E)
        mesh, transcoders = state.model.mesh, state.dictionaries
        room = state.padded_size("directions", int(of_features.row_E.max()) + 1 + CHUNK, CHUNK)
        table_UxD = fill_table(mesh, first, read_directions(transcoders, features), room)
        row_BxW, position_B = jax.device_put((row_BxW, position_B), sharding(mesh))
        count_S = np.concatenate([part.count_S for part in parts])
        return cls(
            Nodes.joined(*(part.nodes for part in parts)),
            SourceBank(table_UxD, row_BxW, position_B),
            first_X,
            at_E,
            factor_E,
            np.cumsum(count_S) - count_S,
        )

    def stop_X(self, length: int) -> np.ndarray:
        """Return the end of the blocks of each place that are at the first ``length`` positions, int32."""
        position_B, ends = np.asarray(self.bank.position_B), zip(self.first_X, self.first_X[1:], strict=False)
        return np.array([start + np.searchsorted(position_B[start:stop], length) for start, stop in ends], np.int32)

    def collect(self, read_BxRxW: np.ndarray) -> np.ndarray:
        """Return what each source contributes to each target, fp32 [R, S], from the products of all blocks."""
        flat = np.moveaxis(read_BxRxW, 1, 0).reshape(read_BxRxW.shape[1], -1)
        value_RxE = np.take(flat, self.at_E, axis=1)  # in the order of rows, unlike what indices give
        value_RxE *= self.factor_E
        several = np.flatnonzero(np.diff(self.start_S, append=len(self.at_E)) > 1)
        if not len(several):
            return value_RxE
        single = self.start_S[several[0]]  # those before it have one entry each
        value_RxS = np.empty((len(value_RxE), len(self.start_S)), np.float32)
        value_RxS[:, : several[0]] = value_RxE[:, :single]
        starts = self.start_S[several[0] :] - single
        np.add.reduceat(value_RxE[:, single:], starts, axis=1, out=value_RxS[:, several[0] :])
        return value_RxS


class _Part(NamedTuple):
    """The sources of one kind."""

    nodes: Nodes  #: S of them
    count_S: np.ndarray  #: how many entries each has, which come in the order of the sources
    #: place_E, position_E, row_E: where each entry is, and its row of the table.
    place_E: np.ndarray
    position_E: np.ndarray
    row_E: np.ndarray
    table_UxD: jax.Array  #: directions; of features none, which come out of their transcoders


def _features(state: LocalState) -> tuple[_Part, list[np.ndarray]]:
    """Return the active features, each with an entry for each layer that it writes to; the table has each feature once.

    Returns:
      The part, and the features of each layer in the order of the table.
    """
    active, transcoders = state.active, state.dictionaries
    row_A, rows_before, features = np.empty(len(active), np.int64), 0, []
    for layer in range(state.model.config.n_layers):
        of_layer = active.of_layer(layer)
        features_U, index = np.unique(active.feature_A[of_layer], return_inverse=True)
        row_A[of_layer] = rows_before + index * transcoders.written_layers(layer)
        rows_before += len(features_U) * transcoders.written_layers(layer)
        features.append(features_U)
    written_L = np.array([transcoders.written_layers(layer) for layer in range(len(transcoders.configs))])
    count_A = written_L[active.layer_A]
    of_E = np.repeat(np.arange(len(active)), count_A)
    above_E = np.arange(len(of_E)) - np.repeat(np.cumsum(count_A) - count_A, count_A)
    place_E = active.layer_A[of_E] + 1 + above_E
    none_0xD = state.stream_LxTxD[0, :0]
    return _Part(active.nodes, count_A, place_E, active.position_A[of_E], row_A[of_E] + above_E, none_0xD), features


def _errors(state: LocalState) -> _Part:
    layers, length, width = state.error_LxTxD.shape
    # Only of the prompt's own tokens, though the table has rows for its padding.
    layer_S, position_S = (part.reshape(-1) for part in np.mgrid[:layers, : len(state.ids_P)])
    rows = layer_S * length + position_S
    table_UxD = state.error_LxTxD.reshape(-1, width)
    return _Part(Nodes.of(ERROR, layer_S, position_S), np.ones_like(layer_S), layer_S + 1, position_S, rows, table_UxD)


def _tokens(state: LocalState) -> _Part:
    every_P = np.arange(len(state.ids_P))
    nodes = Nodes.of(TOKEN, -1, every_P, state.ids_P)
    table_TxD = state.stream_LxTxD[0]
    return _Part(nodes, np.ones_like(every_P), np.zeros_like(every_P), every_P, every_P, table_TxD)


def _first_mlps(state: LocalState) -> _Part:
    layers, first, width = state.first_LxUxD.shape
    layer_E, position_E = (part.reshape(-1) for part in np.mgrid[:layers, :first])
    nodes, table_UxD = Nodes.of(FIRST_MLP, np.arange(layers), 0), state.first_LxUxD.reshape(-1, width)
    return _Part(nodes, np.full(layers, first), layer_E + 1, position_E, np.arange(len(layer_E)), table_UxD)


def _biases(state: LocalState) -> _Part:
    """Return the biases of each layer, with an entry at each position; one row for all if only decoders have some."""
    bias_LxTxD, first = state.bias_LxTxD, state.first
    layers, length, width = state.stream_LxTxD.shape
    if bias_LxTxD is None:  # biases of decoders alone, and the first positions have none
        begin, table_UxD = first, state.b_dec_LxD
    else:
        later_T = np.arange(length) >= first
        # At the first positions the MLP's output is a source as a whole, its bias included.
        own_LxTxD = jnp.where(later_T[None, :, None], state.b_dec_LxD[:, None], 0)
        begin, table_UxD = 0, (bias_LxTxD + own_LxTxD).reshape(-1, width)
    layer_E, position_E = (part.reshape(-1) for part in np.mgrid[:layers, begin : len(state.ids_P)])
    row_E = layer_E if bias_LxTxD is None else layer_E * length + position_E
    count_S = np.bincount(layer_E, minlength=layers)
    return _Part(Nodes.of(BIAS, np.arange(layers), 0), count_S, layer_E + 1, position_E, row_E, table_UxD)


def _blocks(
    state: LocalState, place_E: np.ndarray, position_E: np.ndarray, row_E: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the entries in blocks by place and position: ``at_E``, ``first_X``, ``row_BxW`` and ``position_B``."""
    places, tokens = state.model.config.n_layers + 1, len(state.ids_P)
    group_E = place_E * tokens + position_E
    order_E = np.argsort(group_E, kind="stable")
    count_G = np.bincount(group_E, minlength=places * tokens)
    within_E = np.empty(len(group_E), np.int64)
    within_E[order_E] = np.arange(len(group_E)) - np.repeat(np.cumsum(count_G) - count_G, count_G)
    blocks_G = -(-count_G // WIDTH)
    of_place = blocks_G.reshape(places, tokens).sum(axis=1)
    # Whole steps for each place: blocks that are read together are of one place.
    room = -(-of_place // STEP) * STEP
    first_X = np.concatenate([[0], np.cumsum(room)])
    before_G = np.cumsum(blocks_G) - blocks_G + np.repeat(first_X[:-1] - (np.cumsum(of_place) - of_place), tokens)
    at_E = (before_G[group_E] + within_E // WIDTH) * WIDTH + within_E % WIDTH
    # Rounded up and kept over prompts, which then share programs.
    total = state.padded_size("blocks", int(first_X[-1]), _BLOCKS)
    row_BxW, position_B = np.zeros((total, WIDTH), np.int32), np.full(total, _NOWHERE, np.int32)
    row_BxW.reshape(-1)[at_E] = row_E
    position_B[at_E // WIDTH] = position_E
    return at_E, first_X.astype(np.int32), row_BxW, position_B


def read_directions(transcoders: LayerDictionaries, features: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the directions that features write to, layer by layer, in parts, fp32 [X, D].

    A feature has a row for each layer that it writes to.

    Args:
      transcoders: the set.
      features: the wanted ones of each layer.
    """
    for layer, features_U in enumerate(features):
        each = transcoders.written_layers(layer) * transcoders.configs[0].d_in
        size = max(READ_AT_ONCE // each, 1)
        for start in range(0, len(features_U), size):
            writes_UxXxD = transcoders.writes(layer, features_U[start : start + size])
            yield writes_UxXxD.reshape(-1, writes_UxXxD.shape[2])


def fill_table(mesh: Mesh, first: list[jax.Array], parts: Iterator[np.ndarray], rows: int) -> jax.Array:
    """Build a table on the devices: rows that are there already, rows that come in parts, then zeros.

    Args:
      mesh: the devices, over whose axis ``model`` the table's width is split.
      first: arrays with the first rows, each [U, D].
      parts: arrays with the next rows, fp32 [X, D].
      rows: number of rows reserved for ``parts``, ``CHUNK`` more than they have at the least.

    Returns:
      fp32 [U, D].
    """
    start, width = sum(map(len, first)), first[0].shape[1]
    where = fitting_sharding(mesh, (start + rows, width), None, "model")
    by_width = fitting_sharding(mesh, (CHUNK, width), None, "model")
    table_UxD = _start_table(where, rows, first)
    for part_XxD in parts:
        for begin in range(0, len(part_XxD), CHUNK):
            # Whole chunks, so that one program writes them all: the next one overwrites what fills this one up.
            chunk_CxD = np.zeros((CHUNK, width), np.float32)
            chunk_CxD[: len(part_XxD) - begin] = part_XxD[begin : begin + CHUNK]
            # ``jax.device_put`` would ask all processes each time whether they have the same.
            placed_CxD = jax.make_array_from_callback(chunk_CxD.shape, by_width, chunk_CxD.__getitem__)
            table_UxD = _write_rows(where, table_UxD, placed_CxD, np.int32(start + begin))
        start += len(part_XxD)
    return table_UxD


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start_table(where: NamedSharding, rows: int, first: list[jax.Array]) -> jax.Array:
    """Return the table with its first rows, and ``rows`` empty ones."""
    return lax.with_sharding_constraint(jnp.pad(jnp.concatenate(first), ((0, rows), (0, 0))), where)


# Donated: the table is the largest array here, and is written in place.
@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _write_rows(where: NamedSharding, table_UxD: jax.Array, chunk_CxD: jax.Array, start: jax.Array) -> jax.Array:
    """Return the table with some rows in their place."""
    table_UxD = lax.dynamic_update_slice_in_dim(table_UxD, chunk_CxD, start, 0)
    return lax.with_sharding_constraint(table_UxD, where)
