"""The pages in a real browser, with a model that answers at once: what readers do with the server."""

import json

import pytest
from browser import chromium, needs_chromium
from graph_pages import FEATURE, click_node, drag_last_box, show, state, text
from made_up_documents import made_up_document

from saejax.attribution.forms.neuronpedia import write_graph
from saejax.attribution.settings import GraphConfig
from saejax.serving import app
from saejax.serving.store import GraphStore, StoredGraph

pytestmark = needs_chromium
GRAPH, EVIL = "graphs/first", "</script><script>window.hacked = 1</script>"
PAGE = f"graph?id={GRAPH}"
SMALL = """[...document.querySelectorAll('button, input, select, textarea, summary, a, [role=button]')].filter(e => {
  const b = e.getBoundingClientRect(); return b.width && (b.width < 24 || b.height < 24)}).map(e => e.outerHTML)"""
WIDE = """[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > 401
  && !e.closest('#stage, #subgraph-figure, .wide, .unseen, [hidden]')).map(e => e.outerHTML.slice(0, 80))"""


class FakeBench:
    """In place of ``ModelSession``: prunes to a few features, and keeps what it was asked."""

    def __init__(self, configs):
        self.defaults, self.asked, self.made = configs, [], {}

    def configs_of(self, graph):
        return self.defaults

    def graph_config(self, graph):
        return self.defaults[GraphConfig]

    def prune(self, graph, document, nodes, edges, outputs):
        self.outputs = outputs
        features = [node["node_id"] for node in document["nodes"] if node["feature_type"] == FEATURE]
        gone = set(features[5:])
        kept = [node for node in document["nodes"] if node["node_id"] not in gone]
        links = [link for link in document["links"] if not {link["source"], link["target"]} & gone]
        self.made[nodes, edges] = {**document, "nodes": kept, "links": links}
        return self.made[nodes, edges]

    def run(self, graph, document, job):
        return self


def fake_effects(session, changes, freeze, targets, on_progress):
    """Two tokens, one of which would be a script; a change by 13 never ends."""
    session.asked.append((changes, freeze))
    while changes[0][1] == 13:
        on_progress(1, 2)
    token = dict(logit=[3.0, 1.5], probability=[0.5, 0.25], random=[0.4, 0.6])
    tokens = [token | dict(text=EVIL), token | dict(text=" Austin")]
    differences = [dict(text=[" is", " are"], value=[1.5, -0.5], random=[1.0, 2.0])]
    return dict(tokens=tokens, differences=differences, kl=0.25, random_kl=[0.01, 0.02], draws=2, no_draws="")


def fake_continuations(session, changes, freeze, tokens, temperature, seed, onward, on_progress):
    session.asked.append((changes, freeze, tokens, temperature, seed, onward))
    return dict(texts=[["clean", f" a\n{EVIL}"], ["changed", ""], ["random", " c"]], no_draws="")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    for number, slug in enumerate(("first", "second")):
        document = made_up_document(features=40, edges=200, layers=6, seed=number)
        document["metadata"] |= dict(slug=slug, prompt=f"The {EVIL} is")
        write_graph(root / "graphs", document)
    return root


@pytest.fixture(scope="module")
def site(place, serve):
    """The session and the address of a server."""
    from saejax.runner import command_line

    configs = command_line.read_configs(command_line.stage_flags(), ["serve", "--graph.transcoders=a/set"])
    patch = pytest.MonkeyPatch()
    patch.setattr(app, "effects", fake_effects)
    patch.setattr(app, "continuations", fake_continuations)
    patch.setattr(StoredGraph, "whole", property(lambda graph: graph.path))
    session = FakeBench(configs)
    yield session, serve(GraphStore(place), session).address
    patch.undo()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def features(place):
    document = json.loads((place / f"{GRAPH}.json").read_text())
    found = [node for node in document["nodes"] if node["feature_type"] == FEATURE]
    return [node["node_id"] for node in sorted(found, key=lambda node: node["influence"])]


@pytest.fixture
def opened(browser, site):
    browser.view(1440, 900, still=True)
    show(browser, site[1] + PAGE)
    yield browser
    assert browser.errors == [] and not browser.js("window.hacked")


def open_feature(browser, node):
    """Clicks a feature's node and waits until what is known of it has come, with which the page is drawn again."""
    click_node(browser, node)
    browser.wait("!document.getElementById('missing').textContent.includes('being read')")


def fill(browser, selector, value):
    browser.js(f"document.querySelector({json.dumps(selector)}).value = {json.dumps(value)}")


def test_features_are_ablated_and_steered_and_the_new_logits_shown(opened, site, features):
    open_feature(opened, features[0])
    opened.click_on("#change-form button")
    click_node(opened, features[1], modifiers=8)
    click_node(opened, features[2], modifiers=8)
    opened.js("(() => { const s = document.getElementById('change-what'); s.value = s.options.length - 1; })()")
    fill(opened, "#change-how", "set")
    fill(opened, "#change-amount", "2.5")
    opened.click_on("#change-form button")
    assert text(opened, "#changes").count("Remove") == 2
    freeze = "document.getElementById('freeze')"
    opened.js(f"(() => {{ const s = {freeze}; s.value = 'attention'; s.onchange({{target: s}}); }})()")
    address = opened.js("location.href")
    opened.click_on("#run-changes")
    opened.wait("document.querySelector('#effects table')")
    changes = [("scale", 0.0, [features[0]]), ("set", 2.5, features[1:3])]
    assert site[0].asked[-1] == (changes, "attention")
    effects = text(opened, "#effects")
    assert EVIL.replace(" ", "␣") in effects and "3.00\t1.50\t−1.50\t50 %\t25 %\t40 % to 60 %" in effects
    assert "␣is − ␣are: 1.50 before, −0.50 after; random sets 1.00 to 2.00" in effects
    assert "KL): 0.25 nats" in effects and "0.010 nats to 0.020 nats" in effects
    assert "2 different random sets" in effects
    fill(opened, "#generate-tokens", "7")
    fill(opened, "#generate-temperature", "0.5")
    opened.click_on("#generate-form button")
    opened.wait("document.querySelector('#effects h3').textContent.startsWith('The text')")
    assert site[0].asked[-1] == (changes, "attention", 7, 0.5, 0, True)
    texts = text(opened, "#effects table").split("\n")
    assert texts[1:] == [f"as it is\t a↵{EVIL}".replace("\t ", "\t"), "changed\t(the text ends)", "random features\tc"]
    show(opened, address)  # the state is in the address
    assert text(opened, "#changes").count("Remove") == 2 and opened.js(f"{freeze}.value") == "attention"
    opened.click_on("#changes li button")
    assert text(opened, "#changes").count("Remove") == 1
    show(opened, site[1] + PAGE + '#changes=[["scale",0,"nobody"],["x",0,"1_2_3"],3]&freeze=all<b>')
    assert text(opened, "#changes") == "" and opened.js("document.getElementById('run-changes').disabled")


def test_contexts_come_when_a_node_is_opened(opened, site, features, place):
    """The page itself has their names alone; the features that have none are counted and listed."""
    nodes = {node["node_id"]: node for node in json.loads((place / f"{GRAPH}.json").read_text())["nodes"]}
    node = next(name for name in features if not nodes[name]["clerp"])
    layer, index, _ = node.split("_")
    (place / "features").mkdir()
    context = dict(tokens=["a", " <b>", " c"], values=[0.0, 2.0, 1.0], binMin=1.5, binMax=2.5)
    bars = dict(freq_hist_data_bar_values=[0.5, 1.5, 2.5], freq_hist_data_bar_heights=[40, 20, 5])
    (place / "features" / f"{layer}_{index}.json").write_text(json.dumps(dict(activations=[context], **bars)))
    show(opened, site[1] + PAGE)
    nameless = sum(not nodes[name]["clerp"] and not name.startswith(f"{layer}_{index}_") for name in features)
    assert f"Without a name: {nameless} of {len(features)} nodes of features" in text(opened, "#nameless summary")
    opened.click_on("#nameless summary")
    opened.wait(f"document.querySelectorAll('#nameless .row').length === {nameless}")
    data = json.loads(opened.js("document.getElementById('graph-data').textContent"))["details"]
    assert data == {f"{layer}_{index}": dict(name="“<b>”")}
    click_node(opened, node)
    opened.wait("document.querySelector('#panel .contexts')")
    assert text(opened, "#panel .contexts b") == " <b>"
    bars = "[...document.querySelectorAll('#panel .histogram rect')].map(bar => Number(bar.getAttribute('height')))"
    assert opened.js(bars) == [40, 20, 5] and text(opened, "#panel .histogram div") == "0.50\n2.50"
    opened.click_on("#panel > details:not(.keys) summary")
    assert text(opened, "#panel > details[open]").split("\n") == ["activation 1.5 to 2.5", "a <b> c"]
    assert "has no" not in text(opened, "#panel")
    (place / "features" / f"{layer}_{index}.json").unlink()


def test_contexts_that_cannot_be_read_are_not_said_to_be_on_their_way(browser, site, features, place):
    (place / "features").mkdir(exist_ok=True)
    broken = place / "features" / f"{'_'.join(features[0].split('_')[:2])}.json"
    broken.write_text("{")
    browser.view(1440, 900, still=True)
    show(browser, site[1] + PAGE)
    click_node(browser, features[0])
    browser.wait("document.getElementById('missing').textContent.includes('could not be read')")
    assert "is not valid JSON: expected a feature of" in text(browser, "#failed")
    click_node(browser, features[1])
    assert "could not be read" not in text(browser, "#missing")
    broken.unlink()


def test_by_keys_alone_with_cancel(opened, site, features):
    show(opened, site[1] + PAGE + f"#clickedId={features[3]}")
    opened.js("document.getElementById('change-amount').focus()")
    opened.js("document.getElementById('change-amount').select()")
    opened.type("13")
    opened.key("Enter")
    assert "times 13" in text(opened, "#changes")
    opened.js("document.getElementById('run-changes').focus()")
    opened.key("Enter")
    opened.wait("document.getElementById('job-bar').value === 1")
    opened.js("document.getElementById('job-cancel').focus()")
    opened.key("Enter")
    opened.wait("!document.getElementById('failed').hidden")
    assert text(opened, "#failed") == "Cancelled." and opened.js("document.getElementById('job').hidden")


# Questions about features wait until ``release``, which gives their number.
HELD = """(() => {
  const [ask, held] = [window.fetch, []];
  window.answered = 0;
  window.fetch = async (path, options) => {
    if (path === 'api/feature') await new Promise((done) => held.push(done));
    const answer = await ask(path, options);
    await answer.clone().text();
    window.answered++;
    return answer;
  };
  window.release = () => held.splice(0).map((done) => done()).length;
})()"""


def test_what_is_chosen_and_typed_stays_when_what_is_known_of_a_feature_comes_late(opened, features):
    opened.js(HELD)
    for node in features[1:3]:
        click_node(opened, node, modifiers=8)
    for number in (1, 2):
        opened.click_on(f"#pins li:nth-child({number}) input[type=checkbox]")
    opened.click_on("#pin-tools button")
    opened.js("scrollTo(0, 0)")
    click_node(opened, features[0])
    opened.js("(what => { what.value = what.options.length - 1; })(document.getElementById('change-what'))")
    assert opened.js("release()") == 1
    opened.wait("!document.getElementById('missing').textContent.includes('being read')")
    assert opened.js("document.getElementById('change-what').selectedOptions[0].text").startswith("All pinned")
    click_node(opened, features[3])
    opened.click_on("#pins .group-name")
    opened.key("End")
    opened.type(" of my own")
    name = opened.js("document.activeElement.value")
    assert name.endswith(" of my own") and opened.js("release()") == 1
    opened.wait("answered === 2")
    opened.settle()
    assert opened.js("document.activeElement.value") == name
    opened.key("Enter")
    assert state(opened, "supernodes")[0][0] == name


def test_of_two_labels_the_one_saved_last_stays(opened, features, place):
    """Also where the first takes longer on its way."""
    open_feature(opened, features[4])
    opened.js(
        """(() => {
          const ask = window.fetch;
          let count = 0;
          window.answered = 0;
          window.fetch = async (...all) => {
            if (!count++) await new Promise((done) => setTimeout(done, 300));
            const answer = await ask(...all);
            window.answered++;
            return answer;
          };
        })()"""
    )
    for label in ("older", "newer"):
        fill(opened, ".label-form input", label)
        opened.click_on(".label-form button")
    opened.wait("answered === 2")
    (file,) = (place / "serve").rglob("labels.csv")
    assert "newer" in file.read_text() and "older" not in file.read_text()
    opened.wait("document.querySelector('#panel h2').textContent === 'newer'")


def test_the_graph_is_pruned_again(opened, site, features):
    open_feature(opened, features[0])
    before = state(opened, "clickedId")
    fill(opened, "#prune-nodes", "0.5")
    opened.click_on("#prune-form button")
    opened.wait("location.search.includes('nodes=0.5') && window.attributionGraph && attributionGraph.painted")
    assert "nodes=0.5&edges=0.98" in opened.js("location.search") and list(site[0].made) == [(0.5, 0.98)]
    nodes = len(site[0].made[0.5, 0.98]["nodes"])
    assert f"of {nodes} nodes" in text(opened, "#counts")
    kept = {node["node_id"] for node in site[0].made[0.5, 0.98]["nodes"]}
    assert state(opened, "clickedId") == (before if before in kept else "")
    assert opened.js("document.getElementById('prune-nodes').value") == "0.5"


def test_the_difference_of_two_outputs_is_explained(opened, site, place):
    nodes = json.loads((place / f"{GRAPH}.json").read_text())["nodes"]
    outputs = [node["node_id"] for node in nodes if node["feature_type"] == "logit"]
    opened.js("document.getElementById('difference-second').selectedIndex = 3")
    opened.click_on("#difference-form button")
    opened.wait("location.search.includes('first=') && window.attributionGraph && attributionGraph.painted")
    assert site[0].outputs == [outputs[0], outputs[3]]
    opened.click_on("#all-outputs a")
    opened.wait("!location.search.includes('first=') && window.attributionGraph && attributionGraph.painted")
    assert opened.js("document.getElementById('all-outputs').hidden")


def test_labels_groups_pins_and_places_are_saved(opened, site, features, place):
    open_feature(opened, features[0])
    fill(opened, ".label-form input", EVIL)
    for pressed in ("true", "false"):  # which draws the panel again
        opened.click_on("#pin")
        opened.wait(f"document.getElementById('pin').getAttribute('aria-pressed') === '{pressed}'")
        assert opened.js("document.querySelector('.label-form input').value") == EVIL
    opened.click_on(".label-form button")
    opened.wait("document.getElementById('saved').textContent.includes('labels.csv')")
    opened.settle()  # names are written with the page's next painting
    assert text(opened, "#panel h2") == EVIL
    for node in features[1:3]:
        click_node(opened, node, modifiers=8)
    for place_ in (1, 2):
        opened.click_on(f"#pins li:nth-child({place_}) input[type=checkbox]")
    fill(opened, "#pin-tools input", "<i>pair</i>")
    opened.click_on("#pin-tools button")
    opened.js("scrollTo(0, 0)")
    click_node(opened, features[3], modifiers=8)
    drag_last_box(opened, -60, 20)
    kept = {name: state(opened, name) for name in ("supernodes", "pinnedIds", "sg_pos")}
    assert features[3] in kept["pinnedIds"] and kept["sg_pos"]
    opened.click_on("#save-groups")
    opened.wait("document.getElementById('saved').textContent.includes('groups.json')")
    opened.wait("document.getElementById('save-groups').disabled")  # with the page's next painting
    show(opened, site[1] + PAGE)
    open_feature(opened, features[0])
    assert text(opened, "#panel h2") == EVIL
    (group,) = state(opened, "supernodes")
    assert group[0] == "<i>pair</i>" and set(group[1:]) == set(features[1:3])
    assert {name: state(opened, name) for name in kept} == kept
    assert opened.js("document.getElementById('save-groups').disabled")
    (saved,) = json.loads((place / "serve" / GRAPH / "groups.json").read_text()).values()
    assert saved == kept and kept["supernodes"] == [group]
    for change in ("togglePin", "move"):  # each alone is something to save
        if change == "togglePin":
            click_node(opened, features[4], modifiers=8)
        else:
            drag_last_box(opened, 40, 0)
        opened.wait("!document.getElementById('save-groups').disabled")
        opened.js("history.back()")
        opened.wait("document.getElementById('save-groups').disabled")


@pytest.mark.parametrize("path", ["", PAGE + "#pinnedIds={}"])
@pytest.mark.parametrize("dark", [False, True])
def test_a_narrow_screen_and_fingers(browser, site, features, path, dark):
    browser.view(400, 800, phone=True, dark=dark)
    browser.open(site[1] + path.format(",".join(features[:2])))
    browser.settle()
    assert browser.js("document.documentElement.scrollWidth") <= 400
    assert browser.js(WIDE) == [] and browser.js(SMALL) == []
    assert browser.js("document.body.innerText").count(EVIL) >= 1 and not browser.js("window.hacked")
    assert browser.errors == []


def test_the_list_opens_graphs_and_keeps_what_is_typed(browser, site):
    browser.view(1440, 900)
    browser.open(site[1])
    titles = browser.js("[...document.querySelectorAll('#graphs a')].map(link => link.textContent)")
    assert len(titles) == 2 and not any("graphs/" in title for title in titles), titles  # prompts, not folders
    browser.click_on("#prompt")
    browser.type("The war & <b>")
    browser.js("window.isOld = true, location.reload()")
    kept = "document.getElementById('prompt') && document.getElementById('prompt').value === 'The war & <b>'"
    browser.wait(f"!window.isOld && {kept}")
    browser.click_on("#graphs a")
    browser.wait("window.attributionGraph && attributionGraph.painted")
    assert browser.errors == []


def test_a_page_of_another_origin_gets_nothing(browser, site, tmp_path):
    """Not even one that knows the token."""
    (tmp_path / "evil.html").write_text("<title>evil</title>")
    browser.open((tmp_path / "evil.html").as_uri())
    asked = browser.js(
        f"fetch({json.dumps(site[1] + 'api/prune')}, {{method: 'POST', body: '{{}}', headers: "
        "{'content-type': 'application/json'}}).then(a => a.text(), e => 'refused')"
    )
    assert asked == "refused"
    browser.errors.clear()
