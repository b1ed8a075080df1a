"""Discovery of all stages, and of the groups of configuration that they read.

preflight   baseline ──► capture ──► train/<kind> ──► evaluate/<kind>
                │           │             │                │
                ├───────────┴─► ablate ◄──┤                │
                └─────────────► probe  ◄──┤                │
                                   │    study/<name>       │
                                   └─────┴► report ◄───────┘
            benchmark/<name> ─────────────────┘
            patch/<kind of site> ─────────────┤
            steer/<dictionary> ───────────────┤
            interpret/<kind> ─► atlas/<kind> ─┤   (explain/<kind> between the two)
            transfer ─────────────────────────┤
            cluster ──────────────────────────┤
            crosscode ────────────────────────┤
            track/<slug> ─────────────────────┤
            attribute/<slug> ─────────────────┘
"""

import heapq
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from saejax.config import Config, Configs, group_name
from saejax.stage import Stage


def _found() -> Iterable[Stage]:
    """Return the stages of every ``stage.py`` in the package's folders.

    Each file is imported by itself, without the ``__init__.py`` of its folder, which may import JAX.
    """
    root = Path(__file__).parent
    for path in sorted(root.glob("*/**/stage.py")):
        name = ".".join([root.name, *path.relative_to(root).with_suffix("").parts])
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec and spec.loader
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        yield from (value for value in vars(sys.modules[name]).values() if isinstance(value, Stage))


def ordered(stages: Iterable[Stage]) -> dict[str, Stage]:
    """Return stages by name, each after those that it must follow, otherwise in alphabetical order.

    Raises:
      ValueError: stages depend on each other in a cycle, or on one that does not exist.
    """
    named = {stage.name: stage for stage in stages}
    first = {stage.name for stage in named.values() if stage.first}
    waits = {name: {*stage.after, *(() if stage.first else first)} for name, stage in named.items()}
    waits |= {name: set(named) - {name} for name, before in waits.items() if "*" in before}
    ready, found = sorted(name for name in named if not waits[name]), dict[str, Stage]()
    while ready:
        name = heapq.heappop(ready)
        found[name] = named[name]
        for other, before in waits.items():
            if name in before and not before - found.keys():
                heapq.heappush(ready, other)
    if missing := named.keys() - found.keys():
        raise ValueError(f"stages wait for each other, or for one that does not exist: {sorted(missing)}")
    return found


STAGES = ordered(_found())
GROUPS: Mapping[str, type[Config]] = {
    group_name(group): group for stage in STAGES.values() for group in (*stage.groups, *stage.placement)
}


def groups_of(stage: Stage) -> tuple[type[Config], ...]:
    """Return the groups that a stage's result depends on."""
    return tuple(GROUPS.values()) if stage.reads_all else stage.groups


def default_configs() -> Configs:
    """Return every group with its defaults."""
    return Configs(*(group() for group in GROUPS.values()))
