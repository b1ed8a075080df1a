"""The stage ``preflight``: what will run, whether it fits, and roughly how long it takes, before hours are spent."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from saejax.attribution.trace.memory import check_room, fitting_tokens, graph_bytes
from saejax.errors import CheckFailed, Interrupted, UserError
from saejax.parallel import describe
from saejax.preflight import memory, parity, programs, tables, times
from saejax.preflight.advice import advice
from saejax.preflight.causal import causal_units
from saejax.preflight.memory import GIB, Memory
from saejax.preflight.place import Place, find_place
from saejax.preflight.shapes import Shape, named, read_shapes
from saejax.preflight.topology import compile_for
from saejax.preflight.work import Work, plan_work
from saejax.tasks.corpora import read_corpus
from saejax.training.train import check_divides
from saejax.workspace import Run


def run_preflight(run: Run) -> dict:
    """Checks every model of ``--preflight.models``; for a single one that is to run here, disk and time too.

    Raises:
      UserError: something is missing or does not fit; the message says what to change.
      CheckFailed: the decoder differs from transformers by more than ``--preflight.tolerance``.
    """
    configs, config = run.configs, run.configs["preflight"]
    shapes = read_shapes(configs)
    if config.parity:
        _check_parity_is_possible(shapes, config.topology)
    place = find_place(configs)
    works = _works(run, shapes, place)
    run.say(tables.place_line(place))
    needs = [memory.device_memory(work, place.mesh.shape) for work in works]
    for line in tables.memory_lines(works, needs, place):
        run.say(line)
    graphs = [_graphs(run, work, need, place) for work, need in zip(works, needs, strict=True)]
    compiled = [_compile(run, work, place) if config.topology else [] for work in works]
    found = [_facts(*entry, place) for entry in zip(works, needs, compiled, strict=True)]
    for facts, graph in zip(found, graphs, strict=True):
        facts["graphs"] = graph
    _check_memory(works, found, place)
    results: dict[str, Any] = dict(
        mesh=describe(place.mesh), topology=config.topology, limit_bytes=place.limit, models=found
    )
    if len(works) == 1 and not config.topology:
        results |= _plan(run, works[0])
    if config.parity:
        results["parity"] = {shape.path: _parity(run, shape, place) for shape in shapes}
        _check_parity(results["parity"], config.tolerance)
    return results


def _works(run: Run, shapes: Sequence[Shape], place: Place) -> list[Work]:
    """What would run, for every model that has the sites; that one has not is an error, unless parity is all it is for.

    Raises:
      UserError: a model lacks a site, or the mesh does not divide the batch or the features.
    """
    works = []
    for shape in shapes:
        try:
            work = plan_work(Path(shape.path).name, shape.config, run.configs)
        except UserError as error:
            if not run.configs["preflight"].parity:
                raise
            run.say(f"memory is not counted: {error}")
            continue
        for stack in work.stacks:
            check_divides(work.train, stack.dictionary, len(stack.members), place.mesh)
        works.append(work if place.shares_host else dataclasses.replace(work, backend="jax"))
    return works


def _graphs(run: Run, work: Work, need: Memory, place: Place) -> dict[str, Any] | None:
    """What the attribution graphs take beside the model; None if none are asked for, or nothing is known of them.

    Raises:
      UserError: the longest prompt's graph does not fit; the message says first how many tokens would.
    """
    if work.uncounted:
        run.say(work.uncounted)
    if not work.graphs:
        return None
    graphs, mesh = work.graphs, place.mesh
    room = place.room(need.model)
    check_room(graphs.size, graphs.longest, mesh, room)
    needs, most = graph_bytes(graphs.size, graphs.longest, mesh), fitting_tokens(graphs.size, mesh, room)
    run.say(tables.graphs_line(graphs, needs, most))
    return dict(
        unit=graphs.unit,
        prompts=len(graphs.lengths),
        tokens=graphs.longest,
        rows=graphs.rows,
        fitting_tokens=most,
        bytes={phase: dict(device=bytes_.device, host=bytes_.host) for phase, bytes_ in needs.items()},
    )


def _compile(run: Run, work: Work, place: Place) -> list[dict[str, Any]]:
    """Compiles the stages' programs for the slice; a line for each.

    Raises:
      Interrupted: asked to stop.
    """
    run.say(tables.programs_header(work, run.configs["preflight"].topology))
    rows = []
    for program in programs.stage_programs(work, place.mesh):
        if run.stopping():
            raise Interrupted("preflight: stopped; it starts anew")
        compiled = compile_for(program, place.limit)
        run.say(tables.program_line(program, compiled, place))
        rows.append(dict(name=program.name, size=program.size, flops=program.flops, **dataclasses.asdict(compiled)))
    largest = max(rows, key=lambda row: row["memory"])
    run.say(tables.verdict_line(work, largest["name"], largest["memory"], all(row["fits"] for row in rows), place))
    return rows


def _facts(work: Work, need: Memory, compiled: Sequence[Mapping[str, Any]], place: Place) -> dict[str, Any]:
    """One model's entry in the results; what was compiled decides whether it fits."""
    model = work.model
    return dict(
        name=work.name,
        family=model.family,
        layers=model.n_layers,
        d=model.d_model,
        parameters=memory.parameters(model),
        dtype=work.dtype,
        bytes=dict(dataclasses.asdict(need), stages=need.stages),
        peak_bytes=max((row["memory"] for row in compiled), default=need.peak),
        fits=all(row["fits"] for row in compiled) if compiled else need.peak <= place.limit,
        replicated=memory.replicated(work, place.mesh.shape),
        programs=list(compiled),
    )


def _check_memory(works: Sequence[Work], found: Sequence[Mapping[str, Any]], place: Place) -> None:
    """A ``UserError`` that names the models that do not fit, and what would."""
    messages = []
    for work, facts in zip(works, found, strict=True):
        if not facts["fits"]:
            changes = advice(work, place.mesh.shape, place.limit, place.kind, facts["peak_bytes"])
            messages.append(
                f"{work.name} needs about {facts['peak_bytes'] / GIB:.1f} GiB per device, but there are "
                f"{place.limit / GIB:.1f}: use {', or '.join(changes) or 'a smaller model'}"
            )
    if messages:
        raise UserError("; ".join(messages))


def _plan(run: Run, work: Work) -> dict[str, Any]:
    """What the run reads and writes and how long it takes; a ``UserError`` if the disk is too small."""
    configs = run.configs
    documents = read_corpus(configs["corpus"])
    tokens = times.corpus_tokens(documents, configs["corpus"])
    rates = times.matmul_rates()
    seconds = times.stage_seconds(work, configs, len(documents), tokens, rates)
    rows = times.recorded_rows(work, len(documents), tokens, configs["capture"].last)
    needed, free = times.disk_bytes(work, rows), psutil.disk_usage(str(run.folder)).free
    shown = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in rates.items())
    run.say(f"text: {len(documents):,} documents, about {tokens:,} tokens; matrix products: {shown}")
    if rates["bfloat16"] < rates["float32"]:
        for flag, dtype in {"--capture.dtype": work.capture, "--train.matmul": work.train.matmul}.items():
            if dtype == "bfloat16":
                run.say(f"this machine multiplies bfloat16 slower than float32: {flag}=float32 would take less time")
    run.say(f"disk: about {needed / GIB:.1f} GiB needed, {free / GIB:.1f} free in {run.folder}")
    stages = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
    units = causal_units(work, configs)
    for unit, part in units.items():
        fits = f", {part.fits:,} probes to fit" if part.fits else ""
        run.say(f"{unit}: about {part.rows:,} rows, {part.tokens:,} tokens{fits}")
    run.say(f"roughly {sum(seconds.values()) / 60:.0f} minutes if nothing is done yet: {stages}")
    if needed > free:
        raise UserError(
            f"the run needs about {needed / GIB:.1f} GiB of disk, but {free / GIB:.1f} are free for {run.folder}: "
            "use another --workdir or a smaller --corpus.max_tokens"
        )
    return dict(
        documents=len(documents),
        tokens=tokens,
        disk_bytes=needed,
        disk_free_bytes=free,
        matmul_flops_per_second=rates,
        seconds=seconds,
        causal={unit: dict(rows=part.rows, tokens=part.tokens, fits=part.fits) for unit, part in units.items()},
    )


def _check_parity_is_possible(shapes: Sequence[Shape], topology: str) -> None:
    if topology:
        raise UserError("--preflight.parity runs on the devices at hand: leave --preflight.topology out")
    for shape in shapes:
        if not shape.has_weights:
            raise UserError(
                f"--preflight.parity runs the model, but {shape.path} is only its shape: give a hub id or a folder"
            )


def _parity(run: Run, shape: Shape, place: Place) -> dict[str, dict[str, float]]:
    """Measures and prints; the largest error of every kind of site, on each kind of tokens."""
    run.say(f"{shape.path}: decoder against transformers in {run.configs['model'].dtype}; largest relative error")
    found = parity.measure(run.configs, named(shape.path, run.configs["model"]), place.mesh)
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
