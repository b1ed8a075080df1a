"""A tiny model on eight devices, and a spy on what stages call."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from saejax import load_model
from saejax.parallel.mesh import AXES


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    devices = np.array(jax.devices()).reshape(1, 2, 4)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.fixture(scope="module")
def lm(tiny_llama, mesh):
    return load_model(str(tiny_llama), mesh=mesh)


@pytest.fixture
def spy(monkeypatch):
    """spy(module, name): the arguments of all calls, while the function goes on working."""

    def watch(module, name: str) -> list:
        calls: list = []
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments: calls.append(arguments) or function(*arguments))
        return calls

    return watch
