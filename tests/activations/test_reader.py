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


@pytest.fixture(params=["float32", "bfloat16"])
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
        np.testing.assert_allclose(at_site[rows], expected_NxD, rtol=4e-3)  # of bfloat16
        whole_NxD = np.asarray(at_site)
        for index in (slice(2, 5), 3, -1, [4, 1], store.token_N == 4, np.array([[0, 1], [2, 3]]), (slice(3), 1)):
            np.testing.assert_array_equal(at_site[index], whole_NxD[index])
        assert len(list(at_site)) == 9
    np.testing.assert_array_equal(store.token_N[store.rows(tokens=4)], [4, 4, 4])
    np.testing.assert_array_equal(store.token_N[store.rows(documents=[0, 2], tokens=[0, 7])], [0, 7, 0])
    assert len(store.rows(split="train", without_sinks="mlp_in.1")) == 9 and not len(store.rows(split="held_out"))


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
