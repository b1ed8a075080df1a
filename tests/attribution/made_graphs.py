"""Random graphs."""

import numpy as np

from saejax.attribution.graph import BIAS, ERROR, FEATURE, LOGIT, TOKEN, Graph, Nodes


def make_graph(features=7, layers=2, positions=3, logits=2, seed=0) -> Graph:
    """A random graph; its edges do not follow the order of layers."""
    rng = np.random.default_rng(seed)
    layer_E, position_E = np.divmod(np.arange(layers * positions), positions)
    nodes = Nodes.joined(
        Nodes.of(FEATURE, np.sort(rng.integers(0, layers, features)), 1, np.arange(features), rng.random(features)),
        Nodes.of(ERROR, layer_E, position_E),
        Nodes.of(TOKEN, -1, np.arange(positions), [5, 6, 7]),
        Nodes.of(BIAS, np.arange(layers), 0),
        Nodes.of(LOGIT, layers, positions - 1, [11, 12], [0.6, 0.3]),
    )
    targets = features + logits
    adjacency_TxS = rng.normal(size=(targets, len(nodes) - logits)).astype(np.float32)
    rest = {name: rng.normal(size=targets).astype(np.float32) for name in ("value_T", "constant_T", "unkept_T")}
    return Graph(
        adjacency_TxS=adjacency_TxS,
        nodes=nodes,
        **rest,
        ids_P=np.array([5, 6, 7], np.int32),
        tokens=("a", " b", "ü"),
        logit_K=np.array([3, 1], np.float32),
        labels=(" c", "d"),
        prompt="a b c",
        n_layers=layers,
        model=dict(name="m"),
        transcoders=dict(name="t", n_features=9),
        settings=dict(max_features=None),
    )
