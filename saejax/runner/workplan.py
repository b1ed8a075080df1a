"""Dependencies of the units of a configuration, and the fingerprints made from them.

A unit's fingerprint is a hash of exactly what its result depends on: the settings that its code reads
(``settings_read``), the fingerprints of the units that it reads, the content of the model and the text, and the
``revision`` of its stage, which is raised whenever its code computes something else.
"""

from collections.abc import Mapping
from typing import Any, TypedDict

from saejax.errors import UserError, one_of
from saejax.runner import config as configuration
from saejax.runner.config import Configs, group_name
from saejax.runner.registry import STAGES, groups_of
from saejax.runner.stage import Stage
from saejax.runner.workspace import fingerprint


class Dependencies(TypedDict):
    """The dependencies of a unit; its fingerprint is a hash of this as JSON."""

    unit: str
    settings: dict[str, dict[str, Any]]  #: group -> field -> value, of those that the unit's code reads
    needs: dict[str, str]  #: fingerprints of the units that it reads
    sources: dict[str, str]  #: fingerprints of what it reads from outside of the workdir
    revision: int  #: of its stage


class Workplan:
    """The units of a configuration and their fingerprints."""

    def __init__(self, configs: Configs):
        self.configs = configs
        self._dependencies: dict[str, Dependencies] = {}
        self._sources: dict[Any, str] = {}
        self._partial: Workplan | None = None

    def needs(self, unit: str) -> list[str]:
        """Return the units that a unit reads.

        Raises:
          UserError: no flag asks for one of them.
        """
        stage, _, name = unit.partition("/")
        needs = list(STAGES[stage].needs(self.configs, name))
        for need in needs:
            needed_stage, _, needed_name = need.partition("/")
            if not {needed_stage, "*"} & set(STAGES[stage].reads):
                raise ValueError(f"the stage {stage} reads {need}: name {needed_stage} in its reads")
            if needed_name:
                flag = "train.kinds" if needed_stage == "train" else f"{needed_stage}.dictionaries"
                if not STAGES[needed_stage].names(self.configs):
                    raise UserError(f"{unit} reads {need}, which no flag asks for: add --{flag}={needed_name}")
                one_of(needed_name, STAGES[needed_stage].names(self.configs), f"dictionary for {stage} (--{flag})")
        return needs

    def fingerprint(self, unit: str) -> str:
        """Return the unit's fingerprint: a hash of what it depends on."""
        return fingerprint(self.dependencies(unit))

    def dependencies(self, unit: str) -> Dependencies:
        """Return what the unit depends on."""
        if unit not in self._dependencies:
            stage, _, name = unit.partition("/")
            inputs = self._with(STAGES[stage].inputs(self.configs, name))
            self._dependencies[unit] = Dependencies(
                unit=unit,
                settings=settings_read(STAGES[stage], self.configs, name),
                needs={need: inputs.fingerprint(need) for need in self.needs(unit)},
                sources=self._sources_of(STAGES[stage], name),
                revision=STAGES[stage].revision,
            )
        return self._dependencies[unit]

    def _with(self, configs: Configs) -> "Workplan":
        """Return the plan of a configuration that differs in which parts of units are read, not in sources."""
        if configs is self.configs:
            return self
        if self._partial is None or [*self._partial.configs] != [*configs]:
            self._partial = Workplan(configs)
            self._partial._sources = self._sources
        return self._partial

    def _sources_of(self, stage: Stage, name: str) -> dict[str, str]:
        """Return the fingerprints of what a unit reads from outside; what units share is hashed once."""
        for identity in stage.identity.values():
            if identity not in self._sources:
                self._sources[identity] = identity(self.configs)
        shared = {source: self._sources[identity] for source, identity in stage.identity.items()}
        return shared | {source: identity(self.configs, name) for source, identity in stage.unit_identity.items()}


def settings_read(stage: Stage, configs: Configs, name: str) -> dict[str, dict[str, Any]]:
    """Return the settings that the code of a unit reads and its result depends on, by group; a pure function.

    Args:
      stage: the unit's stage.
      configs: all settings.
      name: name of the unit, such as "topk".
    """
    unread = set(stage.unread(configs, name))
    found = {}
    for group in groups_of(stage):
        label = group_name(group)
        fields: Mapping[str, Any] = configuration.identity(configs[group], name)
        found[label] = {field: value for field, value in fields.items() if f"{label}.{field}" not in unread}
    return found
