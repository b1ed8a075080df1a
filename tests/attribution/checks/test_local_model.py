"""The local model from Python: its two linear directions are transposes, and the library names it."""

from types import SimpleNamespace

import numpy as np
import pytest
from made_transcoders import IDS, made_set

import saejax
from saejax.attribution.local.edits import Circuit
from saejax.attribution.local.model import Vectors
from saejax.attribution.local.prompt_run import prompt_ids
from saejax.errors import UserError


def test_pushing_a_source_up_gives_what_pulling_a_target_down_does(traced):
    """A direction of the stream that enters layer 2 reads the edges of the features below."""
    local, transcoders, readouts, graph = traced
    active = local.active
    below = np.flatnonzero((active.layer_A < 2) & (active.position_A <= 4))
    chosen = below[:: max(len(below) // 8, 1)]
    rows_AxD = [transcoders[layer].W_dec_FxD[...] for layer in active.layer_A[chosen]]
    vector_SxD = np.stack([np.asarray(w_FxD)[f] for w_FxD, f in zip(rows_AxD, active.feature_A[chosen], strict=True)])
    vector_SxD = active.value_A[chosen, None] * vector_SxD
    added = Vectors(np.arange(len(chosen)), active.layer_A[chosen] + 1, active.position_A[chosen], vector_SxD)
    changes = {layer: change for layer, change, _ in local.pushforward(added, len(chosen))}
    found_S = np.einsum("sd,d->s", np.asarray(changes[2])[:, 4], readouts.vector_KxD[3])
    wanted_S = graph.adjacency_RxS[-1, chosen]
    np.testing.assert_allclose(found_S, wanted_S, atol=1e-5 * np.abs(wanted_S).max())
    assert np.abs(wanted_S).max() > 1e-3
    pulled_RxS = local.pullback(readouts.layer_K, readouts.position_K, readouts.vector_KxD, in_stream=True)
    np.testing.assert_allclose(pulled_RxS, graph.adjacency_RxS[-4:], atol=1e-6)


def test_the_library_runs_edits_and_gives_logits(lm):
    local = saejax.LocalModel(lm, made_set(lm), IDS)
    active = local.active
    change = saejax.Change(int(active.layer_A[0]), int(active.position_A[0]), int(active.feature_A[0]), 0.0)
    logits_RxV = saejax.intervene(local, [[], [change]])
    np.testing.assert_allclose(logits_RxV[0], local.logits_V, atol=1e-5)  # 4.4e-6 in a batch
    assert logits_RxV.shape == (2, lm.config.vocab) and np.abs(logits_RxV[1] - local.logits_V).max() > 1e-5
    graph = saejax.trace(lm, local.dictionaries, IDS)
    assert len(graph.prune().nodes) < len(graph.nodes)
    with pytest.raises(UserError, match="freeze is 'all': circuits run freely"):
        circuit = Circuit(np.ones(len(active), bool), np.ones((4, len(IDS)), bool))
        local.run([circuit], "all")


@pytest.mark.parametrize(
    ("text", "ids", "wanted"),
    [
        ("The cat", [2, 5, 6], [2, 5, 6]),
        ("<bos>The cat", [2, 2, 5, 6], [2, 5, 6]),  # the tokenizer puts one before the text's own
        ("The cat", [5, 6], [2, 5, 6]),  # it puts none
        ("<bos>The cat", [2, 5, 6], [2, 5, 6]),
        ("<bos>", [2, 2], [2]),
    ],
)
def test_a_prompt_begins_with_one_bos(text, ids, wanted):
    tokenizer = SimpleNamespace(bos_token_id=2, pad_token_id=0, eos_token_id=1, all_special_ids=[0, 1, 2])
    model = SimpleNamespace(
        tokenizer=tokenizer, tokenize=lambda texts: SimpleNamespace(ids_BxT=np.array([ids], np.int32)),
        config=SimpleNamespace(vocab=10, context=8),
    )  # fmt: skip
    assert prompt_ids(model, text).tolist() == wanted
