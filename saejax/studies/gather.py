"""The figures of a study, read from what the stages of its rows returned."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from saejax.activations.results import CaptureResults
from saejax.dictionaries.stacks import full_name
from saejax.evaluation.results import EvaluateResults
from saejax.page.findings import Findings, read_findings
from saejax.preflight.results import PreflightResults
from saejax.settings import ModelConfig, StudyConfig, TaskConfig, TrainConfig
from saejax.studies import criteria, gather_effects, gather_features
from saejax.studies.alignment import alignments
from saejax.studies.benchmark_results import StudyResults
from saejax.studies.learned import learned
from saejax.studies.phases import phases
from saejax.studies.results import (
    ActivationFigures,
    BaselineFigures,
    DictionaryFigures,
    ModelFigures,
    ResourceFigures,
    StudyFigures,
    UnitState,
)
from saejax.studies.rows import StudyRow
from saejax.studies.sheet import fill
from saejax.studies.units import ROWS
from saejax.tasks.results import BaselineResults, BenchmarkResults
from saejax.training.metrics import read_metrics
from saejax.training.results import TrainResults

T = TypeVar("T")
_MEASURES = {
    "generate": "exact match",
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
    benchmarks = dict.fromkeys(name for each in findings.values() for name in each.each(StudyResults))
    read = {name: gather_features.read_benchmarks(findings, name) for name in benchmarks}
    figures = StudyFigures(
        fingerprint=mark,
        rules=tuple(criteria.RULES.values()),
        models=tuple(_model(row, findings[row.name], states) for row in rows),
        baselines=_collect(_baselines, findings),
        dictionaries=_collect(_dictionaries, findings),
        activations=_collect(_activations, findings),
        effects=_collect(gather_effects.effects, findings),
        behaviours=_collect(gather_effects.behaviours, findings),
        alignment=tuple(alignments(findings)),
        gates=_collect(gather_effects.gates, findings),
        domains=gather_effects.domains(findings),
        drivers=_collect(gather_effects.drivers, findings),
        primitives=tuple(
            primitive for name in read for primitive in gather_features.primitives(findings, name, read[name])
        ),
        labels=_collect(gather_features.labels, findings),
        associations=_collect(gather_features.associations, findings),
        problems=tuple(problem for name in read for problem in gather_features.problems(findings, name, read[name])),
        phases=(),
        transfer=_collect(gather_effects.transfer, findings),
        tracking=_collect(gather_effects.tracking, findings),
        learned=(),
        criteria=(),
        resources=_collect(_resources, findings),
        failures=tuple(state for state in states if state.state != "done"),
    )
    figures = dataclasses.replace(figures, phases=phases(figures, findings))
    figures = dataclasses.replace(figures, learned=learned(figures))
    return dataclasses.replace(figures, criteria=tuple(criteria.criteria(figures, list(findings.values()))))


def _collect(read: Callable[[str, Findings], Iterable[T]], findings: Mapping[str, Findings]) -> tuple[T, ...]:
    """Return the figures that a function reads from the findings of each row, row by row."""
    return tuple(figure for row, row_findings in findings.items() for figure in read(row, row_findings))


def _model(row: StudyRow, findings: Findings, states: Sequence[UnitState]) -> ModelFigures:
    model, task, train = row.configs[ModelConfig], row.configs[TaskConfig], row.configs[TrainConfig]
    row_states = [state for state in states if state.row == row.name]
    checked = [each for results in findings.each(PreflightResults).values() for each in results.models]
    needs = checked[0] if checked else None  # of the row's model, the first of those that preflight looks at
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
    )


def _baselines(row: str, findings: Findings) -> Iterator[BaselineFigures]:
    for name, scores in findings.each(BenchmarkResults).items():
        value = next(iter(scores.accuracy.values())) if scores.accuracy else scores.log_likelihood_per_token
        if value:
            yield BaselineFigures(row, name, _MEASURES[scores.score], value, scores.chance, scores.n)
    for results in findings.each(BaselineResults).values():
        for name, behaviour in results.behaviours.items():
            test = behaviour.test
            yield BaselineFigures(row, name, "correct above wrong", test.accuracy, 0.5, test.n)


def _dictionaries(row: str, findings: Findings) -> Iterator[DictionaryFigures]:
    settings = findings.settings()
    for kind, results in findings.each(EvaluateResults).items():
        train = findings.each(TrainResults)[kind]
        epochs = settings["train"]["epochs"]
        losses = epoch_losses(findings.folders[f"train/{kind}"], epochs, train.tokens) if train.steps else {}
        for scores in results.members:
            early, end = losses.get((scores.name, criteria.EPOCH)), losses.get((scores.name, epochs))
            yield fill(
                DictionaryFigures,
                scores,
                row=row,
                dictionary=full_name(kind, scores.name),
                features=sum(scores.density_histogram.counts) + scores.density_histogram.never,
                epochs=epochs,
                tokens=train.tokens,
                seconds=train.seconds,
                loss_epoch_4=early,
                loss_end=end,
                losses=tuple(loss for (name, _), loss in sorted(losses.items()) if name == scores.name),
                improvement=1 - end / early if early and end is not None and epochs > criteria.EPOCH else None,
                dead=scores.dead_fraction,
                ce_recovered=scores.ce_recovered_mean,
            )


def epoch_losses(unit: Path, epochs: int, tokens: int) -> dict[tuple[str, int], float]:
    """Return the mean loss over the recorded steps of each epoch, by member and epoch, from 1.

    Args:
      unit: folder of a train unit.
      epochs: of its training.
      tokens: of all of them.

    Raises:
      UserError: its metrics are missing or damaged.
    """
    losses: dict[tuple[str, int], list[float]] = {}
    for record in read_metrics(unit, ("tokens", "loss")):
        epoch = min(math.ceil(record["tokens"] * epochs / tokens), epochs)
        losses.setdefault((record["member"], epoch), []).append(record["loss"])
    return {key: float(np.mean(values)) for key, values in losses.items()}


def _activations(row: str, findings: Findings) -> Iterator[ActivationFigures]:
    for results in findings.each(CaptureResults).values():
        for site, statistics in results.sites.items():
            beyond = statistics.sinks.share_beyond
            norms = statistics.median_norm, statistics.largest_norm
            yield ActivationFigures(row, "corpus", site, statistics.rows, *norms, beyond, None, None, None)
    for benchmark, study in findings.each(StudyResults).items():
        if read := study.activations:
            yield fill(ActivationFigures, read, row=row, text=benchmark, site=study.site, beyond_sinks=None)


def _resources(row: str, findings: Findings) -> Iterator[ResourceFigures]:
    for unit, summary in findings.summaries.items():
        used = summary.devices.count if summary.devices else 0
        device_hours = used * summary.seconds / 3600 if used else None
        disk_bytes = sum(summary.files.values())
        yield fill(ResourceFigures, summary, row=row, unit=unit, device_hours=device_hours, disk_bytes=disk_bytes)
