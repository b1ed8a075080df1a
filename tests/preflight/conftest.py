"""A tiny model on eight devices, and a spy on what stages call."""

import pytest
from jax.sharding import Mesh
from preflight_setup import axes

from saejax import load_model
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(MeshConfig(**axes(data=2, model=4)))


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
