"""Statistics of many effects: against scipy, against the formula, and on what is known to be there."""

import itertools

import numpy as np
import pytest
from scipy import stats

from saejax.causal import statistics
from saejax.tasks import scoring
from saejax.tasks.scoring import bootstrap_means

RNG = np.random.default_rng(5)


def test_intervals_are_those_of_the_bootstrap():
    effect_NxP = RNG.normal(0.3, 1.0, (3, 20)) * np.array([[1.0], [10.0], [0.1]])
    low_N, high_N = bootstrap_means(effect_NxP, 100_000, seed=1)
    for effect_P, low, high in zip(effect_NxP, low_N, high_N, strict=True):
        theirs = stats.bootstrap(
            (effect_P,), np.mean, n_resamples=100_000, batch=10_000, method="percentile", rng=np.random.default_rng(2)
        ).confidence_interval
        spread = effect_P.std() / 20**0.5
        np.testing.assert_allclose([low, high], theirs, atol=0.05 * spread)


def test_intervals_hold_the_mean_as_often_as_they_say():
    effect_NxP = np.random.default_rng(6).normal(0.5, 1.0, (2000, 40))
    low_N, high_N = bootstrap_means(effect_NxP, 500, seed=3)
    assert 0.91 < np.mean((low_N < 0.5) & (high_N > 0.5)) < 0.96


@pytest.mark.parametrize("prompts", [1, 2, 7, 11])
def test_exact_p_values_count_all_sign_patterns(prompts):
    effect_NxP = RNG.normal(0.4, 1.0, (4, prompts))
    effect_NxP[1] = 1.0  # many patterns tie
    patterns = np.array(list(itertools.product([1.0, -1.0], repeat=prompts)))
    for effect_P, p in zip(effect_NxP, statistics.sign_flip_p(effect_NxP, 10, seed=0), strict=True):
        sums = [abs(sum(s * e for s, e in zip(pattern, effect_P, strict=True))) for pattern in patterns]
        assert p == pytest.approx(np.mean([s >= abs(effect_P.sum()) - 1e-9 for s in sums]))


def test_random_patterns_agree_with_scipy():
    effect_NxP = RNG.normal([[0.0], [0.3], [0.5]], 1.0, (3, 24))
    p_N = statistics.sign_flip_p(effect_NxP, 40_000, seed=0)
    for effect_P, p in zip(effect_NxP, p_N, strict=True):
        theirs = stats.permutation_test(
            (effect_P,), np.mean, permutation_type="samples", n_resamples=40_000, rng=np.random.default_rng(3)
        ).pvalue
        assert p == pytest.approx(theirs, abs=0.012)


def test_what_has_no_effect_is_no_discovery():
    effect_NxP = np.zeros((2, 20))
    effect_NxP[1, :3] = 2.0  # on three prompts only: the sign patterns of the others make no difference
    p_N = statistics.sign_flip_p(effect_NxP, 30_000, seed=0)
    assert p_N[0] == 1.0 and p_N[1] == pytest.approx(2 / 2**3, abs=0.01)


def test_p_values_of_nothing_are_uniform_and_discoveries_as_rare_as_promised():
    rng = np.random.default_rng(8)
    nothing_NxP = rng.standard_t(3, (2000, 20))
    p_N = statistics.sign_flip_p(nothing_NxP, 5000, seed=0)
    assert stats.kstest(p_N, "uniform").pvalue > 1e-3
    assert not (stats.false_discovery_control(p_N) <= 0.05).any()
    planted_NxP = np.concatenate([rng.normal(1.5, 1.0, (100, 20)), nothing_NxP[:900]])
    found_N = stats.false_discovery_control(statistics.sign_flip_p(planted_NxP, 50_000, seed=0)) <= 0.05
    assert found_N[:100].mean() > 0.9 and found_N[100:].sum() <= 0.1 * found_N.sum()


@pytest.mark.parametrize("prompts", [9, 30])
def test_max_t_steps_down(prompts):
    """Against the algorithm as it is written: successive maxima, from the smallest statistic on."""
    effect_NxP = np.random.default_rng(prompts).normal([[0.0], [0.4], [1.5], [-1.2], [0.0]], 1.0, (5, prompts))
    effect_NxP[4] = 0.0
    patterns = statistics._sign_patterns(prompts, 999, 0)

    def size(effect_P):
        return abs(effect_P.sum()) / (np.square(effect_P).sum() ** 0.5 or 1.0)

    t_N = np.array([size(effect_P) for effect_P in effect_NxP])
    falling = np.argsort(-t_N)
    expected_N, before = np.zeros(5), 0.0
    for step, n in enumerate(falling):
        largest = [max(size(signs * effect_NxP[m]) for m in falling[step:]) for signs in patterns]
        before = expected_N[n] = max(before, np.mean([value >= t_N[n] - 1e-9 for value in largest]))
    found_N = statistics.max_t_p(effect_NxP, 999, 0)
    np.testing.assert_allclose(found_N, expected_N)
    assert found_N[4] == 1.0 and (found_N >= statistics.sign_flip_p(effect_NxP, 999, 0) - 1e-12).all()


def test_max_t_is_wrong_no_more_often_than_it_says_however_effects_depend():
    """Half of the effects are nearly the same one, turned around: neither independent nor positively dependent."""
    rng, wrong = np.random.default_rng(11), []
    for _ in range(300):
        shared_P, nothing_NxP = rng.normal(size=12), rng.normal(size=(30, 12))
        nothing_NxP[:15] = 0.2 * nothing_NxP[:15] + shared_P * np.where(np.arange(15) % 2, 1.0, -1.0)[:, None]
        planted_NxP = rng.normal(4.0, 1.0, (2, 12))
        p_N = statistics.max_t_p(np.concatenate([nothing_NxP, planted_NxP]), 0, 0)
        wrong.append((p_N[:30] <= 0.05).any())
        assert (p_N[30:] <= 0.05).all()
    assert np.mean(wrong) <= 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5


def test_q_values_are_those_of_benjamini_and_hochberg():
    """The q-value of the k-th smallest of N p-values is the least of N p / rank over it and all larger ones."""
    p_N = np.concatenate([RNG.uniform(0, 0.01, 10), RNG.uniform(0, 1, 90), [0.5, 0.5, 1.0, 1e-9]])
    ranked_N = np.sort(p_N)
    scaled_N = len(p_N) * ranked_N / np.arange(1, len(p_N) + 1)
    expected_N = [min(1.0, scaled_N[ranked_N >= p].min()) for p in p_N]
    np.testing.assert_allclose(stats.false_discovery_control(p_N), expected_N)
    assert len(stats.false_discovery_control(np.zeros(0))) == 0


def test_holm_rejects_step_by_step():
    rng = np.random.default_rng(9)
    for p_N in (rng.uniform(0, 0.05, 8), rng.uniform(0, 1, 5), np.array([0.01, 0.01, 0.04, 1.0]), np.array([0.3])):
        adjusted_N = statistics.holm(p_N)
        for level in np.linspace(0.001, 0.999, 97):
            rejected_N = np.zeros(len(p_N), bool)
            for step, n in enumerate(np.argsort(p_N)):  # until the first that is not small enough
                if p_N[n] > level / (len(p_N) - step):
                    break
                rejected_N[n] = True
            np.testing.assert_array_equal(adjusted_N <= level, rejected_N)
    assert len(statistics.holm(np.zeros(0))) == 0


def test_chunks_make_no_difference(monkeypatch):
    effect_NxP = RNG.normal(0.2, 1.0, (50, 18))
    whole = bootstrap_means(effect_NxP, 300, 0), statistics.sign_flip_p(effect_NxP, 300, 0)
    together = statistics.max_t_p(effect_NxP, 300, 0)
    monkeypatch.setattr(scoring, "_CHUNK", 1000)
    parts = bootstrap_means(effect_NxP, 300, 0), statistics.sign_flip_p(effect_NxP, 300, 0)
    np.testing.assert_allclose(whole[0], parts[0])
    np.testing.assert_array_equal(whole[1], parts[1])
    np.testing.assert_array_equal(together, statistics.max_t_p(effect_NxP, 300, 0))


@pytest.mark.parametrize("effects", [np.zeros((3, 0)), np.zeros(3), np.array([[1.0, np.nan]])])
def test_bad_effects(effects):
    for call in (bootstrap_means, statistics.sign_flip_p, statistics.max_t_p):
        with pytest.raises(ValueError, match="expected finite effects"):
            call(effects, 10, 0)
