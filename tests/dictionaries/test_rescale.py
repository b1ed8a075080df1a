"""The same function in other parameters."""

import dataclasses
import tracemalloc

import jax.numpy as jnp
import known_dictionaries as known
import numpy as np
import pytest
from safetensors.numpy import load_file

from saejax.dictionaries import Dictionary, rescale
from saejax.dictionaries.formats import circuit_tracer
from saejax.dictionaries.modules import parameter_table, placements
from saejax.parallel.mesh import make_mesh, place_on
from saejax.parallel.settings import MeshConfig


@pytest.mark.parametrize("form", known.FORMS)
def test_a_gated_dictionary_is_a_jumprelu(form):
    gated, x = known.make("gated", form), known.activations(400)
    jumprelu = rescale.as_jumprelu(gated)
    assert jumprelu.config.kind == "jumprelu" and float(jumprelu.threshold_F[...].max()) > 0.1
    f = np.asarray(gated.encode(x))
    np.testing.assert_array_equal(np.asarray(jumprelu.encode(x)) > 0, f > 0)
    assert 0.05 < (f > 0).mean() < 0.6
    known.assert_computes(jumprelu, x, (f, gated(x)), within=1e-6)


@pytest.mark.parametrize("kind", known.KINDS)
def test_the_encoders_bias_can_centre_the_input(kind):
    centred, x = known.make(kind), known.activations()
    uncentred = rescale.centre(centred, False)
    assert not uncentred.config.centred and rescale.centre(uncentred, False) is uncentred
    known.assert_computes(uncentred, x, (centred.encode(x), centred(x)))


@pytest.mark.parametrize("kind", known.KINDS)
def test_decoder_rows_of_any_length(kind):
    """Those of a TopK have one length."""
    dictionary, x = known.make(kind), known.activations()
    factor_F = np.full(known.F, 3.0) if kind == "topk" else np.linspace(0.2, 5, known.F)
    dictionary.W_dec_FxD[...] = dictionary.W_dec_FxD[...] * factor_F[:, None].astype(np.float32)
    if kind != "topk":
        dictionary.W_dec_FxD[...] = dictionary.W_dec_FxD[...].at[7].set(0)
        factor_F[7] = 1
    unit = rescale.unit_decoder(dictionary)
    lengths_F = np.ones(known.F)
    lengths_F[7] = kind == "topk"
    np.testing.assert_allclose(np.linalg.norm(unit.W_dec_FxD[...], axis=1), lengths_F, rtol=1e-6)
    known.assert_computes(unit, x, (dictionary.encode(x) * factor_F[None].astype(np.float32), dictionary(x)))


@pytest.mark.parametrize("norm", ["layer_norm", "token_norm"])
def test_in_output_units_what_a_feature_adds_is_its_activation_times_its_row(norm):
    dictionary, x = known.make("topk", input_norm=norm, signed=True), jnp.asarray(known.activations())
    scaled = rescale.to_output_units(dictionary)
    scale = np.asarray(dictionary.output_scale(x))
    np.testing.assert_allclose(scaled.encode(x), np.asarray(dictionary.encode(x)) * scale, rtol=1e-5)
    np.testing.assert_allclose(scaled(x), dictionary(x), rtol=1e-4, atol=1e-4)
    f = scaled.encode(x)
    without = scaled.decode(f.at[:, 3].set(0.0), x)
    added = np.asarray(f)[:, 3, None] * np.asarray(scaled.W_dec_FxD[3])
    np.testing.assert_allclose(scaled(x) - without, added, atol=1e-4)
    assert scaled.output_scale(x) is None and rescale.to_output_units(known.make()).config == known.make().config


def save_set(folder, dictionary):
    """Write a set of one layer: as a threshold and without a bias on the input, so that every array is computed."""
    circuit_tracer.save(folder, [dictionary])


def save_cross_layer(folder, dictionary):
    """Write a cross-layer transcoder of one layer."""
    plain = rescale.as_jumprelu(dictionary)
    circuit_tracer.save_cross_layer(folder, 1, lambda layer: (plain, plain.W_dec_FxD[...][:, None]))


@pytest.mark.parametrize("save", [save_set, save_cross_layer])
def test_split_features_are_folded_and_written_by_each_device(save, tmp_path, monkeypatch):
    """The same files, and the host holds no whole matrix besides the new ones, of devices that share its memory."""
    monkeypatch.setattr(rescale, "_AT_ONCE", 1024)
    features, width = 2**15, 64
    small = known.make("gated", "transcoder", layer=0).config
    config = dataclasses.replace(small, d_in=width, n_features=features, centred=True)
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=of[0]).astype(np.float32) for name, of in parameter_table(config).items()}
    mesh = make_mesh(MeshConfig(model=8))
    split = Dictionary(config, **{name: place_on(arrays[name], to) for name, to in placements(config, mesh).items()})
    save(tmp_path / "whole", Dictionary(config, **{name: jnp.asarray(array) for name, array in arrays.items()}))
    save(tmp_path / "warm", split)  # compiles
    change, held = rescale.change_in_pieces, []

    def count_features(config, arrays, *more):
        held.append(len(arrays["b_enc_F"]))
        return change(config, arrays, *more)

    monkeypatch.setattr(rescale, "change_in_pieces", count_features)
    tracemalloc.start()
    save(tmp_path / "split", split)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert set(held) == {features // 8}
    # New matrices are two, and two more while the first ones wait to be freed, where JAX reads NumPy's memory and
    # copies nothing. Whole ones in float64 would be four more.
    assert peak < 4 * features * width * 4, f"{peak / 2**20:.1f} MiB"
    files = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert files
    for file in files:
        whole, parts = (load_file(tmp_path / folder / file) for folder in ("whole", "split"))
        assert whole.keys() == parts.keys()
        for name, array in whole.items():
            # Each device sums its own features' shift of the bias.
            np.testing.assert_allclose(parts[name], array, rtol=1e-6, atol=1e-6, err_msg=name)
