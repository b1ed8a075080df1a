"""The synthetic world against its own definition, and against the published statistics of SynthSAEBench-16k."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from scipy.stats import norm

from saejax.ground_truth import world as worlds
from saejax.ground_truth.settings import TruthConfig
from saejax.parallel.mesh import fitting_sharding, make_mesh
from saejax.runner.flags import define_flags, from_flags
from saejax.runner.registry import all_groups

SMALL = TruthConfig(
    features=40, dimensions=16, roots=2, branching=3, depth=2, rates=(0.3, 0.02), orthogonalise=5, factors=3
)
COUNT = 40_000


def drawn(settings=SMALL, count=COUNT, seed=7):
    world = worlds.make_world(settings)
    x_BxD, code_BxJ = worlds.sample(world, jax.random.key(seed), count)
    return world, np.asarray(x_BxD), np.asarray(code_BxJ)


def close(share, expected, count=COUNT, deviations=5):
    """Shares of so many draws are what they should be, but for chance."""
    expected = np.asarray(expected)
    assert np.all(np.abs(share - expected) < deviations * np.sqrt(expected * (1 - expected) / count) + 1e-9)


def test_vectors_are_the_sums_that_the_code_says():
    world, x_BxD, code_BxJ = drawn(count=50)
    directions_JxD = np.asarray(world.directions_JxD, np.float64)
    assert np.allclose(np.linalg.norm(directions_JxD, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(x_BxD, code_BxJ @ directions_JxD + np.asarray(world.bias_D), atol=2e-5)
    assert np.isclose(np.linalg.norm(world.bias_D), SMALL.bias, atol=1e-6)
    noisy = drawn(dataclasses.replace(SMALL, noise=0.25), count=4000)
    left_BxD = noisy[1] - noisy[2] @ directions_JxD - np.asarray(noisy[0].bias_D)
    assert abs(left_BxD.std() - 0.25) < 0.01


def test_rates_and_sizes_without_trees():
    plain = dataclasses.replace(SMALL, roots=0, magnitude_first=1.0, magnitude_last=0.5, magnitude_std=0.7)
    world, _, code_BxJ = drawn(plain)
    mean_J, std_J = np.asarray(world.mean_J, np.float64), np.asarray(world.std_J, np.float64)
    # A condition is met at the Zipf rate, and of those the normal activation is above 0 at this one.
    close((code_BxJ > 0).mean(0), worlds.rates(plain) * norm.cdf(mean_J / std_J))
    ratio = mean_J / std_J
    expected_J = mean_J + std_J * norm.pdf(ratio) / norm.cdf(ratio)  # of a normal number, given that it is above 0
    size_J = code_BxJ.sum(0) / (code_BxJ > 0).sum(0)
    assert np.all(np.abs(size_J - expected_J) < 6 * std_J / np.sqrt((code_BxJ > 0).sum(0)) + 1e-4)


def test_eight_devices_draw_what_one_draws():
    world, _, code_BxJ = drawn(dataclasses.replace(SMALL, features=400, roots=20), count=64)
    rows = fitting_sharding(make_mesh(), (64, 1), "data", None)
    sharded, _ = worlds.sample(world, jax.random.key(7), 64, rows)
    assert len(sharded.sharding.device_set) == 8 and (code_BxJ > 0).any()
    np.testing.assert_allclose(sharded, worlds.sample(world, jax.random.key(7), 64)[0], atol=1e-5)


def test_children_fire_with_their_parent_alone_and_one_at_a_time():
    _, _, code_BxJ = drawn()
    parent_J = worlds.parents(SMALL.features, SMALL.roots, SMALL.branching, SMALL.depth)
    assert list(parent_J[:9]) == [-1, -1, 0, 0, 0, 1, 1, 1, 2] and (parent_J >= 0).sum() == 24
    on_BxJ = code_BxJ > 0
    for parent in set(parent_J) - {-1}:
        children = np.flatnonzero(parent_J == parent)
        assert on_BxJ[:, children].any() and not np.any(on_BxJ[:, children] & ~on_BxJ[:, [parent]])
        assert on_BxJ[:, children].sum(1).max() == 1
    _, _, free_BxJ = drawn(dataclasses.replace(SMALL, exclusive=False, factors=0))
    assert (free_BxJ[:, 2:5] > 0).sum(1).max() == 3
    # Without exclusion and factors a child fires as often as it is meant to.
    close((free_BxJ > 0).mean(0), worlds.rates(SMALL), deviations=6)


def test_one_child_of_several_is_kept_with_equal_chances():
    """Against all outcomes of one family of three, written out."""
    settings = dataclasses.replace(SMALL, depth=1, factors=0)
    _, _, code_BxJ = drawn(settings)
    p = worlds.conditional_rates(settings)
    for parent, first in ((0, 2), (1, 5)):
        expected = np.zeros(3)
        for met in np.ndindex(2, 2, 2):
            chance = np.prod([p[first + i] if is_met else 1 - p[first + i] for i, is_met in enumerate(met)])
            expected += np.array(met) * chance / max(sum(met), 1)
        close((code_BxJ[:, first : first + 3] > 0).mean(0), p[parent] * expected)


def test_children_grow_with_their_parent():
    settings = dataclasses.replace(SMALL, factors=0)
    _, _, code_BxJ = drawn(settings)
    both = (code_BxJ[:, 0] > 0) & (code_BxJ[:, 2] > 0)
    assert np.corrcoef(code_BxJ[both, 0], code_BxJ[both, 2])[0, 1] > 0.3
    _, _, code_BxJ = drawn(dataclasses.replace(settings, scaled=False))
    both = (code_BxJ[:, 0] > 0) & (code_BxJ[:, 2] > 0)
    assert abs(np.corrcoef(code_BxJ[both, 0], code_BxJ[both, 2])[0, 1]) < 5 / np.sqrt(both.sum())


def test_factors_make_features_fire_together():
    """Pairs against the bivariate normal distribution whose correlation the loadings say."""
    from scipy.stats import multivariate_normal

    settings = dataclasses.replace(
        SMALL, roots=0, correlation=0.5, rates=(0.3, 0.1), magnitude_std=0.1, magnitude_spread=0
    )
    world, _, code_BxJ = drawn(settings)
    loading_JxQ, threshold_J = np.asarray(world.loading_JxQ), np.asarray(world.threshold_J)
    correlation_JxJ = loading_JxQ @ loading_JxQ.T
    for i, j in ((0, 1), (2, 9), (5, 30)):
        r = correlation_JxJ[i, j]
        expected = multivariate_normal([0, 0], [[1, r], [r, 1]]).cdf([-threshold_J[i], -threshold_J[j]])
        close(((code_BxJ[:, i] > 0) & (code_BxJ[:, j] > 0)).mean(), expected)
    close((code_BxJ > 0).mean(0), worlds.rates(settings))


def test_orthogonalising_is_the_loss_written_out():
    """One step of Adam moves every entry by the learning rate against its gradient's sign."""
    rows_JxD = np.random.default_rng(0).normal(size=(6, 4))
    rows_JxD /= np.linalg.norm(rows_JxD, axis=1, keepdims=True)
    gram_JxJ = rows_JxD @ rows_JxD.T
    np.fill_diagonal(gram_JxJ, 0)
    gradient_JxD = 4 * gram_JxJ @ rows_JxD  # unit rows: the other sum has no gradient
    moved_JxD = rows_JxD - 1e-3 * np.sign(gradient_JxD)
    expected_JxD = moved_JxD / np.linalg.norm(moved_JxD, axis=1, keepdims=True)
    result_JxD = worlds.orthogonalise(jnp.asarray(rows_JxD, jnp.float32), 1, 1e-3)
    np.testing.assert_allclose(result_JxD, expected_JxD, atol=2e-5)


@pytest.mark.slow
def test_statistics_of_synthsaebench_16k():
    """As published, or worked out from its definition: L0 34.5, 25 of the first 4,096; the directions are left raw."""
    values = flags.FlagValues()
    define_flags(all_groups(), values)
    values(["", f"--flagfile={Path('configs/synthsaebench-16k.flags')}"])
    settings = dataclasses.replace(from_flags(all_groups(), values)[TruthConfig], orthogonalise=0)
    conditional_J = worlds.conditional_rates(settings)
    rates_J = worlds.rates(settings)
    assert settings.features == 16_384 and rates_J[0] == 0.4 and np.isclose(rates_J[-1], 5e-4)
    parent_J = worlds.parents(settings.features, settings.roots, settings.branching, settings.depth)
    assert np.sum(parent_J >= 0) + 128 == 10_880 and abs(conditional_J.max() - 0.915) < 1e-3
    world = worlds.make_world(settings)
    codes = [worlds.sample(world, jax.random.key(i), 256)[1] for i in range(3)]
    counts_J = sum(np.asarray(jnp.sum(code_BxJ > 0, 0)) for code_BxJ in codes)
    rate_J = counts_J / (3 * 256)
    levels = [rate_J[start:stop].sum() for start, stop in ((0, 128), (128, 640), (640, 2688), (2688, 10880))]
    np.testing.assert_allclose([*levels, rate_J[10880:].sum()], [8.2, 7.4, 7.4, 7.2, 4.6], rtol=0.08)
    np.testing.assert_allclose([rate_J.sum(), rate_J[:4096].sum()], [34.47, 25.0], rtol=0.04)
    loading_JxQ = np.asarray(world.loading_JxQ)[:1000]
    correlation_JxJ = loading_JxQ @ loading_JxQ.T
    assert abs(np.sqrt(np.mean(correlation_JxJ[~np.eye(1000, dtype=bool)] ** 2)) - 0.05) < 0.003


def test_same_seed_same_bits():
    first, again, reseeded = drawn(count=64), drawn(count=64), drawn(dataclasses.replace(SMALL, seed=1), count=64)
    assert np.array_equal(first[1], again[1]) and np.array_equal(first[2], again[2])
    assert not np.array_equal(first[1], reseeded[1])
