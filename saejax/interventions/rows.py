"""Plans of runs: which (edit, prompt) pairs are run, on which of their tokens, and in which batches.

A *row* is one such pair: the prompt's tokens from the first that the edit changes to the last. What stands at a token
depends on the tokens before it and on what was changed there, so rows of one edit whose prompts begin alike share their
first tokens; each is run once (``SharedPrefixBatch``). The set of an edit are the features that it names.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from saejax.interventions.edits import FeatureEdits
from saejax.models.lengths import bucket_lengths
from saejax.models.split import SharedPrefixBatch

_STEP = 8  # rows and tokens are filled up to a multiple of this
_SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)  # of a full batch's tokens, to which smaller ones are filled up
_LEAST_FEATURES = 512  # to which a batch's features are filled up: they take no time, another program does
_PROGRAM = 16384  # tokens whose attention runs in the time in which a program of another shape is compiled, roughly


class Amounts(NamedTuple):
    """Changes of activations by edits: one array per edit, as in ``FeatureEdits``."""

    sets: tuple[np.ndarray, ...]
    fractions: tuple[np.ndarray, ...]
    addends: tuple[np.ndarray, ...] | None

    @classmethod
    def of(cls, edits: FeatureEdits) -> "Amounts":
        """Return the amounts of some edits."""
        return cls(edits.sets, edits.fractions, edits.addends)

    def with_clean_rows(self, count: int) -> "Amounts":
        """Return the amounts with ``count`` edits behind them that change nothing."""
        nothing = (np.zeros(0),) * count
        sets = self.sets + (np.zeros(0, np.int64),) * count
        return Amounts(sets, self.fractions + nothing, None if self.addends is None else self.addends + nothing)

    def over(self, chosen: Sequence[int] | np.ndarray, features_K: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return fractions and addends of some edits over K features, fp32 [M, K] each; 0 for those not named.

        Args:
          chosen: the M edits.
          features_K: rising features, among them all that the edits name.
        """
        fraction_MxK = np.zeros((len(chosen), len(features_K)), np.float32)
        addend_MxK = None if self.addends is None else np.zeros_like(fraction_MxK)
        for m, e in enumerate(chosen):
            column = np.searchsorted(features_K, self.sets[e])
            fraction_MxK[m, column] = self.fractions[e]
            if addend_MxK is not None and self.addends is not None:
                addend_MxK[m, column] = self.addends[e]
        return fraction_MxK, addend_MxK

    def norms(
        self,
        chosen: Sequence[int],
        features_K: np.ndarray,
        fall_PxTxK: np.ndarray,
        W_dec_KxD: np.ndarray,
        editable_PxT: np.ndarray,
    ) -> np.ndarray:
        """Return the norm of the change that some edits make at the site, over all positions, float64 [M, P].

        Args:
          chosen: the M edits.
          features_K: as for ``over``.
          fall_PxTxK: by how much ablation lowers each activation.
          W_dec_KxD: the features' directions.
          editable_PxT: True at editable positions.
        """
        norm_MxP = np.zeros((len(chosen), len(fall_PxTxK)))
        for m, e in enumerate(chosen):
            column = np.searchsorted(features_K, self.sets[e])
            change_PxTxN = fall_PxTxK[:, :, column].astype(np.float64) * self.fractions[e]
            if self.addends is not None:
                change_PxTxN -= editable_PxT[:, :, None] * self.addends[e]
            # |f W|^2 = f (W W^T) f^T: positions are many, the features of a set are few.
            gram_NxN = W_dec_KxD[column].astype(np.float64) @ W_dec_KxD[column].T.astype(np.float64)
            square_P = np.einsum("ptn,nm,ptm->p", change_PxTxN, gram_NxN, change_PxTxN, optimize=True)
            norm_MxP[m] = np.sqrt(np.maximum(square_P, 0.0))
        return norm_MxP

    def chunks(self, most: int) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yield runs of edits that name at most ``most`` features together, and those features, rising, padded."""
        for chosen in _chunks(self.sets, most):
            named = np.unique(np.concatenate([self.sets[s] for s in chosen]))
            named = named if len(named) else np.zeros(1, np.int64)  # programs have no empty arrays
            # The last feature is repeated: its column in the amounts is the first of its number, so copies change
            # nothing.
            yield chosen, np.pad(named, (0, filled_features(len(named)) - len(named)), mode="edge")


@dataclasses.dataclass(frozen=True)
class SetRows:
    """Rows on the prompts of one clean run; arrays [N].

    Attributes:
      set_N, place_N: the set, and the prompt's place in the clean run.
      first_N: the first token that is run; the last is the prompt's.
    """

    set_N: np.ndarray
    place_N: np.ndarray
    first_N: np.ndarray

    def __getitem__(self, chosen: np.ndarray | slice) -> "SetRows":
        return SetRows(self.set_N[chosen], self.place_N[chosen], self.first_N[chosen])


@dataclasses.dataclass(frozen=True)
class RowBatch:
    """Rows that go through the layers above the site together, in S shards.

    Attributes:
      shards: the rows of each.
      size, length, tokens: rows, tokens of a row, and tokens of a shard, with those that fill it up: R, T and N.
      features_K: all features that the sets hold, rising, the last one repeated; the same object in all batches that
        share them.
    """

    shards: list[SetRows]
    size: int
    length: int
    tokens: int
    features_K: np.ndarray

    def filled(
        self, prompts: "Prompts", amounts: Amounts
    ) -> tuple[SharedPrefixBatch, np.ndarray, np.ndarray, np.ndarray | None]:
        """Return the tree of the rows, which of its tokens is each row's last [S, R], and their amounts [S, R, K].

        Padding changes nothing and stands at a real place.
        """
        s, r, n, t = len(self.shards), self.size, self.tokens, self.length
        tree = SharedPrefixBatch(*(np.zeros(shape, np.int32) for shape in ((s, r), (s, r), (s, r, t), (s, n), (s, n))))
        end_SxR = np.zeros((s, r), np.int32)
        fraction_SxRxK = np.zeros((s, r, len(self.features_K)), np.float32)
        addend_SxRxK = None if amounts.addends is None else np.zeros_like(fraction_SxRxK)
        for shard, rows in enumerate(self.shards):
            key_ExT, real_ExT = prompts.keys(rows, t)
            _, at_U, token_M = np.unique(key_ExT[real_ExT], return_index=True, return_inverse=True)
            filled_rows, count = slice(len(rows.set_N)), len(at_U)
            tree.prompt_SxR[shard, filled_rows], tree.first_SxR[shard, filled_rows] = rows.place_N, rows.first_N
            token_ExT = tree.token_index_SxRxT[shard, filled_rows]
            token_ExT[real_ExT] = token_M
            row_M, column_M = np.nonzero(real_ExT)
            tree.row_SxN[shard, :count], tree.column_SxN[shard, :count] = row_M[at_U], column_M[at_U]
            end_SxR[shard, filled_rows] = token_ExT[np.arange(len(rows.set_N)), real_ExT.sum(axis=1) - 1]
            fraction_SxRxK[shard, filled_rows], addend_ExK = amounts.over(rows.set_N, self.features_K)
            if addend_SxRxK is not None:
                addend_SxRxK[shard, filled_rows] = addend_ExK
        return tree, end_SxR, fraction_SxRxK, addend_SxRxK


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of a clean run.

    Attributes:
      last_P: the index of each one's last token.
      prefix_PxT: a number for each text from the first token to this one, as far as changes depend on it.
    """

    last_P: np.ndarray
    prefix_PxT: np.ndarray

    def keys(self, rows: SetRows, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a number for each token of each row, equal where tokens are shared; where rows have any, [N, T]."""
        position_NxT = rows.first_N[:, None] + np.arange(length)[None, :]
        real_NxT = position_NxT <= self.last_P[rows.place_N][:, None]
        width = self.prefix_PxT.shape[1]
        prefix_NxT = self.prefix_PxT[rows.place_N[:, None], np.minimum(position_NxT, width - 1)]
        most = int(self.prefix_PxT.max(initial=0)) + 1
        start_Nx1 = (rows.set_N * width + rows.first_N)[:, None]
        return (start_Nx1 * width + np.minimum(position_NxT, width - 1)) * most + prefix_NxT, real_NxT

    def in_order(self) -> np.ndarray:
        """Return the prompts' indices, those that begin alike one after the other."""
        return np.lexsort(self.prefix_PxT.T[::-1])


def all_different(prefix_PxT: np.ndarray) -> np.ndarray:
    """Return numbers for prompts that share nothing."""
    return np.arange(prefix_PxT.size).reshape(prefix_PxT.shape)


def first_changes(first_PxF: np.ndarray, amounts: Amounts, editable_PxT: np.ndarray) -> np.ndarray:
    """Return the first position at which each edit changes a prompt, [S, P]; at least the prompt's length if nowhere.

    Args:
      first_PxF: the first position that ablating each feature changes.
      amounts: amounts of S edits.
      editable_PxT: where features may change.
    """
    nowhere = np.iinfo(first_PxF.dtype).max
    first_SxP = np.full((len(amounts.sets), len(first_PxF)), nowhere, np.int64)
    for s, (first_P, members) in enumerate(zip(first_SxP, amounts.sets, strict=True)):
        changed = members[amounts.fractions[s] != 0]
        if len(changed):
            first_P[:] = first_PxF[:, changed].min(axis=1)
        if amounts.addends is not None and np.any(amounts.addends[s]):
            editable_P = np.where(editable_PxT.any(axis=1), editable_PxT.argmax(axis=1), nowhere)
            first_P[:] = np.minimum(first_P, editable_P)
    return first_SxP


def batches_of(
    first_SxP: np.ndarray, prompts: Prompts, amounts: Amounts, most: int, features: int, shards: int = 1
) -> list[RowBatch]:
    """Return the rows that have any tokens, in batches of few shapes, the longest first.

    Args:
      first_SxP: the first position of each row.
      prompts: P of them.
      amounts: amounts of S edits.
      most: tokens of a batch, but for those of one row in each shard.
      features: maximum number of features in a batch's sets together, unless one set alone has more.
      shards: number of shards of each batch.
    """
    batches = []
    # Prompts that begin alike come after each other, and so share tokens within a batch.
    place_P = prompts.in_order()
    for chosen, features_K in amounts.chunks(features):
        number_N, order_N = np.nonzero((first_SxP[chosen] <= prompts.last_P[None, :])[:, place_P])
        set_N, place_N = np.array(chosen)[number_N], place_P[order_N]
        rows = SetRows(set_N, place_N, first_SxP[set_N, place_N])
        length_N = prompts.last_P[place_N] + 1 - rows.first_N
        # Another shape is worth its compilation only if it saves more padding than that takes.
        lengths = bucket_lengths(np.bincount(length_N), _PROGRAM)
        shape_N = np.searchsorted(lengths, length_N)
        for shape in range(len(lengths) - 1, -1, -1):
            same_shape, length = rows[shape_N == shape], int(lengths[shape])
            parts = _parts(same_shape, prompts, length, max(most // shards, 1))
            # Shards without rows, so that every batch has one for each device.
            parts += [same_shape[:0]] * (-len(parts) % shards)
            size = few_rows(max(len(part.set_N) for part in parts))
            full = full_batch(max(most // shards, 1), length)
            tokens = _few_tokens(max(_distinct(part, prompts, length) for part in parts), full)
            for first in range(0, len(parts), shards):
                batches.append(RowBatch(parts[first : first + shards], size, length, tokens, features_K))
    return batches


def _parts(rows: SetRows, prompts: Prompts, length: int, most: int) -> list[SetRows]:
    """Split rows into consecutive parts of about equally many distinct tokens: at most ``most``, or one row."""
    key_NxT, real_NxT = prompts.keys(rows, length)
    _, first_M = np.unique(key_NxT[real_NxT], return_index=True)
    new_N = np.bincount(np.nonzero(real_NxT)[0][first_M], minlength=len(rows.set_N))  # tokens no earlier row has
    before_N = np.cumsum(new_N) - new_N
    count = -(-int(new_N.sum()) // most)
    part_N = before_N * count // max(int(new_N.sum()), 1)
    return [rows[part_N == part] for part in np.unique(part_N)]


def _distinct(rows: SetRows, prompts: Prompts, length: int) -> int:
    key_NxT, real_NxT = prompts.keys(rows, length)
    return len(np.unique(key_NxT[real_NxT]))


def full_batch(most: int, length: int) -> int:
    """Return the tokens of a full shard: a part's last row, of ``length`` tokens, may reach beyond ``most``."""
    return _filled(most + length)


def filled_features(count: int) -> int:
    """Return how many features are gathered for ``count``: few numbers, so that programs are used again."""
    return max(2 ** (count - 1).bit_length(), _LEAST_FEATURES)


def _few_tokens(count: int, full: int) -> int:
    """Return ``count`` or more: a share of a full batch, or a little beyond it where parts begin alike."""
    return next((size for share in (*_SHARES, 1) if (size := _filled(share * full)) >= count), _filled(count))


def few_rows(count: int) -> int:
    """Return ``count`` or up to a third more: two numbers between each power of two and the next."""
    return _filled(count, max(2 ** max(count.bit_length() - 2, 0), _STEP))


def _filled(count: float, step: int = _STEP) -> int:
    return max(math.ceil(count / step), 1) * step


def _chunks(sets: Sequence[np.ndarray], features: int) -> Iterator[list[int]]:
    """Yield runs of sets that hold at most ``features`` features together."""
    chosen: list[int] = []
    together: set[int] = set()
    for number, members in enumerate(sets):
        wider = together | set(members.tolist())
        if chosen and len(wider) > features:
            yield chosen
            chosen, wider = [], set(members.tolist())
        chosen.append(number)
        together = wider
    if chosen:
        yield chosen
