"""Criteria of a study's success, and the gate of a row on a benchmark: rules that are written down before any row runs.

The gate asks about log-likelihoods, which every model has, however weak. Beside its answer stands how many placebo sets
also do more than random sets.
"""

import math
from collections.abc import Sequence

from scipy.stats import norm

from saejax.interventions.answers import AblateResults, BehaviourVerdict, CausalAnswer
from saejax.page.findings import Findings
from saejax.page.tables import number, percent
from saejax.results import Interval
from saejax.studies import alignment
from saejax.studies.results import CriterionFigures, Gated, GateFigures, StudyFigures

LEVEL = 0.05  # of the gate, for each row and benchmark
SMALLEST = 0.05  # share of the reference answers' log-likelihood: the smallest effect that the gate cares for
POWER, SEEDS = 0.8, 3  # of finding it; dictionaries, the tested one included
FAITHFUL = 0.8  # cross-entropy that a dictionary recovers
EPOCH = 4  # with whose loss the last one is compared, as the reasoning study did
GATE = (
    "A row on a benchmark gets one of four answers, the first that holds. Cannot tell: the question whether ablation "
    "does more than random sets (2) or is specific to the answers (3) is not testable, or ablation has no effect (1) "
    f"but one of {100 * SMALLEST:g} % of the log-likelihood would have been found in fewer than {100 * POWER:g} % of "
    "cases. No signal: question 1 or 2 is answered no. Interpretable: question 3 is answered yes, and all three are "
    f"answered yes in at least two of three of at least {SEEDS} dictionaries that differ in their seed; with fewer "
    "dictionaries, cannot tell. Unstable: everything else."
)
CRITERIA = (
    f"A study succeeds as far as these hold: every unit is done; every dictionary's loss is lower in the last epoch "
    f"than in epoch {EPOCH}; every dictionary recovers at least {FAITHFUL:g} of the cross-entropy; every row has a "
    "benchmark on which accuracy falls by more than the criterion for both replacements; every row has a benchmark on "
    "which the top features do more than random sets at equal dose and more than placebo sets (questions 2 and 3); "
    f"at least half of the features that fire have an effect of their own (family-wise p at most {LEVEL:g}); every "
    "comparison of two rows that can be made is aligned; every two dictionaries that were compared share more features "
    "than by chance (95 % intervals apart); and of the steps that were followed through the layers at least half are "
    "hurt by ablating their features."
)
RULES = dict(gate=GATE, alignment=alignment.RULE, criteria=CRITERIA)
# What the reasoning study reports of its own four models.
_TRAINED = "4 dictionaries, 20 epochs each, trained in 372 s in all; linear, so that almost every feature is on"
_CAUSAL = "the same criterion, a drop of more than 5 points; its causal stage was not finished, and had no control"
_LATENTS = "100 % of the latents change the output; without a control"
_TRANSFER = "planned for its 98 layers"


def gate(row: str, benchmark: str, answers: Sequence[BehaviourVerdict], items: int, clean: float) -> GateFigures:
    """Return the gate's answer for a row on a benchmark, a function of the verdict's answers alone.

    Args:
      row: its name.
      benchmark: its name.
      answers: those of the tested dictionary, then those of dictionaries of other seeds.
      items: of the benchmark that judged.
      clean: log-likelihood of the reference answers without an edit, mean over these, nats.
    """
    tested = answers[0]
    holds = [[_effect(each).answer, each.random.answer, each.placebo.answer] for each in answers]
    agreeing = sum(three == ["yes"] * 3 for three in holds)
    needed = items_needed(_effect(tested).effect, items, SMALLEST * abs(clean))
    untestable = [each for each in (tested.random, tested.placebo) if each.answer not in ("yes", "no")]
    answer: Gated = "unstable"
    reason = f"All three questions are answered yes in {agreeing} of {len(answers)} dictionaries."
    if untestable or _effect(tested).effect is None:
        answer, reason = "cannot tell", (untestable or [_effect(tested)])[0].sentence
    elif holds[0][0] == "no" and needed is not None and needed > items:
        answer = "cannot tell"
        reason = f"{_effect(tested).sentence} With {items} items the power is short: about {needed:,} are needed."
    elif holds[0][0] != "yes" or holds[0][1] != "yes":
        answer = "no signal"
        reason = (_effect(tested) if holds[0][0] != "yes" else tested.random).sentence
    elif holds[0][2] != "yes":
        reason = tested.placebo.sentence
    elif len(answers) < SEEDS:
        answer = "cannot tell"
        reason = f"The answers hold, but {len(answers)} of {SEEDS} dictionaries of different seeds were tested."
    elif 3 * agreeing >= 2 * len(answers):
        answer = "interpretable"
    fooled = tested.fooled / tested.placebo_sets if tested.fooled is not None else None
    return GateFigures(row, benchmark, answer, reason, len(answers), agreeing, needed, fooled)


def items_needed(effect: Interval | None, items: int, smallest: float) -> int | None:
    """Return how many items would find an effect in ``POWER`` of cases, by the width of a measured interval.

    Args:
      effect: a mean and its 95 % interval over ``items``.
      items: how many there are.
      smallest: the effect to find; the unit of ``effect``.
    """
    if effect is None or smallest <= 0:
        return None
    sigmas = 1 + norm.ppf(POWER) / norm.ppf(0.975)  # the effect in half-widths of the interval
    return math.ceil(items * (sigmas * (effect.high - effect.low) / 2 / smallest) ** 2)


def _effect(answers: BehaviourVerdict) -> CausalAnswer:
    """Return the first answer to question 1: of the log-likelihood, or the logit difference."""
    return next(iter(answers.ablation.values()))


def criteria(figures: StudyFigures, rows: Sequence[Findings]) -> list[CriterionFigures]:
    """Return every criterion, met or not, with its evidence.

    Args:
      figures: all figures but the criteria.
      rows: the findings of each row.
    """
    units, done = sum(model.units for model in figures.models), sum(model.done for model in figures.models)
    finished = CriterionFigures("Every unit is done", done == units, f"{done} of {units}", "4 models of 6 planned")
    return [
        finished,
        *_dictionaries(figures),
        *_causal(figures),
        _single_feature_effects(rows),
        _aligned(figures),
        *_later(figures),
    ]


def _dictionaries(figures: StudyFigures) -> list[CriterionFigures]:
    falls = [scores.improvement for scores in figures.dictionaries if scores.improvement is not None]
    seconds = sum(
        {(scores.row, scores.dictionary.split("/")[0]): scores.seconds for scores in figures.dictionaries}.values()
    )
    fell = f"{sum(fall > 0 for fall in falls)} of {len(falls)} dictionaries"
    if falls:
        fell += f"; improvement {percent(min(falls), 1)} to {percent(max(falls), 1)}; trained in {number(seconds, 0)} s"
    recovered = [scores.ce_recovered for scores in figures.dictionaries if scores.ce_recovered is not None]
    kept = f"{sum(share >= FAITHFUL for share in recovered)} of {len(recovered)} dictionaries"
    if recovered:
        kept += f"; {number(min(recovered), 3)} to {number(max(recovered), 3)}"
    return [
        CriterionFigures(
            f"Loss is lower in the last epoch than in epoch {EPOCH}", _all(fall > 0 for fall in falls), fell, _TRAINED
        ),
        CriterionFigures(
            f"Dictionaries recover {FAITHFUL:g} of the cross-entropy", _all(x >= FAITHFUL for x in recovered), kept, ""
        ),
    ]


def _causal(figures: StudyFigures) -> list[CriterionFigures]:
    measured = [effect for effect in figures.effects if effect.accuracy_drop is not None]
    falls = {
        row: any(effect.effect == effect.effect_resampled == "yes" for effect in measured if effect.row == row)
        for row in dict.fromkeys(effect.row for effect in measured)
    }
    chance = sorted((effect.row, effect.benchmark) for effect in figures.effects if effect.at_chance)
    evidence = f"{sum(falls.values())} of {len(falls)} rows whose accuracy was measured"
    if chance:
        evidence += "; at chance before any edit: " + ", ".join(f"{row} on {name}" for row, name in chance)
    tested = [effect for effect in figures.effects if {effect.random, effect.placebo} <= {"yes", "no"}]
    specific = {
        row: any(effect.random == effect.placebo == "yes" for effect in tested if effect.row == row)
        for row in dict.fromkeys(effect.row for effect in tested)
    }
    return [
        CriterionFigures(
            "Accuracy falls for both replacements on a benchmark of every row", _all(falls.values()), evidence, _CAUSAL
        ),
        CriterionFigures(
            "Top features do more than random and placebo sets on a benchmark of every row",
            _all(specific.values()),
            f"{sum(specific.values())} of {len(specific)} rows with enough control sets",
            "no control",
        ),
    ]


def _single_feature_effects(rows: Sequence[Findings]) -> CriterionFigures:
    summaries = [
        summary
        for row in rows
        for results in row.each(AblateResults).values()
        for summary in (results.importance or {}).values()
    ]
    shares = [summary.significant / summary.features for summary in summaries if summary.features]
    evidence = "no stage measured single features (--ablate.effects=all)"
    if shares:
        evidence = f"{percent(min(shares), 1)} to {percent(max(shares), 1)} of the features that fire on a behaviour"
    name = "Half of the features that fire have an effect of their own"
    return CriterionFigures(name, _all(share >= 0.5 for share in shares), evidence, _LATENTS)


def _aligned(figures: StudyFigures) -> CriterionFigures:
    answers = [comparison.aligned for comparison in figures.alignment if comparison.aligned is not None]
    evidence = f"{sum(answers)} of {len(answers)} comparisons"
    return CriterionFigures("Rows agree on what matters", _all(answers), evidence, "")


def _later(figures: StudyFigures) -> list[CriterionFigures]:
    above = [pair.shared.low > pair.shared_null.high for pair in figures.transfer]
    compared = f"{sum(above)} of {len(above)} comparisons"
    if above:
        shared = [pair.shared.mean for pair in figures.transfer]
        null = [pair.shared_null.mean for pair in figures.transfer]
        compared += f"; shared {percent(min(shared), 1)} to {percent(max(shared), 1)}"
        compared += f", by chance at most {percent(max(null), 1)}"
    tests, hurt = (sum(getattr(text, name) for text in figures.tracking if text.tests) for name in ("tests", "hurt"))
    followed, more = "no step of the texts has enough random sets", None
    if tests:
        more = hurt / tests >= 0.5
        followed = f"{hurt} of {tests} steps with enough random sets are hurt"
    return [
        CriterionFigures("Dictionaries transfer", _all(above), compared if above else "not run", _TRANSFER),
        CriterionFigures(
            "Features are tracked through layers", more, followed if figures.tracking else "not run", _TRANSFER
        ),
    ]


def _all(answers) -> bool | None:
    """Return whether all answers are yes; None if there is no answer."""
    answers = list(answers)
    return all(answers) if answers else None
