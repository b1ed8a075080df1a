"""Heatmaps against dense activations."""

import json

import numpy as np
import planted
import pytest

from saejax.activations.documents import Documents
from saejax.interpret import heatmaps
from saejax.interpret.firings import Block, blocks, priority, record
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


def test_a_character_of_several_tokens_is_one_column():
    """Three bytes spell a sign: the first is a sink, and the second excites the feature most."""
    pieces = ["a", *(chr(0xDC00 + byte) for byte in "我".encode()), "b"]
    ids_T = np.arange(10, dtype=np.int32) % 5
    documents = Documents.contiguous(ids_T, [5, 5], np.zeros((2, 4), np.int32), ["text"])
    maps = TokenMaps(CodedText(documents, pieces), np.delete(np.arange(10), 1), 2)
    maps.add(Block(0, 1, np.array([0, 0]), np.array([2, 3]), np.array([2.0, 1.0], np.float32)))
    made = {one["document"]: one for one in maps.maps(np.ones(1))}
    assert made[0]["tokens"] == made[1]["tokens"] == ["a", "我", "b"]
    assert made[0]["acts"] == [[0.0, 2.0, 0.0]] and made[1]["acts"] == []
