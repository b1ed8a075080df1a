"""Heatmaps against dense activations, cosines between layers against numpy, and what layers are compared."""

import json

import numpy as np
import planted
import pytest

from saejax.dictionaries.results import TrainedMember
from saejax.interpret import heatmaps
from saejax.interpret.describe import priority
from saejax.interpret.firings import blocks, record
from saejax.interpret.heatmaps import TokenMaps, across_layers, layers_bar
from saejax.interpret.run import other_layers
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
    rows = store.rows("train", planted.SITE)
    document, position, _ = store.tokens(rows)
    f = np.maximum(np.asarray(dictionary.encode(store.read(planted.SITE, rows)), np.float64), 0)
    mean = f.sum(0) / len(place)
    train = np.unique(document)
    wanted = sorted(train.tolist(), key=lambda d: -int(priority(np.array([d]))[0]))[:documents]
    assert [one["document"] for one in made] == wanted
    for one in made:
        assert one["tokens"] == [planted.TEXTS[i] for i in store.documents[one["document"]][:24]]
        start = store.documents.starts_N[one["document"]]
        known = np.isin(start + np.arange(24), place)
        acts = np.zeros((FEATURES, 24))
        for d, p, values in zip(document, position, f, strict=True):
            if d == one["document"] and p < 24:
                acts[:, p] = values
        excess = (acts.sum(1) - known.sum() * mean) * length_F
        best = [i for i in np.argsort(-excess)[:6].tolist() if excess[i] > 0]
        assert one["features"] == best and best
        for feature, row in zip(best, one["acts"], strict=True):
            assert [value is None for value in row] == (~known).tolist()
            there = [value for value in row if value is not None]
            np.testing.assert_allclose(there, acts[feature][known], rtol=6e-3, atol=1e-5)


def test_cosines_between_layers():
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(300, 20)), rng.normal(size=(77, 20))
    one[5] = 0
    two[9] = 3 * one[280]
    unit = [W / np.maximum(np.linalg.norm(W, axis=1, keepdims=True), 1e-30) for W in (one, two)]
    cosine = unit[0] @ unit[1].T
    ids, found = across_layers(one.astype(np.float32), two.astype(np.float32))
    np.testing.assert_allclose(found, cosine.max(1), atol=1e-6)
    np.testing.assert_allclose(cosine[np.arange(300), ids], cosine.max(1), atol=1e-6)
    assert ids[280] == 9 and found[280] == pytest.approx(1) and found[5] == 0


def test_the_bar_is_what_random_directions_stay_below():
    rng = np.random.default_rng(1)
    W = rng.normal(size=(400, 50, 16))  # draws of 50 directions
    largest = (W[:, :, 0] / np.linalg.norm(W, axis=2)).max(1)
    assert layers_bar(50, 16) == pytest.approx(np.quantile(largest, 0.95), abs=0.03)
    assert layers_bar(50, 16, 0.5) == pytest.approx(np.quantile(largest, 0.5), abs=0.03)
    assert layers_bar(4608, 576) < layers_bar(131_072, 576) < 0.3 and layers_bar(3, 1) == 1


def member(name, site, target=""):
    return TrainedMember(name, site, target or site, {}, 1.0, 1.0, 0.0, {})


def test_layers_that_are_compared_are_alike_but_for_the_layer():
    stack = [
        *(member(f"resid_post.{layer}-k{k}", f"resid_post.{layer}") for layer in (10, 2, 5) for k in (4, 8)),
        member("mlp_out.2-k8", "mlp_out.2"),
    ]
    assert list(other_layers(stack[1], stack).items()) == [
        ("resid_post.2", "resid_post.2-k8"),
        ("resid_post.5", "resid_post.5-k8"),
    ]
    assert other_layers(stack[-1], stack) == {}
    inside = [member("a.1", "mlp_in.1"), member("a.2", "mlp_in.2")]
    assert other_layers(inside[0], inside) == {}  # they do not write into the stream
    transcoders = [member(f"mlp_in.{layer}", f"mlp_in.{layer}", f"mlp_out.{layer}") for layer in (1, 2)]
    assert other_layers(transcoders[0], transcoders) == {"mlp_in.2": "mlp_in.2"}
    assert other_layers(member("", "resid_post.1"), [member("", "resid_post.1")]) == {}
