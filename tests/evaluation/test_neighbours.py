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
    W_dec_FxD[31] = -W_dec_FxD[4]  # opposite directions are no neighbours
    cosine_F = neighbours.neighbour_cosines(W_dec_FxD)
    np.testing.assert_allclose(cosine_F, brute_force(W_dec_FxD), atol=1e-6)
    assert cosine_F[3] == cosine_F[30] == pytest.approx(1) and cosine_F[20] == 0


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_of_very_many_features_some_are_looked_at(monkeypatch, blocks):
    monkeypatch.setattr(neighbours, "_BLOCK_VALUES", 37 * 5)
    monkeypatch.setattr(neighbours, "_MOST_VALUES", 37 * 5 * blocks)
    W_dec_FxD = np.random.default_rng(0).normal(size=(37, 6)).astype(np.float32)
    cosine_N, whole_F = neighbours.neighbour_cosines(W_dec_FxD), brute_force(W_dec_FxD)
    assert len(cosine_N) == 5 * blocks
    for start in range(0, 5 * blocks, 5):
        places = [at for at in range(33) if np.allclose(whole_F[at : at + 5], cosine_N[start : start + 5], atol=1e-6)]
        assert places, "each block is one of the whole"
    summary = neighbours.summary(cosine_N, 37)
    assert summary is not None and summary.looked_at == 5 * blocks


def test_one_feature_has_no_neighbour():
    assert neighbours.summary(neighbours.neighbour_cosines(np.ones((1, 4), np.float32)), 1) is None
