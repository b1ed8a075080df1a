"""The store gives back what was written, leaves sinks out, and refuses what is damaged or not its own."""

import concurrent.futures
import errno
import json
import os
import resource
from pathlib import Path

import known_store
import ml_dtypes
import numpy as np
import pytest

from saejax.activations import checksums
from saejax.activations import writer as writer_module
from saejax.activations.plan import Plan
from saejax.activations.store import Store
from saejax.activations.writer import StoreWriter
from saejax.errors import UserError
from saejax.models.source import ModelSource

SITES = ("resid_post.1", "mlp_out.0")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shard_rows", [16, 7, 1000])
def test_what_was_written_is_read_back_under_its_document_and_position(make_store, dtype, shard_rows):
    known = make_store(dtype, shard_rows)
    store = known.store
    store.verify()
    rows = np.random.default_rng(0).permutation(store.manifest.rows)
    places = known.places(rows)
    assert sorted(places) == sorted(known.vectors["mlp_out.0"])
    for site in SITES:
        values = store.read(site, rows)
        assert values.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
        assert values.tobytes() == np.stack([known.vectors[site][place] for place in places]).tobytes()
        norms = np.linalg.norm(values.astype(np.float64), axis=1)
        np.testing.assert_allclose(store.norms(site, rows), norms, rtol=1e-6)
    _, _, token_N = store.tokens(rows)
    assert token_N.tolist() == [known.documents[i][position] for i, position in places]
    assert [ids.tolist() for ids in store.documents] == [ids.tolist() for ids in known.documents]
    assert [len(ids) for ids in store.documents.of("held_out")] == [3, 11, 2]
    with pytest.raises(IndexError):
        store.documents[12]
    for site, more_sites in (("resid_post.1", ()), ("mlp_out.0", ()), ("mlp_out.0", ("resid_post.1",))):
        values_NxD = store.read(site, store.rows("train", site, *more_sites)).astype(np.float64)
        np.testing.assert_allclose(store.mean(site, *more_sites), values_NxD.mean(0), rtol=0, atol=1e-12)


# Statement 7 of WORKSPACE.md, what must hold.
def test_rows_are_those_of_the_split_without_sinks_beyond_ten_medians_of_the_training_rows(make_store):
    known = make_store("float32")
    for site in SITES:
        vectors, split_N = known.vectors[site], known.documents.split_N
        norms = [np.linalg.norm(vector) for (i, _), vector in vectors.items() if split_N[i] == 0]
        assert known.store.median_norm(site) == pytest.approx(np.median(norms), rel=1e-6)
        assert known.store.max_norm(site) == pytest.approx(10 * np.median(norms), rel=1e-6)
        for split, index in (("train", 0), ("held_out", 1)):
            rows = known.store.rows(split, site)
            assert rows.dtype == np.int64 and (np.diff(rows) > 0).all()
            expected = {place for place in vectors if split_N[place[0]] == index}
            assert set(known.places(rows)) == expected - known.sinks[site]
    sinks = known.store.sinks("resid_post.1")
    assert (sinks.position_0, sinks.beyond, sinks.share_beyond) == (12, 0, 0.0)
    sinks = known.store.sinks("mlp_out.0")
    assert (sinks.position_0, sinks.beyond) == (0, 1)
    assert sinks.share_beyond == pytest.approx(1 / (93 - 12))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), r"no finished activation store.*run capture"),
        (lambda path: change_manifest(path, lambda manifest: manifest.update(schema_version=99)), "schema version"),
        (
            lambda path: change_manifest(path, lambda manifest: manifest["sites"]["mlp_out.0"].pop("max_norm")),
            r"manifest.json has no field sites.mlp_out.0.max_norm: it is damaged",
        ),
        (
            lambda path: change_manifest(path, lambda manifest: manifest.update(dtype="float16")),
            "dtype of the store .*16",
        ),
    ],
)
def test_a_manifest_that_cannot_be_read_is_refused_in_one_line(make_store, spoil, message):
    folder = make_store().store.folder
    spoil(folder / "manifest.json")
    with pytest.raises(UserError, match=message) as raised:
        Store.open(folder)
    assert "\n" not in str(raised.value)


def change_manifest(path, change):
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


FILES = [
    "mlp_out.0/shard-00002.npy",
    "mlp_out.0/norms-00001.npy",
    "mlp_out.0/sinks.npy",
    "mlp_out.0/train_sum.npy",
    "index/shard-00003.npy",
    "documents/ids.npy",
]


@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_found(make_store, name):
    """Files that are truncated or missing when the store is opened, and a flipped bit before the file is used."""
    folder = make_store().store.folder
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"{name} has {len(content) - 1} bytes, expected {len(content)}"):
        Store.open(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        Store.open(folder)
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{name} is damaged"):
        Store.open(folder).verify()
    store = Store.open(folder)
    rows = np.arange(store.manifest.rows)
    with pytest.raises(UserError, match=f"{name} is damaged") as raised:
        store.read("mlp_out.0", store.rows("train", "mlp_out.0"))
        store.norms("mlp_out.0", rows)
        store.mean("mlp_out.0")
        store.tokens(rows)
        len(store.documents)
    assert "\n" not in str(raised.value)


def test_only_blocks_that_are_read_are_checked(make_store, monkeypatch):
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 64)
    folder = make_store("float32", 1000).store.folder  # 24 bytes a row: some lie in two blocks
    path = folder / "resid_post.1" / "shard-00000.npy"
    content = bytearray(path.read_bytes())
    content[128 + 64 * 3 + 5] ^= 1  # in block 3, of which rows 8 to 10 have a part
    path.write_bytes(content)
    store = Store.open(folder)
    store.read("resid_post.1", np.arange(8))
    store.read("resid_post.1", np.arange(11, 93))
    for row in (8, 9, 10):
        with pytest.raises(UserError, match=r"shard-00000.npy is damaged: block 3 \(rows 8 to 10 of the shard\)"):
            store.read("resid_post.1", [row])


@pytest.mark.parametrize("content", ["{", "{}", '{"checksums": {}}', '{"checksums": {"shard": []}}'])
def test_a_damaged_record_is_said_in_one_line(make_store, content):
    store = make_store().store
    path = store.folder / "mlp_out.0" / "record-00001.json"
    path.write_text(content)
    with pytest.raises(UserError, match="damaged|lacks checksums") as raised:
        store.read("mlp_out.0", np.arange(store.manifest.rows))
    assert "\n" not in str(raised.value) and "00001" in str(raised.value)


def test_another_array_of_the_same_size_is_refused(make_store):
    store = make_store("float32").store
    path = store.folder / "resid_post.1" / "shard-00001.npy"
    np.save(path, np.load(path).reshape(6, 16))
    with pytest.raises(UserError, match=r"shard-00001.npy does not hold float32 \[16, 6\]"):
        Store.open(store.folder).read("resid_post.1", [20])


def test_a_store_of_another_model_is_refused_with_both_names(make_store):
    store = make_store().store
    store.check_model(ModelSource("known/model", "abc", Path("."), "0123456789abcdef"))
    with pytest.raises(UserError, match=r"known/model at abc \(0123456789abcdef\).*not from other/one \(f{16}\)"):
        store.check_model(ModelSource("other/one", "", Path("."), "f" * 16))


def test_unknown_sites_splits_and_rows_are_refused(make_store):
    store = make_store().store
    for method, *arguments in ((store.read, "resid_post.2", [0]), (store.d, "x"), (store.rows, "train", "mlp_out.1")):
        with pytest.raises(UserError, match="expected one of resid_post.1, mlp_out.0"):
            method(*arguments)
    with pytest.raises(UserError, match="train, held_out"):
        store.rows("test", "mlp_out.0")
    for row in (-1, 93):
        with pytest.raises(IndexError):
            store.read("mlp_out.0", [row])
    assert store.read("mlp_out.0", []).shape == (0, 3)


def make_writer(folder, sites=known_store.SITES, work="memory"):
    plan = Plan(known_store.make_documents(), 16, 1, last=0, seed=5)
    return StoreWriter(folder, plan, sites, "bfloat16", dict.fromkeys(("index", *sites), work))


def test_a_finished_shard_is_kept_only_if_it_is_whole_and_of_the_same_work(make_store):
    folder = make_store().store.folder
    writer = make_writer(folder)
    assert all(writer.has(part, shard) for part in writer.parts for shard in range(6))
    assert not make_writer(folder, work="other").has("mlp_out.0", 0)
    one_more = make_writer(folder, known_store.SITES | {"resid_pre.0": 4})  # a site's files say nothing of other sites
    missing = {part for part in one_more.parts if not all(one_more.has(part, shard) for shard in range(6))}
    assert missing == {"resid_pre.0"}
    shard = folder / "mlp_out.0" / "shard-00001.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    assert not writer.has("mlp_out.0", 1) and writer.has("resid_post.1", 1)
    (folder / "index" / "record-00002.json").write_text("{")
    assert not writer.has("index", 2)


def test_what_is_to_be_made_anew_is_not_taken_for_made(make_store):
    """A process that waits for others looks at records alone: that of a damaged shard goes first."""
    writer = make_writer(make_store().store.folder)
    writer.begin([("mlp_out.0", 1), ("mlp_out.0", 4)])
    assert [shard for shard in range(6) if writer.has("mlp_out.0", shard, read=False)] == [0, 2, 3, 5]
    assert all(writer.has("resid_post.1", shard, read=False) for shard in range(6))


@pytest.mark.parametrize(
    ("number", "told"), [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk quota is used up")]
)
def test_a_full_disk_is_said_and_leaves_no_part_of_a_file(make_store, monkeypatch, number, told):
    folder = make_store().store.folder
    before = {path: path.read_bytes() for path in folder.rglob("*.npy")}

    def full(file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", full)
    writer = make_writer(folder)
    writer.begin([("index", 3)])
    with pytest.raises(UserError, match=f"{told}: .*index/shard-00003.npy"):
        writer.write_index(3)
    assert {path: path.read_bytes() for path in folder.rglob("*.npy")} == before
    assert not list(folder.rglob("*.writing*"))
    with pytest.raises(PermissionError), writer_module._explain_full_disk(Path("x")):
        raise PermissionError(errno.EACCES, "denied")


def test_a_store_of_more_files_than_a_process_may_open_is_read(make_store, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # of hundreds of small files
    known = make_store("float32", shard_rows=1)
    assert known.store.manifest.shards > 64
    rows, limits = np.random.default_rng(0).permutation(93), resource.getrlimit(resource.RLIMIT_NOFILE)
    # Files that earlier tests left open lie between the free numbers.
    taken = {int(number) for number in os.listdir("/dev/fd")}
    free = [number for number in range(len(taken) + 64) if number not in taken]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[63] + 1, limits[1]))
    try:
        monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 64))  # as if no more were allowed
        store = Store.open(known.store.folder)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            values = list(pool.map(lambda site: store.read(site, rows), SITES * 4))
            kept = [store.rows("train", site) for site in SITES]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for site, values_NxD in zip(SITES * 4, values, strict=True):
        np.testing.assert_array_equal(values_NxD, known.store.read(site, rows))
    for site, kept_R in zip(SITES, kept, strict=True):
        np.testing.assert_array_equal(kept_R, known.store.rows("train", site))
