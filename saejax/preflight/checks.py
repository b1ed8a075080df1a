"""The stage ``preflight``: what will run, whether it fits, and roughly how long it takes, before hours are spent."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from saejax.costs.cost import PlannedRun
from saejax.costs.passes import parameters
from saejax.errors import CheckFailed, Interrupted, UserError
from saejax.parallel.collectives import process_count
from saejax.parallel.mesh import make_mesh
from saejax.preflight import parity, rates, tables
from saejax.preflight.advice import GIB, advice
from saejax.preflight.place import Place, find_place
from saejax.preflight.results import CompiledProgram, ModelNeeds, PreflightResults, UnitNeeds
from saejax.preflight.shapes import Shape, named, read_shapes
from saejax.preflight.sums import Needs, plan_run, replicated, stage_programs
from saejax.preflight.topology import compile_for
from saejax.results import MeshShape
from saejax.runner.registry import STAGES
from saejax.runner.workspace import Run
from saejax.settings import (
    CaptureConfig,
    CorpusConfig,
    MeshConfig,
    ModelConfig,
    PreflightConfig,
    TaskConfig,
    TrainConfig,
)


def run_preflight(run: Run) -> PreflightResults:
    """Checks every model of ``--preflight.models``; for a single one that is to run here, disk and time too.

    Raises:
      UserError: something is missing or does not fit; the message says what to change.
      CheckFailed: the decoder differs from transformers by more than ``--preflight.tolerance``.
    """
    configs, config = run.configs, run.configs[PreflightConfig]
    for stage in STAGES.values():
        if stage.units(configs):
            stage.check(configs)
    shapes = read_shapes(configs)
    if config.parity:
        _check_parity_is_possible(shapes, config.topology)
    place = find_place(configs)
    runs_here = len(shapes) == 1 and not config.topology
    checked = [(plan, Needs.of(plan)) for plan in _planned_runs(run, shapes, place, runs_here)]
    run.say(tables.place_line(place))
    for line in tables.memory_lines(checked, place):
        run.say(line)
    for _, needs in checked:
        for line in tables.unit_lines(needs):
            run.say(line)
    found = [_facts(plan, needs, _compile(run, plan, place), place) for plan, needs in checked]
    _check_memory(checked, found, place)
    results = PreflightResults(MeshShape.of(place.mesh, process_count()), config.topology, place.limit, tuple(found))
    if runs_here and checked:
        results = _with_plan(run, results, *checked[0])
    if config.parity:
        results = dataclasses.replace(results, parity={shape.path: _parity(run, shape) for shape in shapes})
        _check_parity(results.parity or {}, config.tolerance)
    return results


def _planned_runs(run: Run, shapes: Sequence[Shape], place: Place, runs_here: bool) -> list[PlannedRun]:
    """A plan for every model that has the sites; that one has not is an error, unless parity is all it is for.

    Its text is looked at if it ``runs_here``.

    Raises:
      UserError: a model lacks a site.
    """
    corpus, plans = run.configs[CorpusConfig], []
    documents, tokens = rates.used_text(corpus, run.configs[TaskConfig]) if runs_here else (0, 0)
    here = dict(documents=documents, tokens=tokens, torch_here=place.torch_here, mesh=place.mesh, limit=place.limit)
    here |= dict(own_devices=place.own, host=place.host, stands_for=place.stands_for)
    for shape in shapes:
        try:
            name = Path(shape.path).name
            plans.append(plan_run(name, shape.config, run.configs, place.mesh.shape, **here))
        except UserError as error:
            if not run.configs[PreflightConfig].parity:
                raise
            run.say(f"memory is not counted: {error}")
    return plans


def _compile(run: Run, plan: PlannedRun, place: Place) -> tuple[CompiledProgram, ...]:
    """Compiles the stages' programs for the slice that was named, if any; a line for each.

    Raises:
      Interrupted: asked to stop.
    """
    topology = run.configs[PreflightConfig].topology
    if not topology:
        return ()
    run.say(tables.programs_header(plan.name, topology))
    rows = []
    for program in stage_programs(plan):
        if run.stopping():
            raise Interrupted("preflight: stopped; it starts anew")
        rows.append(compile_for(program, place.limit, place.of_node))
        run.say(tables.program_line(rows[-1], place))
    run.say(tables.verdict_line(plan.name, rows, place))
    return tuple(rows)


def _facts(plan: PlannedRun, needs: Needs, compiled: tuple[CompiledProgram, ...], place: Place) -> ModelNeeds:
    """One model's entry in the results; what was compiled decides whether it fits."""
    return ModelNeeds(
        name=plan.name,
        family=plan.model.family,
        layers=plan.model.n_layers,
        d=plan.model.d_model,
        parameters=parameters(plan.model),
        dtype=plan.dtype,
        units={
            unit: UnitNeeds(cost.bytes, cost.counts, cost.details, cost.flops) for unit, cost in needs.units.items()
        },
        peak_bytes=max((program.memory for program in compiled), default=needs.peak),
        fits=all(program.fits for program in compiled) if compiled else needs.peak <= place.limit,
        replicated=tuple(replicated(plan, needs)),
        programs=compiled,
    )


def _check_memory(checked: Sequence[tuple[PlannedRun, Needs]], found: Sequence[ModelNeeds], place: Place) -> None:
    """A ``UserError`` that names the models that do not fit, and what would."""
    messages = []
    for (plan, needs), facts in zip(checked, found, strict=True):
        if not facts.fits:
            unit, devices = needs.largest, plan.own_devices
            apart = devices and not facts.programs and STAGES[unit.partition("/")[0]].processes != "all"
            where = f" for {unit}, which a process runs on its own {devices} devices" if apart else ""
            changes = advice(plan, place.limit, place.kind, facts.peak_bytes)
            messages.append(
                f"{plan.name} needs about {facts.peak_bytes / GIB:.1f} GiB per device{where}, but there are "
                f"{place.limit / GIB:.1f}: use {', or '.join(changes) or 'a smaller model'}"
            )
    if messages:
        raise UserError("; ".join(messages))


def _with_plan(run: Run, results: PreflightResults, plan: PlannedRun, needs: Needs) -> PreflightResults:
    """With what the run reads and writes and how long it takes; a ``UserError`` if the disk is too small."""
    measured = rates.matmul_rates()
    seconds, free = needs.seconds(measured), psutil.disk_usage(str(run.folder)).free
    shown = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in measured.items())
    run.say(f"text: {plan.documents:,} documents, about {plan.tokens:,} tokens; matrix products: {shown}")
    if measured["bfloat16"] < measured["float32"]:
        dtypes = {
            "--capture.dtype": plan.configs[CaptureConfig].dtype,
            "--train.matmul": plan.configs[TrainConfig].matmul,
        }
        for flag, dtype in dtypes.items():
            if dtype == "bfloat16":
                run.say(f"this machine multiplies bfloat16 slower than float32: {flag}=float32 would take less time")
    run.say(f"disk: about {needs.disk / GIB:.1f} GiB needed, {free / GIB:.1f} free in {run.folder}")
    run.say(tables.seconds_line(seconds))
    if needs.disk > free:
        raise UserError(
            f"the run needs about {needs.disk / GIB:.1f} GiB of disk, but {free / GIB:.1f} are free for {run.folder}: "
            "use another --workdir or a smaller --corpus.max_tokens; or train with --train.source=model, and capture a "
            "sample by --capture.tokens=1000000"
        )
    return dataclasses.replace(
        results,
        documents=plan.documents,
        tokens=plan.tokens,
        disk_bytes=needs.disk,
        disk_free_bytes=free,
        matmul_flops_per_second=measured,
        seconds=seconds,
    )


def _check_parity_is_possible(shapes: Sequence[Shape], topology: str) -> None:
    if topology:
        raise UserError("--preflight.parity runs on the devices at hand: leave --preflight.topology out")
    for shape in shapes:
        if not shape.has_weights:
            raise UserError(
                f"--preflight.parity runs the model, but {shape.path} is only its shape: give a hub id or a folder"
            )


def _parity(run: Run, shape: Shape) -> dict[str, dict[str, float]]:
    """Measures and prints; the largest error of every kind of site, on each kind of tokens."""
    run.say(f"{shape.path}: decoder against transformers in {run.configs[ModelConfig].dtype}; largest relative error")
    found = parity.measure(run.configs, named(shape.path, run.configs[ModelConfig]), make_mesh(run.configs[MeshConfig]))
    for name, errors in found.items():
        for error in errors:
            where = f" (layer {error.layer})" if error.layer >= 0 else ""
            run.say(f"  {name:<14} {error.kind:<11} {error.value:.2e}{where}")
    return {name: {error.kind: error.value for error in errors} for name, errors in found.items()}


def _check_parity(found: Mapping[str, Mapping[str, Mapping[str, float]]], tolerance: float) -> None:
    for path, by_tokens in found.items():
        for name, errors in by_tokens.items():
            kind = max(errors, key=errors.__getitem__)
            if errors[kind] > tolerance:
                raise CheckFailed(
                    f"{path} on {name}: {kind} differs from transformers by {errors[kind]:.2e} of its largest value, "
                    f"more than --preflight.tolerance={tolerance:g}"
                )
