"""Graphs of tiny models equal those that circuit-tracer makes of them here, from sets that we write."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from made_graphs import IDS, load_tiny, make_cross_layer, make_transcoders
from reference_graphs import assert_same_graph

from benchmarks.tool_environments import circuit_tracer_python
from saejax import save_transcoders, trace
from saejax.attribution.graph.nodes import TOKEN
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
    # What GPT-2 adds for a position is part of the token's node here, and has none there.
    first_token = int(np.flatnonzero(graph.nodes.kind_N == TOKEN)[0])
    assert_same_graph(graph, judged, lm.config.n_layers, first_token if family == "gpt2" else None)
