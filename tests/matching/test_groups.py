"""Groups of features: planted ones are found again, shuffled ones are not, and figures are what they say."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.metrics import adjusted_rand_score

from saejax.errors import UserError
from saejax.matching.clusters.groups import Coactivation, find_groups, group_features, overlaps
from saejax.matching.transfer.activity import Activity

GROUPS, MEMBERS = 6, 8


def made_activity(groups: int, members: int, lone: int, tokens: int = 3000, seed: int = 0):
    """Groups whose members fire on most of the group's tokens, and other features that fire where they like.

    Returns:
      The activity, the document of each token (30 tokens each), and the group of each feature, -1 for the others.
    """
    rng = np.random.default_rng(seed)
    on_NxU = rng.random((tokens, groups)) < 0.05
    own = np.repeat(on_NxU, members, axis=1) & (rng.random((tokens, groups * members)) < 0.8)
    background = rng.random((tokens, groups * members + lone)) < np.where(
        np.arange(groups * members + lone) < groups * members, 0.005, 0.04
    )
    fires_NxF = background.copy()
    fires_NxF[:, : groups * members] |= own
    group_F = np.r_[np.repeat(np.arange(groups), members), np.full(lone, -1)]
    order = rng.permutation(len(group_F))
    f_NxF = sparse.csr_array((fires_NxF * rng.uniform(1, 2, fires_NxF.shape)).astype(np.float32)[:, order])
    return Activity(f_NxF, np.ones(tokens, bool)), np.arange(tokens) // 30, group_F[order]


def planted_firings():
    """Firings with planted groups, and the group of each feature."""
    activity, text_N, group_F = made_activity(GROUPS, MEMBERS, 10)
    firings = Coactivation.of(activity, text_N)
    return firings, group_F[firings.feature_F]


def test_planted_groups_are_found_and_those_of_shuffled_data_are_not_stable():
    firings, group_F = planted_firings()
    planted = group_F >= 0
    assert planted.sum() == GROUPS * MEMBERS
    found, similarity_FxF = find_groups(firings, 5, 5, [0])
    assert similarity_FxF.shape == (len(group_F),) * 2
    assert adjusted_rand_score(group_F[planted], found.group_F[planted]) > 0.99
    assert (np.sort(found.overlap_U)[-GROUPS:] > 0.6).all()
    in_stable_F = np.isin(found.group_F, np.flatnonzero(found.overlap_U > found.bar))
    assert in_stable_F[planted].all() and in_stable_F[~planted].sum() <= 2
    shuffled, _ = find_groups(firings.shuffled(np.random.default_rng(0)), 5, 5, [1])
    assert not (shuffled.overlap_U > shuffled.bar).any()


def test_worlds_in_which_nothing_is_true():
    """Features that fire where they like: few of 100 worlds have a stable group; with planted ones most have."""
    passed = {}
    for groups in (0, 4):
        passed[groups] = 0
        for seed in range(100):
            activity, text_N, _ = made_activity(groups, 6, 40 - 6 * groups, tokens=1500, seed=seed)
            found, _ = find_groups(Coactivation.of(activity, text_N), 4, 6, [seed])
            passed[groups] += (found.overlap_U > found.bar).any()
    print(f"a stable group: {passed[0]} of 100 null and {passed[4]} of 100 true worlds")
    assert passed[0] <= 8 and passed[4] >= 80


def test_firings_correlate_as_numpy_says():
    """With tokens counted as a bootstrap sample counts them, which is the same as having them so often."""
    rng = np.random.default_rng(2)
    fires_FxN = (rng.random((7, 90)) < 0.3).astype(np.float32)
    document_N = np.repeat(np.arange(9), 10)
    firings = Coactivation(np.arange(7), sparse.csr_array(fires_FxN), document_N)
    times_N = firings.bootstrap(rng)
    assert times_N.sum() == 90 and (times_N.reshape(9, 10) == times_N[::10, None]).all()
    repeated = np.repeat(fires_FxN.astype(np.float64), times_N.astype(int), axis=1)
    np.testing.assert_allclose(firings.similarity(times_N), np.corrcoef(repeated), atol=1e-5)
    constant = Coactivation(np.arange(2), sparse.csr_array(np.ones((2, 90), np.float32)), document_N)
    assert not constant.similarity().any()


def test_shuffles_keep_each_feature_as_it_is():
    firings, _ = planted_firings()
    shuffled = firings.shuffled(np.random.default_rng(3))
    assert (np.diff(shuffled.fires_FxN.indptr) == np.diff(firings.fires_FxN.indptr)).all()
    places = [each.fires_FxN[[0]].indices for each in (firings, shuffled)]
    gaps = [np.sort(np.diff(np.r_[each, each[:1] + 3000])) for each in places]
    np.testing.assert_array_equal(*gaps)


def test_figures_of_groupings():
    rng = np.random.default_rng(4)
    first, second = rng.integers(5, size=60), rng.integers(4, size=60)
    half = np.where(np.arange(60) < 30, first, -1)
    sets = [[set(np.flatnonzero(of == u)) for u in range(of.max() + 1)] for of in (half, second)]
    wanted = [max(len(a & b) / len(a | b) for b in sets[1]) for a in sets[0]]
    np.testing.assert_allclose(overlaps(half, second), wanted)
    assert not overlaps(half, np.full(60, -1)).any() and not len(overlaps(np.full(3, -1), np.zeros(3, int)))


def test_few_features_and_none():
    silent = Activity(sparse.csr_array((600, 4), dtype=np.float32), np.ones(600, bool))
    none = Coactivation.of(silent, np.arange(600) // 30)
    found, similarity_FxF = find_groups(none, 5, 2, [0])
    assert not len(none.feature_F) and found.bar == 0.5 and similarity_FxF.shape == (0, 0)
    activity, text_N, _ = made_activity(GROUPS, MEMBERS, 10)
    alone = Coactivation.of(activity, text_N).among(1, np.random.default_rng(0))
    found, _ = find_groups(alone, 5, 2, [0])
    assert found.group_F.tolist() == [-1] and not len(found.overlap_U)
    assert group_features(np.zeros((0, 0)), 5).tolist() == []
    activity, text_N, _ = made_activity(1, 3, 0, tokens=300)
    with pytest.raises(UserError, match="are of 2 texts: expected 5 at least"):  # nothing to resample
        Coactivation.of(Activity(activity.f_NxF, np.arange(300) < 40), text_N)
