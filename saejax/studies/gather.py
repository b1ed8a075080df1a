"""The figures of a study, read from what the stages of its rows returned."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from saejax.activations.results import CaptureResults
from saejax.dictionaries.names import full_name
from saejax.evaluation.results import EvaluateResults
from saejax.interventions.answers import RESAMPLED, AblateResults, CausalAnswer
from saejax.interventions.settings import StudyConfig
from saejax.interventions.table import TESTED
from saejax.matching.track.results import TrackResults
from saejax.matching.transfer.results import TransferResults
from saejax.models.settings import ModelConfig
from saejax.page.findings import Findings, read_findings
from saejax.preflight.results import PreflightResults
from saejax.stages.study.results import StudyResults
from saejax.statistics.ranks import holm_by_key
from saejax.studies import gather_features
from saejax.studies.alignment import alignments
from saejax.studies.gate import RULES, overall_answer
from saejax.studies.learned import learned
from saejax.studies.results import (
    ActivationFigures,
    BaselineFigures,
    BehaviourFigures,
    DictionaryFigures,
    DomainFigures,
    DriverFigures,
    EffectFigures,
    GateFigures,
    ModelFigures,
    StudyFigures,
    TrackingFigures,
    TransferFigures,
    UnitState,
)
from saejax.studies.rows import StudyRow
from saejax.studies.units import ROWS
from saejax.tasks.results import BaselineResults, BenchmarkResults
from saejax.tasks.settings import TaskConfig
from saejax.training.results import TrainResults
from saejax.training.settings import TrainConfig

T = TypeVar("T")
_MEASURES = {
    "generate": "right answers, whatever their format",
    "choice": "accuracy of the likeliest choice",
    "likelihood": "log-likelihood of the solution, nats per token",
}


def gather(root: Path, rows: Sequence[StudyRow], states: Sequence[UnitState], mark: str) -> StudyFigures:
    """Return all figures of a study.

    Args:
      root: its folder.
      rows: of the study.
      states: of all their units.
      mark: fingerprint of these.

    Raises:
      UserError: a file of a finished unit is missing or damaged.
    """
    findings = {}
    for row in rows:
        done = [state.unit for state in states if state.row == row.name and state.state == "done"]
        findings[row.name] = read_findings({unit: root / ROWS / row.name / unit for unit in done}, root, {})
    # Benchmarks on which any row ablated features.
    benchmarks = dict.fromkeys(name for some in findings.values() for name in some.select(StudyResults))
    read = {name: gather_features.read_benchmarks(findings, name) for name in benchmarks}
    figures = StudyFigures(
        fingerprint=mark,
        rules=tuple(RULES.values()),
        models=tuple(_model(row, findings[row.name], states) for row in rows),
        baselines=_collect(_baselines, findings),
        dictionaries=_collect(_dictionaries, findings),
        activations=_collect(_activations, findings),
        effects=_collect(_effects, findings),
        behaviours=_collect(_behaviours, findings),
        alignment=tuple(alignments(findings, read)),
        gates=_collect(_gates, findings),
        domains=_domains(findings),
        drivers=_collect(_drivers, findings),
        primitives=tuple(
            primitive for name in read for primitive in gather_features.primitives(findings, name, read[name])
        ),
        labels=_collect(gather_features.labels, findings),
        associations=_collect(gather_features.associations, findings),
        problems=tuple(problem for name in read for problem in gather_features.problems(findings, name, read[name])),
        transfer=_collect(transfer, findings),
        tracking=_collect(tracking, findings),
        learned=(),
        failures=tuple(state for state in states if state.state != "done"),
    )
    return dataclasses.replace(figures, learned=learned(figures))


def _collect(read: Callable[[str, Findings], Iterable[T]], findings: Mapping[str, Findings]) -> tuple[T, ...]:
    """Return the figures that a function reads from the findings of each row, row by row."""
    return tuple(figure for row, row_findings in findings.items() for figure in read(row, row_findings))


def _model(row: StudyRow, findings: Findings, states: Sequence[UnitState]) -> ModelFigures:
    model, task, train = row.configs[ModelConfig], row.configs[TaskConfig], row.configs[TrainConfig]
    row_states = [state for state in states if state.row == row.name]
    checked = [model for results in findings.select(PreflightResults).values() for model in results.models]
    needs = checked[0] if checked else None  # of the row's model, the first of preflight's models
    return ModelFigures(
        row=row.name,
        control=row.configs[StudyConfig].control,
        model=model.path,
        revision=model.revision,
        dtype=model.dtype,
        layers=needs.layers if needs else None,
        width=needs.d if needs else None,
        parameters=needs.parameters if needs else None,
        sites=train.sites,
        kinds=train.kinds,
        behaviours=(*task.behaviours, *([Path(task.prompts).name] if task.prompts else [])),
        benchmarks=task.benchmarks,
        units=len(row_states),
        done=sum(state.state == "done" for state in row_states),
        seconds=sum(summary.seconds for summary in findings.summaries.values()),
        peak_host_bytes=_peak(summary.peak_host_bytes for summary in findings.summaries.values()),
        peak_device_bytes=_peak(summary.peak_device_bytes for summary in findings.summaries.values()),
    )


def _peak(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _baselines(row: str, findings: Findings) -> Iterator[BaselineFigures]:
    for name, scores in findings.select(BenchmarkResults).items():
        # The flexible rule judges what is generated: the strict one counts answers in another format as wrong.
        rules = scores.accuracy or {}
        value = rules.get("flexible", rules.get("raw")) or scores.log_likelihood_per_token
        if value:
            yield BaselineFigures(
                row=row, task=name, measure=_MEASURES[scores.score], value=value, chance=scores.chance, n=scores.n
            )
    for results in findings.select(BaselineResults).values():
        for name, behaviour in results.behaviours.items():
            test = behaviour.test
            yield BaselineFigures(
                row=row, task=name, measure="correct above wrong", value=test.accuracy, chance=0.5, n=test.n
            )


def _dictionaries(row: str, findings: Findings) -> Iterator[DictionaryFigures]:
    settings = findings.settings()
    for kind, results in findings.select(EvaluateResults).items():
        train = findings.select(TrainResults)[kind]
        for scores in results.members:
            yield DictionaryFigures(
                row=row,
                dictionary=full_name(kind, scores.name),
                site=scores.site,
                features=sum(scores.density_histogram.counts) + scores.density_histogram.never,
                epochs=settings["train"]["epochs"],
                l0=scores.l0,
                dead=scores.dead_fraction,
                explained_variance=scores.explained_variance,
                ce_recovered=scores.ce_recovered_mean,
                tokens=train.tokens,
                seconds=train.seconds,
            )


def _activations(row: str, findings: Findings) -> Iterator[ActivationFigures]:
    for results in findings.select(CaptureResults).values():
        for site, statistics in results.sites.items():
            yield ActivationFigures(
                row=row,
                text="corpus",
                site=site,
                tokens=statistics.rows,
                median_norm=statistics.median_norm,
                largest_norm=statistics.largest_norm,
                beyond_sinks=statistics.sinks.share_beyond,
                l0=None,
                firing=None,
                explained_variance=None,
            )
    for benchmark, study in findings.select(StudyResults).items():
        if read := study.activations:
            yield ActivationFigures(
                row=row,
                text=benchmark,
                site=study.site,
                tokens=read.tokens,
                median_norm=read.median_norm,
                largest_norm=read.largest_norm,
                beyond_sinks=None,
                l0=read.l0,
                firing=read.firing,
                explained_variance=read.explained_variance,
            )


def _effects(row: str, findings: Findings) -> Iterator[EffectFigures]:
    """Yield the effects of ablated features on each benchmark."""
    for benchmark, results in findings.select(StudyResults).items():
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
            categories=len(set(results.categories.values())),
            can_name=results.primitives is not None and results.primitives.can_name,
            at_chance=results.at_chance,
            accuracy=scores["clean"].accuracy if scores else None,
            accuracy_drop=answers["accuracy"].effect,
            accuracy_drop_resampled=resampled[0].effect if resampled[0] else None,
            random_accuracy_drop=scores["random"].drop if "random" in scores else None,
            placebo_accuracy_drop=scores["placebo"].drop if "placebo" in scores else None,
            nats_drop=answers["answer_log_prob"].effect,
            nats_drop_resampled=resampled[1].effect if resampled[1] else None,
            random_nats=_mean_of(result.random),
            answer_nats=(result.placebo.numbers or {}).get("top"),
            placebo_nats=_mean_of(result.placebo),
            untrained_nats=_mean_of(result.trained),
            lowers=answers["answer_log_prob"].answer,
            effect=answers["accuracy"].answer,
            effect_resampled=resampled[0].answer if resampled[0] else "not tested",
            random=result.random.answer,
            fooled=result.fooled / result.placebo_sets if result.fooled is not None else None,
            placebo=result.placebo.answer,
            trained=result.trained.answer,
        )


def _mean_of(answer: CausalAnswer) -> float | None:
    """Return the mean effect of control sets; None where there were none."""
    return (answer.numbers or {}).get("mean")


def _behaviours(row: str, findings: Findings) -> Iterator[BehaviourFigures]:
    """Yield the answers of the causal verdict for each behaviour."""
    weak = {name: why for results in findings.select(BaselineResults).values() for name, why in results.weak.items()}
    for results in findings.select(AblateResults).values():
        for name, result in results.verdict.dictionaries[TESTED].items():
            yield BehaviourFigures(
                row=row,
                behaviour=name,
                weak=weak.get(name, ""),
                dictionary=results.dictionary,
                drop=result.ablation["logit_diff"].effect,
                top1_drop=result.ablation["top1"].effect,
                random=result.random.answer,
                fooled=result.fooled / result.placebo_sets if result.fooled is not None else None,
                placebo=result.placebo.answer,
                trained=result.trained.answer,
                selective=result.selective.answer,
            )


def _gates(row: str, findings: Findings) -> Iterator[GateFigures]:
    """Yield the overall answer of each benchmark: what must hold before its effects are believed."""
    for benchmark, results in findings.select(StudyResults).items():
        judged = results.verdict.dictionaries
        seeds = [judged[TESTED], *(answers for name, answers in judged.items() if name != TESTED)]
        answers = [verdicts[benchmark] for verdicts in seeds if benchmark in verdicts]
        yield overall_answer(row, benchmark, answers, results.items.test, results.log_likelihood_spread)


def _domains(rows: Mapping[str, Findings]) -> tuple[DomainFigures, ...]:
    """Return what features chosen on one benchmark do on another; p-values corrected over all of them."""
    figures = [
        DomainFigures(
            row=row,
            chosen_on=chosen_on,
            benchmark=benchmark,
            effect=transferred.effect,
            chosen_here=results.verdict.dictionaries[TESTED][benchmark].ablation["answer_log_prob"].effect,
            common=transferred.common,
            random=transferred.random,
            random_sets=transferred.random_sets,
            p_value=transferred.p_value,
            p_holm=None,
        )
        for row, findings in rows.items()
        for benchmark, results in findings.select(StudyResults).items()
        for chosen_on, transferred in (results.domains or {}).items()
    ]
    p_values = {number: effect.p_value for number, effect in enumerate(figures) if effect.p_value is not None}
    corrected = holm_by_key(p_values)
    return tuple(dataclasses.replace(effect, p_holm=corrected.get(number)) for number, effect in enumerate(figures))


def _drivers(row: str, findings: Findings) -> Iterator[DriverFigures]:
    """Yield what drives the features of each benchmark, by group."""
    for benchmark, results in findings.select(StudyResults).items():
        for shares in results.falsification.shares if results.falsification else ():
            yield DriverFigures(
                row=row,
                benchmark=benchmark,
                group=shares.group,
                features=shares.features,
                tokens=shares.tokens,
                context=shares.context,
                undecided=shares.undecided,
            )


def transfer(row: str, findings: Findings) -> Iterator[TransferFigures]:
    """Yield, for each pair of dictionaries and each measure, how much they share, and how much by chance."""
    for results in findings.select(TransferResults).values():
        for pair in results.pairs:
            for measure, both in pair.measures.items():
                any_pair = min(both.compared) > 0
                yield TransferFigures(
                    row=row,
                    first=pair.first,
                    second=pair.second,
                    measure=measure,
                    matched=both.scores.matched if any_pair else None,
                    matched_null=both.null.matched if any_pair else None,
                    shared=both.scores.shared if any_pair else None,
                    shared_null=both.null.shared if any_pair else None,
                )


def tracking(row: str, findings: Findings) -> Iterator[TrackingFigures]:
    """Yield the links of each tracked text between layers, and how many of its steps were hurt."""
    for results in findings.select(TrackResults).values():
        for slug, text in results.texts.items():
            tests = [step.test for step in text.steps if step.test]
            yield TrackingFigures(
                row=row,
                text=slug,
                tokens=text.tokens,
                sites=len(text.sites),
                links=text.links,
                output=text.output,
                measured=sum(chain.holds is not None for chain in text.chains),
                holding=sum(chain.holds is True for chain in text.chains),
                left_out=text.chains_left_out + sum(chain.holds is None for chain in text.chains),
                tests=sum(test.hurt != "not testable" for test in tests),
                hurt=sum(test.hurt == "yes" for test in tests),
            )
