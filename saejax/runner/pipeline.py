"""Run the stages of a pipeline, one after the other: each unit is found finished, resumed, or made.

1. List the units of the stages and refuse bad settings before anything runs; several processes compare what units read.
2. For every unit: skip it if it is done; otherwise claim its folder, run its stage, write its summary.
3. Several processes run one unit together, or split its items (``Stage.processes``).
"""

import contextlib
import dataclasses
import json
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from saejax import config as configuration
from saejax.config import Configs
from saejax.errors import CheckFailed, Interrupted, OtherFailed, UserError, one_of, out_of_room
from saejax.files import read_object
from saejax.models.settings import ModelConfig
from saejax.models.source import runs_in_torch
from saejax.parallel.cluster import check_same, join, joined_processes, process_label
from saejax.parallel.collectives import alone, wait_for_all
from saejax.parallel.processes import Processes, ProcessShare, ShareDone
from saejax.parallel.settings import MeshConfig
from saejax.results import to_json
from saejax.runner.changes import describe_changes
from saejax.runner.checks import check_stages
from saejax.runner.plan import REUSED, describe_plan, inputs_to_compare, is_read_later, plan_units
from saejax.runner.profiling import Profiler
from saejax.runner.registry import all_stages, flag_of
from saejax.runner.stage import split_unit
from saejax.runner.usage import check_budget, count_hours, forget_peak, peak_device_bytes, peak_host_bytes
from saejax.runner.workplan import Workplan
from saejax.runner.workspace import STARTED, SUMMARY, Run, Stack, Workspace, now
from saejax.versions import package_versions

_OF_PROCESS = {("mesh", "process_id"), ("mesh", "coordinator")}  # settings that differ between processes of a run


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options of a run that are no settings."""

    only: str = ""  #: the one unit to run, such as "train/topk"; "": all
    take_over: bool = False  #: replace the claims of other processes
    keep_going: bool = False  #: after a unit failed, go on with units that do not depend on it
    profile: str = ""  #: folder for traces of a few steps of each unit; "": none
    dry_run: bool = False  #: print what would be done with each unit, and do nothing
    budget_device_hours: float = 0.0  #: device-hours of a workdir after which no further unit is begun; 0: no limit


@dataclasses.dataclass(frozen=True)
class _Pipeline:
    """State shared by a run's units; ``say`` and the fields after ``processes`` are arguments of ``run_stages``."""

    workspace: Workspace
    plan: Workplan
    processes: Processes | None
    say: Callable[[str], None]
    stopping: Callable[[], bool]
    substitutes: Mapping[str, Callable[[Run], Any]]
    options: "RunOptions"
    units: Sequence[str]  #: of this run

    @property
    def leads(self) -> bool:
        """True if this process writes the files that exist only once."""
        return self.processes is None or self.processes.rank == 0

    def report(self, unit: str, line: str) -> None:
        """Print a line about a unit, and append it to the unit's log file."""
        self.say(line)
        self.log(unit, line)

    def log(self, unit: str, text: str) -> None:
        """Append text to the unit's log file."""
        self.workspace.log(unit, text, self.processes.rank if self.processes else 0)


def run_stages(
    stages: Sequence[str],
    configs: Configs,
    workdir: str | Workspace,
    say: Callable[[str], None] = print,
    stopping: Callable[[], bool] = lambda: False,
    options: RunOptions = RunOptions(),
    substitutes: Mapping[str, Callable[[Run], Any]] = types.MappingProxyType({}),
) -> None:
    """Run the units of ``stages``, in order; finished units are left as they are.

    Args:
      stages: names from ``all_stages()``.
      configs: all settings.
      workdir: the folder of the run, or what keeps it.
      say: prints a line.
      stopping: whether the process was asked to stop.
      options: which units, and how to go on.
      substitutes: functions by stage that replace ``Stage.run``, for example with a model that is loaded already.

    Raises:
      UserError: bad input, or a stage's input has not been made.
      CheckFailed: with ``keep_going``, some units failed.
      Interrupted: asked to stop, and saved.
    """
    for stage in stages:
        one_of(stage, all_stages(), "stage")
    workspace = workdir if isinstance(workdir, Workspace) else Workspace(workdir, read_only=options.dry_run)
    # A binary of one stage gives that stage's own error instead.
    if len(stages) > 1:
        stages = without_decoder_stages(stages, configs, say)
    units = [unit for stage in stages for unit in all_stages()[stage].units(configs)]
    if not units:
        more = f"it {all_stages()[stages[0]].summary}" if len(stages) == 1 else "--help says what to name"
        raise UserError(f"{', '.join(stages)} has nothing to make with these settings; {more}")
    check_stages(stages, configs, workspace.root)
    if options.only:
        units = [one_of(options.only, units, "unit (--unit)")]
    if not options.keep_going:  # which makes what can be made
        Workplan(configs).check(units)
    if options.dry_run:
        configs |= _expected_mesh(configs[MeshConfig], workspace, say)
        planned = plan_units(Workplan(configs), workspace, units)
        left = {unit.name.partition("/")[0] for unit in planned if unit.todo != REUSED}
        needs = [line for stage in all_stages().values() for line in stage.foresee(configs, workspace.root, left)]
        for line in describe_plan(planned, needs):
            say(line)
        return
    processes = None
    if configs[MeshConfig].together:
        _check_keep_going(options, configs)
        configs |= join(configs[MeshConfig], say, stopping)
        _check_keep_going(options, configs)  # only now is their number known where the cluster gives it
        processes = joined_processes()
    if processes:
        processes.stopping = stopping
        stopping = processes.should_stop
        check_same(processes, _settings_to_compare(configs, units))
        # By a plan of its own: a unit may read a folder that an earlier one makes.
        check_same(processes, inputs_to_compare(Workplan(configs), units))
        processes.barrier("all have the same settings")  # before the first process begins a unit
    prefixed = (lambda line: say(process_label() + line)) if processes else say
    pipeline = _Pipeline(workspace, Workplan(configs), processes, prefixed, stopping, substitutes, options, units)
    failed: dict[str, str] = {}
    for unit in units:
        if stopping():
            raise Interrupted(f"stopped before {unit}; what is done is kept: run the same command to go on")
        # Between units, so that what was begun is always finished.
        check_budget(workspace, options.budget_device_hours, prefixed)
        try:
            # Of a stack that failed, all members count as failed.
            needs = [split_unit(need)[0] for need in pipeline.plan.needs(unit)] if failed else []
            if missing := [need for need in needs if need in failed]:
                failed[unit] = f"skipped: {missing[0]} failed"
                continue
            _run_unit(pipeline, unit)
        except Interrupted:
            raise
        except Exception as error:
            expected = isinstance(error, UserError | CheckFailed | OtherFailed) or out_of_room(error)
            pipeline.log(unit, f"failed: {error}" if expected else traceback.format_exc())
            if not options.keep_going:
                raise
            failed[unit] = " ".join(str(error).split()) or type(error).__name__
            pipeline.report(unit, f"{unit}: failed: {failed[unit]}")
            if not expected:
                traceback.print_exc()
    if failed:
        lines = "; ".join(f"{unit}: {why}" for unit, why in failed.items())
        raise CheckFailed(f"{len(failed)} of {len(units)} units: {lines}")


def _expected_mesh(mesh: MeshConfig, workspace: Workspace, say: Callable[[str], None]) -> MeshConfig:
    """Return the mesh with the number of processes as in the last preflight, where only the cluster will tell it."""
    previous = workspace.current("preflight")
    if mesh.distributed != "auto" or previous is None:
        return mesh
    settings = read_object(previous / STARTED, "depends_on")["depends_on"]["settings"]
    count = settings["mesh.processes"]
    say(f"--mesh.distributed=auto: the plan is for {count} processes, as many as the last preflight here had")
    return dataclasses.replace(mesh, processes=count)


def _check_keep_going(options: RunOptions, configs: Configs) -> None:
    if options.keep_going and configs[MeshConfig].processes > 1:
        raise UserError("--keep_going is for one process: of several, one that fails ends the run; leave it out")


def without_decoder_stages(stages: Sequence[str], configs: Configs, say: Callable[[str], None]) -> Sequence[str]:
    """Leave out stages that only the JAX decoder's models have, where the model runs in PyTorch."""
    if not any(all_stages()[stage].needs_decoder for stage in stages):
        return stages
    model = configs[ModelConfig]
    if not runs_in_torch(model):
        return stages
    left_out = [stage for stage in stages if all_stages()[stage].needs_decoder]
    unknown = ", so how long the run takes is not estimated" if "preflight" in left_out else ""
    say(f"{model.path} runs in PyTorch: {' and '.join(left_out)} left out, for models of JAX families only{unknown}")
    return [stage for stage in stages if stage not in left_out]


def _settings_to_compare(configs: Configs, units: Sequence[str]) -> dict[str, str]:
    """Return what must be equal in all processes of a run: settings by their flags, units, versions."""
    flags = {
        f"--{flag_of(f'{group}.{name}')}": json.dumps(value)
        for config in configs
        for group in (configuration.group_name(type(config)),)
        for name, value in configuration.to_json(config).items()
        if (group, name) not in _OF_PROCESS
    }
    return flags | {"units": " ".join(units), "Python": sys.version.split()[0]} | package_versions()


def _run_unit(pipeline: _Pipeline, unit: str) -> None:
    """Make a unit unless it is done; several processes return when it is done."""
    workspace, plan, processes = pipeline.workspace, pipeline.plan, pipeline.processes
    mark, stage = plan.fingerprint(unit), unit.partition("/")[0]
    done = _find_done(pipeline, unit) if pipeline.leads else ""
    if processes:  # the first process looks, since others may see a shared folder a little later
        done = processes.broadcast(f"{unit}: done", done)
    if done:
        if pipeline.leads:
            workspace.point(unit, mark)
            pipeline.say(f"{unit}: done before, {done}")
            if ((folder := workspace.folder(unit, mark)) / SUMMARY).exists():
                say = lambda line: pipeline.say(f"  {unit}: {line}")  # noqa: E731
                all_stages()[stage].recall(Run(stage, unit.partition("/")[2], folder, plan.configs, {}, say))
        return
    inputs = {need: _input_folder(pipeline, unit, need) for need in plan.needs(unit)}
    stack = None
    if members := plan.members(unit):
        marks = {member: plan.fingerprint(f"{unit}/{member}") for member in members}
        describe = (lambda member: _describe(plan, stage, inputs, members[member])) if pipeline.leads else None
        stack = Stack(workspace, unit, mark, marks, describe)
    if pipeline.leads:
        with contextlib.ExitStack() as claims:
            claims.enter_context(workspace.claim(unit, mark, pipeline.options.take_over))
            _run_claimed(pipeline, unit, inputs, stack, claims)
    else:
        _run_together(pipeline, unit, inputs, stack)
    if processes:
        processes.barrier(f"{unit}: done")


def _find_done(pipeline: _Pipeline, unit: str) -> str:
    """Return how a unit that need not be made is found, in words; "" for one that is to be made."""
    workspace, mark = pipeline.workspace, pipeline.plan.fingerprint(unit)
    if pipeline.plan.is_done(workspace, unit):
        return "unchanged"
    if workspace.is_removed(unit, mark) and not is_read_later(pipeline.plan.configs, workspace, pipeline.units, unit):
        return "its files removed since, and no unit that is left reads them"
    return ""


def _run_claimed(
    pipeline: _Pipeline, unit: str, inputs: Mapping[str, Path], stack: Stack | None, claims: contextlib.ExitStack
) -> None:
    """Begin a claimed unit and run its stage; after bad input no folder is left in which nothing was made."""
    workspace, plan = pipeline.workspace, pipeline.plan
    if pipeline.processes is None and plan.is_done(workspace, unit):  # another run has made it meanwhile
        pipeline.say(f"{unit}: done before, unchanged")
        return
    mark, previous = plan.fingerprint(unit), workspace.current(unit)
    resumed = workspace.begin(unit, mark, _start(plan, unit, plan.configs))
    differences = "" if resumed or previous is None else describe_changes(plan, unit, previous)
    pipeline.report(unit, f"{unit}: {'resumed' if resumed else 'started'}{differences}")
    begun = [mark]  # another run's folder of a member may look as empty
    try:
        if stack:
            stack.find_missing()
            for member in stack.missing:
                claims.enter_context(workspace.claim(unit, stack.marks[member], pipeline.options.take_over))
                about = _start(plan, f"{unit}/{member}", plan.members(unit)[member])
                workspace.begin(unit, stack.marks[member], about, current=False)
                begun.append(stack.marks[member])
            if reused := len(stack.marks) - len(stack.missing):
                pipeline.report(unit, f"  {unit}: {reused} of {len(stack.marks)} members done before")
        _run_together(pipeline, unit, inputs, stack)
    except UserError:
        for folder in begun:
            workspace.discard_if_empty(unit, folder)
        raise


def _run_together(pipeline: _Pipeline, unit: str, inputs: Mapping[str, Path], stack: Stack | None) -> None:
    """Run a unit's stage in this process where it takes part; the first process writes the summary."""
    stage = all_stages()[unit.partition("/")[0]]
    processes = pipeline.processes
    if processes is None:
        return _run_stage(pipeline, unit, inputs, ProcessShare(), stack)
    processes.barrier(f"{unit}: begun")  # from here on its folder exists
    if stack:
        # All processes train the members that the first process found missing.
        members = json.dumps([stack.together, stack.missing])
        stack.together, stack.missing = json.loads(processes.broadcast(f"{unit}: members", members))
    if stage.processes == "all":
        wait_for_all(f"{unit} is begun")
        return _run_stage(pipeline, unit, inputs, ProcessShare(), stack)
    if stage.processes == "items" or pipeline.leads:
        share = ProcessShare(processes) if stage.processes == "items" else ProcessShare()
        with alone():
            _run_stage(pipeline, unit, inputs, share, stack)


def _run_stage(
    pipeline: _Pipeline, unit: str, inputs: Mapping[str, Path], share: ProcessShare, stack: Stack | None
) -> None:
    """Run a stage's function; the first process writes the unit's summary."""
    workspace, plan, (stage, _, name) = pipeline.workspace, pipeline.plan, unit.partition("/")
    mark = plan.fingerprint(unit)

    def say(line: str) -> None:
        if pipeline.leads or share.processes:
            pipeline.say(f"  {unit}: {line}")
            pipeline.log(unit, line)

    started = now()
    forget_peak()
    profiler, stopping = None, pipeline.stopping
    if pipeline.options.profile:
        stopping = profiler = Profiler(Path(pipeline.options.profile) / unit, stopping, say)

    folder = workspace.folder(unit, mark)
    run = Run(stage, name, folder, plan.configs, inputs, say, stopping, share, stack)
    with contextlib.ExitStack() as ending:
        # The others hold their devices as long as the first process works on the unit, which counts for all of them.
        attempt = ending.enter_context(count_hours(workspace, unit, mark)) if pipeline.leads else None
        if profiler:
            ending.callback(profiler.close)
        try:
            results = (pipeline.substitutes.get(stage) or all_stages()[stage].run)(run)
        except ShareDone:
            return
    if attempt is None:
        return
    if stack:
        stack.link()
    seconds, hours = attempt.totals()
    measured = dict(start=started, seconds=round(seconds, 2), device_hours=round(hours, 5))
    peaks = dict(peak_host_bytes=peak_host_bytes(), peak_device_bytes=peak_device_bytes())
    measured |= {name: peak for name, peak in peaks.items() if peak is not None}
    about = _describe(plan, stage, inputs, plan.configs) | measured
    workspace.finish(unit, mark, about | dict(results=to_json(results)))
    pipeline.report(unit, f"{unit}: done in {attempt.seconds:.1f} s")


def _start(plan: Workplan, unit: str, configs: Configs) -> dict[str, Any]:
    """Return what ``started.json`` holds in addition to the fingerprint."""
    stage = unit.partition("/")[0]
    return dict(
        start=now(),
        depends_on=plan.dependencies(unit),
        # The units themselves: a fingerprint among its dependencies may be of a store with fewer sites.
        inputs={need: plan.fingerprint(need) for need in plan.needs(split_unit(unit)[0])},
        config=_settings(configs, stage),
        packages=package_versions(),
    )


def _describe(plan: Workplan, stage: str, inputs: Mapping[str, Path], configs: Configs) -> dict[str, Any]:
    """Return what a summary says of settings, inputs, versions and devices."""
    settings = _settings(configs, stage)
    return dict(
        config=settings,
        inputs={need: plan.fingerprint(need) for need in inputs},
        packages=package_versions(),
        devices=_devices(),
        seeds={group: fields["seed"] for group, fields in settings.items() if "seed" in fields},
    )


def _settings(configs: Configs, stage: str) -> dict[str, dict[str, Any]]:
    """Return all settings of the groups that a stage reads, JSON data."""
    # The mesh, which says where it was computed, is recorded, too, though it is no part of the fingerprint.
    groups = (*all_stages()[stage].groups, MeshConfig)
    return {configuration.group_name(group): configuration.to_json(configs[group]) for group in groups}


def _devices() -> dict[str, Any]:
    """Return the devices as JAX sees them."""
    kinds = sorted({device.device_kind for device in jax.devices()})
    return dict(count=jax.device_count(), kinds=kinds, processes=jax.process_count())


def _input_folder(pipeline: _Pipeline, unit: str, need: str) -> Path:
    """Return the folder of a finished unit that another one reads."""
    workspace, mark, whole = pipeline.workspace, pipeline.plan.fingerprint(need), split_unit(need)[0]
    if pipeline.processes and not pipeline.leads:  # the first process has seen it
        pipeline.processes.wait_until_visible([workspace.folder(whole, mark) / SUMMARY])
    if not pipeline.plan.is_done(workspace, need):
        previous, state = workspace.current(need), "has not been made"
        if workspace.is_removed(whole, mark):
            state = "was made, but its files were removed since"
        elif previous and (previous / SUMMARY).exists():
            state = f"was made with other settings{describe_changes(pipeline.plan, need, previous)}"
        stage = need.partition("/")[0]
        # One program scores prompts and benchmarks.
        program = "baseline" if stage == "benchmark" else stage
        raise UserError(
            f"{unit} reads {need}, which {state} in {workspace.root}: "
            f"run experiments.{program} with the same flags first"
        )
    return workspace.folder(whole, mark)
