"""Work for preflight's tests."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from saejax.models.config import DecoderConfig
from saejax.models.families import read_config
from saejax.preflight.work import Work, plan_work
from saejax.stages import GROUPS
from saejax.training.members import SiteScale
from saejax.training.step import Trainer

CONFIGS = Path(__file__).parents[2] / "configs"


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


def make_work(model: DecoderConfig, site: str = "resid_post.15", **changes: Any) -> Work:
    """The work of a model with its dictionary at a site."""
    return plan_work("model", model, settings(capture__sites=(site,), train__sites=(site,), **changes))


def make_trainer(work: Work, mesh: Mesh) -> Trainer:
    """The trainer of the work's first stack."""
    stack = work.stacks[0]
    scale = SiteScale(1.0, 1.0, np.zeros(stack.dictionary.d_in, np.float32))
    return Trainer(work.train, stack.dictionary, stack.members, mesh, 10, [scale] * len(stack.members))
