"""A tiny model captured with the torch backend, for the tests of capture, and stores of known vectors."""

import functools

import known_store
import pytest
from capture_setup import Setup, make_setup

from saejax.models import source
from saejax.models.settings import ModelConfig


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
def make_store(tmp_path):
    """Writes a store of known vectors: ``make_store(dtype, shard_rows)`` gives a ``known_store.Known``."""
    return functools.partial(known_store.write, tmp_path / "store")


@pytest.fixture
def on_one_device(monkeypatch, one_device):
    """Captures by JAX on the first device alone."""
    monkeypatch.setattr("saejax.activations.request.make_mesh", lambda config: one_device)
