"""Scenes for preflight's tests."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from saejax.costs.cost import PlannedRun
from saejax.models.config import DecoderConfig
from saejax.models.families import read_config
from saejax.preflight import sums
from saejax.registry import GROUPS
from saejax.training.members import SiteScale
from saejax.training.step import Trainer

CONFIGS = Path(__file__).parents[2] / "configs"
ONE = dict(member=1, data=1, model=1)


def settings(**changes: Any) -> dict[str, Any]:
    """Every group of configuration, with changes such as train__k=3."""
    configs: dict[str, Any] = {group: cls() for group, cls in GROUPS.items()}
    for key, value in changes.items():
        group, field = key.split("__")
        configs[group] = dataclasses.replace(configs[group], **{field: value})
    return configs


def shape(name: str) -> DecoderConfig:
    """The decoder of a file in configs/shapes."""
    return read_config(json.loads((CONFIGS / "shapes" / f"{name}.json").read_text()), name)


def plan_run(
    model: DecoderConfig, site: str = "", axes: Any = ONE, text: tuple[int, int] = (0, 0), **changes: Any
) -> PlannedRun:
    """A model's plan with its dictionary at a site; on one device, unless ``axes`` are given."""
    if site:
        changes |= dict(capture__sites=(site,), train__sites=(site,))
    return sums.plan_run("model", model, settings(**changes), axes, documents=text[0], tokens=text[1])


def make_needs(*arguments: Any, **changes: Any) -> sums.Needs:
    """What the units of ``plan_run`` cost."""
    return sums.Needs.of(plan_run(*arguments, **changes))


def on_mesh(plan: PlannedRun, mesh: Mesh) -> PlannedRun:
    """The plan on these devices."""
    return dataclasses.replace(plan, mesh=mesh, axes=mesh.shape)


def make_trainer(plan: PlannedRun, mesh: Mesh) -> Trainer:
    """The trainer of the plan's first stack."""
    stack = next(iter(plan.stacks.values()))
    scale = SiteScale(1.0, 1.0, np.zeros(stack.dictionary.d_in, np.float32))
    return Trainer(plan.configs["train"], stack.dictionary, stack.members, mesh, 10, [scale] * len(stack.members))
