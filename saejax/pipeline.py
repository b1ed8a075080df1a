"""The stages of a run, one after the other: found finished, resumed, or done anew."""

import contextlib
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from saejax import config as configuration
from saejax.errors import Interrupted, UserError, one_of
from saejax.preregistration import shows_data, write_rules
from saejax.registry import STAGES, groups_of
from saejax.results import to_json
from saejax.settings import MeshConfig
from saejax.stage import Configs, Stage, load
from saejax.usage import forget_peak, peak_device_bytes, peak_host_bytes
from saejax.workspace import SUMMARY, Run, Workspace, fingerprint, now, package_versions

_LOOK_EVERY = 0.5  # seconds, while another process works


class Workplan:
    """The units of a configuration and their fingerprints.

    Args:
      configs: the groups of configuration.
    """

    def __init__(self, configs: Configs):
        self.configs = configs
        self._marks: dict[str, str] = {}
        self._sources: dict[Any, str] = {}

    def needs(self, unit: str) -> list[str]:
        """The units that a unit reads."""
        stage, _, name = unit.partition("/")
        needs = list(STAGES[stage].needs(self.configs, name))
        for need in needs:
            needed_stage, _, needed_name = need.partition("/")
            if needed_name:
                flag = "train.kinds" if needed_stage == "train" else f"{needed_stage}.dictionaries"
                one_of(needed_name, STAGES[needed_stage].names(self.configs), f"dictionary for {stage} (--{flag})")
        return needs

    def mark(self, unit: str) -> str:
        """The unit's fingerprint: a hash of its settings, of the units it reads and of the files from outside."""
        if unit not in self._marks:
            stage, _, name = unit.partition("/")
            settings = {group: configuration.identity(self.configs[group], name) for group in groups_of(STAGES[stage])}
            needs = {need: self.mark(need) for need in self.needs(unit)}
            data: dict[str, Any] = dict(
                unit=unit, settings=settings, needs=needs, sources=self._read(STAGES[stage], name)
            )
            if STAGES[stage].version > 1:  # the first is not named, so that what was made before there were any stays
                data["version"] = STAGES[stage].version
            self._marks[unit] = fingerprint(data)
        return self._marks[unit]

    def _read(self, stage: Stage, name: str) -> dict[str, str]:
        """Fingerprints of what a unit reads from outside; what units share is looked at once."""
        for identity in stage.identity.values():
            if identity not in self._sources:
                self._sources[identity] = identity(self.configs)
        shared = {source: self._sources[identity] for source, identity in stage.identity.items()}
        return shared | {source: identity(self.configs, name) for source, identity in stage.unit_identity.items()}


def run_stages(
    stages: Sequence[str],
    configs: Configs,
    workdir: str,
    say: Callable[[str], None] = print,
    stopping: Callable[[], bool] = lambda: False,
    only: str = "",
    instead: Mapping[str, Callable[[Run], Any]] = types.MappingProxyType({}),
) -> None:
    """Runs the units of ``stages``, in order; what is finished and unchanged is left as it is.

    Args:
      stages: names from ``STAGES``.
      configs: every group of configuration.
      workdir: the folder of the run.
      say: prints a line.
      stopping: whether the process was asked to stop.
      only: the one unit to run, such as "train/topk"; "": all.
      instead: by stage, what does its work in place of ``Stage.run``, with a model that is loaded already, say.

    Raises:
      UserError: bad input, or a stage's input has not been made.
      Interrupted: asked to stop, and saved.
    """
    for stage in stages:
        one_of(stage, STAGES, "stage")
    workspace = Workspace(workdir)
    units = [unit for stage in stages for unit in STAGES[stage].units(configs)]
    if not units:
        raise UserError(f"{', '.join(stages)} has nothing to do with these settings: --help says what to name")
    if only:
        units = [one_of(only, units, "unit (--unit)")]
    with _joined(workspace, configs) as configs:
        plan = Workplan(configs)
        say = say if _first(plan) else _silent
        for unit in units:
            if stopping():
                raise Interrupted(f"stopped before {unit}; what is done is kept: run the same command to go on")
            _run_unit(workspace, plan, unit, say, stopping, instead)


def _run_unit(
    workspace: Workspace, plan: Workplan, unit: str, say: Callable, stopping: Callable, instead: Mapping[str, Callable]
) -> None:
    stage, _, name = unit.partition("/")
    mark = plan.mark(unit)
    if workspace.finished(stage, name, mark):
        say(f"{unit}: done before, unchanged")
        return
    inputs = {need: _input_folder(workspace, plan, unit, need) for need in plan.needs(unit)}
    together, several = STAGES[stage].many_processes, plan.configs["mesh"].processes > 1
    if not (together or _first(plan)):
        return _wait_for_first(workspace, unit, mark)
    if _first(plan) and shows_data(stage):
        write_rules(workspace.root, plan.configs)
    folder, found = workspace.begin(stage, name, mark) if _first(plan) else (workspace.folder(stage, name), "")
    if together and several:  # no process may read what the first one moves away
        from saejax.parallel import wait_for_all

        wait_for_all(f"{unit} begun")
    if found and found != "resumed":
        say(f"{unit}: settings or inputs changed; the old result was moved to {found}")
    say(f"{unit}: {'going on' if found == 'resumed' else 'started'}")
    started, clock = now(), time.monotonic()
    forget_peak()
    run = Run(stage, name, folder, plan.configs, inputs, lambda line: say(f"  {unit}: {line}"), stopping)
    with load("saejax.parallel:alone")() if several and not together else contextlib.nullcontext():
        results = (instead.get(stage) or load(STAGES[stage].run))(run)
    seconds = round(time.monotonic() - clock, 2)
    if not _first(plan):
        return _wait_for_first(workspace, unit, mark)
    peaks = dict(peak_host_bytes=peak_host_bytes(), peak_device_bytes=peak_device_bytes())
    measured = dict(start=started, seconds=seconds) | {name: peak for name, peak in peaks.items() if peak is not None}
    summary = _describe(plan, stage, inputs) | measured | dict(results=to_json(results))
    workspace.finish(stage, name, mark, summary)
    say(f"{unit}: done in {seconds:.1f} s")


def _describe(plan: Workplan, stage: str, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """What a summary says of settings, inputs, versions and devices."""
    read = (*groups_of(STAGES[stage]), *map(configuration.group_name, STAGES[stage].placement))
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


def _first(plan: Workplan) -> bool:
    return plan.configs["mesh"].process_id == 0


def _input_folder(workspace: Workspace, plan: Workplan, unit: str, need: str) -> Path:
    stage, _, name = need.partition("/")
    if not workspace.finished(stage, name, plan.mark(need)):
        exists = (workspace.folder(stage, name) / SUMMARY).exists()
        state = "was made with other settings" if exists else "has not been made"
        raise UserError(
            f"{unit} reads {need}, which {state} in {workspace.root}: run experiments.{stage} with the same flags first"
        )
    return workspace.folder(stage, name)


@contextlib.contextmanager
def _joined(workspace: Workspace, configs: Configs) -> Iterator[Configs]:
    """The processes of a run together, of which the first one holds the workdir; gives what each of them is to do."""
    mesh: MeshConfig = configs["mesh"]
    if mesh.distributed == "flags" and mesh.processes == 1:
        with workspace.lock():
            yield configs
        return
    from saejax.processes import join

    configs = {**configs, "mesh": join(mesh)}
    with workspace.lock() if configs["mesh"].process_id == 0 else contextlib.nullcontext():
        load("saejax.parallel:wait_for_all")("the workdir is held")
        yield configs


def _wait_for_first(workspace: Workspace, unit: str, mark: str) -> None:
    """Waits until the first process has done a unit.

    Raises:
      Interrupted: it has ended before.
    """
    stage, _, name = unit.partition("/")
    while not workspace.finished(stage, name, mark):
        if workspace.is_free() and not workspace.finished(stage, name, mark):
            raise Interrupted(f"the first process ended before {unit} was done: its output says why")
        time.sleep(_LOOK_EVERY)


def _silent(line: str) -> None:
    """What processes but the first say: all would say the same."""
