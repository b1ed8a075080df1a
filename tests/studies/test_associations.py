"""Associations of features with labels: planted ones are found by all three answers, and none where there are none."""

import tracemalloc

import numpy as np
import pytest
from scipy import sparse
from scipy.stats import permutation_test, ttest_ind
from sklearn.metrics import roc_auc_score

from saejax.matching.importance import ItemFeatures
from saejax.matching.transfer.activity import Activity
from saejax.stages.study.run import question_activations
from saejax.statistics import permutation
from saejax.studies import associations
from saejax.studies.associations import RIGHT, associate, contrast_p, item_activations
from saejax.tasks.benchmark_definitions import Item

FEATURES, ITEMS = 60, 48
HALVES = slice(0, ITEMS), slice(ITEMS, None)


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
    assert {one.label for one in found.top} <= {"addition", "logic"}  # whether an answer is right, no train item says
    assert first.label == "addition" and first.correlation.low > 0.5
    assert (first.associated, first.probe) == ("yes", "yes") and first.auc > 0.9 and first.p_value == 1 / 200
    assert (second.associated, second.probe, third.causal) == ("no", "no", "not tested")
    by_label = {one.label: one for one in found.labels}
    assert (by_label["addition"].associated, by_label["logic"].associated) == (1, 0)
    assert by_label[RIGHT].associated == 0 and by_label[RIGHT].shuffled <= 0.05
    # The causal answer is the difference of drops.
    assert first.causal_drop.mean == pytest.approx(3.0, abs=0.2) and first.causal == "yes"
    assert first.p_causal == 2 / 200  # Holm, over two drops


def test_permutations_are_counted_without_being_kept():
    features, items = 5_000, 48
    rng = np.random.default_rng(3)
    acts_QxF = rng.normal(size=(items, features))
    labels = {f"label {i}": rng.random(items) < 0.5 for i in range(5)}
    tracemalloc.start()
    found = associate(acts_QxF, {}, acts_QxF, labels, (), {}, 7)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * acts_QxF.nbytes, "all permutations have 20 times the activations' size"
    order_rng = np.random.default_rng(7)
    orders = [order_rng.permutation(items) for _ in range(associations._PERMUTATIONS)]
    unit_QxF, unit_QxL = (
        permutation._centred_unit(x) for x in (acts_QxF, np.stack([*labels.values()], 1).astype(float))
    )
    all_SxFxL = np.stack([unit_QxF.T @ unit_QxL[order] for order in orders])
    cut = np.quantile(all_SxFxL.max(axis=(1, 2)), 1 - associations.LEVEL, method="higher")
    expected_L = (all_SxFxL > cut).sum(axis=1).mean(axis=0)
    assert [label.shuffled for label in found.labels] == expected_L.tolist() and expected_L.any()


def test_the_p_value_of_a_contrast_is_that_of_scipy():
    rng = np.random.default_rng(5)
    has_Q = np.arange(40) % 4 == 0
    drop_Q = rng.normal(size=40) + 0.7 * has_Q
    order_SxQ = np.stack([rng.permutation(40) for _ in range(4999)])

    def welch(first, second, axis=-1):
        return ttest_ind(first, second, equal_var=False, axis=axis).statistic

    halves, options = (drop_Q[has_Q], drop_Q[~has_Q]), dict(n_resamples=4999, alternative="greater", vectorized=True)
    wanted = permutation_test(halves, welch, **options)
    p_value, least = contrast_p(drop_Q, has_Q, order_SxQ)
    assert p_value == pytest.approx(wanted.pvalue, abs=0.015) and least == 1 / 5000


def test_no_drop_is_said_to_go_with_a_label_where_none_does():
    """Eight features of 100 worlds drop at random, each with a label of four; in 100 more worlds one has a label."""
    fooled = dict(associated=0, probe=0, causal=0)
    for seed in range(100):
        rng = np.random.default_rng(seed)
        acts_PxF = np.maximum(rng.normal(0.3, 1, (2 * ITEMS, 8)), 0)
        kind_P = rng.permutation(np.arange(2 * ITEMS) % 4)
        train, test = ({str(kind): kind_P[half] == kind for kind in range(4)} for half in (HALVES[0], HALVES[1]))
        # Drops of items on which the feature fires are larger, whatever their label.
        drops = {i: acts_PxF[HALVES[1], i] * rng.normal(1, 1, ITEMS) for i in range(8)}
        acts = acts_PxF[HALVES[0]], acts_PxF[HALVES[1]]
        found = associate(acts[0], train, acts[1], test, range(8), drops, seed)
        for name in fooled:
            fooled[name] += any(getattr(one, name) == "yes" for one in found.top)
    true = [make_world(seed, 3.0).top[0] for seed in range(100, 200)]
    found = {name: sum(getattr(one, name) == "yes" for one in true) for name in fooled}
    print(f"a feature goes with a label: {fooled} of 100 worlds where none does; {found} of 100 where one does")
    assert max(fooled.values()) <= 8 and min(found.values()) >= 80


def test_the_label_is_chosen_on_train_items():
    rng = np.random.default_rng(0)
    kinds = {name: np.arange(ITEMS) % 3 == number for number, name in enumerate(("a", "b", "c"))}
    train_PxF, test_QxF = (np.abs(rng.normal(0, 0.1, (ITEMS, 1))) + 3.0 * kinds[name][:, None] for name in "ab")
    (found,) = associate(train_PxF, kinds, test_QxF, kinds, [0], {}, 0).top
    assert found.label == "a" and found.correlation.high < 0 and found.causal == "not tested"
    assert associate(train_PxF, {}, test_QxF, kinds, [0], {}, 0).top == ()
    rare = associate(train_PxF, {}, test_QxF, {"rare": np.arange(ITEMS) < 2}, [0], {}, 0)  # of too few items
    assert rare.labels == rare.top == ()


def test_a_feature_is_not_said_to_go_with_a_label_that_it_avoids():
    """Its label is the one that it goes with most on train items; on test items it is silent where the label is."""
    is_sum_P = np.arange(ITEMS) % 2 == 0
    noise = np.random.default_rng(0).random((2, ITEMS, 1))
    labels = {"addition": is_sum_P, "logic": ~is_sum_P}
    acts = noise[0] + 3.0 * is_sum_P[:, None], noise[1] + 3.0 * ~is_sum_P[:, None]
    (feature,) = associate(acts[0], labels, acts[1], labels, [0], {}, 0).top
    assert feature.label == "addition" and feature.correlation.high < -0.8
    assert (feature.associated, feature.probe) == ("no", "no") and feature.p_value > 0.5


def test_a_feature_that_no_train_item_with_a_label_excites_has_no_label():
    """It is silent on the questions of train items, and answers to additions rest on it."""
    is_sum_P = np.arange(ITEMS) % 2 == 0
    labels, noise = {"addition": is_sum_P, "logic": ~is_sum_P}, np.random.default_rng(0).random((ITEMS, 1))
    (feature,) = associate(0 * noise, labels, noise + 3.0 * is_sum_P[:, None], labels, [0], {0: 1.0 * is_sum_P}, 0).top
    assert (feature.associated, feature.probe, feature.causal) == ("not testable",) * 3


def test_what_can_only_be_answered_no_is_not_testable():
    """A silent feature, too few items for a small p-value, and too many features for the permutations."""
    is_sum_P, rng = np.arange(ITEMS) % 2 == 0, np.random.default_rng(0)
    labels = {"addition": is_sum_P, "logic": ~is_sum_P}
    acts_PxF = rng.random((ITEMS, 12)) + 3.0 * is_sum_P[:, None]
    acts_PxF[:, 1] = 0.0
    drops = {0: 1.0 * is_sum_P, 1: np.zeros(ITEMS)}
    first, silent = associate(acts_PxF, labels, acts_PxF, labels, [0, 1], drops, 0).top
    assert (first.associated, first.probe, first.causal) == ("yes", "yes", "yes")
    assert {silent.associated, silent.probe, silent.causal} == {"not testable"}
    # Four of eight items have a label in 70 ways: with four features no p-value is below 4 / 70.
    few = {name: has_P[:8] for name, has_P in labels.items()}
    drops = dict.fromkeys((0, 2, 3, 4), 1.0 * is_sum_P[:8])
    found = associate(acts_PxF, labels, acts_PxF[:8], few, [*drops], drops, 0)
    assert {(one.probe, one.causal) for one in found.top} == {("not testable", "not testable")}
    # A feature of four items, all of the 32 with a label: of 18 % of the ways to give the label the same is true.
    often = {"addition": np.arange(ITEMS) % 3 > 0, "logic": np.arange(ITEMS) % 3 == 0}
    acts_PxF[:, 1] = drops[1] = 1.0 * np.isin(np.arange(ITEMS), [1, 2, 4, 5])
    (seldom,) = associate(acts_PxF, often, acts_PxF, often, [1], {1: drops[1]}, 0).top
    assert seldom.label == "addition" and seldom.correlation.low > 0
    assert {seldom.associated, seldom.probe, seldom.causal} == {"not testable"}
    many = associate(acts_PxF, labels, acts_PxF, labels, [0, *range(2, 12)], {}, 0)  # 11 / 200 is above the level
    assert {one.probe for one in many.top} == {"not testable"} and {one.causal for one in many.top} == {"not tested"}


def test_activations_are_those_of_the_question():
    items = [Item(str(number), "", "two plus six", "2 + 6 = 8", "8") for number in range(2)]
    # The tokens "two plus", " six", "\n2", " +", " 6", " = 8" of each.
    acts_NxF = np.zeros((12, 2))
    acts_NxF[[1, 4], 0], acts_NxF[[2, 9], 1] = (2.0, 5.0), (4.0, 3.0)
    activity, end_N = Activity(sparse.csr_array(acts_NxF), np.ones(12, bool)), np.tile([8, 12, 14, 16, 18, 22], 2)
    read = ItemFeatures(("0", "1"), activity, np.repeat([0, 1], 6), end_N, np.zeros(2), np.zeros((0, 2)))
    assert question_activations(read, items).tolist() == [[2.0, 0.0], [0.0, 0.0]]


def test_no_association_where_there_is_none():
    null, true = (
        [any(one.associated for one in make_world(seed, strength, ()).labels) for seed in range(1, worlds + 1)]
        for strength, worlds in ((0.0, 100), (3.0, 100))
    )
    print(f"goes with a label: {sum(null)} of 100 worlds where no feature does; {sum(true)} of 100 where one does")
    assert sum(null) <= 8 and sum(true) >= 80


def test_correlation_and_activation_of_items_are_those_of_numpy():
    rng = np.random.default_rng(3)
    acts_NxF = rng.normal(size=(30, 4)) * (rng.random((30, 4)) < 0.7)
    text_N = np.repeat(np.arange(6), 5)
    largest = item_activations(sparse.csr_array(acts_NxF), text_N, 7)
    acts = acts_NxF.reshape(6, 5, 4)
    place = np.abs(acts).argmax(axis=1)[:, None]  # of the largest, whatever its sign
    wanted = np.take_along_axis(acts, place, axis=1)[:, 0]
    assert largest[:6] == pytest.approx(wanted) and (wanted < 0).any() and not largest[6].any()
    value_Q, has_Q = rng.normal(size=20), np.arange(20) % 3 == 0
    weights = np.full((5, 20), 1 / 20)
    assert associations._correlation(value_Q, has_Q, weights).mean == pytest.approx(np.corrcoef(value_Q, has_Q)[0, 1])


def test_the_area_under_the_curve_is_that_of_scikit_learn():
    rng = np.random.default_rng(4)
    value_Qx1, has_Q = np.round(rng.normal(size=(40, 1)), 1), np.arange(40) % 3 == 0
    auc, p_value, _ = associations._probe(value_Qx1, has_Q.astype(int), value_Qx1, has_Q.astype(int), rng)
    found = roc_auc_score(has_Q, value_Qx1[:, 0])
    assert auc == pytest.approx(max(found, 1 - found)) and 0 < p_value <= 1
