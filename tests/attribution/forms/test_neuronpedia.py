"""The JSON of graphs: what it says, what cannot be written, and the list of a folder's graphs."""

import copy
import dataclasses
import json

import numpy as np
import pytest
from made_graphs import make_graph

from saejax.attribution.forms.document import ERROR_TYPE, FEATURE_TYPE, check_document
from saejax.attribution.forms.neuronpedia import INDEX, to_document, write_graph
from saejax.attribution.graph.data import LOGIT
from saejax.errors import UserError


@pytest.fixture
def graph():
    """A small pruned graph with a feature 0 where an error stands, too: of one id in circuit-tracer's files."""
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
    assert by_id["0_-1_1"]["jsNodeId"] == "0_-1-1" and by_id["0_0_1"]["jsNodeId"] == "0_0-0"  # as circuit-tracer's
    features = {node["jsNodeId"] for node in document["nodes"] if node["feature_type"] == FEATURE_TYPE}
    errors = [node["jsNodeId"] for node in document["nodes"] if node["feature_type"] == ERROR_TYPE]
    assert len(set(errors)) == len(errors) and not features & set(errors)
    assert document["qParams"]["pinnedIds"] == ["0_0_1", "0_-1_1", "3_11_2"]
    assert document["qParams"]["supernodes"] == [["pair", "0_0_1", "0_-1_1"]]
    metadata = document["metadata"]
    assert metadata["scan"] == "gemma-2-2b" and metadata["info"]["generator"]["name"] == "saejax"
    assert metadata["pruning_settings"] == dict(node_threshold=1.0, edge_threshold=1.0)
    assert metadata["replacement_score"] == graph.pruning.scores.replacement
    assert by_id["3_11_2"]["clerp"] == 'Output " c" (p=0.600)' and by_id["3_11_2"]["is_target_logit"]
    json.dumps(document, allow_nan=False)
    graph.nodes.index_N[graph.slice_of(LOGIT)] = -1  # of differences
    assert graph.ids[-2:] == ["3_-1_2", "3_-2_2"]
    check_document(to_document(graph, "differences"))


def test_what_cannot_be_written_is_refused(graph):
    with pytest.raises(UserError, match="not pruned"):
        to_document(make_graph(), "a")
    for slug in ("", "../up", "a b", "graph-metadata", 300 * "b", None):
        with pytest.raises(UserError, match="cannot name a graph"):
            to_document(graph, slug)
    with pytest.raises(UserError, match="the supernode 'pair' names '9_9_9'"):
        to_document(graph, "a", supernodes=[["pair", "0_0_1", "9_9_9"]])
    with pytest.raises(UserError, match="'9_9_9' is pinned"):
        to_document(graph, "a", pinned=["0_0_1", "9_9_9"])
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
    changed = copy.deepcopy(first)
    changed["metadata"]["prompt"] = "another"
    write_graph(tmp_path, changed)
    listed = json.loads((tmp_path / INDEX).read_text())
    assert listed["version"] == 3 and listed["graphs"][0] == stranger and listed["graphs"][1]["prompt"] == "another"
    assert [one["slug"] for one in listed["graphs"]] == ["somebody-elses", "first", "second"]
    assert json.loads((tmp_path / "first.json").read_text()) == changed
    for damaged in ("[]", '{"graphs": ['):
        (tmp_path / INDEX).write_text(damaged)
        with pytest.raises(UserError, match="no list of graphs"):
            write_graph(tmp_path, to_document(graph, "third"))
    changed["metadata"]["slug"] = "../third"
    with pytest.raises(UserError, match="cannot name a graph"):
        write_graph(tmp_path, changed)
    assert not (tmp_path / "third.json").exists()


@pytest.mark.parametrize("pruned", [True, False])
def test_networkx_has_the_same_nodes_and_edges(graph, pruned):
    graph = graph if pruned else make_graph()
    made, ids = graph.to_networkx(), graph.ids
    assert list(made) == ids and (pruned or {"bias_0", "bias_1"} <= set(ids))
    source_E, target_E, weight_E = graph.edges()
    assert made.number_of_edges() == len(weight_E)
    assert made.edges[ids[source_E[3]], ids[target_E[3]]]["weight"] == weight_E[3]
    last = made.nodes[ids[-1]]
    assert (last["kind"], last["token"], last["position"]) == ("logit", "d", 2)
    assert ("influence" in last) == pruned
    assert made.nodes[ids[0]]["value"] == graph.nodes.value_N[0]
