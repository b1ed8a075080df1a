"""The graphs that circuit-tracer made of tiny models, where they are at hand."""

import os
from pathlib import Path

import numpy as np
import pytest

from saejax.attribution.graph.nodes import ERROR, FEATURE, LOGIT, TOKEN, Nodes

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


def their_id(name: str) -> str:
    """circuit-tracer's id of a node."""
    layer, feature, position = name.split("_")
    return f"0_{layer}_{position}" if feature == "-1" else name
