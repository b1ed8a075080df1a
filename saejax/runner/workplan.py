"""Dependencies of the units of a configuration, and the fingerprints made from them.

A unit's fingerprint is a hash of exactly what its result depends on: the settings that its code reads
(``Stage.settings``), the fingerprints of all that it reads (``Stage.inputs``), and the ``revision`` of its stage, which
is raised whenever its code computes something else.

Each member of a stack, such as ``train/topk/k16``, is a unit of its own, with the settings and inputs that it would
have if it were run alone. A stack depends on its members.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from saejax.config import Configs
from saejax.dictionaries.names import check_member
from saejax.errors import UserError, one_of
from saejax.files import fingerprint
from saejax.parallel.stopping import interruptible
from saejax.runner.registry import all_stages
from saejax.runner.stage import split_unit
from saejax.runner.workspace import Workspace


class Dependencies(TypedDict):
    """The dependencies of a unit; its fingerprint is a hash of this as JSON."""

    unit: str
    settings: dict[str, Any]  #: the settings that the unit's code reads, by "group.field"
    needs: dict[str, str]  #: fingerprints of the units that it reads
    sources: dict[str, str]  #: fingerprints of the models, texts and files that it reads from outside of the workdir
    revision: int  #: of its stage


class Workplan:
    """The units of a configuration and their fingerprints."""

    def __init__(self, configs: Configs):
        self.configs = configs
        self._dependencies: dict[str, Dependencies] = {}
        self._sources: dict[Any, str] = {}
        self._members: dict[str, Mapping[str, Configs]] = {}
        self._partial: list[Workplan] = []

    def members(self, unit: str) -> Mapping[str, Configs]:
        """Return the members of a unit that is a stack, with the settings of each alone; empty for any other unit."""
        members = self._all_members(unit)
        return {} if [*members] == [""] else members

    def _all_members(self, unit: str) -> Mapping[str, Configs]:
        """Return the members of a unit as its stage names them: a dictionary alone is the one member ""."""
        if unit not in self._members:
            stage, _, name = unit.partition("/")
            self._members[unit] = all_stages()[stage].members(self.configs, name)
        return self._members[unit]

    def needs(self, unit: str) -> list[str]:
        """Return the units that a unit reads, such as "train/topk", or "train/topk/k16" where it reads a member alone.

        Raises:
          UserError: no flag asks for one of them.
        """
        return [*self._units_read(unit, self.configs)]

    def _units_read(self, unit: str, configs: Configs) -> dict[str, Configs]:
        """Return the units that a unit reads, each with the settings that its hash is computed from."""
        stage, _, name = unit.partition("/")
        units = {}
        for need, read in all_stages()[stage].units_read(configs, name).items():
            whole, member = split_unit(need)
            needed_stage, _, needed_name = whole.partition("/")
            if not {needed_stage, "*"} & set(all_stages()[stage].reads):
                raise ValueError(f"the stage {stage} reads {need}: name {needed_stage} in its reads")
            if needed_name:
                flag = "train.kinds" if needed_stage == "train" else f"{needed_stage}.dictionaries"
                if not all_stages()[needed_stage].names(self.configs):
                    raise UserError(f"{unit} reads {need}, which this run does not make: add --{flag}={needed_name}")
                one_of(
                    needed_name, all_stages()[needed_stage].names(self.configs), f"dictionary for {stage} (--{flag})"
                )
            if member and self._all_members(whole):
                dictionary = f"{needed_name}/{member}"
                flag = f"--{stage}.{_naming_field(self.configs.named(stage), dictionary)}"
                check_member(dictionary, list(self._all_members(whole)), flag)
            # Members that are no units of their own are read from the whole.
            units[need if self.members(whole) else whole] = read
        return units

    def check(self, units: Sequence[str]) -> None:
        """Refuse settings of units that contradict each other, before any of them is made.

        Raises:
          UserError: a unit reads what no flag asks for, or has no members with these settings.
        """
        for unit in units:
            self.members(unit)
            self.needs(unit)

    def fingerprint(self, unit: str) -> str:
        """Return the unit's fingerprint: a hash of its settings, its inputs and its stage's revision."""
        return fingerprint(self.dependencies(unit))

    def dependencies(self, unit: str) -> Dependencies:
        """Return what the unit depends on."""
        if unit not in self._dependencies:
            self._dependencies[unit] = self._dependencies_of(*split_unit(unit))
        return self._dependencies[unit]

    def is_done(self, workspace: Workspace, unit: str) -> bool:
        """Return whether a unit or a member of a stack is finished; of a stack, all members."""
        whole, _ = split_unit(unit)
        members = self.members(unit) if unit == whole else {}
        marks = [self.fingerprint(unit), *(self.fingerprint(f"{unit}/{member}") for member in members)]
        return all(workspace.is_done(whole, mark) for mark in marks)

    def _dependencies_of(self, unit: str, member: str) -> Dependencies:
        """Return what a unit depends on; ``member`` "": the whole unit, whether it is a stack or not."""
        stage, name = all_stages()[unit.partition("/")[0]], unit.partition("/")[2]
        members = self._all_members(unit)
        if members and member not in members:  # the whole stack
            marks = {f"{unit}/{key}": self.fingerprint(f"{unit}/{key}") for key in members}
            return Dependencies(unit=unit, settings={}, needs=marks, sources={}, revision=stage.revision)
        alone = members.get(member, self.configs)
        needs = {
            # Of a stack that this member was made from, it reads its namesake.
            need: self.fingerprint(f"{need}/{member}")
            if members and member in self._all_members(need)
            else self._with(read).fingerprint(need)
            for need, read in self._units_read(unit, alone).items()
        }
        read = stage.inputs(alone, name)
        return Dependencies(
            unit=unit,
            settings=stage.settings_read(alone, name),
            needs=needs,
            sources={source: self._hash(by) for source, by in read.items() if not isinstance(by, Configs)},
            revision=stage.revision,
        )

    def _with(self, configs: Configs) -> "Workplan":
        """Return the plan of a configuration that differs in which parts of units are read, not in sources."""
        if configs is self.configs:
            return self
        groups = [*configs]
        plan = next((plan for plan in self._partial if [*plan.configs] == groups), None)
        if plan is None:
            plan = Workplan(configs)
            plan._sources = self._sources
            self._partial.append(plan)
        return plan

    def _hash(self, source: str | Callable[[Configs], str]) -> str:
        """Return the fingerprint of what is outside of the workdir; what units share is hashed once."""
        if isinstance(source, str):
            return source
        if source not in self._sources:
            with interruptible():  # a model's weights, or text, may be hashed for minutes
                self._sources[source] = source(self.configs)
        return self._sources[source]


def _naming_field(config: Any, dictionary: str) -> str:
    """Return the field of a group whose value names a dictionary."""
    values = {name: value if isinstance(value, tuple) else (value,) for name, value in vars(config).items()}
    return next((name for name, value in values.items() if dictionary in value), "dictionary")
