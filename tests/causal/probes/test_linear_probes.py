"""Linear probes: what they find, what chance gives, and the intervals of both."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import binomtest, norm
from sklearn.feature_selection import f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from saejax.causal.probes.linear import Task, choose_strength, fitted, leaders, run_probes
from saejax.causal.probes.ranking import f_statistics, mean_differences
from saejax.causal.probes.scores import balanced_accuracy, paired_difference, permutation_p, roc_auc
from saejax.results import Interval
from saejax.settings import ProbeConfig

CONFIG = ProbeConfig(strengths=(0.01, 1.0), sparse=(1, 2), shuffles=4, permutations=200, folds=3)


def make_task(inputs=40, train=120, test=60, classes=2, seed=0, planted=True) -> Task:
    """Sparse inputs; where planted, the class says which of the inputs 3 and 8 fire (of two classes: how strongly)."""
    rng = np.random.default_rng(seed)
    class_N = np.arange(train + test) % classes if planted else rng.integers(classes, size=train + test)
    x_NxC = rng.exponential(size=(train + test, inputs)) * (rng.random((train + test, inputs)) < 0.3)
    x_NxC[:, 5] = 0.0  # never fires
    if planted:
        x_NxC[:, 3] = 2.0 * (class_N % 2) + 0.7 * rng.normal(size=train + test)
        x_NxC[:, 8] = 2.0 * (class_N >= classes / 2) + 0.7 * rng.normal(size=train + test)
    return Task(x_NxC[:train], class_N[:train], x_NxC[train:], class_N[train:])


def test_sparse_probes_find_the_planted_inputs():
    (one, two, full), _ = zip(*run_probes(make_task(classes=4), CONFIG, [1]), strict=True)
    assert (one.k, two.k, full.k) == (1, 2, None)
    assert set(two.inputs) == {3, 8} and one.inputs == two.inputs[:1] and full.inputs is None
    # Two independent bits, each read with an error rate of P(z > 1 / 0.7), 7.7 %: 85 % are right.
    assert two.accuracy.low < 0.852 < two.accuracy.high
    wilson = binomtest(round(60 * two.accuracy.mean), 60).proportion_ci(method="wilson")
    assert (two.accuracy.low, two.accuracy.high) == pytest.approx((wilson.low, wilson.high))
    assert one.accuracy.mean < 0.6 < two.accuracy.mean
    assert two.p_value == 1 / 201
    assert two.shuffled.high < 0.5 and two.random.mean < 0.5 and full.random is None
    assert two.balanced_accuracy == pytest.approx(two.accuracy.mean, abs=0.1)


def test_random_labels_are_not_read():
    """Rejections at 10 % are no more frequent than that, and the mean accuracy is that of guessing."""
    rng, p, accuracy = np.random.default_rng(3), [], []
    for seed in range(150):
        task = make_task(inputs=12, train=40, test=30, seed=seed, planted=False)
        answer_M = fitted(task, 2, 0.1).class_M
        p.append(permutation_p(answer_M, task.test_class_M, 200, rng))
        accuracy.append((answer_M == task.test_class_M).mean())
    assert binomtest(int((np.array(p) <= 0.1).sum()), len(p), 0.1, alternative="greater").pvalue > 0.01
    assert 0.3 < np.mean(p) < 0.85  # not all at one end
    assert np.mean(accuracy) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_full_probe_is_that_of_a_plain_pipeline(classes):
    """The plain one sees all inputs, and scales them without centring."""
    task = make_task(inputs=200, train=80, classes=classes)
    for strength in (1e-3, 1.0):
        plain = make_pipeline(
            StandardScaler(with_mean=False), LogisticRegression(C=strength, tol=1e-9, max_iter=20_000)
        ).fit(task.train_NxC, task.train_class_N)
        np.testing.assert_array_equal(fitted(task, None, strength).class_M, plain.predict(task.test_MxC))


def test_the_penalty_is_chosen_on_train_prompts():
    strong, weak = 1e-4, 1.0
    config = dataclasses.replace(CONFIG, strengths=(weak, strong))
    assert choose_strength(make_task(), None, config, 0) == weak
    assert choose_strength(make_task(planted=False), None, config, 0) == strong
    task = make_task()
    upside_down = dataclasses.replace(task, test_class_M=1 - task.test_class_M, test_MxC=-task.test_MxC)
    assert [row.strength for row, _ in run_probes(task, config, [1])] == [
        row.strength for row, _ in run_probes(upside_down, config, [1])
    ]


def test_the_f_statistic():
    task = make_task(classes=4)
    ours_KxC, live_C = f_statistics(task.train_NxC, task.train_class_N), np.arange(40) != 5
    for k, ours_C in enumerate(ours_KxC):
        theirs_C = f_classif(task.train_NxC[:, live_C], task.train_class_N == k)[0]
        np.testing.assert_allclose(ours_C[live_C], theirs_C, rtol=1e-9)
    assert (ours_KxC[:, 5] == 0).all()
    exact_NxC, class_N = np.array([[0.1, 1], [0.1, 2], [0.3, 1], [0.3, 2]]), np.array([0, 0, 1, 1])
    assert f_statistics(exact_NxC, class_N).tolist() == [[np.inf, 0]] * 2
    assert leaders(Task(exact_NxC, class_N, exact_NxC, class_N, "f_statistic"), 5).tolist() == [0, 1]
    assert leaders(Task(5 * exact_NxC[:, ::-1], class_N, exact_NxC, class_N), 5).tolist() == [1, 0]


def test_differences_of_class_means():
    for classes, size in ((2, np.abs), (4, np.array)):
        task = make_task(classes=classes)
        for k, ours_C in enumerate(mean_differences(task.train_NxC, task.train_class_N)):
            own = task.train_class_N == k
            theirs_C = task.train_NxC[own].mean(axis=0) - task.train_NxC[~own].mean(axis=0)
            np.testing.assert_allclose(ours_C, size(theirs_C), atol=1e-12)
    assert leaders(make_task(), 1).tolist() in ([3], [8])
    # In units of the input: one that varies a lot comes before one that says more.
    loud = dataclasses.replace(make_task(), train_NxC=make_task().train_NxC * np.where(np.arange(40) == 0, 1e3, 1.0))
    assert leaders(loud, 1).tolist() == [0] != leaders(dataclasses.replace(loud, ranking="f_statistic"), 1).tolist()


def test_the_area_under_the_curve_is_that_of_sklearn():
    rng = np.random.default_rng(0)
    for _ in range(20):
        class_M, score_M = np.arange(30) % 3 == 0, np.round(rng.normal(size=30), 1)  # with ties
        assert roc_auc(score_M + class_M, class_M).mean == pytest.approx(roc_auc_score(class_M, score_M + class_M))
    (_, two, full), _ = zip(*run_probes(make_task(), CONFIG, [1]), strict=True)
    assert two.auc.mean > 0.9 and full.auc.low > 0.5 and two.auc_shuffled.low < 0.5 < two.auc_shuffled.high
    assert all(row.auc is None is row.auc_shuffled for row, _ in run_probes(make_task(classes=4), CONFIG, [1]))
    alone = dataclasses.replace(make_task(), test_class_M=np.zeros(60, int))  # one class among test prompts
    assert all(row.auc is None for row, _ in run_probes(alone, CONFIG, [1]))


def test_intervals_of_areas_hold_the_true_one():
    """Scores one deviation apart: the area is Phi(1 / sqrt 2); the interval has a width where all is right."""
    rng, class_M = np.random.default_rng(1), np.arange(24) % 2
    found = [roc_auc(rng.normal(size=24) + class_M, class_M) for _ in range(300)]
    held = np.mean([one.low <= norm.cdf(2**-0.5) <= one.high for one in found])
    assert 0.92 <= held <= 0.985
    sure = roc_auc(class_M.astype(float), class_M)
    assert (sure.mean, sure.high) == (1.0, 1.0) and 0.7 < sure.low < 0.95
    wrong = roc_auc(-class_M.astype(float), class_M)
    assert (wrong.mean, wrong.low) == (0.0, 0.0) and wrong.high == pytest.approx(1 - sure.low)


def test_differences_are_paired_by_prompt():
    right_M, other_M = np.array([True] * 8 + [False] * 2), np.array([False] * 2 + [True] * 8)
    gap = paired_difference(right_M, other_M, 0)
    assert gap.mean == 0 and gap.low < 0 < gap.high
    assert paired_difference(right_M, right_M, 0) == Interval(0.0, 0.0, 0.0)


def test_every_class_gets_an_input():
    """Inputs 0 to 5 all say class 0, one each the other classes, and less clearly."""
    class_N = np.arange(90) % 3
    noise_NxC = np.random.default_rng(0).normal(size=(90, 12))
    shift_NxC = np.zeros((90, 12))
    shift_NxC[:, :6], shift_NxC[:, 8], shift_NxC[:, 11] = (class_N == 0)[:, None], class_N == 1, class_N == 2
    x_NxC = noise_NxC + shift_NxC * np.where(np.arange(12) < 6, 30.0, 6.0)
    chosen = leaders(Task(x_NxC, class_N, x_NxC, class_N), 3)
    assert chosen[0] < 6 and set(chosen[1:]) == {8, 11}


def test_inputs_that_never_vary():
    """Nothing to see: the probe names the largest class of the train prompts."""
    class_N = np.array([1] * 20 + [0] * 10)
    silent = Task(np.zeros((30, 7)), class_N, np.ones((4, 7)), np.array([1, 1, 0, 0]))
    for row, _ in run_probes(silent, CONFIG, [1]):
        assert row.accuracy.mean == row.majority == row.balanced_accuracy == 0.5
        assert row.p_value == 1.0 and row.inputs in ((), None)
    task = make_task()
    moved = dataclasses.replace(task, test_MxC=task.test_MxC + 9.0 * (np.arange(40) == 5))  # fires on test prompts only
    assert [row for row, _ in run_probes(moved, CONFIG, [1])] == [row for row, _ in run_probes(task, CONFIG, [1])]


def test_the_seed_decides():
    task = make_task(planted=False)

    def rows(config):
        return [row for row, _ in run_probes(task, config, [1])]

    assert rows(CONFIG) == rows(CONFIG) != rows(dataclasses.replace(CONFIG, seed=1))


def test_balanced_accuracy():
    assert balanced_accuracy(np.array([0, 0, 0, 0]), np.array([0, 0, 0, 1])) == 0.5
