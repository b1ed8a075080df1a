"""The firings on disk, and heatmaps, against the dense activations."""

import json

import numpy as np
import planted
import pytest
from every_kind import KINDS

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.dictionaries.modules import parameter_table
from saejax.errors import Interrupted, UserError
from saejax.interpret import firings, heatmaps
from saejax.interpret.firings import BLOCK, blocks, places_of, priority, record
from saejax.interpret.heatmaps import TokenMaps
from saejax.interpret.text import CodedText
from saejax.parallel.mesh import make_mesh
from saejax.settings import MeshConfig

F = BLOCK + 88


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return planted.make_store(tmp_path_factory.mktemp("store"), documents=20)


def make(kind: str) -> Dictionary:
    numbers = dict(k=7) if kind == "topk" else dict(fires_above=0.4) if kind == "linear" else {}
    numbers |= dict(groups=(200, F)) if kind == "matryoshka" else {}
    config = DictionaryConfig(kind=kind, site=planted.SITE, d_in=planted.WIDTH, n_features=F, **numbers)
    rng = np.random.default_rng(3)
    arrays = {name: 0.2 * rng.normal(size=shape) for name, (shape, _) in parameter_table(config).items()}
    return Dictionary(config, **{name: np.asarray(array, np.float32) for name, array in arrays.items()})


@pytest.mark.parametrize(
    ("kind", "mesh"), [*((kind, MeshConfig(data=2, model=4)) for kind in KINDS), ("topk", MeshConfig(data=8))]
)
def test_firings_are_those_of_the_dense_activations(store, tmp_path, kind, mesh, monkeypatch):
    monkeypatch.setattr(firings, "_MOST", 3000)  # several blocks of a file
    dictionary = make(kind)
    place = record(store, "train", {tmp_path: dictionary}, make_mesh(mesh), 250)
    rows = store.rows("train", planted.SITE)
    f_BxF = dictionary.encode(store.read(planted.SITE, rows))
    fires, size = np.asarray(dictionary.fires(f_BxF)), np.abs(np.asarray(f_BxF))
    where = places_of(store, rows)
    assert place.tolist() == sorted(where.tolist()) and 0 < fires.sum() < fires.size
    found = {}
    for block in blocks(tmp_path, F):
        assert block.counts.sum() == len(block.place) <= max(3000, block.counts.max())
        assert (np.diff(block.feature) >= 0).all()
        keys = zip((block.feature + block.first).tolist(), block.place.tolist(), strict=True)
        found |= dict(zip(keys, block.value.tolist(), strict=True))
        silent = next(p for p in place.tolist() if (block.first, p) not in found)
        assert block.at(np.array([0]), np.array([silent])) == 0
    row, feature = np.nonzero(fires)
    expected = dict(zip(zip(feature.tolist(), where[row].tolist(), strict=True), size[row, feature], strict=True))
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[key] for key in expected], list(expected.values()), rtol=1e-4, atol=1e-6)


def test_stops_when_asked_and_refuses_a_store_without_text(store, tmp_path, one_device):
    with pytest.raises(Interrupted):
        record(store, "train", {tmp_path: make("standard")}, one_device, 64, stopping=lambda: True)
    empty = planted.make_store(tmp_path / "one", documents=2)  # the second of two is not held out
    with pytest.raises(UserError, match="held_out split of .* has no activations"):
        record(empty, "held_out", {tmp_path: make("standard")}, one_device, 64)


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
