"""Rows of graphs: their targets, carried down through the frozen layers, and what each source contributes to them.

A target is a direction that is read: by a feature, from what the transcoder of its layer reads, or by a readout, from
the stream leaving the last layer. A readout is a logit, a difference of two, or any other ``Direction``. A logit is
read at the last position, through the final norm, whose factor is constant where the model is frozen. Its direction is
its column of the unembedding less the mean over the vocabulary, as only differences of logits matter. Capping of logits
is left out of it; probabilities come from the capped logits.

A target's cotangent starts where it reads and goes down through the transposed layers. Nothing of a position after the
target's reaches it, and nothing of the layers above; MLPs are not run, but for the norms before them.

A source is a direction that is added at a place and a position. Place 0 is the stream entering layer 0, where tokens
come in; place l + 1 is the output of layer l's MLP, for features, errors, biases, and for the whole output at the first
positions, where no features are used. What a source contributes to a target is the dot product of its direction with
the target's cotangent there.

Directions at one place and position stand together, W of them in a block: one product with the cotangents of a whole
batch of targets. Blocks name rows of a table, so a feature that is active at many positions is there once. Directions
of features come out of their transcoders some at a time and go straight to their place in the table, so the host never
has more of them than that; each device holds a part of the table's width.

1. ``read_targets`` gives the readouts.
2. ``Sources`` lays the sources out in blocks.
3. ``RowTracer`` puts targets of similar positions and layers into batches of chunks.
4. ``contributions`` carries a batch down, and reads off the products with the sources' blocks at each place.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from scipy.special import softmax

from saejax.arguments import as_index, as_numbers
from saejax.attribution.graph.data import BIAS, ERROR, FIRST_MLP, TOKEN, Nodes, name_difference
from saejax.attribution.local.dictionaries import READ_AT_ONCE, LayerDictionaries
from saejax.attribution.local.state import FrozenModel, LocalState, PromptRun, padded
from saejax.errors import UserError
from saejax.models import decoder
from saejax.models.attention import whole_prompt_tables
from saejax.models.config import DecoderConfig, RunRules
from saejax.models.language_model import LanguageModel
from saejax.models.layers import einsum, norm
from saejax.models.tokens import continuation_ids, is_known, token_text
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import AXES, BY_DOCUMENT, document_devices, fitting_sharding, sharding
from saejax.short_reprs import has_short_repr

Put = Callable[[np.ndarray, np.ndarray], None]  # takes indices of rows [B], and rows over all sources [B, S]
_LENGTHS = 3  # most different numbers of positions that are worked on, each of which is compiled
CHUNKS = 8  # chunks of targets in a batch, at the most
_WORTH = 2  # batches that have to be at hand for each length
TOKENS = {"cpu": 256, "gpu": 1 << 14, "tpu": 1 << 14}  # positions of a chunk's targets, together, on each device
WIDTH = 32  # directions in a block
STEP = 4  # blocks that are read at once
CHUNK = 512  # rows of the table that go to the devices together
_BLOCKS = 64  # least number of blocks; see ``LocalState.padded_size``
_NOWHERE = np.iinfo(np.int32).max  # position of a block that fills up its place
_TARGETS = 16  # least size to which targets are filled up


@has_short_repr
@dataclasses.dataclass(frozen=True, eq=False)
class Direction:
    """A direction that a graph explains in place of a logit, such as a probe's."""

    name: str  #: how the graph and its page call it
    vector_D: np.ndarray  #: its dot product with the final norm's output at the last position is explained


Target = str | int | tuple[str | int, str | int] | Direction


@has_short_repr
@dataclasses.dataclass(frozen=True)
class Readouts:
    """K logits, differences of two or directions, read from the stream leaving the last layer at the last position."""

    pair_Kx2: np.ndarray  #: int32 tokens of a difference; the second is -1 for a logit, both are for a direction
    column_KxD: np.ndarray  #: fp32 directions behind the final norm: columns of the unembedding, less mean or second
    vector_KxD: np.ndarray  #: fp32 the same, pulled back through the final norm at the prompt's scale
    value_K: np.ndarray  #: fp32 dot product with the stream, plus biases
    constant_K: np.ndarray  #: fp32 part of it that biases of the final norm and the unembedding are
    weight_K: np.ndarray  #: fp32 weight in influences: the probability of a token, else 1
    logit_K: np.ndarray  #: fp32 logit, or difference of two, or value of a direction
    labels: tuple[str, ...]  #: names

    def __len__(self) -> int:
        return len(self.labels)


def as_targets(targets: Any) -> list[Target]:
    """Return targets as a list; a single target is a list of one, not of its letters.

    Raises:
      UserError: they are neither.
    """
    if isinstance(targets, str | Integral | Direction) or getattr(targets, "ndim", 1) == 0:
        return [targets]
    try:
        return list(targets)
    except TypeError:
        raise UserError(
            f"targets is {targets!r:.60}: expected a token, as its id or a text, a Direction, or a list of such and of "
            "pairs of tokens; () for the most probable tokens"
        ) from None


def read_targets(run: PromptRun, targets: Sequence[Target], max_logits: int, logit_mass: float) -> Readouts:
    """Return the requested targets.

    Args:
      run: of the prompt.
      targets: tokens (ids, or texts of one token), pairs of them for the difference of their logits, or directions;
        none: the most probable tokens.
      max_logits: maximum number of tokens, where no targets are named.
      logit_mass: the smallest set of tokens with this total probability is taken, 0 to 1.

    Raises:
      UserError: a token does not exist, a text is not one token, or a direction has another width or is not finite.
    """
    probability_V = softmax(run.logits_V.astype(np.float64))
    if not targets:
        order = np.argsort(-probability_V, kind="stable")[: max(max_logits, 1)]
        # The token that reaches the share is one of them.
        count = int(np.searchsorted(np.cumsum(probability_V[order]), logit_mass)) + 1
        targets = [int(token) for token in order[:count]]
    model, text, count = run.model, token_text(run.model.tokenizer), len(targets)
    # Filled up, so that prompts with other numbers of targets share the program.
    pair_Xx2 = np.full((padded(count, _TARGETS), 2), -1, np.int32)
    pair_Xx2[:count] = target_pairs(model, targets)
    given_XxD = np.zeros((len(pair_Xx2), model.config.d_model), np.float32)
    for place, target in enumerate(targets):
        if isinstance(target, Direction):
            given_XxD[place] = target.vector_D
    arrays = pull_targets(model.config, run.rules, model.params, run.last_D, *pair_Xx2.T, given_XxD)
    column_KxD, vector_KxD, value_K, constant_K = (to_host(array)[:count] for array in arrays)
    first_K, second_K = pair_Xx2[:count].T
    single_K, given_K = second_K < 0, first_K < 0
    names = [target.name if isinstance(target, Direction) else "" for target in targets]
    return Readouts(
        pair_Kx2=pair_Xx2[:count],
        column_KxD=column_KxD,
        vector_KxD=vector_KxD,
        value_K=value_K,
        constant_K=constant_K,
        weight_K=np.where(single_K & ~given_K, probability_V[first_K], 1).astype(np.float32),
        logit_K=np.where(given_K, value_K, run.logits_V[first_K] - np.where(single_K, 0, run.logits_V[second_K])),
        labels=tuple(
            name or (text(a) if b < 0 else name_difference(text(a), text(b)))
            for name, (a, b) in zip(names, pair_Xx2[:count].tolist(), strict=True)
        ),
    )


def target_pairs(model: LanguageModel, targets: Sequence[Target]) -> list[tuple[int, int]]:
    """Return the token of each target and the one whose logit is subtracted, -1 for none.

    Raises:
      UserError: a target is no token and no pair of two different ones, or appears twice; or a direction has no name
        of its own, or another shape than the stream, or is not finite, or zero.
    """
    pairs, names = [], set[str]()
    for target in targets:
        if isinstance(target, Direction):
            vector, width = as_numbers(target.vector_D), model.config.d_model
            if (
                not isinstance(target.name, str)
                or not target.name
                or vector is None
                or vector.shape != (width,)
                or not np.isfinite(vector).all()
                or not np.any(vector)  # of nothing, completeness would be 1
            ):
                shape = "no numbers" if vector is None else f"the shape {vector.shape}"
                raise UserError(
                    f"the direction {target.name!r} has {shape}: expected a text as its name, and {width} finite "
                    "numbers, not all 0"
                )
            if target.name in names:
                raise UserError(f"two directions are called {target.name!r}: expected a name for each")
            names.add(target.name)
            pairs.append((-1, -1))
            continue
        tokens = tuple(target) if isinstance(target, tuple | list) else (target,)
        pair = [token_of(model, token) for token in tokens[:2]]
        if not 1 <= len(tokens) <= 2 or len(set(pair)) < len(tokens):
            raise UserError(f"the target {target!r} is no difference of two logits: expected two tokens that differ")
        pairs.append((pair[0], pair[1] if pair[1:] else -1))
        if pairs.count(pairs[-1]) > 1:
            raise UserError(f"the target {target!r} appears twice: expected each target once")
    return pairs


def token_of(model: LanguageModel, target: str | int) -> int:
    """Return the id of a token; of a text, the one with which it continues another, taken as it is written.

    Raises:
      UserError: the text is not one token, or there is no such token.
    """
    if isinstance(target, str):
        ids = continuation_ids(model.tokenizer, target)
        if len(ids) != 1 or not is_known(model.tokenizer, target, ids):
            pieces = ", ".join(map(repr, map(token_text(model.tokenizer), ids)))
            what = f"{len(ids)} tokens" if len(ids) != 1 else "unknown to the tokenizer"
            raise UserError(f"the target {target!r} is {what}, {pieces}: expected one, such as the first")
        return int(ids[0])
    token = as_index(target)
    if not 0 <= token < model.config.vocab:
        raise UserError(f"the target token {target!r:.60} does not exist: expected 0 to {model.config.vocab - 1}")
    return token


@functools.partial(jax.jit, static_argnums=(0, 1))
def pull_targets(
    config: DecoderConfig,
    rules: RunRules,
    params: decoder.Params,
    last_D: jax.Array,
    first_K: jax.Array,
    second_K: jax.Array,
    given_KxD: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return targets, of logits before capping, as directions of the stream that leaves the last layer.

    Args:
      config: of the decoder (static).
      rules: say whether the final norm's factor is constant.
      params: of the model.
      last_D: that stream at the last position.
      first_K: token ids; -1 where a direction is given.
      second_K: token ids that are subtracted; -1 for the mean over the vocabulary.
      given_KxD: the directions behind the final norm that are given.

    Returns:
      The directions [K, D] behind the final norm and before it, the values [K], and the part of them [K] that biases
      are.
    """
    given_K = first_K < 0
    embed_VxD = params["embed_VxD"] if config.tied else params["unembed_DxV"].T
    rows_VxD = embed_VxD.astype(last_D.dtype)

    def less(rows: jax.Array) -> jax.Array:
        """Return the rows of the first tokens less the rows of the second ones or the mean."""
        single = jnp.reshape(second_K < 0, (-1,) + (1,) * (rows.ndim - 1))
        # Less the mean over the vocabulary, as only differences of logits matter.
        return rows[first_K] - jnp.where(single, jnp.mean(rows, axis=0, keepdims=True), rows[second_K])

    column_KxD = jnp.where(given_K[:, None], given_KxD.astype(last_D.dtype), less(rows_VxD))
    # By the rules the norm's factor is constant where the model is frozen; then this is its transpose.
    final_D, pull = jax.vjp(functools.partial(norm, config, rules, params, "final_norm"), last_D)
    constant_K = jnp.zeros(len(column_KxD), last_D.dtype)
    if "final_norm_bias_D" in params:
        constant_K += einsum("kd,d->k", column_KxD, params["final_norm_bias_D"].astype(last_D.dtype))
    bias = jnp.where(given_K, 0, less(params["unembed_bias_V"].astype(last_D.dtype))) if config.unembed_bias else 0
    value_K = einsum("kd,d->k", column_KxD, final_D) + bias
    return column_KxD, jax.vmap(pull)(column_KxD)[0], value_K, constant_K + bias


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
        width = transcoders.written_layers(layer) * transcoders.configs[0].d_in
        size = max(READ_AT_ONCE // width, 1)
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


def batch_tokens(platform: str, length: int) -> int:
    """Return the total positions of a batch's targets on each device of a platform, for prompts of a length."""
    return CHUNKS * max(TOKENS[platform], length)


def chunk_size(platform: str, length: int, mesh: Mesh) -> int:
    """Return the number of targets of a chunk on a platform's devices, for prompts of a length."""
    return max(TOKENS[platform] // length, 1) * document_devices(mesh)


class RowTracer:
    """Attributes targets in batches.

    Args:
      state: the model.
      sources: what contributions come from.
      count: number of targets that will come.
    """

    def __init__(self, state: LocalState, sources: Sources, count: int):
        self._state, self._sources = state, sources
        mesh, length = state.model.mesh, state.stream_LxTxD.shape[1]
        batches = count * length // (TOKENS[mesh.devices.flat[0].platform] * document_devices(mesh) * CHUNKS)
        # Shorter lengths only where enough targets share them to pay for another program.
        step = -(-length // min(max(batches // _WORTH, 1), _LENGTHS))
        self._lengths = np.array([*range(step, length, step), length])
        self._sizes = [chunk_size(mesh.devices.flat[0].platform, int(length), mesh) for length in self._lengths]
        # As many targets of all lengths go together: their products with the sources are what a batch takes.
        self._chunks = [max(CHUNKS * self._sizes[-1] // size, 1) for size in self._sizes]
        self._streams = [state.stream_LxTxD[:, :length] for length in self._lengths]
        self._stops = [sources.stop_X(length) for length in self._lengths]

    def __call__(
        self,
        layer_R: np.ndarray,
        position_R: np.ndarray,
        vector_RxD: np.ndarray,
        put: Put,
        in_stream: bool = False,
    ) -> None:
        """Compute what each source contributes to each target.

        Args:
          layer_R: int32 layer whose transcoder reads; or, of the stream, the layer that it enters.
          position_R: int32 where.
          vector_RxD: the directions that are read.
          put: takes rows and what they are, in any order and from more than one thread.
          in_stream: whether the directions are of the stream.
        """

        def run(batch: tuple[int, list[np.ndarray]]) -> None:
            index, chunks = batch
            read_BxNxRxW = to_host(self._start(index, chunks, layer_R, position_R, vector_RxD, in_stream))
            for chunk, targets in enumerate(chunks):
                put(targets, self._sources.collect(read_BxNxRxW[:, chunk, : len(targets)]))

        # One such program leaves cores of a CPU idle, so two run at a time, on other devices one beside its sorting.
        # Programs that speak with each other over several devices have to start in one order everywhere.
        workers = 2 if self._state.model.mesh.size == 1 else 1
        with ThreadPoolExecutor(workers) as pool:
            # Through a list, so that an error in a thread is raised here.
            list(pool.map(run, self._batches(layer_R, position_R, in_stream)))

    def _batches(
        self, layer_R: np.ndarray, position_R: np.ndarray, in_stream: bool
    ) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Yield batches of chunks of targets of similar position and layer: the index of their length, and the targets.

        Directions of the stream share a chunk only with others of the same layer. The longest come first, so that of
        workers side by side none is left alone with a long one.
        """
        length_R = np.searchsorted(self._lengths, position_R + 1)
        for index in reversed(range(len(self._lengths))):
            targets = np.flatnonzero(length_R == index)
            # From high layers to low, in the order in which the program takes chunks up.
            targets = targets[np.argsort(-layer_R[targets], kind="stable")]
            changes = np.flatnonzero(np.diff(layer_R[targets]) * in_stream) + 1
            size = self._sizes[index]
            chunks = [
                part[start : start + size] for part in np.split(targets, changes) for start in range(0, len(part), size)
            ]
            for start in range(0, len(chunks), self._chunks[index]):
                yield index, chunks[start : start + self._chunks[index]]

    def _start(
        self,
        index: int,
        chunks: list[np.ndarray],
        layer_X: np.ndarray,
        position_X: np.ndarray,
        vector_XxD: np.ndarray,
        in_stream: bool,
    ) -> jax.Array:
        """Start the program on a batch; chunks are filled up with copies, the batch with chunks that never start."""
        filled = np.stack([np.resize(targets, self._sizes[index]) for targets in chunks])
        filled_NxR = filled[np.minimum(np.arange(self._chunks[index]), len(chunks) - 1)]
        start_N = np.zeros(self._chunks[index], np.int32)
        # A transcoder reads within its layer, which a target then goes down through, too.
        start_N[: len(chunks)] = layer_X[filled].max(axis=1) + (not in_stream)
        model, sources = self._state.model, self._sources
        arrays = vector_XxD[filled_NxR], layer_X[filled_NxR], position_X[filled_NxR]
        specs = ((None, BY_DOCUMENT, *[None] * (array.ndim - 2)) for array in arrays)
        vector_NxRxD, layer_NxR, position_NxR = (
            jax.device_put(array, fitting_sharding(model.mesh, array.shape, *spec))
            for array, spec in zip(arrays, specs, strict=True)
        )
        batch = TargetBatch(vector_NxRxD, layer_NxR, position_NxR, start_N)
        places = sources.first_X, self._stops[index]
        return contributions(self._state.frozen, model.mesh, self._streams[index], sources.bank, *places, batch)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TargetBatch:
    """Targets that go down together, in N chunks of R; the chunks start from high layers to low."""

    vector_NxRxD: jax.Array  #: the directions that are read
    layer_NxR: jax.Array  #: int32 layer whose transcoder reads; for a direction of the stream, the layer of ``start_N``
    position_NxR: jax.Array  #: int32 where
    #: int32, number of layers that the highest target of a chunk goes down through; 0 for a chunk that only fills up
    #: the batch.
    start_N: jax.Array


@functools.partial(jax.jit, static_argnums=1)
def contributions(
    frozen: FrozenModel,
    mesh: Mesh,
    stream_LxTxD: jax.Array,
    bank: SourceBank,
    first_X: jax.Array,
    stops: jax.Array,
    batch: TargetBatch,
) -> jax.Array:
    """Return the products of all blocks of sources with the cotangents of a batch of targets, fp32 [B, N, R, W].

    The constants of a layer, above all its attention weights, are computed once for all chunks. A chunk joins at the
    layer where its highest target reads.

    Args:
      frozen: the model.
      mesh: the devices (static).
      stream_LxTxD: the stream entering each layer, at no more positions than the targets need.
      bank: the sources' vectors in blocks.
      first_X: index of the first block of each place.
      stops: index after the last block of each place at these positions.
      batch: the targets.
    """
    length = stream_LxTxD.shape[1]
    tables, chunks = whole_prompt_tables(frozen.config, length), jnp.arange(len(batch.start_N))

    def placed(chunk: jax.Array, layer: jax.Array) -> jax.Array:
        """Return the directions of a chunk's targets at a layer, at their positions, else 0; [R, T, D]."""
        at_RxT = jnp.arange(length)[None] == batch.position_NxR[chunk][:, None]
        here_RxT = at_RxT & (batch.layer_NxR[chunk] == layer)[:, None]
        return jnp.where(here_RxT[..., None], batch.vector_NxRxD[chunk][:, None], 0)

    def read_off(place: jax.Array, cotangent_NxRxTxD: jax.Array, read_BxNxRxW: jax.Array) -> jax.Array:
        blocks = first_X[place], stops[place]
        return _read_off(bank, *blocks, batch.start_N >= place, cotangent_NxRxTxD, read_BxNxRxW)

    def down(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Take all chunks down through one layer."""
        layer = batch.start_N[0] - 1 - index
        x_TxD = lax.dynamic_index_in_dim(stream_LxTxD, layer, keepdims=False)
        _, pull = jax.vjp(lambda x_TxD: frozen.layer(layer, tables, x_TxD), x_TxD)

        def pull_chunk(chunk: jax.Array, cotangent_NxRxTxD: jax.Array) -> jax.Array:
            in_RxTxD = jax.vmap(lambda *both: pull(both)[0])(cotangent_NxRxTxD[chunk], placed(chunk, layer))
            return lax.dynamic_update_index_in_dim(cotangent_NxRxTxD, in_RxTxD, chunk, 0)

        cotangent_NxRxTxD, read_BxNxRxW = carry
        read_BxNxRxW = read_off(layer + 1, cotangent_NxRxTxD, read_BxNxRxW)
        # Chunks are in the order in which they begin, so that these are the first ones.
        begun = jnp.sum(batch.start_N > layer)
        return lax.fori_loop(0, begun, pull_chunk, cotangent_NxRxTxD), read_BxNxRxW

    carry = _by_target(mesh, jax.vmap(placed)(chunks, batch.start_N), bank)
    cotangent_NxRxTxD, read_BxNxRxW = lax.fori_loop(0, batch.start_N[0], down, carry)
    return read_off(jnp.int32(0), cotangent_NxRxTxD, read_BxNxRxW)


def _read_off(
    bank: SourceBank,
    first: jax.Array,
    stop: jax.Array,
    begun_N: jax.Array,
    cotangent_NxRxTxD: jax.Array,
    read_BxNxRxW: jax.Array,
) -> jax.Array:
    """Fill in the products of a place's blocks with all cotangents there, 0 for chunks that start further down."""

    def body(index: jax.Array, read_BxNxRxW: jax.Array) -> jax.Array:
        start = first + index * STEP
        position_C = lax.dynamic_slice_in_dim(bank.position_B, start, STEP)
        row_CxW = lax.dynamic_slice_in_dim(bank.row_BxW, start, STEP)
        # Blocks that only fill up a place are at a position out of range, and read 0.
        at_NxRxCxD = cotangent_NxRxTxD.at[:, :, position_C].get(mode="fill", fill_value=0)
        at_NxRxCxD = jnp.where(begun_N[:, None, None, None], at_NxRxCxD, 0)
        products_CxNxRxW = einsum("nrcd,cwd->cnrw", at_NxRxCxD, bank.table_UxD[row_CxW])
        return lax.dynamic_update_slice(read_BxNxRxW, products_CxNxRxW, (start, 0, 0, 0))

    return lax.fori_loop(0, (stop - first + STEP - 1) // STEP, body, read_BxNxRxW)


def _by_target(mesh: Mesh, cotangent_NxRxTxD: jax.Array, bank: SourceBank) -> tuple[jax.Array, jax.Array]:
    """Return the cotangents and the products, 0 at first, each chunk's targets split over the devices.

    Over ``model`` cotangents are split by width, as weights are, and so products, which are complete, by target.
    """
    chunks, targets = cotangent_NxRxTxD.shape[:2]
    read_BxNxRxW = jnp.zeros((len(bank.position_B), chunks, targets, WIDTH), cotangent_NxRxTxD.dtype)
    arrays = cotangent_NxRxTxD, read_BxNxRxW
    specs = (None, BY_DOCUMENT, None, "model"), (None, None, AXES, None)
    fits = tuple(fitting_sharding(mesh, array.shape, *spec) for array, spec in zip(arrays, specs, strict=True))
    return lax.with_sharding_constraint(arrays, fits)
