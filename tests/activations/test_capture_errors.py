"""What capture refuses, and what it says."""

import json
import shutil

import numpy as np
import pytest
from capture_setup import corpus_texts

from saejax.activations import capture
from saejax.errors import UserError
from saejax.models import source
from saejax.settings import ModelConfig


def test_a_nan_is_located_and_nothing_is_stored(setup, tiny_llama, tmp_path, monkeypatch):
    from safetensors.numpy import load_file, save_file

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
