"""Feature absorption against its formula, word by word, and in a world where it is known."""

import jax
import numpy as np
import pytest

import saejax
from saejax.dictionaries import DictionaryConfig
from saejax.dictionaries.rescale import to_output_units
from saejax.errors import UserError
from saejax.interpret import absorption
from saejax.interpret.absorption import absorption_of_words, fit_probes, fit_sparse_probes, score_letters


def of_one_word(f_F, x_D, W_dec_FxD, probe_D, split):
    """The written definitions, feature by feature."""
    p_D = probe_D / np.sqrt(sum(value**2 for value in probe_D))
    projection, added, cosine = float(x_D @ p_D), [], []
    for f, row_D in zip(f_F, W_dec_FxD, strict=True):
        added.append(float(f * (row_D @ p_D)))
        cosine.append(float(row_D @ p_D / np.sqrt(row_D @ row_D)))
    others = sorted(added[i] for i in range(len(f_F)) if i not in split and cosine[i] >= 0.1 and added[i] > 0)[-3:]
    of_split, absorbed = sum(added[i] for i in split), sum(others)
    fraction = 0.0
    if of_split < projection and projection > 0 and absorbed / projection >= 0.4:
        rest = min(absorbed, projection - of_split)
        fraction = 1.0 if of_split <= 0 else rest / (rest + of_split)
    top = int(np.argmax(added))
    silent = all(abs(f_F[i]) < 1e-8 for i in split)
    full = silent and cosine[top] >= 0.025 and projection > 0 and added[top] / projection >= 0.4
    return fraction, full


def test_each_words_absorption_is_the_formula():
    rng = np.random.default_rng(0)
    found = []
    for split in ([3], [5, 1]):
        W_dec_FxD, probe_D = rng.normal(size=(20, 8)), rng.normal(size=8)
        f_NxF = np.maximum(rng.normal(size=(400, 20)) - 1, 0)
        x_NxD = f_NxF @ W_dec_FxD + 0.2 * rng.normal(size=(400, 8))
        fraction_N, full_N = absorption_of_words(f_NxF, x_NxD, W_dec_FxD, probe_D, split)
        expected = [of_one_word(f_F, x_D, W_dec_FxD, probe_D, split) for f_F, x_D in zip(f_NxF, x_NxD, strict=True)]
        np.testing.assert_allclose(fraction_N, [fraction for fraction, _ in expected], rtol=1e-10)
        np.testing.assert_array_equal(full_N, [full for _, full in expected])
        found += expected
    fractions = np.array([fraction for fraction, _ in found])
    assert {0.0, 1.0} <= {*fractions} and ((fractions > 0) & (fractions < 1)).sum() > 10
    assert 10 < sum(full for _, full in found) < 700


def test_absorption_is_found_where_it_was_planted():
    """A feature for each letter; in every third word of "b" it is silent, and one of the word's own stands in."""
    rng = np.random.default_rng(0)
    letter_N = np.repeat(np.arange(26), 60)
    count = len(letter_N)
    rows_DxD = np.linalg.qr(rng.normal(size=(128, 128)))[0]
    absorbed = np.flatnonzero((letter_N == 1) & (np.arange(count) % 3 == 0))
    W_dec_FxD = np.concatenate([rows_DxD[:26], rows_DxD[1][None] + rows_DxD[26 : 26 + len(absorbed)]])
    f_NxF = np.zeros((count, len(W_dec_FxD)), np.float32)
    f_NxF[np.arange(count), letter_N] = 1
    f_NxF[absorbed, 1], f_NxF[absorbed, 26 + np.arange(len(absorbed))] = 0, 1
    x_NxD = f_NxF @ W_dec_FxD + 0.05 * rng.normal(size=(count, 128))
    is_test_N = rng.random(count) < 0.4
    letters = {each.letter: each for each in score_letters(f_NxF, W_dec_FxD, x_NxD, letter_N, is_test_N)}
    assert len(letters) == 26 and all(each.split_features == (i,) for i, each in enumerate(letters.values()))
    share = np.isin(np.flatnonzero(is_test_N & (letter_N == 1)), absorbed).mean()
    assert 0.1 < share == pytest.approx(letters["b"].fraction, abs=0.02) == pytest.approx(letters["b"].full, abs=0.02)
    assert all(each.fraction == each.full == 0 for letter, each in letters.items() if letter != "b")


def test_probes_are_the_optimum_of_their_penalised_cross_entropy():
    """Also where some directions of the inputs are a hundred times as long as others, as in a residual stream."""
    rng = np.random.default_rng(0)
    letter_N, width = rng.integers(4, size=1200), 64
    turn_DxD = np.linalg.qr(rng.normal(size=(width, width)))[0]
    x_NxD = 8 * rng.normal(size=(1200, width)) * (1 + np.arange(width)) ** -1.1 @ turn_DxD.T
    x_NxD += 0.15 * rng.normal(size=(4, width))[letter_N]
    x_NxD = (x_NxD - x_NxD.mean(axis=0)) / x_NxD.std(axis=0)
    is_class_NxK = letter_N[:, None] == np.arange(5)  # of the last there are no inputs
    weight_DxK, bias_K = fit_probes(x_NxD, is_class_NxK, 1e-3)
    assert not weight_DxK[:, 4].any() and not bias_K[4]
    for k in range(4):
        is_class_N = is_class_NxK[:, k]
        weight_N = np.where(is_class_N, 0.5 / is_class_N.sum(), 0.5 / (~is_class_N).sum())
        slope_N = weight_N * (1 / (1 + np.exp(-(x_NxD @ weight_DxK[:, k] + bias_K[k]))) - is_class_N)
        gradient_D = x_NxD.T @ slope_N + 1e-3 * weight_DxK[:, k]
        assert max(np.abs(gradient_D).max(), abs(slope_N.sum())) < 2e-6 < 0.01 * np.abs(weight_DxK[:, k]).max()


def test_sparse_probes_choose_the_features_of_a_class():
    rng = np.random.default_rng(0)
    x_NxC = rng.normal(size=(300, 6))
    is_class_NxK = x_NxC[:, :2] + rng.normal(size=(300, 2)) > [0.3, 1.5]
    sparse_CxK = fit_sparse_probes(x_NxC, is_class_NxK, 0.05)
    assert (sparse_CxK[:2].diagonal() > 0.1).all() and (sparse_CxK[2:] == 0).sum() >= 6


def test_activations_are_in_the_units_of_the_site(lm, monkeypatch):
    """A dictionary that normalises tokens has the absorption of the same in units of the site."""
    rng = np.random.default_rng(0)
    letter_N = np.repeat(np.arange(26), 20)
    x_NxD = 30 * rng.normal(size=(26, lm.config.d_model))[letter_N] + rng.normal(
        size=(len(letter_N), lm.config.d_model)
    )
    monkeypatch.setattr(absorption, "draw_words", lambda *_: (letter_N, letter_N))
    monkeypatch.setattr(absorption, "_read_words", lambda *_: x_NxD.astype(np.float32))
    described = dict(kind="topk", site="resid_post.1", d_in=lm.config.d_model, n_features=128, k=8)
    config = DictionaryConfig(**described, input_norm="layer_norm")
    dictionary = saejax.Dictionary.initial(config, jax.random.key(0))
    measured, same = (saejax.measure_absorption(lm, each) for each in (dictionary, to_output_units(dictionary)))
    assert measured == same and to_output_units(dictionary) is not dictionary


def test_what_cannot_be_measured_is_said(lm):
    words = ["the", "and", "with"]
    config = DictionaryConfig(kind="topk", site="resid_post.1", d_in=lm.config.d_model, n_features=64, k=4)
    dictionary = saejax.Dictionary.initial(config, jax.random.key(0))
    with pytest.raises(UserError, match="words of one token: too few"):
        saejax.measure_absorption(lm, dictionary, words=words)
    transcoder = dictionary.with_config(DictionaryConfig(**vars(config) | dict(site="mlp_in.1", target="mlp_out.1")))
    with pytest.raises(UserError, match="is no SAE of one: give an SAE"):
        saejax.measure_absorption(lm, transcoder)
