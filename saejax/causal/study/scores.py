"""What scores on a benchmark say of a set of features: drops, controls beside them, and the verdict.

A *drop* is the score of the unedited model minus that with an edit, of accuracy (0 or 1 for each item) or of the
reference's log-likelihood per token, in nats. Intervals are 95 % bootstrap intervals over test items.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from saejax.causal.study.results import ItemScore, StudyEffect, StudyEffects, StudyJudgement
from saejax.results import Interval
from saejax.settings import StudyConfig
from saejax.tasks.scoring import bootstrap_mean

REPLACEMENTS = ("zero", "random")
CLEAN = "clean"
Scored = Sequence[ItemScore]


def top_condition(replacement: str) -> str:
    """The name of the condition in which the top features are replaced."""
    return f"top/{replacement}"


def control_condition(draw: int, replacement: str) -> str:
    """The same, of a draw of control features, counted from 0."""
    return f"control-{draw}/{replacement}"


def conditions(draws: int) -> list[str]:
    """All conditions, in the order in which they are measured."""
    tops = [top_condition(replacement) for replacement in REPLACEMENTS]
    controls = [control_condition(draw, replacement) for draw in range(draws) for replacement in REPLACEMENTS]
    return [CLEAN, *tops, *controls]


def rule(config: StudyConfig) -> str:
    """The rule of the verdict, in words."""
    return (
        f"Yes if replacing the top {config.top} features lowers accuracy on the test items by more than "
        f"{100 * config.min_drop:g} percentage points, and the 95 % bootstrap interval of this drop minus the mean "
        f"drop of {config.draws} sets of as many matched random features, paired by item, lies above zero. "
        "Otherwise no."
    )


def accuracies(rows: Scored) -> np.ndarray:
    """1.0 for each item whose answer is right, else 0.0."""
    return np.array([row.correct for row in rows], np.float64)


def nats_per_token(rows: Scored) -> np.ndarray:
    """Log-likelihood per token of each item's reference."""
    return np.array([row.log_likelihood / row.tokens for row in rows], np.float64)


def at_chance(clean: Scored, chance: float, config: StudyConfig) -> bool:
    """Whether the unedited model is no better than chance.

    Args:
      clean: its rows, judged.
      chance: the accuracy of guessing. Where it is 0, a single right answer is better.
    """
    accuracy = _interval(accuracies(clean), config)
    return accuracy.low <= chance if chance else accuracy.mean == 0


def are_judged(rows: Scored) -> bool:
    """Whether all have an answer that is right or wrong."""
    return all(row.correct is not None for row in rows)


def judge(rows: Mapping[str, Scored], chance: float, config: StudyConfig) -> StudyJudgement:
    """The figures of a benchmark, and the verdict for each replacement.

    Args:
      rows: of every condition, the same items in the same order. Accuracy is judged where the answers are.
      chance: the accuracy of guessing.
      config: of the stage.
    """
    judged = {name: accuracies(own) for name, own in rows.items() if are_judged(own)}
    accuracy = _effects(judged, config) if judged else None
    nats = {name: nats_per_token(own) for name, own in rows.items()}
    return StudyJudgement(
        at_chance=at_chance(rows[CLEAN], chance, config) if judged else None,
        accuracy=accuracy,
        log_likelihood_per_token=_effects(nats, config),
        verdicts=_verdicts(accuracy, config),
        reason=_reason(accuracy, rows[CLEAN], chance, config),
    )


def effect(clean_N: np.ndarray, edited_N: np.ndarray, controls_DxN: np.ndarray, config: StudyConfig) -> StudyEffect:
    """What an edit of the top features does, beside the controls."""
    drop_N, control_drop_DxN = clean_N - edited_N, clean_N[None, :] - controls_DxN
    control_drop_D = control_drop_DxN.mean(axis=1)
    return StudyEffect(
        after=_interval(edited_N, config),
        drop=_interval(drop_N, config),
        controls=tuple(control_drop_D.tolist()),
        control_drop=float(control_drop_D.mean()),
        percentile=float((control_drop_D < drop_N.mean()).mean()),
        difference=_interval(drop_N - control_drop_DxN.mean(axis=0), config),
    )


def _effects(scores: Mapping[str, np.ndarray], config: StudyConfig) -> StudyEffects:
    found: dict[str, StudyEffect | None] = dict.fromkeys(REPLACEMENTS)
    for replacement in REPLACEMENTS:
        if top_condition(replacement) in scores:
            controls_DxN = np.stack([scores[control_condition(draw, replacement)] for draw in range(config.draws)])
            found[replacement] = effect(scores[CLEAN], scores[top_condition(replacement)], controls_DxN, config)
    return StudyEffects(before=_interval(scores[CLEAN], config), **found)


def _verdicts(accuracy: StudyEffects | None, config: StudyConfig) -> dict[str, bool | None]:
    found = accuracy.replaced if accuracy else dict.fromkeys(REPLACEMENTS)
    return {
        replacement: one.drop.mean > config.min_drop and one.difference.low > 0 if one else None
        for replacement, one in found.items()
    }


def chance_reason(clean: Scored, chance: float, config: StudyConfig) -> str:
    """Why an unedited model is said to be at chance."""
    accuracy, n = _interval(accuracies(clean), config), len(clean)
    if not chance:
        return f"At chance before any edit: none of {n} test items is answered rightly."
    return (
        f"At chance before any edit: accuracy on {n} test items is {100 * accuracy.mean:.1f} % "
        f"[{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}], which does not lie above guessing, "
        f"{100 * chance:.1f} %."
    )


def _reason(accuracy: StudyEffects | None, clean: Scored, chance: float, config: StudyConfig) -> str:
    if accuracy is None:
        return "No verdict: accuracy was not measured (--task.score=likelihood)."
    parts = [chance_reason(clean, chance, config)] if at_chance(clean, chance, config) else []
    words = dict(zero="set to zero", random="replaced at random")
    for replacement, one in accuracy.replaced.items():
        if one is None:
            return " ".join([*parts[:1], "No verdict: only log-likelihoods were compared."])
        drop, beyond = one.drop.mean, one.difference
        yes = _verdicts(accuracy, config)[replacement]
        parts.append(
            f"{'Yes' if yes else 'No'}: with the top features {words[replacement]}, accuracy falls by {100 * drop:.1f} "
            f"points ({'more' if drop > config.min_drop else 'not more'} than {100 * config.min_drop:g}), beyond "
            f"matched random features by {100 * beyond.mean:.1f} [{100 * beyond.low:.1f}, "
            f"{100 * beyond.high:.1f}] ({'above' if beyond.low > 0 else 'not clearly above'} zero)."
        )
    return " ".join(parts)


def _interval(values_N: np.ndarray, config: StudyConfig) -> Interval:
    return bootstrap_mean(values_N, config.bootstrap, config.seed)
