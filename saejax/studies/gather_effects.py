"""The figures of a study that say what features cause."""

from collections.abc import Iterator

import numpy as np

from saejax.causal.study.results import StudyResults
from saejax.causal.study.scores import settled
from saejax.dictionaries.stacks import kind_and_member
from saejax.evaluation.results import EvaluateResults
from saejax.interventions.answers import AblateResults
from saejax.interventions.table import TESTED
from saejax.matching.track.results import TrackResults
from saejax.matching.transfer.results import TransferResults
from saejax.page.findings import Findings
from saejax.studies import criteria
from saejax.studies.results import (
    BehaviourFigures,
    EffectFigures,
    GateFigures,
    SingleFigures,
    TrackingFigures,
    TransferFigures,
)

_COMPARED = ("matched", "shared")  # of ``MatchScores``


def effects(row: str, found: Findings) -> Iterator[EffectFigures]:
    """Return the effects of ablated features by benchmark and replacement, beside random ones."""
    studies = found.each(StudyResults)
    verdicts = settled({name: results.claims for name, results in studies.items()})
    for benchmark, results in studies.items():
        for replacement, nats in results.log_likelihood_per_token.replaced.items():
            right = results.accuracy.replaced[replacement] if results.accuracy else None
            yes, p = verdicts[benchmark].get(replacement, (None, None))
            claim = results.claims.get(replacement)
            if nats:
                yield EffectFigures(
                    row=row,
                    benchmark=benchmark,
                    replacement=replacement,
                    dictionary=results.dictionary,
                    top=len(results.top),
                    draws=len(nats.controls),
                    items=results.items.test,
                    at_chance=results.at_chance,
                    accuracy_before=results.accuracy.before if results.accuracy else None,
                    accuracy_drop=right.drop if right else None,
                    accuracy_control_drop=right.control_drop if right else None,
                    nats_drop=nats.drop,
                    nats_control_drop=nats.control_drop,
                    nats_p=nats.p_value,
                    verdict=yes,
                    verdict_p=p,
                    placebo_rate=claim.placebo_rate if claim else None,
                )


def single(row: str, found: Findings) -> Iterator[SingleFigures]:
    """Features of each benchmark removed one by one."""
    for benchmark, results in found.each(StudyResults).items():
        if results.single:
            first = results.single.features[0]
            yield SingleFigures(
                row=row,
                benchmark=benchmark,
                dictionary=results.dictionary,
                features=len(results.single.features),
                discoveries=results.single.discoveries,
                control_discoveries=float(np.mean(results.single.control_discoveries)),
                p_value=results.single.p_value,
                strongest=first.feature,
                drop=first.drop,
                q_value=first.q_value,
                control_percentile=first.control_percentile,
            )


def behaviours(row: str, found: Findings) -> Iterator[BehaviourFigures]:
    """Return the answers of the causal verdict for each behaviour."""
    for results in found.each(AblateResults).values():
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


def gates(row: str, found: Findings) -> Iterator[GateFigures]:
    """Of each benchmark, what must hold before its effects are believed."""
    for benchmark, results in found.each(StudyResults).items():
        kind, member = kind_and_member(results.dictionary)
        scores = found.each(EvaluateResults)
        known = {one.name: one.ce_recovered_mean for one in scores[kind].members} if kind in scores else {}
        yield criteria.gate(row, benchmark, results.log_likelihood_per_token, known.get(member), results.disjoint)


def transfer(row: str, found: Findings) -> Iterator[TransferFigures]:
    """Of each pair of dictionaries and measure, how much they share, and how much by chance."""
    for results in found.each(TransferResults).values():
        for pair in results.pairs:
            for measure, both in pair.measures.items():
                matched, shared = ((getattr(own, name) for own in (both.found, both.null)) for name in _COMPARED)
                yield TransferFigures(row, pair.first, pair.second, measure, *matched, *shared)


def tracking(row: str, found: Findings) -> Iterator[TrackingFigures]:
    """Of each tracked text, its links between layers and which of its steps were hurt."""
    for results in found.each(TrackResults).values():
        for slug, text in results.texts.items():
            claims = [test.claim for step in text.steps for test in step.tests.values()]
            yield TrackingFigures(
                row=row,
                text=slug,
                tokens=text.tokens,
                sites=len(text.sites),
                links=text.links,
                tests=len(claims),
                hurt=sum(claim.yes for claim in claims),
                placebo_rate=float(np.mean([claim.placebo_rate for claim in claims])) if claims else None,
            )
