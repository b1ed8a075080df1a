"""Notes which settings the code of every stage reads, in whatever test runs it, and fails where its hash lacks one."""

import dataclasses
import sys

from saejax.config import Config, counted, group_name
from saejax.dictionaries.kinds import KINDS
from saejax.runner import pipeline
from saejax.runner.registry import all_stages
from saejax.training.settings import TrainConfig

#: By unit that ran in this process: the settings that its code read, and those in its hash.
READ, DECLARED = {}, {}
#: By stage, of all its units that were made in this process: settings in their hashes, and those that were read.
EVER = {}
# Callers that copy, compare or check groups as a whole: beside these, methods that ``dataclasses`` writes.
_MODULES = {"dataclasses", "copy", "saejax.config"}

_plain_replace, _plain_run = dataclasses.replace, pipeline._run_stage
_unit, _watched = "", {}  # the unit that runs; its groups and copies by id, with fields that a copy has anew


def install() -> None:
    """Watch all stages that run in this process."""
    Config.__getattribute__ = _get
    dataclasses.replace = _replace
    pipeline._run_stage = _run_stage


def never_read(*stages):
    """Settings in the hashes of stages that ran in this process, which none of their units has read."""
    return {setting for stage in stages for setting in EVER[stage][0] - EVER[stage][1]}


def _get(config, name):
    if _unit and (watched := _watched.get(id(config))) and name not in watched[1]:
        caller = sys._getframe(1)
        code = caller.f_code
        whole = code.co_filename == "<string>" or code.co_name == "__post_init__"
        is_field = name in type(config).__dataclass_fields__
        if is_field and not whole and caller.f_globals["__name__"] not in _MODULES:
            kind = next((kind for kind, of_kind in KINDS.items() if of_kind.Settings is type(config)), "")
            READ[_unit].add(f"train.{kind}.{name}" if kind else f"{group_name(type(config))}.{name}")
    return object.__getattribute__(config, name)


def _replace(config, /, **changes):
    copy = _plain_replace(config, **changes)
    if _unit and (watched := _watched.get(id(config))):
        _watched[id(copy)] = copy, watched[1] | changes.keys()
    return copy


def _watch(unit, configs):
    """Begin to note what is read of settings, for a unit."""
    global _unit
    _watched.update({id(group): (group, set()) for group in [*configs, *configs[TrainConfig].by_kind.values()]})
    _unit, READ[unit] = unit, set()


def _covered_by_inputs(plan, unit, stage, configs, name):
    """The settings in the hashes of the units that a unit reads, and those that its other inputs are found by."""
    left, covered = [*plan.dependencies(unit)["needs"]], set()
    while left:
        depends = plan.dependencies(left.pop())
        covered |= depends["settings"].keys()
        left += depends["needs"]
    _watch("inputs", configs)
    for read in stage.inputs(configs, name).values():
        if callable(read):
            read(configs)
    return covered | READ.pop("inputs")


def _run_stage(running, unit, *arguments):
    global _unit
    configs, stage, name = running.plan.configs, all_stages()[unit.partition("/")[0]], unit.partition("/")[2]
    _watch(unit, configs)
    made = False
    try:
        results, made = _plain_run(running, unit, *arguments), True
        return results
    finally:
        _unit = ""
        alone = running.plan.members(unit).values() or [configs]
        DECLARED[unit] = {setting for each in alone for setting in stage.settings_read(each, name)}
        declared, read = EVER.setdefault(stage.name, (set(), set()))
        declared |= DECLARED[unit] if made else set()
        read |= READ[unit]
        undeclared = {setting for setting in READ[unit] - DECLARED[unit] if not setting.startswith("mesh.")}
        undeclared &= counted(*configs).keys()
        if configs[TrainConfig].ce_every and unit.startswith("train/"):
            undeclared -= {"model.dtype"}  # of the model that scores midway, which decides no result
        if undeclared:
            undeclared -= _covered_by_inputs(running.plan, unit, stage, configs, name)
        _unit = ""
        _watched.clear()
        assert not undeclared, f"{unit} reads {sorted(undeclared)}, which neither its settings nor its inputs cover"
