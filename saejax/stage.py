"""What a stage is: one object, beside the code that it describes.

Every file ``saejax/**/stage.py`` declares the stages of its folder as ``Stage`` objects at the top level; ``stages``
finds them. Such a file is read by every binary, so it imports settings and this module alone: what does the work is
named as "module:function" and imported when it is called, or imported inside a function.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Configs = Mapping[str, Any]  # the groups of configuration by name


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage: what it reads, needs and costs, and where its functions are.

    Attributes:
      name: of its folder in a workdir, and of its binary.
      summary: what it does, one line.
      run: "module:function" that does it: a ``workspace.Run`` in, its results out.
      results: "module:Class" of its results; "": they are plain JSON data.
      groups: the groups of configuration that its result depends on, as classes.
      reads_all: whether its result depends on all other stages' groups, too.
      placement: groups it reads that change only where and how fast it is computed.
      after: stages that run before it: those whose units it reads, and those that may write what its flags name; "*":
        all others.
      first: whether it runs before all that are not.
      needs: the units it reads, given the configuration and the unit's name, as "stage" or "stage/name".
      names: its units' names, given the configuration; [""] for one unit.
      identity: what it reads from outside the workdir: its fingerprint, given the configuration.
      unit_identity: the same of what only the unit of one name reads, given the name, too.
      cost: "module:function" that says what a unit takes: a ``PlannedRun`` and the unit's name in, a ``Cost`` out, both
        of ``costs``; "" where that is little.
      programs: "module:function" that gives the large jitted functions that it runs, as ``Program`` of ``costs``: a
        ``PlannedRun`` and a mesh in.
      section: "module:function" that writes its part of the report: ``Findings`` and ``Draw`` in, sections out.
      many_processes: whether all processes of a run take part in it; otherwise the first one does it alone, on its own
        devices, and the others wait.
    """

    name: str
    summary: str
    run: str
    groups: tuple[type, ...]
    reads_all: bool = False
    placement: tuple[type, ...] = ()
    after: tuple[str, ...] = ()
    first: bool = False
    needs: Callable[[Configs, str], Sequence[str]] = lambda configs, name: ()
    names: Callable[[Configs], Sequence[str]] = lambda configs: ("",)
    identity: Mapping[str, Callable[[Configs], str]] = dataclasses.field(default_factory=dict)
    unit_identity: Mapping[str, Callable[[Configs, str], str]] = dataclasses.field(default_factory=dict)
    cost: str = ""
    programs: str = ""
    section: str = ""
    results: str = ""
    many_processes: bool = False

    def units(self, configs: Configs) -> list[str]:
        """Its units, as "stage" or "stage/name"."""
        return [f"{self.name}/{name}" if name else self.name for name in self.names(configs)]


def load(target: str) -> Callable:
    """The function that "module:function" names."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def folder_name(dictionary: str) -> str:
    """The name of the unit of a dictionary such as "topk" or "topk/k32", which has a folder of its own, "topk-k32"."""
    return dictionary.replace("/", "-")


def train_unit(dictionary: str) -> str:
    """The unit that trains a dictionary such as "topk" or "topk/k32"."""
    return f"train/{dictionary.partition('/')[0]}"
