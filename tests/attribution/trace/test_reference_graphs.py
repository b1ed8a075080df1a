"""Graphs traced here equal those that circuit-tracer made of the same models and transcoders."""

import json

import numpy as np
from reference_graphs import adjacency_of, each_graph, needs_graphs, nodes_of

from saejax import load_model, trace
from saejax.attribution.graph.nodes import BIAS, FEATURE, FIRST_MLP
from saejax.attribution.graph.pruning import source_influence


def relative(a, b) -> float:
    return float(np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max())


@needs_graphs
@each_graph
def test_a_traced_graph_is_that_of_circuit_tracer(folder, one_device):
    ref = np.load(folder / "reference.npz")
    graph = trace(
        load_model(str(folder / "hf_model"), mesh=one_device), folder / "transcoders", ref["ids"],
        max_logits=len(ref["logit_ids"]), logit_mass=1.0,
    )  # fmt: skip
    ours = graph.nodes[~np.isin(graph.nodes.kind_N, (FIRST_MLP, BIAS))]
    wanted = nodes_of(ref)
    for name in ("kind_N", "layer_N", "position_N", "index_N"):
        assert np.array_equal(getattr(ours, name), getattr(wanted, name)), name
    assert relative(ours.value_N, wanted.value_N) < 1e-5
    adjacency_RxS = adjacency_of(ref)
    error = relative(graph.adjacency_RxS[:, : adjacency_RxS.shape[1]], adjacency_RxS)
    left = np.abs(graph.unexplained_R).max() / np.abs(graph.value_R).max()
    print(f"{folder.name}: adjacency {error:.1e}, sums {left:.1e}")
    assert error < 1e-5 and left < 1e-5
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
    assert graph.prompt and len(json.loads((folder / "graph.json").read_text())["nodes"]) == len(pruned.nodes)


@needs_graphs
@each_graph
def test_of_few_features_that_are_kept_most_are_the_truly_most_influential(folder, one_device):
    """circuit-tracer's own choice of 64 has 56 of them on the Qwen3 graph."""
    ref = np.load(folder / "reference.npz")
    lm, options = load_model(str(folder / "hf_model"), mesh=one_device), dict(max_logits=len(ref["logit_ids"]))
    whole = trace(lm, folder / "transcoders", ref["ids"], **options, logit_mass=1.0)
    some = trace(lm, folder / "transcoders", ref["ids"], **options, logit_mass=1.0, max_features=64)
    features = whole.nodes[whole.slice_of(FEATURE)]
    best = np.argsort(-source_influence(whole)[: len(features)], kind="stable")[:64]

    def keys(nodes):
        return set(zip(nodes.layer_N.tolist(), nodes.position_N.tolist(), nodes.index_N.tolist(), strict=True))

    found = len(keys(features[best]) & keys(some.nodes[some.slice_of(FEATURE)]))
    print(f"{folder.name}: {found} of the 64 most influential features")
    assert found >= 59
