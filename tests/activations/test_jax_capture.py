"""The JAX backend makes the store that the torch backend makes, on any mesh, however often it is interrupted."""

import jax
import numpy as np
import pytest
from tiny_models import save_tiny, save_tiny_tokenizer
from torch_sites import relative_error

from saejax import load_model
from saejax.activations import jax_capture
from saejax.activations.jax_capture import DecoderReader
from saejax.activations.plan import Plan
from saejax.activations.store import DTYPES
from saejax.files import read_json
from saejax.models import source
from saejax.models.families import read_config
from saejax.models.settings import ModelConfig
from saejax.models.sites import Site
from saejax.models.tokens import pad
from saejax.parallel.settings import MeshConfig


def assert_same_store(found, expected, tolerance=1e-5):
    """Same tokens in the same rows, same documents, values equal within rounding."""
    assert found.sites == expected.sites
    rows = np.arange(expected.manifest.rows)
    assert found.manifest.rows == len(rows)
    for a, b in zip(found.tokens(rows), expected.tokens(rows), strict=True):
        assert np.array_equal(a, b)
    for name, array in expected.documents.arrays().items():
        assert np.array_equal(found.documents.arrays()[name], array), name
    for site in expected.sites:
        assert relative_error(found.read(site, rows), expected.read(site, rows)) < tolerance, site
        assert relative_error(found.norms(site, rows), expected.norms(site, rows)) < tolerance, site


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(last=5, sites=("mlp_in.3", "resid_pre.1", "attn_out.0")),
        dict(shard_rows=37, batch_tokens=1, sites=("mlp_out.1", "resid_post.1")),
    ],
    ids=["every site", "last positions", "many shards, one by one"],
)
def test_both_backends_make_the_same_store(setup, on_one_device, options):
    (expected, by_torch), (found, by_jax) = (setup.capture(name, backend=name, **options) for name in ("torch", "jax"))
    assert_same_store(found, expected)
    assert min(by_torch.tokens_per_second, by_jax.tokens_per_second) > 0
    assert (by_torch.documents, by_torch.tokens) == (by_jax.documents, by_jax.tokens)


@pytest.mark.parametrize(
    ("mesh", "rows"),
    [
        pytest.param(dict(), 90, marks=pytest.mark.slow),  # documents on one axis alone
        (dict(data=2, model=4), 110),
        (dict(member=4, data=2), 90),
    ],
    ids=str,
)
def test_a_mesh_of_eight_devices_gives_the_same_rows(setup, monkeypatch, mesh, rows):
    """Rows that only fill up a batch's shape, and the tokens up to its length, run like all others: as padding."""
    real, ran, shares, kept, pad_batch, read_sites = [], [], [], [], DecoderReader.pad_batch, jax_capture.read_sites

    def counted(reader, batch):
        padded = pad_batch(reader, batch)
        real.append(batch.stop_B.sum())
        ran.append(padded[0].size)
        return padded

    def watched(mesh, config, sites, params, ids_BxT, lengths_B):
        values = read_sites(mesh, config, sites, params, ids_BxT, lengths_B)
        for places, arrays in ((shares, [ids_BxT]), (kept, values)):
            places.extend((len(array), part.data.shape[0]) for array in arrays for part in array.addressable_shards)
        return values

    monkeypatch.setattr(DecoderReader, "pad_batch", counted)
    monkeypatch.setattr(jax_capture, "read_sites", watched)
    assert jax.device_count() == 8
    options = dict(sites=("mlp_in.0", "resid_post.2"), shard_rows=rows, batch_tokens=128)
    expected, _ = setup.capture("torch_for_mesh", **options)
    found, _ = setup.capture("jax_on_mesh", backend="jax", mesh=MeshConfig(**mesh), **options)
    assert_same_store(found, expected)
    # Each device computes its share of the rows, whichever axis it is on, but for that of the heads.
    documents = 8 // mesh.get("model", 1)
    assert shares and all(rows == share * documents for rows, share in shares)
    # Where their number allows it, it keeps values of its share of all rows.
    assert all(rows == share * (documents if rows % 8 else 8) for rows, share in kept)
    assert any(rows % 8 == 0 for rows, _ in kept)
    assert sum(real) < sum(ran), "there was padding to leave out"


def test_bfloat16_products_stay_close_and_are_stored_rounded(setup, on_one_device):
    options = dict(sites=("resid_post.2", "attn_out.1"))
    exact, _ = setup.capture("exact", **options)
    found, _ = setup.capture("bfloat16", backend="jax", dtype="bfloat16", store_dtype="bfloat16", **options)
    assert_same_store(found, exact, tolerance=0.03)
    assert relative_error(found.read("attn_out.1", np.arange(50)), exact.read("attn_out.1", np.arange(50))) > 1e-4


@pytest.fixture
def make_reader(setup, one_device):
    """``make_reader(sites)`` reads a store's documents again, in batches of at most 64 tokens."""
    store, _ = setup.capture("reader", sites=("resid_pre.0",))
    plan = Plan(store.documents, shard_rows=10_000, batch_tokens=64, last=0, seed=0)

    def make(*sites):
        found = source.resolve(ModelConfig(path=str(setup.model)))
        config = read_config(read_json(found.folder / "config.json"), "config.json")
        return DecoderReader(found, config, sites, one_device, "float32", "float32"), plan

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_and_sums_of_the_devices_are_those_of_float64(dtype):
    """Of wide vectors, long texts, lone large values as of attention sinks, and squares beyond float32."""
    rng = np.random.default_rng(0)
    values_BxTxD = rng.standard_normal((3, 300, 1000)).astype(np.float32) + np.float32(0.3)
    values_BxTxD[:, 0, 7] = 3e4
    values_BxTxD[1, 5] *= np.float32(1e30)
    values_BxTxD[2, 9] = 0
    values_BxTxD[2, 160, 4] = np.nan
    first_B, stop_B = np.array([10, 300, 20]), np.array([290, 300, 150])
    measure = jax.jit(jax_capture.measure_sites, static_argnums=0)
    ((stored, norms, sums),) = measure(dtype, [values_BxTxD], first_B, stop_B)
    wide_BxTxD = values_BxTxD.astype(DTYPES[dtype]).astype(np.float64)
    assert np.array_equal(np.asarray(stored).astype(np.float64), wide_BxTxD, equal_nan=True)
    # Squares of 1 are lost beside 9e8, where a program adds them up one by one: 1,000 of them are 5.6e-7 of the norm.
    np.testing.assert_allclose(norms, np.linalg.norm(wide_BxTxD, axis=-1), rtol=1e-6)
    for row, (first, stop) in enumerate(zip(first_B, stop_B, strict=True)):
        expected_D = wide_BxTxD[row, first:stop].sum(0)
        assert np.linalg.norm(sums[row] - expected_D) <= 5e-7 * np.linalg.norm(expected_D)


def test_only_the_layers_up_to_the_last_site_are_read(make_reader):
    reader, _ = make_reader(Site("resid_post", 1), Site("mlp_in", 2))
    assert {value.shape[0] for name, value in reader.params.items() if name.startswith("layers.")} == {3}


def test_shapes_are_few_and_a_batch_is_read_when_the_next_one_runs(make_reader, monkeypatch):
    events, shapes, read_sites, pieces = [], set(), jax_capture.read_sites, jax_capture._pieces

    def watched(mesh, config, sites, params, ids_BxT, lengths_B):
        events.append(("start", sum(kind == "start" for kind, _ in events)))
        shapes.add(ids_BxT.shape)
        return read_sites(mesh, config, sites, params, ids_BxT, lengths_B)

    def read(vectors_BxTxD):
        events.append(("read", sum(kind == "read" for kind, _ in events)))
        return pieces(vectors_BxTxD)

    monkeypatch.setattr(jax_capture, "_pieces", read)
    monkeypatch.setattr(jax_capture, "read_sites", watched)
    reader, plan = make_reader(Site("resid_pre", 0))
    batches, taken = plan.batches(0), []
    reader.read(batches, lambda batch, site, value: taken.append(batch))
    assert [id(batch) for batch in taken] == [id(batch) for batch in batches] and len(batches) > 5
    expected = [("start", 0)]
    for number in range(1, len(batches)):
        expected += [("start", number), ("read", number - 1)]
    assert events == [*expected, ("read", len(batches) - 1)]
    assert len({batch.ids_BxT.shape for batch in batches}) > 5
    assert len(shapes) <= 2 and all(rows * length <= 64 for rows, length in shapes)


def test_sites_of_heads_have_their_own_widths(setup, on_one_device, one_device, tmp_path):
    """A model whose heads are together wider than its residual stream."""
    save_tiny(tmp_path, "qwen3", vocab_size=384, max_position_embeddings=128)
    save_tiny_tokenizer(tmp_path, 384)
    sites = ("attn_z.1", "attn_k.0", "resid_post.1")
    store, _ = setup.capture("heads", backend="jax", sites=sites, model=tmp_path)
    assert {site: store.d(site) for site in sites} == {"attn_z.1": 48, "attn_k.0": 24, "resid_post.1": 40}
    lm = load_model(str(tmp_path), mesh=one_device)
    rows = np.arange(store.manifest.rows)
    document_N, position_N, _ = store.tokens(rows)
    document = int(np.argmax(store.documents.lengths_N))
    values = lm(pad([store.documents[document].tolist()]), capture=sites).sites
    for site in sites:
        expected_NxD = np.asarray(values[site])[0, position_N[document_N == document]]
        assert relative_error(store.read(site, rows[document_N == document]), expected_NxD) < 1e-5
