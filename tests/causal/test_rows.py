"""Which rows are run, on which tokens and in which batches."""

import numpy as np
import pytest

from saejax.causal.rows import Changes, Prompts, all_different, batches_of, groups_of
from saejax.causal.split import prefixes


def test_prompts_that_begin_alike_share_their_numbers():
    ids_PxT = np.array([[5, 6, 7], [5, 6, 8], [4, 6, 7], [5, 6, 7]])
    prefix_PxT = prefixes(ids_PxT)
    for t in range(3):
        for p in range(4):
            for other in range(4):
                alike = (ids_PxT[p, : t + 1] == ids_PxT[other, : t + 1]).all()
                assert (prefix_PxT[p, t] == prefix_PxT[other, t]) == alike


def test_groups_hold_every_set_once_and_few_features():
    sets = [np.array(s, np.int64) for s in ([3, 1], [1, 5], [], [7, 8, 9, 2, 4], [], [9])]
    groups = list(groups_of(sets, 4))
    assert [len(group.members_SxK) for group in groups] == [3, 1, 2]
    for group in groups:
        assert len(group.features_K) in (1, 2, 4, 8) and (np.diff(group.features_K) >= 0).all()
        for number, members_K in zip(group.numbers_S, group.members_SxK, strict=True):
            assert group.features_K[members_K].tolist() == sorted(sets[number].tolist())


class World:
    """50 sets on 9 prompts over two letters: many begin alike, and features often change the same."""

    def __init__(self, features):
        rng = np.random.default_rng(0)
        self.ids_PxT = rng.integers(0, 2, (9, 12))
        self.prompts = Prompts(rng.integers(5, 12, 9), prefixes(self.ids_PxT))
        self.sets = [rng.permutation(40)[: rng.integers(0, 6)] for _ in range(50)]
        by_text = rng.random((12, self.prompts.prefix_PxT.max() + 1, 40)) < 0.03
        real_PxT = np.arange(12)[None, :] <= self.prompts.last_P[:, None]
        self.changed_PxTxF = by_text[np.arange(12)[None, :], self.prompts.prefix_PxT] & real_PxT[..., None]
        self.groups = list(groups_of(self.sets, features))

    def changes(self, group, alike_PxT=None):
        prompts = self.prompts if alike_PxT is None else Prompts(self.prompts.last_P, alike_PxT)
        return Changes.of(prompts, self.changed_PxTxF[:, :, group.features_K], group.members_SxK)

    def text(self, s, p, t):
        """What decides what stands at a token; None before a change."""
        changed_T = [tuple(np.flatnonzero(self.changed_PxTxF[p, u, np.sort(self.sets[s])])) for u in range(t + 1)]
        hits = [tuple(np.sort(self.sets[s])[list(which)]) for which in changed_T]
        return (tuple(self.ids_PxT[p, : t + 1]), tuple(hits)) if any(hits) else None

    def first(self, s, p):
        return next((t for t in range(12) if self.text(s, p, t)), 12)


@pytest.mark.parametrize("most", [1, 30, 2000])
@pytest.mark.parametrize("features", [1, 7, 1000])
@pytest.mark.parametrize("shards", [1, 4])
def test_every_token_of_every_row_is_run(most, features, shards):
    world, rows = World(features), []
    for group in world.groups:
        changes = world.changes(group)
        for batch in batches_of(group, changes, most, shards):
            assert len(batch.shards) == shards and batch.size % 8 == batch.tokens % 8 == 0
            tree, (end_SxR, members_SxRxK) = batch.filled(changes)
            for shard, own in enumerate(batch.shards):
                place_N = tree.place_SxR[shard][tree.row_SxN[shard]]
                position_N = tree.first_SxR[shard][tree.row_SxN[shard]] + tree.column_SxN[shard]
                assert not members_SxRxK[shard, len(own.set_N) :].any()
                for r, (s, p, first) in enumerate(zip(own.set_N, own.place_N, own.first_N, strict=True)):
                    rows.append((s, p))
                    removed = group.features_K[members_SxRxK[shard, r]]
                    np.testing.assert_array_equal(removed, np.sort(world.sets[s]))
                    length = world.prompts.last_P[p] + 1 - first
                    assert first == world.first(s, p) and 0 < length <= batch.length
                    token_T = tree.token_SxRxT[shard, r, :length]
                    assert end_SxR[shard, r] == token_T[-1]
                    for t, token in enumerate(token_T):
                        assert position_N[token] == first + t
                        other = own.set_N[tree.row_SxN[shard, token]], place_N[token]
                        assert world.text(*other, first + t) == world.text(s, p, first + t)
    pairs = [(s, p) for s in range(50) for p in range(9) if world.first(s, p) <= world.prompts.last_P[p]]
    assert sorted(rows) == pairs and len(pairs) > 100


def test_no_token_is_run_twice_in_a_batch():
    world = World(1000)
    (group,) = world.groups
    last_P = world.prompts.last_P
    everything = [
        (s, world.text(s, p, t)) for s in range(50) for p in range(9) for t in range(world.first(s, p), last_P[p] + 1)
    ]

    def run(alike_PxT=None):
        changes = world.changes(group, alike_PxT)
        (batch,) = batches_of(group, changes, 10**9)
        tree = batch.filled(changes)[0]
        return len(set(zip(tree.row_SxN[0].tolist(), tree.column_SxN[0].tolist(), strict=True)))

    assert run() == len({text for _, text in everything}) < len(set(everything)) < len(everything)
    assert run() < run(all_different(world.prompts.prefix_PxT))


def test_what_shares_nothing_is_run_whole():
    world = World(1000)
    (group,) = world.groups
    (batch,) = batches_of(group, Changes.unshared(world.prompts, 50), 10**9)
    assert sum(len(own.set_N) for own in batch.shards) == 50 * 9
    assert 0 <= batch.tokens - 50 * (world.prompts.last_P + 1).sum() < 8


def test_nothing_to_run():
    world = World(1000)
    (group,) = world.groups
    nothing = np.zeros((9, 12, len(group.features_K)), bool)
    assert batches_of(group, Changes.of(world.prompts, nothing, group.members_SxK), 10) == []
