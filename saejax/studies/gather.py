"""The figures of a study, read from what the stages of its rows returned."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from saejax.activations.results import CaptureResults
from saejax.dictionaries.stacks import full_name
from saejax.evaluation.results import EvaluateResults
from saejax.interventions.study_results import StudyResults
from saejax.page.findings import Findings, read_findings
from saejax.preflight.results import ModelNeeds, PreflightResults
from saejax.settings import ModelConfig, StudyConfig, TaskConfig, TrainConfig
from saejax.studies import criteria, gather_effects, gather_features
from saejax.studies.alignment import alignments
from saejax.studies.learned import learned
from saejax.studies.phases import phases
from saejax.studies.results import (
    ActivationFigures,
    BaselineFigures,
    DictionaryFigures,
    FailureFigures,
    ModelFigures,
    ResourceFigures,
    StudyFigures,
)
from saejax.studies.rows import StudyRow
from saejax.studies.units import ROWS, UnitState
from saejax.tasks.results import BaselineResults, BenchmarkResults
from saejax.training.metrics import read_metrics
from saejax.training.results import TrainResults

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
    found = {row.name: _found(root, row.name, states) for row in rows}
    each = [(row, found[row.name]) for row in rows]
    read = {name: gather_features.read_benchmarks(found, name) for name in _benchmarks(found.values())}
    figures = StudyFigures(
        fingerprint=mark,
        rules=tuple(criteria.RULES.values()),
        models=tuple(_model(row, own, states) for row, own in each),
        baselines=tuple(one for row, own in each for one in _baselines(row.name, own)),
        dictionaries=tuple(one for row, own in each for one in _dictionaries(row.name, own)),
        activations=tuple(one for row, own in each for one in _activations(row.name, own)),
        effects=tuple(one for row, own in each for one in gather_effects.effects(row.name, own)),
        behaviours=tuple(one for row, own in each for one in gather_effects.behaviours(row.name, own)),
        alignment=tuple(alignments(found)),
        gates=tuple(one for row, own in each for one in gather_effects.gates(row.name, own)),
        domains=gather_effects.domains(found),
        drivers=tuple(one for row, own in each for one in gather_effects.drivers(row.name, own)),
        primitives=tuple(one for name in read for one in gather_features.primitives(found, name, read[name])),
        labels=tuple(one for row, own in each for one in gather_features.labels(row.name, own)),
        associations=tuple(one for row, own in each for one in gather_features.associations(row.name, own)),
        problems=tuple(one for name in read for one in gather_features.problems(found, name, read[name])),
        phases=(),
        transfer=tuple(one for row, own in each for one in gather_effects.transfer(row.name, own)),
        tracking=tuple(one for row, own in each for one in gather_effects.tracking(row.name, own)),
        learned=(),
        criteria=(),
        resources=tuple(one for row, own in each for one in _resources(row.name, own)),
        failures=tuple(
            FailureFigures(state.row, state.unit, state.state, state.reason, state.log)
            for state in states
            if state.state != "done"
        ),
    )
    figures = dataclasses.replace(figures, phases=phases(figures, found))
    figures = dataclasses.replace(figures, learned=learned(figures))
    return dataclasses.replace(figures, criteria=tuple(criteria.criteria(figures, list(found.values()))))


def _benchmarks(rows: Iterable[Findings]) -> list[str]:
    """Return the benchmarks on which any row ablated features."""
    return list(dict.fromkeys(name for found in rows for name in found.each(StudyResults)))


def _found(root: Path, row: str, states: Sequence[UnitState]) -> Findings:
    """Return the results of a row's finished units."""
    done = [state.unit for state in states if state.row == row and state.state == "done"]
    return read_findings({unit: root / ROWS / row / unit for unit in done}, root, {})


def _model(row: StudyRow, found: Findings, states: Sequence[UnitState]) -> ModelFigures:
    model, task, train = row.configs[ModelConfig], row.configs[TaskConfig], row.configs[TrainConfig]
    needs, own = _needs(found), [state for state in states if state.row == row.name]
    return ModelFigures(
        row=row.name,
        known=row.configs[StudyConfig].known,
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
        units=len(own),
        done=sum(state.state == "done" for state in own),
    )


def _needs(found: Findings) -> ModelNeeds | None:
    """Return preflight's figures of the row's model."""
    checked = list(found.each(PreflightResults).values())
    return checked[0].models[0] if checked and checked[0].models else None


def _baselines(row: str, found: Findings) -> Iterator[BaselineFigures]:
    for name, scores in found.each(BenchmarkResults).items():
        value = next(iter(scores.accuracy.values())) if scores.accuracy else scores.log_likelihood_per_token
        if value:
            yield BaselineFigures(row, name, _MEASURES[scores.score], value, scores.chance, scores.n)
    for results in found.each(BaselineResults).values():
        for name, one in results.behaviours.items():
            yield BaselineFigures(row, name, "correct above wrong", one.test.accuracy, 0.5, one.test.n)


def _dictionaries(row: str, found: Findings) -> Iterator[DictionaryFigures]:
    settings = found.settings()
    for kind, results in found.each(EvaluateResults).items():
        train = found.each(TrainResults)[kind]
        epochs = settings["train"]["epochs"]
        losses = epoch_losses(found.folders[f"train/{kind}"], epochs, train.tokens) if train.steps else {}
        for scores in results.members:
            early, end = losses.get((scores.name, criteria.EPOCH)), losses.get((scores.name, epochs))
            yield DictionaryFigures(
                row=row,
                dictionary=full_name(kind, scores.name),
                site=scores.site,
                features=sum(scores.density_histogram.counts) + scores.density_histogram.never,
                epochs=epochs,
                tokens=train.tokens,
                seconds=train.seconds,
                loss_epoch_4=early,
                loss_end=end,
                losses=tuple(loss for (name, _), loss in sorted(losses.items()) if name == scores.name),
                improvement=1 - end / early if early and end is not None and epochs > criteria.EPOCH else None,
                l0=scores.l0,
                dead=scores.dead_fraction,
                explained_variance=scores.explained_variance,
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
    found: dict[tuple[str, int], list[float]] = {}
    for record in read_metrics(unit, ("tokens", "loss")):
        epoch = min(math.ceil(record["tokens"] * epochs / tokens), epochs)
        found.setdefault((record["member"], epoch), []).append(record["loss"])
    return {key: float(np.mean(values)) for key, values in found.items()}


def _activations(row: str, found: Findings) -> Iterator[ActivationFigures]:
    for results in found.each(CaptureResults).values():
        for site, one in results.sites.items():
            beyond = one.sinks.share_beyond
            own = ActivationFigures(
                row, "corpus", site, one.rows, one.median_norm, one.largest_norm, beyond, *[None] * 3
            )
            yield own
    for benchmark, study in found.each(StudyResults).items():
        if read := study.activations:
            norms = read.median_norm, read.largest_norm, None
            scores = read.l0, read.firing, read.explained_variance
            yield ActivationFigures(row, benchmark, study.site, read.tokens, *norms, *scores)


def _resources(row: str, found: Findings) -> Iterator[ResourceFigures]:
    needs, flops = _needs(found), dict[str, float]()
    for program in needs.programs if needs else ():
        stage = program.name.partition(":")[0]
        flops[stage] = flops.get(stage, 0.0) + program.runs * program.flops
    stages = Counter(unit.partition("/")[0] for unit in found.summaries)
    for unit, summary in found.summaries.items():
        planned = flops.get(unit.partition("/")[0], 0.0) / stages[unit.partition("/")[0]]
        used = summary.devices.count if summary.devices else 0
        yield ResourceFigures(
            row=row,
            unit=unit,
            seconds=summary.seconds,
            device_hours=used * summary.seconds / 3600 if used else None,
            peak_host_bytes=summary.peak_host_bytes,
            peak_device_bytes=summary.peak_device_bytes,
            disk_bytes=sum(summary.files.values()),
            flops_per_second=planned / summary.seconds if planned and summary.seconds else None,
        )
