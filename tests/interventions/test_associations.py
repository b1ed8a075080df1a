"""Associations of features with labels: planted ones are found by all three answers, and none where there are none."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.metrics import roc_auc_score

from saejax.interventions import associations
from saejax.interventions.associations import RIGHT, associate, item_activations

FEATURES, ITEMS = 60, 48


@pytest.fixture(autouse=True)
def fewer_permutations(monkeypatch):
    monkeypatch.setattr(associations, "_PERMUTATIONS", 199)


def make_world(seed, strength, tested=(0, 1, 2)):
    """Items of two categories, half of them train items; feature 0 fires on additions, and answers rest on it."""
    rng = np.random.default_rng(seed)
    acts_PxF = np.maximum(rng.normal(0.3, 1, (2 * ITEMS, FEATURES)), 0)
    is_sum_P = rng.permutation(np.arange(2 * ITEMS) % 2 == 0)
    acts_PxF[:, 0] += strength * is_sum_P
    train_P, test_P = np.arange(2 * ITEMS) < ITEMS, np.arange(2 * ITEMS) >= ITEMS
    labels = [{"addition": is_sum_P[half], "logic": ~is_sum_P[half]} for half in (train_P, test_P)]
    right = {RIGHT: rng.random(ITEMS) < 0.5}
    drops = {0: strength * is_sum_P[test_P] + 0.2 * rng.normal(size=ITEMS), 1: 0.2 * rng.normal(size=ITEMS)}
    return associate(acts_PxF[train_P], labels[0], acts_PxF[test_P], labels[1] | right, tested, drops, seed)


def test_a_planted_feature_is_found_by_all_three():
    found = make_world(0, 3.0)
    first, second, third = found.top
    assert first.label == "addition" and first.correlation.low > 0.5
    assert (first.associated, first.probe) == ("yes", "yes") and first.auc > 0.9 and first.p_value == 1 / 200
    assert (second.associated, second.probe, third.causal) == ("no", "no", "not tested")
    by_label = {one.label: one for one in found.labels}
    assert by_label["addition"].associated == by_label["logic"].associated == 1
    assert by_label[RIGHT].associated == 0 and by_label[RIGHT].shuffled <= 0.05


def test_the_causal_answer_is_the_difference_of_drops():
    found = make_world(0, 3.0)
    assert found.top[0].causal_drop.mean == pytest.approx(3.0, abs=0.2) and found.top[0].causal == "yes"


def test_no_association_where_there_is_none():
    fooled = sum(any(one.associated for one in make_world(seed, 0.0, ()).labels) for seed in range(1, 41))
    assert fooled <= 5  # of 40 at a level of 5 %


def test_correlation_and_activation_of_items_are_those_of_numpy():
    rng = np.random.default_rng(3)
    acts_NxF = np.maximum(rng.normal(size=(30, 4)), 0)
    text_N = np.repeat(np.arange(6), 5)
    largest = item_activations(sparse.csr_array(acts_NxF), text_N, 7)
    assert largest[:6] == pytest.approx(acts_NxF.reshape(6, 5, 4).max(axis=1)) and not largest[6].any()
    value_Q, has_Q = rng.normal(size=20), np.arange(20) % 3 == 0
    weights = np.full((5, 20), 1 / 20)
    assert associations._correlation(value_Q, has_Q, weights).mean == pytest.approx(np.corrcoef(value_Q, has_Q)[0, 1])


def test_the_area_under_the_curve_is_that_of_scikit_learn():
    rng = np.random.default_rng(4)
    value_Qx1, has_Q = np.round(rng.normal(size=(40, 1)), 1), np.arange(40) % 3 == 0
    auc, p_value = associations._probe(value_Qx1, has_Q.astype(int), value_Qx1, has_Q.astype(int), rng)
    found = roc_auc_score(has_Q, value_Qx1[:, 0])
    assert auc == pytest.approx(max(found, 1 - found)) and 0 < p_value <= 1


def test_labels_of_few_items_are_not_tested():
    rows = np.ones((10, 3))
    found = associate(rows, {}, rows, {"rare": np.arange(10) < 2}, [0], {}, 0)
    assert found.labels == () and found.top == ()
