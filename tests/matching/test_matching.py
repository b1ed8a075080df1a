"""Assignments beside scipy's dense solver, on rows that are planted, random, of different numbers, and in blocks."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from saejax.matching import match as matching
from saejax.matching.match import STEP, Auction, match
from saejax.matching.rows import independent_rows, random_rotation, unit
from saejax.parallel.mesh import make_mesh


def directions(count, width, seed):
    return unit(np.random.default_rng(seed).normal(size=(count, width)))


def check(first_FxD, second_GxD, found):
    """All figures of a pair beside the table of its products."""
    table = first_FxD.astype(np.float64) @ second_GxD.astype(np.float64).T
    has = found.partner_F >= 0
    pairs = table[np.flatnonzero(has), found.partner_F[has]]
    assert len(set(found.partner_F[has].tolist())) == has.sum() and pairs.min(initial=0) >= 0
    np.testing.assert_allclose(found.value_F[has], pairs, atol=1e-6)
    assert np.isnan(found.value_F[~has]).all()
    best = linear_sum_assignment(np.maximum(table, 0), maximize=True)  # who stays alone has 0
    assert abs(pairs.sum() - np.maximum(table, 0)[best].sum()) / min(table.shape) <= found.gap + 1e-6
    assert found.gap <= STEP + 1e-6
    np.testing.assert_allclose(found.nearest_F, table.max(1), atol=1e-6)
    np.testing.assert_allclose(found.nearest_G, table.max(0), atol=1e-6)
    np.testing.assert_array_equal(found.mutual_F, table.argmax(0)[table.argmax(1)] == np.arange(len(table)))


@pytest.mark.parametrize("sizes", [(70, 70), (40, 90), (90, 40), (1, 5), (5, 1), (1, 1)])
def test_assignments_are_the_best(sizes):
    first, second = directions(sizes[0], 12, 0), directions(sizes[1], 12, 1)
    ((key, found),) = match([("a", first, second)], make_mesh())
    assert key == "a"
    check(first, second, found)


def test_rows_of_few_directions_and_rows_of_zero():
    """Where many rows want the same columns the first candidates are not enough; a dead feature has no direction."""
    rng = np.random.default_rng(2)
    centre = rng.normal(size=(3, 16))
    first, second = (unit(centre[rng.integers(3, size=150)] + 0.2 * rng.normal(size=(150, 16))) for _ in range(2))
    first[4:60] = second[9:90] = 0.0
    (_, found), *_ = match([(0, first, second)], make_mesh())
    check(first, second, found)


@pytest.mark.usefixtures("cold_programs")
@pytest.mark.parametrize("sizes", [(300, 300), (270, 330), (330, 270)])
def test_rows_that_know_few_columns_look_again(sizes, monkeypatch):
    """A few at a time, and in looks of several sizes; a column that no row has costs nothing."""
    monkeypatch.setattr(matching, "CANDIDATES", 3)
    monkeypatch.setattr(matching, "_ROWS", 32)
    looks = []
    look = matching._Problem.look
    monkeypatch.setattr(matching._Problem, "look", lambda own, *found: looks.append(len(found[0])) or look(own, *found))
    first, second = directions(sizes[0], 10, 6), directions(sizes[1], 10, 7)
    (_, found), *_ = match([(0, first, second)], make_mesh())
    check(first, second, found)
    assert {32, min(sizes)} < set(looks)


def test_what_an_auction_says_holds():
    """In fp64: no row could gain more than a step, and columns that are left over cost nothing."""
    value = np.maximum(np.random.default_rng(8).normal(size=(60, 75)), -1).clip(-1, 1) * 0.9
    value[5] = -0.5  # stays alone
    auction = Auction(60, 75)
    while len(auction.waiting):
        rows = auction.urgent(min(60, 2 * len(auction.waiting)))
        profit = (value[rows] - auction.price_G).astype(np.float32)
        column = np.argsort(-profit, axis=1)[:, :4]
        auction.look(rows, np.take_along_axis(profit, column, 1), column)
        auction.bid()
    has = auction.column_F >= 0
    assert not has[5] and has.sum() == 59 and len(set(auction.column_F[has])) == 59
    own = np.where(has, value[np.arange(60), auction.column_F], 0.0)
    paid = np.where(has, auction.price_G[auction.column_F], 0)
    best = np.maximum((value - auction.price_G).max(1), 0)
    assert (own - paid >= best - STEP - 1e-6).all()
    assert set(np.flatnonzero(auction.price_G)) <= set(auction.column_F[has])
    assert (best - own + paid).mean() <= auction.gap(own) + 1e-6 <= STEP + 2e-6


def test_many_pairs_of_several_shapes():
    made = [(i, directions(20 + i % 3, 8, i), directions(25, 8, 50 + i)) for i in range(20)]
    found = dict(match(iter(made), make_mesh()))
    assert found.keys() == set(range(20))
    for i, first, second in made:
        check(first, second, found[i])


def test_a_permuted_copy_is_found_wholly_and_chance_is_not():
    own = directions(120, 32, 3)
    order = np.random.default_rng(4).permutation(120)
    found = dict(
        match(
            [("same", own, own), ("permuted", own, own[order]), ("null", own, independent_rows(own, [5]))], make_mesh()
        )
    )
    assert found["same"].partner_F.tolist() == list(range(120)) and found["same"].mutual_F.all()
    assert order[found["permuted"].partner_F].tolist() == list(range(120))
    assert found["permuted"].value_F.min() > 0.9999
    assert found["null"].value_F.max() < 0.9 and 0.25 < found["null"].value_F.mean() < 0.5


def test_chance_has_the_rows_covariance_and_lengths():
    rng = np.random.default_rng(0)
    scale = np.array([4.0, 1.0, 1.0, 0.0])
    rows = rng.normal(size=(4000, 4)).astype(np.float32) * scale + np.array([1, 0, 0, 0])
    rows[7] = 0.0
    drawn = independent_rows(rows, [1])
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), np.linalg.norm(rows, axis=1), rtol=1e-4)
    assert np.abs(drawn[:, 3]).max() < 1e-2  # a dimension that no row has
    first, second = (unit(some)[:, 0] ** 2 for some in (rows, drawn))
    assert abs(first.mean() - second.mean()) < 0.02


def test_a_rotated_dictionary_shares_nothing_and_two_seeds_share_some():
    """Self-match 1, a rotated copy below 0.05, and a dictionary with half of its directions between the two."""
    own = directions(400, 64, 6)
    near = unit(np.where(np.arange(400)[:, None] < 200, own + 0.05 * directions(400, 64, 7), directions(400, 64, 8)))
    rotated = own @ random_rotation(64, [9])
    found = dict(match([("self", own, own), ("seed", own, near), ("rotated", own, rotated)], make_mesh()))
    share = {name: float((np.nan_to_num(one.value_F) >= 0.7).mean()) for name, one in found.items()}
    assert share["self"] == 1 and share["rotated"] < 0.05 and 0.45 < share["seed"] < 0.55
