"""The figures of a study that say what features cause."""

import dataclasses
from collections.abc import Iterator, Mapping

from saejax.interventions.answers import RESAMPLED, AblateResults, CausalAnswer
from saejax.interventions.table import TESTED, UNTRAINED
from saejax.matching.track.results import TrackResults
from saejax.matching.transfer.results import TransferResults
from saejax.page.findings import Findings
from saejax.statistics.ranks import holm_by_key
from saejax.studies import criteria
from saejax.studies.benchmark_results import StudyResults
from saejax.studies.results import (
    BehaviourFigures,
    DomainFigures,
    DriverFigures,
    EffectFigures,
    GateFigures,
    TrackingFigures,
    TransferFigures,
)
from saejax.studies.sheet import fill

_COMPARED = ("matched", "shared")  # of ``MatchScores``


def effects(row: str, findings: Findings) -> Iterator[EffectFigures]:
    """Yield the effects of ablated features on each benchmark."""
    for benchmark, results in findings.each(StudyResults).items():
        result = results.verdict.dictionaries[TESTED][benchmark]
        scores = {score.group: score for score in results.scores}
        answers = result.ablation
        resampled = [answers.get(name + RESAMPLED) for name in ("accuracy", "answer_log_prob")]
        yield EffectFigures(
            row=row,
            benchmark=benchmark,
            dictionary=results.dictionary,
            top=results.k,
            items=results.items.test,
            at_chance=results.at_chance,
            accuracy=scores["clean"].accuracy if scores else None,
            accuracy_drop=answers["accuracy"].effect,
            accuracy_drop_resampled=resampled[0].effect if resampled[0] else None,
            random_accuracy_drop=scores["random"].drop if "random" in scores else None,
            placebo_accuracy_drop=scores["placebo"].drop if "placebo" in scores else None,
            nats_drop=answers["answer_log_prob"].effect,
            nats_drop_resampled=resampled[1].effect if resampled[1] else None,
            random_nats=_mean_of(result.random),
            placebo_nats=_mean_of(result.placebo),
            lowers=answers["answer_log_prob"].answer,
            effect=answers["accuracy"].answer,
            effect_resampled=resampled[0].answer if resampled[0] else "not tested",
            random=result.random.answer,
            fooled=result.fooled / result.placebo_sets if result.fooled is not None else None,
            placebo=result.placebo.answer,
        )


def _mean_of(answer: CausalAnswer) -> float | None:
    """Return the mean effect of control sets; None where there were none."""
    return (answer.numbers or {}).get("mean")


def behaviours(row: str, findings: Findings) -> Iterator[BehaviourFigures]:
    """Yield the answers of the causal verdict for each behaviour."""
    for results in findings.each(AblateResults).values():
        for name, result in results.verdict.dictionaries[TESTED].items():
            yield BehaviourFigures(
                row=row,
                behaviour=name,
                dictionary=results.dictionary,
                drop=result.ablation["logit_diff"].effect,
                top1_drop=result.ablation["top1"].effect,
                random=result.random.answer,
                fooled=result.fooled / result.placebo_sets if result.fooled is not None else None,
                placebo=result.placebo.answer,
                selective=result.selective.answer,
            )


def gates(row: str, findings: Findings) -> Iterator[GateFigures]:
    """Yield the gate of each benchmark: what must hold before its effects are believed."""
    for benchmark, results in findings.each(StudyResults).items():
        judged = results.verdict.dictionaries
        seeds = [judged[TESTED], *(answers for name, answers in judged.items() if name not in (TESTED, UNTRAINED))]
        answers = [each[benchmark] for each in seeds if benchmark in each]
        yield criteria.gate(row, benchmark, answers, results.items.test, results.log_likelihood)


def domains(rows: Mapping[str, Findings]) -> tuple[DomainFigures, ...]:
    """Return what features chosen on one benchmark do on another; p-values corrected over all of them."""
    figures = [
        fill(
            DomainFigures,
            transferred,
            row=row,
            chosen_on=chosen_on,
            benchmark=benchmark,
            chosen_here=results.verdict.dictionaries[TESTED][benchmark].ablation["answer_log_prob"].effect,
            p_holm=None,
        )
        for row, findings in rows.items()
        for benchmark, results in findings.each(StudyResults).items()
        for chosen_on, transferred in (results.domains or {}).items()
    ]
    p_values = {number: each.p_value for number, each in enumerate(figures) if each.p_value is not None}
    corrected = holm_by_key(p_values)
    return tuple(dataclasses.replace(each, p_holm=corrected.get(number)) for number, each in enumerate(figures))


def drivers(row: str, findings: Findings) -> Iterator[DriverFigures]:
    """Yield what drives the features of each benchmark, by group."""
    for benchmark, results in findings.each(StudyResults).items():
        for shares in results.falsification.shares if results.falsification else ():
            yield fill(DriverFigures, shares, row=row, benchmark=benchmark)


def transfer(row: str, findings: Findings) -> Iterator[TransferFigures]:
    """Yield, for each pair of dictionaries and each measure, how much they share, and how much by chance."""
    for results in findings.each(TransferResults).values():
        for pair in results.pairs:
            for measure, both in pair.measures.items():
                matched, shared = ((getattr(scores, name) for scores in (both.scores, both.null)) for name in _COMPARED)
                yield TransferFigures(row, pair.first, pair.second, measure, *matched, *shared)


def tracking(row: str, findings: Findings) -> Iterator[TrackingFigures]:
    """Yield the links of each tracked text between layers, and how many of its steps were hurt."""
    for results in findings.each(TrackResults).values():
        for slug, text in results.texts.items():
            tests = [step.test for step in text.steps if step.test]
            yield fill(
                TrackingFigures,
                text,
                row=row,
                text=slug,
                sites=len(text.sites),
                tests=sum(test.hurt != "not testable" for test in tests),
                measured=len(text.chains),
                holding=sum(chain.holds for chain in text.chains),
                hurt=sum(test.hurt == "yes" for test in tests),
            )
