"""Graphs of tiny models against an explicit Jacobian in float64, and the sums of their rows."""

import numpy as np
import pytest
from dense_reference import Dense
from made_graphs import load_tiny, make_transcoders

from saejax import trace
from saejax.attribution.graph.nodes import ERROR, FEATURE, LOGIT, TOKEN
from saejax.attribution.local.edits import Change
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.attribution.trace.prompt import trace_prompt

IDS = [0, 17, 230, 5, 42, 99, 7]
CASES = [
    ("llama", "standard", False),
    ("llama", "jumprelu", True),
    ("qwen3", "topk", False),
    ("qwen3", "standard", True),
    ("gemma2", "jumprelu", False),
    ("gemma2", "standard", True),
    ("gpt_neox", "standard", True),
    pytest.param("gpt2", "jumprelu", False, marks=pytest.mark.slow),
    pytest.param("phi", "standard", False, marks=pytest.mark.slow),
]


def relative(a, b) -> float:
    return float(np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max())


@pytest.mark.parametrize("family,kind,skip", CASES)
def test_rows_are_those_of_an_explicit_jacobian(family, kind, skip, tmp_path, one_device):
    lm, normed = load_tiny(tmp_path, family, one_device), family == "gemma2"
    made = make_transcoders(lm.config, kind, skip)
    transcoders = LayerTranscoders(
        "made", [t.config for t in made], made.__getitem__, reads="mlp_normed" if normed else "mlp_in"
    )
    graph = trace(lm, transcoders, IDS, max_logits=5)
    dense = Dense(tmp_path, made, IDS, normed)
    nodes, features = graph.nodes, graph.count(FEATURE)
    found = np.stack([nodes.layer_N, nodes.position_N, nodes.index_N], axis=1)[:features]
    assert features > 20 and np.array_equal(found, dense.active)
    assert relative(nodes.value_N[:features], [dense.acts[l][t, f] for l, t, f in found]) < 1e-5
    columns = np.isin(nodes.kind_N[: graph.adjacency_RxS.shape[1]], (FEATURE, ERROR, TOKEN))
    rows_TxS = graph.adjacency_RxS[:, columns]
    sample = np.random.default_rng(0).permutation(features)[:40]
    wanted = np.stack([dense.feature_row(*found[i]) for i in sample])
    logits = np.stack([dense.logit_row(token) for token in nodes.index_N[graph.slice_of(LOGIT)]])
    errors = relative(rows_TxS[sample], wanted), relative(rows_TxS[features:], logits)
    # With bias nodes the sum of a row is the target's value, at every depth.
    left_T, layer_T = np.abs(graph.unexplained_R), nodes.layer_N[graph.target_R]
    sums = [
        left_T[layer_T == layer].max() / np.abs(graph.value_R[layer_T == layer]).max() for layer in np.unique(layer_T)
    ]
    print(family, kind, skip, "rows {:.1e}, logits {:.1e}".format(*errors), f"sums {max(sums):.1e}")
    assert max(errors) < 1e-5 and max(sums) < 1e-5
    assert relative(graph.logit_K, dense.logits_V.detach()[nodes.index_N[graph.slice_of(LOGIT)]].numpy()) < 1e-5


@pytest.mark.parametrize("family,skip", [("llama", True), ("gemma2", False), ("gpt_neox", True)])
def test_doubling_a_feature_adds_its_column(family, skip, tmp_path, one_device):
    lm = load_tiny(tmp_path, family, one_device)
    made = make_transcoders(lm.config, "standard", skip)
    transcoders = LayerTranscoders(
        "made", [t.config for t in made], made.__getitem__, reads="mlp_normed" if family == "gemma2" else "mlp_in"
    )
    graph, local, readouts = trace_prompt(lm, transcoders, IDS, max_logits=5)
    nodes, features = graph.nodes, graph.count(FEATURE)
    doubled = np.random.default_rng(1).permutation(features)[:8]
    rows = [
        [Change(*(int(a[i]) for a in (nodes.layer_N, nodes.position_N, nodes.index_N)), 2 * float(nodes.value_N[i]))]
        for i in doubled
    ]
    changed = local.run(rows, "all", readouts=readouts, features=np.arange(features))
    moved_RxT = np.concatenate([changed.feature_RxJ, changed.readout_RxK], axis=1) - graph.value_R[None]
    error = relative(moved_RxT, graph.adjacency_RxS[:, doubled].T)
    print(family, skip, f"{error:.1e}")
    assert error < 1e-5
