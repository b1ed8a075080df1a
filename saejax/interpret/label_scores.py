"""Scores of labels: questions about a feature's held-out contexts, and what the replies say."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from saejax.interpret.explain_results import FeatureScore
from saejax.interpret.held_out import HeldOut
from saejax.interpret.questions import GROUP, Question, detect
from saejax.tasks.scoring import wilson_of

CHANCE = 0.5


@dataclasses.dataclass(frozen=True)
class Exam:
    """Questions with their correct answers.

    Attributes:
      questions: the questions.
      correct: for each, whether the feature fires in each of its contexts.
    """

    questions: list[Question]
    correct: list[list[bool]]


def detection(held: HeldOut, label: str, seed: int) -> Exam:
    """Return an exam: in which contexts does the feature with a label fire?

    Args:
      held: contexts of the feature.
      label: its label, or another feature's.
      seed: seed of the order of contexts, which is the same for every label.
    """
    contexts, fires = [*held.active, *held.silent], held.fires
    # The order does not depend on the label, so a label and its control answer the same questions.
    order = np.random.default_rng((seed, held.feature, 0)).permutation(len(contexts))
    groups = [order[start : start + GROUP].tolist() for start in range(0, len(contexts), GROUP)]
    questions = [detect(label, [contexts[i] for i in group]) for group in groups]
    return Exam(questions, [[fires[i] for i in group] for group in groups])


def detection_score(correct: Sequence[Sequence[bool]], read: Sequence[Sequence[bool] | None]) -> FeatureScore | None:
    """Return the score of yes and no replies; None if only contexts of one class were scored.

    Args:
      correct: for each question whether the feature fires in each of its contexts.
      read: the parsed replies; None: unparsed.
    """
    pairs = [
        pair for truth, reply in zip(correct, read, strict=True) if reply for pair in zip(truth, reply, strict=True)
    ]
    count = Counter(pairs)  # (fires, called active)
    hit, missed, false, true = (count[pair] for pair in ((True, True), (True, False), (False, True), (False, False)))
    if not (hit + missed and false + true):
        return None
    # The mean of both shares: with few silent contexts, always "yes" would otherwise score high.
    recall, specificity = hit / (hit + missed), true / (false + true)
    f1 = 2 * hit / max(1, 2 * hit + false + missed)
    return FeatureScore((recall + specificity) / 2, hit / max(1, hit + false), recall, f1, len(pairs))


def is_kept(score: FeatureScore | None, control: FeatureScore | None) -> bool:
    """Return whether the lower end of the 95 % Wilson interval of accuracy is above the control's, and above chance."""
    if score is None:
        return False
    # The interval's lower end, because the best of thousands of labels would often exceed a control by luck.
    return wilson_of(score.accuracy, score.contexts).low > max(CHANCE, control.accuracy if control else CHANCE)
