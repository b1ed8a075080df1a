"""The JSON of graphs: circuit-tracer's own, key by key; unique ids; the list of a folder's graphs."""

import copy
import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from made_graphs import make_graph
from reference_graphs import LAYERS, adjacency_of, each_graph, needs_graphs, nodes_of

import saejax
from saejax.attribution.forms.document import check_document
from saejax.attribution.forms.neuronpedia import INDEX, to_document, to_networkx, write_graph
from saejax.attribution.forms.page import write_page
from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import LOGIT
from saejax.errors import UserError


def reference_graph(folder: Path) -> Graph:
    """The graph that circuit-tracer traced, from its arrays."""
    ref, described = np.load(folder / "reference.npz"), document_of(folder)
    logits = [node for node in described["nodes"] if node["feature_type"] == "logit"]
    zeros = np.zeros(len(adjacency_of(ref)), np.float32)
    return Graph(
        adjacency_RxS=adjacency_of(ref),
        nodes=nodes_of(ref),
        value_R=zeros,
        constant_R=zeros,
        untraced_R=zeros,
        ids_P=ref["ids"].astype(np.int32),
        tokens=tuple(described["metadata"]["prompt_tokens"]),
        logit_K=np.zeros(len(logits), np.float32),
        labels=tuple(node["clerp"].split('"')[1] for node in logits),
        prompt=described["metadata"]["prompt"],
        n_layers=LAYERS,
        model=dict(name="somebody/tiny"),
        transcoders=dict(name="t"),
        settings=dict(max_logits=5, max_features=None, batch_size=8),
    )


def document_of(folder: Path) -> dict:
    return json.loads((folder / "graph.json").read_text())


def theirs(name: str) -> str:
    """circuit-tracer's id of a node."""
    layer, feature, position = name.split("_")
    return f"0_{layer}_{position}" if feature == "-1" else name


@needs_graphs
@each_graph
def test_circuit_tracers_own_graph_key_by_key(folder):
    described = document_of(folder)
    document = to_document(reference_graph(folder).prune(), "tiny-tl")
    assert list(document) == list(described)
    assert {key: document["metadata"][key] for key in described["metadata"]} == described["metadata"]
    assert document["qParams"] == described["qParams"]
    for node, wanted in zip(document["nodes"], described["nodes"], strict=True):
        assert list(node) == list(wanted)
        share, wanted_share = node.pop("influence"), wanted.pop("influence")
        assert share == wanted_share or abs(share - wanted_share) < 1e-6
        assert node.pop("activation") == as_fp32(wanted.pop("activation"))
        assert node.pop("token_prob") == as_fp32(wanted.pop("token_prob"))
        assert {**node, "node_id": theirs(node["node_id"])} == wanted
    links = [{**link, **{end: theirs(link[end]) for end in ("source", "target")}} for link in document["links"]]
    assert links == [{**link, "weight": as_fp32(link["weight"])} for link in described["links"]]


@needs_graphs
@each_graph
def test_our_graph_of_the_same_prompt_key_by_key(folder, one_device):
    described, ref = document_of(folder), np.load(folder / "reference.npz")
    model = saejax.load_model(str(folder / "hf_model"), mesh=one_device)
    graph = saejax.trace(model, folder / "transcoders", ref["ids"].tolist(), max_logits=len(ref["logit_ids"]))
    document = to_document(graph.prune(), "tiny-tl", scan="tiny")
    same = [key for key in described["metadata"] if key not in ("prompt", "prompt_tokens")]
    assert [document["metadata"][key] for key in same] == [described["metadata"][key] for key in same]
    for node, wanted in zip(document["nodes"], described["nodes"], strict=True):
        for key in ("influence", "activation", "token_prob"):
            value, expected = node.pop(key), wanted.pop(key)
            assert (value is None) == (expected is None) and (value is None or abs(value - expected) < 1e-5)
        assert {**node, "node_id": theirs(node["node_id"])} == wanted
    ends = [(theirs(link["source"]), theirs(link["target"])) for link in document["links"]]
    assert ends == [(link["source"], link["target"]) for link in described["links"]]
    ours, wanted = (np.array([link["weight"] for link in one["links"]]) for one in (document, described))
    assert np.abs(ours - wanted).max() < 1e-5 * np.abs(wanted).max()


@needs_graphs
@each_graph
def test_ids_are_unique_where_the_references_are_not(folder, tmp_path):
    with pytest.raises(UserError, match="1 node ids of the graph are not unique, such as '0_0_3'"):
        check_document(document_of(folder))
    document = to_document(reference_graph(folder).prune(), "tiny-tl")
    ids = [node["node_id"] for node in document["nodes"]]
    assert len(set(ids)) == len(ids)
    write_page(tmp_path / "graph.html", document)
    write_graph(tmp_path, document)
    assert json.loads((tmp_path / INDEX).read_text()) == json.loads((folder / INDEX).read_text())


@pytest.fixture
def graph():
    """A small pruned graph with a feature 0 where an error stands, too."""
    graph = make_graph(features=6, layers=2)
    graph.nodes.layer_N[0], graph.nodes.index_N[0] = 0, 0
    below_S = graph.nodes.layer_N[: graph.adjacency_RxS.shape[1]]
    graph.adjacency_RxS[below_S[None] >= graph.nodes.layer_N[graph.target_R][:, None]] = 0
    return graph.prune(1.0, 1.0)


def as_fp32(number):
    """The shortest decimal of what a number is in fp32."""
    return None if number is None else float(str(np.float32(number)))


def test_a_viewer_finds_the_features():
    """Neuronpedia by its ids, in small letters, and the name of the set; circuit-tracer's by the set's address."""
    graph = dataclasses.replace(make_graph().prune(1.0, 1.0), model=dict(name="google/Gemma-2-2B"))
    of_hub = dict(name="org/plts/small", revision="4f1c")

    def metadata(transcoders, **options):
        return to_document(dataclasses.replace(graph, transcoders=transcoders), "one", **options)["metadata"]

    assert metadata(of_hub)["scan"] == "org/plts//small@4f1c"
    assert metadata(of_hub | dict(name="org/plts"))["scan"] == "org/plts@4f1c"
    assert metadata(dict(name="runs/a/train/topk", revision=""))["scan"] == "gemma-2-2b"
    ours = metadata(of_hub, source_set="gemmascope-transcoder-16k")
    assert ours["scan"] == "gemma-2-2b"
    assert ours["feature_details"] == dict(neuronpedia_source_set="gemmascope-transcoder-16k")
    assert metadata(of_hub, scan="mine", source_set="x")["scan"] == "mine" and "feature_details" not in metadata(of_hub)


def test_numbers_have_no_more_digits_than_fp32():
    graph = make_graph().prune(1.0, 1.0)
    document = to_document(graph, "short")
    weights = [link["weight"] for link in document["links"]]
    assert np.array_equal(np.float32(weights), graph.edges()[2])  # nothing is lost
    assert all(number == as_fp32(number) for number in weights)
    assert max(len(f"{number:.17g}") for number in map(float, graph.edges()[2])) > 15


def test_what_the_document_says(graph):
    document = to_document(
        graph, "a-slug", scan="gemma-2-2b", labels={(0, 0): "first"}, supernodes=[["pair", "0_0_1", "0_-1_1"]],
        pinned=["3_11_2", "0_0_1"],
    )  # fmt: skip
    by_id = {node["node_id"]: node for node in document["nodes"]}
    assert by_id["0_0_1"]["clerp"] == "first" and by_id["0_-1_1"]["feature"] == -1
    assert document["qParams"]["pinnedIds"] == ["0_0_1", "0_-1_1", "3_11_2"]
    assert document["qParams"]["supernodes"] == [["pair", "0_0_1", "0_-1_1"]]
    metadata = document["metadata"]
    assert metadata["scan"] == "gemma-2-2b" and metadata["info"]["generator"]["name"] == "saejax"
    assert metadata["pruning_settings"] == dict(node_threshold=1.0, edge_threshold=1.0)
    assert metadata["replacement_score"] == graph.pruning.scores.replacement
    assert by_id["3_11_2"]["clerp"] == 'Output " c" (p=0.600)' and by_id["3_11_2"]["is_target_logit"]
    json.dumps(document, allow_nan=False)


def test_directions_have_ids_of_their_own(graph):
    graph.nodes.index_N[graph.slice_of(LOGIT)] = -1
    assert graph.ids[-2:] == ["3_-1_2", "3_-2_2"]
    check_document(to_document(graph, "directions"))


def test_what_cannot_be_written_is_refused(graph):
    with pytest.raises(UserError, match="not pruned"):
        to_document(make_graph(), "a")
    for slug in ("", "../up", "a b", "graph-metadata"):
        with pytest.raises(UserError, match="cannot name a graph"):
            to_document(graph, slug)
    with pytest.raises(UserError, match="supernodes name '9_9_9'"):
        to_document(graph, "a", supernodes=[["pair", "0_0_1", "9_9_9"]])
    graph.nodes.index_N[graph.slice_of(LOGIT)] = 7
    with pytest.raises(UserError, match="not unique"):
        to_document(graph, "a")


def test_the_list_of_graphs_keeps_the_others(graph, tmp_path):
    first, second = (to_document(graph, slug) for slug in ("first", "second"))
    write_graph(tmp_path, first)
    stranger = dict(slug="somebody-elses", more={"kept": True})
    listed = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps({"graphs": [stranger, *listed["graphs"]], "version": 3}))
    write_graph(tmp_path, second)
    with pytest.raises(UserError, match="has a graph 'first' already"):
        write_graph(tmp_path, first)
    changed = copy.deepcopy(first)
    changed["metadata"]["prompt"] = "another"
    write_graph(tmp_path, changed, replace=True)
    listed = json.loads((tmp_path / INDEX).read_text())
    assert listed["version"] == 3 and listed["graphs"][0] == stranger
    assert [one["slug"] for one in listed["graphs"]] == ["somebody-elses", "first", "second"]
    assert listed["graphs"][1]["prompt"] == "another"
    assert json.loads((tmp_path / "first.json").read_text()) == changed
    for damaged in ("[]", '{"graphs": ['):
        (tmp_path / INDEX).write_text(damaged)
        with pytest.raises(UserError, match="no list of graphs"):
            write_graph(tmp_path, to_document(graph, "third"))
    changed["metadata"]["slug"] = "../third"
    with pytest.raises(UserError, match="cannot name a graph"):
        write_graph(tmp_path, changed)
    assert not (tmp_path / "third.json").exists()


def test_several_writers_lose_nothing(graph, tmp_path):
    documents = [to_document(graph, f"graph-{k}") for k in range(12)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda document: write_graph(tmp_path, document), documents))
    listed = json.loads((tmp_path / INDEX).read_text())["graphs"]
    assert {one["slug"] for one in listed} == {f"graph-{k}" for k in range(12)}


@pytest.mark.parametrize("pruned", [True, False])
def test_networkx_has_the_same_nodes_and_edges(graph, pruned):
    graph = graph if pruned else make_graph()
    made, ids = to_networkx(graph), graph.ids
    assert list(made) == ids
    source_E, target_E, weight_E = graph.edges()
    assert made.number_of_edges() == len(weight_E)
    assert made.edges[ids[source_E[3]], ids[target_E[3]]]["weight"] == weight_E[3]
    last = made.nodes[ids[-1]]
    assert (last["kind"], last["token"], last["position"]) == ("logit", "d", 2)
    assert ("influence" in last) == pruned
    assert made.nodes[ids[0]]["value"] == graph.nodes.value_N[0]


def test_every_kind_of_node_has_an_id(graph):
    whole = dataclasses.replace(make_graph(), pruning=None)
    assert {"bias_0", "bias_1"} <= set(whole.ids)
