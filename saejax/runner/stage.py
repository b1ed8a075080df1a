"""Descriptions of stages: one object for each.

Every file of ``saejax/stages`` declares stages as ``Stage`` objects at the top level; ``registry`` finds them. Such a
file is read by every binary, so JAX, torch and what needs them are imported inside its functions.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from saejax.config import Config, Configs
from saejax.dictionaries.names import is_folder
from saejax.runner.workspace import Run


@dataclasses.dataclass(frozen=True)
class UnitMember:
    """A member of a unit that is a stack: a unit of its own."""

    configs: Configs  #: the settings of a run in which it is alone
    #: what else its result depends on, by name; its fingerprint counts them.
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage: what it reads, which units it has, and its functions."""

    name: str  #: name of its folder in a workdir, and of its binary
    summary: str  #: what it does, one line
    run: Callable[[Run], Any]  #: does it: takes a ``workspace.Run``, returns the results
    groups: tuple[type[Config], ...]  #: the groups of configuration that its result depends on, as classes
    reads_all: bool = False  #: whether its result depends on all other stages' groups, too
    #: groups it reads of which the fingerprint takes nothing: they say where and how fast it is computed, or
    #: ``identity`` covers what counts.
    placement: tuple[type[Config], ...] = ()
    #: the stages whose units it may read; "*": all others. Its binary accepts their flags, too.
    reads: tuple[str, ...] = ()
    #: further stages that run before it, because they may write what its flags name as folders.
    follows: tuple[str, ...] = ()
    first: bool = False  #: whether it runs before all stages that are not ``first``
    makes_model: bool = False  #: whether what it examines is made in it, and is not the model that the settings name
    needs_decoder: bool = False  #: whether it is left out of a pipeline whose model runs in PyTorch
    #: the units it reads, given the configuration and the unit's name, as "stage" or "stage/name".
    needs: Callable[[Configs, str], Sequence[str]] = lambda configs, name: ()
    #: the configuration with which the units it reads count for its fingerprint, given the configuration and the unit's
    #: name; where it reads a part of a unit, such as some sites of a store, other parts may change.
    inputs: Callable[[Configs, str], Configs] = lambda configs, name: configs
    #: its units' names, given the configuration; [""] for one unit.
    names: Callable[[Configs], Sequence[str]] = lambda configs: ("",)
    #: what it reads from outside the workdir: its fingerprint, given the configuration.
    identity: Mapping[str, Callable[[Configs], str]] = dataclasses.field(default_factory=dict)
    #: the same for what only one unit reads, given that unit's name, too.
    unit_identity: Mapping[str, Callable[[Configs, str], str]] = dataclasses.field(default_factory=dict)
    #: a ``UserError`` where settings name what is not there, though no unit makes it: asked for before any stage runs,
    #: so that no hours are spent first.
    check: Callable[[Configs], None] = lambda configs: None
    #: writes its part of the report: takes ``Findings`` and ``Draw``, returns sections.
    section: Callable[[Any, Any], Sequence[Any]] | None = None
    results: Any = None  #: the class of the results; None: they are plain JSON data
    #: settings of its groups, as "group.field", that a unit's code does not read, given the configuration and the
    #: unit's name: what only another value of a setting makes count.
    unread: Callable[[Configs, str], Sequence[str]] = lambda configs, name: ()
    #: the members of a unit, each of which is a unit of its own, given the configuration and the unit's name; the one
    #: member "" is the unit itself. Empty: the unit is made as a whole.
    members: Callable[[Configs, str], Mapping[str, UnitMember]] = lambda configs, name: {}
    #: version of what it computes, raised when a code change alters its results; units of an earlier revision are made
    #: anew.
    revision: int = 1
    #: what several processes do with a unit: the first "one" does it alone; they split its "items" (``Run.each``), and
    #: the first one joins these; or they run "all" of it together, on the devices of all.
    processes: Literal["one", "items", "all"] = "one"

    def units(self, configs: Configs) -> list[str]:
        """Return the stage's units, as "stage" or "stage/name"."""
        return [f"{self.name}/{name}" if name else self.name for name in self.names(configs)]


def train_units(*dictionaries: str) -> tuple[str, ...]:
    """Return the distinct units of dictionaries, of a member its own; dictionaries named by a folder have none."""
    return tuple(dict.fromkeys(f"train/{name}" for name in dictionaries if not is_folder(name)))


def split_unit(unit: str) -> tuple[str, str]:
    """Split the name of a unit from that of its member: ("train/topk", "k16") of "train/topk/k16"."""
    stage, _, rest = unit.partition("/")
    name, _, member = rest.partition("/")
    return (f"{stage}/{name}" if name else stage), member
