"""The stages of a run, one after the other: found finished, resumed, or done anew."""

import contextlib
import dataclasses
import functools
import itertools
import json
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from saejax import config as configuration
from saejax.config import Configs
from saejax.errors import Interrupted, UserError, one_of
from saejax.files import read_object
from saejax.parallel.cluster import check_same, join, joined, label
from saejax.parallel.peers import Peers
from saejax.parallel.teams import Left, Team, deal, seen
from saejax.parallel.watchdog import watched
from saejax.preregistration import shows_data, write_rules
from saejax.registry import STAGES, groups_of
from saejax.results import to_json
from saejax.settings import MeshConfig, ModelConfig
from saejax.stage import load
from saejax.usage import forget_peak, peak_device_bytes, peak_host_bytes
from saejax.workplan import Workplan, changes
from saejax.workspace import STARTED, SUMMARY, Run, Workspace, now, package_versions

_OWN = {("mesh", "process_id"), ("mesh", "coordinator")}  # settings that differ between the processes of a run


def run_stages(
    stages: Sequence[str],
    configs: Configs,
    workdir: str | Workspace,
    say: Callable[[str], None] = print,
    stopping: Callable[[], bool] = lambda: False,
    only: str = "",
    instead: Mapping[str, Callable[[Run], Any]] = types.MappingProxyType({}),
) -> None:
    """Runs the units of ``stages``, in order; what is finished and unchanged is left as it is.

    Args:
      stages: names from ``STAGES``.
      workdir: the folder of the run, or what keeps it.
      stopping: whether the process was asked to stop.
      only: the one unit to run, such as "train/topk"; "": all.
      instead: by stage, what does its work in place of ``Stage.run``, with a model that is loaded already, say.

    Raises:
      UserError: bad input, or a stage's input has not been made.
      Interrupted: asked to stop, and saved.
    """
    for stage in stages:
        one_of(stage, STAGES, "stage")
    workspace = workdir if isinstance(workdir, Workspace) else Workspace(workdir)
    if len(stages) > 1:
        stages = _without_decoder_stages(stages, configs, say)
    units = [unit for stage in stages for unit in STAGES[stage].units(configs)]
    if not units:
        more = f"it {STAGES[stages[0]].summary}" if len(stages) == 1 else "--help says what to name"
        raise UserError(f"{', '.join(stages)} has nothing to do with these settings; {more}")
    for stage in stages:
        if STAGES[stage].units(configs):
            STAGES[stage].check(configs)
    if only:
        units = [one_of(only, units, "unit (--unit)")]
    with _joined(workspace, configs, say) as (configs, peers):
        plan, watchdog = Workplan(configs), configs[MeshConfig].watchdog
        said = (lambda line: say(label() + line)) if peers else say
        if peers:
            peers.stopping = stopping
            check_same(peers, _told(configs, units))
            peers.meet("all are started alike")  # or the first one would begin a unit
        asked = functools.partial(_asked, stopping, workspace)
        with watched(watchdog, asked, peers.step if peers else lambda: None) as stopping:
            work = _Work(workspace, plan, said, stopping, instead)
            for stage, own in itertools.groupby(units, lambda unit: unit.partition("/")[0]):
                for unit, team in _dealt(workspace, plan, stage, list(own), peers, said):
                    if stopping():
                        raise Interrupted(f"stopped before {unit}; what is done is kept: run the same command to go on")
                    _run_unit(work, unit, team)


def _without_decoder_stages(stages: Sequence[str], configs: Configs, say: Callable[[str], None]) -> Sequence[str]:
    """Leave out stages that only the JAX decoder's models have, where the model runs in PyTorch."""
    if not any(STAGES[stage].needs_decoder for stage in stages):
        return stages
    from saejax.models.source import runs_in_torch

    model = configs[ModelConfig]
    if not runs_in_torch(model):
        return stages
    left_out = [stage for stage in stages if STAGES[stage].needs_decoder]
    say(f"{model.path} runs in PyTorch; left out, for they need a model of a JAX family: {', '.join(left_out)}")
    return [stage for stage in stages if stage not in left_out]


def _asked(stopping: Callable[[], bool], workspace: Workspace) -> bool:
    return stopping() or workspace.lost


def _told(configs: Configs, units: Sequence[str]) -> dict[str, str]:
    """What all processes of a run must have alike: settings by their flags, units, versions."""
    flags = {
        f"--{group}.{name}": json.dumps(value)
        for config in configs
        for group in (configuration.group_name(type(config)),)
        for name, value in configuration.to_json(config).items()
        if (group, name) not in _OWN
    }
    return flags | {"units": " ".join(units), "Python": sys.version.split()[0]} | package_versions()


def _dealt(
    workspace: Workspace, plan: Workplan, stage: str, units: Sequence[str], peers: Peers | None, say: Callable
) -> Iterator[tuple[str, Team]]:
    """The units of a stage that this process works on, with whom; goes on when all processes have done theirs."""
    if peers is None or STAGES[stage].processes == "all":
        yield from ((unit, Team(peers, unit, range(peers.count if peers else 1))) for unit in units)
        return
    finished = [unit for unit in units if _finished(workspace, plan, unit)] if peers.own == 0 else []
    if peers.own == 0 and shows_data(stage) and len(finished) < len(units):
        write_rules(workspace.root, plan.configs)  # before others may
    finished = peers.tell(f"{stage}: finished", "\n".join(finished)).splitlines()
    if peers.own == 0:
        for unit in finished:
            say(f"{unit}: done before, unchanged")
    left = [unit for unit in units if unit not in finished]
    with load("saejax.parallel.collectives:alone")():
        yield from deal(peers, stage, left)
    peers.meet(f"{stage}: done")
    seen([workspace.root / unit / SUMMARY for unit in left])


def _finished(workspace: Workspace, plan: Workplan, unit: str) -> bool:
    stage, _, name = unit.partition("/")
    return workspace.finished(stage, name, plan.mark(unit))


@dataclasses.dataclass(frozen=True)
class _Work:
    """What is the same of all units of a run; ``say``, ``stopping`` and ``instead`` are those of ``run_stages``."""

    workspace: Workspace
    plan: Workplan
    say: Callable[[str], None]
    stopping: Callable[[], bool]
    instead: Mapping[str, Callable[[Run], Any]]


def _run_unit(work: _Work, unit: str, team: Team) -> None:
    stage, _, name = unit.partition("/")
    workspace, say, mark, processes = work.workspace, work.say, work.plan.mark(unit), STAGES[stage].processes
    if workspace.finished(stage, name, mark):
        if team.leads:
            say(f"{unit}: done before, unchanged")
        return
    inputs = {need: _input_folder(workspace, work.plan, unit, need) for need in work.plan.needs(unit)}
    folder, moved = workspace.folder(stage, name), ""
    if team.leads:
        if shows_data(stage):
            write_rules(workspace.root, work.plan.configs)
        folder, found = workspace.begin(stage, name, mark, _start(work.plan, unit))
        if found and found != "resumed":
            moved = found
            what = _differs(work.plan, unit, Path(moved)) or "settings or inputs changed"
            say(f"{unit}: {what}; the old result was moved to {moved}")
        waiting = f" by one of {team.size} processes" if processes == "one" and team.size > 1 else ""
        say(f"{unit}: {'going on' if found == 'resumed' else 'started'}{waiting}")
    team.meet("begun")  # no process may read what the first one moves away
    if processes == "all" and team.size > 1:
        load("saejax.parallel.collectives:wait_for_all")(f"{unit} is begun")
    try:
        if team.leads or processes != "one":
            _run_stage(work, unit, inputs, team)
    except UserError:
        if moved and workspace.put_back(stage, name, Path(moved)):
            say(f"{unit}: nothing was written; the old result is where it was")
        raise
    team.meet("done")
    seen([folder / SUMMARY])


def _start(plan: Workplan, unit: str) -> dict[str, Any]:
    """What ``started.json`` says beside the fingerprint."""
    stage = unit.partition("/")[0]
    return dict(
        start=now(), depends_on=plan.depends_on(unit), config=_settings(plan, stage), packages=package_versions()
    )


def _differs(plan: Workplan, unit: str, folder: Path) -> str:
    """In which settings and inputs the unit in the folder was begun otherwise; "" if it does not say."""
    started = read_object(folder / STARTED) if (folder / STARTED).exists() else {}
    return changes(started["depends_on"], plan.depends_on(unit)) if "depends_on" in started else ""


def _run_stage(work: _Work, unit: str, inputs: Mapping[str, Path], team: Team) -> None:
    """Runs a stage's function; the first process of the team writes the unit's summary."""
    workspace, plan, (stage, _, name) = work.workspace, work.plan, unit.partition("/")

    def said(line: str) -> None:
        if team.speaks:
            work.say(f"  {unit}: {line}")

    started, clock = now(), time.monotonic()
    forget_peak()
    folder, of_items = workspace.folder(stage, name), STAGES[stage].processes == "items"
    run = Run(stage, name, folder, plan.configs, inputs, said, work.stopping, team if of_items else Team())
    try:
        results = (work.instead.get(stage) or load(STAGES[stage].run))(run)
    except Left:
        return
    if not team.leads:
        return
    seconds = round(time.monotonic() - clock, 2)
    peaks = dict(peak_host_bytes=peak_host_bytes(), peak_device_bytes=peak_device_bytes())
    measured = dict(start=started, seconds=seconds) | {name: peak for name, peak in peaks.items() if peak is not None}
    summary = _describe(plan, stage, inputs) | measured | dict(results=to_json(results))
    workspace.finish(stage, name, plan.mark(unit), summary)
    work.say(f"{unit}: done in {seconds:.1f} s")


def _describe(plan: Workplan, stage: str, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """What a summary says of settings, inputs, versions and devices."""
    settings = _settings(plan, stage)
    return dict(
        config=settings,
        inputs={need: plan.mark(need) for need in inputs},
        packages=package_versions(),
        devices=_devices(),
        seeds={group: own["seed"] for group, own in settings.items() if "seed" in own},
    )


def _settings(plan: Workplan, stage: str) -> dict[str, dict[str, Any]]:
    """All settings of the groups that a stage reads, JSON data."""
    groups = (*groups_of(STAGES[stage]), *STAGES[stage].placement)
    return {configuration.group_name(group): configuration.to_json(plan.configs[group]) for group in groups}


def _devices() -> dict[str, Any] | None:
    """The devices as JAX sees them; None if the stages so far have not used JAX."""
    if "jax" not in sys.modules:
        return None
    import jax

    kinds = sorted({device.device_kind for device in jax.devices()})
    return dict(count=jax.device_count(), kinds=kinds, processes=jax.process_count())


def _input_folder(workspace: Workspace, plan: Workplan, unit: str, need: str) -> Path:
    stage, _, name = need.partition("/")
    if not workspace.finished(stage, name, plan.mark(need)):
        folder, state = workspace.folder(stage, name), "has not been made"
        if (folder / SUMMARY).exists():
            what = _differs(plan, need, folder)
            state = f"was made with other settings{f' ({what})' if what else ''}"
        raise UserError(
            f"{unit} reads {need}, which {state} in {workspace.url}: run experiments.{stage} with the same flags first"
        )
    return workspace.bring(stage, name)


@contextlib.contextmanager
def _joined(
    workspace: Workspace, configs: Configs, say: Callable[[str], None]
) -> Iterator[tuple[Configs, Peers | None]]:
    """The processes of a run together, of which the first one holds the workdir; what each of them is to do."""
    if not configs[MeshConfig].together:
        with workspace.lock(say):
            yield configs, None
        return
    configs |= join(configs[MeshConfig], workspace.root, say)
    peers = joined()
    with workspace.lock(say, whole=True) if peers is None or peers.own == 0 else contextlib.nullcontext():
        if peers:
            peers.meet("the workdir is held")
        yield configs, peers
