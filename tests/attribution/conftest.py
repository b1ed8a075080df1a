"""What the tests of graphs share; helpers stand in this folder, which pytest puts on the path for the folders below."""

import functools

import pytest
from made_graphs import load_tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, one_device):
    """A function that gives the tiny model of a family, the same one for all tests."""
    return functools.cache(
        lambda family, **changes: load_tiny(tmp_path_factory.mktemp(family), family, one_device, **changes)
    )
