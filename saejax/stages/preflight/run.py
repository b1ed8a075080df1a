"""The stage ``preflight``: compile what will run, and say whether it fits and how long it takes."""

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import psutil

from saejax.activations.chunker import check_context
from saejax.costs.plan import PlannedRun
from saejax.errors import CheckFailed, Interrupted, UserError
from saejax.files import read_object
from saejax.flops import parameters, peak_flops
from saejax.models import parity
from saejax.models.loading import load_model
from saejax.models.settings import ModelConfig
from saejax.parallel.collectives import process_count
from saejax.parallel.mesh import free_host_bytes, make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.preflight import rates
from saejax.preflight.plan import (
    check_dictionaries,
    disk_bytes,
    plan_run,
    stage_programs,
    stage_seconds,
)
from saejax.preflight.results import CompiledProgram, ModelNeeds, PreflightResults
from saejax.preflight.shapes import Shape, named, read_shapes
from saejax.preflight.topology import GPUS, Place, compile_for, find_place
from saejax.preflight.uncompiled import count_flops
from saejax.results import MeshShape
from saejax.runner.checks import check_stages
from saejax.runner.plan import REUSED, plan_units
from saejax.runner.registry import all_stages
from saejax.runner.workplan import Workplan
from saejax.runner.workspace import SUMMARY, Run, Workspace
from saejax.stages.baseline.plan import studied_share
from saejax.stages.preflight.settings import PreflightConfig
from saejax.stages.train.plan import host_bytes, resident_bytes
from saejax.tasks import corpora
from saejax.tasks.settings import CorpusConfig, TaskConfig
from saejax.training.settings import TrainConfig
from saejax.wording import counted

GIB = 2**30
_RESIDENT = 0.4  # share of a device's memory up to which --train.input=auto keeps the rows of a store there
_ADVICE = (
    "use more devices and --mesh.model, --model.dtype=bfloat16, --capture.dtype=bfloat16, a smaller batch of the "
    "program that is named, --train.members_at_once=1 or --train.zero_optimizer"
)
#: Of each stage whose time is estimated, the flag that shortens it most.
SHORTENING = dict(
    capture="--corpus.max_tokens",
    train="--train.epochs",
    evaluate="--evaluate.ce_documents",
    ablate="--task.test_prompts",
    benchmark="--task.examples",
    study="--study.items",
    interpret="--corpus.max_tokens",
    patch="--task.test_prompts",
    steer="--causal.random_sets",
)
_SHORT = ("baseline", "tokenize", "atlas", "export", "report")  # stages whose time is not told: minutes


def run_preflight(run: Run) -> PreflightResults:
    """Check every model of ``--preflight.models``; of a single one that is to run here, disk, memory and time too.

    Raises:
      UserError: something is missing or does not fit; the message says what to change.
      CheckFailed: the decoder differs from transformers by more than ``parity.TOLERANCE``.
      Interrupted: asked to stop.
    """
    configs, config = run.configs, run.configs[PreflightConfig]
    stages = [stage for stage in all_stages().values() if stage.units(configs)]
    check_stages([stage.name for stage in stages], configs, run.folder.parent)
    shapes = read_shapes(configs)
    if config.parity and config.topology:
        raise UserError("--preflight.parity runs on the devices at hand: leave --preflight.topology out")
    if config.parity and (without := [shape.path for shape in shapes if not shape.has_weights]):
        raise UserError(
            f"--preflight.parity runs the model, but {without[0]} is only its shape: give a hub id or a folder"
        )
    place = find_place(configs)
    mesh = MeshShape.of(place.mesh, process_count())
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.axes.items())
    run.say(f"{mesh.devices} x {', '.join(mesh.kinds)}, {place.limit / GIB:.2f} GiB each; mesh {axes}")
    runs_here = len(shapes) == 1 and not config.topology
    left = {stage.name for stage in stages if not stage.first}
    if runs_here and (done := left - _stages_left(run, left)):
        left -= done
        run.say(f"not counted, since they are done: {', '.join(name for name in all_stages() if name in done)}")
    plans = _planned_runs(run, shapes, place, runs_here)
    models = [_check_model(run, plan, place, left) for plan in plans]
    largest = {
        model.name: max(model.programs, key=lambda program: program.memory) for model in models if not model.fits
    }
    if unfit := [
        f"{model} needs about {program.memory / GIB:.1f} GiB per device for {program.name} ({program.size}), but there "
        f"are {place.limit / GIB:.1f}"
        for model, program in largest.items()
    ]:
        raise UserError(f"{'; '.join(unfit)}: {_ADVICE}")
    for model in models if config.topology else ():
        _say_least_hours(run, model, config.topology, place)
    results = PreflightResults(mesh, config.topology, place.limit, tuple(models))
    if runs_here and plans:
        results = _with_resources(run, results, plans[0], place, left)
    if config.parity:
        results = dataclasses.replace(results, parity={shape.path: _check_parity(run, shape.path) for shape in shapes})
    if long := describe_long_run(results.seconds or {}):
        run.say(long)  # last, so that it is not missed
    return results


def _stages_left(run: Run, stages: set[str]) -> set[str]:
    """Return those of some stages of which this workdir lacks a unit."""
    units = [unit for name, stage in all_stages().items() if name in stages for unit in stage.units(run.configs)]
    try:
        planned = plan_units(Workplan(run.configs), Workspace(run.folder.parent, read_only=True), units)
    except UserError:  # said when that unit's turn comes
        return stages
    return {unit.name.partition("/")[0] for unit in planned if unit.todo != REUSED}


def recall_long_run(run: Run) -> None:
    """Say again of a finished preflight that what is left of the run will take more than an hour."""
    seconds = read_object(run.folder / SUMMARY, "results")["results"].get("seconds") or {}
    if describe_long_run(seconds):
        left = _stages_left(run, {stage.name for stage in all_stages().values() if not stage.first})
        if long := describe_long_run({stage: value for stage, value in seconds.items() if stage in left}):
            run.say(long)


def describe_long_run(seconds: Mapping[str, float]) -> str:
    """Return the line about a run of more than an hour: its longest stage, and the flag that shortens it; else "".

    Args:
      seconds: expected seconds of each stage.
    """
    total = sum(seconds.values())
    if total <= 3600:
        return ""
    longest = max(seconds, key=lambda stage: seconds[stage])
    return (
        f"this run will take about {total / 3600:.1f} hours, {seconds[longest] / 3600:.1f} of them in {longest}: "
        f"{SHORTENING[longest]} shortens it; Ctrl-C stops it, and keeps what is finished"
    )


def _planned_runs(run: Run, shapes: Sequence[Shape], place: Place, runs_here: bool) -> list[PlannedRun]:
    """Return a plan for every model; its text is looked at if it ``runs_here``.

    Raises:
      UserError: a model lacks a site, unless parity is all it is checked for.
    """
    corpus, plans = run.configs[CorpusConfig], []
    documents, tokens = rates.used_text(corpus, run.configs[TaskConfig]) if runs_here else (0, 0)
    here = dict(documents=documents, tokens=tokens, own_devices=place.own_devices, host=place.host)
    for shape in shapes:
        try:
            name = Path(shape.path).name
            plans.append(plan_run(name, shape.config, run.configs, place.mesh, **here, stands_for=place.stands_for))
        except UserError as error:
            if not run.configs[PreflightConfig].parity:
                raise
            run.say(f"memory could not be estimated: {error}")
    return plans


def _check_model(run: Run, plan: PlannedRun, place: Place, stages: Collection[str]) -> ModelNeeds:
    """Compile the programs of stages on a model, with a line for each."""
    model = plan.model
    size = f"{parameters(model) / 1e6:,.1f} M parameters, {counted(model.n_layers, 'layer')}"
    run.say(f"{plan.name}: {size}, {plan.dtype}")
    check_dictionaries(plan)
    if any(all_stages()[stage].units(plan.configs) for stage in ("tokenize", "capture", "train")):
        check_context(plan.configs[CorpusConfig], model.context)
    programs = stage_programs(plan, stages)
    if programs:
        run.say(
            "  compiled programs: memory on each device, other data of the stage included; GFLOP of all devices by "
            "formula (in brackets: of one device as XLA counts them, the body of a loop once)"
        )
    compiled = []
    for program in programs:
        if run.stopping():
            raise Interrupted("preflight: stopped; the next run starts from the beginning")
        compiled.append(compile_for(program, place.limit))
        run.say(_program_line(compiled[-1], place))
    peak = max((program.memory for program in compiled), default=0)
    return ModelNeeds(
        name=plan.name,
        family=model.family,
        layers=model.n_layers,
        d=model.d_model,
        parameters=parameters(model),
        dtype=plan.dtype,
        peak_bytes=peak,
        fits=all(program.fits for program in compiled),
        programs=tuple(compiled),
    )


def _say_least_hours(run: Run, model: ModelNeeds, topology: str, place: Place) -> None:
    """Say how long the programs take at a device's peak, where the number of their calls is known without the text."""
    flops = sum(program.flops * program.runs for program in model.programs)
    name = topology.partition(":")[0]
    device = name if name in GPUS else place.mesh.devices.flat[0]  # programs for GPUs are compiled for CPUs
    peaks = {dtype: peak_flops(device, dtype) for dtype in ("float32", "bfloat16")}
    hours = [f"{flops / peak / 3600:.3f} device-hours in {dtype}" for dtype, peak in peaks.items() if peak]
    if flops and hours:
        run.say(
            f"{model.name}: {flops / 1e15:,.2f} PFLOP in programs that do not depend on the text; at the peak of "
            f"{topology} they take {', '.join(hours)}, a lower bound"
        )


def _program_line(program: CompiledProgram, place: Place) -> str:
    verdict = "fits" if program.fits else f"does not fit into {place.limit / GIB:.2f}"
    counted = "-" if program.counted_flops is None else f"{program.counted_flops / 1e9:,.1f}"
    return (
        f"  {program.name:<21} {program.size:<44} {program.memory / GIB:7.2f} GiB {verdict} "
        f"{program.flops / 1e9:>13,.1f} GFLOP ({counted})  compiled in {program.seconds:.0f} s"
    )


def _with_resources(
    run: Run, results: PreflightResults, plan: PlannedRun, place: Place, stages: Collection[str]
) -> PreflightResults:
    """Return the results with disk, host memory and time of stages.

    Raises:
      UserError: the disk or the host's memory is too small.
    """
    measured, programs = rates.matmul_rates(), results.models[0].programs
    train = plan.configs[TrainConfig]
    dtypes = dict.fromkeys(("evaluate", "ablate", "benchmark", "study", "patch", "steer"), plan.dtype)
    dtypes |= dict(capture=plan.capture_dtype, train=train.matmul)
    seconds = stage_seconds(programs, measured, dtypes)
    # The programs of benchmarks generate the answers of studies, too.
    generated, share = seconds.pop("benchmark", 0.0), studied_share(plan)
    more = dict(study=share * generated, benchmark=(1 - share) * generated)
    flops = count_flops(plan, stages)
    for stage in (stage for stage in {**more, **flops} if stage in stages):
        seconds[stage] = more.get(stage, 0.0) + flops.get(stage, 0.0) / measured[dtypes.get(stage, "float32")]
    needed, free = disk_bytes(plan, stages), psutil.disk_usage(str(run.folder)).free
    on_host, host_free = host_bytes(plan) if "train" in stages else 0, free_host_bytes()
    shown = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in measured.items())
    run.say(f"text: {counted(plan.documents, 'document')}, about {plan.tokens:,} tokens; matrix products: {shown}")
    if measured["bfloat16"] < measured["float32"]:
        for flag, dtype in (("--capture.dtype", plan.capture_dtype), ("--train.matmul", train.matmul)):
            if dtype == "bfloat16":
                run.say(f"this machine multiplies bfloat16 slower than float32: {flag}=float32 would take less time")
    run.say(f"disk: about {needed / GIB:.1f} GiB needed, {free / GIB:.1f} free in {run.folder}")
    run.say(f"memory of the host for buffers and checkpoints of training: about {on_host / GIB:.1f} GiB")
    stored = resident_bytes(plan) if train.source == "store" else 0
    auto = train.input == "auto" and plan.platform != "cpu" and stored < _RESIDENT * place.limit
    if "train" in stages and stored and (auto or train.input == "resident"):
        run.say(f"activations that stay on the devices: {stored / GIB:.2f} GiB on each, besides the training step")
    devices = 1 if plan.platform == "cpu" else plan.mesh.size
    hours = devices * sum(seconds.values()) / 3600
    listed = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
    others = [stage for stage in all_stages() if stage in stages and stage not in (*seconds, *_SHORT)]
    unknown = f"; not estimated: {', '.join(others)}" if others else ""
    run.say(f"at the measured speed the programs take {hours:.2f} device-hours: {listed}{unknown}")
    if needed > free:
        raise UserError(
            f"the run needs about {needed / GIB:.1f} GiB of disk, but {free / GIB:.1f} are free for {run.folder}: "
            "use another --workdir or a smaller --corpus.max_tokens; or train with --train.source=model, and capture a "
            "sample by --capture.tokens=1000000"
        )
    if on_host > host_free:
        raise UserError(
            f"training needs about {on_host / GIB:.1f} GiB of the host's memory, but {host_free / GIB:.1f} are free: "
            "use a smaller --train.buffer_rows or fewer members in a stack"
        )
    return dataclasses.replace(
        results,
        documents=plan.documents,
        tokens=plan.tokens,
        disk_bytes=needed,
        disk_free_bytes=free,
        host_bytes=on_host,
        matmul_flops_per_second=measured,
        seconds=seconds,
        device_hours=hours,
    )


def _check_parity(run: Run, path: str) -> dict[str, dict[str, float]]:
    """Return a model's largest error of every kind of site, on each kind of tokens.

    Raises:
      CheckFailed: one is above ``parity.TOLERANCE``.
    """
    model = named(path, run.configs[ModelConfig])
    run.say(f"{path}: decoder against transformers in {model.dtype}; largest relative error")
    lm = load_model(model.path, model.revision, model.dtype, make_mesh(run.configs[MeshConfig]), check=False)
    documents = corpora.documents(run.configs[CorpusConfig], run.configs[TaskConfig])
    texts = [document.text for document in itertools.islice(documents, parity.PROMPTS)]
    measured = parity.measure(lm, model.dtype, texts)
    for name, errors in measured.items():
        for kind, (value, layer) in errors.items():
            run.say(f"  {name:<14} {kind:<11} {value:.2e}{f' (layer {layer})' if layer >= 0 else ''}")
    for name, errors in measured.items():
        kind, (value, _) = max(errors.items(), key=lambda item: item[1])
        if value > parity.TOLERANCE[model.dtype]:
            raise CheckFailed(
                f"{path} on {name}: {kind} differs from transformers by {value:.2e} of its largest value, more than "
                f"{parity.TOLERANCE[model.dtype]:g}"
            )
    return {name: {kind: error.value for kind, error in errors.items()} for name, errors in measured.items()}
