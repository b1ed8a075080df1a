"""Graphs of tiny models equal those that circuit-tracer makes of them here, from sets that we write."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from made_graphs import IDS, load_tiny, make_cross_layer, make_transcoders
from reference_graphs import adjacency_of, nodes_of
from torch_sites import relative_error

from benchmarks.tool_environments import circuit_tracer_python
from saejax import save_transcoders, trace
from saejax.attribution.graph.nodes import BIAS, FIRST_MLP, TOKEN
from saejax.dictionaries.formats import circuit_tracer

JUDGE = Path(__file__).parents[1] / "circuit_tracer_judge.py"
CASES = [
    ("llama", "standard", False, False),
    ("qwen3", "jumprelu", True, False),
    ("qwen2", "standard", True, False),
    ("gpt2", "standard", True, False),
    ("llama", "jumprelu", False, True),
]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family,kind,skip,cross_layer", CASES)
def test_a_graph_is_that_of_circuit_tracer(family, kind, skip, cross_layer, tmp_path, one_device):
    model, folder, out = (tmp_path / name for name in ("model", "set", "judged.npz"))
    lm = load_tiny(model, family, one_device)
    if cross_layer:
        _, made, writes = make_cross_layer(lm.config, kind, skip, "resid_mid")
        circuit_tracer.save_cross_layer(folder, len(made), lambda layer: (made[layer], writes[layer]))
    else:
        save_transcoders(folder, make_transcoders(lm.config, kind, skip))
    ids = ",".join(map(str, IDS))
    command = [circuit_tracer_python(), "-W", "ignore", str(JUDGE), str(model), str(folder), str(out), ids]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    judged = np.load(out)
    graph = trace(lm, folder, IDS, max_logits=3, logit_mass=1.0)
    ours, wanted = graph.nodes[~np.isin(graph.nodes.kind_N, (FIRST_MLP, BIAS))], nodes_of(judged, lm.config.n_layers)
    for name in ("kind_N", "layer_N", "position_N", "index_N"):
        assert np.array_equal(getattr(ours, name), getattr(wanted, name)), name
    adjacency_RxS = adjacency_of(judged, lm.config.n_layers)
    if family == "gpt2":  # what it adds for a position is part of the token's node here, and has none there
        adjacency_RxS = adjacency_RxS[:, : np.flatnonzero(wanted.kind_N == TOKEN)[0]]
    assert relative_error(graph.adjacency_RxS[:, : adjacency_RxS.shape[1]], adjacency_RxS) < 1e-5
    assert relative_error(ours.value_N, wanted.value_N) < 1e-5
