"""How the page looks: for every reader, on every screen, whatever the graph freeze_modes."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from browser import contrast, needs_chromium
from graph_pages import FEATURE, busy_feature, click_node, clicked, place_of, show, strongest, text
from made_up_documents import made_up_document

from saejax.attribution.graph.data import name_difference
from saejax.page.graph.page import PageTable, write_page

pytestmark = needs_chromium


def test_nothing_in_the_graph_becomes_html_and_white_space_is_visible(opened, document):
    first = next(node["node_id"] for node in document["nodes"] if node["feature_type"] == FEATURE)
    click_node(opened, first)
    assert text(opened, "#panel h2") == "<img src=x onerror=alert(1)>"
    assert opened.js("document.images.length + document.querySelectorAll('i:not(.legend i)').length") == 0
    assert "</script><i>" in text(opened, "#panel .contexts") and "↵" in text(opened, "#panel .contexts")
    opened.click_on("#search")
    opened.type("E_100")
    opened.key("Enter")
    assert text(opened, "#panel h2") == "<bos>"
    opened.js("document.getElementById('search').value = ''")
    opened.click_on("#search")
    opened.type("E_ capital")
    opened.click_on("#found .row")
    assert text(opened, "#panel h2") == "␣capital" and clicked(opened) == "E_104_4"


@pytest.mark.parametrize(
    ("name", "shown", "kind"),
    [
        ("' is' - ' are'", "␣is − ␣are", "difference of logits"),
        (name_difference("\n", "\\xe0'"), "↵ − \\xe0'", "difference of logits"),
        ("more French", "more␣French", "direction"),
    ],
)
def test_an_output_that_is_no_token_has_its_name_and_no_probability(show_page, name, shown, kind):
    """Of a difference the names of both tokens; a direction has the name that it was given."""
    document = made_up_document(features=20, edges=60)
    output = next(node for node in document["nodes"] if node["feature_type"] == "logit")
    renamed = dict(node_id="13_-1_10", clerp=f'Output "{name}" (p=1.000)', token_prob=1.0)
    for link in document["links"]:
        if link["target"] == output["node_id"]:
            link["target"] = renamed["node_id"]
    output |= renamed
    browser = show_page(document)
    click_node(browser, output["node_id"])
    assert text(browser, "#panel h2") == shown
    panel = text(browser, "#panel")
    assert kind in panel and "Probability" not in panel


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_follow_the_reader(browser, page, dark):
    browser.view(1440, 900, dark=dark)
    show(browser, page)
    paper = browser.js("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 24, 29)" if dark else "rgb(255, 255, 255)")
    inside = "getComputedStyle(document.documentElement).getPropertyValue('--%s')"
    for ink in ("ink", "soft", "link", "plus", "minus"):
        colours = [browser.js(inside % name).strip() for name in (ink, "paper")]
        assert contrast(*colours) >= 4.5, (ink, colours)
    browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    browser.settle()
    assert browser.js("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_a_phone_shows_all_of_it(browser, page, document):
    browser.view(360, 740, phone=True)
    show(browser, page)
    assert browser.js("document.documentElement.scrollWidth") <= 360
    wide = """[...document.querySelectorAll('body *')].filter(e =>
      !e.closest('#stage, #subgraph-figure, .unseen, [hidden]') && e.getBoundingClientRect().right > 361
    ).map(e => e.outerHTML.slice(0, 80))"""
    assert browser.js(wide) == []
    node = busy_feature(document)
    browser.js("document.getElementById('stage').scrollIntoView()")
    browser.settle()
    place = place_of(browser, node)
    browser.js(f"document.getElementById('stage').scrollLeft += {place['x'] - 180}")
    browser.settle()
    place = place_of(browser, node)
    browser.tap(place["x"], place["y"])
    browser.wait(f"attributionGraph.state.clickedId === {json.dumps(node)}")
    browser.settle()
    assert browser.js("document.getElementById('tip').hidden")
    assert browser.js("document.querySelector('#panel').getBoundingClientRect().width") > 340
    assert browser.js("document.querySelector('#selected').getBoundingClientRect().bottom") <= 741
    assert browser.js(wide) == []


def test_tables_are_shown_where_they_are_given(show_page, document):
    node = busy_feature(document)
    source, *_ = strongest(document, node, True)[0]
    rows_ = [[node, source, 0.25], ["bias", "bias", -1.5]]
    table = PageTable("Head 3.1 at <b>is</b>", ["query", "key", "score"], rows_, "A note.")
    browser = show_page(document, tables=[table])
    assert text(browser, "#tables summary") == "Head 3.1 at <b>is</b>"
    browser.click_on("#tables summary")
    assert text(browser, "#tables tbody").split("\n")[-1].split("\t") == ["bias", "bias", "−1.50"]
    browser.click_on("#tables td button")
    assert clicked(browser) == node


ODD = {
    "tokens alone": dict(features=0, edges=0, errors=0, outputs=1, positions=2, layers=1),
    "one layer": dict(features=30, edges=60, layers=1, errors=0),
    "long prompt": dict(features=400, edges=2000, positions=600, layers=8),
    "deep": dict(features=300, edges=2000, layers=120),
}


@pytest.mark.parametrize("shape", ODD.values(), ids=ODD)
def test_odd_graphs_are_drawn(browser, tmp_path, shape):
    odd = made_up_document(**shape)
    for node in odd["nodes"]:
        node["influence"] = None
    odd["qParams"], odd["metadata"]["prompt"] = {}, ""
    write_page(tmp_path / "graph.html", odd)
    for width in (360, 1440):
        browser.view(width, 800)
        show(browser, (tmp_path / "graph.html").as_uri())
        browser.js("document.getElementById('stage').focus()")
        for key in ("ArrowDown", "ArrowDown", "ArrowLeft", "p", "+", "-"):
            browser.key(key)
        assert clicked(browser)
        assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.errors == []


CONTROLS = {"button", "slider", "combobox", "checkbox", "textbox", "application"}


def test_every_control_has_a_name(opened, document):
    node = busy_feature(document)
    click_node(opened, node, modifiers=8)
    click_node(opened, strongest(document, node, True)[0][0], modifiers=8)
    click_node(opened, node)
    tree = opened.send("Accessibility.getFullAXTree")["nodes"]
    named = {}
    for element in tree:
        role = element.get("role", {}).get("value")
        if not element.get("ignored") and role in CONTROLS:
            named.setdefault(role, []).append(element.get("name", {}).get("value", ""))
    assert set(named) == CONTROLS and all(name.strip() for names in named.values() for name in names)
    assert opened.js("document.querySelector('[aria-live]').textContent").startswith(
        opened.js(f"attributionGraph.place({json.dumps(node)}).label")
    )


def test_nothing_moves_for_who_does_not_want_it_and_nobody_is_asked_for_anything(opened):
    assert opened.js("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length") == 0
    moving = "[...document.querySelectorAll('*')].filter(e => parseFloat(getComputedStyle(e).transitionDuration) > 0)"
    assert opened.js(f"{moving}.length") == 0
    opened.view(1440, 900, still=False)
    assert opened.js(f"{moving}.length") == 1


def test_names_of_pinned_nodes_do_not_cover_each_other(opened, document):
    """The selected node has its name, whatever is pinned beside it."""
    features = [node for node in document["nodes"] if node["feature_type"] == FEATURE]
    count = Counter((node["layer"], node["ctx_idx"]) for node in features)
    cell = max(count, key=count.get)
    ids = [node["node_id"] for node in features if (node["layer"], node["ctx_idx"]) == cell]
    assert len(ids) > 2
    for node_id in ids:
        click_node(opened, node_id, modifiers=8)
    click_node(opened, ids[1])
    opened.js(
        """(() => {
          const draw = CanvasRenderingContext2D.prototype.strokeText;
          window.written = [];
          CanvasRenderingContext2D.prototype.strokeText = function (text, x, y) {
            const wide = this.measureText(text).width;
            written.push([text, this.textAlign === 'right' ? x - wide : x, wide, y]);
            draw.call(this, text, x, y);
          };
          attributionGraph.redraw();
        })()"""
    )
    written = opened.js("written")
    assert place_of(opened, ids[1])["label"] in [name for name, *_ in written]
    for (_, x, wide, y), (_, left, _, top) in itertools.permutations(written, 2):
        assert abs(top - y) >= 11 or not x <= left < x + wide


def test_nodes_do_not_cover_each_other(opened, document):
    ids = [node["node_id"] for node in document["nodes"] if node["feature_type"] != "logit"]
    places = opened.js(f"{json.dumps(ids)}.map(id => attributionGraph.place(id))")
    x_N, y_N, radius_N = (np.array([place[name] for place in places]) for name in ("x", "y", "radius"))
    apart_NxN = np.hypot(x_N[:, None] - x_N, y_N[:, None] - y_N) - (radius_N[:, None] + radius_N)
    assert apart_NxN[~np.eye(len(ids), dtype=bool)].min() >= 0


def test_names_stand_where_they_hide_fewer_nodes(show_page):
    """To the left of a node whose neighbours stand at its right, where there is room."""
    document = made_up_document(features=6, edges=20, layers=3, seed=0)
    one = next(one for one in document["nodes"] if one["feature_type"] == FEATURE)
    copies = [
        {**one, "node_id": f"1_{k}_5", "layer": "1", "ctx_idx": 5, "feature": k, "clerp": "named" * (k == 0)}
        for k in range(3)
    ]
    others = [{**other, "clerp": ""} for other in document["nodes"]]
    browser = show_page({**document, "nodes": others + copies})
    ids = [copy["node_id"] for copy in copies]
    x = [browser.js(f"attributionGraph.place({json.dumps(id)}).x") for id in ids]
    browser.js(
        "window.said = []; const fill = CanvasRenderingContext2D.prototype.fillText;"
        "CanvasRenderingContext2D.prototype.fillText = function (text, ...at) {"
        " said.push([text, this.textAlign]); return fill.call(this, text, ...at); }"
    )
    browser.view(1200, 900, still=True)
    browser.wait("said.some(([text]) => text === 'named')")
    sides = {side for text, side in browser.js("said") if text == "named"}
    assert x == sorted(x) and sides == {"right"}, (x, sides)  # the text ends at the node
