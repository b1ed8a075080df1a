"""Which (set, prompt) pairs are run, on which of their tokens, and in which batches.

A *row* is one such pair: the prompt's tokens from the first that the set changes to the last. What stands at a token
depends on the tokens up to it and on what was changed at them, so rows whose prompts begin alike share their first
tokens as far as their sets change the same there; each is run once (``tree.Tree``). Sets that are drawn from one pool
of features often do: of a set, few features fire at a token.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from saejax.models.tokens import few_lengths
from saejax.models.tree import Tree

_STEP = 8  # rows and tokens are filled up to a multiple of this
_MANY = 8  # from so many batches on, to a multiple of 32: the programs of one call serve the next, whose rows differ
_PROGRAM = 16384  # tokens whose attention runs in the time in which a program of another shape is compiled, roughly


class SetGroup(NamedTuple):
    """Sets that follow each other, whose features are gathered together.

    Attributes:
      start: the number of the first one.
      features_K: all their features, rising, the last one repeated up to a power of two.
      members_SxK: which of them each set holds, bool.
    """

    start: int
    features_K: np.ndarray
    members_SxK: np.ndarray

    @property
    def numbers_S(self) -> np.ndarray:
        """The sets' numbers."""
        return self.start + np.arange(len(self.members_SxK))


def groups_of(sets: Sequence[np.ndarray], features: int) -> Iterator[SetGroup]:
    """All sets in groups, each of at most so many features, unless one set alone has more."""
    start = 0
    while start < len(sets):
        together, stop = set(sets[start].tolist()), start + 1
        while stop < len(sets) and len(wider := together | set(sets[stop].tolist())) <= features:
            together, stop = wider, stop + 1
        features_K = np.array(sorted(together) or [0], np.int64)  # programs have no empty arrays
        members_SxK = np.stack([np.isin(features_K, chosen) for chosen in sets[start:stop]])
        fill = 2 ** (len(features_K) - 1).bit_length() - len(features_K)
        yield SetGroup(start, np.pad(features_K, (0, fill), mode="edge"), np.pad(members_SxK, ((0, 0), (0, fill))))
        start = stop


class Prompts(NamedTuple):
    """The prompts of a clean run.

    Attributes:
      last_P: the index of each one's last token.
      prefix_PxT: a number for each text from the first token to this one, as far as changes depend on it.
    """

    last_P: np.ndarray
    prefix_PxT: np.ndarray


@dataclasses.dataclass(frozen=True)
class Changes:
    """What S sets change in P prompts.

    Attributes:
      prompts: the prompts.
      first_SxP: the first token that is run; beyond the prompt's last one where there is nothing to run.
      change_SxPxT: a number for what was changed up to each token; of prompts that are alike up to there it is the
        same where the same was changed.
    """

    prompts: Prompts
    first_SxP: np.ndarray
    change_SxPxT: np.ndarray

    @classmethod
    def of(cls, prompts: Prompts, changed_PxTxK: np.ndarray, members_SxK: np.ndarray) -> "Changes":
        """Of sets of features.

        Args:
          prompts: the prompts.
          changed_PxTxK: where removing each feature changes anything, bool.
          members_SxK: which of the features each set holds, bool.
        """
        sets, (count, length) = len(members_SxK), prompts.prefix_PxT.shape
        change_SxPxT = np.zeros((sets, count, length), np.int64)
        first_SxP, known, now_SxP = np.full((sets, count), length), 0, np.zeros((sets, count), np.int64)
        for t in range(length):
            for prefix in np.unique(prompts.prefix_PxT[:, t]):
                alike_Q = np.flatnonzero(prompts.prefix_PxT[:, t] == prefix)
                # By rounding, one of prompts that are alike may reach a threshold: what counts for one, does for all.
                members_SxA = members_SxK[:, changed_PxTxK[alike_Q, t].any(axis=0)]
                changed_N = np.flatnonzero(members_SxA.any(axis=1))
                own_NxA = np.packbits(members_SxA[changed_N], axis=1)
                before_Nx8 = np.ascontiguousarray(now_SxP[changed_N, alike_Q[0]])[:, None].view(np.uint8)
                number_N, distinct = _numbered(np.concatenate([before_Nx8, own_NxA], axis=1))
                now_SxP[changed_N[:, None], alike_Q[None, :]] = (known + 1 + number_N)[:, None]
                known += distinct
            change_SxPxT[:, :, t] = now_SxP
            first_SxP = np.where((first_SxP == length) & (now_SxP > 0), t, first_SxP)
        return cls(prompts, first_SxP, change_SxPxT)

    @classmethod
    def unshared(cls, prompts: Prompts, sets: int) -> "Changes":
        """Of sets that are run on all tokens, sharing none."""
        count, length = prompts.prefix_PxT.shape
        change_SxPxT = np.arange(sets * count * length).reshape(sets, count, length)
        return cls(prompts, np.zeros((sets, count), np.int64), change_SxPxT)

    def rows(self, group: SetGroup) -> "SetRows":
        """Those that have any tokens, one after the other those that begin alike."""
        local_N, place_N = np.nonzero(self.first_SxP <= self.prompts.last_P[None, :])
        text_NxT = self._text(local_N, place_N, np.arange(self.change_SxPxT.shape[2])[None, :])
        order_N = np.lexsort(text_NxT.T[::-1])
        local_N, place_N = local_N[order_N], place_N[order_N]
        return SetRows(group.start + local_N, place_N, self.first_SxP[local_N, place_N])

    def keys(self, group: SetGroup, rows: "SetRows", length: int) -> tuple[np.ndarray, np.ndarray]:
        """A number for each token of each row, equal where the token can be shared; and where rows have any, [N, T]."""
        position_NxT = rows.first_N[:, None] + np.arange(length)[None, :]
        width = self.change_SxPxT.shape[2]
        text_NxT = self._text(rows.set_N - group.start, rows.place_N, np.minimum(position_NxT, width - 1))
        real_NxT = position_NxT <= self.prompts.last_P[rows.place_N][:, None]
        return (text_NxT * width + np.minimum(position_NxT, width - 1)) * width + rows.first_N[:, None], real_NxT

    def _text(self, local_N: np.ndarray, place_N: np.ndarray, position_NxT: np.ndarray) -> np.ndarray:
        """A number for the text with its changes up to each of some positions."""
        change_NxT = self.change_SxPxT[local_N[:, None], place_N[:, None], position_NxT]
        prefix_PxT = self.prompts.prefix_PxT
        return change_NxT * (int(prefix_PxT.max(initial=0)) + 1) + prefix_PxT[place_N[:, None], position_NxT]


def _numbered(bytes_NxB: np.ndarray) -> tuple[np.ndarray, int]:
    """A number for each row of bytes, from 0, equal where rows are; and how many different ones there are."""
    if not len(bytes_NxB):
        return np.zeros(0, np.int64), 0
    whole_N = np.ascontiguousarray(bytes_NxB).view(f"V{bytes_NxB.shape[1]}")[:, 0]
    distinct_U, number_N = np.unique(whole_N, return_inverse=True)
    return number_N, len(distinct_U)


@dataclasses.dataclass(frozen=True)
class SetRows:
    """Rows to run on the prompts of one clean run; arrays [N].

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
    """Rows that go through the tail together, in S shards.

    Attributes:
      shards: the rows of each.
      size, length, tokens: rows, tokens of a row, and tokens of a shard, with those that fill it up: R, T and N.
      group: the sets; the same object in all batches that share it.
    """

    shards: list[SetRows]
    size: int
    length: int
    tokens: int
    group: SetGroup

    def filled(self, changes: Changes) -> tuple[Tree, tuple[np.ndarray, np.ndarray]]:
        """The tree of the rows, which of its tokens is each row's last [S, R], and which features it removes [S, R, K].

        What only fills up removes nothing and stands at a real place.
        """
        s, r, n, t = len(self.shards), self.size, self.tokens, self.length
        tree = Tree(*(np.zeros(shape, np.int32) for shape in ((s, r), (s, r), (s, r, t), (s, n), (s, n))))
        end_SxR, members_SxRxK = np.zeros((s, r), np.int32), np.zeros((s, r, len(self.group.features_K)), bool)
        for shard, rows in enumerate(self.shards):
            key_RxT, real_RxT = changes.keys(self.group, rows, t)
            _, at_M, token_M = np.unique(key_RxT[real_RxT], return_index=True, return_inverse=True)
            own, count = slice(len(rows.set_N)), len(at_M)
            tree.place_SxR[shard, own], tree.first_SxR[shard, own] = rows.place_N, rows.first_N
            token_RxT = tree.token_SxRxT[shard, own]
            token_RxT[real_RxT] = token_M
            row_M, column_M = np.nonzero(real_RxT)
            tree.row_SxN[shard, :count], tree.column_SxN[shard, :count] = row_M[at_M], column_M[at_M]
            end_SxR[shard, own] = token_RxT[np.arange(len(rows.set_N)), real_RxT.sum(axis=1) - 1]
            members_SxRxK[shard, own] = self.group.members_SxK[rows.set_N - self.group.start]
        return tree, (end_SxR, members_SxRxK)


def all_different(prefix_PxT: np.ndarray) -> np.ndarray:
    """Numbers for prompts that share nothing."""
    return np.arange(prefix_PxT.size).reshape(prefix_PxT.shape)


def batches_of(group: SetGroup, changes: Changes, most: int, shards: int = 1) -> list[RowBatch]:
    """The rows that have any tokens, in batches of few shapes, the longest first.

    Args:
      group: sets.
      changes: what they change.
      most: tokens of a batch, but for those of one row in each shard.
      shards: of each batch.
    """
    batches, rows = [], changes.rows(group)
    length_N = changes.prompts.last_P[rows.place_N] + 1 - rows.first_N
    lengths = few_lengths(length_N, _PROGRAM)
    shape_N = np.searchsorted(lengths, length_N)
    for shape in range(len(lengths) - 1, -1, -1):
        own, length = rows[shape_N == shape], int(lengths[shape])
        parts = _parts(own, *changes.keys(group, own, length), max(most // shards, 1))
        parts += [own[:0]] * (-len(parts) % shards)
        step = 4 * _STEP if len(parts) >= _MANY * shards else _STEP
        size = _filled(max(len(part.set_N) for part in parts), step)
        tokens = _filled(max(_distinct(*changes.keys(group, part, length)) for part in parts), step)
        for first in range(0, len(parts), shards):
            batches.append(RowBatch(parts[first : first + shards], size, length, tokens, group))
    return batches


def _parts(rows: SetRows, key_NxT: np.ndarray, real_NxT: np.ndarray, most: int) -> list[SetRows]:
    """Rows in consecutive parts of about as many different tokens, ``most`` at the most, or one row."""
    _, first_M = np.unique(key_NxT[real_NxT], return_index=True)
    new_N = np.bincount(np.nonzero(real_NxT)[0][first_M], minlength=len(rows.set_N))  # tokens no earlier row has
    before_N = np.cumsum(new_N) - new_N
    count = -(-int(new_N.sum()) // most)
    part_N = before_N * count // max(int(new_N.sum()), 1)
    return [rows[part_N == part] for part in np.unique(part_N)]


def _distinct(key_NxT: np.ndarray, real_NxT: np.ndarray) -> int:
    return len(np.unique(key_NxT[real_NxT]))


def _filled(count: int, step: int) -> int:
    return max(-(-count // step), 1) * step
