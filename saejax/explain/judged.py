"""The labels of a dictionary's features, judged: every score, beside those of other features' labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from saejax.explain import questions, scores
from saejax.explain.answers import Answers
from saejax.explain.contexts import HeldOut
from saejax.explain.results import FeatureScore, LabelScores
from saejax.stages.explain import ExplainConfig
from saejax.tasks.scoring import bootstrap_mean

_RESAMPLES = 2000
Labels = Sequence[str | None]  # of each feature


def judged(
    answers: Answers, config: ExplainConfig, chosen: Sequence[HeldOut], own: Labels, control: Labels
) -> tuple[dict[str, list[Any]], dict[str, LabelScores]]:
    """Judges labels.

    Args:
      answers: of the model.
      config: says which scores.
      chosen: the contexts of each feature.
      own, control: the label of each, and of another feature; None where there is none.

    Returns:
      Columns of ``ExplainedFeature``, a value for each feature; and each score of all features.
    """
    columns: dict[str, list[Any]] = {}
    unread = dict.fromkeys(("detection", *config.scores), 0.0)
    for name in (*unread,):
        columns[name], unread[name] = _asked(answers, name, config.seed, chosen, own)
        if name != "intruder":
            columns[f"{name}_control"], _ = _asked(answers, name, config.seed, chosen, control)
    if config.embedding_model:
        columns |= _embedded(answers, config.embedding_model, chosen, own, control)
        unread["embedding"] = 0.0
    summaries = {
        name: _summary(columns[name], columns.get(f"{name}_control"), share, config.seed)
        for name, share in unread.items()
    }
    return columns, summaries


def _asked(
    answers: Answers, name: str, seed: int, chosen: Sequence[HeldOut], labels: Labels
) -> tuple[list[Any], float]:
    """A score of each feature with the label given, None where there is none; and the share of unread answers."""
    ask, score, _ = scores.SCORES[name]
    shown = name == "intruder"  # which is asked without a label, too
    asked = [ask(held, label, seed) if label or shown else None for held, label in zip(chosen, labels, strict=True)]
    told = iter(answers.all([question for one in asked if one for question in one.questions], name))
    found, unread, count = [], 0, 0
    for one in asked:
        read = [one.read(next(told), right) for right in one.right] if one else []
        found.append(score(one.right, read) if one else None)
        unread, count = unread + read.count(None), count + len(read)
    return found, unread / max(count, 1)


def _embedded(
    answers: Answers, model: str, chosen: Sequence[HeldOut], own: Labels, control: Labels
) -> dict[str, list[Any]]:
    """The embedding score of each feature's label, and of the other feature's; both are embedded with its contexts."""
    columns: dict[str, list[Any]] = dict(embedding=[], embedding_control=[])
    pairs = list(zip(own, control, strict=True))
    asked = [
        questions.compare(model, list(filter(None, pair)), [*held.active, *held.silent])
        for held, pair in zip(chosen, pairs, strict=True)
    ]
    told = iter(answers.all([one for one in asked if one.labels], "embeddings"))
    for held, one, pair in zip(chosen, asked, pairs, strict=True):
        cosines = iter(questions.read_cosines(next(told)) if one.labels else ())
        for column, label in zip(columns.values(), pair, strict=True):
            column.append(scores.embedding_score(held.right, next(cosines)) if label else None)
    return columns


def _summary(own: Sequence[Any], control: Sequence[Any] | None, unread: float, seed: int) -> LabelScores:
    """A score of all features; ``control``: with other labels, None for intruders."""
    values, other = _values(own), _values(control or ())
    mean = bootstrap_mean(values, _RESAMPLES, seed) if len(values) else None
    if control is None:
        by_chance: float | None = scores.SCORES["intruder"][2]
    else:
        by_chance = float(other.mean()) if len(other) else None
    return LabelScores(mean, by_chance, len(values), unread)


def _values(column: Sequence[FeatureScore | float | None]) -> np.ndarray:
    return np.array([one.accuracy if isinstance(one, FeatureScore) else one for one in column if one is not None])
