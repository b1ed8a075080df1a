"""Bootstrap, rank tests, permutations, corrections: by hand, by algorithm, where nothing is true."""

import tracemalloc

import numpy as np
import pytest
from scipy.stats import kstest

from saejax.statistics import bootstrap, permutation
from saejax.statistics.ranks import holm, min_controls, rank_p


def test_rank_p_by_hand():
    controls = np.array([0.1, 0.2, 0.3, 0.4])
    assert rank_p(0.5, controls) == pytest.approx(1 / 5)
    assert rank_p(0.3, controls) == pytest.approx(3 / 5), "ties count against the tested set"
    assert rank_p(0.3 + 1e-13, controls) == pytest.approx(3 / 5), "a difference in the last bits is a tie"
    assert rank_p(-1.0, controls) == 1.0
    with pytest.raises(ValueError, match="finite"):
        rank_p(np.nan, controls)


def test_rank_p_is_uniform_where_the_tested_set_is_one_more_random_set():
    rng = np.random.default_rng(0)
    p_values = [rank_p(rng.lognormal(), rng.lognormal(size=199)) for _ in range(2000)]
    assert kstest(p_values, "uniform").pvalue > 0.01


@pytest.mark.parametrize(("tests", "needed"), [(1, 19), (4, 79), (10, 199)])
def test_fewest_controls_that_can_pass(tests, needed):
    assert min_controls(tests) == needed
    assert tests / (1 + needed) <= 0.05 < tests / needed


def test_holm_by_hand():
    # Sorted: 0.01 x 4, 0.02 x 3, 0.03 x 2, 0.04 x 1, each at least its predecessor.
    np.testing.assert_allclose(holm(np.array([0.04, 0.01, 0.03, 0.02])), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm(np.array([0.9, 0.8])), 1.0)
    assert holm(np.zeros(0)).shape == (0,)


@pytest.mark.parametrize("prompts", [9, 30])
def test_max_t_steps_down(prompts):
    """Against the algorithm as it is written: successive maxima, from the smallest statistic on."""
    effect_NxP = np.random.default_rng(prompts).normal([[0.0], [0.4], [1.5], [-1.2], [0.0]], 1.0, (5, prompts))
    effect_NxP[4] = 0.0
    patterns = permutation._sign_patterns(prompts, 999, 0)

    def size(effect_P):
        return abs(effect_P.sum()) / (np.square(effect_P).sum() ** 0.5 or 1.0)

    t_N = np.array([size(effect_P) for effect_P in effect_NxP])
    falling = np.argsort(-t_N)
    expected_N, before = np.zeros(5), 0.0
    for step, n in enumerate(falling):
        largest = [max(size(signs * effect_NxP[m]) for m in falling[step:]) for signs in patterns]
        before = expected_N[n] = max(before, np.mean([value >= t_N[n] - 1e-9 for value in largest]))
    p_N = permutation.max_t_p(effect_NxP, 999, 0)
    np.testing.assert_allclose(p_N, expected_N)
    assert p_N[4] == 1.0


def test_max_t_is_wrong_no_more_often_than_it_says_however_effects_depend():
    """Half of the effects are nearly the same one, turned around: neither independent nor positively dependent."""
    rng, wrong = np.random.default_rng(11), []
    for _ in range(300):
        shared_P, nothing_NxP = rng.normal(size=12), rng.normal(size=(30, 12))
        nothing_NxP[:15] = 0.2 * nothing_NxP[:15] + shared_P * np.where(np.arange(15) % 2, 1.0, -1.0)[:, None]
        planted_NxP = rng.normal(4.0, 1.0, (2, 12))
        p_N = permutation.max_t_p(np.concatenate([nothing_NxP, planted_NxP]), 0, 0)
        wrong.append((p_N[:30] <= 0.05).any())
        assert (p_N[30:] <= 0.05).all()
    assert np.mean(wrong) <= 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5


def test_chunks_make_no_difference(monkeypatch):
    effect_NxP = np.random.default_rng(7).normal(0.2, 1.0, (50, 18))
    together = permutation.max_t_p(effect_NxP, 300, 0)
    monkeypatch.setattr(permutation, "_CHUNK", 1000)
    np.testing.assert_array_equal(together, permutation.max_t_p(effect_NxP, 300, 0))


@pytest.mark.parametrize("effects", [np.zeros((3, 0)), np.zeros(3), np.array([[1.0, np.nan]])])
def test_bad_effects(effects):
    with pytest.raises(ValueError, match="expected finite effects"):
        permutation.max_t_p(effects, 10, 0)


def test_samples_keep_every_stratum_at_its_share():
    weight_RxP = bootstrap.resampling_weights(["a", "a", "a", "b", "b"], 50, seed=0)
    np.testing.assert_allclose(weight_RxP[:, :3].sum(axis=1), 3 / 5)
    np.testing.assert_allclose(weight_RxP[:, 3:].sum(axis=1), 2 / 5)
    # Templates of a single prompt are resampled together; a single one joins the largest template.
    together = bootstrap.resampling_weights(["a", "a", "b", "c", "d"], 50, seed=0)
    np.testing.assert_allclose(together[:, 2:].sum(axis=1), 3 / 5)
    assert together[:, 2].std() > 0
    assert bootstrap.resampling_weights(["a", "a", "a", "b"], 50, seed=0)[:, 3].std() > 0
    assert (bootstrap.resampling_weights(["a"], 50, seed=0) == 1).all()


def test_the_variance_is_that_of_a_stratified_mean():
    """By hand: sum over strata of (n / P)^2 s^2 / n, s^2 with n - 1."""
    rng = np.random.default_rng(0)
    strata = np.repeat(["a", "b", "c"], [4, 10, 6])
    value_P = rng.normal(size=20) + np.repeat([0.0, 5.0, -3.0], [4, 10, 6])
    sample_R = bootstrap.resampling_weights(strata, 100_000, seed=1) @ value_P
    expected = sum((n / 20) ** 2 * value_P[strata == s].var(ddof=1) / n for s, n in (("a", 4), ("b", 10), ("c", 6)))
    assert sample_R.var() == pytest.approx(expected, rel=0.02)
    assert sample_R.mean() == pytest.approx(value_P.mean(), abs=0.01)


def test_intervals_cover_the_mean_of_the_templates_at_hand():
    """Three templates with effects of their own: the mean over new prompts of these templates is what is covered."""
    rng, covered = np.random.default_rng(2), 0
    strata = np.repeat(["a", "b", "c"], 10)
    for world in range(400):
        effect_3 = rng.normal(0, 2, 3)
        value_P = np.repeat(effect_3, 10) + rng.normal(0, 1, 30)
        low, high = bootstrap.percentile_interval(bootstrap.resampling_weights(strata, 500, seed=world) @ value_P)
        covered += low <= effect_3.mean() <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_p_values_by_hand():
    samples = np.array([-1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    # 1 of 9 samples is at most 0: 2 (1 + 1) / (1 + 9).
    assert bootstrap.two_sided_p(samples) == pytest.approx(0.4)
    assert bootstrap.two_sided_p(-samples) == pytest.approx(0.4)
    assert bootstrap.two_sided_p(np.abs(samples)) == pytest.approx(0.2), "never 0"
    assert bootstrap.two_sided_p(np.zeros(9)) == 1.0
    # 2 of 9 samples reach 7: 2 (1 + 2) / (1 + 9).
    assert bootstrap.non_inferiority_p(samples, 7.0) == pytest.approx(0.6)
    assert bootstrap.non_inferiority_p(samples, 100.0) == pytest.approx(0.2)


def test_rules_by_hand():
    sample_R = bootstrap.resampling_weights(["a"] * 5, 100, seed=0) @ np.full(5, 2.0)
    assert bootstrap.percentile_interval(sample_R) == pytest.approx((2.0, 2.0)), "equal values: no width"
    with pytest.raises(ValueError, match="at least one prompt"):
        bootstrap.resampling_weights([], 10, seed=0)
    # Equivalence takes the whole interval within the margin.
    intervals = ((-0.1, 0.1), (-0.1, 0.2), (-0.2, 0.0))
    assert [bootstrap.is_equivalent(interval, 0.1) for interval in intervals] == [True, False, False]
    means = bootstrap.stratum_means(np.array([1.0, 3.0, -1.0]), ["a", "a", "b"])
    assert means == {"a": 2.0, "b": -1.0}
    signs = ([2.0, -1.0], [-1.0, -2.0], [1.0, 0.0], [])
    assert [bootstrap.has_same_sign(values) for values in signs] == [False, True, False, False]


@pytest.mark.parametrize(("prompts", "rate"), [(2, 0.23), (4, 0.09), (6, 0.06), (20, 0.03)])
def test_on_noise_few_prompts_are_often_sure(prompts, rate):
    """Why a mean of fewer than 6 prompts is not testable; at the level of 5 %, half of the errors are above zero."""
    weights_RxP = bootstrap.resampling_weights(["template"] * prompts, 2000, seed=1)
    sample_NxR = np.random.default_rng(0).standard_normal((3000, prompts)) @ weights_RxP.T
    is_sure = [
        bootstrap.percentile_interval(sample_R)[0] > 0 and bootstrap.two_sided_p(sample_R) <= 0.05
        for sample_R in sample_NxR
    ]
    assert np.mean(is_sure) == pytest.approx(rate, abs=0.015)


def test_label_correlations_are_numpys_and_the_largest_of_moved_labels():
    rng = np.random.default_rng(0)
    value_NxF, has_NxL = rng.normal(size=(12, 3)), rng.random((12, 2)) < 0.5
    value_NxF[:, 2] = 1.0
    order_SxN = [rng.permutation(12) for _ in range(4)]
    seen_FxL, largest_S = permutation.label_correlations(value_NxF, has_NxL, order_SxN)
    expected_2xL = np.corrcoef(value_NxF[:, :2].T, has_NxL.T)[:2, 2:]
    np.testing.assert_allclose(seen_FxL, [*expected_2xL, [0, 0]], atol=1e-12)
    moved = [np.corrcoef(value_NxF[:, :2].T, has_NxL[order_N].T)[:2, 2:] for order_N in order_SxN]
    np.testing.assert_allclose(largest_S, [max(r_2xL.max(), 0) for r_2xL in moved], atol=1e-12)


def test_permuted_labels_take_the_memory_of_one_permutation():
    rng = np.random.default_rng(0)
    value_NxF, has_NxL = rng.normal(size=(30, 2000)), rng.random((30, 6)) < 0.5
    order_SxN = [rng.permutation(30) for _ in range(99)]
    tracemalloc.start()
    permutation.label_correlations(value_NxF, has_NxL, order_SxN)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * value_NxF.nbytes + 4 * 2000 * 6 * 8, "those of all permutations take 99 times 2,000 x 6 numbers"
