"""Bootstrap intervals against closed forms, their coverage, and odd cases."""

import dataclasses
import json
import statistics

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from saejax.results import Interval
from saejax.statistics import intervals as statistics_intervals
from saejax.statistics.intervals import bootstrap, bootstrap_mean, wilson
from saejax.tasks.baseline import SEPARATION_LIMIT, separation


def bootstrap_separation(values_N, seed, resamples):
    return bootstrap(values_N, separation, resamples, seed)


@pytest.mark.parametrize("n, right", [(20, 12), (20, 19), (80, 71)])
def test_interval_of_a_share_is_the_binomial_one(n, right):
    # Resampling n answers of which a share is right draws from a binomial distribution.
    interval, ends = bootstrap_mean(np.arange(n) < right, 3, 40_000), binom.ppf([0.025, 0.975], n, right / n) / n
    assert [interval.mean, interval.low, interval.high] == pytest.approx([right / n, *ends])


def test_interval_of_a_mean_is_near_the_normal_one():
    values_N = np.random.default_rng(0).normal(3, 2, 400)
    interval, mean, half = bootstrap_mean(values_N, 1, 20_000), values_N.mean(), 1.96 * values_N.std() / 20
    assert interval.mean == pytest.approx(mean)
    assert [interval.low, interval.high] == pytest.approx([mean - half, mean + half], abs=0.03 * half)
    assert interval == bootstrap_mean(values_N, 1, 20_000) != bootstrap_mean(values_N, 2, 20_000)


@pytest.mark.parametrize("of, truth", [(bootstrap_mean, 1.5), (bootstrap_separation, 0.75)])
def test_intervals_cover_the_truth(of, truth):
    rng = np.random.default_rng(0)
    intervals = [of(rng.normal(1.5, 2.0, 60), i, 500) for i in range(400)]
    covered = np.mean([i.low <= truth <= i.high for i in intervals])
    assert 0.91 <= covered <= 0.98


def test_separation_is_mean_over_standard_deviation():
    rows = np.random.default_rng(0).normal(1, 2, (5, 9))
    expected = [statistics.fmean(row) / statistics.pstdev(row) for row in rows.tolist()]
    np.testing.assert_allclose(separation(rows), expected, rtol=1e-12)
    assert bootstrap_separation(rows[0], 0, 100).mean == pytest.approx(expected[0])
    some = bootstrap_separation(np.array([1.0, 2.0]), 0, 1000)  # a resample may have no spread
    assert some.mean == pytest.approx(3.0) and some.high == SEPARATION_LIMIT


@pytest.mark.parametrize(
    "values, mean, separated",
    [
        ([2.5], 2.5, SEPARATION_LIMIT),
        ([-2.5], -2.5, -SEPARATION_LIMIT),
        ([0.0], 0.0, 0.0),
        ([0.1] * 7, 0.1, SEPARATION_LIMIT),  # the mean of seven times 0.1 is not 0.1 to the last bit
        ([0.0, 0.0, 0.0], 0.0, 0.0),
        ([1.0, 1.0 + 1e-15], 1.0, SEPARATION_LIMIT),
    ],
)
def test_one_prompt_and_equal_prompts(values, mean, separated):
    assert bootstrap_mean(np.array(values), 0, 200).mean == pytest.approx(mean)
    interval = bootstrap_separation(np.array(values), 0, 200)
    assert interval == Interval(separated, separated, separated)
    json.dumps(dataclasses.asdict(interval), allow_nan=False)


@pytest.mark.parametrize("right, trials", [(0, 20), (13, 20), (20, 20), (1, 1), (97, 100)])
def test_intervals_of_shares_are_those_of_scipy(right, trials):
    theirs = binomtest(right, trials).proportion_ci(method="wilson")
    found = wilson(np.arange(trials) < right)
    assert (found.mean, found.low, found.high) == pytest.approx((right / trials, theirs.low, theirs.high))


def test_any_statistic_in_chunks_of_resamples(monkeypatch):
    values_N = np.random.default_rng(0).exponential(1, 101)
    shapes = []

    def median(values_RxN):
        shapes.append(values_RxN.shape)
        return np.median(values_RxN, axis=1)

    interval = bootstrap(values_N, median, 2000, seed=0)
    assert interval.mean == np.median(values_N) and interval.low < interval.mean < interval.high
    monkeypatch.setattr(statistics_intervals, "_CHUNK", 4000)
    shapes.clear()
    bootstrap(values_N, median, 2000, seed=0)
    assert sum(rows for rows, _ in shapes) == 2001  # with the values themselves
    assert max(4 * rows * n for rows, n in shapes) <= 4000 and {n for _, n in shapes} == {101}


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")], [[1.0, 2.0]]])
def test_what_has_no_interval_is_refused(values):
    with pytest.raises(ValueError, match="expected finite numbers"):
        bootstrap_mean(np.array(values), 0, 100)
