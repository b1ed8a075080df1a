"""Sets that grow: the curve against the formula, and a greedy set that finds what attribution does not."""

import dataclasses
import json

import numpy as np
import pytest
from linear_experiment import LinearExperiment
from scipy.stats import binomtest

from saejax.causal.ablate import nested, run, verdict
from saejax.results import to_json
from saejax.settings import AblateConfig
from saejax.tasks.scoring import bootstrap_mean

CONFIG = AblateConfig(bootstrap=500, top=8, draws=20)


def make(dead=()):
    gain_F = 0.01 * np.random.default_rng(1).normal(size=200)
    gain_F[50:58] = np.linspace(0.8, 0.1, 8)
    return LinearExperiment(gain_F, base=-1.0, dead=dead)


def test_the_curve_equals_the_formula():
    experiment = make(dead=[51])
    results, measured = verdict.judge("planted", experiment, CONFIG)
    curve = nested.cumulative_curve(experiment, measured)
    assert curve.sizes == list(range(9)) and len(measured.top) == 8 and measured.fires_K.sum() == 7
    for size in curve.sizes:
        np.testing.assert_allclose(curve.top_SxP[size], experiment.clean() - experiment.drop(measured.top[:size]))
    assert curve.control_sizes == curve.sizes
    columns = 0
    for size in curve.control_sizes:
        for n, controls_C in enumerate(measured.controls_NxC[:5]):
            wanted_P = experiment.clean() - experiment.drop(controls_C[:columns])
            np.testing.assert_allclose(curve.controls_ExNxP[size, n], wanted_P)
        columns += size < 8 and measured.top[size] != 51
    np.testing.assert_allclose(curve.top_SxP[8], measured.joint_P)
    said = curve.summary(CONFIG)
    assert said.draws == 5 and json.dumps(to_json(said), allow_nan=False)
    for points in (said.top, said.controls):
        assert list(points.sizes) == curve.sizes
        assert len(points.logit_diff) == len(points.accuracy) == 9
        assert points.logit_diff[0].mean == pytest.approx(results.joint.clean_logit_diff)
    wanted = bootstrap_mean(curve.controls_ExNxP[5].mean(axis=0), 500, CONFIG.seed)
    assert vars(said.controls.logit_diff[5]) == pytest.approx(vars(wanted))
    assert said.top.accuracy[8].mean == results.joint.ablated_accuracy


def test_without_top_features_the_curve_is_a_point():
    experiment = LinearExperiment(np.ones(100), attribution_F=-np.ones(100))
    _, measured = verdict.judge("none", experiment, CONFIG)
    said = nested.cumulative_curve(experiment, measured).summary(CONFIG)
    assert said.top.sizes == said.controls.sizes == (0,)
    assert vars(said.top.logit_diff[0]) == pytest.approx(vars(said.controls.logit_diff[0]))
    grown = nested.grow(experiment, measured.attribution_F, 3)
    assert grown.features == [] and grown.summary(CONFIG).greedy_drop == ()


@pytest.mark.parametrize("count", [0, 1, 20, 21, 500])
def test_sizes_of_a_curve(count):
    sizes = nested.curve_sizes(count, 20)
    assert sizes[0] == 0 and sizes[-1] == count and np.all(np.diff(sizes) >= 1) and len(sizes) <= 21
    assert len(sizes) >= min(count, 14) + 1


class Redundant(LinearExperiment):
    """Features 50 and 51 do the same thing once: as long as one is left, nothing is lost."""

    def drop(self, features):
        kept = [feature for feature in features if feature not in (50, 51)]
        both = {50, 51} <= set(features)
        return super().drop(kept) + both * 3.0


def test_a_greedy_set_is_the_best_step_by_step():
    # Attribution is wrong in its order; what is measured on train prompts puts it right.
    gain_F = np.linspace(1.0, 0.0, 60)
    attribution_F = gain_F + 0.5 * np.random.default_rng(2).random(60)
    experiment = LinearExperiment(gain_F, attribution_F=attribution_F)
    grown = nested.grow(experiment, attribution_F, 6)
    drop_F = (experiment.f_PxF * gain_F).mean(axis=0)
    candidates = np.argsort(-attribution_F)[:18]
    assert grown.features == sorted(candidates, key=lambda feature: -drop_F[feature])[:6]
    assert grown.top == candidates[:6].tolist() and grown.top != grown.features
    np.testing.assert_allclose(grown.train_drop, np.cumsum(drop_F[grown.features]))
    said = grown.summary(CONFIG)
    assert json.dumps(to_json(said), allow_nan=False)
    for n in range(6):
        assert said.greedy_drop[n].mean == pytest.approx(drop_F[grown.features[: n + 1]].sum())
        assert said.top_drop[n].mean == pytest.approx(drop_F[grown.top[: n + 1]].sum())
        apart = said.greedy_drop[n].mean - said.top_drop[n].mean
        assert said.difference[n].mean == pytest.approx(apart)
        assert said.difference[n].low <= apart <= said.difference[n].high


def test_features_that_matter_only_together_wait_for_each_other():
    gain_F = np.zeros(60)
    gain_F[:5] = 0.5
    experiment = Redundant(gain_F)
    attribution_F = np.zeros(60)
    attribution_F[[50, 51]] = 2.0
    attribution_F[:5] = 1.0
    grown = nested.grow(experiment, attribution_F, 7)
    # One of the pair costs nothing, so it comes when nothing else is left to lose; then the other costs 3.
    assert set(grown.features[:5]) == set(range(5)) and set(grown.features[5:]) == {50, 51}
    assert grown.train_drop[-1] - grown.train_drop[-2] == pytest.approx(3.0)
    assert len(nested.grow(experiment, attribution_F, 30).features) == 7  # no more have a positive attribution


def test_the_stage_keeps_what_was_asked_for_and_the_scores_behind_it():
    experiment = make()
    judged, measured = verdict.judge("planted", experiment, CONFIG)
    asked = dataclasses.replace(CONFIG, greedy=2, circuit_tests=True)
    results, scores = run._with_sets(judged, experiment, measured, asked)
    assert list(scores) == ["curve", "greedy", "circuit"] and all(getattr(results, name) for name in scores)
    json.dumps(to_json(results), allow_nan=False)
    assert all(score.shape[-1] == 20 for kinds in scores.values() for score in kinds.values())
    np.testing.assert_allclose(scores["circuit"]["removed"], measured.joint_P)
    assert run._with_sets(judged, experiment, measured, dataclasses.replace(CONFIG, curve=False)) == (judged, {})


def test_shares_of_a_curve_have_a_width_where_all_are_right():
    """Wilson's interval: a bootstrap of prompts that are all right has none."""
    right = np.ones((1, 20))
    (share,) = nested.CurveDiffs([0], [0], right, right[None]).summary(AblateConfig(bootstrap=100)).top.accuracy
    wanted = binomtest(20, 20).proportion_ci(method="wilson")
    assert (share.mean, share.low, share.high) == pytest.approx((1.0, wanted.low, wanted.high))
