"""Matched random features: how near, never the tested ones, never twice, and the same for the same seed."""

import dataclasses

import numpy as np
import pytest

from saejax.causal import controls
from saejax.causal.results import ControlMatch
from saejax.errors import UserError


def statistics_of(rate_F, size_F, positions=10_000):
    fires_F = np.round(np.asarray(rate_F) * positions).astype(np.int64)
    return controls.FeatureStatistics(positions, fires_F, fires_F * np.asarray(size_F, np.float64))


@pytest.fixture(scope="module")
def many():
    """2,000 features, rates from 0.1 % to 50 % and sizes over two orders of magnitude; every tenth is dead."""
    rng = np.random.default_rng(0)
    rate_F = np.exp(rng.uniform(np.log(1e-3), np.log(0.5), 2000))
    rate_F[::10] = 0.0
    return statistics_of(rate_F, np.exp(rng.normal(0.0, 1.0, 2000)))


def firing(statistics, count, seed=1):
    return np.random.default_rng(seed).choice(np.flatnonzero(statistics.fires_at_all_F), count, replace=False).tolist()


def test_statistics_add_up_over_parts():
    f_TxF = np.abs(np.random.default_rng(2).normal(size=(30, 5))) * (np.random.default_rng(3).random((30, 5)) < 0.4)
    f_TxF[:, 4] = 0.0
    parts = [(len(part), (part > 0).sum(axis=0), part.sum(axis=0)) for part in (f_TxF[:11], f_TxF[11:])]
    total = controls.FeatureStatistics.total(parts)
    np.testing.assert_allclose(total.firing_rate_F, (f_TxF > 0).mean(axis=0))
    np.testing.assert_allclose(total.mean_activation_F[:4], [f_TxF[f_TxF[:, i] > 0, i].mean() for i in range(4)])
    assert total.mean_activation_F[4] == 0.0 and not total.fires_at_all_F[4]


def test_controls_match_their_feature(many):
    features = firing(many, 20)
    drawn_NxK = controls.draw_controls(many, features, draws=200, matches=10, seed=456)
    ratios = controls.match_ratios(many, features, drawn_NxK)
    assert ratios.firing_rate_ratio and 0.9 < ratios.firing_rate_ratio < 1.1
    assert ratios.activation_ratio and 0.9 < ratios.activation_ratio < 1.1
    # Each one by itself is near, not only the median: unmatched features differ by a factor of 5 on average.
    apart_NxK = np.abs(np.log(many.firing_rate_F[drawn_NxK] / many.firing_rate_F[features][None, :]))
    assert np.quantile(apart_NxK, 0.9) < np.log(2.0)


def test_no_tested_feature_no_dead_feature_nothing_twice(many):
    features = firing(many, 20)
    drawn_NxK = controls.draw_controls(many, features, draws=200, matches=10, seed=456)
    assert drawn_NxK.shape == (200, 20)
    assert not np.isin(drawn_NxK, features).any()
    assert many.fires_at_all_F[drawn_NxK].all()
    assert all(len(set(row)) == 20 for row in drawn_NxK.tolist())


def test_features_that_want_the_same_controls_get_different_ones():
    # 6 identical features under test among 30 identical ones: all the distances are equal.
    alike = statistics_of(np.full(36, 0.1), np.full(36, 2.0))
    drawn_NxK = controls.draw_controls(alike, range(6), draws=300, matches=4, seed=0)
    assert all(len(set(row)) == 6 for row in drawn_NxK.tolist())
    assert set(np.unique(drawn_NxK)) <= set(range(6, 6 + 4 + 5))


def test_every_match_is_drawn_about_equally_often():
    rate_F = np.concatenate([[0.1], np.linspace(0.09, 0.11, 10), np.full(50, 0.4)])
    drawn_N = controls.draw_controls(statistics_of(rate_F, np.ones(61)), [0], 5000, matches=10, seed=5)[:, 0]
    values, counts = np.unique(drawn_N, return_counts=True)
    assert values.tolist() == list(range(1, 11))
    assert counts.min() > 400 and counts.max() < 600


def test_nearest_by_both_coordinates_on_a_log_scale():
    # Feature 0 is (0.1, 1). Feature 1 has half the rate, 2 three times, 3 the same rate but a thousandfold size.
    nearest_KxC = controls.nearest_features(statistics_of([0.1, 0.05, 0.3, 0.1], [1.0, 1.0, 1.0, 1000.0]), [0])
    assert nearest_KxC.tolist() == [[1, 2, 3]]


def test_the_seed_decides(many):
    features = firing(many, 5)
    first, again, other = (controls.draw_controls(many, features, 50, 10, seed) for seed in ([456, 1], [456, 1], 7))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_too_few_candidates_is_the_users_error():
    few = statistics_of([0.1] * 9 + [0.0] * 50, np.ones(59))
    controls.draw_controls(few, [0, 1, 2], draws=2, matches=4, seed=0)  # 6 others are just enough
    with pytest.raises(UserError, match="only 6 features besides the 3 .* need 7"):
        controls.draw_controls(few, [0, 1, 2], draws=2, matches=5, seed=0)


def test_no_features_need_no_controls(many):
    drawn_NxK = controls.draw_controls(many, [], draws=3, matches=10, seed=0)
    assert drawn_NxK.shape == (3, 0)
    assert controls.match_ratios(many, [], drawn_NxK) == ControlMatch(None, None, None)


def test_lengths_of_directions_count_too(many):
    # Of 12 features alike in rate and size, half have directions ten times as long.
    norm_F = np.where(np.arange(12) < 6, 1.0, 10.0)
    statistics = dataclasses.replace(statistics_of(np.full(12, 0.1), np.full(12, 2.0)), norm_F=norm_F)
    assert controls.nearest_features(statistics, [8])[0, :5].tolist() == [6, 7, 9, 10, 11]
    drawn_NxK = controls.draw_controls(statistics, [8], draws=50, matches=5, seed=0)
    assert (drawn_NxK > 5).all()
    assert controls.match_ratios(statistics, [8], drawn_NxK).norm_ratio == 1.0
    # Directions of length 1, but for rounding, change nothing.
    unit_F = 1 + 1e-7 * np.random.default_rng(0).normal(size=2000)
    features = firing(many, 5)
    for one, two in zip(
        controls.nearest_features(many, features),
        controls.nearest_features(dataclasses.replace(many, norm_F=unit_F), features),
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)


def test_a_dead_feature_has_no_control(many):
    with pytest.raises(ValueError, match="never fires"):
        controls.nearest_features(many, [0])


def test_position_counts_too():
    """Of 12 features alike in all else, half fire near the end of prompts."""
    statistics = statistics_of(np.full(12, 0.1), np.full(12, 2.0))
    place_F = statistics.fires_F * np.where(np.arange(12) < 6, 9.0, 2.0)
    placed = dataclasses.replace(statistics, place_F=place_F)
    assert controls.nearest_features(placed, [8])[0, :5].tolist() == [6, 7, 9, 10, 11]
    drawn_NxK = controls.draw_controls(placed, [8], draws=20, matches=5, seed=0)
    assert controls.match_ratios(placed, [8], drawn_NxK).place_ratio == 1.0
    parts = [(100, statistics.fires_F, statistics.sum_F, place_F)] * 2
    np.testing.assert_array_equal(controls.FeatureStatistics.total(parts).place_F, 2 * place_F)


def test_the_size_of_a_set_is_that_of_its_sum():
    rng = np.random.default_rng(3)
    features_K, removed_NxK, W_KxD = np.array([2, 5, 9, 11]), rng.random((30, 4)), rng.normal(size=(4, 6))
    change_KxK = (removed_NxK.T @ removed_NxK) * (W_KxD @ W_KxD.T)
    for chosen in ([0, 3], [1], [0, 1, 2, 3]):
        whole_NxD = removed_NxK[:, chosen] @ W_KxD[chosen]
        (found,) = controls.joint_size(change_KxK, features_K, [features_K[chosen]])
        assert found == pytest.approx(np.sqrt(np.square(whole_NxD).sum()))
    assert controls.nearest_in_size(np.array([1.0, 8.0, 2.2, 1.9, 0.0]), 2.0, 3).tolist() == [0, 2, 3]


def test_disjoint_sets_are_as_many_as_can_be_given_out():
    # Three features far apart, with 4, 4 and 2 features near them: the scarcest decides.
    rate_F = np.concatenate([[0.01, 0.1, 0.5], np.full(4, 0.0101), np.full(4, 0.101), np.full(2, 0.501)])
    statistics = statistics_of(rate_F, np.ones(13))
    assert controls.disjoint_sets(statistics, [0, 1], 4) == 4
    assert controls.disjoint_sets(statistics, [0, 1, 2], 2) == 2
    # Two alike share their pool.
    alike = statistics_of(np.full(12, 0.1), np.ones(12))
    assert controls.disjoint_sets(alike, [0, 1], 9) == 4 and controls.disjoint_sets(alike, [0], 3) == 3
    assert controls.disjoint_sets(alike, [], 3) == 0


def test_matches_shrink_to_what_there_is():
    few = statistics_of([0.1] * 9 + [0.0] * 50, np.ones(59))
    assert controls.fitting_matches(few, [0, 1, 2], 40) == 4
    controls.draw_controls(few, [0, 1, 2], draws=2, matches=4, seed=0)
    with pytest.raises(UserError, match="only 3 features besides the 6"):
        controls.draw_controls(few, range(6), 2, controls.fitting_matches(few, range(6), 40), seed=0)
