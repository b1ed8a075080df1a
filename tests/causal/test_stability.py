"""How stable importance is: between halves of the prompts."""

import numpy as np
import pytest

from saejax.causal.stability import between_halves


def test_halves_of_the_prompts():
    rng = np.random.default_rng(3)
    worth_N = rng.normal(size=300)
    same = between_halves(np.repeat(worth_N[:, None], 6, axis=1), seed=0)
    assert same == dict(rank_correlation=pytest.approx(1.0), spearman_brown=pytest.approx(1.0))
    assert abs(between_halves(rng.normal(size=(300, 20)), seed=0)["rank_correlation"]) < 0.1
    # Noise of one unit a prompt: a mean over H prompts has reliability H / (H + 1), and ranks correlate a little less.
    noisy_NxP = rng.normal(size=(3000, 1)) + rng.normal(size=(3000, 9))
    got = between_halves(noisy_NxP, seed=0)
    assert got["rank_correlation"] == pytest.approx(6 / np.pi * np.arcsin(4 / 5 / 2), abs=0.03)
    assert got["spearman_brown"] == pytest.approx(2 * got["rank_correlation"] / (1 + got["rank_correlation"]))


@pytest.mark.parametrize("drop_NxP", [np.ones((5, 1)), np.ones((1, 9)), np.ones((4, 8)), np.zeros((0, 4))])
def test_halves_that_say_nothing(drop_NxP):
    assert between_halves(drop_NxP, seed=0) == dict(rank_correlation=None, spearman_brown=None)
