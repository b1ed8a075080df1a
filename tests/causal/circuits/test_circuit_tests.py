"""The tests of a circuit: their p-values by brute force, their error rates, and sets whose truth is known."""

import dataclasses
import json

import numpy as np
import pytest
from linear_experiment import LinearExperiment
from scipy.stats import binom

from saejax.causal.circuits import hypotheses
from saejax.causal.circuits.measure import _answer
from saejax.causal.circuits.measure import test_circuit as measure_circuit
from saejax.causal.controls import draw_controls
from saejax.causal.statistics import holm
from saejax.errors import UserError
from saejax.results import to_json
from saejax.settings import AblateConfig

CONFIG = AblateConfig()
CIRCUIT = list(range(50, 60))


def world(dead=(), seed=0, prompts=140):
    """300 features: 50 to 59 carry the answer, the others push every second prompt a little up, the others down."""
    gain_PxF = 0.005 * np.random.default_rng([seed, 1]).normal(size=(prompts, 300))
    gain_PxF[:, CIRCUIT] = 1.0
    made = LinearExperiment(gain_PxF, base=-1.0, attribution_F=gain_PxF.mean(axis=0), dead=dead, prompts=prompts)
    rng = np.random.default_rng([seed, 2])
    made.f_PxF[:, CIRCUIT] = rng.uniform(0.5, 1.5, (prompts, len(CIRCUIT)))  # each fires on every prompt
    made.f_PxF[:, list(dead)] = 0.0
    others = np.setdiff1d(np.arange(300), CIRCUIT)
    push_P = (made.f_PxF * made.gain_PxF)[:, others].sum(axis=1)
    turned_P = np.where((push_P > 0) == (np.arange(prompts) % 2 == 0), 1.0, -1.0)
    made.gain_PxF = made.gain_PxF * np.where(np.isin(np.arange(300), others), turned_P[:, None], 1.0)
    return made


@pytest.fixture(scope="module")
def planted():
    return world()


def given(results):
    return {name: outcome.answer for name, outcome in results.tests.items()}


OF_A_CIRCUIT = dict.fromkeys(hypotheses.TESTS, "shown") | dict(independence="inconclusive")


def test_a_true_circuit_passes_every_test(planted):
    results, scores = measure_circuit(planted, CIRCUIT, CONFIG)
    assert given(results) == OF_A_CIRCUIT
    assert results.tests["minimality"].statistic == 1.0 and all(f.minimal for f in results.features)
    drop_P, all_P = planted.drop(CIRCUIT), planted.drop(range(300))
    np.testing.assert_allclose(scores.removed_P, planted.clean() - drop_P)
    np.testing.assert_allclose(scores.kept_P, planted.clean() - all_P + drop_P)
    means = [planted.clean().mean(), scores.kept_P.mean(), scores.removed_P.mean()]
    assert [results.clean, results.kept, results.removed] == pytest.approx(means)
    for n, entry in enumerate(results.features):
        assert entry.feature == CIRCUIT[n]
        change = planted.drop([CIRCUIT[n]]).mean()
        assert entry.change == pytest.approx(change)
        np.testing.assert_allclose(scores.lesser_KxP[n], scores.kept_P - planted.drop([CIRCUIT[n]]))
    assert scores.random_kept_NxP.shape == scores.random_removed_NxP.shape == (100, 140)
    # What is left when a random set is kept, and when it is removed, adds up.
    both_NxP = scores.random_kept_NxP + scores.random_removed_NxP
    np.testing.assert_allclose(both_NxP, np.broadcast_to(2 * planted.clean() - all_P, both_NxP.shape), atol=1e-9)


def test_a_random_set_passes_none(planted):
    results, _ = measure_circuit(planted, range(100, 110), CONFIG)
    refuted = dict.fromkeys(("equivalence", "independence"), "refuted")
    assert given(results) == dict.fromkeys(hypotheses.TESTS, "inconclusive") | refuted
    assert results.tests["equivalence"].statistic == 0.0 and results.kept < results.clean


def test_a_superfluous_feature_is_found(planted):
    # One of small effect among those outside: matched ones exceed it most of the time.
    outside = [feature for feature in range(300) if feature not in CIRCUIT]
    size_F = np.abs(planted.f_PxF * planted.gain_PxF).mean(axis=0)
    extra = sorted(outside, key=lambda feature: size_F[feature])[len(outside) // 5]
    results, _ = measure_circuit(planted, [*CIRCUIT, extra], CONFIG)
    assert [entry.feature for entry in results.features if not entry.minimal] == [extra]
    assert results.tests["minimality"].statistic == pytest.approx(10 / 11)
    assert given(results) == OF_A_CIRCUIT | dict(minimality="inconclusive")


def test_half_a_circuit_is_necessary_in_part_but_does_not_do_as_well(planted):
    results, _ = measure_circuit(planted, CIRCUIT[:5], CONFIG)
    # The other half fires as its features do, is matched to them, and matters as much.
    refuted = dict(equivalence="refuted", independence="refuted")
    assert given(results) == OF_A_CIRCUIT | refuted | dict(minimality="inconclusive")


def test_features_that_never_fire_are_not_minimal_and_change_nothing_else():
    silent = world(dead=[55, 290])
    results, scores = measure_circuit(silent, [*CIRCUIT, 290], CONFIG)
    assert (results.n, results.firing) == (11, 9) and len(scores.lesser_KxP) == 9
    for entry in results.features:
        dead = entry.feature in (55, 290)
        assert entry.minimal is not dead and (entry.change == 0) is dead
    assert given(results)["sufficiency"] == "shown" and given(results)["minimality"] == "inconclusive"


@pytest.mark.parametrize("features", [[], [290, 291]])
def test_a_set_in_which_nothing_fires_is_not_tested(features):
    results, scores = measure_circuit(world(dead=[290, 291]), features, CONFIG)
    assert scores is None and results.n == len(features) and results.firing == 0
    assert set(results.tests) == set(hypotheses.TESTS)
    for outcome in results.tests.values():
        assert all(value is None for value in vars(outcome).values()) and outcome.p_value is None
    json.dumps(to_json(results), allow_nan=False)


def test_one_prompt_says_nothing_of_equivalence_and_independence():
    results, _ = measure_circuit(world(prompts=1), CIRCUIT, CONFIG)
    for name in ("equivalence", "independence"):
        assert results.tests[name].p_against == 1.0 and results.tests[name].answer == "inconclusive"
    json.dumps(to_json(results), allow_nan=False)


def test_everything_kept_is_the_model():
    small = LinearExperiment(np.ones(60), seed=3)
    outcome = hypotheses.equivalence(small.clean(), small.clean())
    assert outcome == (0.5, pytest.approx(binom.cdf(10, 20, 0.6)), 1.0)
    with pytest.raises(UserError, match="matched controls need"):
        measure_circuit(small, range(60), CONFIG)


def test_a_difference_of_the_size_of_rounding_is_a_tie(planted):
    class Rounded(LinearExperiment):
        def ablate(self, sets):
            found = super().ablate(sets)
            # Every ablated score is a little too large, and alone the set would always seem to do better.
            up_SxP = found.clean_P[None, :] + 1e-3
            return dataclasses.replace(found, ablated_SxP=up_SxP + 0 * found.ablated_SxP, rounding_P=np.full(140, 5e-4))

    rounded = Rounded(planted.gain_PxF, prompts=140)
    results, _ = measure_circuit(rounded, CIRCUIT, CONFIG)
    assert results.tests["equivalence"].statistic == 0.5 and results.kept == results.clean


def test_few_prompts_do_not_show_equivalence():
    """What cannot be told from a circuit is not one: with 20 prompts nothing is within 10 points of a half."""
    for better in range(21):
        outcome = hypotheses.equivalence(np.zeros(20), np.where(np.arange(20) < better, 1.0, -1.0))
        assert outcome.p_value > 0.05
    results, _ = measure_circuit(world(prompts=20), CIRCUIT, CONFIG)
    assert results.tests["equivalence"].answer == "inconclusive"


@pytest.mark.parametrize("prompts", [7, 40, 150])
def test_equivalence_errs_no_more_often_than_it_says(prompts):
    """Every outcome of so many prompts, at the edges of the margin and within, with every share of ties."""
    sums = np.arange(2 * prompts + 1) / 2
    outcomes = []
    for half_steps in range(2 * prompts + 1):
        better, ties = half_steps // 2, half_steps % 2
        kept_P = np.where(np.arange(prompts) < better, 1.0, -1.0)
        kept_P[better : better + ties] = 0.0
        outcomes.append(hypotheses.equivalence(np.zeros(prompts), kept_P))
    np.testing.assert_allclose([outcome.statistic for outcome in outcomes], sums / prompts)
    for superiority in (0.6, 0.5, 0.45):
        for ties in np.linspace(0, 2 * min(superiority, 1 - superiority), 9):
            chance_S = np.ones(1)
            for _ in range(prompts):
                of_one = [1 - superiority - ties / 2, ties, superiority - ties / 2]
                chance_S = np.convolve(chance_S, np.maximum(of_one, 0.0))
            name = "p_value" if superiority == 0.6 else "p_against"
            p_S = np.array([getattr(outcome, name) for outcome in outcomes])
            for level in (0.05, 0.2):
                assert chance_S[p_S <= level].sum() <= level


def test_holm_makes_no_claim_easier(planted):
    """P-values that speak for a circuit are corrected, those against it are as they are."""
    results, _ = measure_circuit(planted, CIRCUIT[:5], CONFIG)
    tests = results.tests
    claims = [name for name in hypotheses.TESTS if name != "independence"]
    expected = holm(np.array([tests[name].p_value for name in claims]))
    np.testing.assert_allclose([tests[name].p_holm for name in claims], expected)
    independence = tests["independence"]
    assert independence.p_value is independence.p_holm is None and independence.p_against == pytest.approx(1 / 1001)


def test_what_speaks_against_a_circuit_is_not_corrected():
    """A correction would make that p-value larger, and the claim easier."""
    for p_against, answer in ((0.049, "refuted"), (0.051, "inconclusive")):
        assert _answer(hypotheses.Outcome(0.3, 0.9, p_against), p_holm=0.9).answer == answer


def test_random_sets_are_called_necessary_no_more_often_than_the_level():
    """Two of 44 features carry the answer. Were the tested set left out of the draws, it alone could hold them."""
    runs, said = 60, 0
    for seed in range(runs):
        gain_F = np.where(np.arange(44) < 2, 5.0, 0.1)
        tested = np.random.default_rng([9, seed]).permutation(44)[:8]
        results, _ = measure_circuit(LinearExperiment(gain_F, seed=seed), tested, CONFIG)
        said += results.tests["necessity"].p_value <= 0.05
    assert said / runs <= 0.05 + 3 * (0.05 * 0.95 / runs) ** 0.5


def test_added_features_are_matched(planted, monkeypatch):
    """Each feature is compared with what the draws match to it, those that fire as often and as strongly."""
    drawn = []

    def spy(*args, **kwargs):
        drawn.append(draw_controls(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr("saejax.causal.circuits.measure.draw_controls", spy)
    _, scores = measure_circuit(planted, CIRCUIT, CONFIG)
    (random_NxK,) = drawn
    added_U = np.unique(random_NxK)
    np.testing.assert_array_equal(added_U[scores.added_NxK], random_NxK)
    for u in (0, len(added_U) // 2, -1):
        with_it_P = scores.kept_P + planted.drop([added_U[u]])
        np.testing.assert_allclose(scores.inflated_UxP[u], with_it_P)


def test_binomial_tests_reject_no_more_often_than_they_say():
    # A set as good as the best tenth of random sets, to the last bit: the edge of the null hypothesis.
    rng = np.random.default_rng(5)
    clean_P, runs = np.zeros(3), 2000
    edge_P = np.full(3, 0.9)
    for test, sign in ((hypotheses.necessity, 1.0), (hypotheses.sufficiency, -1.0)):
        random_RxNxP = np.repeat(rng.random((runs, 60, 1)), 3, axis=2)
        own_P = edge_P if sign > 0 else 1 - edge_P
        p_R = np.array([test(clean_P, own_P, random_NxP).p_value for random_NxP in random_RxNxP])
        for level in (0.05, 0.2):
            assert (p_R <= level).mean() <= level + 2.5 * (level * (1 - level) / runs) ** 0.5
    p_RxK = np.stack([hypotheses.minimality(np.array([0.9, 0.95]), rng.random((60, 2)))[1] for _ in range(runs)])
    # As often as the binomial distribution says: at the edge of the null hypothesis, and beyond it.
    enough = int(binom.isf(0.05, 60, hypotheses.Q_STAR)) + 1  # beaten features of 60 with which p is at most 0.05
    for found, share in zip((p_RxK <= 0.05).mean(axis=0), (0.9, 0.95), strict=True):
        expected = binom.sf(enough - 1, 60, share)
        assert abs(found - expected) <= 3 * (expected * (1 - expected) / runs) ** 0.5


def test_directions_and_ties():
    clean_P, near_P, far_NxP = np.zeros(4), np.full(4, -0.5), np.full((100, 4), 2.0)
    assert hypotheses.sufficiency(clean_P, near_P, far_NxP) == (1.0, pytest.approx(0.9**100), None)
    assert hypotheses.sufficiency(clean_P, far_NxP[0], far_NxP) == (0.0, 1.0, None)
    assert hypotheses.necessity(clean_P, near_P, far_NxP) == (0.0, 1.0, None)
    assert hypotheses.necessity(clean_P, -3 + near_P, far_NxP) == (1.0, pytest.approx(0.9**100), None)
    outcome, p_K = hypotheses.minimality(np.array([3.0, 2.0]), np.full((100, 2), 2.0))
    assert outcome == (0.5, 1.0, None) and p_K.tolist() == [pytest.approx(0.9**100), 1.0]


@pytest.mark.parametrize("bad_P", [np.array([1.0, np.nan]), np.zeros(0)])
def test_bad_scores_are_refused(bad_P):
    good_P = np.zeros(len(bad_P))
    for call in (
        lambda: hypotheses.equivalence(good_P, bad_P),
        lambda: hypotheses.independence(good_P, bad_P, 0),
        lambda: hypotheses.minimality(bad_P, good_P[None, :]),
        lambda: hypotheses.sufficiency(good_P, bad_P, good_P[None, :]),
        lambda: hypotheses.necessity(good_P, good_P, bad_P[None, :]),
    ):
        with pytest.raises(ValueError, match="expected finite"):
            call()
