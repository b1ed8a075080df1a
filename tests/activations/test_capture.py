"""What a capture stores: which tokens, in which order, rounded how, with which description."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from capture_setup import ALL_SITES, check_against_plain_forward, corpus_texts, rows_by_place

from saejax.activations import progress
from saejax.activations.documents import Documents
from saejax.activations.manifest import CapturedModel
from saejax.errors import UserError
from saejax.models import source
from saejax.settings import ModelConfig


def test_every_token_is_stored_once_and_no_padding(captured):
    store, results = captured
    expected = {(i, position) for i, ids in enumerate(store.documents) for position in range(len(ids))}
    assert set(rows_by_place(store)) == expected
    assert results.padding_share > 0  # there was padding to leave out
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
        later = documents.column("source")[documents.column("start") > 0][0]
        own = (documents.column("source") == later) & (documents.column("start") == 0)
        return documents.select(np.flatnonzero(own)[:1])

    monkeypatch.setattr(Documents, "sample", first_of_a_long_text)
    with pytest.raises(UserError, match="raise --capture.tokens"):
        setup.capture("none_last", last=1, tokens=1, sites=("resid_post.1",))
    assert not any((setup.folder / "none_last").rglob("*.npy"))


def test_bfloat16_on_disk_is_the_rounded_value(setup, captured):
    rounded, _ = setup.capture("rounded", store_dtype="bfloat16", sites=("resid_post.2",))
    rows = np.arange(captured[0].manifest.rows)
    exact = torch.tensor(captured[0].read("resid_post.2", rows)).to(torch.bfloat16).float().numpy()
    # Batches are the same, so that every bit must be.
    assert np.array_equal(rounded.read("resid_post.2", rows).astype(np.float32), exact)


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
