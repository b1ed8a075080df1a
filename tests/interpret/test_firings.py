"""The firings on disk, against the dense activations."""

import dataclasses

import jax
import numpy as np
import planted
import pytest
from every_kind import KINDS

from saejax.activations.store import Store
from saejax.activations.writer import write_store
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.dictionaries.modules import parameter_table
from saejax.errors import Interrupted, UserError
from saejax.interpret import firings
from saejax.interpret.firings import BLOCK, blocks, encode_tokens, places_of, record
from saejax.parallel.mesh import by_row, make_mesh
from saejax.parallel.settings import MeshConfig

F = BLOCK + 88
TARGET = "mlp_out.1"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return planted.make_store(tmp_path_factory.mktemp("store"), documents=20)


def make(kind: str) -> Dictionary:
    numbers = dict(k=7) if kind in ("topk", "matching_pursuit") else dict(fires_above=0.4) if kind == "linear" else {}
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


def test_devices_that_do_not_divide_a_batch_share_its_tokens(store, tmp_path, monkeypatch):
    mesh, sizes, place = make_mesh(MeshConfig(data=3), jax.devices()[:3]), [], firings.place_vectors
    monkeypatch.setattr(firings, "place_vectors", lambda mesh, shape: [sizes.append(shape[0]), place(mesh, shape)][1])
    monkeypatch.setattr(firings, "by_row", lambda *args: [sizes.append(len(args[1])), *by_row(*args)][1:])
    record(store, "train", {tmp_path: make("standard")}, mesh, 250)
    dictionary = make("standard").with_sink_norms(lambda site: 5.0).on_mesh(mesh)
    encode_tokens(dictionary, np.ones((7, planted.WIDTH), np.float32), 4)
    assert sizes[-2:] == [6, 6] and set(sizes[:-2]) == {288}


def test_stops_when_asked_and_refuses_a_store_without_text(store, tmp_path, one_device):
    with pytest.raises(Interrupted):
        record(store, "train", {tmp_path: make("standard")}, one_device, 64, stopping=lambda: True)
    empty = planted.make_store(tmp_path / "one", documents=2)  # the second of two is not held out
    with pytest.raises(UserError, match="held_out split of .* has no activations"):
        record(empty, "held_out", {tmp_path: make("standard")}, one_device, 64)


def test_values_in_memory_have_no_firings_at_sinks_nor_below_what_counts():
    dictionary = make("linear").with_sink_norms(lambda site: 5.0)
    x_NxD = np.random.default_rng(0).normal(size=(7, planted.WIDTH)).astype(np.float32)
    x_NxD *= np.array([1, 9, 1, 1, 9, 1, 1])[:, None] / np.linalg.norm(x_NxD, axis=1, keepdims=True)
    found, real_N = encode_tokens(dictionary, x_NxD, 3)
    wanted = np.asarray(dictionary.encode(x_NxD))
    wanted = np.where((np.abs(wanted) > 0.4) & real_N[:, None], wanted, 0)
    assert real_N.tolist() == [True, False, True, True, False, True, True] and wanted[0].any()
    np.testing.assert_allclose(found.toarray(), wanted, atol=1e-5)


def with_target(store, folder):
    """The same store with a target, at which every seventh token is a sink."""
    rows = np.arange(store.manifest.rows)
    values = {name: np.empty((len(rows), planted.WIDTH), np.float32) for name in (planted.SITE, TARGET)}
    for value_NxD in values.values():
        value_NxD[places_of(store, rows)] = store.read(planted.SITE, rows)
    values[TARGET][::7] *= 100
    write_store(folder, store.documents, values, store.model, seed=5)
    return Store.open(folder)


def test_nothing_fires_where_a_transcoders_target_is_a_sink(store, tmp_path, one_device):
    """Features are used where training uses them; without the target only what is read says where that is."""
    both, dictionary = with_target(store, tmp_path / "store"), make("standard")
    transcoder = dictionary.with_config(dataclasses.replace(dictionary.config, target=TARGET))

    def recorded(of, where):
        places = record(where, "train", {tmp_path / "firings": of}, one_device, 256).tolist()
        fired = [place for block in blocks(tmp_path / "firings", F) for place in block.place.tolist()]
        assert fired and {*fired} <= {*places}
        return places

    every = recorded(dictionary, both)
    assert recorded(transcoder, both) == [place for place in every if place % 7] != every
    assert recorded(transcoder, store) == every


def test_values_in_memory_have_no_firings_at_sinks_of_a_target():
    dictionary = make("linear")
    config = dataclasses.replace(dictionary.config, target=TARGET, max_norm=5.0, target_max_norm=5.0)
    x_NxD, y_NxO = np.random.default_rng(0).normal(size=(2, 7, planted.WIDTH)).astype(np.float32)
    x_NxD /= np.linalg.norm(x_NxD, axis=1, keepdims=True)
    y_NxO *= np.array([1, 9, 1, 1, 9, 1, 1])[:, None] / np.linalg.norm(y_NxO, axis=1, keepdims=True)
    found, real_N = encode_tokens(dictionary.with_config(config), x_NxD, 3, y_NxO)
    assert real_N.tolist() == [True, False, True, True, False, True, True]
    assert (np.diff(found.indptr) > 0).tolist() == real_N.tolist()
