"""What tests of tasks share."""

import pytest


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Formulas are given time enough to be compared on a busy machine."""
    monkeypatch.setattr("saejax.tasks.answers._SECONDS", 300)
