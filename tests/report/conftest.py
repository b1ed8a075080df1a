"""The report on the made-up workspace."""

import pytest
from made_up_workspace import made_up_contexts, make_workspace
from report_page import Report

from saejax.report import run


@pytest.fixture(scope="module")
def contexts_are_made_up():
    """No store is searched: the contexts are made up, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "contexts", lambda stage, name, features, count: made_up_contexts(features, count))
        yield


@pytest.fixture(scope="module")
def report(contexts_are_made_up, tmp_path_factory):
    """The report on the made-up workspace."""
    root = tmp_path_factory.mktemp("report")
    return Report(root, make_workspace(root))
