"""The same function in other parameters."""

import jax.numpy as jnp
import known_dictionaries as known
import numpy as np
import pytest

from saejax.dictionaries import rescale


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
