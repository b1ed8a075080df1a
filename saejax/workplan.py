"""What the units of a configuration depend on, and their fingerprints."""

import json
from typing import Any, NotRequired, TypedDict

from saejax import config as configuration
from saejax.config import Configs, group_name
from saejax.errors import UserError, one_of
from saejax.registry import STAGES, groups_of
from saejax.stage import Stage
from saejax.workspace import fingerprint

_NAMED = 4  # differences that a line names


class DependsOn(TypedDict):
    """What a unit depends on: its fingerprint is a hash of this as JSON."""

    unit: str
    settings: dict[str, dict[str, Any]]  # group -> field -> value, of those that change what it makes
    needs: dict[str, str]  # fingerprints of the units that it reads
    sources: dict[str, str]  # fingerprints of what it reads from outside
    version: NotRequired[int]  # of its stage


class Workplan:
    """The units of a configuration and their fingerprints."""

    def __init__(self, configs: Configs):
        self.configs = configs
        self._data: dict[str, DependsOn] = {}
        self._sources: dict[Any, str] = {}

    def needs(self, unit: str) -> list[str]:
        """The units that a unit reads."""
        stage, _, name = unit.partition("/")
        needs = list(STAGES[stage].needs(self.configs, name))
        for need in needs:
            needed_stage, _, needed_name = need.partition("/")
            if needed_name:
                flag = "train.kinds" if needed_stage == "train" else f"{needed_stage}.dictionaries"
                if not STAGES[needed_stage].names(self.configs):
                    raise UserError(f"{unit} reads {need}, which no flag asks for: add --{flag}={needed_name}")
                one_of(needed_name, STAGES[needed_stage].names(self.configs), f"dictionary for {stage} (--{flag})")
        return needs

    def mark(self, unit: str) -> str:
        """The unit's fingerprint: a hash of what it depends on."""
        return fingerprint(self.depends_on(unit))

    def depends_on(self, unit: str) -> DependsOn:
        """What the unit depends on."""
        if unit not in self._data:
            stage, _, name = unit.partition("/")
            read = groups_of(STAGES[stage])
            settings = {group_name(group): configuration.identity(self.configs[group], name) for group in read}
            needs = {need: self.mark(need) for need in self.needs(unit)}
            data = DependsOn(unit=unit, settings=settings, needs=needs, sources=self._read(STAGES[stage], name))
            version = STAGES[stage].version_of(self.configs)
            if version > 1:  # the first is not named, so that what was made before there were any stays
                data["version"] = version
            self._data[unit] = data
        return self._data[unit]

    def _read(self, stage: Stage, name: str) -> dict[str, str]:
        """Fingerprints of what a unit reads from outside; what units share is looked at once."""
        for identity in stage.identity.values():
            if identity not in self._sources:
                self._sources[identity] = identity(self.configs)
        shared = {source: self._sources[identity] for source, identity in stage.identity.items()}
        return shared | {source: identity(self.configs, name) for source, identity in stage.unit_identity.items()}


def changes(old: DependsOn, new: DependsOn) -> str:
    """In which settings and inputs two ``depends_on`` of one unit differ, in words for a line; "" if in none."""
    found = []
    for group in sorted({*old["settings"], *new["settings"]}):
        before, after = (data["settings"].get(group, {}) for data in (old, new))
        for name in sorted({*before, *after}):
            if name not in before:
                found.append(f"--{group}.{name} is {_value(after[name])}")
            elif name not in after:
                found.append(f"--{group}.{name} was {_value(before[name])}")
            elif before[name] != after[name]:
                found.append(f"--{group}.{name} was {_value(before[name])}, is {_value(after[name])}")
    for kind in ("needs", "sources"):
        names = sorted({*old[kind], *new[kind]})
        found += [f"{name} is another" for name in names if old[kind].get(name) != new[kind].get(name)]
    if old.get("version", 1) != new.get("version", 1):
        found.append("saejax computes it otherwise")
    more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ", ".join(found[:_NAMED]) + more


def _value(value: Any) -> str:
    """A setting as it is written on a command line."""
    if isinstance(value, list):
        return ",".join(map(_value, value)) or "empty"
    return value or "empty" if isinstance(value, str) else json.dumps(value)
