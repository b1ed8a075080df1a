"""A dictionary of any format becomes the state that training starts from, and comes back as it was."""

import contextlib
import dataclasses
import json
import tracemalloc
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_kind import KINDS
from safetensors.numpy import save_file
from small_stacks import D, F, make_stack

from saejax.dictionaries import Dictionary, DictionaryConfig, rescale, save_dictionary
from saejax.dictionaries.formats import save_transcoders
from saejax.dictionaries.hashes import hash_dictionaries
from saejax.errors import UserError
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.training.init_from import state_from_folder
from saejax.training.state import abstract_state, finish_dictionary, init_state

SKIP = dict(form="skip_transcoder", sites=("mlp_in.1",))


def random_dictionary(kind="topk", seed=0, described=None, **changes) -> Dictionary:
    """One with decoder rows of length 1, as a stack of these settings writes it."""
    made = make_stack(kind, **changes)
    blank = finish_dictionary(made, init_state(made), 0)
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=array.shape) for name, array in blank.arrays.items()}
    arrays["W_dec_FxD"] /= np.linalg.norm(arrays["W_dec_FxD"], axis=1, keepdims=True)
    if "threshold_F" in arrays:
        arrays["threshold_F"] = np.abs(arrays["threshold_F"])
    config = dataclasses.replace(blank.config, **described or {})
    return Dictionary(config, **{name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()})


def started(kind, folder, index=0, scale=0.3, **changes) -> Dictionary:
    """What training from a folder would write after no step."""
    stack = make_stack(kind, scale=scale, init_from=str(folder), **changes)
    if stack.config.form != "sae":
        stack = dataclasses.replace(stack, scales=[dataclasses.replace(one, output=0.7) for one in stack.scales])
    state = state_from_folder(stack, str(folder))
    for leaf, abstract in zip(jax.tree.leaves(state), jax.tree.leaves(abstract_state(stack)), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (abstract.shape, abstract.dtype, abstract.sharding)
    return finish_dictionary(stack, state, index)


def assert_same(a: Dictionary, b: Dictionary, without=()) -> None:
    for name in set(a.arrays) - set(without):
        np.testing.assert_allclose(a.arrays[name], b.arrays[name], rtol=2e-6, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((kind, {}) for kind in KINDS),
        ("jumprelu", SKIP),
        *(pytest.param(kind, SKIP, marks=pytest.mark.slow) for kind in KINDS if kind != "jumprelu"),
    ],
)
def test_the_inverse_of_finish(tmp_path, kind, changes):
    dictionary = random_dictionary(kind, **changes)
    save_dictionary(tmp_path / "made", dictionary)
    running = ("threshold_F",) if kind in ("batchtopk", "matryoshka") else ()
    assert_same(started(kind, tmp_path / "made", **changes), dictionary, without=running)
    if kind == "gated":
        save_dictionary(tmp_path / "copied", dictionary)
        save_dictionary(tmp_path / "changed", random_dictionary(kind, seed=1, **changes))
        same, copied, changed = (hash_dictionaries(str(tmp_path / name)) for name in ("made", "copied", "changed"))
        assert same == copied != changed, "the identity is of the content"


def test_formats_of_other_tools(tmp_path):
    jumprelu = random_dictionary("jumprelu", described=dict(centred=False))
    save_dictionary(tmp_path / "saelens", jumprelu, "saelens")
    x = np.random.default_rng(1).normal(size=(20, D)).astype(np.float32)
    centred = started("jumprelu", tmp_path / "saelens")  # the encoder's bias has taken over the decoder's
    assert centred.config.centred
    np.testing.assert_allclose(centred(x), jumprelu(x), rtol=1e-4, atol=1e-4)
    topk = random_dictionary("topk", seed=1)
    arrays = {name: np.asarray(array) for name, array in topk.arrays.items()}
    (tmp_path / "layers.1").mkdir()
    tensors = dict(W_dec=2 * arrays["W_dec_FxD"], b_dec=arrays["b_dec_D"])  # rows of length 2
    tensors |= {"encoder.weight": arrays["W_enc_DxF"].T.copy(), "encoder.bias": arrays["b_enc_F"]}
    save_file(tensors, tmp_path / "layers.1" / "sae.safetensors")
    (tmp_path / "layers.1" / "cfg.json").write_text(json.dumps(dict(d_in=D, num_latents=F, k=4)))
    found = started("topk", tmp_path / "layers.1")
    np.testing.assert_allclose(found.W_dec_FxD[...], topk.W_dec_FxD[...], atol=1e-6)
    np.testing.assert_allclose(found.W_enc_DxF[...], 2 * topk.W_enc_DxF[...], atol=1e-5)
    form = dict(form="transcoder")
    layers = [random_dictionary("standard", layer, sites=(f"mlp_in.{layer}",), **form) for layer in (0, 1)]
    save_transcoders(tmp_path / "set", layers)
    for index, layer in enumerate((1, 0)):
        sites = ("mlp_in.1", "mlp_in.0")
        assert_same(started("standard", tmp_path / "set", index, sites=sites, **form), layers[layer])
    with pytest.raises(UserError, match="has layers 0 to 1, not the 2 of mlp_in.2"):
        started("standard", tmp_path / "set", sites=("mlp_in.2",), **form)


def test_members_start_from_their_namesakes_or_all_from_one(tmp_path):
    several = [random_dictionary(seed=seed) for seed in (0, 1)]
    for name, dictionary in zip(("k2", "k4"), several, strict=True):
        save_dictionary(tmp_path / name / "dictionary", dictionary)
    for index in (0, 1):
        assert_same(started("topk", tmp_path, index, k=(2, 4)), several[index])
        assert_same(started("topk", tmp_path / "k2", index, k=(2, 4)), several[0])


def test_members_on_eight_devices_start_with_the_same_bits_and_no_host_holds_a_whole_matrix(tmp_path, monkeypatch):
    features = 2**14
    monkeypatch.setattr(rescale, "_AT_ONCE", 512)
    save_dictionary(tmp_path / "narrow", random_dictionary("jumprelu", features=features - 2048))
    changes = dict(features=features, scale=0.3, l0_coefficient=(0.01, 0.02), init_from=str(tmp_path / "narrow"))
    alone = make_stack("jumprelu", **changes)
    expected = state_from_folder(alone, alone.config.init_from).params
    split = make_stack("jumprelu", mesh=make_mesh(MeshConfig(member=2, model=4)), **changes)
    state_from_folder(split, split.config.init_from)  # compiles
    tracemalloc.start()
    params = state_from_folder(split, split.config.init_from).params
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for name, array in expected.items():
        np.testing.assert_array_equal(params[name], array, err_msg=name)
    # Two matrices with rows of length 1 and two scaled ones, while a part is computed; whole in float64 there were 17.
    matrix = features * D * 4
    assert peak < 8 * matrix, f"{peak / matrix:.1f} matrices"


@pytest.mark.parametrize("kind", [pytest.param("topk", marks=pytest.mark.slow), "jumprelu", "matryoshka"])
def test_a_dictionary_is_widened(tmp_path, kind):
    """The features that there are come first, and the others are those of a random start."""
    narrow = random_dictionary(kind)
    save_dictionary(tmp_path / "narrow", narrow)
    wide, f = dict(features=70), narrow.config.n_features
    found, random = started(kind, tmp_path / "narrow", **wide), make_stack(kind, scale=0.3, **wide)
    random = finish_dictionary(random, init_state(random), 0)
    assert found.config.n_features == 70 > f
    for name, array in found.arrays.items():
        if name == "b_dec_D" or (name == "threshold_F" and kind == "matryoshka"):  # which starts anew
            continue
        axis = name.rpartition("_")[2].split("x").index("F")
        old, new = np.split(np.asarray(array), [f], axis)
        blank = np.split(np.asarray(random.arrays[name]), [f], axis)[1]
        np.testing.assert_allclose(old, narrow.arrays[name], rtol=2e-6, atol=2e-6, err_msg=name)
        np.testing.assert_allclose(new, blank, rtol=2e-6, atol=2e-6, err_msg=name)


def test_a_crosscoder_starts_with_the_scales_of_its_parts_in_place_of_those_that_it_had(tmp_path):
    widths = (6, D - 6)
    described = dict(site="resid_post.0+resid_post.1", widths=widths, scales=(1.0, 1.0), max_norms=(9.0, 9.0))
    published = random_dictionary("standard", described=described)
    save_dictionary(tmp_path / "cross", published)
    stack = make_stack("standard", scale=1.0, init_from=str(tmp_path / "cross"))
    dictionary = dataclasses.replace(stack.dictionary, widths=widths, site=described["site"])
    scales = [dataclasses.replace(each, scales=(0.5, 3.0), max_norms=(9.0, 9.0)) for each in stack.scales]
    joined = dataclasses.replace(stack, dictionary=dictionary, scales=scales)
    found = finish_dictionary(joined, state_from_folder(joined, stack.config.init_from), 0)
    assert found.config.scales == (0.5, 3.0)
    raw = np.random.default_rng(0).normal(size=(20, D)).astype(np.float32)
    factor_D = np.repeat([0.5, 3.0], widths).astype(np.float32)
    np.testing.assert_allclose(np.asarray(found(raw * factor_D)) / factor_D, published(raw), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"parts is \(6, 10\), expected none$"):
        state_from_folder(stack, stack.config.init_from)


def test_what_a_crosscoder_lacks_is_looked_for_in_parts_as_it_scaled_them(tmp_path):
    """One that explains all at its own scales lacks nothing at those of the rows, too."""
    half = D // 2
    parts = dict(widths=(half, half), scales=(1.0, 1.0), max_norms=(9.0, 9.0))
    config = DictionaryConfig("standard", "resid_post.0+resid_post.1", d_in=D, n_features=half, **parts)
    rows_FxD = np.tile(np.eye(half, dtype=np.float32), 2) / 2
    arrays = dict(W_enc_DxF=2 * rows_FxD.T, W_dec_FxD=rows_FxD, b_enc_F=np.zeros(half), b_dec_D=np.zeros(D))
    arrays = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    save_dictionary(tmp_path / "cross", Dictionary(config, **arrays))
    stack = make_stack("standard", init_from=str(tmp_path / "cross"), widen="errors")
    dictionary = dataclasses.replace(config, n_features=stack.dictionary.n_features)
    scales = [dataclasses.replace(each, scales=(0.5, 4.0), max_norms=(9.0, 9.0)) for each in stack.scales]
    raw = np.random.default_rng(0).exponential(size=(2000, half)).astype(np.float32) @ rows_FxD
    rows = SimpleNamespace(
        rows=lambda *sites: np.arange(len(raw)), read=lambda site, rows: raw[rows] * np.repeat([0.5, 4.0], half)
    )
    joined, lines = dataclasses.replace(stack, dictionary=dictionary, scales=scales), []
    state_from_folder(joined, stack.config.init_from, rows, lines.append)
    assert lines[1] == f"found 0 of {dictionary.n_features - half} features in errors"


def test_training_says_that_it_does_not_keep_negative_activations(tmp_path):
    save_dictionary(tmp_path / "signed", random_dictionary(described=dict(signed=True)))
    lines = []
    state_from_folder(make_stack(init_from=str(tmp_path)), str(tmp_path / "signed"), say=lines.append)
    assert len(lines) == 1 and lines[0].endswith("keeps activations below 0, too; training keeps those above 0 alone")


@pytest.mark.parametrize(
    ("factor", "message"), [(0.0, "1 decoder rows are zero, such as 5"), (2.0, "lengths from 1 to 2")]
)
def test_rows_that_training_could_not_keep(tmp_path, factor, message):
    dictionary = random_dictionary()
    changed = dictionary.arrays | dict(W_dec_FxD=dictionary.W_dec_FxD[...].at[5].multiply(factor))
    save_dictionary(tmp_path / "changed", Dictionary(dictionary.config, **changed))
    with pytest.raises(UserError, match=message):
        started("topk", tmp_path / "changed")


def test_what_does_not_fit_is_listed(tmp_path):
    save_dictionary(tmp_path / "topk", random_dictionary(described=dict(model="some/model", fingerprint="12")))
    with pytest.raises(UserError, match="does not fit: kind is topk, expected standard; form is SAE, expected transc"):
        started("standard", tmp_path / "topk", form="transcoder", sites=("mlp_in.1",))
    with pytest.raises(UserError, match="holds no dictionary"):
        started("topk", tmp_path / "nowhere")
    transcoder = dict(form="transcoder", sites=("mlp_in.1",), target="mlp_out")
    save_dictionary(tmp_path / "transcoder", random_dictionary(**transcoder))
    assert started("topk", tmp_path / "transcoder", **transcoder | dict(sites=("mlp_in.2",)))
    with pytest.raises(UserError, match="does not fit: target is mlp_out, expected resid_post$"):
        started("topk", tmp_path / "transcoder", **transcoder | dict(target="resid_post"))
    save_dictionary(tmp_path / "normal", random_dictionary(described=dict(input_norm="layer_norm")))
    with pytest.raises(UserError, match="normalisation is layer_norm, expected none$"):
        started("topk", tmp_path / "normal")
    for changes, message in [
        (dict(n_features=63), "features is 64, expected at most 63$"),
        (dict(d_in=8), "width is 16, expected 8$"),
        (dict(model="some/model", fingerprint="13"), r"model is some/model \(12\), expected some/model \(13\)$"),
        (dict(model="gpt2"), "model is some/model, expected gpt2"),  # a file of another tool has no fingerprint
        (dict(model="SOME/Model/"), ""),
        (dict(model=""), ""),
    ]:
        stack = make_stack(init_from=str(tmp_path / "topk"))
        stack = dataclasses.replace(stack, dictionary=dataclasses.replace(stack.dictionary, **changes))
        with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
            state_from_folder(stack, stack.config.init_from)
