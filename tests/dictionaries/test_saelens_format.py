"""SAELens folders: layout, the function they describe, what is folded, and what is refused."""

import json

import jax.numpy as jnp
import known_dictionaries as known
import numpy as np
import pytest
from known_dictionaries import D, F
from safetensors.numpy import load_file

from saejax.dictionaries import load_dictionary, save_dictionary
from saejax.dictionaries.formats import describe, saelens, tensors
from saejax.errors import UserError

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
FOLDED = dict(metadata__model_from_pretrained_kwargs=dict(fold_ln=True), metadata__hook_name="blocks.0.mlp.hook_in")
UNTOLD = dict(metadata__training_architecture="batchtopk", metadata__training_architecture_details=[3])
ZEROS, WIDE = np.zeros(F, np.float32), np.zeros((F, D + 1), np.float32)


def cfg_of(folder) -> dict:
    return json.loads((folder / CFG).read_text())


WRITTEN = [(kind, form, form == "sae") for kind, form in known.IN_SAELENS]
WRITTEN += [(kind, "transcoder", True) for kind in ("standard", "gated", "jumprelu")]
WRITTEN.append(("matching_pursuit", "sae", True))


@pytest.mark.parametrize("kind,form,centred", WRITTEN)
def test_a_dictionary_is_written_as_what_it_computes_and_comes_back(kind, form, centred, tmp_path):
    """A transcoder that centres its input is written as one that does not."""
    dictionary, x = known.make(kind, form, centred=centred), known.activations()
    save_dictionary(tmp_path / "a", dictionary, "saelens")
    f, y = known.saelens_by_formula(tmp_path / "a", x)
    known.assert_computes(dictionary, x, (f, y))
    assert (f > 0).mean() > 0.02 and cfg_of(tmp_path / "a")["apply_b_dec_to_input"] == (form == "sae")
    loaded = load_dictionary(tmp_path / "a")
    folded = kind == "gated" and form != "sae"  # to a JumpReLU
    if not folded and centred == (form == "sae"):
        assert loaded.config == dictionary.config
        for name, array in dictionary.arrays.items():
            np.testing.assert_array_equal(loaded.arrays[name], array, name)
    assert known.relative(loaded(x), dictionary(x)) < 1e-5
    save_dictionary(tmp_path / "b", loaded, "saelens")
    assert cfg_of(tmp_path / "a") == cfg_of(tmp_path / "b")
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(("kind", "form"), [pair for pair in known.IN_SAELENS if pair[1] != "sae"])
def test_a_transcoder_to_another_width_is_written_and_comes_back(kind, form, tmp_path):
    dictionary, x = known.make(kind, form, d_out=D + 5), known.activations()
    save_dictionary(tmp_path / "a", dictionary, "saelens")
    cfg = cfg_of(tmp_path / "a")
    assert (cfg["d_in"], cfg["d_out"]) == (D, D + 5)
    known.assert_computes(dictionary, x, known.saelens_by_formula(tmp_path / "a", x))
    loaded = load_dictionary(tmp_path / "a")
    assert loaded.config.d_out == D + 5 and known.relative(loaded(x), dictionary(x)) < 1e-5
    assert "widths 12 to 17" in describe(loaded.config, "saelens")
    (tmp_path / "a" / CFG).write_text(json.dumps(cfg | dict(d_out=D)))
    with pytest.raises(UserError, match=r"d_out is 12, but the arrays of sae_weights.safetensors have 17"):
        load_dictionary(tmp_path / "a")


@pytest.mark.parametrize(
    ("architecture", "changes", "tensors"),
    [
        *((name, dict(apply_b_dec_to_input=False), {}) for name in ("standard", "topk", "jumprelu", "gated")),
        ("topk", dict(rescale_acts_by_decoder_norm=True), {}),  # folded into the rows
        ("topk", dict(k=F), {}),  # as many as there are
        ("jumprelu", {}, dict(threshold=np.linspace(-2, 1, F, dtype=np.float32))),  # below zero they act like zero
    ],
    ids=str,
)
def test_what_saelens_wrote_is_read_and_written_as_what_it_computes(architecture, changes, tensors, tmp_path):
    folder, x = known.write_saelens(tmp_path / "a", architecture, **changes), known.activations()
    known.change_tensors(folder / WEIGHTS, **tensors)
    dictionary, expected = load_dictionary(folder), known.saelens_by_formula(folder, x)
    known.assert_computes(dictionary, x, expected)
    save_dictionary(tmp_path / "b", dictionary, "saelens")
    assert cfg_of(tmp_path / "b")["apply_b_dec_to_input"] == changes.get("apply_b_dec_to_input", True)
    for again, before in zip(known.saelens_by_formula(tmp_path / "b", x), expected, strict=True):
        assert known.relative(again, before) < 1e-5


def test_the_layout_is_that_of_saelens(tmp_path):
    save_dictionary(tmp_path / "sae", known.make("batchtopk"), "saelens")
    save_dictionary(tmp_path / "plt", known.make("standard", "skip_transcoder"), "saelens")
    sae, plt = cfg_of(tmp_path / "sae"), cfg_of(tmp_path / "plt")
    usual = {"d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations", "reshape_activations"}
    assert set(sae) == usual | {"metadata", "architecture"} and set(plt) == set(sae) | {"d_out"}
    assert (sae["architecture"], sae["d_in"], sae["d_sae"], sae["dtype"]) == ("jumprelu", D, F, "float32")
    assert sae["apply_b_dec_to_input"] is True and plt["apply_b_dec_to_input"] is False
    assert sae["metadata"]["hook_name"] == "blocks.3.hook_resid_post" and sae["metadata"]["model_name"] == "some/model"
    assert sae["metadata"]["training_architecture"] == "batchtopk"
    assert plt["metadata"]["hook_name"] == "blocks.3.mlp.hook_in"
    assert plt["metadata"]["hook_name_out"] == "blocks.3.hook_mlp_out" and plt["d_out"] == D
    shapes = {name: array.shape for name, array in load_file(tmp_path / "plt" / WEIGHTS).items()}
    assert shapes == {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,), "W_skip": (D, D)}
    assert sorted(path.name for path in (tmp_path / "sae").iterdir()) == [CFG, WEIGHTS]


def test_what_saelens_has_nothing_like_is_refused_by_name(tmp_path):
    negative = known.make("jumprelu")
    negative.threshold_F[...] = jnp.full(F, -1.0)
    refused = [(known.make(*pair), f"SAELens has no architecture for a {pair[0]} ") for pair in known.NOT_IN_SAELENS]
    refused += [(known.make("topk", signed=True), "no TopK that keeps negative activations")]
    for dictionary, message in [*refused, (negative, "thresholds below 0")]:
        with pytest.raises(UserError, match=message):
            save_dictionary(tmp_path / "a", dictionary, "saelens")
        assert not (tmp_path / "a").exists()


def test_matching_pursuit_of_scaled_inputs_searches_with_rows_of_the_trained_length(tmp_path):
    dictionary, x = known.make("matching_pursuit"), known.activations()
    save_dictionary(tmp_path, dictionary, "saelens")
    scaled = dict(normalize_activations="constant_scalar_rescale", activation_normalization_factor=2.5)
    (tmp_path / CFG).write_text(json.dumps(cfg_of(tmp_path) | scaled))
    assert known.relative(load_dictionary(tmp_path)(x), dictionary(2.5 * x) / 2.5) < 1e-5


def test_matching_pursuit_whose_input_keeps_the_bias_adds_none_to_its_output(tmp_path):
    save_dictionary(tmp_path, known.make("matching_pursuit"), "saelens")
    (tmp_path / CFG).write_text(json.dumps(cfg_of(tmp_path) | dict(apply_b_dec_to_input=False)))
    x = known.activations()
    known.assert_computes(load_dictionary(tmp_path), x, known.saelens_by_formula(tmp_path, x))


@pytest.mark.parametrize("architecture", sorted({*saelens.ARCHITECTURES} - {"matching_pursuit"}))
def test_unit_norm_brings_rows_to_length_one_and_keeps_the_output(architecture, tmp_path):
    """It is refused where it would change a TopK."""
    folder, x = known.write_saelens(tmp_path / "a", architecture), known.activations()
    if architecture == "topk":
        with pytest.raises(UserError, match="rows of different lengths"):
            load_dictionary(folder, unit_norm=True)
        save_dictionary(tmp_path / "b", known.make("topk"), "saelens")
        assert load_dictionary(tmp_path / "b", unit_norm=True).config.k == 4
        return
    plain, unit = load_dictionary(folder), load_dictionary(folder, unit_norm=True)
    lengths = np.linalg.norm(plain.W_dec_FxD[...], axis=1)
    np.testing.assert_allclose(np.linalg.norm(unit.W_dec_FxD[...], axis=1), 1, rtol=1e-6)
    assert known.relative(unit.encode(x), plain.encode(x) * lengths[None]) < 1e-5
    assert known.relative(unit(x), plain(x)) < 1e-5


@pytest.mark.parametrize(("norm", "bos"), [("layer_norm", "auto"), ("token_norm", "always"), ("center", "never")])
def test_conventions_of_training_are_written(norm, bos, tmp_path):
    dictionary = known.make("standard", input_norm=norm, bos=bos, model="gpt2")
    save_dictionary(tmp_path, dictionary, "saelens")
    assert load_dictionary(tmp_path).config == dictionary.config


def test_what_was_trained_as_something_else_says_so(tmp_path):
    details = dict(k=16.0, matryoshka_widths=[10, 20], decoder_init_norm=0.1)
    metadata = dict(metadata__training_architecture="matryoshka_batchtopk")
    metadata |= dict(metadata__training_architecture_details=details)
    config = load_dictionary(known.write_saelens(tmp_path, "jumprelu", **metadata)).config
    assert (config.kind, config.k, config.groups) == ("matryoshka", 16, (10, 20, F))
    # The threshold is in the file, so a k that says nothing stops no one.
    details["k"] = F + 1
    assert load_dictionary(known.write_saelens(tmp_path / "k", "jumprelu", **metadata)).config.kind == "jumprelu"


@pytest.mark.parametrize(
    "architecture,changes,message",
    [
        ("transcoder", dict(normalize_activations="layer_norm"), "'layer_norm', which transcoders here do not have"),
        ("standard", dict(reshape_activations="odd"), "reshape_activations is 'odd', expected 'none' or 'hook_z'"),
        ("standard", dict(metadata__hook_head_index=2), "hook_head_index is 2, expected null"),
        ("transcoder", dict(apply_b_dec_to_input=True), "apply_b_dec_to_input is True, expected False"),
        ("transcoder", dict(d_out=D + 4), r"d_out is 16, but the arrays"),
        ("matching_pursuit", {}, "residual_threshold and stop_on_duplicate_support end its search early"),
        ("topk", dict(k=F + 1), "k is 41: expected a whole number from 1 to the 40"),
        ("topk", dict(k=...), "k is None"),
        ("topk", dict(k=0), "k is 0: expected a whole number above 0"),
        ("standard", dict(d_sae="many"), "d_sae is 'many'"),
        ("standard", dict(architecture="batchtopk"), "checkpoint of training"),
        ("standard", dict(metadata=[3]), "is not the description of a dictionary"),
        ("standard", dict(metadata__hook_name="blocks.0.attn.hook_q"), "the hook blocks.0.attn.hook_q is none of the"),
        ("standard", FOLDED, "fold_ln changes the values at mlp_in.0"),
        ("jumprelu", UNTOLD, "training_architecture_details is damaged"),
        ("standard", dict(metadata__saejax=dict(max_norm="big")), "metadata.saejax .* is damaged"),
        ("standard", dict(tensors=dict(b_enc=...)), "lacks b_enc: it has W_dec, W_enc, b_dec"),
        ("standard", dict(tensors=dict(scaling_factor=ZEROS + 2)), "finetuning_scaling_factor is not set"),
        ("standard", dict(finetuning_scaling_factor=True), "finetuning_scaling_factor is set, but"),
        ("standard", dict(tensors=dict(b_enc=np.append(ZEROS, ZEROS[:1]))), r"b_enc has the shape \(41,\), expected"),
        ("standard", dict(tensors=dict(W_dec=WIDE)), "reads width 12 and writes width 13"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_followed_or_does_not_fit_is_refused_by_name(architecture, changes, message, tmp_path):
    settings = {name: value for name, value in changes.items() if name != "tensors"}
    folder = known.write_saelens(tmp_path, architecture, **settings)
    known.change_tensors(folder / WEIGHTS, **changes.get("tensors", {}))
    with pytest.raises(UserError, match=message):
        load_dictionary(folder)


def test_damaged_files_are_refused(tmp_path):
    folder = known.write_saelens(tmp_path, "standard")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5])
    with pytest.raises(UserError, match="truncated"):
        load_dictionary(folder)
    for text, wrong in (("{", "is not valid JSON"), ("[]", "holds a list"), ("null", "holds null")):
        (folder / CFG).write_text(text)
        with pytest.raises(UserError, match=f"{wrong}.*: expected the description of a dictionary; fetch it again"):
            load_dictionary(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match="description alone: sae_weights.safetensors"):
        load_dictionary(folder)
    known.write_saelens(tmp_path, "standard")
    (folder / CFG).unlink()
    with pytest.raises(UserError, match=r"cfg.json does not exist"):
        load_dictionary(folder)


def test_sites_can_be_given_where_the_file_names_no_site(tmp_path):
    hook = dict(metadata__hook_name="blocks.0.hook_mlp_in")
    folder = known.write_saelens(tmp_path / "a", "transcoder", **hook)
    config = load_dictionary(folder, site="mlp_in.0").config
    assert (config.site, config.target) == ("mlp_in.0", "mlp_out.2")
    nameless = known.write_saelens(tmp_path / "b", "transcoder", metadata__hook_name=..., metadata__hook_name_out=...)
    dictionary = load_dictionary(nameless)
    assert (dictionary.config.site, dictionary.config.target) == ("unknown", "unknown")
    save_dictionary(tmp_path / "c", dictionary, "saelens")
    assert load_dictionary(tmp_path / "c").config == dictionary.config
    dictionary = load_dictionary(known.write_saelens(tmp_path / "d", "standard"), site="resid_post.7")
    save_dictionary(tmp_path / "e", dictionary, "saelens")
    assert cfg_of(tmp_path / "e")["metadata"]["hook_name"] == "blocks.7.hook_resid_post"
    assert load_dictionary(tmp_path / "e").site == "resid_post.7"


def test_nothing_is_replaced_or_half_written(tmp_path, monkeypatch):
    """The description appears last: a folder of a killed process is not taken for a whole one."""
    order, replace = [], tensors.os.replace
    with monkeypatch.context() as patch:
        patch.setattr(tensors.os, "replace", lambda a, b: (order.append(b), replace(a, b)))
        save_dictionary(tmp_path / "a", known.make(), "saelens")
    assert [path for path in order if path.parent == tmp_path / "a"] == [tmp_path / "a" / WEIGHTS, tmp_path / "a" / CFG]
    with pytest.raises(UserError, match=r"already holds cfg.json"):
        save_dictionary(tmp_path / "a", known.make(), "saelens")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saelens, "write_json", fail)
    with pytest.raises(OSError):
        save_dictionary(tmp_path / "b", known.make(), "saelens")
    assert list((tmp_path / "b").iterdir()) == []
    monkeypatch.undo()
    save_dictionary(tmp_path / "b", known.make(), "saelens")
    (tmp_path / "file").write_text("")
    for folder, kind, message in (
        ("file", "saelens", "is a file"),
        ("c", "pickle", "unknown format 'pickle': expected one of saejax, saelens"),
        ("c", "circuit_tracer", "use save_transcoders"),
    ):
        with pytest.raises(UserError, match=message):
            save_dictionary(tmp_path / folder, known.make(), kind)
