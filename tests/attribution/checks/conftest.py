"""A prompt of a tiny Llama with transcoders of three kinds, traced once for each file of tests."""

import numpy as np
import pytest
from made_transcoders import IDS, made_set

from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.attribution.trace.prompt import trace_prompt
from saejax.attribution.trace.targets import Direction


@pytest.fixture(scope="module", params=["standard", "topk", "skip"])
def traced(lm, request):
    """A replacement model, its transcoders, its readouts (two logits, a difference, a direction), and the graph."""
    skip = request.param == "skip"
    transcoders = made_set(lm, kind="jumprelu" if skip else request.param, skip=skip)
    targets = [7, 9, (7, 11), Direction(np.eye(lm.config.d_model)[3], layer=2, position=4)]
    graph, local, readouts = trace_prompt(lm, LayerTranscoders.of(transcoders), IDS, targets=targets)
    return local, transcoders, readouts, graph
