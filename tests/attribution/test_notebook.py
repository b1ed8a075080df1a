"""The notebook of graphs runs as it stands, and what a graph writes and shows by itself."""

import ast
import dataclasses
import json
import re
import webbrowser
from pathlib import Path
from typing import Any

import pytest
from made_graphs import make_graph
from made_transcoders import made_set
from matplotlib.figure import Figure

import saejax
from saejax.errors import UserError
from saejax.page.graph import figure

ROOT = Path(__file__).parent.parent.parent


CELLS = json.loads((ROOT / "docs/graphs.ipynb").read_text("utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_the_notebook_of_graphs_names_what_there_is():
    owners = dict(saejax=saejax, graph=saejax.Graph, pruned=saejax.Graph, again=saejax.Graph, local=saejax.LocalModel)
    named = set()
    for node in ast.walk(ast.parse("\n".join(CODE))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in owners:
            owner = owners[node.value.id]
            assert node.attr in {*dir(owner), *getattr(owner, "__dataclass_fields__", ())}, ast.unparse(node)
            named.add(ast.unparse(node))
    assert {"saejax.trace", "saejax.intervene", "pruned.save_figure", "local.generate"} < named


@pytest.mark.slow  # what it calls has tests of its own
def test_the_notebook_of_graphs_runs(monkeypatch, tmp_path, capsys, lm):
    """As it stands, but for a tiny model and fewer texts and steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(saejax, "load_model", lambda name: lm)
    names = dict[str, Any]()
    for number, cell in enumerate(CODE):
        code = re.sub("TEXTS, STEPS = [0-9, ]+", "TEXTS, STEPS = 4, 20  ", cell)
        exec(compile(code, f"graphs.ipynb, code {number}", "exec"), names)
    assert (names["TEXTS"], names["STEPS"]) == (4, 20)
    whole, pruned, removed = names["graph"], names["pruned"], names["removed"]
    with pytest.raises(UserError, match="unknown kind of node 0: expected one of feature, error, token"):
        whole.count(0)
    # What is frozen changes as the edges say.
    _, after_V = saejax.intervene(names["local"], [[], [removed]], "all")
    row, column = whole.count("feature"), whole.ids.index(pruned.ids[names["top"]])
    token = int(whole.nodes.index_N[whole.slice_of("logit")][0])
    change = after_V - names["local"].logits_V
    assert change[token] - change.mean() == pytest.approx(-whole.adjacency_RxS[row, column], abs=1e-5)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["graph", "graph.html", "graph.pdf", "graph.svg"]
    assert Path("graph.pdf").read_bytes().startswith(b"%PDF") and "<svg" in Path("graph.svg").read_text()
    assert len(set(capsys.readouterr().out.splitlines()[-3:-1])) == 2  # steering changes the text


def test_a_graph_is_shown_in_a_browser_where_there_is_no_notebook(monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address))
    make_graph().show({(0, 0): "my feature"})
    (address,) = opened
    page = Path(address.removeprefix("file://"))
    assert "my feature" in page.read_text() and address in capsys.readouterr().out


@pytest.mark.usefixtures("single_device")
def test_features_have_names_contexts_and_groups_from_python(lm, tmp_path, monkeypatch):
    """From files of features, from a search of texts, and from the set's folder and a state that the page saved."""
    saejax.save_transcoders(tmp_path / "set", made_set(lm))
    graph = saejax.trace(lm, tmp_path / "set", "The water near the war", max_features=40).prune(1.0, 1.0)
    nodes = graph.ids[graph.slice_of("feature")]
    features = [tuple(map(int, node.split("_")[:2])) for node in nodes]
    search = saejax.ContextSearch(lm, tmp_path / "set", ["The war near the water", "She saw the dogs"])
    fired = search.firings(features)
    by_file, key = features[0], "{}_{}".format(*features[0])
    by_text = next(each for each in features[1:] if fired[each].contexts and each != by_file)
    (tmp_path / "files").mkdir()
    described = dict(explanations=[dict(description="from a file")])
    (tmp_path / "files" / f"{key}.json").write_text(json.dumps(described))

    def shown(**options):
        graph.save_page(tmp_path / "page.html", **options)
        text = (tmp_path / "page.html").read_text()
        return json.loads(text.split('id="graph-data">')[1].split("</script>")[0])

    page = shown()
    assert not page["details"] and page["document"]["qParams"]["pinnedIds"] == []
    page = shown(features=tmp_path / "files", contexts=search)
    details = {tuple(map(int, key.split("_"))): value for key, value in page["details"].items()}
    assert details[by_file]["name"] == "from a file" and not details[by_file]["examples"]
    assert details[by_text]["examples"] == list(fired[by_text].contexts) and details[by_text]["histogram"]
    assert [name for name, _ in details[by_text]["quantiles"]] == [name for name, _ in fired[by_text].quantiles]
    outputs = graph.ids[graph.slice_of("logit")]
    pinned = [*nodes[:2], *outputs]
    params = shown(supernodes={"pair": nodes[:2]})["document"]["qParams"]
    assert params["supernodes"] == [["pair", *nodes[:2]]] and params["pinnedIds"] == pinned
    state = dict(supernodes=[["mine", nodes[0]]], pinnedIds=[nodes[0], nodes[2]], sg_pos=json.dumps({nodes[2]: [0, 1]}))
    for saved in (state, dict(paris=state), {"*": state, "rome": []}):  # by a page, and by a server of a graph
        (tmp_path / "state.json").write_text(json.dumps(saved))
        params = shown(supernodes=tmp_path / "state.json")["document"]["qParams"]
        assert {name: params[name] for name in state} == state
    (tmp_path / "two.json").write_text(json.dumps(dict(paris=state, rome=state)))
    # What lies with the set is shown without being named, as by the stage; a label of the call goes before it.
    (tmp_path / "files").rename(tmp_path / "set" / "features")
    assert {at: value["name"] for at, value in shown()["details"].items()} == {key: "from a file"}
    drawn = dict[Any, str]()
    monkeypatch.setattr(figure, "draw_graph", lambda graph, labels, nodes: drawn.update(labels) or Figure())
    graph.save_figure(tmp_path / "a.svg", {features[2]: "mine"}, contexts=search)
    assert drawn[by_file] == "from a file" and drawn[features[2]] == "mine" and drawn[by_text].startswith("“")
    for options, said in (
        (dict(features=tmp_path / "none"), "there is no folder .* of feature files"),
        (dict(contexts=["The war"]), r"contexts is a list: expected saejax.ContextSearch\("),
        (dict(supernodes=[nodes]), "groups is no dictionary"),
        (dict(supernodes={"a": []}), "'a' holds no node"),
        (dict(supernodes={"a": ["9_9_9"]}), "names '9_9_9', and no node of the graph has that id"),
        (dict(supernodes=tmp_path / "none.json"), "none.json does not exist"),
        (dict(supernodes=tmp_path / "two.json"), "has supernodes for paris, rome: expected one graph"),
        (dict(contexts=saejax.ContextSearch(lm, made_set(lm, features=2), ["The war"])), "the graph names feature"),
    ):
        with pytest.raises(UserError, match=said):
            graph.save_page(tmp_path / "b.html", **options)
    assert not (tmp_path / "b.html").exists()
    with pytest.raises(UserError, match="texts is one string: expected a list"):
        saejax.ContextSearch(lm, tmp_path / "set", "The war")


def test_figures_have_the_most_influential_nodes(tmp_path):
    graph = make_graph(features=30, layers=6).prune(1.0, 1.0)
    features = zip(graph.nodes.layer_N[:30].tolist(), range(30), strict=True)
    label = {feature: f"costs $5 and ${feature[1]}_x" for feature in features}  # no formulas
    graph.save_figure(tmp_path / "few.svg", label, nodes=3)
    graph.save_figure(tmp_path / "many.SVG", label)
    few, many = ((tmp_path / name).read_text() for name in ("few.svg", "many.SVG"))
    assert 0 < 2 * few.count("<path") < many.count("<path")
    graph.save_figure(tmp_path / "again.svg", label, nodes=3)
    assert (tmp_path / "again.svg").read_text() == few  # to the byte
    for wrong, said in ((dict(path=tmp_path / "a.jpg"), "ends in .svg, .pdf or .png"), (dict(nodes=-1), "nodes is -1")):
        with pytest.raises(UserError, match=said):
            graph.save_figure(**dict(path=tmp_path / "a.pdf") | wrong)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.svg", "few.svg", "many.SVG"]


def test_a_figure_has_probabilities_of_tokens_alone():
    graph = make_graph()
    difference = dataclasses.replace(graph, settings=dict(targets=[[11, -1], [12, -1]])).difference(" c", "d")
    feature = int(graph.nodes.layer_N[0]), int(graph.nodes.index_N[0])
    labels = {feature: "two\nlines"}
    both, one = (figure.draw_graph(each.prune(1.0, 1.0), labels) for each in (graph, difference))
    assert "two↵lines" in {text.get_text() for text in both.axes[0].texts}
    assert {"␣c 0.60", "d 0.30"} <= {text.get_text() for text in both.axes[0].texts}
    assert "' c' - 'd'" in {text.get_text() for text in one.axes[0].texts}


def test_characters_that_no_font_has_are_told_apart_in_figures(recwarn):
    """Of Chinese, Thai and emoji all would be the same box."""
    tokens = "中", " กา", "ü😀🦜"
    graph = dataclasses.replace(make_graph(), tokens=tokens, labels=("国", "d")).prune(1.0, 1.0)
    drawn = figure.draw_graph(graph, {(0, int(graph.nodes.index_N[0])): "中 label"})
    drawn.canvas.draw()
    shown = [label.get_text() for label in drawn.axes[0].get_xticklabels()]
    assert shown == ["\\u4e2d", "␣\\u0e01\\u0e32", "ü😀\\U0001f99c"]
    assert {"\\u56fd 0.60", "\\u4e2d label"} <= {text.get_text() for text in drawn.axes[0].texts}
    assert not recwarn.list


def test_what_is_written_of_a_graph(tmp_path):
    """A label or an id of another form would do nothing in silence."""
    graph = make_graph().prune(1.0, 1.0)
    features = graph.ids[graph.slice_of("feature")][:2]
    assert graph.score_subgraph(iter(features)) == graph.score_subgraph(features) != graph.score_subgraph([])
    assert graph.score_subgraph(features[0]) == graph.score_subgraph(features[:1])
    assert (graph.supernodes(dict(a=features[0])) == graph.supernodes(dict(a=iter(features[:1])))).all()
    graph.save_page(tmp_path / "new" / "graph.html", {(0, 0): "mine"})
    graph.save_figure(tmp_path / "figures" / "graph.svg", nodes=0)
    assert len(repr(graph).splitlines()) < 24 > len(repr(graph.nodes).splitlines())
    for call, said in (
        (lambda: graph.save_page(tmp_path), "is a folder: name a file in it"),
        (lambda: graph.save_page(tmp_path / "a.html", {"0_0": "mine"}), "the label 'mine' of '0_0': expected such as"),
        (lambda: graph.save_page(tmp_path / "a.html", {(0, 0): None}), r"the label None of \(0, 0\)"),
        (lambda: graph.save_figure(tmp_path / "a.svg", ["mine"]), "labels is no dictionary"),
        (lambda: graph.save_figure(tmp_path / "a.svg", nodes="3"), "nodes is '3'"),
        (lambda: graph.supernodes([features]), "groups is no dictionary"),
        (lambda: make_graph().prune(nodes="0.8"), "nodes is '0.8'"),
        (lambda: make_graph().prune(min_weight=None), "min_weight is None"),
    ):
        with pytest.raises(UserError, match=said):
            call()
    assert not (tmp_path / "a.html").exists() and not (tmp_path / "a.svg").exists()
