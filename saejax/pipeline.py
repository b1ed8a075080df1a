"""The stages of a run, one after the other: found finished, resumed, or done anew."""

import contextlib
import dataclasses
import importlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from saejax import config as configuration
from saejax.errors import Interrupted, UserError, one_of
from saejax.models.sites import ModuleSite
from saejax.results import to_json
from saejax.settings import BASES
from saejax.stages import STAGES, Configs
from saejax.workspace import SUMMARY, Run, Workspace, fingerprint, now, package_versions


class Plan:
    """The units of a configuration and their fingerprints.

    Args:
      configs: the groups of configuration.
    """

    def __init__(self, configs: Configs):
        self.configs = configs
        self._marks: dict[str, str] = {}

    def units(self, stage: str) -> list[str]:
        """The stage's units, as "stage" or "stage/name"."""
        return [f"{stage}/{name}" if name else stage for name in STAGES[stage].names(self.configs)]

    def needs(self, unit: str) -> list[str]:
        """The units that a unit reads."""
        stage, _, name = unit.partition("/")
        needs = list(STAGES[stage].needs(self.configs, name))
        for need in needs:
            needed_stage, _, needed_name = need.partition("/")
            if needed_name:
                one_of(needed_name, STAGES[needed_stage].names(self.configs), f"dictionary for {stage} (--train.kinds)")
        return needs

    def mark(self, unit: str) -> str:
        """The unit's fingerprint: a hash of its settings, of the units it reads and of the files from outside."""
        if unit not in self._marks:
            stage, _, name = unit.partition("/")
            data = dict(
                unit=unit,
                settings={group: configuration.identity(self.configs[group], name) for group in STAGES[stage].groups},
                needs={need: self.mark(need) for need in self.needs(unit)},
                sources={source: self._source(source, name) for source in STAGES[stage].sources},
            )
            self._marks[unit] = fingerprint(data)
        return self._marks[unit]

    def _source(self, source: str, name: str) -> str:
        key = f"<{source}/{name}>" if source == "benchmark" else f"<{source}>"
        if key not in self._marks:
            if source == "model":
                decoder = not all(map(ModuleSite.names, self.configs["capture"].sites))
                resolve = importlib.import_module("saejax.models.source").resolve
                mark = resolve(self.configs[source], decoder).fingerprint
            elif source == "shapes":
                mark = importlib.import_module("saejax.preflight.shapes").identity(self.configs)
            elif source == "units":
                asked = [
                    unit for stage in ("ablate", "patch", "probe", "study", "attribute") for unit in self.units(stage)
                ]
                mark = fingerprint(asked)
            elif source == "initial":
                folder = self.configs["train"].init_from
                mark = importlib.import_module("saejax.training.initial").identity(folder) if folder else ""
            elif source == "bases":
                folders = [name for name in self.configs["ablate"].baselines if name not in BASES]
                identity = importlib.import_module("saejax.training.initial").identity
                mark = fingerprint([identity(folder) for folder in folders])
            elif source == "stream":
                mark = self._stream() if self.configs["train"].source == "model" else ""
            elif source == "graph":
                mark = importlib.import_module("saejax.attribution.requests").identity(self.configs["graph"])
            elif source == "prompts":
                mark = importlib.import_module("saejax.tasks.own_prompts").identity(self.configs["task"])
            elif source == "benchmark":
                mark = importlib.import_module("saejax.tasks.benchmarks").identity(name, self.configs["task"])
            else:
                mark = importlib.import_module("saejax.tasks.corpora").identity(self.configs[source])
            self._marks[key] = mark
        return self._marks[key]

    def _stream(self) -> str:
        """What training straight from the model depends on beside its own settings."""
        capture = dataclasses.replace(self.configs["capture"], sites=())  # those of training are read
        settings = [
            configuration.identity(config) for config in (self.configs["model"], self.configs["corpus"], capture)
        ]
        return fingerprint([self._source("model", ""), self._source("corpus", ""), settings])


def run_stages(
    stages: Sequence[str],
    configs: Configs,
    workdir: str,
    say: Callable[[str], None] = print,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Runs the units of ``stages``, in order; what is finished and unchanged is left as it is.

    Args:
      stages: names from ``STAGES``.
      configs: every group of configuration.
      workdir: the folder of the run.
      say: prints a line.
      stopping: whether the process was asked to stop.

    Raises:
      UserError: bad input, or a stage's input has not been made.
      Interrupted: asked to stop, and saved.
    """
    for stage in stages:
        one_of(stage, STAGES, "stage")
    workspace, plan = Workspace(workdir), Plan(configs)
    if not any(plan.units(stage) for stage in stages):
        raise UserError(f"{', '.join(stages)} has nothing to do with these settings: --help says what to name")
    with workspace.lock() if configs["mesh"].process_id == 0 else contextlib.nullcontext():  # the first one holds it
        for stage in stages:
            for unit in plan.units(stage):
                if stopping():
                    raise Interrupted(f"stopped before {unit}; what is done is kept: run the same command to go on")
                _run_unit(workspace, plan, unit, say, stopping)


def _run_unit(workspace: Workspace, plan: Plan, unit: str, say: Callable, stopping: Callable) -> None:
    stage, _, name = unit.partition("/")
    mark = plan.mark(unit)
    if workspace.finished(stage, name, mark):
        say(f"{unit}: done before, unchanged")
        return
    inputs = {need: _input_folder(workspace, plan, unit, need) for need in plan.needs(unit)}
    _join_processes(stage, plan.configs)
    folder, found = workspace.begin(stage, name, mark) if _first(plan) else (workspace.folder(stage, name), "")
    if plan.configs["mesh"].processes > 1:  # no process may read what the first one moves away
        importlib.import_module("saejax.parallel").wait_for_all(f"{unit} begun")
    if found and found != "resumed":
        say(f"{unit}: settings or inputs changed; the old result was moved to {found}")
    say(f"{unit}: {'going on' if found == 'resumed' else 'started'}")
    started, clock = now(), time.monotonic()
    module, function = STAGES[stage].function.split(":")
    run = Run(stage, name, folder, plan.configs, inputs, lambda line: say(f"  {unit}: {line}"), stopping)
    results = getattr(importlib.import_module(module), function)(run)
    seconds = round(time.monotonic() - clock, 2)
    if _first(plan):
        summary = _describe(plan, stage, inputs) | dict(start=started, seconds=seconds, results=to_json(results))
        workspace.finish(stage, name, mark, summary)
    say(f"{unit}: done in {seconds:.1f} s")


def _describe(plan: Plan, stage: str, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """What a summary says of settings, inputs, versions and devices."""
    read = (*STAGES[stage].groups, *STAGES[stage].placement)
    return dict(
        config={group: configuration.to_json(plan.configs[group]) for group in read},
        inputs={need: plan.mark(need) for need in inputs},
        packages=package_versions(),
        devices=_devices(),
        seeds={group: plan.configs[group].seed for group in read if hasattr(plan.configs[group], "seed")},
    )


def _devices() -> dict[str, Any] | None:
    """The devices as JAX sees them; None if the stages so far have not used JAX."""
    if "jax" not in sys.modules:
        return None
    import jax

    kinds = sorted({device.device_kind for device in jax.devices()})
    return dict(count=jax.device_count(), kinds=kinds, processes=jax.process_count())


def _first(plan: Plan) -> bool:
    return plan.configs["mesh"].process_id == 0


def _input_folder(workspace: Workspace, plan: Plan, unit: str, need: str) -> Path:
    stage, _, name = need.partition("/")
    if not workspace.finished(stage, name, plan.mark(need)):
        exists = (workspace.folder(stage, name) / SUMMARY).exists()
        state = "was made with other settings" if exists else "has not been made"
        raise UserError(
            f"{unit} reads {need}, which {state} in {workspace.root}: run experiments.{stage} with the same flags first"
        )
    return workspace.folder(stage, name)


def _join_processes(stage: str, configs: Configs) -> None:
    mesh = configs["mesh"]
    if mesh.processes == 1:
        return
    if not STAGES[stage].many_processes:
        able = " and ".join(f"experiments.{name}" for name in STAGES if STAGES[name].many_processes)
        raise UserError(
            f"{stage} runs in one process: run it with --mesh.processes=1, and {able} with {mesh.processes}"
        )
    import jax

    if not jax.distributed.is_initialized():
        from saejax.parallel import start_processes

        start_processes(mesh)
