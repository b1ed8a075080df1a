"""The graphs that circuit-tracer made of tiny models, where they are at hand."""

import os
from pathlib import Path

import numpy as np
import pytest
from torch_sites import relative_error

from saejax.attribution.graph.data import BIAS, ERROR, FEATURE, FIRST_MLP, LOGIT, TOKEN, Nodes

REFERENCE = Path(os.environ.get("SAEJAX_REFERENCE", Path(__file__).parents[3] / "shared" / "reference")) / "graphs"
FOLDERS = sorted(path.parent for path in REFERENCE.glob("*/reference.npz"))
each_graph = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
needs_graphs = pytest.mark.skipif(not FOLDERS, reason=f"no reference graphs in {REFERENCE} (SAEJAX_REFERENCE)")
LAYERS = 3


def nodes_of(ref, layers: int = LAYERS) -> Nodes:
    """The nodes of a reference graph of a model with so many layers, in its order."""
    positions = len(ref["ids"])
    layer_E, position_E = np.divmod(np.arange(layers * positions), positions)
    layer_F, position_F, feature_F = ref["active_features"].T
    return Nodes.joined(
        Nodes.of(FEATURE, layer_F, position_F, feature_F, ref["activation_values"]),
        Nodes.of(ERROR, layer_E, position_E),
        Nodes.of(TOKEN, -1, np.arange(positions), ref["ids"]),
        Nodes.of(LOGIT, layers, positions - 1, ref["logit_ids"], ref["logit_p"]),
    )


def adjacency_of(ref, layers: int = LAYERS) -> np.ndarray:
    """Its weights, targets by sources."""
    kind_N = nodes_of(ref, layers).kind_N
    return ref["adjacency"][np.isin(kind_N, (FEATURE, LOGIT))][:, kind_N != LOGIT]


def assert_same_graph(graph, ref, layers: int = LAYERS, columns: int | None = None) -> np.ndarray:
    """Nodes and weights of a whole graph are circuit-tracer's, as far as ``columns`` go; gives all its weights."""
    ours, wanted = graph.nodes[~np.isin(graph.nodes.kind_N, (FIRST_MLP, BIAS))], nodes_of(ref, layers)
    for name in ("kind_N", "layer_N", "position_N", "index_N"):
        assert np.array_equal(getattr(ours, name), getattr(wanted, name)), name
    assert relative_error(ours.value_N, wanted.value_N) < 1e-5
    adjacency_RxS = adjacency_of(ref, layers)
    compared_RxS = adjacency_RxS[:, :columns]
    assert relative_error(graph.adjacency_RxS[:, : compared_RxS.shape[1]], compared_RxS) < 1e-5
    return adjacency_RxS


def their_id(name: str) -> str:
    """circuit-tracer's id of a node."""
    layer, feature, position = name.split("_")
    return f"0_{layer}_{position}" if feature == "-1" else name
