"""Parts of graphs run alone: everything kept is the model, also with sinks; what is left out may have its mean."""

import dataclasses
import json

import numpy as np
from made_transcoders import IDS, made_set

from saejax import trace
from saejax.attribution.checks import circuits
from saejax.attribution.checks.circuit_runs import Circuit, mean_activations, run_circuits
from saejax.attribution.checks.circuits import curve
from saejax.attribution.local.replacement import Replacement
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.attribution.trace.targets import read_targets
from saejax.dictionaries import Dictionary
from saejax.models.tokens import Tokens
from saejax.results import to_json


def test_everything_kept_is_the_model_and_parts_are_between(traced):
    replacement, _, readouts, graph = traced
    if (readouts.layer_K != replacement.model.config.n_layers).any():
        readouts = read_targets(replacement, [7], 10, 0.95)
        graph = trace(replacement.model, replacement.dictionaries, IDS, targets=[7])
    found = curve(replacement, graph, readouts, (0.3, 0.8, 1.0))
    np.testing.assert_allclose(found.model, readouts.value_K[0], atol=1e-5)
    assert found.features[0] < found.features[1] < found.features[2]
    assert abs(found.model - found.empty) > 0.01
    every = Circuit(np.ones(len(replacement.active), bool), np.ones((4, len(IDS)), bool))
    np.testing.assert_allclose(
        run_circuits(replacement, [every, every.complement()], readouts)[:, 0], [found.model, found.empty], atol=1e-5
    )


def test_a_curve_that_is_not_defined_is_json(traced, monkeypatch):
    monkeypatch.setattr(circuits, "run_circuits", lambda replacement, rows, *rest: np.ones((len(rows), 1), np.float32))
    replacement, _, readouts, graph = traced
    checked = json.loads(json.dumps(to_json(curve(replacement, graph, readouts, (0.3, 0.8))), allow_nan=False))
    assert checked["faithfulness"] == [None, None] == checked["incompleteness"] and checked["readout"] == [1.0, 1.0]


def test_everything_kept_is_the_model_with_sinks_too(lm):
    """At a sink no feature is used, and all that the MLP adds but the decoder's bias is the error."""
    tokens = Tokens(np.array([IDS], np.int32), np.array([len(IDS)], np.int32))
    made = []
    for transcoder in made_set(lm):
        norm_T = np.linalg.norm(np.asarray(lm(tokens, capture=[transcoder.site]).sites[transcoder.site])[0], axis=-1)
        config = dataclasses.replace(transcoder.config, max_norm=float(np.sort(norm_T[1:])[-2:].mean()))
        made.append(Dictionary(config, **transcoder.arrays))
    replacement = Replacement.of(lm, LayerTranscoders.of(made), np.array(IDS))
    sinks_LxP = np.ones((4, len(IDS)), bool)
    sinks_LxP[replacement.active.layer_A, replacement.active.position_A] = False
    assert (sinks_LxP[:, 1:].sum(axis=1) == 1).all()
    readouts = read_targets(replacement, [7], 10, 0.95)
    every = Circuit(np.ones(len(replacement.active), bool), np.ones((4, len(IDS)), bool))
    kept = run_circuits(replacement, [every], readouts)[0, 0]
    np.testing.assert_allclose(kept, readouts.value_K[0], atol=1e-6)


def test_what_is_left_out_may_have_its_mean_activation(traced, lm):
    import torch

    from saejax.models import source

    replacement, transcoders, _, _ = traced
    readouts = read_targets(replacement, [7], 10, 0.95)
    other = Replacement.of(lm, replacement.dictionaries, np.array(IDS[:2] + [90, 61]))
    means = mean_activations([replacement, other])
    for layer in range(4):
        total_F = np.zeros(48)
        for active in (replacement.active, other.active):
            own = active.layer_A == layer
            np.add.at(total_F, active.feature_A[own], active.value_A[own])
        np.testing.assert_allclose(means[layer], total_F / (len(IDS) - 1 + 3), rtol=1e-6)
    every = Circuit(np.ones(len(replacement.active), bool), np.ones((4, len(IDS)), bool))
    kept, none = run_circuits(replacement, [every, every.complement()], readouts, means)[:, 0]
    np.testing.assert_allclose(kept, readouts.value_K[0], atol=1e-5)
    assert abs(none - run_circuits(replacement, [every.complement()], readouts)[0, 0]) > 1e-3
    graph = trace(lm, replacement.dictionaries, IDS, targets=[7])
    found = curve(replacement, graph, readouts, (1.0,), means)
    np.testing.assert_allclose([found.model, found.empty], [kept, none], atol=1e-5)
    # In torch: of each MLP, the means of the features that are active in the prompt, the bias and the skip path.
    model, active = source.load_torch_model(lm.source, "float32").double(), replacement.active
    for layer, block in enumerate(model.model.layers):

        def write(module, inputs, output, layer=layer):
            acts_TxF, own = np.zeros((len(IDS), 48), np.float32), active.layer_A == layer
            acts_TxF[active.position_A[own], active.feature_A[own]] = means[layer][active.feature_A[own]]
            read_TxD = inputs[0][0].numpy().astype(np.float32)
            written_TxD = torch.from_numpy(np.array(transcoders[layer].decode(acts_TxF, read_TxD))).double()
            return torch.cat([output[:, :1], written_TxD[None, 1:]], dim=1)

        block.mlp.register_forward_hook(write)
    with torch.no_grad():
        logits_V = model(torch.tensor([IDS])).logits[0, -1]
    np.testing.assert_allclose(none, float(logits_V[7] - logits_V.mean()), atol=2e-5)
