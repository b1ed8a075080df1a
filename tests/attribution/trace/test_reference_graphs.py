"""Graphs traced here equal those that circuit-tracer made of the same models and transcoders, as do their files."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from reference_graphs import FOLDERS, assert_same_graph, needs_graphs, their_id
from torch_sites import relative_error

from saejax import load_model, trace
from saejax.attribution.forms.neuronpedia import INDEX, to_document, write_graph
from saejax.attribution.graph.data import BIAS, FEATURE, FIRST_MLP
from saejax.attribution.graph.pruning import source_influence

pytestmark = needs_graphs


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda path: path.name)
def case(request, one_device):
    """A folder, circuit-tracer's arrays, and a function that traces the prompt, with the graph that it gives."""
    folder = request.param
    ref = np.load(folder / "reference.npz")
    lm, options = load_model(str(folder / "hf_model"), mesh=one_device), dict(max_logits=len(ref["logit_ids"]))

    def trace_it(**more):
        return trace(lm, folder / "transcoders", ref["ids"].tolist(), logit_mass=1.0, **options, **more)

    return SimpleNamespace(folder=folder, ref=ref, trace=trace_it, graph=trace_it())


def test_a_traced_graph_is_that_of_circuit_tracer(case):
    graph, ref = case.graph, case.ref
    adjacency_RxS = assert_same_graph(graph, ref)
    assert np.abs(graph.unexplained_R).max() < 1e-5 * np.abs(graph.value_R).max()
    pruned = graph.prune()
    node_N = np.flatnonzero(ref["node_mask"])
    shift = graph.count(FIRST_MLP, BIAS)  # these stand before the logits here, and nowhere there
    kept_N = pruned.pruning.node_N
    assert np.array_equal(np.where(kept_N >= adjacency_RxS.shape[1], kept_N - shift, kept_N), node_N)
    source_E, target_E, _ = pruned.edges()
    edge_NxN = np.zeros_like(ref["edge_mask"])
    edge_NxN[node_N[target_E], node_N[source_E]] = True
    assert np.array_equal(edge_NxN, ref["edge_mask"])
    assert abs(graph.scores().replacement - ref["scores"][0]) < 1e-6
    assert abs(graph.scores().completeness - ref["scores"][1]) < 1e-6
    assert np.abs(pruned.pruning.influence_N - ref["cumulative"][node_N]).max() < 1e-6
    assert graph.prompt


def test_its_files_are_those_of_circuit_tracer_key_by_key(case, tmp_path):
    described = json.loads((case.folder / "graph.json").read_text())
    document = to_document(case.graph.prune(), "tiny-tl", scan="tiny")
    metadata = described["metadata"]
    document["metadata"] |= {key: metadata[key] for key in ("prompt", "prompt_tokens")}  # traced from ids alone
    write_graph(tmp_path, document)
    assert json.loads((tmp_path / INDEX).read_text()) == json.loads((case.folder / INDEX).read_text())
    assert list(document) == list(described) and document["qParams"] == described["qParams"]
    assert {key: document["metadata"][key] for key in metadata} == metadata
    for node, wanted in zip(document["nodes"], described["nodes"], strict=True):
        assert list(node) == list(wanted)
        for key in ("influence", "activation", "token_prob"):
            value, expected = node.pop(key), wanted.pop(key)
            assert (value is None) == (expected is None) and (value is None or abs(value - expected) < 1e-5)
        ours = {**node, "node_id": their_id(node["node_id"])}
        if node["feature"] == -1:  # of its later versions, errors have no other node's name
            layer, _, position = node["node_id"].split("_")
            ours["jsNodeId"] = {f"{layer}_-1-{position}": f"{layer}_{position}-0"}[node["jsNodeId"]]
        assert ours == wanted
    ends = [(their_id(link["source"]), their_id(link["target"])) for link in document["links"]]
    assert ends == [(link["source"], link["target"]) for link in described["links"]]
    assert relative_error(*([link["weight"] for link in one["links"]] for one in (document, described))) < 1e-5


def test_of_few_features_that_are_kept_most_are_the_truly_most_influential(case):
    """circuit-tracer's own choice of 64 has 56 of them on the Qwen3 graph."""
    whole, some = case.graph, case.trace(max_features=64)
    features = whole.nodes[whole.slice_of(FEATURE)]
    best = np.argsort(-source_influence(whole)[: len(features)], kind="stable")[:64]

    def keys(nodes):
        return set(zip(nodes.layer_N.tolist(), nodes.position_N.tolist(), nodes.index_N.tolist(), strict=True))

    common = len(keys(features[best]) & keys(some.nodes[some.slice_of(FEATURE)]))
    print(f"{case.folder.name}: {common} of the 64 most influential features")
    assert common >= 59
