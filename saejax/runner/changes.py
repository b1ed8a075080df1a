"""Differences between a unit of now and an earlier one, in words."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from saejax.errors import UserError
from saejax.files import read_object
from saejax.links import member_folder
from saejax.runner.registry import flag_of
from saejax.runner.stage import split_unit
from saejax.runner.workplan import Workplan
from saejax.runner.workspace import STARTED

_NAMED = 4  # differences that a line names


def describe_changes(plan: Workplan, unit: str, previous: Path) -> str:
    """Return in words in which settings and inputs a unit differs from an earlier one; "" if that does not say."""
    members = plan.members(unit) if not split_unit(unit)[1] else ()
    # Of a stack first what differs in one member, which is mostly the same for all.
    places = [(member_folder(previous, member), f"{unit}/{member}") for member in members]
    places = [entry for entry in places if entry[0].is_dir()][:1] + [(previous, unit)]
    for place, part in places:
        with contextlib.suppress(UserError):  # a damaged file: it is for people
            before = read_object(place / STARTED).get("depends_on")
            after = plan.dependencies(part)
            if before and bool(before.get("settings")) != bool(after["settings"]):
                # A stack has no settings but its members' settings.
                return f" (alone before, now a stack of {len(members)})" if members else " (a stack before, now alone)"
            if before and (changes := [*_changes(before, after)]):
                return f" ({'; '.join(changes)})"
    return ""


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield the differences of two ``Dependencies`` of one unit, the first few in words."""
    before, after = flat_dependencies(old), flat_dependencies(new)
    names = sorted({*before, *after}, key=lambda name: (not name.startswith("--"), name))
    differences = [name for name in names if before.get(name) != after.get(name)]
    for name in differences[:_NAMED]:
        was, now_is = before.get(name, "unread"), after.get(name, "unread")
        change = "different" if name in before and name in after else "new" if name in after else "left out"
        yield f"{name} was {was}, is {now_is}" if name.startswith("--") else f"{name} is {change}"
    if len(differences) > _NAMED:
        yield f"and {len(differences) - _NAMED} more"


def flat_dependencies(depends: Mapping[str, Any]) -> dict[str, str]:
    """Return settings by their flags, and the hashes of everything else."""
    settings: Mapping[str, Any] = depends.get("settings", {})
    flags = {f"--{flag_of(name)}": _flag_value(value) for name, value in settings.items()}
    code = {"the revision of the stage": str(depends.get("revision"))}
    return flags | depends.get("needs", {}) | depends.get("sources", {}) | code


def _flag_value(value: Any) -> str:
    """Return a setting as it is written on a command line."""
    if isinstance(value, list):
        return ",".join(map(_flag_value, value)) or "empty"
    return value or "empty" if isinstance(value, str) else json.dumps(value)
