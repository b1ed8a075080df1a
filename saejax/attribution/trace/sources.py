"""The sources of a replacement model, laid out so that they are read off cotangents by products of matrices.

A source is a direction that is added at a place and a position. Place 0 is the stream entering layer 0, where tokens
come in; place l + 1 is the output of layer l's MLP, for features, errors, biases, and for the whole output at the first
positions, where no features are used. What a source contributes to a target is the dot product of its direction with
the target's cotangent there.

Directions at one place and position stand together, W of them in a block: one product with the cotangents of a whole
batch of targets. Blocks name rows of a table, so a feature that is active at many positions is there once.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from saejax.attribution.graph.nodes import BIAS, ERROR, FEATURE, FIRST_MLP, TOKEN, Nodes
from saejax.attribution.local.replacement import Replacement, padded
from saejax.parallel import sharding

WIDTH = 32  # directions in a block
STEP = 4  # blocks that are read at once
_ROWS, _BLOCKS = 512, 64  # least rows of the table, and blocks; see ``padded``
_NOWHERE = np.iinfo(np.int32).max  # position of a block that fills up its place


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SourceBank:
    """Blocks of directions, on the devices.

    Attributes:
      table_UxD: directions.
      row_BxW: int32 rows of the table in each block; slots that are left over name any.
      position_B: int32 position of each block, rising within a place.
    """

    table_UxD: jax.Array
    row_BxW: jax.Array
    position_B: jax.Array


@dataclasses.dataclass(frozen=True)
class Sources:
    """The sources and where they are in the bank.

    Attributes:
      nodes: the S sources; features first, biases last.
      bank: their directions.
      first_X: int32 first block of each place, and the end of the last.
      at_E: slot of each entry among all; the entries are the sources in order, but a bias has one at each position, a
        first_mlp one at each of the first positions, and a feature one in each layer that it writes to.
      factor_E: fp32, by which the direction is multiplied: a feature's activation.
      start_S: int64 first entry of each source.
    """

    nodes: Nodes
    bank: SourceBank
    first_X: np.ndarray
    at_E: np.ndarray
    factor_E: np.ndarray
    start_S: np.ndarray

    @classmethod
    def of(cls, replacement: Replacement, bias_nodes: bool = True) -> "Sources":
        """Lays out the sources of a replacement model.

        Args:
          bias_nodes: whether there are nodes for biases and for the MLP's output at the first position.
        """
        active, streams = replacement.active, replacement.streams
        layers, length, _ = streams.stream_LxTxD.shape
        tokens = len(replacement.ids_P)
        layer_E, position_E = (part.reshape(-1) for part in np.mgrid[:layers, :tokens])
        every_L, every_P = np.arange(layers), np.arange(tokens)
        row_A, decoder_UxD = _decoder_rows(replacement)
        owner_X, step_X = _writes(replacement)
        tables = [decoder_UxD, streams.error_LxTxD, streams.stream_LxTxD[0]]
        start_error, start_token = len(decoder_UxD), len(decoder_UxD) + layers * length
        kinds = [
            Nodes.of(FEATURE, active.layer_A, active.position_A, active.feature_A, active.value_A),
            Nodes.of(ERROR, layer_E, position_E),
            Nodes.of(TOKEN, -1, every_P, replacement.ids_P),
        ]
        counts = [np.bincount(owner_X), np.ones(len(layer_E) + tokens, int)]  # of entries, by source
        # Of each entry: its place, its position, and its row in the table.
        entries = [
            (active.layer_A[owner_X] + 1 + step_X, active.position_A[owner_X], row_A[owner_X] + step_X),
            (layer_E + 1, position_E, start_error + layer_E * length + position_E),
            (np.zeros_like(every_P), every_P, start_token + every_P),
        ]
        if bias_nodes:
            kinds += [Nodes.of(FIRST_MLP, every_L, 0), Nodes.of(BIAS, every_L, 0)]
            start, first = start_token + length, replacement.first
            layer_X, position_X = (part.reshape(-1) for part in np.mgrid[:layers, :first])
            entries.append((layer_X + 1, position_X, start + np.arange(layers * first)))
            bias_XxD = _biases(replacement)
            if len(bias_XxD) > layers:
                row_E = layer_E * length + position_E
            else:  # biases of decoders alone, and the first positions have none
                later = position_E >= first
                layer_E, position_E = layer_E[later], position_E[later]
                row_E = layer_E
            entries.append((layer_E + 1, position_E, start + layers * first + row_E))
            counts += [np.full(layers, first), np.full(layers, len(row_E) // layers)]
            tables += [streams.first_LxUxD, bias_XxD]
        nodes = Nodes.joined(*kinds)
        place_E, position_E, row_E = (np.concatenate(parts) for parts in zip(*entries, strict=True))
        factor_E = np.ones(len(place_E), np.float32)
        factor_E[: len(owner_X)] = active.value_A[owner_X]
        start_S = np.cumsum(np.concatenate([[0], *counts]))[:-1]
        at_E, first_X, row_BxW, position_B = _blocks(place_E, position_E, row_E, layers + 1, tokens)
        width = streams.last_D.shape[-1]
        table_UxD = jnp.concatenate([jnp.asarray(table).reshape(-1, width) for table in tables])
        bank = jax.device_put(SourceBank(table_UxD, row_BxW, position_B), sharding(replacement.model.mesh))
        return cls(nodes, bank, first_X, at_E, factor_E, start_S)

    def stop_X(self, length: int) -> np.ndarray:
        """The end of the blocks of each place that are at the first ``length`` positions, int32."""
        position_B, ends = np.asarray(self.bank.position_B), zip(self.first_X, self.first_X[1:], strict=False)
        return np.array([start + np.searchsorted(position_B[start:stop], length) for start, stop in ends], np.int32)

    def collect(self, read_BxRxW: np.ndarray) -> np.ndarray:
        """What each source contributes to each target, fp32 [R, S], from the products of all blocks."""
        flat_RxX = np.moveaxis(read_BxRxW, 1, 0).reshape(read_BxRxW.shape[1], -1)
        value_RxE = flat_RxX[:, self.at_E] * self.factor_E
        several = np.flatnonzero(np.diff(self.start_S, append=len(self.at_E)) > 1)
        if not len(several):
            return value_RxE
        single = self.start_S[several[0]]  # those before it have one entry each
        sums_RxX = np.add.reduceat(value_RxE[:, single:], self.start_S[several[0] :] - single, axis=1)
        return np.concatenate([value_RxE[:, :single], sums_RxX], axis=1)


def _writes(replacement: Replacement) -> tuple[np.ndarray, np.ndarray]:
    """Of each write of an active feature to a layer: which feature's it is, and how many layers above its own."""
    layers = replacement.model.config.n_layers
    count_L = np.array([replacement.transcoders.written_layers(layer) for layer in range(layers)])
    count_A = count_L[replacement.active.layer_A]
    owner_X = np.repeat(np.arange(len(count_A)), count_A)
    return owner_X, np.arange(len(owner_X)) - np.repeat(np.cumsum(count_A) - count_A, count_A)


def _decoder_rows(replacement: Replacement) -> tuple[np.ndarray, np.ndarray]:
    """The directions of the active features, those of each once [U, D], and the first of each active feature [A]."""
    active, parts = replacement.active, []
    row_A, known = np.empty(len(active), np.int64), 0
    for layer in range(replacement.model.config.n_layers):
        own = slice(*np.searchsorted(active.layer_A, [layer, layer + 1]))
        features, index_A = np.unique(active.feature_A[own], return_inverse=True)
        if len(features):
            writes = replacement.transcoders.writes(layer, features)
            row_A[own] = known + index_A * writes.shape[1]
            parts.append(writes.reshape(-1, writes.shape[2]))
            known += len(parts[-1])
    decoder_UxD = np.concatenate(parts)
    return row_A, np.pad(decoder_UxD, ((0, padded(known, _ROWS) - known), (0, 0)))


def _biases(replacement: Replacement) -> jax.Array:
    """The biases of each layer [L, D], or of each layer and position [L T, D] where the model's own differ."""
    streams = replacement.streams
    if streams.bias_LxTxD is None:
        return streams.b_dec_LxD
    later_T = np.arange(streams.bias_LxTxD.shape[1]) >= replacement.first  # those before have no decoder
    bias_LxTxD = streams.bias_LxTxD + jnp.where(later_T[None, :, None], streams.b_dec_LxD[:, None], 0)
    return bias_LxTxD.reshape(-1, bias_LxTxD.shape[-1])


def _blocks(
    place_E: np.ndarray, position_E: np.ndarray, row_E: np.ndarray, places: int, tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Entries in blocks by place and position: ``at_E``, ``first_X``, ``row_BxW`` and ``position_B``."""
    group_E = place_E * tokens + position_E
    order_E = np.argsort(group_E, kind="stable")
    count_G = np.bincount(group_E, minlength=places * tokens)
    within_E = np.empty(len(group_E), np.int64)
    within_E[order_E] = np.arange(len(group_E)) - np.repeat(np.cumsum(count_G) - count_G, count_G)
    blocks_G = -(-count_G // WIDTH)
    of_place_X = blocks_G.reshape(places, tokens).sum(axis=1)
    room_X = -(-of_place_X // STEP) * STEP
    first_X = np.concatenate([[0], np.cumsum(room_X)])
    before_G = np.cumsum(blocks_G) - blocks_G + np.repeat(first_X[:-1] - (np.cumsum(of_place_X) - of_place_X), tokens)
    at_E = (before_G[group_E] + within_E // WIDTH) * WIDTH + within_E % WIDTH
    total = padded(int(first_X[-1]), _BLOCKS)
    row_BxW, position_B = np.zeros((total, WIDTH), np.int32), np.full(total, _NOWHERE, np.int32)
    row_BxW.reshape(-1)[at_E] = row_E
    position_B[at_E // WIDTH] = position_E
    return at_E, first_X.astype(np.int32), row_BxW, position_B
