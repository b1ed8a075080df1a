"""What scores on a benchmark say of a set of features: drops, controls beside them, and the verdict.

A *drop* is the score of the unedited model minus that with an edit, of accuracy (0 or 1 for each item) or of the
reference's log-likelihood per token, in nats. Intervals are over test items: Wilson's of accuracy, of all else 95 %
bootstrap intervals. The verdict is that of ``claims``, with the log-likelihood in the place of the logit difference.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from saejax.causal.claims import LEVEL, Claim, Rule, SetEffects, claims, randomisation_p
from saejax.causal.statistics import holm
from saejax.causal.study.results import ItemScore, StudyEffect, StudyEffects, StudyJudgement
from saejax.results import Interval
from saejax.settings import StudyConfig
from saejax.tasks.scoring import bootstrap_mean, wilson

REPLACEMENTS = ("zero", "random")
CLEAN = "clean"
Scored = Sequence[ItemScore]
ScoreInterval = Callable[[np.ndarray], Interval]


def top_condition(replacement: str) -> str:
    """The name of the condition in which the top features are replaced."""
    return f"top/{replacement}"


def control_condition(draw: int, replacement: str) -> str:
    """The same ``replacement``, of a draw of control features, counted from 0."""
    return f"control-{draw}/{replacement}"


def conditions(draws: int) -> list[str]:
    """All conditions, in the order in which they are measured."""
    tops = [top_condition(replacement) for replacement in REPLACEMENTS]
    controls = [control_condition(draw, replacement) for draw in range(draws) for replacement in REPLACEMENTS]
    return [CLEAN, *tops, *controls]


def rule(config: StudyConfig) -> str:
    """The rule of the verdict, in words."""
    least = claim_rule(config).least_draws
    return (
        f"Yes if replacing the top {config.top} features lowers accuracy on the test items by more than "
        f"{100 * config.min_drop:g} percentage points; if so few of {config.draws} sets of as many matched random "
        "features cost as much accuracy, and as much log-likelihood of the reference answer, that both p-values are at "
        f"most {LEVEL:g} after Holm's correction over the benchmarks of the run, for each replacement by itself; and "
        "if the 95 % bootstrap interval of the drop in log-likelihood minus the mean drop of those sets, paired by "
        f"item, lies above zero. Otherwise no. A yes takes at least {least(1)} draws with one benchmark, {least(2)} "
        f"with two, {least(3)} with three."
    )


def claim_rule(config: StudyConfig) -> Rule:
    """The numbers of the rule."""
    return Rule(min_accuracy_drop=config.min_drop, resamples=config.bootstrap, seed=config.seed)


def accuracies(rows: Scored) -> np.ndarray:
    """1.0 for each item whose answer is right, else 0.0."""
    return np.array([row.correct for row in rows], np.float64)


def nats_per_token(rows: Scored) -> np.ndarray:
    """Log-likelihood per token of each item's reference."""
    return np.array([row.log_likelihood / row.tokens for row in rows], np.float64)


def at_chance(clean: Scored, chance: float) -> bool:
    """Whether the unedited model is no better than chance.

    Args:
      clean: its rows, judged.
      chance: the accuracy of guessing. Where it is 0, a single right answer is better.
    """
    accuracy = wilson(accuracies(clean))
    return accuracy.low <= chance if chance else accuracy.mean == 0


def are_judged(rows: Scored) -> bool:
    """Whether all have an answer that is right or wrong."""
    return all(row.correct is not None for row in rows)


def judge(
    rows: Mapping[str, Scored], chance: float, config: StudyConfig, disjoint: int | None = None
) -> StudyJudgement:
    """The figures of a benchmark, and the claims for each replacement.

    Args:
      rows: of every condition, the same items in the same order. Accuracy is judged where the answers are.
      chance: the accuracy of guessing.
      disjoint: sets without a feature in common that the draws are drawn from; None: not counted.
    """
    judged = {name: accuracies(own) for name, own in rows.items() if are_judged(own)}
    accuracy = _effects(judged, config, wilson) if judged else None
    nats = {name: nats_per_token(own) for name, own in rows.items()}
    claimed = {replacement: _claim(judged, nats, replacement, config, disjoint) for replacement in REPLACEMENTS}
    return StudyJudgement(
        at_chance=at_chance(rows[CLEAN], chance) if judged else None,
        accuracy=accuracy,
        log_likelihood_per_token=_effects(nats, config, lambda values_N: _interval(values_N, config)),
        claims=claimed,
        reason=_reason(accuracy, claimed, rows[CLEAN], chance, config),
    )


def settled(claimed: Mapping[str, Mapping[str, Claim | None]]) -> dict[str, dict[str, tuple[bool, float]]]:
    """Of each benchmark and replacement the verdict of the run, and p after Holm's correction over its benchmarks.

    Args:
      claimed: benchmark -> its ``claims``, each as if it were alone.
    """
    found: dict[str, dict[str, tuple[bool, float]]] = {name: {} for name in claimed}
    for replacement in REPLACEMENTS:
        made = {name: claim for name, own in claimed.items() if (claim := own[replacement])}
        adjusted = holm(np.array([claim.p_holm for claim in made.values()]))
        for (name, claim), p in zip(made.items(), adjusted.tolist(), strict=True):
            found[name][replacement] = claim.yes and p <= LEVEL, p
    return found


def effect(
    clean_N: np.ndarray, edited_N: np.ndarray, controls_DxN: np.ndarray, config: StudyConfig, score: ScoreInterval
) -> StudyEffect:
    """What an edit of the top features does, beside the controls.

    Args:
      clean_N, edited_N, controls_DxN: the score of each item without an edit, with it, and with those of the draws.
      score: gives the interval of the score itself.
    """
    drop_N, control_drop_DxN = clean_N - edited_N, clean_N[None, :] - controls_DxN
    control_drop_D = control_drop_DxN.mean(axis=1)
    return StudyEffect(
        after=score(edited_N),
        drop=_interval(drop_N, config),
        controls=tuple(control_drop_D.tolist()),
        control_drop=float(control_drop_D.mean()),
        p_value=float(randomisation_p(np.concatenate([[drop_N.mean()], control_drop_D]))[0]),
        difference=_interval(drop_N - control_drop_DxN.mean(axis=0), config),
    )


def _effects(scores: Mapping[str, np.ndarray], config: StudyConfig, score: ScoreInterval) -> StudyEffects:
    found: dict[str, StudyEffect | None] = dict.fromkeys(REPLACEMENTS)
    for replacement in REPLACEMENTS:
        if top_condition(replacement) in scores:
            top_N, controls_DxN = _replaced(scores, replacement, config)
            found[replacement] = effect(scores[CLEAN], top_N, controls_DxN, config, score)
    return StudyEffects(before=score(scores[CLEAN]), **found)


def _replaced(scores: Mapping[str, np.ndarray], replacement: str, config: StudyConfig) -> tuple[np.ndarray, np.ndarray]:
    """Scores with the top features replaced [N], and with each draw of controls [D, N]."""
    controls = [scores[control_condition(draw, replacement)] for draw in range(config.draws)]
    return scores[top_condition(replacement)], np.stack(controls)


def _claim(
    judged: Mapping[str, np.ndarray],
    nats: Mapping[str, np.ndarray],
    replacement: str,
    config: StudyConfig,
    disjoint: int | None,
) -> Claim | None:
    if top_condition(replacement) not in judged:
        return None
    (top_N, draws_DxN), (right_N, rights_DxN) = (_replaced(scores, replacement, config) for scores in (nats, judged))
    effects = SetEffects(
        drop_P=nats[CLEAN] - top_N,
        lost_P=judged[CLEAN] - right_N,
        draw_drop_NxP=nats[CLEAN] - draws_DxN,
        draw_lost_NxP=judged[CLEAN] - rights_DxN,
        template_P=np.zeros(len(top_N), np.int64),  # items are written one by one
        disjoint=disjoint,
    )
    return claims({replacement: effects}, claim_rule(config))[replacement]


def chance_reason(clean: Scored, chance: float) -> str:
    """Why an unedited model is said to be at chance."""
    accuracy, n = wilson(accuracies(clean)), len(clean)
    if not chance:
        return f"At chance before any edit: none of {n} test items is answered rightly."
    return (
        f"At chance before any edit: accuracy on {n} test items is {100 * accuracy.mean:.1f} % "
        f"[{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}], which does not lie above guessing, "
        f"{100 * chance:.1f} %."
    )


def _reason(
    accuracy: StudyEffects | None,
    claimed: Mapping[str, Claim | None],
    clean: Scored,
    chance: float,
    config: StudyConfig,
) -> str:
    if accuracy is None:
        return "No verdict: accuracy was not measured (--task.score=likelihood)."
    parts = [chance_reason(clean, chance)] if at_chance(clean, chance) else []
    words = dict(zero="set to zero", random="replaced at random")
    for replacement, one in accuracy.replaced.items():
        claim = claimed[replacement]
        if one is None or claim is None:
            return " ".join([*parts[:1], "No verdict: only log-likelihoods were compared."])
        drop = one.drop.mean
        parts.append(
            f"{'Yes' if claim.yes else 'No'}: with the top features {words[replacement]}, accuracy falls by "
            f"{100 * drop:.1f} points ({'more' if drop > config.min_drop else 'not more'} than "
            f"{100 * config.min_drop:g}); matched random sets cost as much with p = {claim.p_accuracy:.2g} in accuracy "
            f"and {claim.p_logit_diff:.2g} in log-likelihood, which falls beyond them by [{claim.low:.3f}, "
            f"{claim.high:.3f}] nats per token. Put in their place, {100 * claim.placebo_rate:.0f} % of the sets get a "
            f"yes ({100 * claim.placebo_low:.0f} to {100 * claim.placebo_high:.0f} %)."
        )
    least = claim_rule(config).least_draws(1)
    if config.draws < least:
        parts.append(f"{config.draws} draws are too few for a yes, whatever the effect: at least {least} are needed.")
    return " ".join(parts)


def _interval(values_N: np.ndarray, config: StudyConfig) -> Interval:
    return bootstrap_mean(values_N, config.bootstrap, config.seed)
