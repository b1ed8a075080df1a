"""Transcoder sets of circuit-tracer: layout, the function they describe, real sets, and what is refused."""

import dataclasses
import os
from pathlib import Path

import jax
import known_dictionaries as known
import numpy as np
import pytest
import torch
import yaml
from known_dictionaries import D, F
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from saejax.dictionaries import load_dictionary, load_transcoders, save_dictionary, save_transcoders
from saejax.dictionaries.formats import circuit_tracer
from saejax.dictionaries.hashes import hash_dictionaries
from saejax.errors import UserError

REFERENCE = Path(os.environ.get("SAEJAX_REFERENCE", Path(__file__).parents[3] / "shared" / "reference")) / "graphs"
SETS = sorted(path.parent.parent for path in REFERENCE.glob("*/transcoders/config.yaml"))
needs_reference = pytest.mark.skipif(not SETS, reason=f"no reference graphs in {REFERENCE} (SAEJAX_REFERENCE)")
EXPORTED = [(kind, form) for kind, form in known.EVERY if form != "sae" and kind != "linear"]


def make_set(kind="standard", form="transcoder", layers=3, **changes):
    return [known.make(kind, form, layer=layer, seed=layer, **changes) for layer in range(layers)]


def change(folder, **changes):
    """Rewrites config.yaml; the value ... removes a key."""
    settings = yaml.safe_load((folder / "config.yaml").read_text()) | changes
    (folder / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not ...}))


@pytest.mark.parametrize("kind,form", EXPORTED)
def test_a_set_is_written_as_what_it_computes_and_comes_back(kind, form, tmp_path):
    transcoders, x = make_set(kind, form), known.activations()
    save_transcoders(tmp_path / "a", transcoders[::-1])
    loaded = load_transcoders(tmp_path / "a")
    for layer, (before, after) in enumerate(zip(transcoders, loaded, strict=True)):
        for transcoder in (before, after):
            known.assert_computes(transcoder, x, known.circuit_tracer_by_formula(tmp_path / "a", layer, x))
        assert (after.config.site, after.config.target) == (f"mlp_in.{layer}", f"mlp_out.{layer}")
        assert (after.config.k, after.config.model) == (4 if kind == "topk" else 0, "some/model")
        assert after.config.skip == (form == "skip_transcoder")
    save_transcoders(tmp_path / "b", loaded)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["config.yaml", *(f"layer_{i}.safetensors" for i in range(3))]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("kind,form", [("topk", "transcoder"), ("jumprelu", "skip_transcoder")])
def test_one_layer_of_a_set_is_a_dictionary(kind, form, tmp_path):
    """Its file, with the set's description beside it or, if there is none, as sets without one are."""
    save_transcoders(tmp_path, make_set(kind, form))
    x, file = known.activations(), tmp_path / "layer_1.safetensors"
    layer, of_set = load_dictionary(file), load_transcoders(tmp_path)[1]
    assert layer.config == of_set.config
    np.testing.assert_array_equal(layer(x), of_set(x))
    known.assert_computes(layer, x, known.circuit_tracer_by_formula(tmp_path, 1, x))
    before = hash_dictionaries(str(file))
    change(tmp_path, feature_input_hook="hook_resid_mid")
    assert hash_dictionaries(str(file)) != before and load_dictionary(file).site == "resid_mid.1"
    assert load_dictionary(file, site="mlp_in.1").site == "mlp_in.1"
    (tmp_path / "config.yaml").unlink()
    if kind == "jumprelu":  # of a TopK without its k nothing says that it is one
        assert load_dictionary(file).config.kind == kind
    with pytest.raises(UserError, match=r"layer_9.safetensors holds no dictionary because it does not exist"):
        load_dictionary(tmp_path / "layer_9.safetensors")


def test_the_layout_is_that_of_circuit_tracer(tmp_path):
    """Layers are in the order of their numbers and read one by one."""
    save_transcoders(tmp_path, make_set("jumprelu", "skip_transcoder", layers=12))
    shapes = dict(W_enc=(F, D), W_dec=(F, D), b_enc=(F,), b_dec=(D,), W_skip=(D, D))
    found = {name: array.shape for name, array in load_file(tmp_path / "layer_0.safetensors").items()}
    assert found == shapes | {"activation_function.threshold": (F,)}
    hooks = dict(feature_input_hook="mlp.hook_in", feature_output_hook="mlp.hook_out")
    description = yaml.safe_load((tmp_path / "config.yaml").read_text())
    known = dict(saejax=dict(bos="auto"))
    assert description == dict(model_name="some/model", model_kind="transcoder_set") | hooks | known
    opened = circuit_tracer.open_set(tmp_path)
    assert len(opened.layers) == 12 and opened.configs[10].site == "mlp_in.10"
    # Circuit-tracer puts BOS in front of all texts; a set that was trained otherwise says so.
    assert opened.configs[10].bos == "auto"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**description, "saejax": {}}))
    assert circuit_tracer.open_set(tmp_path).configs[10].bos == "always"
    without = [each.with_config(dataclasses.replace(each.config, bos="never")) for each in make_set("topk", layers=2)]
    save_transcoders(tmp_path / "without", without)
    assert circuit_tracer.open_set(tmp_path / "without").configs[1].bos == "never"
    rows = opened.rows(10, "W_dec", np.array([3, 5]))
    np.testing.assert_array_equal(rows, opened.load(10).W_dec_FxD[...][np.array([3, 5])])


def test_files_and_sites_can_be_named(tmp_path):
    """A model with norms after the MLP has another output hook; hooks that are no sites can be replaced by sites."""
    save_transcoders(tmp_path / "a", make_set(model="google/gemma-2-2b"))
    assert "feature_output_hook: hook_mlp_out" in (tmp_path / "a" / "config.yaml").read_text()
    change(tmp_path / "a", feature_output_hook="mlp.hook_out")
    with pytest.raises(UserError, match="the hook blocks.0.mlp.hook_out is none of the sites"):
        load_transcoders(tmp_path / "a")
    save_transcoders(tmp_path, make_set(layers=2))
    (tmp_path / "layer_1.safetensors").rename(tmp_path / "second.safetensors")
    change(tmp_path, transcoders=["layer_0.safetensors", "second.safetensors"])
    assert [transcoder.site for transcoder in load_transcoders(tmp_path)] == ["mlp_in.0", "mlp_in.1"]
    change(tmp_path, feature_input_hook="hook_mlp_in")
    with pytest.raises(UserError, match=r"the hook blocks.0.hook_mlp_in is none of the sites"):
        load_transcoders(tmp_path)
    assert [transcoder.site for transcoder in load_transcoders(tmp_path, site="mlp_in")] == ["mlp_in.0", "mlp_in.1"]


ZEROS, LARGER = np.zeros(F, np.float32), np.zeros((F + 1, D), np.float32)


@pytest.mark.parametrize(
    "changes,tensors,message",
    [
        (dict(model_kind="odd"), {}, "model_kind is 'odd', expected 'transcoder_set' or 'cross_layer_transcoder'"),
        (dict(feature_input_hook=...), {}, "lacks feature_input_hook or feature_output_hook"),
        (dict(activation="gelu"), {}, "activation is 'gelu': expected one of relu"),
        (dict(activation="jumprelu"), {}, "layer 0 has no activation_function.threshold"),
        (dict(activation="topk"), {}, "k is None: expected a whole number above 0"),
        (dict(activation="topk", k=F + 1), {}, "k is 41: expected a whole number from 1 to the 40"),
        (dict(transcoders=["hf://a/b"]), {}, "hf://a/b is no file on the hub"),
        (dict(transcoders="layer_0.safetensors"), {}, "expected a list of files"),
        (dict(transcoders=["layer_0.safetensors", "third.safetensors"]), {}, "third.safetensors is missing"),
        ({}, dict(b_enc=...), "layer_1.safetensors lacks b_enc"),
        ({}, dict(b_dec=ZEROS), r"b_dec has the shape \(40,\), expected \(12,\)"),
        ({}, dict(W_dec=np.zeros((F, D + 1), np.float32)), "reads width 12 and writes width 13"),
        ({}, dict(W_enc=...), "lacks W_enc: it has W_dec"),
        ({}, dict(W_enc=LARGER, W_dec=LARGER, b_enc=LARGER[:, 0]), r"different sizes \(12 to 40, 12 to 41\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_followed_or_does_not_fit_is_refused_by_name(changes, tensors, message, tmp_path):
    save_transcoders(tmp_path, make_set(layers=2))
    change(tmp_path, **changes)
    known.change_tensors(tmp_path / "layer_1.safetensors", **tensors)
    with pytest.raises(UserError, match=message):
        load_transcoders(tmp_path)


def test_missing_layers_and_damaged_files_are_refused(tmp_path):
    save_transcoders(tmp_path, make_set(layers=3))
    (tmp_path / "layer_1.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks layer_1.safetensors"):
        load_transcoders(tmp_path)
    for text in ("a: [", "!!python/object/apply:os.system ['true']"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match="is damaged"):
            load_transcoders(tmp_path)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(UserError, match="lacks layer_1.safetensors"):
        load_transcoders(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no transcoders"):
        load_transcoders(tmp_path / "empty")


@pytest.mark.parametrize(
    "transcoders,message",
    [
        (lambda: [], "none was given"),
        (lambda: make_set()[1:], r"layers \[0\] are missing"),
        (lambda: [*make_set(), known.make("standard", "transcoder", layer=4)], r"layers \[3\] are missing"),
        (lambda: [*make_set(layers=1), *make_set(layers=1)], r"the layers are \[0, 0\]"),
        (lambda: [known.make("standard", layer=0)], "holds no SAEs, but one of resid_post.0"),
        (lambda: make_set("linear"), "no linear transcoders"),
        (lambda: [known.make("gated", "transcoder", 0), known.make("gated", "skip_transcoder", 1)], "one skip path"),
        (lambda: [known.make("topk", "transcoder", 0), known.make("topk", "transcoder", 1, k=5)], "one sparsity"),
        (lambda: [known.make("standard", "transcoder", 0, target="mlp_out.1")], "predicts mlp_out.1 of mlp_in.0"),
        (lambda: make_set(layers=1, site="module:model.layers.0.mlp.act"), "is a module of the PyTorch model"),
    ],
)  # fmt: skip
def test_what_makes_no_set_is_refused(transcoders, message, tmp_path):
    with pytest.raises(UserError, match=message):
        save_transcoders(tmp_path / "a", transcoders())
    assert not (tmp_path / "a").exists()


def test_nothing_is_replaced_or_half_written(tmp_path, monkeypatch):
    save_transcoders(tmp_path / "a", make_set())
    with pytest.raises(UserError, match="a set of transcoders: name the file of a layer in it"):
        load_dictionary(tmp_path / "a")
    with pytest.raises(UserError, match=r"already holds config.yaml"):
        save_transcoders(tmp_path / "a", make_set())
    (tmp_path / "a" / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"already holds layer_0.safetensors"):
        save_transcoders(tmp_path / "a", make_set(layers=1))
    monkeypatch.setattr(circuit_tracer, "write_text", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_transcoders(tmp_path / "b", make_set())
    assert list((tmp_path / "b").iterdir()) == []


def test_a_stack_of_folders_is_a_set_too(tmp_path):
    for layer in (2, 10, 1):
        save_dictionary(tmp_path / "own" / f"mlp_in.{layer}" / "dictionary", known.make("topk", "transcoder", layer))
        save_dictionary(tmp_path / "sl" / f"mlp_in.{layer}", known.make("standard", "transcoder", layer), "saelens")
    for name in ("own", "sl"):
        assert [t.site for t in load_transcoders(tmp_path / name)] == ["mlp_in.1", "mlp_in.2", "mlp_in.10"]
    with pytest.raises(UserError, match=r"holds no dictionary but folders of such: name one, such as .*mlp_in.1"):
        load_dictionary(tmp_path / "own")
    save_dictionary(tmp_path / "own" / "again", known.make("topk", "transcoder", 2))
    with pytest.raises(UserError, match="several transcoders of layer 2"):
        load_transcoders(tmp_path / "own")
    save_dictionary(tmp_path / "sae" / "a", known.make("topk"))
    with pytest.raises(UserError, match="an SAE of resid_post.3: expected transcoders only; graphs of SAEs take"):
        load_transcoders(tmp_path / "sae")


@needs_reference
@pytest.mark.parametrize("graph", SETS, ids=lambda path: path.name)
def test_published_sets_compute_what_their_formula_and_circuit_tracer_say(graph):
    """Its graphs list the active features of a prompt: (layer, position, feature), without position 0."""
    folder, x = graph / "transcoders", np.random.default_rng(0).normal(size=(20, 32)).astype(np.float32)
    reference = np.load(graph / "reference.npz")
    model = AutoModelForCausalLM.from_pretrained(graph / "hf_model", dtype=torch.float32)
    inputs = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: inputs.append(args[0][0].numpy()))
    with torch.inference_mode():
        model(torch.from_numpy(reference["ids"].astype(np.int64))[None])
    found, values = [], []
    for layer, transcoder in enumerate(load_transcoders(folder)):
        known.assert_computes(transcoder, x, known.circuit_tracer_by_formula(folder, layer, x))
        acts_TxF = np.array(transcoder.encode(jax.numpy.asarray(inputs[layer])))
        acts_TxF[0] = 0
        positions, features = np.nonzero(acts_TxF)
        found += [(layer, t, i) for t, i in zip(positions, features, strict=True)]
        values += acts_TxF[positions, features].tolist()
    assert len(found) > 100 and np.array_equal(found, reference["active_features"])
    assert known.relative(values, reference["activation_values"]) < 1e-5
