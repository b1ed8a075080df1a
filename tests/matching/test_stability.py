"""How stable importance is between dictionaries whose truth is constructed."""

import dataclasses
import json

import numpy as np
import pytest

from saejax.matching.transfer import stability
from saejax.matching.transfer.results import MatchedDrops
from saejax.matching.transfer.stability import Matches, compare, match_by_direction
from saejax.results import from_json, to_json


@dataclasses.dataclass(frozen=True)
class Table:
    """The measured importance of features that fire."""

    feature: np.ndarray
    drop: np.ndarray
    firing_rate: np.ndarray
    mean_activation: np.ndarray


class LinearExperiment:
    """Prompts on which feature i, of activation f_pi, lowers the logit difference by gain_i f_pi when it is ablated."""

    def __init__(self, gain_F, dead=(), seed=0, prompts=20):
        rng = np.random.default_rng(seed)
        rate_F = np.exp(rng.uniform(np.log(0.1), np.log(0.9), len(gain_F)))
        size_F = np.exp(rng.normal(0, 0.3, len(gain_F)))
        self.f_PxF = (rng.random((prompts, len(gain_F))) < rate_F) * size_F
        self.f_PxF *= rng.uniform(0.8, 1.2, self.f_PxF.shape)
        self.f_PxF[0, ~self.f_PxF.any(axis=0)] = 1.0  # every feature fires somewhere, but for the dead ones
        self.f_PxF[:, list(dead)] = 0.0
        self.gain_PxF = np.broadcast_to(gain_F, self.f_PxF.shape).astype(np.float64)


def table_of(experiment):
    fires_F = (experiment.f_PxF > 0).sum(axis=0)
    feature = np.flatnonzero(fires_F)
    mean_F = experiment.f_PxF.sum(axis=0) / np.maximum(fires_F, 1)
    drop_F = (experiment.f_PxF * experiment.gain_PxF).mean(axis=0)
    return Table(feature, drop_F[feature], fires_F[feature] / len(experiment.f_PxF), mean_F[feature])


@pytest.fixture(scope="module")
def rows_FxD():
    return np.random.default_rng(0).normal(size=(200, 48)) * np.linspace(0.5, 2, 200)[:, None]


@pytest.fixture(scope="module")
def experiment():
    """200 features, of which the last 20 never fire, and the two before them on one prompt."""
    made = LinearExperiment(np.random.default_rng(1).normal(size=200), dead=range(180, 200), prompts=60)
    made.f_PxF[:, 178:180] = 0.0
    made.f_PxF[5, 178:180] = 1.0
    return made


def permuted(experiment, order_F):
    """The same behaviour with feature i of the new dictionary being order_F[i] of the old one."""
    other = LinearExperiment(np.ones(200), prompts=60)
    for name in ("f_PxF", "gain_PxF"):
        setattr(other, name, getattr(experiment, name)[:, order_F])
    return other


def test_a_dictionary_with_its_features_in_another_order(rows_FxD, experiment):
    order_F = np.random.default_rng(2).permutation(200)
    other = permuted(experiment, order_F)
    by_direction = match_by_direction(rows_FxD, 3.0 * rows_FxD[order_F])
    first, second = table_of(experiment), table_of(other)
    assert len(by_direction.first_M) == 200
    np.testing.assert_array_equal(order_F[by_direction.second_M], by_direction.first_M)
    np.testing.assert_allclose(by_direction.similarity_M, 1.0, atol=1e-5)
    found = compare(first, second, by_direction, seed=4)
    assert from_json(MatchedDrops, json.loads(json.dumps(to_json(found), allow_nan=False)), "") == found
    assert found.matched == 180 and found.shares == (1.0, 1.0)
    assert found.similarity == pytest.approx(1.0, abs=1e-5)
    assert vars(found.rank_correlation) == pytest.approx(dict(mean=1.0, low=1.0, high=1.0))
    for control in (found.shuffled, found.alike):
        assert control.low < control.mean < control.high < 0.5
    assert abs(found.shuffled.mean) < 0.05


def test_unrelated_dictionaries_are_no_better_than_their_controls(experiment):
    rng = np.random.default_rng(3)
    other = LinearExperiment(rng.normal(size=200), seed=9, prompts=60)
    matches = Matches(np.arange(200), rng.permutation(200), np.ones(200))
    found = compare(table_of(experiment), table_of(other), matches, seed=4)
    assert found.shuffled.low < found.rank_correlation.mean < found.shuffled.high
    assert found.rank_correlation.low < 0 < found.rank_correlation.high
    # Directions at random are hardly ever near each other.
    apart = match_by_direction(rng.normal(size=(200, 48)), rng.normal(size=(200, 48)))
    assert len(apart.first_M) == 0
    nothing = compare(table_of(experiment), table_of(other), apart)
    assert nothing == MatchedDrops(0, (0.0, 0.0), None, None, None, None)


def test_that_what_fires_often_matters_more_is_no_agreement():
    """Both dictionaries' effects follow their firing rates, and matched features fire alike; no more than that."""
    rng = np.random.default_rng(5)
    rate_N = np.exp(rng.uniform(-4, 0, 400))
    table = table_of(LinearExperiment(np.ones(400)))

    def made(seed):
        noise_N = 0.3 * np.random.default_rng(seed).normal(size=400)
        return dataclasses.replace(
            table, firing_rate=rate_N, mean_activation=np.ones(400), drop=np.log(rate_N) + noise_N
        )

    every = np.arange(400)
    found = compare(made(1), made(2), Matches(every, every, np.ones(400)))
    assert found.rank_correlation.mean > 0.8 and found.shuffled.high < 0.2
    assert found.alike.low < found.rank_correlation.mean < found.alike.high + 0.02


def test_partners_whose_neighbours_cost_nothing_have_no_control():
    """Drops of the size of rounding are 0: a few features matter, and those that fire alike have one drop."""
    matter = np.array([5, 25, 45])
    table = dataclasses.replace(
        table_of(LinearExperiment(np.ones(60))),
        firing_rate=np.exp(np.linspace(-5, -1, 60)), mean_activation=np.ones(60),
        drop=np.where(np.isin(np.arange(60), matter), np.arange(60.0), 0.0),
    )  # fmt: skip
    found = compare(table, table, Matches(matter, matter, np.ones(3)))
    assert found.rank_correlation.mean == pytest.approx(1) and found.alike is None
    json.dumps(to_json(found), allow_nan=False)


def test_matches_are_mutual_and_above_the_threshold(monkeypatch):
    # Feature 2 of the first is nearest to 1 of the second, which is nearer to 0: no pair. 3 is too far from anything.
    first = np.array([[1, 0, 0], [0, 1, 0], [0.8, 0.6, 0], [0, 0.1, 0.2], [0, 0, 0]])
    second = np.array([[0, -1, 0.5], [1, 0.01, 0], [0, 2, 0]])
    wanted = [(0, 1), (1, 2)]
    matches = match_by_direction(first, second)
    assert list(zip(matches.first_M.tolist(), matches.second_M.tolist(), strict=True)) == wanted
    assert len(match_by_direction(first, second, least=0.99999).first_M) == 1
    monkeypatch.setattr(stability, "_CHUNK", 1)  # a row at a time
    rng = np.random.default_rng(7)
    first, second = rng.normal(size=(60, 3)), rng.normal(size=(50, 3))
    small = match_by_direction(first, second)
    monkeypatch.undo()
    for one, two in zip(small, match_by_direction(first, second), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)
    cosine_FxG = (first / np.linalg.norm(first, axis=1)[:, None]) @ (second / np.linalg.norm(second, axis=1)[:, None]).T
    plain = [
        (f, g)
        for f, g in np.argwhere(cosine_FxG >= 0.7)
        if cosine_FxG[f].argmax() == g and cosine_FxG[:, g].argmax() == f
    ]
    assert list(zip(small.first_M.tolist(), small.second_M.tolist(), strict=True)) == plain


def test_what_cannot_be_compared():
    with pytest.raises(ValueError, match="width 3 and 4"):
        match_by_direction(np.ones((2, 3)), np.ones((2, 4)))
    assert len(match_by_direction(np.ones((0, 3)), np.ones((2, 3))).first_M) == 0
