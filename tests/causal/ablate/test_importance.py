"""The effects of all features: planted ones are found, nothing is found in nothing."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from linear_experiment import LinearExperiment
from scipy import stats

from saejax.causal.ablate.importance import Importance, control_percentiles, measure_importance
from saejax.causal.ablate.importance_results import ImportanceSummary
from saejax.causal.results import HalvesAgreement
from saejax.causal.stability import between_halves
from saejax.interventions.feature_statistics import coordinates
from saejax.results import from_json, to_json
from saejax.settings import AblateConfig
from saejax.tasks.scoring import bootstrap_mean

HALVES = HalvesAgreement(0.5, 0.67)
CONFIG = AblateConfig(bootstrap=2000)


@pytest.fixture(scope="module")
def experiment():
    """400 features: 50 to 69 carry the answer, 10 never fire, the others help as often as they harm."""
    gain_PxF = 0.1 * np.random.default_rng(1).normal(size=(40, 400))
    gain_PxF[:, 50:70] += 1.0
    return LinearExperiment(gain_PxF, base=-1.0, attribution_F=gain_PxF.mean(axis=0), dead=range(390, 400), prompts=40)


@pytest.fixture(scope="module")
def found(experiment):
    return measure_importance(experiment, CONFIG)[0]


def test_effects_equal_the_formula(experiment, found):
    assert found.feature.tolist() == list(range(390))
    drop_PxF = (experiment.f_PxF * experiment.gain_PxF)[:, :390]
    np.testing.assert_allclose(found.drop, drop_PxF.mean(axis=0))
    np.testing.assert_allclose(found.effect_size, drop_PxF.mean(axis=0) / drop_PxF.std(axis=0))
    clean_P = experiment.clean()
    kept_PxF = (clean_P[:, None] - drop_PxF) > 0
    np.testing.assert_allclose(found.accuracy_drop, (clean_P > 0).mean() - kept_PxF.mean(axis=0))
    for n in (0, 55, 200):
        interval = bootstrap_mean(drop_PxF[:, n], 20_000, seed=0)
        spread = drop_PxF[:, n].std() / 40**0.5
        np.testing.assert_allclose(
            [found.drop_low[n], found.drop_high[n]], [interval.low, interval.high], atol=spread / 5
        )
    assert np.all(found.drop_low <= found.drop) and np.all(found.drop <= found.drop_high)


def test_planted_features_come_first_and_chance_gives_no_more_than_is_allowed(experiment, found):
    discovered = set(found.feature[found.q_value <= 0.05].tolist())
    often = {i for i in range(50, 70) if (experiment.f_PxF[:, i] > 0).sum() >= 16}
    assert len(often) > 5 and often <= discovered
    assert len(discovered - set(range(50, 70))) <= 0.1 * len(discovered)
    sure = set(found.feature[found.p_max_t <= 0.05].tolist())
    assert sure and sure <= set(range(50, 70)) and sure <= discovered
    assert (found.p_max_t >= found.p_value - 1e-12).all()
    top = set(found.feature[np.argsort(-found.drop)[:15]].tolist())
    assert top <= set(range(50, 70))
    assert found.control_percentile[[n for n in range(390) if n in top]].min() > 0.8


def test_effects_of_the_size_of_rounding_are_none(experiment):
    class Rounded(LinearExperiment):
        def ablate(self, sets):
            return dataclasses.replace(super().ablate(sets), rounding_P=np.full(len(self.f_PxF), 0.05))

    rounded = Rounded(experiment.gain_PxF, base=-1.0, attribution_F=experiment.attribution_F, prompts=40)
    rounded.f_PxF = experiment.f_PxF
    drop_PxF = (experiment.f_PxF * experiment.gain_PxF)[:, :390]
    wanted_PxF = np.where(np.abs(drop_PxF) > 0.2, drop_PxF, 0)
    found, _ = measure_importance(rounded, CONFIG)
    np.testing.assert_allclose(found.drop, wanted_PxF.mean(axis=0), atol=1e-12)
    nothing_F = (wanted_PxF == 0).all(axis=0)
    assert nothing_F.sum() > 10 and (found.p_value[nothing_F] == 1).all() and (found.p_value[~nothing_F] < 1).any()


def test_the_summary_is_json(found):
    summary = found.summary(5, HALVES, 0.01)
    assert from_json(ImportanceSummary, json.loads(json.dumps(to_json(summary), allow_nan=False)), "") == summary
    assert summary.features == 390 and len(summary.leaders) == 5
    assert summary.discoveries == (found.q_value <= 0.05).sum()
    half = dataclasses.replace(found, p_max_t=np.where(np.arange(390) < 55, found.p_max_t, 1.0))
    assert 0 < half.summary(5, HALVES, 0.01).sure == (half.p_max_t <= 0.05).sum() < summary.sure
    drops = [leader.drop for leader in summary.leaders]
    assert drops == sorted(drops, reverse=True) and drops[0] == found.drop.max()
    for fit in summary.estimates.values():
        assert 0.3 < fit.pearson <= 1 and 0 < fit.spearman <= 1


def test_it_is_read_as_it_was_written(found, tmp_path):
    found.save(tmp_path / "importance.parquet")
    again = Importance.load(tmp_path / "importance.parquet")
    for name, values_N in vars(found).items():
        np.testing.assert_array_equal(getattr(again, name), values_N)


def test_nothing_is_found_in_nothing():
    # 200 features that help as often as they harm, in 12 worlds: discoveries are as rare as promised.
    worlds = 0
    for seed in range(12):
        gain_PxF = 0.3 * np.random.default_rng([seed, 5]).normal(size=(20, 200))
        null = LinearExperiment(gain_PxF, attribution_F=gain_PxF.mean(axis=0), seed=seed)
        found, _ = measure_importance(null, dataclasses.replace(CONFIG, bootstrap=100))
        worlds += bool((found.q_value <= 0.05).any())
    assert worlds <= 2  # of 12 with 5 % each, three or more come once in fifty


def test_correlations_are_those_of_scipy(experiment, found, tmp_path):
    constant = LinearExperiment(experiment.gain_PxF, attribution_F=experiment.attribution_F, prompts=40)
    constant.f_PxF[:, 7] = 0.3
    again, _ = measure_importance(constant, CONFIG)
    clean_P = constant.clean()
    for n, feature in enumerate(again.feature):
        if feature == 7:
            assert np.isnan(again.pearson[n]) and np.isnan(again.spearman[n])
        else:
            f_P = constant.f_PxF[:, feature]
            assert again.pearson[n] == pytest.approx(stats.pearsonr(f_P, clean_P).statistic)
            assert again.spearman[n] == pytest.approx(stats.spearmanr(f_P, clean_P).statistic)
    agreement = again.summary(5, HALVES, 0.01).correlations
    for name in ("pearson", "spearman"):
        size_N = np.abs(np.delete(getattr(again, name), 7))
        wanted = stats.spearmanr(size_N, np.delete(again.drop, 7)).statistic
        assert agreement[name] == pytest.approx(wanted)
    again.save(tmp_path / "table.parquet")
    assert pq.read_table(tmp_path / "table.parquet")["pearson"].to_pylist()[7] is None
    assert np.isnan(Importance.load(tmp_path / "table.parquet").pearson[7])
    assert not np.isnan(found.pearson).any()


def test_control_percentiles_are_those_of_the_nearest():
    rng = np.random.default_rng(2)
    drop_N, rate_N, size_N = rng.normal(size=60), rng.uniform(0.01, 1, 60), np.exp(rng.normal(size=60))
    got_N = control_percentiles(drop_N, coordinates(rate_N, size_N), nearest=7)
    place_Nx2 = np.stack([np.log(values) / np.log(values).std() for values in (rate_N, size_N)], axis=1)
    for n in range(60):
        apart_N = np.square(place_Nx2 - place_Nx2[n]).sum(axis=1)
        near = [m for m in np.argsort(apart_N) if m != n][:7]
        assert got_N[n] == pytest.approx(np.mean(drop_N[near] < drop_N[n]))


def test_many_features_at_one_place():
    drop_N = np.arange(9.0)
    got_N = control_percentiles(drop_N, np.zeros((9, 2)), nearest=8)
    np.testing.assert_allclose(got_N, drop_N / 8)
    assert np.all(control_percentiles(drop_N, np.zeros((9, 2)), nearest=2) <= 1)


@pytest.mark.parametrize("features", [0, 1, 2])
def test_hardly_any_features(features):
    experiment = LinearExperiment(np.ones(4), dead=range(features, 4))
    found, drop_NxP = measure_importance(experiment, CONFIG)
    summary = found.summary(5, HALVES, 0.01)
    assert from_json(ImportanceSummary, json.loads(json.dumps(to_json(summary), allow_nan=False)), "") == summary
    assert summary.features == len(summary.leaders) == features
    if features < 2:
        assert between_halves(drop_NxP, 0) == HalvesAgreement(None, None)
        assert summary.correlations == dict(pearson=None, spearman=None)
    if features == 1:
        assert summary.leaders[0].control_percentile is None and summary.estimates["relp"].pearson is None
