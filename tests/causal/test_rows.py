"""Which rows are run, on how many tokens and in which batches."""

import numpy as np
import pytest

from saejax.causal.rows import batches_of, tokens_needed

FIRST_PxF = np.array([[3, 9, 1, 4], [9, 9, 2, 0]], np.int32)  # 9: never
LAST_P = np.array([4, 2])
SETS = [np.array(s, np.int64) for s in ([0], [1], [0, 2], [3], [])]


def test_a_row_needs_the_tokens_from_the_first_change_to_the_last():
    needed_SxP = tokens_needed(FIRST_PxF, LAST_P, SETS)
    np.testing.assert_array_equal(needed_SxP, [[2, 0], [0, 0], [4, 1], [1, 3], [0, 0]])


@pytest.mark.parametrize("batch_rows", [1, 5, 64])
@pytest.mark.parametrize("features", [1, 7, 1000])
def test_every_row_is_in_one_batch_that_is_long_enough(batch_rows, features):
    rng = np.random.default_rng(0)
    sets = [rng.permutation(40)[: rng.integers(1, 6)] for _ in range(50)]
    needed_SxP = rng.integers(0, 300, (50, 9)) * rng.integers(0, 2, (50, 9))
    batches = batches_of(needed_SxP, sets, 300, batch_rows, features)
    rows = [(s, p) for batch in batches for s, p in zip(batch.set_N, batch.place_N, strict=True)]
    assert sorted(rows) == [tuple(pair) for pair in np.argwhere(needed_SxP > 0)]
    for batch in batches:
        assert needed_SxP[batch.set_N, batch.place_N].max() <= batch.length <= 300
        assert len(batch.set_N) <= batch.size and batch.size % 8 == 0
        place_R, members_RxK = batch.filled(sets)
        assert not members_RxK[len(batch.set_N) :].any()
        for n, (s, p) in enumerate(zip(batch.set_N, batch.place_N, strict=True)):
            assert place_R[n] == p
            np.testing.assert_array_equal(batch.features_K[members_RxK[n]], np.unique(sets[s]))
        together = len(np.unique(np.concatenate([sets[s] for s in batch.set_N])))
        assert len(batch.features_K) <= max(features, max(len(s) for s in sets)) and together <= len(batch.features_K)


def test_nothing_to_run():
    assert batches_of(np.zeros((2, 3), int), SETS[:2], 10, 4, 10) == []
