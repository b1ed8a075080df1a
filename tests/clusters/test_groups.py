"""Groups of features: planted ones are found again, shuffled ones are not, and figures are what they say."""

from types import SimpleNamespace

import numpy as np
import pytest
from planted_groups import made_activity
from scipy import sparse
from sklearn.metrics import adjusted_rand_score

from saejax.clusters import views
from saejax.clusters.agreement import GroupedFeatures, between_dictionaries
from saejax.clusters.groups import agreement, find, methods, overlaps
from saejax.transfer.activity import Activity
from saejax.transfer.stability import unit

GROUPS, MEMBERS = 6, 8
METHODS = methods(5, GROUPS)


def made_view(name):
    """A view with planted groups, and the group of each of its features."""
    rng = np.random.default_rng(1)
    if name == "coactivation":
        activity, text_N, group_F = made_activity(GROUPS, MEMBERS, 10)
        view = views.coactivation(activity, text_N)
        return view, group_F[view.feature_F]
    centre = rng.normal(size=(GROUPS, 64))
    group_F = np.repeat(np.arange(GROUPS), MEMBERS)
    rows_FxD = centre[group_F] + 0.6 * rng.normal(size=(len(group_F), 64))
    if name == "effects":
        return views.effects(np.arange(len(group_F)), rows_FxD), group_F
    everywhere = Activity(sparse.csr_array(np.ones((3, len(group_F)), np.float32)), np.ones(3, bool))
    return views.decoder(rows_FxD, everywhere), group_F


@pytest.mark.parametrize("name", ["coactivation", "effects", "decoder"])
def test_planted_groups_are_found_and_those_of_shuffled_data_are_not_stable(name):
    view, group_F = made_view(name)
    planted = group_F >= 0
    assert planted.sum() == GROUPS * MEMBERS
    found, alike_FxF = find(view, METHODS, 5, [0])
    assert alike_FxF.shape == (len(group_F),) * 2
    for method, one in found.items():
        assert adjusted_rand_score(group_F[planted], one.group_F[planted]) > 0.99, method
        assert one.stable and one.agreement_R.min() > 0.7
        assert (np.sort(one.overlap_U)[-GROUPS:] > 0.6).all()
    dense = found["HDBSCAN"]
    in_stable_F = np.isin(dense.group_F, np.flatnonzero(dense.overlap_U > dense.bar))
    if name != "decoder":  # random directions in the six dimensions of the planted centres have groups as firm
        assert in_stable_F[planted].all() and in_stable_F[~planted].sum() <= 2
    shuffled, _ = find(view.shuffled(np.random.default_rng(0)), METHODS, 5, [1])
    assert not any(one.stable for one in shuffled.values())


def test_worlds_in_which_nothing_is_true():
    """Features that fire where they like: 24 worlds, of which few have a grouping that passes for stable."""
    said = []
    for seed in range(24):
        activity, text_N, _ = made_activity(0, 0, 40, tokens=600, seed=seed)
        found, _ = find(views.coactivation(activity, text_N), methods(3, 6), 4, [seed])
        said += [one.stable and (one.overlap_U > one.bar).any() for one in found.values()]
    assert np.mean(said) < 0.1


def test_a_view_compares_as_numpy_does():
    """With columns counted as a bootstrap sample counts them, which is the same as having them so often."""
    rng = np.random.default_rng(2)
    rows_FxN = (rng.random((7, 90)) < 0.3).astype(np.float32)
    block_N = np.repeat(np.arange(9), 10)
    view = views.View(np.arange(7), sparse.csr_array(rows_FxN), block_N, True, lambda rows, rng: rows)
    times_N = view.drawn(rng)
    assert times_N.sum() == 90 and (times_N.reshape(9, 10) == times_N[::10, None]).all()
    repeated = np.repeat(rows_FxN.astype(np.float64), times_N.astype(int), axis=1)
    np.testing.assert_allclose(view.alike(times_N), np.corrcoef(repeated), atol=1e-5)
    dense = views.View(np.arange(7), rows_FxN, block_N, False, lambda rows, rng: rows)
    np.testing.assert_allclose(dense.alike(), unit(rows_FxN) @ unit(rows_FxN).T, atol=1e-5)
    constant = views.View(np.arange(2), np.ones((2, 90), np.float32), block_N, True, lambda rows, rng: rows)
    assert not constant.alike().any()


def test_shuffles_keep_each_feature_as_it_is():
    view, _ = made_view("coactivation")
    other = view.shuffled(np.random.default_rng(3))
    assert (np.diff(other.rows.indptr) == np.diff(view.rows.indptr)).all()
    gaps = [np.sort(np.diff(np.r_[one, one[:1] + 3000])) for one in (view.rows[[0]].indices, other.rows[[0]].indices)]
    np.testing.assert_array_equal(*gaps)
    effects, _ = made_view("effects")
    moved = effects.shuffled(np.random.default_rng(3))
    np.testing.assert_array_equal(np.sort(moved.rows, axis=1), np.sort(effects.rows, axis=1))


def test_figures_of_groupings():
    rng = np.random.default_rng(4)
    first, second = rng.integers(5, size=60), rng.integers(4, size=60)
    assert abs(agreement(first, second) - adjusted_rand_score(first, second)) < 1e-12
    assert agreement(first, first) == 1.0 and agreement(np.full(9, -1), np.full(9, -1)) == 0.0
    half = np.where(np.arange(60) < 30, first, -1)
    assert abs(agreement(half, half) - 1) < 1e-12  # what is in no group is alone in both
    sets = [[set(np.flatnonzero(of == u)) for u in range(of.max() + 1)] for of in (half, second)]
    wanted = [max(len(a & b) / len(a | b) for b in sets[1]) for a in sets[0]]
    np.testing.assert_allclose(overlaps(half, second), wanted)
    assert not overlaps(half, np.full(60, -1)).any() and not len(overlaps(np.full(3, -1), np.zeros(3, int)))


def test_few_features_and_none():
    silent = Activity(sparse.csr_array((600, 4), dtype=np.float32), np.ones(600, bool))
    assert not len(views.coactivation(silent, np.arange(600) // 30).feature_F)
    assert not len(views.decoder(np.eye(4), silent).feature_F)
    alone = views.View(np.array([3]), np.ones((1, 8), np.float32), np.arange(8), False, lambda rows, rng: rows)
    found, _ = find(alone, METHODS, 2, [0])
    for one in found.values():
        assert one.group_F.tolist() == [-1] and not one.stable and not len(one.overlap_U)
    activity, text_N, _ = made_activity(1, 3, 0, tokens=300)
    seldom = views.coactivation(Activity(activity.f_NxF, np.arange(300) < 40), text_N)  # two texts
    assert not len(seldom.feature_F)


def test_a_dictionary_groups_its_features_as_its_copy_does():
    """Of a permuted copy, by matched decoder rows: 1; with groups dealt out at random, about 0."""
    rng = np.random.default_rng(6)
    rows_FxD, group_F, order = rng.normal(size=(40, 16)), np.repeat(np.arange(5), 8), rng.permutation(40)

    def made(name, rows):
        config = SimpleNamespace(site="resid_post.1")
        dictionary = SimpleNamespace(W_dec_FxD=rows, site=config.site, config=config)
        return SimpleNamespace(name=name, fingerprint="m", dictionary=dictionary)

    def table(group):
        words = (np.full(40, word) for word in ("decoder", "spectral"))
        return GroupedFeatures(*words, group, np.arange(40), np.zeros(40))

    compared = [made("a", rows_FxD), made("b", rows_FxD[order])]
    (pair,) = between_dictionaries(compared, [table(group_F), table(group_F[order])], 0)
    assert pair.features == 40 and pair.agreement == 1.0 and pair.null.low < 0.05 > pair.null.mean
    compared[1].dictionary.site = "resid_post.2"
    assert not between_dictionaries(compared, [table(group_F), table(group_F[order])], 0)
