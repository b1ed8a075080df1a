"""Matching by direction against every cosine, computed at once."""

import numpy as np
import pytest

from saejax.matching import directions
from saejax.matching.directions import match_by_direction


def test_a_dictionary_with_its_features_in_another_order():
    rows_FxD = np.random.default_rng(0).normal(size=(200, 48)) * np.linspace(0.5, 2, 200)[:, None]
    order_F = np.random.default_rng(2).permutation(200)
    matches = match_by_direction(rows_FxD, 3.0 * rows_FxD[order_F])
    assert len(matches.first_M) == 200
    np.testing.assert_array_equal(order_F[matches.second_M], matches.first_M)
    np.testing.assert_allclose(matches.similarity_M, 1.0, atol=1e-5)


def test_directions_at_random_are_hardly_ever_near_each_other():
    rng = np.random.default_rng(3)
    assert len(match_by_direction(rng.normal(size=(200, 48)), rng.normal(size=(200, 48))).first_M) == 0


def test_matches_are_mutual_and_above_the_threshold(monkeypatch):
    # Feature 2 of the first is nearest to 1 of the second, which is nearer to 0: no pair. 3 is too far from anything.
    first = np.array([[1, 0, 0], [0, 1, 0], [0.8, 0.6, 0], [0, 0.1, 0.2], [0, 0, 0]])
    second = np.array([[0, -1, 0.5], [1, 0.01, 0], [0, 2, 0]])
    wanted = [(0, 1), (1, 2)]
    matches = match_by_direction(first, second)
    assert list(zip(matches.first_M.tolist(), matches.second_M.tolist(), strict=True)) == wanted
    assert len(match_by_direction(first, second, least=0.99999).first_M) == 1
    monkeypatch.setattr(directions, "_CHUNK", 1)  # a row at a time
    rng = np.random.default_rng(7)
    first, second = rng.normal(size=(60, 3)), rng.normal(size=(50, 3))
    small = match_by_direction(first, second)
    monkeypatch.undo()
    for one, two in zip(small, match_by_direction(first, second), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)
    cosine_FxG = (first / np.linalg.norm(first, axis=1)[:, None]) @ (second / np.linalg.norm(second, axis=1)[:, None]).T
    plain = [
        (f, g)
        for f, g in np.argwhere(cosine_FxG >= 0.7)
        if cosine_FxG[f].argmax() == g and cosine_FxG[:, g].argmax() == f
    ]
    assert list(zip(small.first_M.tolist(), small.second_M.tolist(), strict=True)) == plain


def test_what_cannot_be_compared():
    with pytest.raises(ValueError, match="width 3 and 4"):
        match_by_direction(np.ones((2, 3)), np.ones((2, 4)))
    assert len(match_by_direction(np.ones((0, 3)), np.ones((2, 3))).first_M) == 0
