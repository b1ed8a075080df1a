"""Descriptions of stages: one object for each.

Every file of ``saejax/stages`` declares stages as ``Stage`` objects at the top level; ``registry`` finds them. Such a
file is read by every binary, so it imports settings and this module alone: what does the work is named as
"module:function" and imported when it is called, or imported inside a function.
"""

import dataclasses
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from saejax.runner.config import Config, Configs
from saejax.settings.kinds import unit_names

_LONGEST = 100  # characters of the name of a folder's unit


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage: what it reads, needs and costs, and where its functions are.

    Attributes:
      name: name of its folder in a workdir, and of its binary.
      summary: what it does, one line.
      run: "module:function" that does it: a ``workspace.Run`` in, its results out.
      results: "module:Class" of its results; "": they are plain JSON data.
      groups: the groups of configuration that its result depends on, as classes.
      reads_all: whether its result depends on all other stages' groups, too.
      placement: groups it reads of which the fingerprint takes nothing: they say where and how fast it is computed, or
        ``identity`` covers what counts.
      reads: the stages whose units it may read; "*": all others. Its binary accepts their flags, too.
      follows: further stages that run before it, because they may write what its flags name as folders.
      first: whether it runs before all stages that are not ``first``.
      makes_model: whether what it examines is made in it, and is not the model that the settings name.
      needs_decoder: whether it is left out of a pipeline whose model runs in PyTorch.
      needs: the units it reads, given the configuration and the unit's name, as "stage" or "stage/name".
      names: its units' names, given the configuration; [""] for one unit.
      identity: what it reads from outside the workdir: its fingerprint, given the configuration.
      unit_identity: the same for what only one unit reads, given that unit's name, too.
      check: a ``UserError`` where settings name what is not there, though no unit makes it: asked for before any stage
        runs, so that no hours are spent first.
      programs: "module:function" that gives the large jitted functions that it runs, as ``Program`` of ``costs``: a
        ``PlannedRun`` and a mesh in.
      section: "module:function" that writes its part of the report: ``Findings`` and ``Draw`` in, sections out.
      rule: "module:function" that gives the rule of its verdicts in words, from its own settings; "" without verdicts.
        Runs write it down before there are data (``preregistration``).
      unread: settings of its groups, as "group.field", that a unit's code does not read, given the configuration and
        the unit's name: what only another value of a setting makes count.
      revision: version of what it computes, raised when a code change alters its results; units of an earlier revision
        are made anew.
      processes: what several processes do with a unit: the first "one" does it alone; they split its "items"
        (``Run.each``), and the first one joins these; or they run "all" of it together, on the devices of all.
    """

    name: str
    summary: str
    run: str
    groups: tuple[type[Config], ...]
    reads_all: bool = False
    placement: tuple[type[Config], ...] = ()
    reads: tuple[str, ...] = ()
    follows: tuple[str, ...] = ()
    first: bool = False
    makes_model: bool = False
    needs_decoder: bool = False
    needs: Callable[[Configs, str], Sequence[str]] = lambda configs, name: ()
    names: Callable[[Configs], Sequence[str]] = lambda configs: ("",)
    identity: Mapping[str, Callable[[Configs], str]] = dataclasses.field(default_factory=dict)
    unit_identity: Mapping[str, Callable[[Configs, str], str]] = dataclasses.field(default_factory=dict)
    check: Callable[[Configs], None] = lambda configs: None
    programs: str = ""
    section: str = ""
    results: str = ""
    rule: str = ""
    unread: Callable[[Configs, str], Sequence[str]] = lambda configs, name: ()
    revision: int = 1
    processes: Literal["one", "items", "all"] = "one"

    def units(self, configs: Configs) -> list[str]:
        """Return the stage's units, as "stage" or "stage/name"."""
        return [f"{self.name}/{name}" if name else self.name for name in self.names(configs)]


def load(target: str) -> Callable:
    """Return the function that "module:function" names."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def folder_name(dictionary: str) -> str:
    """Return the unit name of a dictionary: "topk-k32" for "topk/k32", "runs-demo-train-topk" for a folder."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", dictionary).strip("-.")[-_LONGEST:].lstrip("-.") or "dictionary"


def is_folder(dictionary: str) -> bool:
    """Return whether a flag names a dictionary by its folder, and not by its kind as "topk" or "topk/k32" do."""
    if dictionary.partition("/")[0] in unit_names():
        return False
    return "/" in dictionary or Path(dictionary).is_dir()


def train_units(*dictionaries: str) -> tuple[str, ...]:
    """Return the distinct units that train these dictionaries; dictionaries named by a folder have none."""
    kinds = [name.partition("/")[0] for name in dictionaries if not is_folder(name)]
    return tuple(dict.fromkeys(f"train/{kind}" for kind in kinds))
