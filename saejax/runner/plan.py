"""The plan of a run, which is known before anything runs: which units there are, and what will be done with each."""

import contextlib
import dataclasses
from collections.abc import Sequence

from saejax.config import Configs
from saejax.errors import UserError
from saejax.runner.changes import describe_changes
from saejax.runner.stage import split_unit
from saejax.runner.workplan import Workplan
from saejax.runner.workspace import STARTED, SUMMARY, Workspace

REUSED, RESUMED, MADE = "done, reused", "to resume", "to run"


@dataclasses.dataclass(frozen=True)
class PlannedUnit:
    """A unit, and what a run will do with it."""

    name: str  #: such as "train/topk"
    fingerprint: str  #: 16 hexadecimal digits; "" where it depends on a folder that this run makes first
    todo: str  #: one of the words above
    reason: str  #: because of which settings or inputs it differs from the current unit of its name; "" without one
    members_done: int  #: members of a stack that are finished
    members: int  #: members of a stack; 0 of any other unit


def plan_units(plan: Workplan, workspace: Workspace, units: Sequence[str]) -> list[PlannedUnit]:
    """Return what a run will do with units, in their order; nothing is written.

    Args:
      plan: the units' dependencies.
      workspace: the folder of the run.
      units: names such as "train/topk".

    Raises:
      UserError: a unit reads what no flag asks for, or a file that its fingerprint takes cannot be read.
    """
    planned: list[PlannedUnit] = []
    remade = set[str]()
    for unit in units:
        try:
            plan.needs(unit)
            mark = plan.fingerprint(unit)
        except UserError:
            # A flag may name the folder of a unit that this run makes first.
            if not any(other.todo != REUSED for other in planned):
                raise
            planned.append(PlannedUnit(unit, "", MADE, "its inputs are made first", 0, 0))
            continue
        marks = [plan.fingerprint(f"{unit}/{member}") for member in plan.members(unit)]
        done = sum(workspace.is_done(unit, member) for member in marks)
        previous, reason = workspace.current(unit), ""
        if plan.is_done(workspace, unit):
            todo = REUSED
        elif workspace.is_removed(unit, mark):
            is_read = is_read_later(plan.configs, workspace, units, unit)
            todo, reason = (
                (MADE, "its files were removed")
                if is_read
                else (REUSED, "its files were removed, and no unit that is left reads them")
            )
        elif (workspace.folder(unit, mark) / STARTED).exists():
            todo = RESUMED
        else:
            todo = MADE
            if previous is not None and (previous / SUMMARY).exists():
                reason = describe_changes(plan, unit, previous).strip(" ()")
        if todo != REUSED:
            remade.add(unit)
            wholes = dict.fromkeys(split_unit(need)[0] for need in plan.needs(unit))  # of a member its stack
            reason = reason or ", ".join(f"{need} is made first" for need in wholes if need in remade)
        planned.append(PlannedUnit(unit, mark, todo, reason, done, len(marks)))
    return planned


def is_read_later(configs: Configs, workspace: Workspace, units: Sequence[str], unit: str) -> bool:
    """Return whether a unit whose files were removed has to be made again for a run.

    Args:
      configs: all settings.
      workspace: the folder of the run.
      units: the units of the run.
      unit: one of them.

    Returns:
      False if units of the run read it and all of these are finished.
    """
    plan = Workplan(configs)  # a plan of its own: fingerprints may depend on what is made meanwhile
    readers = 0
    for other in units:
        try:
            if other == unit or unit not in plan.needs(other):
                continue
            readers += 1
            if not plan.is_done(workspace, other):
                return True
        except UserError:  # said when that unit's turn comes
            return True
    return not readers  # it was asked for by itself


def describe_plan(planned: Sequence[PlannedUnit], needs: Sequence[str] = ()) -> list[str]:
    """Return the plan as lines of a table: unit, fingerprint, what will be done, and why.

    Args:
      planned: the units.
      needs: lines about what is left to do, see ``Stage.foresee``.
    """
    width = max((len(unit.name) for unit in planned), default=0)
    lines = []
    for unit in planned:
        members = f" ({unit.members_done} of {unit.members} members done)" if unit.members else ""
        reason = f": {unit.reason}" if unit.reason else ""
        lines.append(f"{unit.name:{width}}  {unit.fingerprint or 16 * ' '}  {unit.todo}{members}{reason}")
    left = sum(unit.todo != REUSED for unit in planned)
    return [*lines, *needs, f"{left} of {len(planned)} units to make; --dry_run: nothing was run or written"]


def inputs_to_compare(plan: Workplan, units: Sequence[str]) -> dict[str, str]:
    """Return the fingerprints that must be equal in all processes of a run, by what they are of.

    Hosts may have other files under the same names, such as another cached revision of a model's branch.
    """
    compared: dict[str, str] = {}
    for unit in units:
        # A folder that this run makes first; said when the unit's turn comes, in every process alike.
        with contextlib.suppress(UserError):
            sources = plan.dependencies(unit)["sources"]
            compared |= {f"the {source} that {unit} reads": mark for source, mark in sources.items()}
            compared[f"what {unit} depends on"] = plan.fingerprint(unit)
    return compared
