"""Dictionaries: parts of them, rounded products, files, and what programs take."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compared import live_bytes
from jax.sharding import NamedSharding, PartitionSpec

from saejax.dictionaries import Dictionary, DictionaryConfig, formats, kinds, load_dictionary, save_dictionary
from saejax.dictionaries.kinds.groups import group_reconstructions
from saejax.dictionaries.matmul import matmul
from saejax.dictionaries.modules import parameter_table
from saejax.errors import UserError
from saejax.models.edits import ForwardPass
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig


def make(kind="topk", n_features=40, k=4) -> Dictionary:
    config = DictionaryConfig(kind=kind, site="resid_post.1", d_in=12, n_features=n_features, k=k, max_norm=1e9)
    dictionary = Dictionary.initial(config, jax.random.key(3))
    rng = np.random.default_rng(4)
    dictionary.b_enc_F[...] = jnp.asarray(rng.normal(size=n_features) * 0.1, jnp.float32)
    dictionary.b_dec_D[...] = jnp.asarray(rng.normal(size=12), jnp.float32)
    dictionary.W_enc_DxF[...] = jnp.asarray(rng.normal(size=(12, n_features)), jnp.float32)
    return dictionary


def activations(*shape: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 2


@pytest.mark.parametrize("shape", [(12,), (1, 12), (2, 3, 12), (0, 12)])
def test_any_leading_dimensions(shape):
    dictionary = make()
    assert dictionary.encode(activations(*shape)).shape == (*shape[:-1], 40)
    assert dictionary(activations(*shape)).shape == shape
    np.testing.assert_allclose(np.linalg.norm(dictionary.W_dec_FxD[...], axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("kind", [*kinds.KINDS])
def test_some_features_are_encoded_as_all_are(kind):
    dictionary, x = make(kind, n_features=640), activations(30, 12)
    features = np.array([3, 0, 639, 77])
    few = dictionary.encode_features(x, features)
    np.testing.assert_allclose(few, dictionary.encode(x)[:, features], rtol=1e-5, atol=1e-5)
    assert dictionary.encode_features(x, features[:0]).shape == (30, 0)


@pytest.mark.parametrize("kind", ["topk", "matching_pursuit"])
def test_a_second_call_compiles_nothing(kind, caplog):
    """Outside of a program, too, where a loop made of new functions would be compiled in every call."""
    counts = []
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        for seed in (5, 6):
            caplog.clear()
            make(kind, n_features=656)(activations(31, 12, seed=seed))
            counts.append(sum(record.getMessage().startswith("Compiling") for record in caplog.records))
    assert counts[0] > 3 and counts[1] == 0


class DropsNaN(kinds.Kind):
    """A kind of a user, whose comparison is false for NaN."""

    name, about = "drops_nan", "keeps what is above 1"

    def encode(self, dictionary, inputs, numbers):
        return jnp.where(inputs.pre_xF > 1, inputs.pre_xF, 0.0)


@pytest.mark.parametrize("kind", [*kinds.KINDS, "signed", "normalised", "drops_nan"])
def test_a_token_that_is_not_finite_has_nan_for_every_feature(kind, monkeypatch):
    """So no feature counts as silent there; other tokens are as ever."""
    monkeypatch.setitem(kinds.KINDS, "drops_nan", DropsNaN())
    changes = dict(signed=dict(signed=True), normalised=dict(input_norm="layer_norm")).get(kind, {})
    dictionary, x = make("topk" if changes else kind, n_features=640), activations(6, 12)
    dictionary = dictionary.with_config(dataclasses.replace(dictionary.config, **changes))
    damaged, features = x.copy(), np.array([3, 77])
    damaged[[1, 4], 5] = np.nan, np.inf
    for encode, every in (
        (dictionary.encode, dictionary.encode(x)),
        (jax.jit(lambda x: dictionary.encode(x)), dictionary.encode(x)),
        (lambda x: dictionary.encode_features(x, features), dictionary.encode_features(x, features)),
        (dictionary, dictionary(x)),
    ):
        found = np.asarray(encode(damaged))
        assert np.isnan(found[[1, 4]]).all()
        np.testing.assert_allclose(np.delete(found, [1, 4], axis=0), np.delete(every, [1, 4], axis=0), 1e-5, 1e-5)


@pytest.mark.parametrize("kind", ["jumprelu", "gated", "linear"])  # the others are one of these
def test_an_edit_of_few_features_encodes_no_others(kind):
    """By the operations of its compiled program."""
    dictionary, x = make(kind, n_features=4096), activations(1, 30, 12)
    edit, run = dictionary.ablate([3, 77]), ForwardPass.over(np.ones((1, 30), bool))
    operations = jax.jit(lambda x: edit(x, run)).lower(x).compile().cost_analysis()["flops"]
    assert operations < 0.1 * 2 * 30 * 12 * 4096


def test_without_decoder_rows_a_dictionary_encodes_the_same():
    """As in attribution, and as the layers of a cross-layer transcoder, which have joined norms in their place."""
    dictionary, x = make("jumprelu"), activations(30, 12)
    arrays = {name: array for name, array in dictionary.arrays.items() if name != "W_dec_FxD"}
    encoder = Dictionary(dictionary.config, **arrays, decoder_norms_F=jnp.arange(40.0))
    np.testing.assert_array_equal(encoder.encode(x), dictionary.encode(x))
    few = encoder.restrict(np.array([5, 2])).encode(x)
    np.testing.assert_allclose(few, dictionary.encode(x)[:, [5, 2]], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(encoder.decoder_norms_F, np.arange(40))
    assert sorted(encoder.arrays) == sorted(arrays)
    with pytest.raises(KeyError, match="b_enc_F"):
        Dictionary(dictionary.config, W_enc_DxF=arrays["W_enc_DxF"])


def test_values_of_another_width_are_refused():
    dictionary, x = make(), activations(3, 12)
    for wrong in (lambda: dictionary.encode(x[:, :11]), lambda: dictionary(x.T)):
        with pytest.raises(UserError, match=r"expected \[..., 12\], as this topk dictionary has 12 dimensions and 40"):
            wrong()
    with pytest.raises(UserError, match=r"values of the shape \[3, 39\]: expected \[..., 40\]"):
        dictionary.decode(dictionary.encode(x)[:, :39])


def test_a_kind_that_overrides_encode_must_say_again_that_it_is_elementwise():
    class Sharpened(kinds.JumpReLU):
        def encode(self, dictionary, inputs, numbers):
            return jax.nn.softmax(inputs.pre_xF)

    assert kinds.JumpReLU.is_elementwise() and not Sharpened.is_elementwise() and not kinds.TopK.is_elementwise()


def test_bfloat16_products_round_operands_and_sum_in_float32():
    a, b = jnp.asarray(activations(7, 300)), jnp.asarray(activations(300, 5, seed=6))
    rounded = np.matmul(*(np.asarray(x.astype(jnp.bfloat16), np.float64) for x in (a, b)))
    product = matmul(a, b, "bfloat16")
    assert product.dtype == jnp.float32
    np.testing.assert_allclose(product, rounded, rtol=1e-4, atol=1e-4)
    grad_a, grad_b = jax.grad(lambda a, b: jnp.sum(matmul(a, b, "bfloat16") ** 2), (0, 1))(a, b)
    np.testing.assert_allclose(grad_a, 2 * rounded @ b.T, rtol=0.03, atol=0.03 * np.abs(grad_a).max())
    np.testing.assert_allclose(grad_b, a.T @ (2 * rounded), rtol=0.03, atol=0.03 * np.abs(grad_b).max())


def test_a_saved_dictionary_comes_back_the_same(tmp_path):
    for kind in kinds.KINDS:
        dictionary, x = make(kind), activations(20, 12)
        save_dictionary(tmp_path / kind, dictionary)
        loaded = load_dictionary(tmp_path / kind)
        assert loaded.config == dictionary.config
        np.testing.assert_array_equal(loaded.encode(x), dictionary.encode(x))
        with pytest.raises(UserError, match="already holds"):
            save_dictionary(tmp_path / kind, dictionary)


def test_what_was_saved_in_float64_or_by_an_earlier_version_is_read(tmp_path):
    """Fields that went are left out, and those that came have their defaults; what nobody knows is refused."""
    dictionary = make()
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(np.asarray(array, np.float64)) for name, array in dictionary.arrays.items()}
        save_dictionary(tmp_path / "double", Dictionary(dictionary.config, **arrays))
    description = tmp_path / "double" / "dictionary.json"
    saved = json.loads(description.read_text())
    assert saved["arrays"]["W_enc_DxF"]["dtype"] == "float64"
    del saved["config"]["bos"]
    description.write_text(json.dumps(saved | dict(config=saved["config"] | dict(context=128))))
    loaded = load_dictionary(tmp_path / "double")
    assert loaded.config == dictionary.config and loaded.W_enc_DxF.dtype == jnp.float32
    np.testing.assert_array_equal(loaded.W_enc_DxF[...], dictionary.W_enc_DxF[...])
    description.write_text(json.dumps(saved | dict(config=saved["config"] | dict(other=1))))
    with pytest.raises(UserError, match=r"\['other'\] are unknown: an older or a newer version"):
        load_dictionary(tmp_path / "double")
    for of_newer in (dict(schema_version=2), dict(other=1)):
        description.write_text(json.dumps(saved | of_newer))
        with pytest.raises(UserError, match=f"{next(iter(of_newer))}|schema version 2.*a newer one wrote it"):
            load_dictionary(tmp_path / "double")
    del saved["schema_version"]  # as the first files
    description.write_text(json.dumps(saved))
    assert load_dictionary(tmp_path / "double").config == dictionary.config
    del saved["config"]["kind"]
    description.write_text(json.dumps(saved))
    with pytest.raises(UserError, match="does not say kind"):
        load_dictionary(tmp_path / "double")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("k", 0, "k is 0: expected a whole number from 1 to the 12 features"),
        ("k", 13, "k is 13: expected a whole number from 1 to the 12 features"),
        ("k", "3", "'3' in config.k, expected int"),
        ("centred", "no", "'no' in config.centred, expected bool"),
        ("scales", 3, "3 in config.scales"),
        ("groups", None, "None in config.groups"),
        ("n_features", 0, "config.n_features is 0: expected at least 1"),
    ],
)
def test_a_description_with_a_value_that_cannot_be_is_refused(tmp_path, name, value, message):
    save_dictionary(tmp_path / "topk", make("topk", n_features=12))
    description = tmp_path / "topk" / "dictionary.json"
    saved = json.loads(description.read_text())
    description.write_text(json.dumps(saved | dict(config=saved["config"] | {name: value})))
    with pytest.raises(UserError, match=message):
        formats.read_config(tmp_path / "topk")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(k=0), "k is 0: expected a whole number from 1 to the 40 features"),
        (dict(k=41), "k is 41: expected"),
        (dict(kind="jumprelu"), r"would take other arrays \(threshold\)"),
        (dict(skip=True), r"would take other arrays \(W_skip\)"),
        (dict(n_features=3), r"would take other arrays \(W_dec, W_enc, b_enc\)"),
    ],
)
def test_a_config_that_does_not_fit_the_arrays_is_refused(changes, message):
    dictionary = make("topk")
    with pytest.raises(UserError, match=message):
        dictionary.with_config(dataclasses.replace(dictionary.config, **changes))
    assert dictionary.with_config(dataclasses.replace(dictionary.config, k=7)).config.k == 7


def test_values_that_are_no_array_and_other_meshes_are_refused(tmp_path):
    dictionary = make("topk")
    save_dictionary(tmp_path / "topk", dictionary)
    for values in ([0.0] * 12, None, "x"):  # not by ``encode``, whose argument the tests' own check takes for an array
        with pytest.raises(UserError, match=r"expected an array \[..., 12\]"):
            dictionary._check_width(values, 12)
    for mesh in (3, MeshConfig(), jax.sharding.Mesh(np.array(jax.devices()), ("x",))):
        for call in (dictionary.on_mesh, lambda mesh: load_dictionary(tmp_path / "topk", mesh=mesh)):
            with pytest.raises(UserError, match="expected one with the axes member, data, model"):
                call(mesh)


@pytest.mark.parametrize("format", ["saejax", "saelens"])
def test_a_dictionary_is_written_to_folders_alone(tmp_path, format):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "inside", ""):
        with pytest.raises(UserError, match="file is a file: name a folder|the folder to write to is empty"):
            save_dictionary(folder, make("topk"), format)
    with pytest.raises(UserError, match="cannot be a folder"):
        load_dictionary("x" * 300)


def test_devices_write_and_read_their_parts_alone(tmp_path, monkeypatch):
    """No device, and no copy on the host, has more than a part of a matrix; files are the same for all meshes."""
    gathered, own = [], formats.own
    monkeypatch.setattr(own, "to_host", lambda array: gathered.append(array.shape) or np.asarray(array))
    config = DictionaryConfig("jumprelu", "resid_post.0", d_in=64, n_features=512)
    table = parameter_table(config)
    noise = {name: np.random.default_rng(1).random(shape, np.float32) for name, (shape, _) in table.items()}
    size = sum(array.nbytes for array in noise.values())
    mesh = make_mesh(MeshConfig(model=8))
    before = live_bytes()
    dictionary = Dictionary(config, **noise).on_mesh(mesh)
    save_dictionary(tmp_path / "split", dictionary)
    save_dictionary(tmp_path / "whole", Dictionary(config, **noise))
    description = (tmp_path / "split" / own.DESCRIPTION).read_text()
    assert description == (tmp_path / "whole" / own.DESCRIPTION).read_text()
    del dictionary
    for name in ("split", "whole"):
        loaded = load_dictionary(tmp_path / name, mesh=mesh)
        shares = (live_bytes() - before) / (size / 8)
        assert shares.max() <= 1.3, shares
        for array_name, array in loaded.arrays.items():
            np.testing.assert_array_equal(array, noise[array_name])
            if "F" in array_name:
                assert all(shard.data.size == array.size / 8 for shard in array.addressable_shards)
        del loaded, array
    assert {len(shape) for shape in gathered} == {1}
    for count in (1, 2, 4):
        loaded = load_dictionary(tmp_path / "split", mesh=make_mesh(MeshConfig(model=count), jax.devices()[:count]))
        for array_name, array in loaded.arrays.items():
            np.testing.assert_array_equal(array, noise[array_name])
    file = max((tmp_path / "split" / "arrays").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_dictionary(tmp_path / "split", mesh=mesh)


def test_damaged_and_missing_dictionaries_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no dictionary"):
        load_dictionary(tmp_path)
    with pytest.raises(UserError, match="the path of a dictionary is empty"):
        load_dictionary("")
    save_dictionary(tmp_path / "one", make())
    with pytest.raises(UserError, match=r"resid_post.0\+resid_post.1 is a crosscoder, which has widths of its parts"):
        load_dictionary(tmp_path / "one", site="resid_post.0+resid_post.1")
    save_dictionary(tmp_path / "a", make())
    description = tmp_path / "a" / "dictionary.json"
    description.write_text(description.read_text().replace('"sha256": "', '"sha256": "0', 1))
    with pytest.raises(UserError, match="does not match"):
        load_dictionary(tmp_path / "a")
    save_dictionary(tmp_path / "b", make())
    for path in (tmp_path / "b" / "arrays").rglob("*"):
        if path.is_file() and path.stat().st_size > 200:
            path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        load_dictionary(tmp_path / "b")


def test_a_dictionary_is_a_pytree_that_programs_take_as_it_is():
    traced = []

    @jax.jit
    def encode(dictionary, x):
        traced.append(dictionary.config)
        return dictionary.encode(x)

    plain, doubled, x = make(), jax.tree.map(lambda array: 2 * array, make()), jnp.asarray(activations(3, 12))
    np.testing.assert_allclose(encode(plain, x), plain.encode(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(encode(jax.device_put(doubled), x), doubled.encode(x), rtol=1e-5, atol=1e-5)
    assert len(traced) == 1, "what is static of both is the same"
    encode(make(k=5), x)
    assert len(traced) == 2
    abstract = jax.eval_shape(make)
    assert abstract.config == plain.config and abstract.W_enc_DxF.shape == (12, 40)
    assert jax.tree.structure(abstract) == jax.tree.structure(plain)
    (gradient,) = jax.tree.leaves(jax.grad(lambda dictionary: dictionary(x).sum())(plain).b_dec_D)
    assert gradient.shape == (12,)


@pytest.mark.parametrize(
    ("groups", "matmul_dtype"),
    [
        ((2, 4, 8, 16, 32), "float32"),
        ((8, 24, 32), "bfloat16"),
        *(pytest.param((32,), dtype, marks=pytest.mark.slow) for dtype in ("float32", "bfloat16")),
    ],
)
def test_nested_groups_of_features_that_are_split_over_devices(groups, matmul_dtype):
    """Reconstructions and gradients are those of one device."""
    F, D, B = 32, 6, 8
    rng = np.random.default_rng(0)
    f_BxF, x_BxD, weights_SxBxD = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, F), (B, D), (len(groups), B, D))
    )
    config = DictionaryConfig("matryoshka", "resid_post.1", "", D, F, k=3, groups=groups)
    arrays = {name: value[...] for name, value in Dictionary.initial(config, jax.random.key(0)).arrays.items()}

    def loss(arrays, f_BxF):
        dictionary = Dictionary(config, **arrays)
        dictionary.matmul_dtype = matmul_dtype
        nested_SxBxD = jnp.stack(group_reconstructions(dictionary, f_BxF, x_BxD))
        return (nested_SxBxD * weights_SxBxD).sum(), nested_SxBxD

    run = jax.grad(loss, argnums=(0, 1), has_aux=True)
    mesh = make_mesh(MeshConfig(data=2, model=4), jax.devices()[:8])
    split_BxF = jax.device_put(f_BxF, NamedSharding(mesh, PartitionSpec("data", "model")))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        split = jax.jit(run)(arrays, split_BxF)
    for ours, whole in zip(jax.tree.leaves(split), jax.tree.leaves(jax.jit(run)(arrays, f_BxF)), strict=True):
        np.testing.assert_allclose(ours, whole, atol=1e-5)
