"""Disk and memory of what is left of a run, for a dry run: known in seconds, as nothing is compiled."""

from collections.abc import Collection
from pathlib import Path

import jax
import psutil

from saejax.config import Configs
from saejax.errors import UserError
from saejax.models.settings import ModelConfig
from saejax.models.source import runs_in_torch
from saejax.parallel.mesh import make_mesh
from saejax.preflight import rates
from saejax.preflight.plan import compiled_stages, disk_bytes, plan_run
from saejax.preflight.results import PreflightResults
from saejax.preflight.shapes import read_shapes
from saejax.runner.results import load_results
from saejax.runner.workplan import Workplan
from saejax.runner.workspace import Workspace
from saejax.stages.preflight.settings import PreflightConfig
from saejax.tasks.settings import CorpusConfig, TaskConfig

_GIB = 2**30


def describe_needs(configs: Configs, workdir: Path, stages: Collection[str]) -> list[str]:
    """Return lines about the disk and the memory that some stages take; none where they take little.

    Memory is what a preflight with these settings has found, if there was one.

    Args:
      configs: all settings.
      workdir: of the run; it may not exist yet.
      stages: names of the stages that have units to make.
    """
    compiled, lines = compiled_stages(stages), list[str]()
    try:
        if not compiled or runs_in_torch(configs[ModelConfig]):
            return []
        if {"capture", "train"} & {*stages}:
            folder = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
            needed, free = _disk_bytes(configs, stages), psutil.disk_usage(str(folder)).free
            lines.append(f"disk: about {needed / _GIB:.1f} GiB needed, {free / _GIB:.1f} free")
        memory = _memory(configs, workdir)
    except UserError as error:  # said again by the stage that it is about
        return [f"disk and memory: not known: {error}"]
    if memory.keys() >= {*compiled}:
        listed = ", ".join(f"{name} {memory[name] / _GIB:.2f} GiB" for name in compiled)
        return [*lines, f"memory on each device, as preflight found it: {listed}"]
    return [*lines, f"memory: experiments.preflight compiles the programs of {', '.join(compiled)}, and tells it"]


def _disk_bytes(configs: Configs, stages: Collection[str]) -> int:
    """Return the bytes that stages write, by the model's shape and the size of the text."""
    (shape,) = read_shapes(configs | PreflightConfig())
    documents, tokens = rates.used_text(configs[CorpusConfig], configs[TaskConfig])
    mesh = make_mesh(devices=jax.devices()[:1])  # on whatever devices, they write the same
    return disk_bytes(plan_run(shape.path, shape.config, configs, mesh, documents=documents, tokens=tokens), stages)


def _memory(configs: Configs, workdir: Path) -> dict[str, int]:
    """Return the bytes per device of each stage's largest program; none where no preflight had these settings."""
    workspace, plan, memory = Workspace(workdir, read_only=True), Workplan(configs), dict[str, int]()
    if plan.is_done(workspace, "preflight"):
        results: PreflightResults = load_results(workspace.folder("preflight", plan.fingerprint("preflight")))
        for program in (program for model in results.models for program in model.programs):
            name = program.name.partition(":")[0]
            memory[name] = max(program.memory, memory.get(name, 0))
    return memory
