"""Heatmaps against dense activations."""

import json

import numpy as np
import planted
import pytest

from saejax.interpret import heatmaps
from saejax.interpret.firings import blocks, priority, record
from saejax.interpret.heatmaps import TokenMaps
from saejax.interpret.text import CodedText
from saejax.parallel.mesh import make_mesh

FEATURES = 30


@pytest.mark.parametrize("documents", [3, 0])
def test_features_by_tokens(tmp_path, monkeypatch, documents):
    monkeypatch.setattr(heatmaps, "TOKENS", 24)
    monkeypatch.setattr(heatmaps, "SHOWN", 6)
    store, dictionary = planted.make_store(tmp_path / "store", documents=40), planted.dictionary(FEATURES)
    place = record(store, "train", {tmp_path / "own": dictionary}, make_mesh(), 500)
    place = np.delete(place, np.arange(7, len(place), 50))  # as if these were sinks
    text = CodedText(store.documents, planted.TEXTS)
    maps = TokenMaps(text, place, documents)
    for block in blocks(tmp_path / "own", FEATURES):
        maps.add(block)
    length_F = np.linspace(1, 2, FEATURES)
    made = maps.maps(length_F)
    json.dumps(made, allow_nan=False)
    dense = planted.Dense(store, dictionary)
    mean, train = dense.f.sum(0) / len(place), np.unique(dense.document)
    wanted = sorted(train.tolist(), key=lambda d: -int(priority(np.array([d]))[0]))[:documents]
    assert [one["document"] for one in made] == wanted
    for one in made:
        assert one["tokens"] == [planted.TEXTS[i] for i in store.documents[one["document"]][:24]]
        start = store.documents.starts_N[one["document"]]
        scored = np.isin(start + np.arange(24), place)
        acts = np.zeros((FEATURES, 24))
        here = (dense.document == one["document"]) & (dense.position < 24)
        acts[:, dense.position[here]] = dense.f[here].T
        excess = (acts.sum(1) - scored.sum() * mean) * length_F
        best = [i for i in np.argsort(-excess)[:6].tolist() if excess[i] > 0]
        assert one["features"] == best and best
        for feature, row in zip(best, one["acts"], strict=True):
            assert [value is None for value in row] == (~scored).tolist()
            there = [value for value in row if value is not None]
            np.testing.assert_allclose(there, acts[feature][scored], rtol=6e-3, atol=1e-5)
