"""Assignments beside scipy's dense solver, on rows that are planted, random, of different numbers, and in blocks."""

import tracemalloc

import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from saejax.matching import match as matching
from saejax.matching.match import STEP, match
from saejax.matching.rows import CentredRows, independent_rows, random_rotation, unit
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


def test_assignments_are_the_best():
    """Of pairs of several shapes, some of them more than once, which are solved together.

    Where many rows want the same columns, the first candidates are not enough; a dead feature has no direction.
    """
    sizes = [(70, 70), (40, 90), (90, 40), (1, 5), (5, 1), (1, 1), (40, 90), *((20 + i % 3, 25) for i in range(20))]
    made = [(i, directions(rows, 12, i), directions(columns, 12, 50 + i)) for i, (rows, columns) in enumerate(sizes)]
    rng = np.random.default_rng(2)
    centre = rng.normal(size=(3, 16))
    first, second = (unit(centre[rng.integers(3, size=150)] + 0.2 * rng.normal(size=(150, 16))) for _ in range(2))
    first[4:60] = second[9:90] = 0.0
    made.append((len(sizes), first, second))
    found = dict(match(iter(made), make_mesh()))
    assert found.keys() == set(range(len(made)))
    for i, first, second in made:
        check(first, second, found[i])


def test_the_host_copies_one_devices_pairs_at_a_time(monkeypatch):
    """A single pair is not copied for the devices that have none."""
    read_parts, copied = matching.read_parts, []

    def note(shape, where, read):
        return read_parts(shape, where, lambda index: copied.append(read(index)) or copied[-1])

    monkeypatch.setattr(matching, "read_parts", note)
    first, second = directions(40, 12, 0), directions(50, 12, 1)
    ((_, found),) = match(iter([("pair", first, second)]), make_mesh())
    check(first, second, found)
    assert max(part.nbytes for part in copied) == second.nbytes
    assert sum(part.any() for part in copied if part.shape[1:] == second.shape) == 1


def firings(tokens, features, active, seed):
    """Activations of ``active`` features per token, of which the first fire most often."""
    rng = np.random.default_rng(seed)
    columns = np.minimum(rng.exponential(features / 4, (tokens, active)), features - 1).astype(int)
    values, indptr = rng.lognormal(size=tokens * active), np.arange(0, tokens * active + 1, active)
    f_NxF = sparse.csr_array((values, columns.reshape(-1), indptr), (tokens, features))
    f_NxF.sum_duplicates()
    return f_NxF


@pytest.mark.parametrize("sizes", [(120, 120), (90, 150), (150, 90)])
@pytest.mark.parametrize("at_once", [0, matching._AT_ONCE])
def test_sparse_rows_are_matched_by_their_correlations(sizes, at_once, monkeypatch, one_device):
    """Half of the second's features are the first's, in another order; few candidates, so that rows look again."""
    monkeypatch.setattr(matching, "_AT_ONCE", at_once)
    monkeypatch.setattr(matching, "CANDIDATES", 3)
    monkeypatch.setattr(matching, "_ROWS", 16)
    first_NxF, second_NxG = (firings(400, size, 12, seed).toarray() for seed, size in enumerate(sizes))
    second_NxG[:, -45:] = first_NxF[:, 44::-1]
    first_F, second_G = (np.arange(size) % 17 > 0 for size in sizes)
    compared = (first_NxF, first_F), (second_NxG, second_G)
    pair = [CentredRows.of(sparse.csr_array(acts), which) for acts, which in compared]
    dense = [np.where(which[:, None], (acts - acts.mean(0)).T, 0) for acts, which in compared]
    dense = [rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in dense]  # in float64
    ((_, found),) = match([(0, *pair)], one_device)
    assert np.sum(found.value_F > 0.9) > 35 and (found.gap == 0) == bool(at_once)
    check(*dense, found)


def test_many_sparse_rows_that_are_alike_are_assigned_in_no_time(one_device):
    """Features that fire at one token bid for columns of one value, whose prices rose by a step at a time."""
    at_M = np.repeat(np.arange(40), 30)
    f_NxF = sparse.csr_array((np.ones(1200), (at_M, np.arange(1200))), (400, 1200))
    rows = CentredRows.of(f_NxF, np.ones(1200, bool))
    few = CentredRows.of(f_NxF, np.arange(1200) % 30 < 29)
    ((_, found),) = match([(0, few, rows)], one_device)
    assert found.gap == 0 and np.sum(found.value_F > 0.999) == 40 * 29


def test_matching_activations_takes_memory_for_firings_alone():
    """Dense rows of one dictionary would take 64 MB, and a table of all products as much."""
    features, tokens = 4096, 4096
    first, second = (CentredRows.of(firings(tokens, features, 8, seed), np.ones(features, bool)) for seed in range(2))
    tracemalloc.start()
    ((_, found),) = match([(0, first, second)], make_mesh())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.gap <= STEP + 1e-6 and (found.partner_F >= 0).mean() > 0.5
    assert peak < 4 * features * tokens / 4


@pytest.mark.parametrize("sizes", [(300, 300), (270, 330), (330, 270)])
def test_rows_that_know_few_columns_look_again(sizes, monkeypatch, one_device):
    """A few at a time, and in looks of several sizes; a column that no row has costs nothing."""
    monkeypatch.setattr(matching, "CANDIDATES", 3)
    monkeypatch.setattr(matching, "_ROWS", 32)
    looks, look = [], matching._Problem.look
    monkeypatch.setattr(matching._Problem, "look", lambda self, *rows: looks.append(len(rows[0])) or look(self, *rows))
    first, second = directions(sizes[0], 10, 6), directions(sizes[1], 10, 7)
    (_, found), *_ = match([(0, first, second)], one_device)
    check(first, second, found)
    assert {32, min(sizes)} < set(looks)


def test_copies_share_all_near_rows_half_and_chance_nothing():
    rows, order = directions(400, 64, 6), np.random.default_rng(4).permutation(400)
    near = unit(np.where(np.arange(400)[:, None] < 200, rows + 0.05 * directions(400, 64, 7), directions(400, 64, 8)))
    seconds = dict(self=rows, permuted=rows[order], seed=near, rotated=rows @ random_rotation(64, [9]))
    seconds["chance"] = independent_rows(rows, [5])
    found = dict(match([(name, rows, second) for name, second in seconds.items()], make_mesh()))
    assert found["self"].partner_F.tolist() == list(range(400))
    assert order[found["permuted"].partner_F].tolist() == list(range(400))
    assert found["permuted"].value_F.min() > 0.9999 and found["chance"].value_F.max() < 0.9
    share = {name: float((np.nan_to_num(each.value_F) >= 0.7).mean()) for name, each in found.items()}
    assert share["self"] == 1 and max(share["rotated"], share["chance"]) < 0.05 and 0.45 < share["seed"] < 0.55


def test_chance_has_the_rows_covariance_and_lengths():
    rng = np.random.default_rng(0)
    scale = np.array([4.0, 1.0, 1.0, 0.0])
    rows = rng.normal(size=(4000, 4)).astype(np.float32) * scale + np.array([1, 0, 0, 0])
    rows[7] = 0.0
    drawn = independent_rows(rows, [1])
    # Rows of features that are not compared change nothing.
    with_dead = independent_rows(np.concatenate([rows, np.zeros_like(rows)]), [1])
    np.testing.assert_allclose(with_dead, np.concatenate([drawn, np.zeros_like(rows)]), atol=1e-5)
    assert not independent_rows(np.zeros((3, 4), np.float32), [1]).any()
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), np.linalg.norm(rows, axis=1), rtol=1e-4)
    assert np.abs(drawn[:, 3]).max() < 1e-2  # a dimension that no row has
    first, second = (unit(some)[:, 0] ** 2 for some in (rows, drawn))
    assert abs(first.mean() - second.mean()) < 0.02
