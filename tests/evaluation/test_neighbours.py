"""Decoder neighbours against brute force in fp64."""

import numpy as np
import pytest

from saejax.evaluation import neighbours


def brute_force(W_dec_FxD: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(W_dec_FxD.astype(np.float64), axis=1)
    unit = W_dec_FxD / np.where(length > 0, length, 1)[:, None]
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    return cosine.max(1)


@pytest.mark.parametrize("values", [37 * 1, 37 * 5, 37 * 36, 10**6])  # blocks of 1, 5, 36 rows, and all
def test_blocks_agree_with_brute_force(monkeypatch, values):
    monkeypatch.setattr(neighbours, "_BLOCK_VALUES", values)
    W_dec_FxD = np.random.default_rng(values).normal(size=(37, 6)).astype(np.float32)
    W_dec_FxD[20] = 0
    W_dec_FxD[30] = 2.5 * W_dec_FxD[3]
    cosine_F = neighbours.neighbour_cosines(W_dec_FxD)
    np.testing.assert_allclose(cosine_F, brute_force(W_dec_FxD), atol=1e-6)
    assert cosine_F[3] == cosine_F[30] == pytest.approx(1) and cosine_F[20] == 0


def test_opposite_directions_are_no_neighbours():
    np.testing.assert_allclose(neighbours.neighbour_cosines(np.array([[1.0, 0], [-1, 0]], np.float32)), -1)


def test_the_summary():
    told = neighbours.summary(np.array([0.0] * 50 + [0.5] * 40 + [0.95] * 10, np.float32))
    assert vars(told) == dict(
        mean=pytest.approx(0.295), median=0.25, p90=pytest.approx(0.545), p99=pytest.approx(0.95),
        max=pytest.approx(0.95), near=0.1,
    )  # fmt: skip


def test_one_feature_has_no_neighbour():
    assert neighbours.summary(neighbours.neighbour_cosines(np.ones((1, 4), np.float32))) is None
