"""Which (set, prompt) pairs are run, on how many of their tokens, and in which batches."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from saejax.models.tokens import even_batches

_STEP = 8  # batches are filled up to a multiple of this many rows
_PROGRAM = 4096  # tokens that run in the time in which a program of another shape is compiled, roughly


@dataclasses.dataclass(frozen=True)
class RowBatch:
    """Rows that go through the tail together.

    Attributes:
      set_N, place_N: the set and the prompt (its place in the clean run) of each of the N rows.
      size: rows with those that fill up the batch, R.
      length: tokens of each.
      features_K: all features that the sets hold, rising; the same object in all batches that share them.
    """

    set_N: np.ndarray
    place_N: np.ndarray
    size: int
    length: int
    features_K: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens that go through the tail, padding included."""
        return self.size * self.length

    def filled(self, sets: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The prompt of every row, int32 [R], and the features it removes, bool [R, K]; none where it only fills up."""
        place_R, members_RxK = np.zeros(self.size, np.int32), np.zeros((self.size, len(self.features_K)), bool)
        place_R[: len(self.place_N)] = self.place_N
        for members_K, chosen in zip(members_RxK, self.set_N, strict=False):
            members_K[np.searchsorted(self.features_K, sets[chosen])] = True
        return place_R, members_RxK


def tokens_needed(first_PxF: np.ndarray, last_P: np.ndarray, sets: Sequence[np.ndarray]) -> np.ndarray:
    """How many tokens, up to a prompt's last, removing a set can change: [S, P].

    Args:
      first_PxF: the first position at which a feature fires, at least the prompt's length if it never does.
      last_P: the position of each prompt's last token.
      sets: features.
    """
    ends_P = last_P.astype(np.int64) + 1
    needed_SxP = np.empty((len(sets), len(ends_P)), np.int64)
    for needed_P, chosen in zip(needed_SxP, sets, strict=True):
        first_P = first_PxF[:, chosen].min(axis=1, initial=np.iinfo(first_PxF.dtype).max)
        needed_P[:] = np.maximum(ends_P - first_P, 0)
    return needed_SxP


def batches_of(
    needed_SxP: np.ndarray, sets: Sequence[np.ndarray], length: int, batch_rows: int, features: int
) -> list[RowBatch]:
    """The rows that need any tokens, in batches of like length, the longest first.

    Args:
      needed_SxP: from ``tokens_needed``.
      sets: features.
      length: tokens of a whole prompt, padding included.
      batch_rows: rows of whole prompts in a batch; of shorter rows, as many more as make the same number of tokens.
      features: most features in a batch's sets together, unless one set alone has more.
    """
    batches = []
    for chosen in _chunks(sets, features):
        features_K = np.unique(np.concatenate([sets[s] for s in chosen]))
        pairs_Nx2 = np.argwhere(needed_SxP[chosen] > 0)
        set_N, place_N = np.array(chosen)[pairs_Nx2[:, 0]], pairs_Nx2[:, 1]
        for part, size, tokens in even_batches(needed_SxP[set_N, place_N], batch_rows * length, _STEP, _PROGRAM):
            batches.append(RowBatch(set_N[part], place_N[part], size, tokens, features_K))
    return batches


def _chunks(sets: Sequence[np.ndarray], features: int) -> Iterator[list[int]]:
    """Runs of sets that hold at most so many features together."""
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
