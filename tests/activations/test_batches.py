"""Training batches: every row once an epoch, the same for any number of processes, and from any step on."""

import functools
import itertools

import known_store
import numpy as np
import pytest

from saejax.activations.batches import steps_per_epoch, training_batches

SITE, BATCH = "resid_post.1", 10
PARTS = ((SITE,),)
TRAIN_ROWS = 93 - 16 - 9  # without held-out documents and the first position of every training document


@pytest.fixture
def make_store(tmp_path):
    """Writes a store of known vectors: ``make_store(dtype, shard_rows)`` gives a ``known_store.Known``."""
    return functools.partial(known_store.write, tmp_path / "store")


@pytest.fixture
def store(make_store):
    return make_store("float32").store


def read(store, seed=3, epochs=3, **options):
    return rows_of(training_batches(store, PARTS, BATCH, seed, epochs, **options))


def rows_of(batches):
    """The vectors [batch, d] of batches of one part and one site."""
    return [part[0] for (part,) in batches]


def row_ids(store, batches):
    """The rows that batches consist of, found by their vectors."""
    rows = np.arange(store.manifest.rows)
    known = {vector.tobytes(): row for row, vector in zip(rows, store.read(SITE, rows), strict=True)}
    return [[known[vector.tobytes()] for vector in batch] for batch in batches]


def test_every_row_comes_once_in_each_epoch(store):
    steps = steps_per_epoch(store, PARTS, BATCH)
    assert steps == TRAIN_ROWS // BATCH
    batches = row_ids(store, read(store))
    assert len(batches) == 3 * steps and all(len(batch) == BATCH for batch in batches)
    allowed = set(store.rows("train", SITE).tolist())
    epochs = [list(itertools.chain(*batches[e * steps : (e + 1) * steps])) for e in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == steps * BATCH  # all but the remainder, none twice
        assert set(epoch) <= allowed
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_that_divides_the_rows_leaves_none_out(store):
    batches = row_ids(store, rows_of(training_batches(store, PARTS, 17, 3, 2)))
    for epoch in (batches[:4], batches[4:]):
        assert sorted(itertools.chain(*epoch)) == store.rows("train", SITE).tolist()


def test_the_order_is_a_function_of_the_seed(store):
    first, again, other = read(store), read(store), read(store, seed=4)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("processes", [2, 5])
def test_processes_share_the_batches_of_one(store, processes):
    share = BATCH // processes
    shares = [read(store, own=slice(share * process, share * (process + 1))) for process in range(processes)]
    joined = [np.concatenate(parts) for parts in zip(*shares, strict=True)]
    assert np.array_equal(joined, read(store))


def test_reading_goes_on_at_any_step(store):
    whole = read(store)
    for step in range(len(whole) + 1):
        rest = read(store, first_step=step)
        assert len(rest) == len(whole) - step
        assert all(np.array_equal(a, b) for a, b in zip(rest, whole[step:], strict=True))


def test_bfloat16_stays_bfloat16(make_store):
    store = make_store("bfloat16").store
    assert next(training_batches(store, PARTS, BATCH, 0, 1))[0].dtype == store.dtype == "bfloat16"


def test_fewer_rows_than_a_batch_give_no_step(store):
    assert steps_per_epoch(store, PARTS, 1000) == 0
    assert list(training_batches(store, PARTS, 1000, 0, 3)) == []


def test_consecutive_tokens_are_not_consecutive_in_training(store):
    for batch in row_ids(store, read(store)):
        documents, positions, _ = store.tokens(np.array(batch))
        follows = (np.diff(positions) == 1) & (np.diff(documents) == 0)
        assert follows.sum() <= 2


def test_all_sites_of_a_batch_give_the_same_rows(make_store):
    store = make_store("float32").store
    other = next(site for site in store.sites if site != SITE)
    both = store.rows("train", SITE, other)
    assert set(both) == set(store.rows("train", SITE)) & set(store.rows("train", other))
    inputs, targets = next(training_batches(store, ((SITE, SITE), (other,)), BATCH, 3, 1))
    assert inputs.shape == (2, BATCH, store.d(SITE)) and targets.shape == (1, BATCH, store.d(other))
    (rows,) = row_ids(store, [inputs[1]])
    np.testing.assert_array_equal(targets[0], store.read(other, np.array(rows)))
    assert set(rows) <= set(both)
