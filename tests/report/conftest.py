"""The report on the made-up workspace."""

import pytest
from made_up_workspace import made_up_contexts, make_run, make_workspace
from report_page import Page

from saejax.report import run as report
from saejax.report.run import run_report


@pytest.fixture(scope="module")
def contexts_are_made_up():
    """No store is searched: the contexts are made up, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "contexts", lambda run, name, features, count: made_up_contexts(features, count))
        yield


@pytest.fixture(scope="module")
def made(contexts_are_made_up, tmp_path_factory):
    """The report on the made-up workspace: its folder, its results, its page."""
    root = tmp_path_factory.mktemp("report")
    run = make_run(root, make_workspace(root))
    results = run_report(run)
    return run.folder, results, Page((run.folder / "index.html").read_text(encoding="utf-8"))
