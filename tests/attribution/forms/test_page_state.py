"""What a reader chooses on the page: groups, the address, downloads, the way back."""

import dataclasses
import json
import re
import time
from collections import Counter
from urllib.parse import parse_qs

import numpy as np
import pytest
from browser import needs_chromium
from graph_pages import busy_feature, click_node, clicked, drag_last_box, rows, show, slide, state, strongest, text
from made_graphs import make_graph
from made_up_documents import made_up_document

from saejax.attribution.forms.document import FEATURE_TYPE
from saejax.attribution.forms.features import FeatureDetails

pytestmark = needs_chromium


def tick_pin(browser, node_id):
    pins = f"[...document.querySelectorAll('#pins li')].findIndex(li => li.dataset.units === {json.dumps(node_id)})"
    browser.click_on(f"#pins li:nth-child({browser.js(pins) + 1}) input[type=checkbox]")


def test_pins_become_groups_with_summed_edges(opened, document):
    node = busy_feature(document)
    sources = [other for other, *_ in strongest(document, node, True)[:3]]
    for pinned in (node, *sources):
        click_node(opened, pinned, modifiers=8)
    assert state(opened, "pinnedIds") == [node, *sources]
    assert opened.js("document.querySelectorAll('#subgraph .unit').length") == 4
    for pinned in sources[:2]:
        tick_pin(opened, pinned)
    opened.click_on("#pin-tools input")
    opened.type("both <of> them")
    opened.click_on("#pin-tools button")
    (group,) = state(opened, "supernodes")
    assert group[0] == "both <of> them" and set(group[1:]) == set(sources[:2])
    assert opened.js("document.querySelectorAll('#subgraph .unit').length") == 3
    into = strongest(document, node, True)
    total = sum(weight for other, weight, _ in into if other in sources[:2]) / sum(abs(weight) for _, weight, _ in into)
    titles = opened.js("[...document.querySelectorAll('#subgraph .link title')].map(t => t.textContent)")
    (title,) = [one for one in titles if "both <of> them →" in one and "sum of 2 edges" in one]
    assert _percent(title) == pytest.approx(100 * total, abs=0.6)
    opened.click_on("#pins li:has(.group-name) input[type=checkbox]")
    tick_pin(opened, sources[2])
    assert text(opened, "#pin-tools button") == "Merge ticked"
    opened.click_on("#pin-tools button")
    (group,) = state(opened, "supernodes")
    assert set(group[1:]) == set(sources)
    opened.click_on("#pins li:has(.group-name) > .plain")
    assert state(opened, "supernodes") == []
    assert set(state(opened, "pinnedIds")) == {node, *sources}


def test_boxes_of_pins_are_dragged_and_stay_where_they_were_put(opened, document):
    node = busy_feature(document)
    for pinned in (node, strongest(document, node, True)[0][0]):
        click_node(opened, pinned, modifiers=8)
    box = "document.querySelector('#subgraph .unit:last-of-type').getBoundingClientRect()"
    (x, y), moved = drag_last_box(opened, -60, 20)
    assert abs(moved[0] - x + 60) < 1.5 and abs(moved[1] - y - 20) < 1.5
    assert clicked(opened) == ""  # a drag selects nothing
    (places,) = [json.loads(state(opened, "sg_pos"))]
    assert len(places) == 1
    show(opened, opened.js("location.href"))
    opened.js("document.querySelector('#subgraph .unit').scrollIntoView({block: 'center'})")
    again = opened.js(f"[{box}.x, {box}.y]")
    assert abs(again[0] - moved[0]) < 1.5


def test_sums_of_pins_are_shares_of_their_targets_input(show_page):
    """By circuit-tracer's definition; of a graph whose targets have very different units none of weight is left out."""
    graph, rng = made_up_document(features=60, edges=1200), np.random.default_rng(0)
    targets = sorted({link["target"] for link in graph["links"]})
    unit = dict(zip(targets, np.exp(3 * rng.normal(size=len(targets))), strict=True))
    for link in graph["links"]:
        link["weight"] *= unit[link["target"]]
    ids = [node["node_id"] for node in graph["nodes"] if node["activation"] is not None][:24]
    groups = [["one", *ids[:3]], ["two", *ids[3:5]]]
    graph["qParams"] |= dict(pinnedIds=ids, supernodes=groups)
    unit_of = {name: group[0] for group in groups for name in group[1:]}
    members = {name: [name] for name in ids if name not in unit_of} | {group[0]: group[1:] for group in groups}
    total, outside = Counter(), Counter()
    for link in graph["links"]:
        total[link["target"]] += abs(link["weight"])
    for link in graph["links"]:
        if unit_of.get(link["source"], link["source"]) != unit_of.get(link["target"], link["target"]):
            outside[link["target"]] += abs(link["weight"])
    wanted, gross = Counter(), Counter()
    for to, names in members.items():
        rest = sum(outside[name] / total[name] for name in names if total[name])
        for link in graph["links"]:
            source = unit_of.get(link["source"], link["source"])
            if link["target"] in names and source in members and source != to:
                # circuit-tracer: weight / input from outside, times the member's part of the group's input
                inside = outside[link["target"]] / total[link["target"]] / rest
                wanted[source, to] += link["weight"] / outside[link["target"]] * inside
                gross[source, to] += abs(link["weight"]) / outside[link["target"]] * inside
    browser = show_page(graph)
    titles = browser.js("[...document.querySelectorAll('#subgraph .link title')].map(t => t.textContent)")
    shown = sorted(map(_percent, titles))
    drawn = sorted(100 * value for edge, value in wanted.items() if gross[edge] >= 0.03)
    assert len(wanted) > 30 and len(shown) == len(drawn)
    np.testing.assert_allclose(shown, drawn, atol=0.55)
    assert f"{len(wanted) - len(drawn)} sums below 3 % of their target's input are not drawn" in text(
        browser, "#weak-sums"
    )


@pytest.mark.parametrize("probability", [None, 0])
def test_scores_of_the_pinned_features_are_those_of_python(browser, tmp_path, probability):
    """Errors and tokens among the pins change nothing; of the pruned graph, errors of some features are gone.

    Outputs whose probability is 0 in fp32 count alike.
    """
    graph = up(make_graph(features=60, layers=5))
    if probability is not None:
        graph.nodes.value_N[graph.slice_of("logit")] = probability
    graph = graph.prune(0.7, 0.9)
    graph.save_page(tmp_path / "page.html")
    features = graph.ids[: graph.count("feature")]
    browser.view(1440, 900, still=True)
    for pinned in (features[::3], [*features[1:8], *graph.ids[-5:]], graph.ids[-3:]):
        show(browser, f"{(tmp_path / 'page.html').as_uri()}#pinnedIds={','.join(pinned)}")
        said = [
            float(number)
            for number in re.findall(r"(?:replacement|completeness) (\d\.\d+)", text(browser, "#pin-scores"))
        ]
        wanted = [
            *dataclasses.astuple(graph.score_subgraph(pinned)),
            *dataclasses.astuple(graph.score_subgraph(graph.ids)),
        ]
        np.testing.assert_allclose(said, wanted, atol=6e-4)
    assert browser.errors == []


def _percent(title):
    """The share that the title of a sum says."""
    sign, number = re.search(r": ([+−])<?([\d.]+) % of its input", title).groups()
    return float(number) * (-1 if sign == "−" else 1)


def test_the_address_holds_the_view(opened, document, page):
    node = busy_feature(document)
    click_node(opened, node)
    opened.key("p")
    slide(opened, "edges", 0.6)
    opened.click_on("#search")
    opened.type("texas")
    opened.wait("location.hash.includes('q=texas')")
    address = opened.js("location.href")
    assert opened.js("document.getElementById('missing-pins').hidden")
    assert parse_qs(address.split("#")[1])["clickedId"] == [node]
    before = opened.js("attributionGraph.state"), text(opened, "#counts")
    show(opened, address)
    assert (opened.js("attributionGraph.state"), text(opened, "#counts")) == before
    assert opened.js("document.getElementById('search').value") == "texas"
    damaged = page + "#clickedId=nobody&pinnedIds=x,y&supernodes=[[&nodes=7&edges=&linkType=?"
    show(opened, damaged)
    assert clicked(opened) == "" and state(opened, "pinnedIds") == []
    gone = "2 pinned or grouped nodes are not in this graph: pruned away, or of another prompt."
    assert text(opened, "#missing-pins") == gone


def test_the_state_of_the_document_is_shown(show_page, document):
    node = busy_feature(document)
    other = strongest(document, node, True)[0][0]
    params = dict(pinnedIds=[node, other, "gone"], supernodes=[["pair", node, other]], linkType="input", clickedId=node)
    browser = show_page({**document, "qParams": params})
    assert clicked(browser) == node
    assert text(browser, "#missing-pins").startswith("1 pinned or grouped node is not in this graph")
    assert state(browser, "supernodes") == [["pair", node, other]]
    assert rows(browser, "outputs") == [] and rows(browser, "inputs")


def test_downloads_hold_the_state_and_the_graph(show_page, document, tmp_path):
    """Keys of links that only another program knows, too."""
    links = [{**link, "score": n, "from": {"ov": 1}} for n, link in enumerate(document["links"])]
    document = {**document, "links": links}
    opened = show_page(document)
    opened.send("Browser.setDownloadBehavior", at_page=False, behavior="allow", downloadPath=str(tmp_path))
    node = busy_feature(document)
    click_node(opened, node, modifiers=8)
    opened.click_on(".saves summary")
    files = dict(state="-state.json", graph=".json", picture=".png", subgraph="-subgraph.svg")
    for button, name in files.items():
        save_file(opened, button, tmp_path / f"made-up{name}")
    state = json.loads((tmp_path / "made-up-state.json").read_text())
    assert state["pinnedIds"] == [node]
    saved = json.loads((tmp_path / "made-up.json").read_text())
    order = lambda link: (link["source"], link["target"])  # noqa: E731
    saved["links"].sort(key=order)
    assert saved == {**document, "qParams": state, "links": sorted(document["links"], key=order)}
    assert (tmp_path / "made-up.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "made-up-subgraph.svg").read_text()


def test_a_page_opens_the_state_that_it_saved(show_page, document, tmp_path):
    """Pins, groups and the places of boxes; also from a graph with its state, and no other file."""
    opened = show_page(document)
    opened.send("Browser.setDownloadBehavior", at_page=False, behavior="allow", downloadPath=str(tmp_path))
    node = busy_feature(document)
    sources = [other for other, *_ in strongest(document, node, True)[:2]]
    for pinned in (node, *sources):
        click_node(opened, pinned, modifiers=8)
    for pinned in sources:
        tick_pin(opened, pinned)
    opened.click_on("#pin-tools button")
    drag_last_box(opened, -60, 20)
    click_node(opened, sources[0])
    kept = opened.js("attributionGraph.state")
    assert len(json.loads(kept["sg_pos"])) == len(kept["supernodes"]) == 1 and len(kept["pinnedIds"]) == 3
    opened.click_on(".saves summary")
    for button, name in (("state", "made-up-state.json"), ("graph", "made-up.json")):
        save_file(opened, button, tmp_path / name)
    (tmp_path / "other.json").write_text('{"nodes": []}')
    (tmp_path / "cut.json").write_text("{")
    for name in ("made-up-state.json", "made-up.json"):
        show_page(document)
        assert state(opened, "pinnedIds") == []
        for wrong in ("other.json", "cut.json"):
            open_file(opened, tmp_path / wrong)
            # The line of the file before may still stand there.
            told = f"{wrong} holds no state of a page"
            opened.wait(f"document.getElementById('not-opened').textContent.includes('{told}')")
            assert not opened.js("document.getElementById('not-opened').hidden")
        open_file(opened, tmp_path / name)
        opened.wait("attributionGraph.state.pinnedIds.length")
        assert opened.js("attributionGraph.state") == kept
        assert opened.js("document.getElementById('not-opened').hidden")
        opened.js("history.back()")  # a step as any other
        opened.wait("!attributionGraph.state.pinnedIds.length")


def test_of_two_files_that_are_opened_the_one_chosen_last_counts(opened, document, tmp_path):
    """Also where the first takes longer to be read."""
    nodes = [node["node_id"] for node in document["nodes"]][:2]
    for name, node in zip(("slow.json", "quick.json"), nodes, strict=True):
        (tmp_path / name).write_text(json.dumps(dict(pinnedIds=[node])))
    opened.js(
        """(() => {
          const read = Blob.prototype.text;
          Blob.prototype.text = async function () {
            const text = await read.call(this);
            if (this.name === 'slow.json') await new Promise(done => { window.release = done; });
            return text;
          };
        })()"""
    )
    open_file(opened, tmp_path / "slow.json")
    opened.wait("window.release")
    open_file(opened, tmp_path / "quick.json")
    opened.wait("attributionGraph.state.pinnedIds.length")
    opened.js("release()")
    opened.settle()
    assert state(opened, "pinnedIds") == nodes[1:]


def save_file(browser, button, path):
    """Presses a button that saves a file and waits for all of it: Chromium may make an empty one first."""
    browser.click_on(f"#save-{button}")
    while not (path.exists() and path.stat().st_size):  # one that never comes fails by the test's time limit
        time.sleep(0.05)


def open_file(browser, path):
    """Chooses a file where the page asks for the state that it is to open."""
    root = browser.send("DOM.getDocument")["root"]["nodeId"]
    node = browser.send("DOM.querySelector", nodeId=root, selector="#state-file")["nodeId"]
    browser.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])


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


def up(graph):
    """The graph without edges that lead down or stay in a layer."""
    below_S = graph.nodes.layer_N[: graph.adjacency_RxS.shape[1]]
    graph.adjacency_RxS[below_S[None] >= graph.nodes.layer_N[graph.target_R][:, None]] = 0
    return graph


def test_a_graph_shows_itself_in_a_notebook_and_saves_its_page(browser, tmp_path):
    graph = up(make_graph(features=12, layers=3))
    (tmp_path / "notebook.html").write_text(graph._repr_html_())
    browser.view(1100, 1000)
    browser.open((tmp_path / "notebook.html").as_uri())
    browser.wait("document.querySelector('#panel .row')", in_frame=True)
    box = browser.js_in_frame("JSON.stringify(document.querySelector('#panel .row').getBoundingClientRect())")
    browser.click(json.loads(box)["x"] + 40, json.loads(box)["y"] + 20)
    assert browser.js_in_frame("document.querySelector('#pin').innerText") == "Pin"
    assert browser.js_in_frame("document.querySelectorAll('#panel .inputs .row').length") > 0
    (feature, *_) = (node for node in graph.prune().ids if not node.startswith(("E", "4_")))
    layer, index, _ = map(int, feature.split("_"))
    graph.prune().save_page(tmp_path / "page.html", labels={(layer, index): "cities"})
    show(browser, (tmp_path / "page.html").as_uri())
    assert browser.js(f"attributionGraph.place('{feature}').label") == "cities"
    assert browser.errors == []


def test_the_first_view_has_the_most_influential_nodes_and_groups_alone(show_page):
    large = made_up_document(features=400, edges=3000)
    browser = show_page(large, every_node=False)
    fixed = sum(node["feature_type"] in ("embedding", "logit") for node in large["nodes"])
    assert 30 <= int(text(browser, "#counts").split()[0]) - fixed <= 50
    listed = browser.js("[...document.querySelectorAll('#panel .rows:last-of-type .row')].map(row => row.dataset.node)")
    places = [(node.split("_")[0], node.split("_")[2]) for node in listed if not node.startswith("13_")]  # no logits
    assert len(places) == 12 and max(Counter(places).values()) <= 2
    members = [node["node_id"] for node in large["nodes"] if node["activation"] is not None][:3]
    params = large["qParams"] | dict(supernodes=[["a", *members]], pinnedIds=members)
    show_page({**large, "qParams": params}, every_node=False)
    assert int(text(browser, "#counts").split()[0]) - fixed == 3


def test_nodes_of_other_programs_have_their_kind_and_row(show_page):
    """An error of another transcoder is an error, and a node in layer E that is no token spoils no row."""
    other = made_up_document(features=20, edges=60)
    features = [node for node in other["nodes"] if node["activation"] is not None]
    features[0]["feature_type"], features[1]["layer"] = "lorsa error", "E"
    browser = show_page(other)
    places = [browser.js(f"attributionGraph.place({json.dumps(node['node_id'])})") for node in other["nodes"]]
    assert all(place["y"] is not None and place["y"] > 0 for place in places)
    click_node(browser, features[0]["node_id"])
    assert "Feature\n" not in text(browser, "#panel .facts")


def test_a_feature_of_another_kind_has_not_the_contexts_of_the_transcoder_s(show_page):
    """Its layer and number may be those of a feature of the transcoders, and it has no page at Neuronpedia."""
    graph = made_up_document(features=20, edges=60)
    first = next(node for node in graph["nodes"] if node["activation"] is not None)
    first |= dict(feature_type="lorsa", clerp="")
    graph["metadata"]["feature_details"] = dict(neuronpedia_source_set="set")
    key = tuple(map(int, first["node_id"].split("_")[:2]))
    browser = show_page(graph, details={key: FeatureDetails((dict(tokens=["a"], activations=[1.0]),), label="cities")})
    click_node(browser, first["node_id"])
    assert text(browser, "#panel h2") == f"feature {key[1]}"
    assert "Top contexts" not in text(browser, "#panel") and "Neuronpedia" not in text(browser, "#panel")


def test_features_without_a_label_have_the_tokens_of_their_contexts_as_name(show_page, document):
    """As in published sets, whose files have contexts and no labels: no node is called by its number."""
    nodes = [{**one, "clerp": ""} if one["feature_type"] == FEATURE_TYPE else one for one in document["nodes"]]
    features = {tuple(map(int, one["node_id"].split("_")[:2])) for one in nodes if one["feature_type"] == FEATURE_TYPE}
    context = dict(tokens=["of", " Texas", "."], activations=[0.0, 2.0, 0.5])
    none = ((0.5, 0.0), (1.5, 0.0))  # a histogram of a feature that never fires
    details = {feature: FeatureDetails((context, context), (" Austin",), histogram=none) for feature in features}
    details[min(features)] = FeatureDetails((), (" Austin", " Dallas"))
    browser = show_page({**document, "nodes": nodes}, details=details)
    ids = [one["node_id"] for one in nodes if one["feature_type"] == FEATURE_TYPE]
    names = browser.js(f"{json.dumps(ids)}.map(id => attributionGraph.place(id).label)")
    assert set(names) == {"“Texas”", "→“Austin” →“Dallas”"}
    click_node(browser, busy_feature(document))
    assert "“Texas”" in text(browser, "#panel")
    assert "NaN" not in browser.js("document.querySelector('.histogram').innerHTML")


def test_contexts_logits_and_a_link_to_neuronpedia_are_shown(show_page, document):
    """Of a set that is hosted there; labels of files name nodes that have no other label."""
    node = busy_feature(document)
    layer, index = map(int, node.split("_")[:2])
    nodes = [{**one, "clerp": "" if one["node_id"] == node else one["clerp"]} for one in document["nodes"]]
    metadata = document["metadata"] | dict(feature_details=dict(neuronpedia_source_set="plt-9"))
    first = dict(tokens=["The", " city", " Austin"], activations=[0.0, 0.5, 1.5])
    details = {(layer, index): FeatureDetails((first,), (" Austin",), (" Dallas",), "cities of Texas")}
    browser = show_page({**document, "metadata": metadata, "nodes": nodes}, details=details)
    click_node(browser, node)
    panel = text(browser, "#panel")
    assert all(part in panel for part in ("cities of Texas", "Top contexts", "Raises: ␣Austin", "Lowers: ␣Dallas"))
    assert "no contexts by quantile of activation, no histogram of activations." in panel
    link = browser.js("document.querySelector('#panel a').href")
    assert link == f"https://www.neuronpedia.org/made-up-model/{layer}-plt-9/{index}"
