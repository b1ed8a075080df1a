"""The judgement of a behaviour: a planted truth and a planted nothing, and the rule at its edges."""

import dataclasses
import json

import numpy as np
import pytest
from linear_experiment import LinearExperiment

from saejax.causal.ablate import grades, verdict
from saejax.results import Interval, to_json
from saejax.settings import AblateConfig

CONFIG = AblateConfig(bootstrap=2000, draws=199, matches=10)


@pytest.fixture(scope="module")
def planted():
    """400 features: numbers 50 to 69 carry the answer, the others add noise."""
    gain_F = 0.01 * np.random.default_rng(1).normal(size=400)
    gain_F[50:70] = 0.5
    return LinearExperiment(gain_F, base=-1.0)


def test_features_that_carry_the_answer_get_a_yes(planted):
    results, measured = verdict.judge("planted", planted, CONFIG)
    assert sorted(measured.top) == list(range(50, 70))
    assert results.grades.harms.holds and results.grades.beyond_matched.holds and results.claim.yes
    assert results.grades.highest == "beyond_matched" and results.grades.beyond_bases.holds is None
    assert results.grades.harms.reason.startswith("without the 20 features accuracy goes from 100 % to ")
    drop_P = planted.drop(range(50, 70))
    np.testing.assert_allclose(results.joint.logit_diff_drop.mean, drop_P.mean())
    assert results.joint.clean_accuracy == 1.0 and results.joint.ablated_accuracy < 0.5
    assert results.percentile == 1.0
    assert results.difference.low > 0.8 * drop_P.mean()
    for entry in results.top:
        drop_P = planted.f_PxF[:, entry.feature] * 0.5
        np.testing.assert_allclose(entry.logit_diff_drop.mean, drop_P.mean())
        np.testing.assert_allclose(entry.firing_rate, (drop_P > 0).mean())
        np.testing.assert_allclose(entry.mean_activation, drop_P[drop_P > 0].mean() / 0.5)
        assert abs(entry.control_drop) < 0.1 * entry.logit_diff_drop.mean + 0.02
    assert entry.attribution <= results.top[0].attribution


def test_controls_are_what_their_features_do(planted):
    results, measured = verdict.judge("planted", planted, CONFIG)
    assert measured.controls_NxC.shape == (100, 20) and not np.isin(measured.controls_NxC, measured.top).any()
    drop_NxP = np.stack([planted.drop(s) for s in measured.controls_NxC])
    controls = results.controls
    np.testing.assert_allclose(controls.logit_diff_drop, drop_NxP.mean(axis=1), atol=1e-12)
    clean_P = measured.clean_P
    lost_N = ((clean_P > 0).astype(int)[None, :] - (clean_P[None, :] - drop_NxP > 0)).mean(axis=1)
    np.testing.assert_allclose(controls.accuracy_drop, lost_N, atol=1e-12)
    # The draws that decide p may hold tested features, and do about as often as any other of the pool.
    drawn = measured.draws_MxC
    assert drawn.shape == (199, 20) and np.isin(drawn, measured.top).any()
    np.testing.assert_allclose(clean_P - measured.draws_MxQ, [planted.drop(s) for s in drawn], atol=1e-12)
    assert 0.8 < controls.match.firing_rate_ratio < 1.25 and 0.8 < controls.match.activation_ratio < 1.25


def test_the_difference_is_paired_by_prompt(planted):
    results, measured = verdict.judge("planted", planted, CONFIG)
    paired_P = measured.controls_NxQ.mean(axis=0) - measured.joint_P
    # All prompts have one template, so that this is the bootstrap over prompts, which draws each as often as another.
    rng, count = np.random.default_rng(CONFIG.seed), len(paired_P)
    rng.multinomial(1, [1.0], size=CONFIG.bootstrap)  # the template
    drawn_RxP = rng.multinomial(np.full(CONFIG.bootstrap, count), np.full(count, 1 / count))
    low, high = np.quantile(drawn_RxP @ paired_P / count, (0.025, 0.975))
    wanted = dict(mean=paired_P.mean(), low=low, high=high)
    assert vars(results.difference) == pytest.approx(wanted, rel=1e-12)


def test_features_that_carry_nothing_get_a_no():
    # Every feature pushes every prompt one way or the other by chance, and the attribution knows nothing of it. Even
    # where any loss of accuracy is enough, a yes may come no more often than the interval allows.
    lenient = dataclasses.replace(CONFIG, min_accuracy_drop=0.0, bootstrap=500, draws=30)
    yes = 0
    for seed in range(40):
        rng = np.random.default_rng([seed, 7])
        null = LinearExperiment(0.1 * rng.normal(size=(20, 400)), seed=seed, attribution_F=rng.normal(size=400))
        results = verdict.judge("null", null, lenient)[0]
        assert not results.claim.yes or results.difference.low > 0
        yes += results.claim.yes
    assert yes <= 4


def edge_case():
    """100 features of which 20 matter a little; without them 1 prompt in 20 turns wrong."""
    gain_F = np.zeros(100)
    gain_F[:20] = 0.01
    edge = LinearExperiment(gain_F, base=3.0)
    edge.f_PxF[0, 0] = 1.0
    edge.base_P[0] += 0.001 - edge.clean()[0]
    return edge


def test_exactly_the_accuracy_drop_of_the_rule_is_not_enough():
    edge = edge_case()
    results = verdict.judge("edge", edge, CONFIG)[0]
    assert edge.skipped == (199 - 24) * 20  # rows that the time to go need not count
    assert results.joint.accuracy_drop.mean == 0.05 and results.difference.low > 0
    assert results.grades.harms.holds is False and "(not more than 5)" in results.grades.harms.reason
    assert results.grades.highest == "none" and results.claim.draws == 24  # no further draw could change the no
    less_asked = dataclasses.replace(CONFIG, min_accuracy_drop=0.049)
    assert verdict.judge("edge", edge_case(), less_asked)[0].grades.harms.holds is True


def test_accuracy_that_falls_no_more_than_with_other_features_is_not_enough():
    alike = LinearExperiment(np.full(400, 0.2), attribution_F=np.random.default_rng(0).random(400))
    alike.f_PxF[:] = 1.0
    alike.base_P[:] = 1.0 - 400 * 0.2
    results = verdict.judge("alike", alike, dataclasses.replace(CONFIG, matches=300))[0]
    assert results.joint.accuracy_drop.mean == 1.0 and abs(results.difference.low) < 1e-9
    assert results.grades.harms.holds and results.grades.beyond_matched.holds is False
    assert results.grades.highest == "harms" and results.percentile < 1.0


def test_a_top_feature_that_never_fires(planted):
    silent = LinearExperiment(planted.gain_PxF[0], base=-1.0, dead=[50, 51])
    results, measured = verdict.judge("planted", silent, CONFIG)
    entries = {entry.feature: entry for entry in results.top}
    for feature in (50, 51):
        zero = Interval(0.0, 0.0, 0.0)
        assert entries[feature].logit_diff_drop == entries[feature].accuracy_drop == zero
        assert entries[feature].firing_rate == entries[feature].mean_activation == 0.0
        assert entries[feature].control_drop is None
    assert measured.controls_NxC.shape == (100, 18) and measured.draws_MxC.shape == (199, 18)
    assert results.joint.n == 20 and results.joint.firing == 18
    assert "2 of the features never fire on the test prompts" in results.grades.harms.reason


def test_no_feature_with_a_positive_attribution(planted):
    results = verdict.judge("none", LinearExperiment(planted.gain_PxF, 5.0, -np.ones(400)), CONFIG)[0]
    assert results.top == () and results.grades.highest == "none" and results.joint.logit_diff_drop.mean == 0.0
    assert "no feature has an attribution above zero" in results.grades.harms.reason
    assert results.grades.beyond_matched.holds is None
    json.dumps(to_json(results), allow_nan=False)


def test_the_rule_in_words_has_the_configs_numbers():
    words = grades.rule(AblateConfig(top=7, draws=33, min_accuracy_drop=0.125, max_ce_rise=0.07))
    for number in ("top 7 features", "12.5 percentage points", "33 sets", "0.07 nats"):
        assert number in words


def test_prompts_of_draws_are_spread_over_templates():
    templates = ["a"] * 40 + ["b"] * 20 + ["c"] * 40
    chosen_Q = verdict.spread_over(templates, 10)
    assert [sum(templates[place] == name for place in chosen_Q) for name in "abc"] == [4, 2, 4]
    assert verdict.spread_over(templates, 0).tolist() == verdict.spread_over(templates, 100).tolist() == [*range(100)]


def test_draws_on_some_prompts_stand_beside_the_top_features_on_the_same(planted):
    few = dataclasses.replace(CONFIG, draw_prompts=6)
    results, measured = verdict.judge("planted", planted, few)
    assert measured.draws_MxQ.shape == (199, 6) and results.controls.prompts == results.claim.prompts == 6
    drop_Q = planted.drop(range(50, 70))[measured.chosen_Q]
    assert results.controls.top_logit_diff_drop == pytest.approx(drop_Q.mean())
    assert results.joint.logit_diff_drop.mean == pytest.approx(planted.drop(range(50, 70)).mean())


def test_a_pool_of_few_sets_gives_no_answer():
    gain_F = np.zeros(70)
    gain_F[:20] = 0.5
    results = verdict.judge("narrow", LinearExperiment(gain_F, base=-1.0), CONFIG)[0]
    assert results.controls.disjoint_sets == 2 and results.grades.harms.holds
    assert results.grades.beyond_matched.holds is None and not results.claim.yes
    assert "holds 2 sets without a feature in common" in results.grades.beyond_matched.reason
