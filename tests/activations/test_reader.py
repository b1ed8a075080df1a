"""Stored activations as float arrays, whatever the dtype on disk."""

import numpy as np
import pytest

import saejax
from saejax.activations.documents import COLUMNS, Documents
from saejax.activations.manifest import CapturedModel
from saejax.activations.store import DTYPES
from saejax.activations.writer import write_store
from saejax.errors import UserError

SITES = dict(zip(("resid_post.0", "mlp_in.1"), (5, 3), strict=True))
TEXTS = [np.array(ids, np.int32) for ids in ([0, 4, 7], [0, 7], [0, 9, 4, 4])]


@pytest.fixture(params=["float32", "bfloat16", "int8"])
def stored(request, tmp_path):
    """A store, and the values in the order of the texts."""
    rng, tokens = np.random.default_rng(0), sum(map(len, TEXTS))
    values = {site: rng.normal(size=(tokens, d)).astype(np.float32) for site, d in SITES.items()}
    table_Nx4 = np.zeros((len(TEXTS), len(COLUMNS)), np.int32)
    lengths = np.array([len(text) for text in TEXTS])
    documents = Documents.contiguous(np.concatenate(TEXTS), lengths, table_Nx4, ("text",))
    model = CapturedModel("tiny", "", "f" * 16, "float32")
    in_dtype = {site: value_NxD.astype(DTYPES[request.param]) for site, value_NxD in values.items()}
    write_store(tmp_path, documents, in_dtype, model, bos=True, dtype=request.param)
    return saejax.open_store(tmp_path), values


def test_values_by_rows_and_tokens(stored):
    store, values = stored
    assert list(store) == list(SITES) and len(store) == 2 and "mlp_in.1" in repr(store)
    rows = store.rows()  # by document and position: the order of the texts
    np.testing.assert_array_equal(store.token_N[rows], np.concatenate(TEXTS))
    np.testing.assert_array_equal(store.position_N[rows], [0, 1, 2, 0, 1, 0, 1, 2, 3])
    for site, expected_NxD in values.items():
        at_site = store[site]
        assert at_site.shape == (9, SITES[site]) and at_site[rows].dtype == np.float32 and len(repr(at_site)) < 100
        # bfloat16 has 8 bits; of int8 the largest value of a row, which is below 4 here, has 127 steps.
        tolerance = 2 / 127 if store.store.manifest.dtype == "int8" else 0
        np.testing.assert_allclose(at_site[rows], expected_NxD, rtol=4e-3, atol=tolerance)
        whole_NxD = np.asarray(at_site)
        for index in (slice(2, 5), 3, -1, [4, 1], store.token_N == 4, np.array([[0, 1], [2, 3]]), (slice(3), 1)):
            np.testing.assert_array_equal(at_site[index], whole_NxD[index])
        assert len(list(at_site)) == 9
    np.testing.assert_array_equal(store.token_N[store.rows(tokens=4)], [4, 4, 4])
    np.testing.assert_array_equal(store.token_N[store.rows(documents=[0, 2], tokens=[0, 7])], [0, 7, 0])
    assert len(store.rows(split="train", without_sinks="mlp_in.1")) == 9 and not len(store.rows(split="held_out"))


def test_values_in_8_bits(tmp_path):
    """Errors are within half a step of a row's range; norms, sinks and mean are those of the values that are read."""
    rng, lengths = np.random.default_rng(1), np.full(30, 40)
    table_Nx4 = np.zeros((len(lengths), len(COLUMNS)), np.int32)
    documents = Documents.contiguous(rng.integers(0, 9, lengths.sum()).astype(np.int32), lengths, table_Nx4, ("text",))
    value_TxD = rng.normal(size=(lengths.sum(), 16)).astype(np.float32)
    value_TxD[:, 3] += 60  # large in every row
    value_TxD[documents.starts_N] *= 100  # attention sinks
    value_TxD = value_TxD.astype(DTYPES["int8"])
    write_store(tmp_path, documents, dict(s=value_TxD), CapturedModel("m", "", "1"), dtype="int8", shard_rows=500)
    stored = saejax.open_store(tmp_path)
    store, rows = stored.store, stored.rows()
    read_TxD, exact_TxD = stored["s"][rows], value_TxD.astype(np.float64)
    usual_T = np.isin(rows, store.rows("train", "s"))
    assert (~usual_T).sum() == len(lengths) and (tmp_path / "s/shard-00000.npy").stat().st_size < 500 * 17 + 200
    half_step = (np.abs(exact_TxD - exact_TxD[usual_T].mean(0)).max(1) + 1) / 254
    assert (np.abs(read_TxD - exact_TxD) <= half_step[:, None] + np.abs(exact_TxD) / 256).all()
    np.testing.assert_allclose(np.delete(read_TxD, 3, 1)[usual_T].std(), 1, atol=0.02)
    np.testing.assert_allclose(store.norms("s", rows), np.linalg.norm(read_TxD, axis=1), rtol=1e-6)
    np.testing.assert_allclose(store.mean("s"), read_TxD[usual_T].mean(0, dtype=np.float64), rtol=1e-9, atol=1e-9)
    store.verify()


def test_what_is_not_there(stored, tmp_path):
    store, _ = stored
    with pytest.raises(UserError, match="unknown site in this store 'resid_post.9': expected one of resid_post.0"):
        store["resid_post.9"]
    with pytest.raises(IndexError, match="there are rows 0 to 8"):
        store["mlp_in.1"][9]
    with pytest.raises(UserError, match="none"):
        saejax.open_store(tmp_path / "none")
    with pytest.raises(UserError, match="folder is a int"):
        saejax.open_store(3)
