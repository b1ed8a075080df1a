"""What a capture stores, what it refuses, and that killed, stopped or damaged ones go on to the same files."""

import collections
import errno
import json
import shutil
import threading
from collections import defaultdict

import numpy as np
import pytest
import torch
from capture_setup import ALL_SITES, RESUMED, check_against_plain_forward, corpus_texts, files, rows_by_place
from safetensors.numpy import load_file, save_file

from saejax.activations import progress
from saejax.activations.documents import Documents
from saejax.activations.manifest import CapturedModel
from saejax.activations.writer import StoreWriter
from saejax.errors import Interrupted, UserError
from saejax.models import source
from saejax.models.settings import ModelConfig
from saejax.parallel.collectives import is_alone
from saejax.parallel.settings import MeshConfig
from saejax.stages.capture import run as capture


def test_every_token_is_stored_once_and_no_padding(captured):
    store, results = captured
    expected = {(i, position) for i, ids in enumerate(store.documents) for position in range(len(ids))}
    assert set(rows_by_place(store)) == expected
    assert 1 in store.documents.lengths_N  # and a document of one token
    assert results.documents == {split: len(store.documents.of(split)) for split in ("train", "held_out")}
    assert sum(results.tokens.values()) == len(expected) == results.sites["attn_out.0"].rows
    assert (results.sites["attn_out.0"].d, results.sites["attn_out.0"].bytes) == (64, len(expected) * 64 * 4)


def test_every_site_equals_a_plain_forward_pass_of_the_model_that_the_manifest_names(captured, setup, torch_model):
    store, _ = captured
    assert store.sites == ALL_SITES
    check_against_plain_forward(store, torch_model, 1e-5)
    found = source.resolve(ModelConfig(path=str(setup.model)))
    assert store.model == CapturedModel(str(setup.model), "", found.fingerprint, "float32")
    store.check_model(found)


def test_the_model_can_run_in_bfloat16(setup):
    store, _ = setup.capture("bfloat16", dtype="bfloat16", sites=("resid_post.2", "attn_out.1"))
    model = source.load_torch_model(source.resolve(ModelConfig(path=str(setup.model))), "bfloat16")
    check_against_plain_forward(store, model, 0.03)
    values = store.read("resid_post.2", np.arange(100))
    assert np.array_equal(values, torch.tensor(values).to(torch.bfloat16).float().numpy())  # not run in fp32


def test_documents_are_the_texts_cut_up(captured, setup):
    store, _ = captured
    documents = store.documents
    tokenizer = source.load_tokenizer(source.resolve(ModelConfig(path=str(setup.model))))
    pieces = {}
    for i, ids in enumerate(documents):
        pieces.setdefault(documents.column("source")[i], []).append((documents.column("start")[i], ids.tolist()))
        assert len(ids) <= 32
    for index, text in enumerate(corpus_texts()):
        joined = [token for _, ids in sorted(pieces.pop(index)) for token in ids]
        assert joined == tokenizer(text)["input_ids"]
    assert not pieces
    groups = documents.column("group")
    assert not set(groups[documents.split_N == 0]) & set(groups[documents.split_N == 1])


@pytest.mark.parametrize("bos", ["auto", "always", "never"])
def test_the_manifest_says_whether_documents_begin_with_bos(setup, monkeypatch, bos):
    load = source.load_tokenizer

    def with_bos(found):
        tokenizer = load(found)
        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(5)  # which this tokenizer does not put in front itself
        return tokenizer

    monkeypatch.setattr(source, "load_tokenizer", with_bos)
    store, _ = setup.capture(f"bos_{bos}", bos=bos, sites=("resid_pre.0",))
    assert store.manifest.bos == (bos == "always") and store.bos == ("always" if bos == "always" else "never")
    if bos == "always":
        assert all(ids[0] == 5 for ids in store.documents)


@pytest.mark.parametrize("last", [1, 5, 50])
def test_the_last_positions_of_every_text(setup, torch_model, last):
    store, _ = setup.capture(f"last{last}", last=last, sites=("resid_post.1", "mlp_in.0"))
    check_against_plain_forward(store, torch_model, 1e-5)
    text_N, start_N = (store.documents.column(name).tolist() for name in ("source", "start"))
    texts, lengths = defaultdict(set), defaultdict(int)
    for i, position in rows_by_place(store):
        texts[text_N[i]].add(start_N[i] + position)
    for i, ids in enumerate(store.documents):
        lengths[text_N[i]] = max(lengths[text_N[i]], start_N[i] + len(ids))
    assert max(lengths.values()) > 64  # a text in three pieces
    assert texts == {key: set(range(max(0, length - last), length)) for key, length in lengths.items()}


def test_of_a_few_documents_that_hold_no_texts_end_nothing_is_captured(setup, monkeypatch):
    def first_of_a_long_text(documents, tokens):
        """And all that is held out."""
        later = documents.column("source")[(documents.column("start") > 0) & (documents.split_N == 0)][0]
        own = (documents.column("source") == later) & (documents.column("start") == 0)
        return documents.select(np.flatnonzero(own | (documents.split_N == 1)))

    monkeypatch.setattr(Documents, "sample", first_of_a_long_text)
    with pytest.raises(UserError, match="raise --capture.tokens"):
        setup.capture("none_last", last=1, tokens=1, sites=("resid_post.1",))
    assert not any((setup.folder / "none_last").rglob("*.npy"))


def test_bfloat16_on_disk_is_the_rounded_value(setup, captured):
    rounded, _ = setup.capture("rounded", store_dtype="bfloat16", sites=("resid_post.2",))
    rows = np.arange(captured[0].manifest.rows)
    exact, found = captured[0].read("resid_post.2", rows), rounded.read("resid_post.2", rows).astype(np.float32)
    assert np.array_equal(found, torch.tensor(found).to(torch.bfloat16).float().numpy())
    # Half of the last of eight bits; and another pass, which stops earlier, may round fp32 otherwise.
    assert (np.abs(found - exact) <= 2**-8 * np.abs(exact) + 1e-5 * np.abs(exact).max()).all()


def test_max_tokens_takes_that_many_tokens_of_the_corpus_and_progress_tells_speed_and_time_to_go(
    setup, captured, monkeypatch
):
    monkeypatch.setattr(progress, "SAY_EVERY", 0.0)
    lines = []
    store, results = setup.capture("limited", say=lines.append, corpus=dict(max_tokens=151), sites=("resid_pre.0",))
    assert sum("tokens/s" in line and "s to go" in line for line in lines) > 2 and results.tokens_per_second > 0
    assert int(store.documents.lengths_N.sum()) == 151
    sides = []
    for documents in (captured[0].documents, store.documents):
        columns = (documents.column(name).tolist() for name in ("source", "split"))
        sides.append(set(zip(*columns, strict=True)))
    assert sides[1] < sides[0]  # every text that was taken is in the split in which it always is


def test_a_nan_is_located_and_nothing_is_stored(setup, tiny_llama, tmp_path, monkeypatch):
    tokenizer = source.load_tokenizer(source.resolve(ModelConfig(path=str(tiny_llama))))
    token = tokenizer.encode("z")[0]  # in no text but the one below
    texts = [*corpus_texts(), "the cat " * 30 + "z the"]
    lines = [json.dumps(dict(text=text, group=f"g{i}")) for i, text in enumerate(texts)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    shutil.copytree(tiny_llama, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].copy()
    weights["model.embed_tokens.weight"][token, 3] = np.nan
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata=dict(format="pt"))
    # Weights that are not finite are refused before; values can also overflow in the model.
    monkeypatch.setattr(source, "_damaged_parameters", lambda model: [])
    run = setup.make_run(
        "nan",
        model=tmp_path / "model",
        # Attention multiplies what is masked by zero, which leaves a NaN one: behind it all positions are NaN.
        sites=("resid_pre.0", "mlp_out.1"),
        shard_rows=10_000,
        corpus=dict(path=str(tmp_path / "corpus.jsonl")),
    )
    position = tokenizer.encode(texts[-1]).index(token)
    with pytest.raises(UserError, match=rf"at resid_pre\.0 are NaN .* document 12 of the corpus, position {position},"):
        capture.run_capture(run)
    assert not (run.folder / "manifest.json").exists()
    assert not list(run.folder.rglob("shard-*.npy"))


def test_too_many_sinks_are_an_error_that_names_share_and_flag(setup):
    options = dict(sites=("resid_post.1",), sink_factor=1.0)
    store, results = setup.capture("sinks", **options)
    norms = store.norms("resid_post.1", np.arange(store.manifest.rows))
    median = np.median(norms[store.documents.split_N[store.tokens(np.arange(len(norms)))[0]] == 0])
    sinks = results.sites["resid_post.1"].sinks
    assert sinks.position_0 + sinks.beyond == (norms > median).sum() > 10
    kept = sum(len(store.rows(split, "resid_post.1")) for split in ("train", "held_out"))
    assert kept == (norms <= median).sum()
    message = rf"at resid_post\.1, {sinks.share_beyond:.2%} of .* at most 30.00%.*--capture.sink_factor.*"
    with pytest.raises(UserError, match=message) as e:
        setup.capture("sinks_refused", max_sink_share=0.3, **options)
    assert "--capture.max_sink_share" in str(e.value)
    assert not (setup.folder / "sinks_refused" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sites=("resid_last.1",)), "there is no site 'resid_last.1'"),
        (dict(sites=("resid_post.4",)), "4 layers, 0 to 3"),
        (dict(sites=()), "--capture.sites is empty"),
        (dict(sites=("mlp_in.0", "mlp_in.0")), "names mlp_in.0 twice"),
        (dict(corpus=dict(path="nowhere.jsonl")), "nowhere.jsonl does not exist"),
        (dict(corpus=dict(context=129)), "exceeds the model's context of 128"),
        (dict(corpus=dict(max_tokens=1)), "split has no text.*--corpus.max_tokens=1"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(setup, options, message):
    run = setup.make_run("refused", **options)
    with pytest.raises(UserError, match=message):
        capture.run_capture(run)
    assert not list(run.folder.rglob("*"))


def test_a_disk_without_room_is_refused_at_the_start(setup, monkeypatch):
    monkeypatch.setattr(capture.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match=r"disk is full: the store needs .* MiB more"):
        setup.capture("no_room")


@pytest.fixture(scope="module")
def uninterrupted(setup):
    store, _ = setup.capture("uninterrupted", **RESUMED)
    assert store.manifest.shards > 5
    return files(store.folder)


def test_a_capture_killed_at_any_shard_goes_on_to_the_same_files(setup, uninterrupted, monkeypatch):
    """Killed in the middle of every shard, up to thrice: some of its files are there, not its record."""
    killed, write_site = collections.Counter(), StoreWriter.write_site

    class Killed(BaseException):
        pass

    def killed_in_the_middle(self, site, shard, rows):
        if site == "mlp_in.2" or killed[shard] > shard % 3:
            return write_site(self, site, shard, rows)
        killed[shard] += 1
        (self.folder / "resid_post.1").mkdir(exist_ok=True)
        (self.folder / "resid_post.1" / f"shard-{shard:05d}.npy").write_bytes(b"half a file")
        (self.folder / "resid_post.1" / f".shard-{shard:05d}.npy.writing-1").write_bytes(b"half a file")
        raise Killed

    monkeypatch.setattr(StoreWriter, "write_site", killed_in_the_middle)
    run = setup.make_run("killed", **RESUMED)
    kills = 0
    while not (run.folder / "manifest.json").exists():
        try:
            capture.run_capture(run)
        except Killed:
            kills += 1
    assert kills >= 3 and len(killed) > 5
    assert files(run.folder) == uninterrupted


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_stopped_capture_keeps_its_shards_and_goes_on(setup, on_one_device, backend):
    asked = 0

    def stopping():
        nonlocal asked
        asked += 1
        return asked % 5 == 0

    run = setup.make_run(f"stopped_{backend}", stopping=stopping, backend=backend, **RESUMED)
    stops = 0
    while not (run.folder / "manifest.json").exists():
        try:
            capture.run_capture(run)
        except Interrupted as stop:
            stops += 1
            assert f"{len(list(run.folder.glob('mlp_in.2/record-*')))} of " in str(stop)
    whole, _ = setup.capture(f"whole_{backend}", backend=backend, **RESUMED)
    assert stops > 2 and files(run.folder) == files(whole.folder)


def test_a_write_that_fails_counts_more_than_a_signal(setup, monkeypatch):
    """Also one that fails only after the signal, whose message would say that its shard is finished."""
    failing, stopped = threading.Event(), threading.Event()

    def fail(self, site, shard, rows):
        failing.set()
        assert stopped.wait(60)
        raise OSError(errno.ENOSPC, "No space left on device")

    def stopping():
        if failing.is_set():
            stopped.set()
        return failing.is_set()

    monkeypatch.setattr(StoreWriter, "write_site", fail)
    with pytest.raises(OSError, match="No space left"):
        capture.run_capture(setup.make_run("no_space", stopping=stopping, **RESUMED))


def test_a_finished_shard_that_was_damaged_is_made_again(setup, uninterrupted):
    store, _ = setup.capture("damaged", **RESUMED)
    (store.folder / "manifest.json").unlink()
    shard = store.folder / "mlp_in.2" / "shard-00003.npy"
    shard.write_bytes(shard.read_bytes()[:-4] + b"\0\0\0\0")
    setup.capture("damaged", **RESUMED)
    assert files(store.folder) == uninterrupted


def test_each_of_several_processes_reads_with_its_own_devices(setup, monkeypatch):
    """Also where the model is loaded before the plan is made, to learn the width of a module."""
    loaded = []
    monkeypatch.setattr(capture, "load_reader", lambda *arguments: loaded.append(is_alone()) or 1 / 0)
    for processes in (2, 1):
        run = setup.make_run("alone", mesh=MeshConfig(processes=processes), sites=("module:model.layers.0",))
        with pytest.raises(ZeroDivisionError):
            capture.run_capture(run)
    assert loaded == [True, False]


@pytest.mark.parametrize("other", [dict(corpus=dict(max_tokens=150)), dict(backend="jax")], ids=["corpus", "backend"])
def test_shards_of_other_work_are_not_taken_over(setup, on_one_device, other):
    name, lines = f"before_{next(iter(other))}", []
    setup.capture(name, **RESUMED)
    setup.capture(name, say=lines.append, **RESUMED | other)
    assert "; 0 of " in lines[0]
