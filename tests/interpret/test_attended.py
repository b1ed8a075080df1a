"""What heads look at, against transformers; correlations, against plain ones; a world where nothing is true."""

import numpy as np
import planted
import pytest
import torch
from transformers import AutoModelForCausalLM

from saejax.interpret.attended import CLASSES, SHIFTS, HeadShares
from saejax.interpret.firings import Block
from saejax.interpret.text import CodedText
from saejax.models.loading import load_model

LENGTH = 40


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_llama, one_device):
    store = planted.make_store(tmp_path_factory.mktemp("attended") / "store", documents=60)
    lm = load_model(str(tiny_llama), mesh=one_device)
    text = CodedText(store.documents, [*planted.TEXTS[:380], ",", "\n", " ok", "."])
    return store, text, HeadShares(lm, text, 2, 100_000)


def holds_of(ids):
    """Which classes hold of a token and one that it looks at, by loops; [T, S, C]."""
    holds = np.zeros((LENGTH, LENGTH, len(CLASSES)))
    for t in range(LENGTH):
        for s in range(t + 1):
            age = t - s
            holds[t, s] = [age == 0, age == 1, 2 <= age < 8, age >= 8, s == 0, age > 0 and ids[s] == ids[t],
                           age > 0 and s > 0 and ids[s - 1] == ids[t], ids[s] in (380, 381, 383)]  # fmt: skip
    return holds


def test_shares_equal_those_of_transformers(made, tiny_llama):
    store, _, heads = made
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager", dtype=torch.float64)
    train, shares = range(45), []  # the last fourth is held out
    for document in train:
        ids = store.documents[document]
        attentions = model(torch.tensor(ids[None].astype(np.int64)), output_attentions=True).attentions[:2]
        weights_HxTxS = torch.cat([layer[0] for layer in attentions]).detach().numpy()
        of_document = np.einsum("hts,tsc->thc", weights_HxTxS, holds_of(ids))
        shares.append(of_document.reshape(LENGTH, -1)[1:])
    shares = np.concatenate(shares)
    rows = heads._row[np.concatenate([store.documents.starts_N[d] + np.arange(1, LENGTH) for d in train])]
    assert sorted(rows) == list(range(len(shares)))
    spread = shares.std(axis=0)
    expected = np.where(spread > 1e-6, (shares - shares.mean(axis=0)) / np.maximum(spread, 1e-6), 0)
    np.testing.assert_allclose(heads._shares_NxM[rows], expected, atol=2e-3)


def block_of(places, value):
    """Firings of features at places, where their values [places, F] are above 0."""
    row, feature = np.nonzero(value > 0)
    return Block(0, value.shape[1], feature, places[row], value[row, feature].astype(np.float32))


def test_correlations_and_the_bar_equal_plain_ones(made):
    _, _, heads = made
    documents, shares = heads._documents, heads._shares_NxM
    places = np.flatnonzero(heads._row >= 0)
    places = places[np.argsort(heads._row[places])]
    rng = np.random.default_rng(0)
    value = np.maximum(rng.normal(size=(len(places), 5)) - 1, 0)
    value[:, 0] = np.maximum(shares[:, 3] + 0.1 * value[:, 0], 0)  # goes with column 3
    value[30:, 4] = 0  # fires too seldom
    described = heads.of(block_of(places, value))
    assert described[4] is None
    for i in range(4):
        grid = value[:, i].reshape(documents, -1)
        nulls = [np.roll(grid, shift, axis=0).reshape(-1) for shift in range(1, SHIFTS + 1)]
        live = shares.std(axis=0) > 0

        def correlations(f, live=live):
            return np.array([np.corrcoef(f, a)[0, 1] if ok else 0 for a, ok in zip(shares.T, live, strict=True)])

        assert described[i]["bar"] == pytest.approx(max(np.abs(correlations(f)).max() for f in nulls), rel=5e-3)
        own = correlations(value[:, i])
        expected = [r for r in own[np.argsort(-np.abs(own))][:4] if abs(r) > described[i]["bar"]]
        assert [row[-1] for row in described[i]["heads"]] == pytest.approx(expected, rel=1e-2)
    layer, head, which, _ = described[0]["heads"][0]
    assert (layer * heads._heads + head) * len(CLASSES) + CLASSES.index(which) in (3, 4) or described[0]["heads"][0][
        3
    ] > 0.9


def test_features_that_go_with_nothing_are_told_so(made):
    _, _, heads = made
    places = np.flatnonzero(heads._row >= 0)
    value = np.maximum(np.random.default_rng(1).normal(size=(len(places), 600)) - 1.2, 0)
    described = heads.of(block_of(places, value))
    assert np.mean([bool(one["heads"]) for one in described]) < 0.08  # 5 % are expected
