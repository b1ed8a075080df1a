"""Labels judged: the questions about a feature's held-out contexts, and what the answers say."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from saejax.explain.contexts import HeldOut
from saejax.explain.questions import (
    GROUP,
    Question,
    active,
    detect,
    fuzz,
    intrude,
    read_choice,
    read_judgements,
)
from saejax.explain.results import FeatureScore
from saejax.tasks.scoring import wilson_of

GUESSING = 0.5  # balanced accuracy of an answer that does not look
_PER_INTRUDER = 2  # contexts without the feature for each question with an intruder


@dataclasses.dataclass(frozen=True)
class Asked:
    """Some questions and the right answers.

    Attributes:
      questions: any number.
      right: of each question: for each of its contexts whether the feature is active; of an intruder, its place.
      read: reads the answer to a question whose right answer is given; None: it cannot be read.
    """

    questions: list[Question]
    right: list[Any]
    read: Callable[[str | None, Any], Any]


def detection(held: HeldOut, label: str, seed: int) -> Asked:
    """Asks in which contexts the feature of a label is active.

    Args:
      label: of the feature, or of another one.
      seed: of the order of contexts, which does not depend on the label.
    """
    every, right = [*held.active, *held.silent], held.right
    groups = _groups(len(every), seed, held.feature)
    questions = [detect(label, [every[i] for i in group]) for group in groups]
    return Asked(questions, _of(right, groups), _judgements)


def fuzzing(held: HeldOut, label: str, seed: int) -> Asked:
    """Asks in which contexts the tokens that a label speaks of are marked; see ``detection``."""
    every, right = [*held.active, *held.silent], held.right
    places = [*map(active, held.active), *held.wrong]
    groups = _groups(len(every), seed, held.feature)
    questions = [fuzz(label, [every[i] for i in group], [places[i] for i in group]) for group in groups]
    return Asked(questions, _of(right, groups), _judgements)


def intruders(held: HeldOut, label: str | None, seed: int) -> Asked:
    """Asks which of some contexts, of firings about as strong but for one without the feature, does not belong there.

    Args:
      label: is not shown.
      seed: of the intruders' places.
    """
    rng, others = np.random.default_rng((seed, held.feature, 1)), GROUP - 1
    starts = range(0, len(held.active) - others + 1, others)
    questions, right = [], []
    for number in range(len(held.silent) // _PER_INTRUDER if starts else 0):
        start, place = starts[number % len(starts)], int(rng.integers(GROUP))
        shown = held.active[start : start + others]
        marks = list(map(active, shown))
        shown.insert(place, held.silent[number])
        marks.insert(place, held.wrong[number])
        questions.append(intrude(shown, marks))
        right.append(place)
    return Asked(questions, right, lambda answer, _: read_choice(answer, GROUP))


def judged_score(right: Sequence[Sequence[bool]], read: Sequence[Sequence[bool] | None]) -> FeatureScore | None:
    """The score of yes and no; None if no answer can be read, or only those about contexts of one sort.

    Args:
      right: of each question, for each of its contexts, whether the feature is active.
      read: what was answered; None: it cannot be read.
    """
    pairs = [(*pair,) for of, said in zip(right, read, strict=True) if said for pair in zip(of, said, strict=True)]
    count = Counter(pairs)  # (active, called so)
    hit, missed, false, true = (count[pair] for pair in ((True, True), (True, False), (False, True), (False, False)))
    if not (hit + missed and false + true):
        return None
    recall, specificity = hit / (hit + missed), true / (false + true)
    f1 = 2 * hit / max(1, 2 * hit + false + missed)
    return FeatureScore((recall + specificity) / 2, hit / max(1, hit + false), recall, f1, len(pairs))


def embedding_score(right: Sequence[bool], cosines: Sequence[float]) -> float | None:
    """How well cosines with a label tell the contexts with the feature: the area under the ROC curve, ties half.

    None if there are contexts of one sort alone.
    """
    return float(roc_auc_score(right, cosines)) if len(set(right)) == 2 else None


def intruder_score(right: Sequence[int], read: Sequence[int | None]) -> float | None:
    """The share of intruders that were found; None if no answer can be read."""
    found = [said == place for place, said in zip(right, read, strict=True) if said is not None]
    return sum(found) / len(found) if found else None


def is_kept(own: FeatureScore | None, control: FeatureScore | None) -> bool:
    """Whether a label tells more than the label of another feature, and than guessing.

    The lower end of the 95 % Wilson interval of its accuracy in detection has to lie above both.
    """
    if own is None:
        return False
    bar = max(GUESSING, control.accuracy if control else GUESSING)
    return wilson_of(own.accuracy, own.contexts).low > bar


# How each is asked, scored, and what comes of an answer that does not look.
SCORES: dict[str, tuple[Callable[..., Asked], Callable[..., Any], float]] = dict(
    detection=(detection, judged_score, GUESSING),
    fuzzing=(fuzzing, judged_score, GUESSING),
    intruder=(intruders, intruder_score, 1 / GROUP),
)


def _judgements(answer: str | None, right: Sequence[bool]) -> list[bool] | None:
    return read_judgements(answer, len(right))


def _groups(count: int, seed: int, feature: int) -> list[list[int]]:
    order = np.random.default_rng((seed, feature, 0)).permutation(count)
    return [order[start : start + GROUP].tolist() for start in range(0, count, GROUP)]


def _of(right: list[bool], groups: list[list[int]]) -> list[list[bool]]:
    return [[right[i] for i in group] for group in groups]
