"""The interactive page, driven in a real browser: what readers find on it."""

import json
from collections import Counter

import numpy as np
import pytest
from browser import needs_chromium
from graph_pages import (
    busy_feature,
    click_node,
    clicked,
    place_of,
    rows,
    scores,
    slide,
    state,
    strongest,
    text,
)
from made_up_documents import made_up_document

pytestmark = needs_chromium


def test_a_click_shows_inputs_and_outputs_with_signs_and_shares(opened, document):
    node = busy_feature(document)
    click_node(opened, node)
    assert clicked(opened) == node
    for which, into in (("inputs", True), ("outputs", False)):
        edges = strongest(document, node, into)
        assert rows(opened, which) == [other for other, *_ in edges[:40]]
        weight, share = opened.js(
            f"(() => {{ const row = document.querySelector('#panel .{which} .row');"
            "return [row.querySelector('.weight').innerText, row.querySelector('.share').innerText]; })()"
        )
        assert weight[0] == ("−" if edges[0][1] < 0 else "+")
        assert float(weight[1:]) == pytest.approx(abs(edges[0][1]), rel=0.05)
        part = [abs(weight) if into else score for _, weight, score in edges]  # outputs are of different units
        assert float(share.split()[0]) == pytest.approx(100 * part[0] / sum(part), abs=0.6)
    assert node in text(opened, "#panel .facts")


def test_rows_trace_on_and_the_back_button_goes_back(opened, document):
    node = busy_feature(document)
    click_node(opened, node)
    up, down = strongest(document, node, False)[0][0], strongest(document, node, True)[0][0]
    opened.click_on("#panel .inputs .row")
    assert clicked(opened) == down
    opened.js("history.back()")
    opened.wait(f"attributionGraph.state.clickedId === {json.dumps(node)}")
    opened.click_on("#panel .outputs .row")
    assert clicked(opened) == up
    opened.key("Escape")
    assert clicked(opened) == ""
    assert "Where to start" in text(opened, "#panel")
    opened.js("history.back()")
    opened.wait(f"attributionGraph.state.clickedId === {json.dumps(up)}")


def test_pointing_shows_a_tip_and_lights_the_edges_up(opened, document):
    node = busy_feature(document)
    place = place_of(opened, node)
    before = opened.js("document.getElementById('upper').toDataURL()")
    opened.move(place["x"], place["y"])
    assert not opened.js("document.getElementById('tip').hidden")
    tip = text(opened, "#tip")
    layer, feature, _ = node.split("_")
    assert all(part in tip for part in (f"Layer\n{layer}", f"Feature\n{feature}", "Activation", "Influence", "Austin"))
    assert opened.js("document.getElementById('view').classList.contains('lit')")
    assert opened.js("document.getElementById('upper').toDataURL()") != before
    opened.move(5, 880)
    assert opened.js("document.getElementById('tip').hidden")
    assert opened.js("document.getElementById('upper').toDataURL()") == before


def test_sliders_change_what_is_shown_and_say_how_much(opened, document):
    assert text(opened, "#counts") == f"{len(document['nodes'])} of {len(document['nodes'])} nodes, 900 of 900 edges"
    slide(opened, "edges", 0.5)
    falling = np.sort(scores(document))[::-1]
    kept = int(np.searchsorted(np.cumsum(falling) / falling.sum(), 0.5)) + 1
    assert f"{kept} of 900 edges" in text(opened, "#counts")
    slide(opened, "edges", 1)
    slide(opened, "nodes", 0.5)
    free = [node for node in document["nodes"] if node["feature_type"] not in ("embedding", "logit")]
    limit = max(node["influence"] for node in free) * 0.5
    left = sum(node["influence"] <= limit for node in free) + len(document["nodes"]) - len(free)
    assert text(opened, "#counts").startswith(f"{left} of ")
    hidden = next(node["node_id"] for node in free if node["influence"] > limit)
    assert not opened.js(f"attributionGraph.place({json.dumps(hidden)}).shown")
    slide(opened, "nodes", 1)


def test_lists_of_a_node_do_not_follow_the_slider_of_the_whole_graph(show_page):
    """With a hundredth of all edges in the picture, the 40 strongest of each node are in its lists."""
    crowded = made_up_document(edges=4000)
    browser = show_page(crowded)
    node = Counter(link["target"] for link in crowded["links"]).most_common(1)[0][0]
    slide(browser, "edges", 0.01)
    click_node(browser, node)
    edges = strongest(crowded, node, True)
    assert len(edges) > 45 and rows(browser, "inputs") == [other for other, *_ in edges[:40]]
    assert f"{len(edges) - 40} weaker edge" in text(browser, "#panel .inputs .more")
    browser.click_on("#panel .inputs .more button")
    assert len(rows(browser, "inputs")) == len(edges)


def test_the_strongest_inputs_are_listed_whether_the_picture_shows_them_or_not(opened, document):
    """The slider of nodes hides most of them; one that is clicked appears."""
    slide(opened, "nodes", 0.1)
    features = [node["node_id"] for node in document["nodes"] if node["activation"] is not None]
    ids = [node for node in features if len(strongest(document, node, True)) > 3][:6]
    assert len(ids) == 6
    hidden = 0
    for node in ids:
        opened.js(f"location.hash = '#clickedId={node}&nodes=0.1&edges=1'")
        opened.wait(f"attributionGraph.state.clickedId === '{node}'")
        for which, into in (("inputs", True), ("outputs", False)):
            wanted = [other for other, *_ in strongest(document, node, into)[:40]]
            assert rows(opened, which) == wanted
            shown = [place_of(opened, other)["shown"] for other in wanted]
            said = opened.js(f"[...document.querySelectorAll('#panel .{which} .row')].map(r => r.innerText)")
            assert [" · hidden" not in words for words in said] == shown
            hidden += shown.count(False)
    assert hidden > 5
    first = rows(opened, "inputs")[0]
    opened.js("document.getElementById('stage').focus()")
    opened.key("ArrowDown")
    assert clicked(opened) == first and place_of(opened, first)["shown"]


def test_keys_trace_pin_and_search(opened, document):
    opened.js("document.getElementById('stage').focus()")
    opened.key("ArrowDown")
    logits = [node for node in document["nodes"] if node["feature_type"] == "logit"]
    best = max(logits, key=lambda node: node["token_prob"])["node_id"]
    assert clicked(opened) == best
    opened.key("ArrowDown")
    down = strongest(document, best, True)[0][0]
    assert clicked(opened) == down
    opened.key("p")
    assert state(opened, "pinnedIds") == [down]
    opened.key("p")
    assert state(opened, "pinnedIds") == []
    opened.key("/")
    opened.type("say a city")
    named = [node for node in document["nodes"] if node["clerp"] == "say a city"]
    assert f"{len(named)} nodes found" in text(opened, "#found")
    opened.key("Enter")
    assert clicked(opened) in {node["node_id"] for node in named}
    assert opened.js("document.activeElement.id") == "stage"


def test_tab_reaches_everything_enter_opens_and_escape_closes(opened):
    def tab_to(selector):
        """Presses Tab until the focus is there, and returns what it passed."""
        passed = []
        for _ in range(200):
            opened.key("Tab")
            passed.append(opened.js("document.activeElement.id"))
            if opened.js(f"document.activeElement.matches({json.dumps(selector)})"):
                return passed
        raise AssertionError(f"Tab does not reach {selector}: {passed}")

    opened.js("document.querySelector('header summary').focus()")
    passed = tab_to("#panel .row")
    assert {"search", "nodes", "edges", "link-type", "zoom-in", "stage"} <= set(passed)
    node = opened.js("document.activeElement.dataset.node")
    opened.key("Enter")
    assert clicked(opened) == node and opened.js("document.activeElement.id") == "panel"
    tab_to("#pin")
    opened.key("Enter")
    assert state(opened, "pinnedIds") == [node]
    tab_to("#panel .inputs .row")
    source = opened.js("document.activeElement.dataset.node")
    opened.key("Enter")
    assert clicked(opened) == source
    opened.key("Escape")
    assert clicked(opened) == "" and state(opened, "pinnedIds") == [node]
    opened.js("document.getElementById('stage').focus()")
    tab_to("#subgraph .unit")
    opened.key("Enter")
    assert clicked(opened) == node


def test_a_large_graph_is_drawn(show_page):
    """1,500 nodes and 20,000 edges; only a hang fails."""
    large = made_up_document(features=1306, edges=20_000, layers=28, positions=24, errors=160, outputs=10)
    assert len(large["nodes"]) == 1500 and len(large["links"]) == 20_000
    browser = show_page(large)
    assert browser.js("attributionGraph.ready") < 300_000  # ms
    slide(browser, "edges", 1)
    browser.wait("attributionGraph.painted && attributionGraph.painted.edges === 20000")
    click_node(browser, large["links"][-1]["target"])
    browser.js("[...Array(20)].map(() => attributionGraph.redraw())")
