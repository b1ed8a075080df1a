"""Descriptions of stages: one object for each.

Every file of ``saejax/stages`` declares stages as ``Stage`` objects at the top level; ``registry`` finds them. Such a
file is read by every binary, so PyTorch and transformers are imported inside its functions.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from saejax.config import Config, Configs, counted
from saejax.dictionaries.formats.place import is_address
from saejax.dictionaries.names import is_folder
from saejax.runner.workspace import Run

#: What a unit reads: another unit as these settings make it, or what is outside of the workdir, by its fingerprint or
#: by a function that returns that, given all settings.
Input = Configs | str | Callable[[Configs], str]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage: its settings and inputs, its units, and its functions.

    The hash of a unit is made from ``settings``, ``inputs`` and ``revision``.
    """

    name: str  #: name of its folder in a workdir, and of its binary
    summary: str  #: its purpose, one line
    run: Callable[[Run], Any]  #: does it: takes a ``workspace.Run``, returns the results
    #: the groups of configuration that it reads, as classes; its binary accepts their flags, and the mesh's flags.
    groups: tuple[type[Config], ...]
    #: the settings that the code of a unit reads and its result depends on, by "group.field" (see ``settings_of``),
    #: given the configuration and the unit's name; None: all settings of ``groups`` that change results.
    settings: Callable[[Configs, str], Mapping[str, Any]] | None = None
    #: what a unit reads (see ``inputs_of``): units as "stage" or "stage/name", everything else by any name; given the
    #: configuration and the unit's name.
    inputs: Callable[[Configs, str], Mapping[str, Input]] = lambda configs, name: {}
    #: the stages whose units it may read; "*": all others. Its binary accepts their flags, too.
    reads: tuple[str, ...] = ()
    #: further stages that run before it, because they may write what its flags name as folders.
    follows: tuple[str, ...] = ()
    #: whether it runs before all stages that are not ``first``, and looks at the settings of all of them.
    first: bool = False
    makes_model: bool = False  #: whether it examines a model that it makes itself, not the model that the settings name
    needs_decoder: bool = False  #: whether it is left out of a pipeline whose model runs in PyTorch
    #: its units' names, given the configuration; [""] for one unit.
    names: Callable[[Configs], Sequence[str]] = lambda configs: ("",)
    #: a ``UserError`` where settings name what is not there, though no unit makes it: asked for before any stage runs,
    #: so that no hours are spent first.
    check: Callable[[Configs], None] = lambda configs: None
    #: the files and folders that settings name, by "group.field", addresses on the hub left out: refused before any
    #: stage runs where one is missing and no earlier stage of the run makes it (``checks.check_stages``).
    places: Callable[[Configs], Mapping[str, Sequence[str]]] = lambda configs: {}
    #: lines about what is left to do, for ``--dry_run``, such as its disk, found in seconds: takes the settings, the
    #: workdir, and the names of the stages that have units to make.
    foresee: Callable[[Configs, Path, Collection[str]], Sequence[str]] = lambda configs, workdir, stages: ()
    #: says again what a user should know of a unit that was done before; its folder has the results.
    recall: Callable[[Run], None] = lambda run: None
    #: writes its part of the report: takes ``Findings`` and ``Draw``, returns sections.
    section: Callable[[Any, Any], Sequence[Any]] | None = None
    results: Any = None  #: the class of the results; None: they are plain JSON data
    #: the members of a unit, each a unit of its own, with the settings of a run of it alone, given the configuration
    #: and the unit's name; the one member "" is the unit itself. Empty: the unit is made as a whole.
    members: Callable[[Configs, str], Mapping[str, Configs]] = lambda configs, name: {}
    #: version of its results, raised when a code change alters them; units of an earlier revision are made
    #: anew.
    revision: int = 1
    #: what several processes do with a unit: the first "one" does it alone; they split its "items" (``Run.make_each``),
    #: and the first one joins these; or they run "all" of it together, on the devices of all.
    processes: Literal["one", "items", "all"] = "one"

    def units(self, configs: Configs) -> list[str]:
        """Return the stage's units, as "stage" or "stage/name"."""
        return [f"{self.name}/{name}" if name else self.name for name in self.names(configs)]

    def settings_read(self, configs: Configs, name: str) -> dict[str, Any]:
        """Return the settings that the result of a unit of this name depends on, by "group.field"."""
        return dict((self.settings or settings_of(*self.groups))(configs, name))

    def units_read(self, configs: Configs, name: str) -> dict[str, Configs]:
        """Return the units that a unit of this name reads, each with the settings that its hash is computed from."""
        return {unit: read for unit, read in self.inputs(configs, name).items() if isinstance(read, Configs)}


def settings_of(*groups: type[Config], but: Sequence[str] = ()) -> Callable[[Configs, str], dict[str, Any]]:
    """Return a function for ``Stage.settings``: all settings of groups but some, named as "group.field"."""
    return lambda configs, name: counted(*(configs[group] for group in groups), but=but)


def inputs_of(configs: Configs, *units: str, **outside: str | Callable[[Configs], str]) -> dict[str, Input]:
    """Return the value of ``Stage.inputs``.

    Args:
      configs: the settings that the hashes of ``units`` are computed from. Where a unit is read in part, such as some
        sites of a store, they select that part.
      units: such as "train/topk".
      outside: what is read from outside of the workdir, by name.
    """
    return dict.fromkeys(units, configs) | outside


def train_units(*dictionaries: str) -> tuple[str, ...]:
    """Return the distinct units of dictionaries, of a member its own; dictionaries named by a folder have none."""
    return tuple(dict.fromkeys(f"train/{name}" for name in dictionaries if not is_folder(name)))


def list_folders(stage: str, *fields: str) -> Callable[[Configs], dict[str, list[str]]]:
    """Return a function for ``Stage.places``: the folders of dictionaries that settings of a stage's group name.

    Args:
      stage: name of the stage, and of its group.
      fields: settings of it that name one dictionary, or several.
    """

    def folders(configs: Configs) -> dict[str, list[str]]:
        values = {name: getattr(configs.named(stage), name) for name in fields}
        named = {name: [value] if isinstance(value, str) else value for name, value in values.items()}
        return {
            f"{stage}.{name}": [place for place in some if place and is_folder(place) and not is_address(place)]
            for name, some in named.items()
        }

    return folders


def split_unit(unit: str) -> tuple[str, str]:
    """Split a unit's name from its member's name: "train/topk/k16" gives ("train/topk", "k16")."""
    stage, _, rest = unit.partition("/")
    name, _, member = rest.partition("/")
    return (f"{stage}/{name}" if name else stage), member
