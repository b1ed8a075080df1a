"""Family-wise p-values against the algorithm as it is written, and by how often they are wrong."""

import numpy as np
import pytest

from saejax.statistics import permutation


@pytest.mark.parametrize("prompts", [9, 30])
def test_max_t_steps_down(prompts):
    """Against the algorithm as it is written: successive maxima, from the smallest statistic on."""
    effect_NxP = np.random.default_rng(prompts).normal([[0.0], [0.4], [1.5], [-1.2], [0.0]], 1.0, (5, prompts))
    effect_NxP[4] = 0.0
    patterns = permutation._sign_patterns(prompts, 999, 0)

    def size(effect_P):
        return abs(effect_P.sum()) / (np.square(effect_P).sum() ** 0.5 or 1.0)

    t_N = np.array([size(effect_P) for effect_P in effect_NxP])
    falling = np.argsort(-t_N)
    expected_N, before = np.zeros(5), 0.0
    for step, n in enumerate(falling):
        largest = [max(size(signs * effect_NxP[m]) for m in falling[step:]) for signs in patterns]
        before = expected_N[n] = max(before, np.mean([value >= t_N[n] - 1e-9 for value in largest]))
    p_N = permutation.max_t_p(effect_NxP, 999, 0)
    np.testing.assert_allclose(p_N, expected_N)
    assert p_N[4] == 1.0


def test_max_t_is_wrong_no_more_often_than_it_says_however_effects_depend():
    """Half of the effects are nearly the same one, turned around: neither independent nor positively dependent."""
    rng, wrong = np.random.default_rng(11), []
    for _ in range(300):
        shared_P, nothing_NxP = rng.normal(size=12), rng.normal(size=(30, 12))
        nothing_NxP[:15] = 0.2 * nothing_NxP[:15] + shared_P * np.where(np.arange(15) % 2, 1.0, -1.0)[:, None]
        planted_NxP = rng.normal(4.0, 1.0, (2, 12))
        p_N = permutation.max_t_p(np.concatenate([nothing_NxP, planted_NxP]), 0, 0)
        wrong.append((p_N[:30] <= 0.05).any())
        assert (p_N[30:] <= 0.05).all()
    assert np.mean(wrong) <= 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5


def test_chunks_make_no_difference(monkeypatch):
    effect_NxP = np.random.default_rng(7).normal(0.2, 1.0, (50, 18))
    together = permutation.max_t_p(effect_NxP, 300, 0)
    monkeypatch.setattr(permutation, "_CHUNK", 1000)
    np.testing.assert_array_equal(together, permutation.max_t_p(effect_NxP, 300, 0))


@pytest.mark.parametrize("effects", [np.zeros((3, 0)), np.zeros(3), np.array([[1.0, np.nan]])])
def test_bad_effects(effects):
    with pytest.raises(ValueError, match="expected finite effects"):
        permutation.max_t_p(effects, 10, 0)
