"""Exams of labels: questions about a feature's held-out contexts, and the scores of the replies.

====================  ====================================================  =================================
score                 shown                                                 value
====================  ====================================================  =================================
detection             contexts with the feature and without it, the label   balanced accuracy
near misses           the same replies: with it, and near misses            balanced accuracy
fuzzing               contexts with the right or other tokens marked        balanced accuracy
intruder              marked contexts with it and one without, no label     accuracy; 1 in ``GROUP`` by chance
simulation            a context token by token, the label                   correlation of activations
====================  ====================================================  =================================

The order of what is asked does not depend on the label, so a label and its control answer the same questions.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from saejax.interpret import questions
from saejax.interpret.feature_record import FeatureContext
from saejax.interpret.held_out import HeldOut
from saejax.interpret.questions import GROUP, STRONGEST, Question, active_tokens
from saejax.interpret.results import LabelScore
from saejax.results import Interval
from saejax.statistics.bootstrap import percentile_interval, resampling_weights
from saejax.statistics.intervals import wilson_of

CHANCE = 0.5
_INTRUDERS = 5  # questions for an intruder
_LEAST_NEAR = 2  # near misses: with one, right replies to all contexts would still be no better than chance
_RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Exam:
    """Questions about a feature, and what replies to them are worth."""

    questions: list[Question]  #: the questions
    #: from the replies, None where there is none, the scores by name, and the number of replies that were not parsed.
    read: Callable[[Sequence[str | None]], tuple[dict[str, Interval], int]]


def detection(held: HeldOut, label: str, seed: int) -> Exam:
    """Return the questions in which contexts a feature fires, near misses among them.

    Args:
      held: its contexts.
      label: shown to the judge.
      seed: of the order.
    """
    shown = [*held.active, *held.silent, *held.near]
    groups = _groups(len(shown), (seed, held.feature, 0))
    stops = np.cumsum([len(held.active), len(held.silent), len(held.near)]).tolist()
    active, silent, near = range(stops[0]), range(stops[0], stops[1]), range(stops[1], stops[2])

    def read(replies: Sequence[str | None]) -> tuple[dict[str, Interval], int]:
        called, unparsed = _read_groups(groups, replies)
        scores = {"detection": balanced_accuracy(called, active, silent), "near misses": None}
        if len(near) >= _LEAST_NEAR:
            scores["near misses"] = balanced_accuracy(called, active, near)
        return {name: score for name, score in scores.items() if score}, unparsed

    return Exam([questions.detect(label, [shown[i] for i in group]) for group in groups], read)


def fuzzing(held: HeldOut, label: str, seed: int) -> Exam:
    """Return the questions in which contexts the marked tokens are those on which a feature fires.

    Args:
      held: its contexts.
      label: shown to the judge.
      seed: of the order.
    """
    rng = np.random.default_rng((seed, held.feature, 1))
    right = [(context, active_tokens(context)) for context in held.active]
    wrong = [(context, _mark_silent(context, sum(is_active), rng)) for context, is_active in right]
    shown = [*right, *((context, is_marked) for context, is_marked in wrong if any(is_marked))]
    groups = _groups(len(shown), (seed, held.feature, 2))

    def read(replies: Sequence[str | None]) -> tuple[dict[str, Interval], int]:
        called, unparsed = _read_groups(groups, replies)
        score = balanced_accuracy(called, range(len(right)), range(len(right), len(shown)))
        return dict(fuzzing=score) if score else {}, unparsed

    return Exam([questions.fuzz(label, *zip(*(shown[i] for i in group), strict=True)) for group in groups], read)


def intruder(held: HeldOut, label: str, seed: int) -> Exam:
    """Return the questions which context does not belong to others in which a feature fires.

    Args:
      held: its contexts.
      label: not shown; the questions are the same for every label.
      seed: of the order.
    """
    rng = np.random.default_rng((seed, held.feature, 3))
    intruder_questions, truth = [], []
    others = GROUP - 1
    for number, stranger in enumerate(held.silent[:_INTRUDERS] if len(held.active) >= others else ()):
        # Neighbours by activation, weak ones as well as strong ones.
        start = number * (len(held.active) - others) // max(_INTRUDERS - 1, 1)
        shown = [(context, active_tokens(context)) for context in held.active[start : start + others]]
        # Marked where another context is: marks at random places would tell it from those around a firing.
        rest = [*held.active[:start], *held.active[start + others :]] or held.active
        is_marked = _mark_as(rest[int(rng.integers(len(rest)))], stranger)
        truth.append(int(rng.integers(GROUP)))
        shown.insert(truth[-1], (stranger, is_marked))
        intruder_questions.append(questions.intrude(*zip(*shown, strict=True)))

    def read(replies: Sequence[str | None]) -> tuple[dict[str, Interval], int]:
        named = [questions.read_choice(reply, GROUP) for reply in replies]
        right = [name == place for name, place in zip(named, truth, strict=True) if name is not None]
        return dict(intruder=wilson_of(float(np.mean(right)), len(right))) if right else {}, named.count(None)

    return Exam(intruder_questions, read)


def simulation(held: HeldOut, label: str, seed: int) -> Exam:
    """Return the questions how active a feature is on each token of contexts with it and without it.

    Args:
      held: its contexts.
      label: shown to the judge.
      seed: of the order.
    """
    shown = [*held.active, *held.silent]
    true = [[act or 0.0 for act in context["acts"]] for context in shown]
    largest = max((act for acts in true for act in acts), default=0.0) or 1.0

    def read(replies: Sequence[str | None]) -> tuple[dict[str, Interval], int]:
        predicted = [questions.read_activations(reply, len(acts)) for reply, acts in zip(replies, true, strict=True)]
        pairs = [
            np.array([acts, np.array(values) * largest / STRONGEST])
            for acts, values in zip(true, predicted, strict=True)
            if values is not None
        ]
        score = _pooled_correlation(pairs, seed)
        return dict(simulation=score) if score else {}, predicted.count(None)

    return Exam([questions.simulate(label, context) for context in shown], read)


#: Exam by the name of ``--explain.scores``; "detection" also gives the score of near misses.
EXAMS: Mapping[str, Callable[[HeldOut, str, int], Exam]] = dict(
    detection=detection, fuzzing=fuzzing, intruder=intruder, simulation=simulation
)


def balanced_accuracy(called: Mapping[int, bool], active: Sequence[int], silent: Sequence[int]) -> Interval | None:
    """Return the balanced accuracy of yes and no replies, with its 95 % Wilson interval.

    Args:
      called: the reply about each item that has one.
      active: items whose right answer is yes.
      silent: items whose right answer is no.

    Returns:
      None if only items of one kind were answered.
    """
    sides = [[called[i] == truth for i in items if i in called] for items, truth in ((active, True), (silent, False))]
    if not all(sides):
        return None
    # The mean of both shares, or always "yes" would score high where few contexts are silent. These few weigh half, so
    # the interval is computed for twice the harmonic mean of both numbers.
    count = 4 / sum(1 / len(side) for side in sides)
    return wilson_of(float(np.mean([np.mean(side) for side in sides])), count)


def is_kept(scores: Mapping[str, LabelScore]) -> bool:
    """Return whether a label is better than its control and than chance, in detection and on near misses if any."""
    # The interval's lower end, because the best of thousands of labels would often exceed a control by luck.
    # Without a control nothing shows that this label says more than any.
    passed = {
        name: score.control is not None and score.value.low > max(CHANCE, score.control)
        for name, score in scores.items()
    }
    return passed.get("detection", False) and passed.get("near misses", True)


def _groups(count: int, seed: tuple[int, ...]) -> list[list[int]]:
    """Return numbers below ``count`` in random order, in groups of ``GROUP``."""
    order = np.random.default_rng(seed).permutation(count).tolist()
    return [order[start : start + GROUP] for start in range(0, count, GROUP)]


def _read_groups(groups: Sequence[Sequence[int]], replies: Sequence[str | None]) -> tuple[dict[int, bool], int]:
    """Return the yes or no about each item, and the number of replies that were not parsed."""
    read = [questions.read_judgements(reply, len(group)) for group, reply in zip(groups, replies, strict=True)]
    called = {i: value for group, values in zip(groups, read, strict=True) for i, value in zip(group, values or ())}
    return called, read.count(None)


def _mark_silent(context: FeatureContext, count: int, rng: np.random.Generator) -> list[bool]:
    """Return marks on ``count`` of a context's tokens on which the feature is silent, or on all of these."""
    silent = [place for place, act in enumerate(context["acts"]) if not act]
    return np.isin(np.arange(len(context["tokens"])), rng.permutation(silent)[:count]).tolist()


def _mark_as(context: FeatureContext, other: FeatureContext) -> list[bool]:
    """Return marks on another context as far from its peak as a context's active tokens are from its own; one at least.

    The peak is marked if there are no such places, as near the beginning of a document.
    """
    shift = other["peak"] - context["peak"]
    marked = [place + shift for place, is_active in enumerate(active_tokens(context)) if is_active]
    places = np.arange(len(other["tokens"]))
    is_marked = np.isin(places, marked)
    return (is_marked if is_marked.any() else places == other["peak"]).tolist()


def _pooled_correlation(pairs: Sequence[np.ndarray], seed: int) -> Interval | None:
    """Return Pearson's correlation of true and predicted activations over all tokens, bootstrapped over contexts.

    Args:
      pairs: of each context the true and the predicted activations, [2, T].
      seed: of the resamples.

    Returns:
      None where either does not vary.
    """
    # By the range: rounding gives constant numbers a spread above 0.
    if not pairs or not np.ptp(np.concatenate(pairs, axis=1), axis=1).all():
        return None
    # Sums of each context: a resample weights them.
    sums_Nx6 = np.array([[x.size, x.sum(), y.sum(), x @ x, y @ y, x @ y] for x, y in pairs])

    def correlate(weight_RxN: np.ndarray) -> np.ndarray:
        n, x, y, xx, yy, xy = (weight_RxN @ sums_Nx6).T
        spread = (n * xx - x**2) * (n * yy - y**2)
        return np.where(spread > 0, (n * xy - x * y) / np.sqrt(np.where(spread > 0, spread, 1)), np.nan)

    resampled = correlate(resampling_weights(np.zeros(len(pairs)), _RESAMPLES, seed))
    mean = float(correlate(np.ones((1, len(pairs))))[0])
    return Interval(mean, *percentile_interval(np.nan_to_num(resampled)))
