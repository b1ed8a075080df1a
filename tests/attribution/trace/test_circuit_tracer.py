"""Graphs of tiny models equal those that circuit-tracer makes of them here, from sets that we write."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from made_graphs import IDS, load_tiny, make_cross_layer, make_transcoders
from reference_graphs import assert_same_graph

from benchmarks.tool_environments import circuit_tracer_python
from saejax import save_transcoders, trace
from saejax.attribution.graph.data import TOKEN
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


def trace_twice(family, kind, skip, cross_layer, folder, mesh):
    """Our graph of a prompt and circuit-tracer's arrays, the number of layers, and how many columns are comparable."""
    model, transcoders, out = (folder / name for name in ("model", "set", "judged.npz"))
    lm = load_tiny(model, family, mesh)
    if cross_layer:
        _, made, writes = make_cross_layer(lm.config, kind, skip, "resid_mid")
        circuit_tracer.save_cross_layer(transcoders, len(made), lambda layer: (made[layer], writes[layer]))
    else:
        save_transcoders(transcoders, make_transcoders(lm.config, kind, skip))
    ids = ",".join(map(str, IDS))
    command = [circuit_tracer_python(), "-W", "ignore", str(JUDGE), str(model), str(transcoders), str(out), ids]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    graph = trace(lm, transcoders, IDS, max_logits=3, logit_mass=1.0)
    # What GPT-2 adds for a position is part of the token's node here, and has none there.
    first_token = int(np.flatnonzero(graph.nodes.kind_N == TOKEN)[0])
    return graph, np.load(out), lm.config.n_layers, first_token if family == "gpt2" else None


@pytest.mark.parametrize("family,kind,skip,cross_layer", CASES)
def test_a_graph_is_that_of_circuit_tracer(family, kind, skip, cross_layer, tmp_path, one_device):
    assert_same_graph(*trace_twice(family, kind, skip, cross_layer, tmp_path, one_device))
