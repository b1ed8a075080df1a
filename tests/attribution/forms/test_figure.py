"""The figure for print: everything asked for is there, nothing covers anything, text keeps its size."""

import xml.etree.ElementTree

import numpy as np
import pytest
from graph_pages import scores
from made_up_documents import made_up_document
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import FancyBboxPatch, PathPatch, Rectangle

from saejax.attribution.forms import figure as figures
from saejax.attribution.forms.document import ranked_links
from saejax.attribution.forms.figure import draw_graph, save_figure, visible_token
from saejax.errors import UserError


def boxes(figure):
    """[n, 4] left, lower, right, upper edges in inches of the boxes of nodes."""
    drawn = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch | Rectangle)]
    return np.array([(p.get_x(), p.get_y(), p.get_x() + p.get_width(), p.get_y() + p.get_height()) for p in drawn])


def edges(figure):
    return [patch for patch in figure.axes[0].patches if isinstance(patch, PathPatch)]


LARGE = dict(features=700, edges=9000, layers=28, positions=24, errors=90, outputs=10)


@pytest.mark.parametrize(
    ("sizes", "nodes", "most"), [({}, 30, (7.2, 10)), ({}, 60, (7.2, 10)), (LARGE, 60, (9.2, 12.5))]
)
def test_boxes_stand_apart_on_a_page_and_hold_their_text(sizes, nodes, most, monkeypatch):
    monkeypatch.setattr(figures, "_NODES", nodes)
    figure = draw_graph(made_up_document(**sizes))
    width, height = figure.get_size_inches()
    assert width <= most[0] and height <= most[1]  # inches
    found = boxes(figure)
    assert 20 < len(found) <= nodes + 24 + 10 and len(edges(figure)) >= 60
    assert found[:, :2].min() >= 0 and (found[:, 2:] <= (width, height)).all()
    low, high = found[:, None, :2], found[:, None, 2:]
    meet = np.logical_and(low < found[None, :, 2:], found[None, :, :2] < high).all(axis=2)
    assert not meet[~np.eye(len(found), dtype=bool)].any()
    renderer = FigureCanvasAgg(figure).get_renderer()
    by_middle = {tuple(np.round((box[:2] + box[2:]) / 2, 3)): box for box in found}
    texts = [text for text in figure.axes[0].texts if text.get_zorder() == 4]
    assert len(texts) == len(found)
    for text in texts:
        assert text.get_fontsize() >= 6
        extent = text.get_window_extent(renderer).transformed(figure.dpi_scale_trans.inverted())
        box = by_middle[tuple(np.round(text.get_position(), 3))]
        assert box[0] - 0.03 <= extent.x0 and extent.x1 <= box[2] + 0.03, text.get_text()


@pytest.fixture
def small(monkeypatch):
    """Figures of few nodes and edges."""
    monkeypatch.setattr(figures, "_NODES", 10)
    monkeypatch.setattr(figures, "_EDGES", 25)


def test_it_shows_the_most_influential_nodes_and_strongest_edges(small):
    document = made_up_document(features=40, edges=300)
    figure = draw_graph(document)
    inner = sorted((n for n in document["nodes"] if n["activation"] is not None), key=lambda n: n["influence"])
    wide = {edge.get_linewidth() for edge in edges(figure)}
    assert max(wide) > 2 and len(edges(figure)) <= 25 + 2 * 10
    assert len([text for text in figure.axes[0].texts if text.get_text() == "error"]) <= 10
    inner[0]["clerp"] = "the label that I gave"
    named = draw_graph(document)
    assert "the label that I\ngave" in [text.get_text() for text in named.axes[0].texts]


def test_edges_are_ranked_by_the_influence_that_goes_through_them_not_by_their_units(small):
    document = made_up_document(features=40, edges=300)
    order, score_E = ranked_links(document)
    assert np.allclose(score_E, scores(document), atol=1e-12) and (np.diff(score_E[order]) <= 0).all()
    # A target whose unit is a thousandth of what it was: nothing that matters is another.
    target = document["links"][0]["target"]
    scaled = dict(document, links=[dict(one) for one in document["links"]])
    for link in scaled["links"]:
        link["weight"] *= 1000 if link["target"] == target else 1
    assert np.allclose(ranked_links(scaled)[1], scores(document), atol=1e-12)
    drawn, again = (
        sorted(edge.get_path().vertices.tolist() for edge in edges(draw_graph(one))) for one in (document, scaled)
    )
    assert drawn == again


def test_files_are_whole_and_the_same_bytes(tmp_path):
    document = made_up_document(features=20, edges=80)
    document["metadata"]["prompt_tokens"][3] = " $x_1$"  # no mathematics
    for name in ("a.svg", "b.svg"):
        save_figure(draw_graph(document), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    root = xml.etree.ElementTree.parse(tmp_path / "a.svg").getroot()
    assert root.tag.endswith("svg") and root.get("width").endswith("pt")


def test_what_is_no_graph_is_refused():
    with pytest.raises(UserError, match="has no qParams, nodes, links"):
        draw_graph({"metadata": {}})


def test_a_difference_of_logits_is_named_by_its_two_tokens():
    document = made_up_document(features=5, edges=5)
    output = next(node for node in document["nodes"] if node["feature_type"] == "logit")
    output |= dict(clerp="Output \"' is' - ' are'\" (p=1.000)", token_prob=1.0)
    texts = [text.get_text() for text in draw_graph(document).axes[0].texts]
    assert "␣is − ␣are" in texts and not any("'" in text for text in texts)


def test_white_space_is_visible():
    shown = {" a b": "␣a␣b", "\n\t": "↵⇥", "": "∅", "\x00": "·", "é": "é"}
    assert {token: visible_token(token) for token in shown} == shown
