"""Scores against brute force, planted dictionaries whose scores are known, and intervals over seeds."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import ttest_1samp

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.ground_truth.scores import Matching, absorbed, count, over_seeds, scores
from saejax.ground_truth.settings import TruthConfig
from saejax.ground_truth.world import HELD_OUT, batch_key, make_world, sample

# Orthogonal directions, so that an encoder of the directions reads the code off.
WORLD = TruthConfig(
    features=12, dimensions=16, roots=2, branching=2, depth=1, rates=(0.4, 0.1), held_out=4096, bias=0.3
)


@pytest.fixture(scope="module")
def world():
    made = make_world(dataclasses.replace(WORLD, orthogonalise=0))
    rows, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))
    return dataclasses.replace(made, directions_JxD=jnp.asarray(rows[:12], jnp.float32))


def reader(world, W_enc_DxF, W_dec_FxD, threshold=0.1):
    """A dictionary that fires where the encoder gives more than 0.1, or ``threshold``."""
    width, features = W_enc_DxF.shape
    described = DictionaryConfig(kind="jumprelu", site="synthetic.0", d_in=width, n_features=features)
    arrays = dict(W_enc_DxF=W_enc_DxF, b_enc_F=np.zeros(features), W_dec_FxD=W_dec_FxD, b_dec_D=world.bias_D)
    arrays["threshold_F"] = np.full(features, threshold)
    return Dictionary(described, **{name: jnp.asarray(a, jnp.float32) for name, a in arrays.items()})


def judged(world, dictionary):
    matching = Matching.of(np.asarray(dictionary.W_dec_FxD[...]), np.asarray(world.directions_JxD))
    counts = count(dictionary, world, WORLD, matching)
    return scores(counts, matching, world), matching, counts


def test_a_permuted_true_dictionary_scores_full_marks(world):
    order = np.random.default_rng(1).permutation(12)
    rows = np.asarray(world.directions_JxD)[order]
    # Some activations are below 0.1; rounding gives silent features less than 1e-3.
    score, matching, counts = judged(world, reader(world, rows.T, 3 * rows, threshold=1e-3))
    assert np.array_equal(order[matching.feature_J], np.arange(12))
    ones = ("recovered", "mcc", "f1", "f1_features", "uniqueness", "best_f1", "best_explained_variance")
    np.testing.assert_allclose([score[name] for name in ones], 1, atol=1e-5)
    assert score["split"] == score["merged"] == score["absorbed"] == score["dead"] == score["invented"] == 0
    assert np.isclose(score["l0"], counts.active_J.sum() / counts.tokens)
    score, _, _ = judged(world, reader(world, rows.T, rows))
    assert np.isclose(score["explained_variance"], 1, atol=1e-5)


def test_a_rotated_dictionary_is_not_the_true_one(world):
    """Its features lie in the same space and explain it, but none is a direction."""
    rotation, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(12, 12)))
    rows = rotation @ np.asarray(world.directions_JxD)
    score, matching, _ = judged(world, reader(world, rows.T, rows))
    assert score["recovered"] < 0.3 and score["mcc"] < 0.9
    assert score["invented"] == np.mean(np.abs(rotation).max(1) <= 0.5**0.5) > 0
    assert np.isclose(score["mcc"], np.abs(rotation)[matching.feature_J, np.arange(12)].mean(), atol=1e-5)


def test_matching_is_the_best_of_all_assignments():
    rng = np.random.default_rng(3)
    for features, directions in ((5, 5), (4, 6), (6, 4)):
        W, D = rng.normal(size=(features, 7)), rng.normal(size=(directions, 7))
        cosine = np.abs((W / np.linalg.norm(W, axis=1)[:, None]) @ (D / np.linalg.norm(D, axis=1)[:, None]).T)
        small = cosine if features <= directions else cosine.T
        best = max(
            small[np.arange(len(small)), list(order)].mean()
            for order in itertools.permutations(range(small.shape[1]), len(small))
        )
        matching = Matching.of(W, D)
        assert np.isclose(matching.mcc, best)
        assert (matching.feature_J >= 0).sum() == min(features, directions)


def test_split_and_merged():
    D = np.eye(6)
    W = np.array([D[0], D[0] + 0.2 * D[5], D[1] + D[2] + 0.2 * D[5], D[3], D[4] + 0.3 * D[3]])
    matching = Matching.of(W, D)
    assert list(matching.split_J) == [True, False, False, False, False, False]
    assert list(matching.merged_J) == [False, True, True, False, False, False]
    assert np.isclose(matching.uniqueness, 4 / 5)
    assert not matching.invented_F[[0, 1, 3, 4]].any() and matching.invented_F[2]


def test_absorption_is_found_where_it_was_planted(world):
    """Child 2 takes over for its parent 0: its feature writes both, and the parent's is silent where it fires."""
    rows = np.asarray(world.directions_JxD, np.float64)
    encoder, decoder = rows.copy(), rows.copy()
    encoder[0] -= 20 * rows[2]
    decoder[2] = (rows[2] + rows[0]) / 2**0.5
    score, matching, counts = judged(world, reader(world, encoder.T, decoder))
    assert list(np.flatnonzero(absorbed(counts, matching, world))) == [0]
    assert np.isclose(score["absorbed"], 1 / 12)
    decoder[2] = rows[2]  # the parent is missed as before, but nobody stands for it
    _, matching, counts = judged(world, reader(world, encoder.T, decoder))
    assert not absorbed(counts, matching, world).any()


def test_counts_against_the_code_written_out(world):
    rng = np.random.default_rng(4)
    dictionary = reader(world, rng.normal(size=(16, 7)), rng.normal(size=(7, 16)))
    _, matching, counts = judged(world, dictionary)
    made = [sample(world, batch_key(WORLD.seed, HELD_OUT, i), 1024) for i in range(4)]
    x, code = (np.concatenate([np.asarray(part, np.float64) for part in parts]) for parts in zip(*made, strict=True))
    f = np.asarray(dictionary.encode(jnp.asarray(x, jnp.float32)))
    fires, there = f > 0, code > 0
    assert np.array_equal(counts.active_J, there.sum(0)) and np.array_equal(counts.fired_F, fires.sum(0))
    for j, feature in enumerate(matching.feature_J):
        assert counts.matched_J[j] == (0 if feature < 0 else (there[:, j] & fires[:, feature]).sum())
        parent = world.parent_J[j]
        of_parent = -1 if parent < 0 else matching.feature_J[parent]
        assert counts.parent_J[j] == (0 if of_parent < 0 else (there[:, j] & fires[:, of_parent]).sum())
    error = np.square(x - f @ np.asarray(dictionary.W_dec_FxD[...]) - np.asarray(world.bias_D)).sum()
    assert np.isclose(counts.error, error, rtol=1e-4)
    assert np.isclose(counts.variance, np.square(x - x.mean(0)).sum(), rtol=1e-4)


def test_the_best_of_a_sparsity(world):
    """A dictionary that fires once on a vector, beside a world that keeps its largest activations."""
    rows = np.asarray(world.directions_JxD)
    score, _, counts = judged(world, reader(world, rows[:2].T, rows[:2]))
    assert abs(counts.kept_J.sum() / counts.tokens - score["l0"]) < 0.1
    assert score["explained_variance"] < score["best_explained_variance"] < 1 and score["f1"] < score["best_f1"] < 1


def test_a_world_that_does_not_vary_has_no_variance_to_explain(world):
    rows = np.asarray(world.directions_JxD)[:2]
    _, matching, counts = judged(world, reader(world, rows.T, rows))
    mean_D = counts.total_D / counts.tokens
    alike = dataclasses.replace(counts, square=counts.tokens * float(np.square(mean_D).sum()))
    score = scores(alike, matching, world)
    assert score["explained_variance"] == score["best_explained_variance"] == 0


def test_interval_over_seeds():
    values = [0.4, 0.5, 0.9, 0.7]
    interval = over_seeds(values)
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((np.mean(values), expected.low, expected.high))
    alone = over_seeds([0.3])
    assert alone.low == alone.mean == alone.high == 0.3
    # An interval of shares ends where shares do.
    shares, counts = over_seeds([0.0, 1.0, 1.0, 1.0]), over_seeds([3.0, 9.0], (0.0, np.inf))
    assert (shares.mean, shares.high) == (0.75, 1.0) and 0 <= shares.low < 0.75
    assert counts.high > 9 and counts.low == 0
