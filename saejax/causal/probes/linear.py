"""Linear probes: how well a class can be read off activations, and how much of that is chance.

A probe is a logistic regression (multinomial for more than two classes) with an L2 penalty on inputs standardised over
the train prompts. Cross-validation on the train prompts alone chooses the penalty; test prompts, which share no content
with them, give the accuracy, and of two classes the area under the ROC curve. A *sparse* probe sees k inputs only:
those whose class means differ most on the train prompts (``leaders``; k-sparse probes: Gurnee et al., 2023, arXiv
2305.01610; the protocol of Kantamneni et al., 2025, arXiv 2502.16681, sae-probes, but for the likelihood of held-out
folds, which chooses the penalty here and there their AUC). What features are worth is judged beside the *dense* probe,
of all raw activations.

Beside each accuracy stand

- its 95 % interval (Wilson, 1927, which has a width even at 0 and 100 %),
- the accuracy of always naming the largest class of the train prompts,
- that of probes of shuffled train labels, chosen and fitted again with the same penalty,
- for a sparse probe, that of probes of k random inputs that vary on the train prompts,
- how much larger it is than the dense probe's, paired by test prompt,
- a p-value: the share of permutations of the test labels with which the probe's answers agree as often.

Standardised inputs are scaled by their deviation. They are centred, too, which changes no probe, because the intercept
bears no penalty, but lets the solver converge sooner.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler

from saejax.causal.probes.ranking import f_statistics, mean_differences
from saejax.causal.probes.results import ProbeFit
from saejax.causal.probes.scores import balanced_accuracy, permutation_p, roc_auc
from saejax.results import Interval
from saejax.settings import ProbeConfig
from saejax.tasks.scoring import wilson

_ITERATIONS, _TOLERANCE = 2_000, 1e-6  # of the solver


@dataclasses.dataclass(frozen=True)
class Task:
    """What a probe learns from, and what it is tested on.

    Attributes:
      train_NxC: C inputs of N train prompts, finite.
      train_class_N: their classes, 0 to the number of classes less 1; of each at least as many as there are folds.
      test_MxC: the same inputs of M test prompts, at least one.
      test_class_M: their classes.
      ranking: what chooses the inputs of sparse probes: "mean_difference" or "f_statistic".
    """

    train_NxC: np.ndarray
    train_class_N: np.ndarray
    test_MxC: np.ndarray
    test_class_M: np.ndarray
    ranking: str = "mean_difference"

    def narrowed(self, inputs: np.ndarray) -> "Task":
        """The same with some of the inputs."""
        return dataclasses.replace(self, train_NxC=self.train_NxC[:, inputs], test_MxC=self.test_MxC[:, inputs])


class ProbeAnswers(NamedTuple):
    """What a probe says of the M test prompts: their classes, and of two classes a score, larger for the second."""

    class_M: np.ndarray
    score_M: np.ndarray | None


def run_probes(
    task: Task, config: ProbeConfig, seed: list[int], name: str = "features"
) -> Iterator[tuple[ProbeFit, np.ndarray]]:
    """The sparse probes, smallest first, and the probe of all inputs, whose ``k`` is None; which answers are right [M].

    Args:
      seed: of folds, shuffles, random inputs and permutations, beside ``config.seed``.
      name: of the inputs, "features" or "raw".
    """
    varying_C = np.flatnonzero(np.ptp(task.train_NxC, axis=0) > 0)
    task = task.narrowed(varying_C)
    task = dataclasses.replace(task, train_NxC=task.train_NxC.astype(float), test_MxC=task.test_MxC.astype(float))
    for k in (*sorted(set(config.sparse)), None):
        rng = np.random.default_rng([config.seed, *seed, k or 0])
        strength = choose_strength(task, k, config, int(rng.integers(2**31)))
        read, class_M = fitted(task, k, strength), task.test_class_M
        right_M = read.class_M == class_M
        of_random = [_random_accuracy(task, k, strength, rng) for _ in range(config.shuffles)] if k else []
        shuffled = [_shuffled(task, k, strength, rng) for _ in range(config.shuffles)]
        auc, *auc_R = (roc_auc(one.score_M, class_M) for one in (read, *shuffled))
        fit = ProbeFit(
            input=name,
            k=k,
            strength=strength,
            inputs=tuple(varying_C[leaders(task, k)].tolist()) if k else None,
            random=_spread(of_random) if k else None,
            accuracy=wilson(right_M),
            balanced_accuracy=balanced_accuracy(read.class_M, class_M),
            auc=auc,
            majority=float((class_M == np.bincount(task.train_class_N).argmax()).mean()),
            shuffled=_spread([(one.class_M == class_M).mean() for one in shuffled]),
            auc_shuffled=_spread([one.mean for one in auc_R if one]) if auc else None,
            against_dense=None,
            p_value=permutation_p(read.class_M, class_M, config.permutations, rng),
        )
        yield fit, right_M


def fitted(task: Task, k: int | None, strength: float) -> ProbeAnswers:
    """What a probe of k inputs, or of all, says of the test prompts; ``strength`` is the penalty's inverse one."""
    train_NxR, test_MxR = _prepared(task, k)
    model = _fit(train_NxR, task.train_class_N, strength)
    return ProbeAnswers(
        model.predict(test_MxR), model.decision_function(test_MxR) if len(model.classes_) == 2 else None
    )


def choose_strength(task: Task, k: int | None, config: ProbeConfig, seed: int) -> float:
    """The inverse strength of the penalty with the largest likelihood of held-out folds of the train prompts.

    Each fold, drawn by ``seed``, scales and chooses its k inputs (None: all) anew. Of equals, the strongest penalty.
    """
    strengths, class_N = sorted(set(config.strengths)), task.train_class_N
    if len(strengths) == 1:
        return strengths[0]
    score_S = np.zeros(len(strengths))
    folds = StratifiedKFold(config.folds, shuffle=True, random_state=seed)
    for kept, held in folds.split(class_N, class_N):
        fold = Task(task.train_NxC[kept], class_N[kept], task.train_NxC[held], class_N[held])
        kept_PxR, held_MxR = _prepared(fold, k)
        for s, strength in enumerate(strengths):
            log_p_MxK = _fit(kept_PxR, fold.train_class_N, strength).predict_log_proba(held_MxR)
            score_S[s] += log_p_MxK[np.arange(len(held)), fold.test_class_M].sum()
    return strengths[int(score_S.argmax())]


def leaders(task: Task, k: int) -> np.ndarray:
    """The k inputs that separate the classes of the train prompts best, best first; all where there are fewer.

    The best one of every class comes first, then every class's second, and so on: the best inputs over all classes
    often say the same of one class.
    """
    ranked_by = f_statistics if task.ranking == "f_statistic" else mean_differences
    score_KxC = ranked_by(task.train_NxC, task.train_class_N)
    place_KxC = np.argsort(np.argsort(-score_KxC, axis=1, kind="stable"), axis=1)
    return np.lexsort((-score_KxC.max(axis=0), place_KxC.min(axis=0)))[:k]


def _prepared(task: Task, k: int | None) -> tuple[np.ndarray, np.ndarray]:
    """What the solver is given of the train and of the test prompts; a column of zeros where nothing varies."""
    task = task.narrowed(leaders(task, k)) if k else task
    if not np.ptp(task.train_NxC, axis=0).any():
        return np.zeros((len(task.train_NxC), 1)), np.zeros((len(task.test_MxC), 1))
    scaler = StandardScaler().fit(task.train_NxC)
    scaled = scaler.transform(task.train_NxC), scaler.transform(task.test_MxC)
    return scaled if k else _rotated(*scaled)


def _rotated(train_NxC: np.ndarray, test_MxC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inputs in the at most N directions that the train prompts span.

    The optimal weights lie there, and rotation leaves the penalty as it is: the same probe from far fewer inputs.
    """
    squares_N, every_NxN = np.linalg.eigh(train_NxC @ train_NxC.T)
    kept_N = squares_N > 1e-10 * squares_N.max(initial=0.0)
    length_R, rows_NxR = np.sqrt(squares_N[kept_N]), every_NxN[:, kept_N]
    return rows_NxR * length_R, test_MxC @ (train_NxC.T @ rows_NxR) / length_R


def _fit(train_NxR: np.ndarray, class_N: np.ndarray, strength: float) -> Any:
    model = LogisticRegression(C=strength, max_iter=_ITERATIONS, tol=_TOLERANCE)
    return model.fit(train_NxR, class_N)


def _shuffled(task: Task, k: int | None, strength: float, rng: np.random.Generator) -> ProbeAnswers:
    return fitted(dataclasses.replace(task, train_class_N=rng.permutation(task.train_class_N)), k, strength)


def _random_accuracy(task: Task, k: int, strength: float, rng: np.random.Generator) -> float:
    inputs = task.train_NxC.shape[1]
    some = task.narrowed(rng.choice(inputs, min(k, inputs), replace=False))
    return float((fitted(some, k, strength).class_M == task.test_class_M).mean())


def _spread(accuracies: list[float]) -> Interval:
    low, high = np.quantile(accuracies, (0.05, 0.95))
    return Interval(float(np.mean(accuracies)), float(low), float(high))
