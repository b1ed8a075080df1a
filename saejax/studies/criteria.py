"""When a study has succeeded, and what a row is on a benchmark: rules that are written down before any row has run.

The gate asks about log-likelihoods, which every model has, however weak. Its p-values are those of ``claims``: of the
draws of matched random features and the top ones, every one would be as likely to cost most if the top ones were no
others, so that of rows where nothing is true at most 5 % are called interpretable. As the same rule can be applied to
every draw, it stands beside the answer how often that gives it, too.
"""

from collections.abc import Sequence

import numpy as np

from saejax.causal.claims import LEAST_SETS, randomisation_p
from saejax.causal.study.results import StudyEffects
from saejax.interventions.answers import AblateResults
from saejax.page.findings import Findings
from saejax.page.tables import number, percent
from saejax.studies import alignment
from saejax.studies.results import CriterionFigures, Gated, GateFigures, StudyFigures
from saejax.tasks.scoring import wilson_of

LEVEL = 0.05  # of the gate, for each row and benchmark
FAITHFUL = 0.8  # cross-entropy that a dictionary recovers
EPOCH = 4  # with whose loss the last one is compared, as the reasoning study did
GATE = (
    f"A row is interpretable on a benchmark if removing its dictionary's top features costs more log-likelihood of the "
    f"reference answers than matched random ones (of which there are at least {LEAST_SETS} sets without a feature in "
    f"common) with p at most {LEVEL:g}, both where they are set to zero and where they are replaced at random, and the "
    f"dictionary recovers at least {FAITHFUL:g} of the cross-entropy; unstable if only one of the replacements does, "
    "or the dictionary recovers less; else there is no signal."
)
CRITERIA = (
    f"A study succeeds as far as these hold: every unit is done; every dictionary's loss is lower in the last epoch "
    f"than in epoch {EPOCH}; every dictionary recovers at least {FAITHFUL:g} of the cross-entropy; every row has a "
    "benchmark on which the rule of the causal test says yes for both replacements; matched random sets pass that rule "
    f"in at most {100 * LEVEL:g} % of the draws; at least half of the features that fire have an effect of their own "
    f"(family-wise p at most {LEVEL:g}); every comparison of two rows that can be made is aligned; every two "
    "dictionaries that were compared share more features than by chance (95 % intervals apart); and of the steps that "
    "were followed through the layers a larger share is hurt by removing their features than of matched sets passes "
    "that rule (which lies below the 95 % interval)."
)
RULES = dict(gate=GATE, alignment=alignment.RULE, criteria=CRITERIA)
# What the reasoning study reports of its own four models.
_TRAINED = "4 dictionaries, 20 epochs each, trained in 372 s in all; linear, so that almost every feature is on"
_CAUSAL = "the same criterion, a drop of more than 5 points; its causal stage was not finished, and had no control"
_LATENTS = "100 % of the latents change the output; without a control"
_TRANSFER = "planned for its 98 layers"


def gate(
    row: str, benchmark: str, nats: StudyEffects, recovered: float | None, disjoint: int | None = None
) -> GateFigures:
    """Return which of the three states a row is in on a benchmark.

    Args:
      row: its name.
      benchmark: its name.
      nats: effects on the log-likelihood of the reference per token.
      recovered: cross-entropy that the dictionary recovers, against the mean; None if it was not measured.
      disjoint: sets without a feature in common that the draws come from; None: as many as there are draws.
    """
    effects = {name: one for name, one in nats.replaced.items() if one}
    if len(effects) < len(nats.replaced):
        return GateFigures(row, benchmark, "not measured", "effects of a replacement are missing", None)
    if disjoint is not None and disjoint < LEAST_SETS:
        few = f"matched random features make {disjoint} sets without one in common: too few to judge by"
        return GateFigures(row, benchmark, "not measured", few, None)
    drops = [np.array([one.drop.mean, *one.controls]) for one in effects.values()]
    p_RxC = np.array([randomisation_p(drop_C) for drop_C in drops])
    small_RxC = p_RxC <= LEVEL
    words = "; ".join(f"{name}: p = {number(p, 3)}" for name, p in zip(effects, p_RxC[:, 0].tolist(), strict=True))
    faithful = recovered is not None and recovered >= FAITHFUL
    words += f"; cross-entropy recovered {number(recovered, 3)}"
    answer: Gated = "no signal"
    if small_RxC[:, 0].any():
        answer = "interpretable" if small_RxC[:, 0].all() and faithful else "unstable"
    placebo = float(small_RxC[:, 1:].all(axis=0).mean()) if faithful else 0.0
    draws = p_RxC.shape[1] - 1
    if 1 / (1 + draws) > LEVEL:
        words += f"; {draws} draws are too few for any other answer"
    return GateFigures(row, benchmark, answer, words, placebo)


def criteria(figures: StudyFigures, rows: Sequence[Findings]) -> list[CriterionFigures]:
    """Every criterion, met or not, with its evidence.

    Args:
      figures: all figures but the criteria.
      rows: what the rows found.
    """
    units, done = sum(one.units for one in figures.models), sum(one.done for one in figures.models)
    finished = CriterionFigures("Every unit is done", done == units, f"{done} of {units}", "4 models of 6 planned")
    return [
        finished,
        *_dictionaries(figures),
        *_causal(figures),
        _own_effects(rows),
        _aligned(figures),
        *_later(figures),
    ]


def _dictionaries(figures: StudyFigures) -> list[CriterionFigures]:
    falls = [one.improvement for one in figures.dictionaries if one.improvement is not None]
    seconds = sum({(one.row, one.dictionary.split("/")[0]): one.seconds for one in figures.dictionaries}.values())
    fell = f"{sum(fall > 0 for fall in falls)} of {len(falls)} dictionaries"
    if falls:
        fell += f"; improvement {percent(min(falls), 1)} to {percent(max(falls), 1)}; trained in {number(seconds, 0)} s"
    recovered = [one.ce_recovered for one in figures.dictionaries if one.ce_recovered is not None]
    kept = f"{sum(one >= FAITHFUL for one in recovered)} of {len(recovered)} dictionaries"
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
    asked = [one for one in figures.effects if one.verdict is not None]
    rows = dict.fromkeys(one.row for one in asked)
    passed = {
        row: {one.benchmark for one in asked if one.row == row}
        - {one.benchmark for one in asked if one.row == row and not one.verdict}
        for row in rows
    }
    chance = {(one.row, one.benchmark) for one in figures.effects if one.at_chance}
    said = f"{sum(map(bool, passed.values()))} of {len(rows)} rows whose accuracy could be asked for"
    if chance:
        said += "; at chance before any edit: " + ", ".join(f"{row} on {name}" for row, name in sorted(chance))
    rates = [one.placebo_rate for one in figures.effects if one.placebo_rate is not None]
    placebo = f"{percent(min(rates), 1)} to {percent(max(rates), 1)} of the draws" if rates else "no draws were judged"
    return [
        CriterionFigures(
            "Top features cost accuracy beyond matched random ones, on a benchmark of every row",
            _all(map(bool, passed.values())),
            said,
            _CAUSAL,
        ),
        CriterionFigures(
            f"Matched random sets pass in at most {100 * LEVEL:g} %", _all(rate <= LEVEL for rate in rates), placebo, ""
        ),
    ]


def _own_effects(rows: Sequence[Findings]) -> CriterionFigures:
    found = [
        summary
        for row in rows
        for results in row.each(AblateResults).values()
        for summary in (results.importance or {}).values()
    ]
    shares = [summary.significant / summary.features for summary in found if summary.features]
    said = "no stage measured single features (--ablate.effects=all)"
    if shares:
        said = f"{percent(min(shares), 1)} to {percent(max(shares), 1)} of the features that fire on a behaviour"
    name = "Half of the features that fire have an effect of their own"
    return CriterionFigures(name, _all(share >= 0.5 for share in shares), said, _LATENTS)


def _aligned(figures: StudyFigures) -> CriterionFigures:
    asked = [one for one in figures.alignment if one.aligned is not None]
    said = f"{sum(bool(one.aligned) for one in asked)} of {len(asked)} comparisons"
    return CriterionFigures("Rows agree on what matters", _all(bool(one.aligned) for one in asked), said, "")


def _later(figures: StudyFigures) -> list[CriterionFigures]:
    above = [one.shared.low > one.shared_null.high for one in figures.transfer]
    compared = f"{sum(above)} of {len(above)} comparisons"
    if above:
        found, null = (
            [own.mean for own in sides] for sides in zip(*((x.shared, x.shared_null) for x in figures.transfer))
        )
        compared += (
            f"; shared {percent(min(found), 1)} to {percent(max(found), 1)}, by chance at most {percent(max(null), 1)}"
        )
    tested = [one for one in figures.tracking if one.tests]
    tests, hurt = (sum(getattr(one, name) for one in tested) for name in ("tests", "hurt"))
    followed, more = "no step was tested", None
    if tests:
        share = wilson_of(hurt / tests, tests)
        passed = sum((one.placebo_rate or 0.0) * one.tests for one in tested) / tests
        more = share.low > passed
        followed = f"{hurt} of {tests} steps are hurt; matched sets pass in {percent(passed, 1)}"
    return [
        CriterionFigures("Dictionaries transfer", _all(above), compared if above else "not run", _TRANSFER),
        CriterionFigures("Features are tracked through layers", more, followed if tested else "not run", _TRANSFER),
    ]


def _all(answers) -> bool | None:
    """Whether all are yes; None where there is none."""
    answers = list(answers)
    return all(answers) if answers else None
