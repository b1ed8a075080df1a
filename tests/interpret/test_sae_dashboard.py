"""Our contexts beside those that SAEDashboard finds for the same dictionary (scripts/dashboard_fixture.py)."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import planted
import pytest

from saejax.activations.documents import COLUMNS, Documents
from saejax.dictionaries import Dictionary, DictionaryConfig

MADE = json.loads((Path(__file__).parent / "sae_dashboard.json").read_text())
EXAMPLES = 8


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """What we say of the dictionary's features, on a store of the same vectors."""
    folder, ids_NxT = tmp_path_factory.mktemp("dashboard"), np.array(MADE["ids"], np.int32)
    count, length = ids_NxT.shape
    values_NxTxD = np.array(MADE["embed"])[ids_NxT] + np.array(MADE["position"])
    padded = np.pad(values_NxTxD, ((0, 0), (0, 0), (0, planted.WIDTH - values_NxTxD.shape[2]))).astype(np.float32)
    table = np.zeros((count, len(COLUMNS)), np.int32)
    table[:, COLUMNS.index("group")] = np.arange(count)
    names = tuple(map(str, range(count)))
    documents = Documents.contiguous(ids_NxT.reshape(-1), np.full(count, length), table, names)
    store = planted.written(folder / "store", documents, padded)
    W_enc_DxF = np.array(MADE["W_enc"])
    W_enc_DxF = np.pad(W_enc_DxF, ((0, planted.WIDTH - len(W_enc_DxF)), (0, 0)))
    fields = dict(kind="standard", site=planted.SITE, d_in=planted.WIDTH, centred=False)
    arrays = dict(W_enc_DxF=W_enc_DxF, W_dec_FxD=W_enc_DxF.T, b_enc_F=MADE["b_enc"], b_dec_D=np.zeros(planted.WIDTH))
    arrays = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    dictionary = Dictionary(DictionaryConfig(n_features=W_enc_DxF.shape[1], **fields), **arrays)
    return planted.describe(folder / "own", store, dictionary, EXAMPLES, draws=1)


def test_firing_rates_and_the_strongest_contexts_are_the_same(records):
    """The tool shows the strongest tokens, we the strongest of each document; order, places and activations."""
    shown, tokens = 0, np.array(MADE["ids"]).size
    for ours, theirs in zip(records, MADE["features"], strict=True):
        density = float(theirs["title"].split("= ")[1].rstrip("%"))
        assert 100 * ours["fires"] / tokens == pytest.approx(density, abs=6e-4)
        first = {context["text"]: context for context in reversed(theirs["top"])}  # a text's strongest
        ranked = [context for context in theirs["top"] if first[context["text"]] is context][:EXAMPLES]
        examples = ours["examples"][: len(ranked)]
        assert [(e["document"], e["position"]) for e in examples] == [(c["text"], c["position"]) for c in ranked]
        for example, context in zip(examples, ranked, strict=True):
            start = example["position"] - example["peak"]
            for step, (piece, act) in enumerate(zip(example["tokens"], example["acts"], strict=True), start):
                if step:  # the tool leaves out the first token
                    assert piece == planted.TEXTS[context["ids"][step - 1]]
                    assert (act or 0.0) == pytest.approx(context["acts"][step - 1], rel=6e-3, abs=1e-4)
        shown += len(ranked)
    assert shown > 40
