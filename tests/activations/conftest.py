"""A tiny model captured with the torch backend, for the tests of capture."""

import pytest
from capture_setup import Setup, make_setup

from saejax.models import source
from saejax.settings import ModelConfig


@pytest.fixture(scope="module")
def setup(tiny_llama, tmp_path_factory) -> Setup:
    return make_setup(tiny_llama, tmp_path_factory.mktemp("capture"))


@pytest.fixture(scope="module")
def captured(setup):
    """Every kind of site at two layers, every position, fp32."""
    return setup.capture("whole")


@pytest.fixture(scope="module")
def torch_model(tiny_llama):
    return source.load_torch_model(source.resolve(ModelConfig(path=str(tiny_llama))), "float32")


@pytest.fixture
def on_one_device(monkeypatch, one_device):
    """Captures by JAX on the first device alone."""
    monkeypatch.setattr("saejax.parallel.mesh.make_mesh", lambda config: one_device)
