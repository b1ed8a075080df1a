"""Graphs of tiny models against an explicit Jacobian in float64, and the sums of their rows."""

import numpy as np
import pytest
from dense_reference import Dense
from graph_checks import double
from made_graphs import IDS, make_cross_layer, make_transcoders
from torch_sites import relative_error

from saejax.attribution.graph.data import ERROR, FEATURE, LOGIT, TOKEN
from saejax.attribution.local.dictionaries import LayerTranscoders
from saejax.attribution.trace.prompt import trace_prompt

CASES = [  # family, kind, whether there is a skip path, what is read, whether the set is cross-layer
    ("llama", "jumprelu", True, "mlp_in", False),
    ("qwen3", "topk", False, "mlp_in", False),
    ("gemma2", "jumprelu", False, "mlp_normed", False),
    ("gpt_neox", "standard", True, "mlp_in", False),
    ("llama", "standard", True, "mlp_in", True),
    ("qwen3", "jumprelu", False, "resid_mid", True),
    *(
        pytest.param(*case, marks=pytest.mark.slow)  # each part of them is in a case above
        for case in (
            ("llama", "standard", False, "mlp_in", False),
            ("qwen3", "standard", True, "mlp_in", False),
            ("gemma2", "standard", True, "mlp_normed", False),
            ("gpt2", "jumprelu", False, "mlp_in", False),
            ("phi", "standard", False, "mlp_in", False),
            ("gemma2", "jumprelu", False, "mlp_normed", True),
            ("gpt2", "standard", False, "resid_mid", True),
        )
    ),
]


@pytest.mark.parametrize("family,kind,skip,reads,cross_layer", CASES)
def test_rows_are_those_of_an_explicit_jacobian(family, kind, skip, reads, cross_layer, tiny_model):
    lm = tiny_model(family)
    if cross_layer:
        transcoders, made, writes = make_cross_layer(lm.config, kind, skip, reads)
    else:
        made, writes = make_transcoders(lm.config, kind, skip), None
        transcoders = LayerTranscoders("made", [t.config for t in made], made.__getitem__, reads=reads)
    graph, local, readouts = trace_prompt(lm, transcoders, IDS, max_logits=5)
    dense = Dense(lm.source.folder, made, IDS, reads == "mlp_normed", writes, reads == "resid_mid")
    nodes, features = graph.nodes, graph.count(FEATURE)
    place_Fx3 = np.stack([nodes.layer_N, nodes.position_N, nodes.index_N], axis=1)[:features]
    assert features > 20 and np.array_equal(place_Fx3, dense.active)
    assert relative_error(nodes.value_N[:features], [dense.acts[l][t, f] for l, t, f in place_Fx3]) < 1e-5
    columns = np.isin(nodes.kind_N[: graph.adjacency_RxS.shape[1]], (FEATURE, ERROR, TOKEN))
    rows_TxS = graph.adjacency_RxS[:, columns]
    sample = np.random.default_rng(0).permutation(features)[:40]
    wanted = np.stack([dense.feature_row(*place_Fx3[i]) for i in sample])
    outputs = nodes.index_N[graph.slice_of(LOGIT)]
    logits = np.stack([dense.logit_row(token) for token in outputs])
    errors = relative_error(rows_TxS[sample], wanted), relative_error(rows_TxS[features:], logits)
    # With bias nodes the sum of a row is the target's value, at every depth.
    left_T, value_T, layer_T = np.abs(graph.unexplained_R), np.abs(graph.value_R), nodes.layer_N[graph.target_R]
    sums = [left_T[layer_T == layer].max() / value_T[layer_T == layer].max() for layer in np.unique(layer_T)]
    print(family, kind, skip, "rows {:.1e}, logits {:.1e}".format(*errors), f"sums {max(sums):.1e}")
    assert max(errors) < 1e-5 and max(sums) < 1e-5
    assert relative_error(graph.logit_K, dense.logits_V.detach()[outputs].numpy()) < 1e-5
    assert bool(graph.transcoders.get("cross_layer")) == cross_layer
    # Raised with all held, a feature does what its edges say.
    if cross_layer or (family, skip) in (("gemma2", False), ("gpt_neox", True)):
        assert double(local, graph, readouts, 8).results.held_error < 1e-5
