"""What tests of tasks share."""

import pytest
from benchmark_rows import write_all


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Formulas are given time enough to be compared on a busy machine."""
    monkeypatch.setattr("saejax.tasks.answers._SECONDS", 300)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The made-up benchmarks as files."""
    return write_all(tmp_path_factory.mktemp("benchmarks"))
