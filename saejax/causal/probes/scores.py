"""What the answers of probes are worth."""

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm, rankdata
from sklearn.metrics import recall_score

from saejax.causal.clustered import Resampling
from saejax.results import Interval

_RESAMPLES = 2_000  # of test prompts


def paired_difference(right_M: np.ndarray, other_M: np.ndarray, seed: int) -> Interval:
    """How much more often one probe is right than the ``other`` on the same prompts, and its 95 % bootstrap interval.

    Args:
      right_M, other_M: whether each is right, of each prompt.
      seed: of the bootstrap over prompts.
    """
    return Resampling.of(np.zeros(len(right_M)), _RESAMPLES, seed).mean(right_M.astype(float) - other_M)


def roc_auc(score_M: np.ndarray | None, class_M: np.ndarray) -> Interval | None:
    """The area under the ROC curve of two classes, and its 95 % score interval, which has a width at 0 and 1, too.

    The area A is the share of pairs of prompts, one of each class, of which the second class has the larger score, ties
    counting half. The ends are where |A - a| = 1.96 sd(a), sd as Hanley and McNeil (1982) give it for exponential
    scores, with (m + n) / 2 prompts of either class (method 5 of Newcombe, 2006).

    Args:
      score_M: larger for the second class; None: there is no such score.
      class_M: of each prompt.

    Returns:
      None without scores, or where the prompts are not of two classes.
    """
    if score_M is None or len(np.unique(class_M)) != 2:
        return None
    second_M = class_M == class_M.max()
    m, n = int(second_M.sum()), int((~second_M).sum())
    area = (rankdata(score_M)[second_M].sum() - m * (m + 1) / 2) / (m * n)
    others = (m + n) / 2 - 1

    def beyond(a: float) -> float:
        spread = 1 + others * ((1 - a) / (2 - a) + a / (1 + a))
        return (area - a) ** 2 - norm.isf(0.025) ** 2 * a * (1 - a) * spread / (m * n)

    low = brentq(beyond, 0.0, min(area, 1 - 1e-9)) if area > 0 else 0.0  # at 0 and 1 the spread is none
    high = brentq(beyond, max(area, 1e-9), 1.0) if area < 1 else 1.0
    return Interval(float(area), float(low), float(high))


def balanced_accuracy(answer_M: np.ndarray, class_M: np.ndarray) -> float:
    """The share of prompts within each class whose answer is that class, mean over the classes that there are."""
    return float(recall_score(class_M, answer_M, labels=np.unique(class_M), average="macro"))


def permutation_p(answer_M: np.ndarray, class_M: np.ndarray, draws: int, rng: np.random.Generator) -> float:
    """The p-value of the hypothesis that each answer has nothing to do with the prompt's class, one-sided.

    The share of so many ``draws`` of permutations of the classes, the true order among them, with at least as many
    right answers (Phipson and Smyth, 2010).
    """
    right_R = (rng.permuted(np.tile(class_M, (draws, 1)), axis=1) == answer_M[None, :]).sum(axis=1)
    return float((1 + (right_R >= (answer_M == class_M).sum()).sum()) / (1 + draws))
