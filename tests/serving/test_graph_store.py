"""The graphs of a folder, and what readers save: nothing outside it is reached, nothing of a unit is changed."""

import json
import os
from operator import itemgetter

import pytest
from made_up_documents import made_up_document

from saejax.attribution.forms.neuronpedia import INDEX, write_graph
from saejax.attribution.settings import GraphConfig
from saejax.errors import UserError
from saejax.interpret.labels import read_labels
from saejax.runner import command_line
from saejax.serving.app import GraphServer, list_page
from saejax.serving.jobs import Jobs
from saejax.serving.session import ModelSession
from saejax.serving.store import GraphStore
from saejax.stages.attribute.requests import read_states

SET = ["runs/other set"]


def made(slug, seed=0):
    document = made_up_document(features=12, edges=30, layers=4, seed=seed, errors=3, outputs=2)
    document["metadata"]["slug"] = slug
    return document


@pytest.fixture
def root(tmp_path):
    """A workdir with two graphs, one that was replaced, and one beside it that it must not show."""
    root = tmp_path / "run"
    for mark, graphs in (("m0", [made("old")]), ("m1", [made("water"), made("war", 1)])):
        for graph in graphs:
            write_graph(root / "attribute" / f"p-{mark}" / "graphs", graph)
        for file in ("started.json", "done.json"):
            (root / "attribute" / f"p-{mark}" / file).write_text("{}")
    os.symlink("p-m1", root / "attribute" / "p")
    write_graph(tmp_path / "beside", made("secret"))
    return root


def test_graphs_are_found_beside_their_lists(root):
    store = GraphStore(root)
    assert set(store.graphs()) == {"attribute/p/graphs/water", "attribute/p/graphs/war"}
    graph = store.find("attribute/p/graphs/war")
    assert graph.unit == root / "attribute" / "p" and graph.metadata["slug"] == "war"
    assert store.document(graph)["metadata"]["slug"] == "war"
    assert graph.whole is None and store.problems == {}
    (root / "one.pt").write_bytes(b"")
    assert len(store.graphs()) == 2 and "truncated or not a file of torch.save" in store.problems["one.pt"]
    with pytest.raises(UserError, match="the whole graph of attribute/p/graphs/war is not saved"):
        graph.load_whole()
    before = graph.fingerprint
    write_graph(root / "attribute" / "p" / "graphs", made("war", 3))
    assert store.find("attribute/p/graphs/war").fingerprint != before


def test_nothing_outside_the_folder_is_reached(root):
    folder = root / "attribute" / "p" / "graphs"
    listed = json.loads((folder / INDEX).read_text())
    listed["graphs"] += [dict(slug="../../../../beside/secret"), dict(slug="linked"), dict(slug=str(root.parent / "x"))]
    (folder / INDEX).write_text(json.dumps(listed))
    os.symlink(root.parent / "beside" / "secret.json", folder / "linked.json")
    store, graphs = GraphStore(root), "attribute/p/graphs"
    assert set(store.graphs()) == {"attribute/p/graphs/water", "attribute/p/graphs/war"}
    assert store.problems == {f"{graphs}/linked.json": "is a link out of the folder"}
    for name in ("../beside/secret", f"{graphs}/../graphs/war", f"{graphs}/linked", "/etc/passwd", ""):
        with pytest.raises(UserError, match="there is no graph"):
            store.find(name)


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("war.json", lambda text: text[:-40], "is not JSON, or is cut off"),
        ("war.json", lambda text: "[]", "is in the list of graphs, and is none"),
        ("war.json", lambda text: text.replace('"scan":', '"scam":', 1), "metadata has no scan: is this a graph"),
        ("war.json", None, "is in the list of graphs, and is gone"),
        ("dangling.json", "link", "is a link to nothing"),
        (INDEX, lambda text: text[:-9], "is no list of graphs, or is cut off"),
        (INDEX, lambda text: "[]", "is no list of graphs, or is cut off"),
    ],
)
def test_a_damaged_file_is_one_line_and_hides_no_other(root, file, content, problem):
    path = root / "attribute" / "p" / "graphs" / file
    if content == "link":
        os.symlink(path.parent / "gone", path)
    elif content:
        path.write_text(content(path.read_text()))
    else:
        path.unlink()
    store = GraphStore(root)
    assert list(store.graphs()) == [f"attribute/p/graphs/{name}" for name in ("war", "water") if file != f"{name}.json"]
    ((name, line),) = store.problems.items()
    assert name == f"attribute/p/graphs/{file}" and line.startswith(problem)
    page = list_page(store, list(store.graphs().values()), GraphConfig(), "", "")
    assert f'"problems":["{name}: {problem}' in page and "model made-up-model, 11 tokens" in page


def test_nodes_and_links_are_checked_when_a_graph_is_opened(root):
    """The list of many graphs looks at their metadata alone."""
    path = root / "attribute" / "p" / "graphs" / "war.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "links": [dict(source="a", target="b", weight=1.0)]}))
    store = GraphStore(root)
    assert len(store.graphs()) == 2 and not store.problems
    with pytest.raises(UserError, match=r"links\[0\].source of the graph is 'a'"):
        store.document(store.find("attribute/p/graphs/war"))


def test_a_folder_of_files_without_a_list(tmp_path):
    (tmp_path / "mine.v2.json").write_text(json.dumps(made("mine")))
    (tmp_path / "settings.json").write_text('{"a": 1}')
    (tmp_path / "cut.json").write_text(json.dumps(made("cut"))[:900])
    latin = os.fsdecode(b"caf\xe9.json")  # of a name in another encoding no address can be made
    (tmp_path / latin).write_text(json.dumps(made("latin")))
    store = GraphStore(tmp_path)
    assert list(store.graphs()) == ["mine.v2"] and store.find("mine.v2").unit is None
    problems = {"cut.json": "is not JSON, or is cut off", latin: "has a name that is no text: rename it"}
    assert store.problems == problems
    assert "caf\ufffd.json: has a name" in list_page(store, list(store.graphs().values()), GraphConfig(), "", "")
    (tmp_path / "mine.v2.json").write_text(json.dumps(made("changed", 2)))
    os.utime(tmp_path / "mine.v2.json", (1, 1))
    assert store.document(store.find("mine.v2"))["metadata"]["slug"] == "changed"
    assert not GraphStore(tmp_path / "nothing").graphs()


def test_groups_and_pins_are_saved_for_the_stage_and_shown(root):
    store = GraphStore(root)
    graph = store.find("attribute/p/graphs/war")
    before, ids = graph.path.read_bytes(), [node["node_id"] for node in store.document(graph)["nodes"]]
    groups = [["<script>alert(1)</script>", *ids[:2]], ["pair", ids[3]]]
    path = store.save_state(graph, groups)
    assert GraphStore(root).document(graph)["qParams"]["supernodes"] == groups
    assert read_states(GraphConfig(supernodes=str(path)), ["war"]) == {"war": dict(supernodes=groups)}
    assert graph.path.read_bytes() == before  # units are as they were, or they would be made again
    assert store.document(store.find("attribute/p/graphs/water"))["qParams"]["supernodes"] == []
    repeated = [["a", ids[0]], ["b", ids[0]]]
    for wrong, message in (([["a", "nobody"]], "names 'nobody'"), ([["a"]], "no groups"), (repeated, "'a' and 'b'")):
        with pytest.raises(UserError, match=message):
            store.save_state(graph, wrong)
    state = dict(supernodes=groups, pinnedIds=[*ids[:2], ids[3], ids[5]], sg_pos=json.dumps({ids[5]: [0.5, 40]}))
    store.save_state(graph, state | dict(linkType="input", clickedId=ids[0]))
    shown = GraphStore(root).document(graph)["qParams"]
    assert shown == document_of(graph)["qParams"] | state  # nor what was only looked at
    assert read_states(GraphConfig(supernodes=str(path)), ["war"]) == {"war": state}
    with pytest.raises(UserError, match="'nobody' is pinned, and no node of the graph has that id"):
        store.save_state(graph, state | dict(pinnedIds=["nobody"]))
    for wrong in (dict(pinnedIds="all"), dict(pinnedIds=[3]), dict(sg_pos=None)):
        with pytest.raises(UserError, match="no groups"):
            store.save_state(graph, state | wrong)
    store.save_state(graph, [])
    assert GraphStore(root).document(graph)["qParams"] == document_of(graph)["qParams"]


def document_of(graph):
    return json.loads(graph.path.read_text())


def test_graphs_of_one_slug_have_groups_of_their_own(tmp_path):
    """A copy of a file has its slug, and so may files in two folders."""
    for name, seed in (("mine", 0), ("copy", 1)):
        (tmp_path / f"{name}.json").write_text(json.dumps(made("water", seed)))
    write_graph(tmp_path / "below", made("water", 2))
    store = GraphStore(tmp_path)
    graphs = [store.find(name) for name in ("mine", "copy", "below/water")]
    for k, graph in enumerate(graphs):
        store.save_state(graph, [[f"group {k}", store.document(graph)["nodes"][k]["node_id"]]])
    shown = [store.document(graph)["qParams"]["supernodes"][0][0] for graph in graphs]
    assert shown == ["group 0", "group 1", "group 2"]


def test_units_whose_names_differ_in_a_sign_have_groups_of_their_own(root):
    names = ["a-b", "a--b", "-a-b"]
    for seed, name in enumerate(names):
        folder = root / "attribute" / f"{name}-m0"
        write_graph(folder / "graphs", made("water", seed))
        for file in ("started.json", "done.json"):
            (folder / file).write_text("{}")
        os.symlink(folder.name, root / "attribute" / name)
    store = GraphStore(root)
    graphs = [store.find(f"attribute/{name}/graphs/water") for name in names]
    files = [
        store.save_state(graph, [[name, store.document(graph)["nodes"][0]["node_id"]]])
        for name, graph in zip(names, graphs, strict=True)
    ]
    assert [store.document(graph)["qParams"]["supernodes"][0][0] for graph in graphs] == names
    assert len({*files}) == 3 and files[0] == root / "serve" / "attribute-a-b" / "groups.json"


def test_groups_that_an_earlier_version_saved_are_shown(root):
    """It saved no pins."""
    store = GraphStore(root)
    graph = store.find("attribute/p/graphs/war")
    groups = [["first", store.document(graph)["nodes"][0]["node_id"]]]
    store.save_state(graph, []).write_text(json.dumps({"war": groups}))
    assert store.document(graph)["qParams"] == document_of(graph)["qParams"] | dict(supernodes=groups)


@pytest.mark.parametrize("content", ["[1]", '{"war": "x"}', '{"war": [[]]}', '{"war": {"pinnedIds": []}}', "{"])
def test_damaged_groups_are_one_line(root, content):
    store = GraphStore(root)
    graph = store.find("attribute/p/graphs/war")
    path = store.save_state(graph, [])
    path.write_text(content)
    with pytest.raises(UserError, match=r"groups\.json is (no file of groups|not valid JSON)"):
        store.document(graph)


def test_a_file_that_is_removed_under_the_server_is_one_line(root):
    store = GraphStore(root)
    graph = store.find("attribute/p/graphs/war")
    graph.path.unlink()
    with pytest.raises(UserError, match=r"war\.json is gone"):
        store.document(graph)
    assert list(store.graphs()) == ["attribute/p/graphs/water"]


def test_damaged_files_of_features_and_tables_hide_neither_the_graph_nor_its_run(root):
    configs = command_line.read_configs(command_line.stage_flags(), ["serve", f"--graph.transcoders={root}"])
    server = GraphServer(GraphStore(root), ModelSession(configs, named=True), Jobs())
    query, unit = dict(id="attribute/p/graphs/war"), root / "attribute" / "p-m1"
    assert '"why":""' in server._graph(query)
    first = next(name for name in map(itemgetter("node_id"), made("war", 1)["nodes"]) if "_-1_" not in name)
    for file, content in (
        ("features/{}_{}.json".format(*first.split("_")), "[]"),
        ("tables/war.json", '[{"edges": 3}]'),
    ):
        path = unit / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        page = server._graph(query)
        assert '"why":""' in page and "Labels or contexts are missing: " in page
        path.unlink()
    # A unit whose summary is damaged cannot be run, and is shown.
    bare = GraphServer(GraphStore(root), ModelSession(configs, named=False), Jobs())
    page = bare._graph(query)
    assert '"why":"' in page and '"why":""' not in page


def test_new_prompts_are_traced_as_the_newest_unit_that_can_be_read(root):
    class Session:
        def configs_of(self, graph):
            if graph.metadata["slug"] == newest:
                raise UserError("damaged")
            return graph.id

    store = GraphStore(root)
    newest, older = (graph.metadata["slug"] for graph in store.graphs().values())
    server = GraphServer(store, Session(), Jobs())
    assert server._configs() == f"attribute/p/graphs/{older}"
    (root / "attribute" / "p" / "graphs" / f"{older}.json").unlink()
    with pytest.raises(UserError, match="damaged"):
        server._configs()


def test_labels_are_saved_for_the_atlas_and_shown(root):
    store = GraphStore(root)
    path = store.save_label(SET, 3, 17, '=cmd|"<b>", "line\n2"')
    store.save_label(SET, 2, 17, "other layer")
    store.save_label(SET, 3, 17, "cities, towns")
    store.save_label(SET, 3, 18, "gone")
    store.save_label(SET, 3, 18, "")
    assert store.labels(SET) == {(3, 17): "cities, towns", (2, 17): "other layer"}
    read = read_labels(path, "layer 3", 20, several=True)
    assert {feature: one.label for feature, one in read.items()} == {17: "cities, towns"}
    assert store.labels(["another set"]) == {}
    odd = ["a\rb", "a\r\nb", "\x00", '"', '""","', "\x1a", "\ufeffa", "a,b;c\td", "'"]
    for number, label in enumerate(odd):
        store.save_label(SET, 4, number, label)
    wanted = {(4, number): label for number, label in enumerate(odd)} | {(4, 0): "a\nb", (4, 1): "a\nb"}
    assert wanted.items() <= store.labels(SET).items() and store.labels(SET)[3, 17] == "cities, towns"


def test_sets_whose_folders_differ_in_a_sign_have_labels_of_their_own(root):
    store = GraphStore(root)
    sets = [["runs/a"], ["runs-a"], ["runs_a"], ["runs--a"], ["runs", "a"], ["runs/a", "b"], ["runs/a/b"], ["/runs/a"]]
    for number, folders in enumerate(sets):
        store.save_label(folders, 3, 17, f"label {number}")
    assert [store.labels(folders) for folders in sets] == [{(3, 17): f"label {n}"} for n in range(len(sets))]
    assert store.labels(["./runs/a/"]) == {(3, 17): "label 0"}
    assert (root / "serve" / "runs-a" / "labels.csv").exists()


def test_labels_of_ones_own_keep_their_lines_and_columns(root):
    store = GraphStore(root)
    own = store.save_label(SET, 3, 17, "first")
    own.write_text(
        'feature,label,note,reviewer,seen,dictionary\n17,"old, one",a note,me,yes,\n5,keep,,you,no,layer 3\n'
    )
    with pytest.raises(UserError, match="line 2: '' and '17' name no layer and feature"):
        store.labels(SET)
    assert store.save_label(SET, 3, 17, "new") == own
    assert own.read_text() == (
        "feature,label,note,reviewer,dictionary,seen\n5,keep,,you,layer 3,no\n17,new,a note,by hand,layer 3,yes\n"
    )
    assert store.labels(SET) == {(3, 5): "keep", (3, 17): "new"}
    own.write_text("feature;label\n17;x\n")
    before = own.read_bytes()
    with pytest.raises(UserError, match="--atlas.labels=.* has no column"):
        store.save_label(SET, 3, 17, "new")
    assert own.read_bytes() == before
