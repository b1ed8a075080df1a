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
            track/<slug> ─────────────────────┤
            attribute/<slug> ─────────────────┤
            circuits ─────────────────────────┘
"""

import dataclasses
import functools
import heapq
import importlib
import pkgutil
from collections.abc import Iterable, Mapping

from saejax import stages
from saejax.config import Config, Configs, group_name
from saejax.parallel.settings import MeshConfig
from saejax.runner.flags import flag_name
from saejax.runner.stage import Stage


def _discover() -> Iterable[Stage]:
    """Yield the stages of every ``stage.py`` in the folders of ``saejax/stages``."""
    for module in pkgutil.iter_modules(stages.__path__):
        if module.ispkg:
            loaded = importlib.import_module(f"{stages.__name__}.{module.name}.stage")
            yield from (value for value in vars(loaded).values() if isinstance(value, Stage))


def sort_stages(stages: Iterable[Stage]) -> dict[str, Stage]:
    """Return stages by name, each after the stages that it must follow, otherwise in alphabetical order.

    Raises:
      ValueError: stages depend on each other in a cycle, or on one that does not exist.
    """
    named = {stage.name: stage for stage in stages}
    first = {stage.name for stage in named.values() if stage.first}
    waits = {name: {*stage.reads, *stage.follows, *(() if stage.first else first)} for name, stage in named.items()}
    # A stage that reads all others runs after all of them.
    waits |= {name: set(named) - {name} for name, before in waits.items() if "*" in before}
    ready, in_order = sorted(name for name in named if not waits[name]), dict[str, Stage]()
    while ready:
        name = heapq.heappop(ready)
        in_order[name] = named[name]
        for follower, before in waits.items():
            if name in before and not before - in_order.keys():
                heapq.heappush(ready, follower)
    if missing := named.keys() - in_order.keys():
        raise ValueError(f"stages wait for each other, or for one that does not exist: {sorted(missing)}")
    return in_order


_ADDED: dict[str, Stage] = {}  # by plugins


@functools.cache
def own_stages() -> Mapping[str, Stage]:
    """Return the stages of saejax itself, by name."""
    return {stage.name: stage for stage in _discover()}


def add_stages(stages: Iterable[Stage]) -> None:
    """Add stages of plugins, or replace earlier ones of their names; a ``ValueError`` as by ``sort_stages``."""
    added = _ADDED | {stage.name: stage for stage in stages}
    sort_stages([*own_stages().values(), *added.values()])
    _ADDED.update(added)
    all_stages.cache_clear()
    all_groups.cache_clear()


@functools.cache
def all_stages() -> dict[str, Stage]:
    """Return all stages by name, with the stages of plugins, in the order in which they run."""
    return sort_stages([*own_stages().values(), *_ADDED.values()])


@functools.cache
def all_groups() -> Mapping[str, type[Config]]:
    """Return the groups of configuration that stages read, by name."""
    stages = all_stages().values()
    groups = [*(group for stage in stages for group in stage.groups), MeshConfig]
    return {group_name(group): group for group in groups}


def with_inputs(stages: Iterable[str]) -> list[str]:
    """Return stages and those whose units they read, directly or through others, in the order of ``all_stages()``."""
    waiting, reached = list(stages), set[str]()
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            stage = all_stages()[name]
            waiting += all_stages() if stage.first or "*" in stage.reads else stage.reads
    return [name for name in all_stages() if name in reached]


def accepted_groups(stages: Iterable[str]) -> list[str]:
    """Return the names of the groups whose flags a binary accepts: groups of its stages and of all stages they read."""
    accepted = {group_name(group) for name in with_inputs(stages) for group in (*all_stages()[name].groups, MeshConfig)}
    return [group for group in all_groups() if group in accepted]


def flag_of(setting: str) -> str:
    """Return the flag of a setting by its name in saved files, "group.field"."""
    group, _, name = setting.rpartition(".")
    fields = {field.name: field for field in dataclasses.fields(all_groups()[group])} if group in all_groups() else {}
    return flag_name(group, fields[name]) if name in fields and "shared" in fields[name].metadata else setting


def default_configs() -> Configs:
    """Return every group with its defaults."""
    return Configs(*(group() for group in all_groups().values()))
