"""Which rows are run, on which tokens and in which batches."""

import functools
import types

import numpy as np
import pytest

from saejax.interventions.edits import FeatureEdits, filled_features
from saejax.interventions.rows import Prompts, all_different, batches_of
from saejax.interventions.split_model import (
    GROUP_TOKENS,
    groups_by_length,
    prefixes,
    prompts_at_once,
    row_step,
    rows_at_once,
)

DICTIONARY = types.SimpleNamespace(config=types.SimpleNamespace(n_features=1000))


def halved(sets):
    """Edits that ablate half of each set."""
    return FeatureEdits(DICTIONARY, tuple(sets), tuple(np.full(len(members), 0.5) for members in sets))


@pytest.fixture(scope="module")
def many():
    """50 sets on 9 prompts over two letters: many begin alike; what a set changes first depends on the beginning."""
    rng = np.random.default_rng(0)
    ids_PxT = rng.integers(0, 2, (9, 12))
    last_P = rng.integers(5, 12, 9)
    sets = [rng.permutation(40)[: rng.integers(1, 6)] for _ in range(50)]
    prefix_PxT = prefixes(ids_PxT)
    first_SxP = np.full((50, 9), 99)
    for s in range(50):
        hit_T = [set(rng.permutation(prefix_PxT.max() + 1)[:1].tolist()) for _ in range(12)]
        for p in range(9):
            hits = [t for t in range(last_P[p] + 1) if int(prefix_PxT[p, t]) in hit_T[t]]
            first_SxP[s, p] = hits[0] if hits else 99
    return first_SxP, Prompts(last_P, prefix_PxT), halved(sets), ids_PxT


def all_batches(first_SxP, prompts, edits, most, features, shards=1):
    """The batches of all edits, as the engine makes them."""
    chunks = edits.chunks(features)
    return [b for chosen, all_K in chunks for b in batches_of(first_SxP[chosen], prompts, chosen, all_K, most, shards)]


@pytest.mark.parametrize("most", [1, 30, 2000])
@pytest.mark.parametrize("features", [1, 7, 1000])
@pytest.mark.parametrize("shards", [1, 4])
def test_every_token_of_every_row_is_run(many, most, features, shards):
    first_SxP, prompts, edits, ids_PxT = many
    batches = all_batches(first_SxP, prompts, edits, most, features, shards)
    rows = []
    for batch in batches:
        assert len(batch.shards) == shards and batch.size % 8 == batch.tokens % 8 == 0
        (tree, end_SxR), (fraction_SxRxK, addend_SxRxK) = batch.tree(prompts), batch.amounts(edits)
        assert addend_SxRxK is None
        for shard, rows_of in enumerate(batch.shards):
            place_N = tree.prompt_SxR[shard][tree.row_SxN[shard]]
            position_N = tree.first_SxR[shard][tree.row_SxN[shard]] + tree.column_SxN[shard]
            set_R = np.concatenate([rows_of.set_N, np.full(batch.size - len(rows_of.set_N), -1)])
            assert not fraction_SxRxK[shard, len(rows_of.set_N) :].any()
            for r, (s, p, first) in enumerate(zip(rows_of.set_N, rows_of.place_N, rows_of.first_N, strict=True)):
                rows.append((s, p))
                named_K = fraction_SxRxK[shard, r] == 0.5
                np.testing.assert_array_equal(batch.features_K[named_K], np.unique(edits.sets[s]))
                length = prompts.last_P[p] + 1 - first
                assert first == first_SxP[s, p] and 0 < length <= batch.length
                token_T = tree.token_index_SxRxT[shard, r, :length]
                assert end_SxR[shard, r] == token_T[-1]
                for t, token in enumerate(token_T):
                    assert position_N[token] == first + t and set_R[tree.row_SxN[shard, token]] == s
                    np.testing.assert_array_equal(ids_PxT[place_N[token], : first + t + 1], ids_PxT[p, : first + t + 1])
    assert sorted(rows) == [tuple(pair) for pair in np.argwhere(first_SxP <= prompts.last_P[None, :])]


def test_no_token_is_run_twice_in_a_batch(many):
    first_SxP, prompts, edits, ids_PxT = many
    texts = {
        (s, tuple(ids_PxT[p, : t + 1]))
        for s, p in np.argwhere(first_SxP <= prompts.last_P[None, :])
        for t in range(first_SxP[s, p], prompts.last_P[p] + 1)
    }
    alone = Prompts(prompts.last_P, all_different(prompts.prefix_PxT))
    assert len(texts) == tokens_run(first_SxP, prompts, edits) < 0.9 * tokens_run(first_SxP, alone, edits)


def tokens_run(first_SxP, prompts, edits):
    """How many tokens a single batch runs, without those that fill it up."""
    (batch,) = all_batches(first_SxP, prompts, edits, 10**6, 1000)
    tree, _ = batch.tree(prompts)
    return len(set(zip(tree.row_SxN[0].tolist(), tree.column_SxN[0].tolist(), strict=True)))


def test_batches_have_few_shapes(many):
    first_SxP, prompts, edits, _ = many
    shapes, counts = set(), range(1, 51)
    for count in counts:
        batches = all_batches(first_SxP[:count], prompts, halved(edits.sets[:count]), 80, 1000)
        shapes |= {(batch.size, batch.length, batch.tokens, len(batch.features_K)) for batch in batches}
    assert len(shapes) <= 12 and {features for *_, features in shapes} == {filled_features(40)}
    assert max(tokens for *_, tokens, _ in shapes) <= 96


def test_long_prompts_are_not_filled_up_to_sixteen():
    """A prompt of 4,000 tokens runs once, not 16 times; prompts of a few tokens run 16 at a time."""
    for length, most in ((4000, 1), (1000, 2), (128, 16), (20, 16)):
        assert prompts_at_once(length) == most
        ((index_P, rows_B, padded),) = groups_by_length(np.array([length]), row_step, GROUP_TOKENS)
        assert (len(index_P), len(rows_B), padded) == (1, min(most, 8), length)
    lengths_N = np.array([20] * 3 + [300] * 9 + [9000])
    groups = list(groups_by_length(lengths_N, row_step, GROUP_TOKENS))
    assert sorted(np.concatenate([index_P for index_P, _, _ in groups])) == list(range(13))
    assert all(len(rows_B) % row_step(length) == 0 for _, rows_B, length in groups)


@pytest.mark.parametrize(
    "prompts, length, devices, rows, program",
    [
        (20, 12, 1, 24, 8),
        (24, 12, 1, 24, 8),
        (80, 12, 8, 80, 16),
        (3, 12, 16, 16, 16),
        (20, 12, 6, 36, 18),
        (3, 12, 32, 32, 32),
        (7, 1000, 8, 8, 8),  # two at a time on one device
    ],
)
def test_few_prompts_are_filled_up_with_few_copies(prompts, length, devices, rows, program):
    """20 prompts run as 24 rows, not 32, and each device has as many rows of a program as the others."""
    step_of = functools.partial(row_step, devices=devices)
    ((_, rows_B, _),) = groups_by_length(np.full(prompts, length), step_of, GROUP_TOKENS)
    assert (len(rows_B), rows_at_once(len(rows_B), length, devices)) == (rows, program)
    assert program % devices == 0


def test_longer_prompts_have_a_device_each_and_the_longest_are_not_copied_for_every_device():
    for length, rows in ((1500, 8), (2048, 8), (2050, 1), (4000, 1)):
        assert row_step(length, 8) == rows_at_once(rows, length, 8) == rows
    assert row_step(1500, 8, most=GROUP_TOKENS) == 1 and row_step(1500) == 1
