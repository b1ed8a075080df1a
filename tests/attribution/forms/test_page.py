"""The interactive page, driven in a real browser: what readers do with it, and what its file may hold."""

import html
import json
import re
import time
from urllib.parse import parse_qs

import numpy as np
import pytest
from browser import CHROMIUM, chromium
from made_up_documents import made_up_document

from saejax.attribution.forms.page import PageTable, embedded, write_page
from saejax.errors import UserError

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian's package: chromium)")
FEATURE = "cross layer transcoder"


@pytest.fixture(scope="module")
def document():
    return made_up_document()


@pytest.fixture(scope="module")
def page(document, tmp_path_factory):
    """The address of the page of a small graph; its features have examples, and one a label that is HTML."""
    path = tmp_path_factory.mktemp("page") / "graph.html"
    first = dict(tokens=["The", " city\n", "</script><i>", " Austin"], activations=[0.0, None, 1.5, float("nan")])
    features = [node for node in document["nodes"] if node["feature_type"] == FEATURE]
    keys = [tuple(map(int, node["node_id"].split("_")[:2])) for node in features]
    write_page(
        path, document, labels={keys[0]: "<img src=x onerror=alert(1)>"}, examples={key: [first] for key in keys}
    )
    return path.as_uri()


@pytest.fixture(scope="module")
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


def show(browser, address):
    browser.open(address)
    browser.wait("window.attributionGraph && attributionGraph.painted")
    browser.settle()


def strongest(document, node_id, into):
    """The edges into (out of) a node as (other end, weight), strongest first."""
    own, other = ("target", "source") if into else ("source", "target")
    edges = [(link[other], link["weight"]) for link in document["links"] if link[own] == node_id]
    return sorted(edges, key=lambda edge: -abs(edge[1]))


def busy_feature(document):
    """A feature with several inputs and outputs."""
    ids = [node["node_id"] for node in document["nodes"] if node["feature_type"] == FEATURE]
    return max(ids, key=lambda i: min(len(strongest(document, i, True)), len(strongest(document, i, False))))


def click_node(browser, node_id, modifiers=0):
    place = browser.js(f"attributionGraph.place({json.dumps(node_id)})")
    browser.click(place["x"], place["y"], modifiers)


def clicked(browser):
    return browser.js("attributionGraph.state.clickedId")


def rows(browser, which):
    browser.settle()
    return browser.js(f"[...document.querySelectorAll('#panel .{which} .row')].map(row => row.dataset.node)")


def text(browser, selector):
    browser.settle()
    return browser.js(f"document.querySelector({json.dumps(selector)}).innerText")


def slide(browser, slider, value):
    """Moves a slider; the browser sends the page the events of a real one."""
    browser.js(f"(() => {{ const s = document.getElementById('{slider}'); s.focus(); s.value = {value};"
               " s.dispatchEvent(new Event('input', {bubbles: true})); })()")  # fmt: skip
    browser.settle()


@needs_chromium
def test_a_click_shows_inputs_and_outputs_with_signs_and_shares(opened, document):
    node = busy_feature(document)
    click_node(opened, node)
    assert clicked(opened) == node
    for which, into in (("inputs", True), ("outputs", False)):
        edges = strongest(document, node, into)
        assert rows(opened, which) == [other for other, _ in edges[:40]]
        weight, share = opened.js(
            f"(() => {{ const row = document.querySelector('#panel .{which} .row');"
            "return [row.querySelector('.weight').innerText, row.querySelector('.share').innerText]; })()"
        )
        assert weight[0] == ("−" if edges[0][1] < 0 else "+")
        assert float(weight[1:]) == pytest.approx(abs(edges[0][1]), rel=0.05)
        total = sum(abs(w) for _, w in edges)
        assert float(share.split()[0]) == pytest.approx(100 * abs(edges[0][1]) / total, abs=0.6)
    assert node in text(opened, "#panel .facts")


@needs_chromium
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


@needs_chromium
def test_pointing_shows_a_tip_and_lights_the_edges_up(opened, document):
    node = busy_feature(document)
    place = opened.js(f"attributionGraph.place({json.dumps(node)})")
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


@needs_chromium
def test_sliders_change_what_is_shown_and_say_how_much(opened, document):
    assert text(opened, "#counts") == f"{len(document['nodes'])} of {len(document['nodes'])} nodes, 900 of 900 edges"
    slide(opened, "edges", 0.5)
    weights = np.sort(np.abs([link["weight"] for link in document["links"]]))[::-1]
    kept = int(np.searchsorted(np.cumsum(weights) / weights.sum(), 0.5)) + 1
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
    node = busy_feature(document)
    click_node(opened, node)
    slide(opened, "edges", 0.3)
    edges = strongest(document, node, True)
    sizes = np.abs([weight for _, weight in edges])
    kept = int(np.searchsorted(np.cumsum(sizes) / sizes.sum(), 0.3)) + 1
    assert rows(opened, "inputs") == [other for other, _ in edges[:kept]]
    assert f"{len(edges) - kept} weaker edge" in text(opened, "#panel .inputs .more")
    opened.click_on("#panel .inputs .more button")
    assert len(rows(opened, "inputs")) == len(edges)


@needs_chromium
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
    assert opened.js("attributionGraph.state.pinnedIds") == [down]
    opened.key("p")
    assert opened.js("attributionGraph.state.pinnedIds") == []
    opened.key("/")
    opened.type("say a city")
    named = [node for node in document["nodes"] if node["clerp"] == "say a city"]
    assert f"{len(named)} nodes found" in text(opened, "#found")
    opened.key("Enter")
    assert clicked(opened) in {node["node_id"] for node in named}
    assert opened.js("document.activeElement.id") == "stage"


@needs_chromium
def test_search_finds_ids_and_tokens(opened, document):
    node = busy_feature(document)
    opened.click_on("#search")
    opened.type(node)
    assert opened.js("[...document.querySelectorAll('#found .row')].map(r => r.dataset.node)") == [node]
    opened.js("(() => { const s = document.getElementById('search'); s.value = ''; })()")
    opened.type("E_ capital")
    assert opened.js("[...document.querySelectorAll('#found .row')].map(r => r.dataset.node)") == ["E_104_4"]
    opened.click_on("#found .row")
    assert clicked(opened) == "E_104_4"


@needs_chromium
def test_pins_become_groups_with_summed_edges(opened, document):
    node = busy_feature(document)
    sources = [other for other, _ in strongest(document, node, True)[:3]]
    for pinned in (node, *sources):
        click_node(opened, pinned, modifiers=8)
    assert opened.js("attributionGraph.state.pinnedIds") == [node, *sources]
    assert opened.js("document.querySelectorAll('#subgraph .unit').length") == 4
    names = {one: opened.js(f"attributionGraph.place({json.dumps(one)}).label") for one in sources[:2]}
    for one in sources[:2]:
        index = opened.js(
            f"[...document.querySelectorAll('#pins li')].findIndex(li => li.dataset.units === {json.dumps(one)})"
        )
        opened.click_on(f"#pins li:nth-child({index + 1}) input[type=checkbox]")
    opened.click_on("#pin-tools input")
    opened.type("both <of> them")
    opened.click_on("#pin-tools button")
    (group,) = opened.js("attributionGraph.state.supernodes")
    assert group[0] == "both <of> them" and set(group[1:]) == set(names)
    assert opened.js("document.querySelectorAll('#subgraph .unit').length") == 3
    total = sum(weight for other, weight in strongest(document, node, True) if other in names)
    titles = opened.js("[...document.querySelectorAll('#subgraph .link title')].map(t => t.textContent)")
    (title,) = [one for one in titles if "both <of> them →" in one and "sum of 2 edges" in one]
    assert float(re.search(r": ([+−][\d.]+)", title).group(1).replace("−", "-")) == pytest.approx(
        total, rel=0.02, abs=0.006
    )
    opened.click_on("#pins li:has(.group-name) input[type=checkbox]")
    index = opened.js(
        f"[...document.querySelectorAll('#pins li')].findIndex(li => li.dataset.units === {json.dumps(sources[2])})"
    )
    opened.click_on(f"#pins li:nth-child({index + 1}) input[type=checkbox]")
    assert text(opened, "#pin-tools button") == "Merge ticked"
    opened.click_on("#pin-tools button")
    (group,) = opened.js("attributionGraph.state.supernodes")
    assert set(group[1:]) == set(sources)
    opened.click_on("#pins li:has(.group-name) > .plain")
    assert opened.js("attributionGraph.state.supernodes") == []
    assert set(opened.js("attributionGraph.state.pinnedIds")) == {node, *sources}


@needs_chromium
def test_the_address_holds_the_view(opened, document, page):
    node = busy_feature(document)
    click_node(opened, node)
    opened.key("p")
    slide(opened, "edges", 0.6)
    opened.click_on("#search")
    opened.type("texas")
    opened.wait("location.hash.includes('q=texas')")
    address = opened.js("location.href")
    assert parse_qs(address.split("#")[1])["clickedId"] == [node]
    before = opened.js("attributionGraph.state"), text(opened, "#counts")
    show(opened, address)
    assert (opened.js("attributionGraph.state"), text(opened, "#counts")) == before
    assert opened.js("document.getElementById('search').value") == "texas"
    damaged = page + "#clickedId=nobody&pinnedIds=x,y&supernodes=[[&nodes=7&edges=&linkType=?"
    show(opened, damaged)
    assert clicked(opened) == "" and opened.js("attributionGraph.state.pinnedIds") == []


@needs_chromium
def test_the_state_of_the_document_is_shown(browser, document, tmp_path):
    node = busy_feature(document)
    other = strongest(document, node, True)[0][0]
    params = dict(pinnedIds=[node, other, "gone"], supernodes=[["pair", node, other]], linkType="input", clickedId=node)
    write_page(tmp_path / "graph.html", {**document, "qParams": params})
    show(browser, (tmp_path / "graph.html").as_uri())
    assert clicked(browser) == node
    assert browser.js("attributionGraph.state.supernodes") == [["pair", node, other]]
    assert rows(browser, "outputs") == [] and rows(browser, "inputs")


@needs_chromium
def test_downloads_hold_the_state_and_the_graph(opened, document, tmp_path):
    opened.send("Browser.setDownloadBehavior", at_page=False, behavior="allow", downloadPath=str(tmp_path))
    node = busy_feature(document)
    click_node(opened, node, modifiers=8)
    opened.click_on(".saves summary")
    for button, name in (
        ("state", "-state.json"),
        ("graph", ".json"),
        ("picture", ".png"),
        ("subgraph", "-subgraph.svg"),
    ):
        opened.click_on(f"#save-{button}")
        while not (tmp_path / f"made-up{name}").exists():  # one that never comes fails by the test's time limit
            time.sleep(0.05)
    state = json.loads((tmp_path / "made-up-state.json").read_text())
    assert state["pinnedIds"] == [node]
    saved = json.loads((tmp_path / "made-up.json").read_text())
    assert saved == {**document, "qParams": state}
    assert (tmp_path / "made-up.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "made-up-subgraph.svg").read_text()


@needs_chromium
def test_nothing_in_the_graph_becomes_html_and_white_space_is_visible(opened, document):
    first = next(node["node_id"] for node in document["nodes"] if node["feature_type"] == FEATURE)
    click_node(opened, first)
    assert text(opened, "#panel h2") == "<img src=x onerror=alert(1)>"
    assert opened.js("document.images.length + document.querySelectorAll('i:not(.legend i)').length") == 0
    assert "</script><i>" in text(opened, "#panel .contexts") and "⏎" in text(opened, "#panel .contexts")
    opened.click_on("#search")
    opened.type("E_100")
    opened.key("Enter")
    assert text(opened, "#panel h2") == "<bos>"
    click_node(opened, "E_104_4")
    assert text(opened, "#panel h2") == "␣capital"


@needs_chromium
def test_a_difference_of_logits_is_named_by_its_two_tokens_and_has_no_probability(browser, tmp_path):
    document = made_up_document(features=20, edges=60)
    output = next(node for node in document["nodes"] if node["feature_type"] == "logit")
    output |= dict(clerp="Output \"' is' - ' are'\" (p=1.000)", token_prob=1.0)
    write_page(tmp_path / "graph.html", document)
    browser.view(1440, 900, still=True)
    show(browser, (tmp_path / "graph.html").as_uri())
    click_node(browser, output["node_id"])
    assert text(browser, "#panel h2") == "␣is − ␣are"
    panel = text(browser, "#panel")
    assert "difference of logits" in panel and "Probability" not in panel
    assert browser.errors == []


@needs_chromium
def test_the_page_asks_nobody_for_anything(opened, page):
    assert opened.js("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length") == 0


@needs_chromium
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


def contrast(a, b):
    """WCAG 2 contrast ratio of two colours "#rrggbb"."""
    luminances = []
    for colour in (a, b):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminances.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    dark, light = sorted(luminances)
    return (light + 0.05) / (dark + 0.05)


@needs_chromium
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
    place = browser.js(f"attributionGraph.place({json.dumps(node)})")
    browser.js(f"document.getElementById('stage').scrollLeft += {place['x'] - 180}")
    browser.settle()
    place = browser.js(f"attributionGraph.place({json.dumps(node)})")
    browser.tap(place["x"], place["y"])
    browser.wait(f"attributionGraph.state.clickedId === {json.dumps(node)}")
    assert browser.js("document.getElementById('tip').hidden")
    assert browser.js("document.querySelector('#panel').getBoundingClientRect().width") > 340
    assert browser.js("document.querySelector('#selected').getBoundingClientRect().bottom") <= 741
    assert browser.js(wide) == []


@needs_chromium
def test_heads_and_tables_are_shown_where_they_are_given(browser, document, tmp_path):
    node = busy_feature(document)
    source, weight = strongest(document, node, True)[0]
    rows_ = [[node, source, 0.25], ["bias", "bias", -1.5]]
    table = PageTable("Head 3.1 at <b>is</b>", ["query", "key", "score"], rows_, "A note.")
    heads = {(source, node): [(3, 1, 0.5 * weight), (2, 0, -0.125)]}
    write_page(tmp_path / "graph.html", document, heads=heads, tables=[table])
    browser.view(1440, 900)
    show(browser, (tmp_path / "graph.html").as_uri())
    assert text(browser, "#tables summary") == "Head 3.1 at <b>is</b>"
    browser.click_on("#tables summary")
    assert text(browser, "#tables tbody").split("\n")[-1].split("\t") == ["bias", "bias", "−1.50"]
    browser.click_on("#tables td button")
    assert clicked(browser) == node
    assert text(browser, "#panel .inputs .row .via").startswith("via 3.1 ")
    assert "2.0 −0.13" in text(browser, "#panel .inputs .row .via")
    assert "counts for each" in text(browser, "#panel")
    assert browser.errors == []


ODD = {
    "tokens alone": dict(features=0, edges=0, errors=0, outputs=1, positions=2, layers=1),
    "one layer": dict(features=30, edges=60, layers=1, errors=0),
    "long prompt": dict(features=400, edges=2000, positions=600, layers=8),
    "deep": dict(features=300, edges=2000, layers=120),
}


@needs_chromium
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


@needs_chromium
def test_going_back_restores_sliders(opened, document):
    slide(opened, "edges", 0.5)
    click_node(opened, busy_feature(document))  # at once, before the slider's state is in the address
    counts = text(opened, "#counts")
    slide(opened, "edges", 0.2)
    opened.js("history.back()")
    opened.wait("attributionGraph.state.clickedId === ''")
    assert text(opened, "#counts") == counts
    opened.js("new Promise(done => setTimeout(done, 300))")  # longer than an address may be late
    assert "clickedId=&" in opened.js("location.hash") and "edges=0.5" in opened.js("location.hash")


@needs_chromium
def test_a_notebook_can_show_it_in_a_frame(browser, document, tmp_path):
    write_page(tmp_path / "graph.html", document)
    frame = html.escape((tmp_path / "graph.html").read_text(), quote=True)
    (tmp_path / "notebook.html").write_text(f'<iframe sandbox="allow-scripts" width=1000 height=700 srcdoc="{frame}">')
    browser.view(1100, 800)
    browser.open((tmp_path / "notebook.html").as_uri())
    browser.wait("document.querySelector('#panel .row')", in_frame=True)
    box = browser.js_in_frame("JSON.stringify(document.querySelector('#panel .row').getBoundingClientRect())")
    browser.click(json.loads(box)["x"] + 40, json.loads(box)["y"] + 20)
    assert browser.js_in_frame("document.querySelector('#pin').innerText") == "Pin"
    assert browser.js_in_frame("document.querySelectorAll('#panel .inputs .row').length") > 0
    assert browser.errors == []


@needs_chromium
def test_every_control_has_a_name(opened, document):
    node = busy_feature(document)
    click_node(opened, node, modifiers=8)
    click_node(opened, strongest(document, node, True)[0][0], modifiers=8)
    click_node(opened, node)
    tree = opened.send("Accessibility.getFullAXTree")["nodes"]
    named = {}
    for one in tree:
        role = one.get("role", {}).get("value")
        if not one.get("ignored") and role in ("button", "slider", "combobox", "checkbox", "textbox", "application"):
            named.setdefault(role, []).append(one.get("name", {}).get("value", ""))
    assert {"button", "slider", "combobox", "checkbox", "textbox", "application"} <= set(named)
    assert all(name.strip() for names in named.values() for name in names)
    assert opened.js("document.querySelector('[aria-live]').textContent").startswith(
        opened.js(f"attributionGraph.place({json.dumps(node)}).label")
    )


@needs_chromium
def test_nothing_moves_for_who_does_not_want_it(opened):
    moving = "[...document.querySelectorAll('*')].filter(e => parseFloat(getComputedStyle(e).transitionDuration) > 0)"
    assert opened.js(f"{moving}.length") == 0
    opened.view(1440, 900, still=False)
    assert opened.js(f"{moving}.length") == 1


@needs_chromium
def test_nodes_do_not_cover_each_other(opened, document):
    ids = [node["node_id"] for node in document["nodes"] if node["feature_type"] != "logit"]
    places = opened.js(f"{json.dumps(ids)}.map(id => attributionGraph.place(id))")
    at = np.array([(place["x"], place["y"]) for place in places])
    radius = np.array([place["radius"] for place in places])
    apart = np.hypot(*(at[:, None] - at[None]).transpose(2, 0, 1)) - (radius[:, None] + radius[None])
    assert apart[~np.eye(len(at), dtype=bool)].min() >= 0


@needs_chromium
def test_a_large_graph_stays_smooth(browser, tmp_path):
    """1,500 nodes and 20,000 edges. The times are printed; only a hang fails."""
    large = made_up_document(features=1306, edges=20_000, layers=28, positions=24, errors=160, outputs=10)
    assert len(large["nodes"]) == 1500 and len(large["links"]) == 20_000
    write_page(tmp_path / "large.html", large)
    browser.view(1440, 900)
    show(browser, (tmp_path / "large.html").as_uri())
    loaded = browser.js("attributionGraph.ready")
    slide(browser, "edges", 1)
    browser.wait("attributionGraph.painted && attributionGraph.painted.edges === 20000")
    edges = browser.js("attributionGraph.painted.milliseconds")
    click_node(browser, large["links"][-1]["target"])
    frames = browser.js("[...Array(20)].map(() => attributionGraph.redraw())")
    print(
        f"\n1,500 nodes, 20,000 edges: drawn {loaded:.0f} ms after the start of loading; all edges {edges:.0f} ms;"
        f" pointing at a node {np.median(frames):.1f} ms; {(tmp_path / 'large.html').stat().st_size / 1e6:.1f} MB"
    )
    assert loaded < 300_000 and browser.errors == []


def test_data_cannot_leave_its_element():
    text = embedded({"label": "</script><!--<script>&\u2028\u2029", "half": "\ud800"})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text)["label"] == "</script><!--<script>&\u2028\u2029"
    text.encode()


def test_pages_are_the_same_bytes(document, tmp_path):
    for name in ("a", "b"):
        write_page(tmp_path / name, document)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def broken(document, change):
    copy = json.loads(json.dumps(document))
    change(copy)
    return copy


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("links"), "has no links"),
        (lambda d: d["metadata"].pop("prompt_tokens"), "metadata has no prompt_tokens"),
        (lambda d: d["nodes"][3].pop("ctx_idx"), r"nodes\[3\] has no ctx_idx"),
        (lambda d: d["nodes"].append(d["nodes"][0]), "not unique"),
        (lambda d: d["links"][2].update(target="nobody"), r"links\[2\].target of the graph is 'nobody'"),
        (lambda d: d["links"][2].update(weight="1"), r"links\[2\].weight must be a number"),
        (lambda d: d["links"][2].update(weight=float("nan")), "weights must be finite"),
        (lambda d: d["nodes"][0].update(ctx_idx=99), "the prompt has 11 tokens"),
        (lambda d: d["nodes"][0].update(layer="x"), "expected a number, or E"),
        (lambda d: d["nodes"][0].update(ctx_idx=True), "must be an integer"),
        (lambda d: d.update(nodes=[], links=[]), "no nodes"),
    ],
)
def test_a_document_that_is_no_graph_is_refused(document, tmp_path, change, said):
    with pytest.raises(UserError, match=said) as caught:
        write_page(tmp_path / "graph.html", broken(document, change))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
