"""Parts of graphs run alone: everything kept is the model, also with sinks."""

import dataclasses
import json

import numpy as np
from made_transcoders import IDS, made_set

from saejax import trace
from saejax.attribution.checks.circuits import faithfulness_curve
from saejax.attribution.local.edits import Circuit
from saejax.attribution.local.model import LocalModel, LocalRun
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.attribution.trace.targets import read_targets
from saejax.dictionaries import Dictionary
from saejax.models.tokens import Tokens
from saejax.results import to_json


def test_everything_kept_is_the_model_and_parts_are_between(traced):
    local, _, readouts, graph = traced
    if (readouts.layer_K != local.model.config.n_layers).any():
        readouts = read_targets(local, [7], 10, 0.95)
        graph = trace(local.model, local.dictionaries, IDS, targets=[7])
    found = faithfulness_curve(local, graph, readouts, (0.3, 0.8, 1.0))
    np.testing.assert_allclose(found.model, readouts.value_K[0], atol=1e-5)
    assert found.features[0] < found.features[1] < found.features[2]
    assert abs(found.model - found.empty) > 0.01
    every = Circuit(np.ones(len(local.active), bool), np.ones((4, len(IDS)), bool))
    np.testing.assert_allclose(
        local.run([every, every.complement()], readouts=readouts).readout_RxK[:, 0],
        [found.model, found.empty],
        atol=1e-5,
    )


def test_a_curve_that_is_not_defined_is_json(traced, monkeypatch):
    local, _, readouts, graph = traced
    readouts = read_targets(local, [7], 10, 0.95)
    flat = lambda self, rows, **rest: LocalRun(None, np.ones((len(rows), 1), np.float32))  # noqa: E731
    monkeypatch.setattr(LocalModel, "run", flat)
    checked = json.loads(json.dumps(to_json(faithfulness_curve(local, graph, readouts, (0.3, 0.8))), allow_nan=False))
    assert checked["faithfulness"] == [None, None] == checked["incompleteness"] and checked["readout"] == [1.0, 1.0]


def test_everything_kept_is_the_model_with_sinks_too(lm):
    """At a sink no feature is used, and all that the MLP adds but the decoder's bias is the error."""
    tokens = Tokens(np.array([IDS], np.int32), np.array([len(IDS)], np.int32))
    made = []
    for transcoder in made_set(lm):
        norm_T = np.linalg.norm(np.asarray(lm(tokens, capture=[transcoder.site]).sites[transcoder.site])[0], axis=-1)
        config = dataclasses.replace(transcoder.config, max_norm=float(np.sort(norm_T[1:])[-2:].mean()))
        made.append(Dictionary(config, **transcoder.arrays))
    local = LocalModel(lm, LayerTranscoders.of(made), np.array(IDS))
    sinks_LxP = np.ones((4, len(IDS)), bool)
    sinks_LxP[local.active.layer_A, local.active.position_A] = False
    assert (sinks_LxP[:, 1:].sum(axis=1) == 1).all()
    readouts = read_targets(local, [7], 10, 0.95)
    every = Circuit(np.ones(len(local.active), bool), np.ones((4, len(IDS)), bool))
    kept = local.run([every], readouts=readouts).readout_RxK[0, 0]
    np.testing.assert_allclose(kept, readouts.value_K[0], atol=1e-6)
