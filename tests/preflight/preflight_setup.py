"""Scenes for preflight's tests."""

import dataclasses
import importlib.util
import json
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from runs import make_configs

from saejax.costs.plan import PlannedRun
from saejax.costs.programs import Program
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.models.config import DecoderConfig
from saejax.models.families import read_config
from saejax.models.language_model import LanguageModel
from saejax.models.split import SplitPoint
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.preflight.plan import plan_run as plan_of_run
from saejax.training.scales import SiteScale
from saejax.training.settings import TrainConfig
from saejax.training.stack import TrainStack

CONFIGS = Path(__file__).parents[2] / "configs"
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (tpu)")


def axes(data: int = 1, model: int = 1) -> dict[str, int]:
    """The sizes of a mesh."""
    return dict(member=1, data=data, model=model)


def shape(name: str) -> DecoderConfig:
    """The decoder of a file in configs/shapes."""
    return read_config(json.loads((CONFIGS / "shapes" / f"{name}.json").read_text()), name)


def plan_run(
    model: DecoderConfig, site: str = "", sizes: Any = None, text: tuple[int, int] = (0, 0), **changes: Any
) -> PlannedRun:
    """A model's plan with its dictionary at a site; on one device, unless ``sizes`` are given."""
    if site:
        changes |= dict(capture__sites=(site,), train__sites=(site,))
    sizes = sizes or axes()
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: prod(sizes.values())])
    return plan_of_run("model", model, make_configs(**changes), mesh, documents=text[0], tokens=text[1])


def on_mesh(plan: PlannedRun, mesh: Mesh) -> PlannedRun:
    """The plan on these devices."""
    return dataclasses.replace(plan, mesh=mesh)


def make_stack(plan: PlannedRun, mesh: Mesh) -> TrainStack:
    """What is trained of the plan's first stack."""
    stack = next(iter(plan.stacks.values()))
    scale = SiteScale(1.0, 1.0, np.zeros(stack.dictionary.d_in, np.float32))
    scales = [scale] * len(stack.members)
    return TrainStack(plan.configs[TrainConfig], stack.dictionary, stack.members, scales, 10, mesh)


def arrays(arguments: Any) -> list[tuple]:
    """Shape, dtype and, unless JAX is free to choose it, placement of every array among the arguments of a call."""
    described = []
    for leaf in jax.tree.leaves(arguments):
        if isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
            place = getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None
            described.append((leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype, True), place))
    return described


def assert_same_call(program: Program, seen: tuple) -> None:
    """A program's arguments are those of a call: arrays by shape, dtype and placement; and where and how it runs."""
    planned, called = (
        [part for part in call if isinstance(part, (str, DecoderConfig, SplitPoint))]
        for call in (program.arguments, seen)
    )
    assert planned == called
    pairs = zip(arrays(program.arguments), arrays(seen), strict=True)
    for (shape, dtype, place), (seen_shape, seen_dtype, seen_place) in pairs:
        assert (shape, dtype) == (seen_shape, seen_dtype), program.name
        if place is not None and seen_place is not None:
            assert place.is_equivalent_to(seen_place, len(shape)), (program.name, shape)


def make_dictionary(lm: LanguageModel, plan: PlannedRun, stage: str = "ablate") -> Dictionary:
    """A dictionary as large as the one that a stage tests."""
    tested = plan.dictionary(stage)
    sizes = {name: getattr(tested, name) for name in ("kind", "k", "site", "d_in", "n_features")}
    config = DictionaryConfig(**sizes, max_norm=1e3, model=lm.source.name, fingerprint=lm.source.fingerprint)
    return Dictionary.initial(config, jax.random.key(0))
