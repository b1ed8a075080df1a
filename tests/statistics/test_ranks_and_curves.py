"""Rank tests, Holm's correction, dose curves and disjoint sets: by hand, and where nothing is true."""

import numpy as np
import pytest
from scipy.stats import kstest

from saejax.statistics.curves import interpolation_weights
from saejax.statistics.partition import disjoint_sets
from saejax.statistics.ranks import holm, min_controls, rank_p


def test_rank_p_by_hand():
    controls = np.array([0.1, 0.2, 0.3, 0.4])
    assert rank_p(0.5, controls) == pytest.approx(1 / 5)
    assert rank_p(0.3, controls) == pytest.approx(3 / 5), "ties count against the tested set"
    assert rank_p(0.3 + 1e-13, controls) == pytest.approx(3 / 5), "a difference in the last bits is a tie"
    assert rank_p(-1.0, controls) == 1.0
    # Each comparison has its own value of the tested set: it loses at the second and fourth dose.
    assert rank_p(np.array([0.2, 0.1, 0.4, 0.3]), controls) == pytest.approx(3 / 5)
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


@pytest.mark.parametrize(
    ("doses", "values", "at", "expected"),
    [
        ([0, 1, 3], [0, 2, 5], np.linspace(0, 3, 31), np.interp(np.linspace(0, 3, 31), [0, 1, 3], [0, 2, 5])),
        ([0, 1], [0, 1], [1.01, 1 + 1e-12], [np.nan, 1]),  # nothing is extrapolated, but for rounding
        ([0, 2, 1, 4], [0, 10, 20, 30], [1, 2, 2.5], [5, 10, 25]),  # a dose that falls counts where it is reached first
        ([0, 0], [0, 0], [0, 1], [0, np.nan]),  # a curve without dose
    ],
)
def test_interpolation_by_hand(doses, values, at, expected):
    weights = interpolation_weights(np.array(doses, float), np.array(at, float))
    np.testing.assert_allclose(weights @ np.array(values, float), expected, atol=1e-12)


def test_sets_are_disjoint_and_do_not_depend_on_the_order_of_the_pool():
    pool = np.arange(100, 183)
    sets = disjoint_sets(pool, 10, 199, seed=456)
    assert sets.shape == (8, 10)
    assert len(np.unique(sets)) == 80
    assert np.isin(sets, pool).all()
    np.testing.assert_array_equal(sets, disjoint_sets(pool[::-1], 10, 199, seed=456))
    assert disjoint_sets(pool, 10, 3, seed=456).shape == (3, 10)
    assert disjoint_sets(pool[:9], 10, 3, seed=456).shape == (0, 10)
    with pytest.raises(ValueError, match="distinct"):
        disjoint_sets(np.array([1, 1, 2]), 1, 3, seed=0)
