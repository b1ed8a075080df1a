"""Pages of made-up graphs, open in a browser."""

import pytest
from browser import chromium
from graph_pages import FEATURE, show
from made_up_documents import made_up_document

from saejax.attribution.forms.features import FeatureDetails
from saejax.page.graph.page import write_page


@pytest.fixture(scope="session")
def document():
    return made_up_document()


@pytest.fixture(scope="session")
def page(document, tmp_path_factory):
    """The address of the page of a small graph; its features have examples, and one a label that is HTML."""
    path = tmp_path_factory.mktemp("page") / "graph.html"
    first = dict(tokens=["The", " city\n", "</script><i>", " Austin"], activations=[0.0, 0.0, 1.5, 0.0])
    known = FeatureDetails((first,), (" Austin", "</script>"), (" Dallas",))
    features = [node for node in document["nodes"] if node["feature_type"] == FEATURE]
    keys = [tuple(map(int, node["node_id"].split("_")[:2])) for node in features]
    labels = {keys[0]: "<img src=x onerror=alert(1)>"}
    write_page(path, document, labels=labels, details=dict.fromkeys(keys, known))
    return path.as_uri()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def opened(browser, page):
    """The browser with the small graph on a desk's screen; whatever a test did, the page must have raised no error."""
    browser.view(1440, 900, still=True)
    show(browser, page)
    yield browser
    assert browser.errors == []


@pytest.fixture
def show_page(browser, tmp_path):
    """A function that shows a document on a desk's screen; the page must have raised no error."""

    def show_it(document, every_node=True, **more):
        write_page(tmp_path / "graph.html", document, **more)
        browser.view(1440, 900, still=True)
        show(browser, (tmp_path / "graph.html").as_uri(), every_node)
        return browser

    yield show_it
    assert browser.errors == []
