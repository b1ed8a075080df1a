"""The bootstrap within strata: by hand, by its variance, by its coverage."""

import numpy as np
import pytest

from saejax.statistics import bootstrap


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
