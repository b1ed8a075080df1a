"""The report on the made-up workspace."""

import pytest
from made_up_workspace import make_workspace
from report_page import Report


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    return Report(root, make_workspace(root), draws=True)
