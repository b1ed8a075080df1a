"""Rows of the engine: which (edit, prompt) pairs are run, on which of their tokens, in which batches and programs.

A *row* is one such pair: the prompt's tokens from the first that the edit changes to the last. What stands at a token
depends on the tokens before it and on what was changed there, so rows of one edit whose prompts begin alike share their
first tokens; each is run once (``SharedPrefixBatch``). The set of an edit holds the features that it names.

Letters of the programs: B prompts with padding, P prompts, K gathered features, S shards, R rows of a shard, N tokens
of a shard.
"""

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import Dictionary
from saejax.dictionaries.matmul import matmul
from saejax.interventions.edits import ActivationReplacement, FeatureEdits
from saejax.interventions.split_model import SHORT, CleanRun, SplitModel, of_features
from saejax.models import decoder
from saejax.models.lengths import bucket_lengths
from saejax.models.split import PrefixKV, SharedPrefixBatch, SplitPoint
from saejax.parallel.mesh import document_devices, row_sharding, sharding
from saejax.reductions import log_sum_exp

_STEP = 8  # tokens are filled up to a multiple of this
_ROWS = 32  # rows of a batch, at least
_SHARES = (1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)  # of a full batch's tokens, to which smaller ones are filled up
_PROGRAM = 16384  # tokens whose attention runs in the time in which a program of another shape is compiled, roughly


@dataclasses.dataclass(frozen=True)
class SetRows:
    """Rows on the prompts of one clean run; arrays [N]."""

    #: set_N and place_N: the set, and the prompt's place in the clean run.
    set_N: np.ndarray
    place_N: np.ndarray
    first_N: np.ndarray  #: the first token that is run; the last is the prompt's

    def __getitem__(self, chosen: np.ndarray | slice) -> "SetRows":
        return SetRows(self.set_N[chosen], self.place_N[chosen], self.first_N[chosen])


@dataclasses.dataclass(frozen=True)
class RowBatch:
    """Rows that go through the layers above the site together, in S shards."""

    shards: list[SetRows]  #: the rows of each
    #: size, length, tokens: rows, tokens of a row, and tokens of a shard, with filler: R, T and N.
    size: int
    length: int
    tokens: int
    #: all features that the sets hold, rising, the last one repeated; the same object in all batches that share them.
    features_K: np.ndarray

    def tree(self, prompts: "Prompts", ends: int = 1) -> tuple[SharedPrefixBatch, np.ndarray]:
        """Return the tree of the rows, and which of its tokens are each row's last ones.

        The last tokens, ``ends`` of each row, stand row after row, [S, C]. Padding stands at a real place.
        """
        s, r, n, t = len(self.shards), self.size, self.tokens, self.length
        tree = SharedPrefixBatch(*(np.zeros(shape, np.int32) for shape in ((s, r), (s, r), (s, r, t), (s, n), (s, n))))
        end_SxRxC = np.zeros((s, r, ends), np.int32)
        for shard, rows in enumerate(self.shards):
            key_ExT, real_ExT = prompts.keys(rows, t)
            _, at_U, token_M = np.unique(key_ExT[real_ExT], return_index=True, return_inverse=True)
            filled_rows, count = slice(len(rows.set_N)), len(at_U)
            tree.prompt_SxR[shard, filled_rows], tree.first_SxR[shard, filled_rows] = rows.place_N, rows.first_N
            token_ExT = tree.token_index_SxRxT[shard, filled_rows]
            token_ExT[real_ExT] = token_M
            row_M, column_M = np.nonzero(real_ExT)
            tree.row_SxN[shard, :count], tree.column_SxN[shard, :count] = row_M[at_U], column_M[at_U]
            column_ExC = real_ExT.sum(axis=1)[:, None] - np.arange(ends, 0, -1)
            end_SxRxC[shard, filled_rows] = np.take_along_axis(token_ExT, column_ExC, axis=1)
        return tree, end_SxRxC.reshape(s, -1)

    def amounts(self, edits: FeatureEdits) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the share of each feature's fall that each row applies, and what it adds, [S, R, K]; padding none."""
        fraction_SxRxK = np.zeros((len(self.shards), self.size, len(self.features_K)), np.float32)
        addend_SxRxK = None if edits.addends is None else np.zeros_like(fraction_SxRxK)
        for shard, rows in enumerate(self.shards):
            filled_rows = slice(len(rows.set_N))
            fraction_SxRxK[shard, filled_rows], addend_ExK = edits.over(rows.set_N, self.features_K)
            if addend_SxRxK is not None:
                addend_SxRxK[shard, filled_rows] = addend_ExK
        return fraction_SxRxK, addend_SxRxK


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of a clean run."""

    last_P: np.ndarray  #: the index of each one's last token
    prefix_PxT: np.ndarray  #: a number for each text from the first token to this one, as far as changes depend on it

    def keys(self, rows: SetRows, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a number for each token of each row, equal where tokens are shared; where rows have any, [N, T].

        The prompts "A B C" and "A B D" have the prefixes 0 0 0 and 0 0 1. An edit that changes them from the second
        token on makes two rows of two tokens, B C and B D. Edit, first token, position and prefix of both B are the
        same, and so is their number: three tokens are run.
        """
        position_NxT = rows.first_N[:, None] + np.arange(length)[None, :]
        real_NxT = position_NxT <= self.last_P[rows.place_N][:, None]
        width = self.prefix_PxT.shape[1]
        prefix_NxT = self.prefix_PxT[rows.place_N[:, None], np.minimum(position_NxT, width - 1)]
        most = int(self.prefix_PxT.max(initial=0)) + 1
        start_Nx1 = (rows.set_N * width + rows.first_N)[:, None]
        return (start_Nx1 * width + np.minimum(position_NxT, width - 1)) * most + prefix_NxT, real_NxT

    def in_order(self) -> np.ndarray:
        """Return the prompts' indices, so that prompts that begin alike follow each other."""
        return np.lexsort(self.prefix_PxT.T[::-1])


def all_different(prefix_PxT: np.ndarray) -> np.ndarray:
    """Return numbers for prompts that share nothing."""
    return np.arange(prefix_PxT.size).reshape(prefix_PxT.shape)


class EditedRun(NamedTuple):
    """Prompts without an edit, and what replaces activations."""

    run: CleanRun
    source: ActivationReplacement

    @property
    def arrays(self) -> tuple[ActivationReplacement, list[jax.Array]]:
        """The programs' arguments: the replacement, and arrays of the prompts.

        The arrays are the values read and the editable positions of the prompts and, if used, of their counterparts.
        """
        runs = [self.run]
        if self.source.kind == "counterpart":
            assert self.run.counterpart is not None
            runs.append(self.run.counterpart)
        return self.source, [array for run in runs for array in (run.read_BxTxD, run.domain_BxT)]

    @property
    def prompts(self) -> Prompts:
        """The prompts, and which prefixes are shared: those in which edits change the same."""
        prefix_PxT = self.run.prefix_PxT
        if self.source.kind == "random":  # draws differ from prompt to prompt
            prefix_PxT = all_different(prefix_PxT)
        elif self.source.kind == "counterpart":
            assert self.run.counterpart is not None
            counterpart_PxT = self.run.counterpart.prefix_PxT
            prefix_PxT = prefix_PxT * (int(counterpart_PxT.max(initial=0)) + 1) + counterpart_PxT
        return Prompts(self.run.last_B[: len(prefix_PxT)], prefix_PxT)


def first_changes(
    first_PxK: np.ndarray, features_K: np.ndarray, edits: FeatureEdits, chosen: Sequence[int], editable_PxT: np.ndarray
) -> np.ndarray:
    """Return the first position at which some edits change a prompt, [M, P]; at least the prompt's length if nowhere.

    Args:
      first_PxK: from ``first_falls``.
      features_K: the features, rising, among them all that the edits name.
      edits: all edits.
      chosen: the M edits.
      editable_PxT: where features may change.
    """
    nowhere = np.iinfo(first_PxK.dtype).max
    first_MxP = np.full((len(chosen), len(first_PxK)), nowhere, np.int64)
    for first_P, e in zip(first_MxP, chosen, strict=True):
        changed = edits.sets[e][edits.fractions[e] != 0]
        if len(changed):
            first_P[:] = first_PxK[:, np.searchsorted(features_K, changed)].min(axis=1)
        if edits.addends is not None and np.any(edits.addends[e]):
            editable_P = np.where(editable_PxT.any(axis=1), editable_PxT.argmax(axis=1), nowhere)
            first_P[:] = np.minimum(first_P, editable_P)
    return first_MxP


def batches_of(
    first_MxP: np.ndarray,
    prompts: Prompts,
    chosen: Sequence[int],
    features_K: np.ndarray,
    most: int,
    shards: int = 1,
) -> list[RowBatch]:
    """Return the rows of some edits that have any tokens, in batches of few shapes, the longest first.

    Args:
      first_MxP: the first position of each row.
      prompts: P of them.
      chosen: the M edits, by their numbers.
      features_K: the features that these edits name.
      most: tokens of a batch, unless one row in each shard has more.
      shards: number of shards of each batch.
    """
    batches = []
    # Prompts that begin alike come after each other, and so share tokens within a batch.
    place_P = prompts.in_order()
    row_N, order_N = np.nonzero((first_MxP <= prompts.last_P[None, :])[:, place_P])
    place_N = place_P[order_N]
    rows = SetRows(np.array(chosen)[row_N], place_N, first_MxP[row_N, place_N])
    length_N = prompts.last_P[place_N] + 1 - rows.first_N
    width = prompts.prefix_PxT.shape[1]
    # Another shape is worth its compilation only if it saves more padding than that takes.
    lengths = np.array([width]) if width <= SHORT else bucket_lengths(np.bincount(length_N), _PROGRAM)
    shape_N = np.searchsorted(lengths, length_N)
    most_of_shard = max(most // shards, 1)
    for shape in np.unique(shape_N)[::-1]:
        same_shape, length = rows[shape_N == shape], int(lengths[shape])
        parts = _parts(same_shape, prompts, length, most_of_shard, shards)
        size = few_rows(max(len(part.set_N) for part in parts), shards)
        tokens = _few_tokens(max(_distinct(part, prompts, length) for part in parts), most_of_shard, length)
        batches += _batches(parts, shards, size, length, tokens, features_K)
    return batches


def whole_prompts(first_P: np.ndarray, prompts: Prompts, most: int, shards: int = 1) -> list[RowBatch]:
    """Return the rows of prompts without an edit, each from a first token on, in batches of one shape.

    Args:
      first_P: the first token of each prompt.
      prompts: P of them.
      most: tokens of a shard, unless a prompt has more.
      shards: number of shards of each batch.
    """
    place_P = prompts.in_order()
    rows, length = SetRows(np.zeros_like(place_P), place_P, first_P[place_P]), prompts.prefix_PxT.shape[1]
    parts = _parts(rows, prompts, length, most, shards)
    size = whole_rows(max(len(part.set_N) for part in parts))
    tokens = fill(max(_distinct(part, prompts, length) for part in parts))
    return _batches(parts, shards, size, length, tokens, np.zeros(0, np.int32))


def _batches(
    parts: list[SetRows], shards: int, size: int, length: int, tokens: int, features_K: np.ndarray
) -> list[RowBatch]:
    """Return batches of ``shards`` parts each, of which the last ones may be without rows: every device has one."""
    parts = parts + [parts[0][:0]] * (-len(parts) % shards)
    starts = range(0, len(parts), shards)
    return [RowBatch(parts[first : first + shards], size, length, tokens, features_K) for first in starts]


def _parts(rows: SetRows, prompts: Prompts, length: int, most: int, shards: int) -> list[SetRows]:
    """Split rows into consecutive parts of at most ``most`` distinct tokens, or one row, about equal in all shards."""
    key_NxT, real_NxT = prompts.keys(rows, length)
    _, first_M = np.unique(key_NxT[real_NxT], return_index=True)
    new_N = np.bincount(np.nonzero(real_NxT)[0][first_M], minlength=len(rows.set_N))  # tokens no earlier row has
    until_N = np.cumsum(new_N)

    def starts(limit: int) -> list[int]:
        """Return the first row of each part, where parts are filled one after the other."""
        first = [0]
        while True:
            before = until_N[first[-1] - 1] if first[-1] else 0
            after = max(int(np.searchsorted(until_N, before + limit, side="right")), first[-1] + 1)
            if after >= len(until_N):
                return first
            first.append(after)

    count = -(-len(starts(most)) // shards) * shards
    # The smallest limit that takes no more batches: no shard of the last one stays empty while others are full.
    limit = bisect.bisect_left(range(1, most), True, key=lambda limit: len(starts(limit)) <= count) + 1
    first = starts(limit)
    return [rows[start:end] for start, end in itertools.pairwise([*first, len(until_N)])]


def _distinct(rows: SetRows, prompts: Prompts, length: int) -> int:
    key_NxT, real_NxT = prompts.keys(rows, length)
    return len(np.unique(key_NxT[real_NxT]))


def _few_tokens(count: int, most: int, length: int) -> int:
    """Return ``count`` or more: a share of a full shard, all of it, or a row beyond it where parts begin alike."""
    sizes = (*(share * most for share in _SHARES), most, most + length)
    return next((size for tokens in sizes if (size := fill(tokens)) >= count), fill(count))


def few_rows(count: int, shards: int) -> int:
    """Return ``count`` rows of a shard or more: rows add attention alone, so few numbers serve all.

    They are a power of two, or the shard's part of ``_ROWS`` where the ``shards`` of a batch together have fewer.
    """
    return max(2 ** (count - 1).bit_length(), _ROWS // shards)


def whole_rows(count: int) -> int:
    """Return ``count`` prompts of a shard or more; of few, as on many devices, less than twice as many."""
    return min(2 ** (count - 1).bit_length(), fill(count))


def fill(count: float) -> int:
    """Return the least multiple of ``_STEP`` that is ``count`` or more."""
    return max(math.ceil(count / _STEP), 1) * _STEP


class CleanValues(NamedTuple):
    """The parts of which rows' edited values are built: clean values, and the changes of K features.

    ``editable_BxT`` is None where no edit adds anything; ``logp_BxV`` where no readout needs it.
    """

    stream_BxTxX: jax.Array
    value_BxTxD: jax.Array
    fall_BxTxK: jax.Array
    W_dec_KxD: jax.Array
    past: PrefixKV
    logp_BxV: jax.Array | None
    editable_BxT: jax.Array | None


@functools.partial(jax.jit, static_argnums=0)
def first_falls(point: SplitPoint, fall_BxTxK: jax.Array) -> jax.Array:
    """Return the first position at which ablation lowers each activation, int32 [B, K]; T where it lowers none."""
    length = fall_BxTxK.shape[1]
    position_T = jnp.arange(length, dtype=jnp.int32)
    first_BxK = jnp.min(jnp.where(fall_BxTxK != 0, position_T[None, :, None], jnp.int32(length)), axis=1)
    return jax.lax.with_sharding_constraint(first_BxK, sharding(point.mesh))


@functools.partial(jax.jit, static_argnums=0)
def gather(
    point: SplitPoint,
    dictionary: Dictionary,
    source: ActivationReplacement,
    arrays: Sequence[jax.Array],
    features_K: jax.Array,
    prompts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return by how much the activations of ``features_K`` fall, f - r [B, T, K], and their directions [K, D].

    Args:
      point: where the model is split.
      dictionary: the dictionary of the features.
      source: what replaces ablated activations.
      arrays: what is read [B, T, D] and domains [B, T] of the prompts and, for ``counterpart``, of their counterparts.
      features_K: the features.
      prompts: number of the B rows that are prompts.
    """

    def chosen(f_PxTxF: jax.Array) -> jax.Array:
        return f_PxTxF[:, :, features_K]

    # All features are encoded, in parts, before some are chosen: a TopK's activations depend on the others.
    f_BxTxK = of_features(point.mesh, dictionary, arrays[:2], chosen)
    counterpart_BxTxK = of_features(point.mesh, dictionary, arrays[2:], chosen) if arrays[2:] else f_BxTxK
    fall_BxTxK = source.removed(f_BxTxK, counterpart_BxTxK, arrays[1], features_K, prompts)
    # Matrices may be in bfloat16, in which effects would be rounded to two digits.
    W_dec_KxD = dictionary.W_dec_FxD[...][features_K].astype(fall_BxTxK.dtype)
    return jax.lax.with_sharding_constraint((fall_BxTxK, W_dec_KxD), sharding(point.mesh))


def edit_value(
    value_xD: jax.Array,
    fall_xK: jax.Array,
    W_dec_KxD: jax.Array,
    fractions: jax.Array,
    addends: jax.Array | None = None,
) -> jax.Array:
    """Return the site's value after an edit, [..., D].

    Args:
      value_xD: the clean value.
      fall_xK: by how much ablation lowers the activation of each feature; from ``gather``.
      W_dec_KxD: directions of the features.
      fractions: share of each fall that is applied; it and ``fall_xK`` are broadcast to each other.
      addends: what is added to each activation, likewise; None: nothing.
    """
    fractions = fractions.astype(fall_xK.dtype)
    # Not a plain product: a feature that overflows would reach the rows that do not edit it as 0 x NaN.
    applied = jnp.where(fractions != 0, fall_xK * fractions, jnp.zeros_like(fall_xK))
    if addends is not None:
        applied = applied - addends.astype(fall_xK.dtype)
    # The fall is subtracted from the clean value: what the dictionary does not explain stays as it is.
    fall_xD = matmul(applied.astype(W_dec_KxD.dtype), W_dec_KxD)
    return (value_xD.astype(fall_xD.dtype) - fall_xD).astype(value_xD.dtype)


@functools.partial(jax.jit, static_argnums=0)
def clean_logp(point: SplitPoint, params: decoder.Params, end_BxD: jax.Array) -> jax.Array:
    """Return the clean log-probabilities of the next token, fp32 [B, V]."""
    # A program of its own: all edits of a prompt are compared with the same clean log-probabilities.
    logits_BxV = decoder.unembed(point.config, params, end_BxD)
    return jax.lax.with_sharding_constraint(logits_BxV - log_sum_exp(logits_BxV), sharding(point.mesh))


@functools.partial(jax.jit, static_argnums=0)
def run_rows(
    point: SplitPoint,
    params: decoder.Params,
    clean: CleanValues,
    tree: SharedPrefixBatch,
    end_SxC: jax.Array,
    answers_SxRx2: jax.Array,
    fraction_SxRxK: jax.Array,
    addend_SxRxK: jax.Array | None,
) -> jax.Array:
    """Return the rows' readouts [S, R, M]: the objective and, given clean log-probabilities, all others.

    Args:
      point: where the model is split (static).
      params: parameters of the decoder.
      clean: the values that rows are built from.
      tree: the tokens that the rows consist of.
      end_SxC: index among its shard's tokens of each row's last one, or of its last ones, row after row.
      answers_SxRx2: token ids of the correct and the wrong answer.
      fraction_SxRxK: share of each feature's fall that each row applies; 0 for features that its edit does not name.
      addend_SxRxK: what is added to each activation; None: nothing.
    """
    stream, value_SxNxD, fall_SxNxK = (tree.take(array) for array in clean[:3])
    addend_SxNxK = None
    if addend_SxRxK is not None:
        assert clean.editable_BxT is not None
        editable_SxN = tree.take(clean.editable_BxT)
        addend_SxNxK = jnp.where(editable_SxN[..., None], tree.per_token(addend_SxRxK), 0.0)
    edited_SxNxD = edit_value(value_SxNxD, fall_SxNxK, clean.W_dec_KxD, tree.per_token(fraction_SxRxK), addend_SxNxK)
    by_shard = row_sharding(point.mesh, edited_SxNxD.shape)
    stream, edited_SxNxD = jax.lax.with_sharding_constraint((stream, edited_SxNxD), by_shard)
    ends = point.run_shared_ends(params, clean.past, tree, stream, edited_SxNxD, end_SxC)
    last_X = tree.last_positions(end_SxC, point.positions)
    logp_XxV = None if clean.logp_BxV is None else clean.logp_BxV[tree.prompt_SxR.reshape(-1)]
    values_XxM = point.readouts(params, ends, last_X, answers_SxRx2.reshape(-1, 2), logp_XxV)
    return jax.lax.with_sharding_constraint(values_XxM.reshape(*tree.prompt_SxR.shape, -1), sharding(point.mesh))


class PromptTree(NamedTuple):
    """Prompts without an edit as S shards of R rows and N tokens, of which rows that begin alike share the first ones.

    The sum over prompts of what is computed at a token that they share is computed once.
    """

    tree: SharedPrefixBatch
    end_SxC: jax.Array  #: index among its shard's tokens of each row's last one, or of its last ones, row after row
    #: each row's place in the clean run; -1 in copies that fill a shard up. All of it on the host of every process.
    place_SxR: np.ndarray

    @property
    def is_prompt_X(self) -> np.ndarray:
        """Return which of the S * R rows are prompts, not copies."""
        return self.place_SxR.reshape(-1) >= 0


def prompt_trees(
    split: SplitModel, edited: EditedRun, most: int, like: Sequence[CleanRun] = ()
) -> Iterator[PromptTree]:
    """Yield the prompts of a clean run from their first editable token on.

    Args:
      split: the model.
      edited: the run, and what replaces activations: prompts share tokens where the replacement is the same.
      most: maximum number of tokens for each device, unless a single prompt has more.
      like: runs of the same prompts with other dictionaries, whose editable tokens are among the rows', too.
    """
    prompts, shards = edited.prompts, document_devices(split.point.mesh)
    domains = [np.asarray(run.domain_BxT)[: len(run.index_P)] for run in (edited.run, *like)]
    domain_PxT = np.any(domains, axis=0)
    # Nothing before the first editable token is looked at; logits are read at the last few.
    latest_P = prompts.last_P - (split.point.positions - 1)
    first_P = np.where(domain_PxT.any(axis=1), np.minimum(domain_PxT.argmax(axis=1), latest_P), latest_P)
    for batch in whole_prompts(first_P, prompts, most, shards):
        tree, end_SxC = batch.tree(prompts, split.point.positions)
        place_SxR = np.full(tree.prompt_SxR.shape, -1, np.int32)
        for shard, rows in enumerate(batch.shards):
            count = len(rows.place_N)
            place_SxR[shard, :count] = rows.place_N
            # Rows that fill a shard up are copies of its first one, or all of it of the first shard: a readout that is
            # not finite on anything else would make the gradient of the sum so.
            for array in (*tree, end_SxC) if not count else ():
                array[shard] = array[0]
            ends = end_SxC.reshape(len(end_SxC), batch.size, -1)
            for array in (tree.prompt_SxR, tree.first_SxR, tree.token_index_SxRxT, ends) if count else ():
                array[shard, count:] = array[shard, 0]
        yield PromptTree(SharedPrefixBatch(*split.by_row(*tree)), split.by_row(end_SxC)[0], place_SxR)
