"""The frozen-random control: as large, as sparse, fitted by least squares, and searched like the dictionary."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest
from scipy import sparse

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.dictionaries.kinds.topk import is_plain_topk
from saejax.interpret import control, rule_labels
from saejax.interpret.control import fit_decoder, frozen_random, random_directions
from saejax.interpret.results import InterpretedDictionary
from saejax.interpret.text import CodedText
from saejax.models.loading import load_model
from saejax.results import from_json, to_json
from saejax.stages.interpret.report import _rows


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return planted.make_store(tmp_path_factory.mktemp("control") / "store", documents=80)


def read(store, split="train"):
    return store.read(planted.SITE, store.rows(split, planted.SITE))


def topk(features, k=4):
    config = DictionaryConfig(kind="topk", site=planted.SITE, d_in=planted.WIDTH, n_features=features, k=k)
    return Dictionary.initial(config, jax.random.key(3))


@pytest.mark.parametrize("like", [topk(50), planted.dictionary(50)])
def test_it_is_as_large_and_as_sparse_and_its_directions_are_drawn(store, like):
    made, again, reseeded = (frozen_random(store, like, seed) for seed in (1, 1, 2))
    own, f_BxF = (np.asarray(one.encode(read(store))) for one in (like, made))
    assert f_BxF.shape == own.shape and (f_BxF >= 0).all()
    assert (f_BxF > 0).sum(1).mean() == pytest.approx((own > 0).sum(1).mean(), rel=0.02)
    if is_plain_topk(like.kind):
        assert ((f_BxF > 0).sum(1) == 4).all()
    W = np.asarray(made.W_enc_DxF[...])
    np.testing.assert_allclose(np.linalg.norm(W, axis=0), 1, rtol=1e-5)
    assert np.abs(W.T @ np.asarray(like.W_enc_DxF[...]))[:7, :7].max() < 0.7  # nothing of the dictionary's
    for name, array in made.arrays.items():
        assert np.array_equal(array, again.arrays[name])
    assert not np.array_equal(W, reseeded.W_enc_DxF[...])
    # What a token's activations are, in fp64: directions on the input less its mean.
    x = read(store).astype(np.float64)
    pre = (x - x.mean(0)) @ W.astype(np.float64)
    kept = np.sort(pre, axis=1)[:, [-4]] if is_plain_topk(like.kind) else float(made.threshold_F[0])
    expected = np.where((pre >= kept) & (pre > 0), pre, 0)
    wrong = ~np.isclose(f_BxF, expected, atol=2e-4)
    # On which side of a threshold a number within 1e-4 of it falls is a matter of rounding.
    assert wrong.sum() <= 2 and np.abs(pre - kept)[wrong].max(initial=0) < 1e-4


def test_its_decoder_is_that_of_least_squares(monkeypatch):
    """Against the normal equations, solved in fp64; ten steps are near, sixty are there."""
    rng = np.random.default_rng(0)
    f = np.where(rng.random((900, 60)) < 0.1, rng.uniform(1, 3, (900, 60)), 0)
    f[:, 7] = 0  # never fires
    y = f @ rng.normal(size=(60, 9)) + rng.normal(size=(900, 9))
    gram = f.T @ f
    expected = np.linalg.solve(gram + 1e-3 * np.trace(gram) / 60 * np.eye(60), f.T @ y)
    for steps, near in ((10, 2e-3), (60, 2e-5)):
        monkeypatch.setattr(control, "_STEPS", steps)
        found = fit_decoder(sparse.csr_array(f.astype(np.float32)), y)
        assert not found[7].any() and np.abs(found - expected).max() < near * np.abs(expected).max()
    assert not fit_decoder(sparse.csr_array((900, 60), dtype=np.float32), y).any()  # nothing fires at all


def test_a_transcoders_control_predicts_its_target(store, monkeypatch):
    """The target is another place's: here the same vectors, doubled."""
    source = planted.dictionary(40)
    like = Dictionary(dataclasses.replace(source.config, target="mlp_out.1"), **source.arrays)
    x = store.read
    monkeypatch.setattr(store, "rows", lambda split, *sites: type(store).rows(store, split, planted.SITE))
    monkeypatch.setattr(store, "read", lambda site, rows: x(planted.SITE, rows) * (2 if site == "mlp_out.1" else 1))
    made, plain = frozen_random(store, like, 1), frozen_random(store, source, 1)
    assert made.config.target == "mlp_out.1"
    for name in ("W_dec_FxD", "b_dec_D"):
        np.testing.assert_allclose(made.arrays[name], 2 * plain.arrays[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", ["layer_norm", "token_norm", "center"])
@pytest.mark.parametrize("make", [topk, planted.dictionary])
def test_controls_of_a_dictionary_that_normalises_tokens_do_so_too(store, make, norm, monkeypatch):
    """Tokens of any size are alike to them, so both are as sparse and as good on tokens 1 to 9 times as large."""
    plain = make(40)
    like = plain.with_config(dataclasses.replace(plain.config, input_norm=norm))
    rows, whole = store.rows("train", planted.SITE), store.read
    factor_N = np.random.default_rng(0).uniform(1, 9, (rows.max() + 1, 1)).astype(np.float32)
    monkeypatch.setattr(store, "read", lambda site, rows: whole(site, rows) * factor_N[rows])
    made, x_NxD = frozen_random(store, like, 1), read(store)
    f_NxF = made.encode(x_NxD)
    assert (f_NxF != 0).sum(1).mean() == pytest.approx(float((like.encode(x_NxD) != 0).sum(1).mean()), rel=0.02)
    error_NxD = x_NxD - np.asarray(made.decode(f_NxF, x_NxD))
    centred_NxD = x_NxD - x_NxD.mean(axis=1, keepdims=True) * (norm != "token_norm")
    share_N = np.square(error_NxD).sum(1) / np.square(centred_NxD).sum(1)
    if norm != "center":  # which leaves the size alone
        large_N = factor_N[rows, 0] > 5
        assert share_N[large_N].mean() == pytest.approx(share_N[~large_N].mean(), rel=0.1) and share_N.mean() < 0.9
    rate_F = np.linspace(0, 0.2, 40)
    fires_NxG = np.asarray(random_directions(store, like, rate_F, 1).encode(x_NxD)) > 0
    np.testing.assert_allclose(np.sort(fires_NxG.mean(0)), rate_F[1:], rtol=0, atol=2 / len(rows))


def test_few_features_have_no_fewer_random_directions(store):
    """The largest of two directions is exceeded by every third: a bar of 5 % takes 19."""
    rate_F, x_NxD = np.array([0.0, 0.05, 0.1]), read(store)
    made = random_directions(store, planted.dictionary(40), rate_F, 1)
    fires_G = (np.asarray(made.encode(x_NxD)) > 0).mean(axis=0)
    assert len(fires_G) == 19 and np.unique(fires_G.round(2)).tolist() == pytest.approx([0.05, 0.1])
    assert random_directions(store, planted.dictionary(40), np.zeros(3), 1).config.n_features == 1


def test_random_directions_have_the_sites_of_a_transcoder(store):
    source = planted.dictionary(40)
    wide = dict(target="mlp_out.1", target_width=32)
    arrays = source.arrays | dict(W_dec_FxD=jnp.ones((40, 32)), b_dec_D=jnp.zeros(32))
    like = Dictionary(dataclasses.replace(source.config, **wide), **arrays)
    made, plain = (random_directions(store, each, np.full(40, 0.1), 1) for each in (like, source))
    assert {name: getattr(made.config, name) for name in wide} == wide and made.W_dec_FxD.shape == (40, 32)
    np.testing.assert_allclose(np.linalg.norm(made.W_dec_FxD[...], axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(plain.W_dec_FxD[...], plain.W_enc_DxF[...].T)  # an SAE's reads what it writes


def test_all_that_are_compared_may_say_tokens(tmp_path, tiny_llama, one_device, monkeypatch):
    """A defect: random directions, whose best rule is the bar, had no rule of the tokens that they promote."""
    store, lm = planted.make_store(tmp_path / "store"), load_model(str(tiny_llama), mesh=one_device)
    best, given = rule_labels.best_detectors, []

    def watch(block, text, bases, output):
        given.append((block.size, len(output)))
        return best(block, text, bases, output)

    monkeypatch.setattr(rule_labels, "best_detectors", watch)
    text = CodedText(store.documents, planted.TEXTS)
    rule_labels.search_labels(lm, store, text, planted.dictionary(24), tmp_path / "firings")
    assert len(given) == 3 and all(size == count > 0 for size, count in given)


def test_a_signed_control_keeps_its_sign(store):
    like = topk(40, k=30)  # more than are above 0
    made = frozen_random(store, like.with_config(dataclasses.replace(like.config, signed=True)), 1)
    assert (np.asarray(made.encode(read(store))) < 0).any()


def test_its_labels_stand_beside_the_dictionarys(tmp_path, tiny_llama, one_device):
    """Planted features are told; directions drawn among them are not, and the result is read back."""
    store, lm = planted.make_store(tmp_path / "store"), load_model(str(tiny_llama), mesh=one_device)
    result = planted.interpreter(tmp_path / "unit", store, lm, planted.dictionary(24)).interpret()
    assert len(json.loads((tmp_path / "unit" / "heatmaps.json").read_text())) == 4
    frozen = result.frozen
    assert result.labels.labelled >= len(planted.CONCEPTS) and frozen.share.mean < result.labels.share.mean
    for counts in (result.labels, frozen, result.random):
        assert counts.share.low <= counts.share.mean == counts.labelled / counts.features <= counts.share.high
        assert counts.f1.low <= counts.f1.mean <= counts.f1.high
    own, made = planted.dictionary(24), frozen_random(store, planted.dictionary(24), 789)
    x = read(store, "held_out").astype(np.float64)
    for one, variance in ((own, result.explained_variance), (made, result.frozen_explained_variance)):
        error = x - np.asarray(one.decode(one.encode(jnp.asarray(x, jnp.float32))), np.float64)
        assert variance == pytest.approx(1 - (error**2).sum() / ((x - x.mean(0)) ** 2).sum(), abs=1e-4)
    data = json.loads(json.dumps(to_json(result)))
    assert from_json(InterpretedDictionary, data, "x") == result
    rows = _rows("topk", result)
    assert [row[0] for row in rows] == ["topk", "topk: frozen-random", "topk: random directions"]


def test_a_dictionary_that_never_fires_is_described_too(store, tmp_path, tiny_llama, one_device):
    """One dead member of a stack must not keep the others from being interpreted."""
    like = planted.dictionary(20)
    dead = Dictionary(like.config, like.matmul_dtype, **like.arrays | dict(b_enc_F=jnp.full(20, -1e3)))
    result = planted.interpreter(
        tmp_path / "unit", store, load_model(str(tiny_llama), mesh=one_device), dead
    ).interpret()
    assert (result.labels.features, result.labels.labelled, result.labels.f1) == (0, 0, None)
    (records,) = (json.loads(path.read_text()) for path in (tmp_path / "unit" / "features").glob("*.json"))
    assert [record["fires"] for record in records] == [0] * 20
