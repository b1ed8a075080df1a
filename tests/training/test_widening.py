"""Features that a dictionary lacks are found in its errors; what training starts from has them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from every_kind import KINDS
from small_runs import Rows
from small_stacks import make_stack
from test_initial import random_dictionary

from saejax.dictionaries import Dictionary, rescale, save_dictionary
from saejax.training import widening
from saejax.training.init_from import state_from_folder
from saejax.training.state import finish_dictionary, init_state
from saejax.training.widening import missing_features, widen

D, J, N = 96, 128, 16_000


def world(noise=0.0):
    """Sparse sums of 128 directions in 96 dimensions: the directions, and tokens."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(J, D))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    code = (rng.random((N, J)) < 0.003) * rng.uniform(2, 4, (N, J))
    return directions, (code @ directions + noise * rng.normal(size=(N, D))).astype(np.float32)


@pytest.fixture(scope="module")
def noisy():
    return world(noise=0.5)


def half_of(directions, threshold=1.8):
    """A dictionary of the first half of the directions."""
    stack = make_stack("jumprelu")
    blank = finish_dictionary(stack, init_state(stack), 0)
    count = J // 2
    config = dataclasses.replace(blank.config, d_in=D, n_features=count, site="resid_post.0")
    half = jnp.asarray(directions[:count], jnp.float32)
    arrays = dict(W_enc_DxF=half.T, W_dec_FxD=half, b_enc_F=jnp.zeros(count), b_dec_D=jnp.zeros(D))
    return Dictionary(config, threshold_F=jnp.full(count, threshold), **arrays)


def cosines(rows, directions):
    return np.abs(rows @ directions.T) / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_other_half_is_found(noisy):
    directions, acts = noisy
    dictionary = half_of(directions)
    wide = widen(dictionary, J, acts, 0, False, print)
    count = wide.config.n_features
    near = cosines(np.asarray(wide.W_dec_FxD)[J // 2 :], directions)
    found = np.unique(near.argmax(1)[near.max(1) > 0.8])
    assert J // 2 < count <= J and (found >= J // 2).all() and len(found) > 0.8 * J // 2
    start = np.random.default_rng(1).normal(size=(J // 2, D))
    assert cosines(start, directions).max() < 0.7, "a random start has none of them"
    left = [np.square(acts - np.asarray(one(jnp.asarray(acts)))).mean() for one in (dictionary, wide)]
    assert left[1] < left[0]
    for name, array in dictionary.arrays.items():
        np.testing.assert_array_equal(wide.arrays[name][tuple(map(slice, array.shape))], array, err_msg=name)


def test_dead_features_give_way(noisy):
    """In their own places; as many more as are asked for come behind."""
    directions, acts = noisy
    dictionary, lines = half_of(directions), []
    dead = np.array([3, 20, 21, 60])
    arrays = {name: np.array(array) for name, array in dictionary.arrays.items()}
    arrays["threshold_F"][dead] = 1e9
    dictionary = Dictionary(dictionary.config, **{name: jnp.asarray(array) for name, array in arrays.items()})
    same = widen(dictionary, J // 2, acts, 0, True, lines.append)
    wide = widen(dictionary, J // 2 + 6, acts, 0, True, print)
    assert same.config.n_features == J // 2 and wide.config.n_features == J // 2 + 6
    assert lines == ["found 4 of 4 features in errors, 4 for dead ones"]
    new = cosines(np.asarray(wide.W_dec_FxD)[[*dead, *range(J // 2, J // 2 + 6)]], directions)
    assert (new.max(1) > 0.8).all() and len(np.unique(new.argmax(1))) == 10
    for one in (same, wide):
        assert (np.asarray(one.threshold_F)[dead] < 100).all()
        kept = np.delete(np.asarray(one.W_dec_FxD)[: J // 2], dead, axis=0)
        np.testing.assert_array_equal(kept, np.delete(arrays["W_dec_FxD"], dead, axis=0))
    plain = widen(dictionary, J // 2 + 6, acts, 0, False, print)
    np.testing.assert_array_equal(np.asarray(plain.W_dec_FxD)[dead], arrays["W_dec_FxD"][dead])


def test_new_features_read_what_is_beside_the_decoders_bias(noisy):
    """A dictionary that does not subtract it from its input gets the features that one of the same function does."""
    directions, acts = noisy
    rng = np.random.default_rng(5)
    mean = 3 * rng.normal(size=D)
    acts = (acts + mean).astype(np.float32)
    centred = half_of(directions)
    arrays = {**centred.arrays, "b_dec_D": jnp.asarray(mean, jnp.float32)}
    centred = Dictionary(dataclasses.replace(centred.config, centred=True), **arrays)
    wide = [widen(one, J // 2 + 16, acts, 0, False, print) for one in (centred, rescale.centre(centred, False))]
    before, *after = (np.square(acts - np.asarray(one(jnp.asarray(acts)))).mean() for one in (centred, *wide))
    assert max(after) < before and after[0] == pytest.approx(after[1], rel=0.01)
    assert before - after[0] == pytest.approx(before - after[1], rel=0.1)


def test_where_nothing_is_missing_nothing_new_is_found():
    """Errors of two known directions alone, and no errors at all; another seed finds in another order."""
    directions, acts = world(noise=0.1)
    size = np.random.default_rng(2).uniform(1, 2, (1000, 1)).astype(np.float32)
    errors = size * directions[np.arange(1000) % 2].astype(np.float32)
    rows, levels = missing_features(errors, 10, directions[:2])
    assert rows.shape == (0, D) and levels.shape == (0,)
    rows, _ = missing_features(errors, 10, directions[2:4])
    assert len(rows) == 2 and np.allclose(np.sort(cosines(rows, directions).argmax(1)), [0, 1])
    assert missing_features(0 * errors, 10, directions[:2])[0].shape == (0, D)
    first, again, reseeded = (missing_features(acts, 8, directions[:1], seed)[0] for seed in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, reseeded)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=() if k in ("topk", "gated", "matryoshka") else pytest.mark.slow) for k in KINDS],
)
def test_every_kind_starts_from_it(kind, tmp_path):
    """Of a dictionary of half the features, the others have directions from errors."""
    whole = random_dictionary(kind)
    F, width = whole.W_dec_FxD[...].shape
    half = {"W_enc_DxF": np.s_[:, : F // 2], "b_dec_D": np.s_[:]}
    narrow = {name: np.array(array)[half.get(name, np.s_[: F // 2])] for name, array in whole.arrays.items()}
    config = dataclasses.replace(whole.config, n_features=F // 2, groups=())
    narrow["W_dec_FxD"][:, width // 2 :] = 0  # what it knows and what it meets have nothing in common
    narrow["W_enc_DxF"][width // 2 :] = 0
    narrow["b_enc_F"][:] = -1
    narrow["W_dec_FxD"] /= np.linalg.norm(narrow["W_dec_FxD"], axis=1, keepdims=True)
    folder, rows = str(tmp_path / "narrow"), Rows(rows=3000)
    save_dictionary(folder, Dictionary(config, **{name: jnp.asarray(array) for name, array in narrow.items()}))
    rows.values *= 100 * (np.arange(width) >= width // 2)
    state = state_from_folder(make_stack(kind, init_from=folder, widen="errors"), folder, rows)
    random = state_from_folder(make_stack(kind, init_from=folder), folder)
    new, old = (np.asarray(each.params["W_dec_FxD"][0]) for each in (state, random))
    np.testing.assert_allclose(new[: F // 2], old[: F // 2], rtol=1e-5, atol=1e-6)
    assert not np.allclose(new[F // 2], old[F // 2])
    columns = np.asarray(state.params["W_enc_DxF"][0])[:, F // 2]
    np.testing.assert_allclose(columns / np.linalg.norm(columns), new[F // 2] / np.linalg.norm(new[F // 2]), atol=1e-5)


def test_on_a_cpu_xla_does_not_sort_the_projections():
    tokens = jnp.zeros((2048, D))  # of fewer a single projection is kept
    program = widening._search.lower(tokens, jnp.zeros((8, D))).compile().as_text()
    assert "TopK" in program and " sort(" not in program, "a sort takes forty times as long"
