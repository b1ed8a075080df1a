"""Training batches: every row once an epoch, the same for any number of processes, and from any step on."""

import known_store
import numpy as np
import pytest

from saejax.activations.batches import BatchOrder, RowRange, make_batches
from saejax.activations.store import Store
from saejax.errors import UserError

SITE, BATCH = "resid_post.1", 10
PARTS = ((SITE,),)
WINDOW = 32  # rows, two shards
TRAIN_ROWS = 93 - 16 - 9  # without held-out documents and the first position of every training document


@pytest.fixture
def store(make_store):
    return make_store("float32").store


def read(store, seed=3, epochs=3, batch=BATCH, **options):
    """The vectors [batch, d] of every batch of one part and one site."""
    return [part[0] for (part,) in make_batches(store, PARTS, batch, seed, epochs, WINDOW, **options)]


def row_ids(store, batches):
    """The rows that batches consist of, found by their vectors."""
    rows = np.arange(store.manifest.rows)
    known = {vector.tobytes(): row for row, vector in zip(rows, store.read(SITE, rows), strict=True)}
    return [[known[vector.tobytes()] for vector in batch] for batch in batches]


def expected_order(store, seed, epoch, window_shards):
    """The rows of an epoch in their order, written after the module's text with plain lists."""
    usable = store.rows("train", SITE).tolist()
    shard_rows = store.manifest.shard_rows
    shards = np.random.default_rng([seed, epoch]).permutation(usable[-1] // shard_rows + 1).tolist()
    rows = []
    for window in range(-(-len(shards) // window_shards)):
        chosen = sorted(shards[window * window_shards : (window + 1) * window_shards])
        inside = [row for shard in chosen for row in usable if row // shard_rows == shard]
        rows += np.random.default_rng([seed, epoch, 1 + window]).permutation(inside).tolist()
    return rows


# Statement 2 of WORKSPACE.md, what must hold.
def test_batches_are_the_order_of_the_text_cut_up(store):
    for epoch in range(3):
        order = expected_order(store, 3, epoch, window_shards=2)
        steps = len(order) // BATCH
        batches = make_batches(store, PARTS, BATCH, 3, 3, WINDOW)
        batches = row_ids(store, [batches[epoch * steps + n][0][0] for n in reversed(range(steps))])[::-1]
        assert batches == [sorted(order[i * BATCH : (i + 1) * BATCH]) for i in range(steps)]
    assert np.array_equal(read(store), read(store)) and not np.array_equal(read(store), read(store, seed=4))
    for batch in row_ids(store, read(store)):  # consecutive tokens are not consecutive in training
        documents, positions, _ = store.tokens(np.array(batch))
        assert ((np.diff(positions) == 1) & (np.diff(documents) == 0)).sum() <= 2
    assert len(make_batches(store, PARTS, 1000, 0, 3, WINDOW)) == 0  # fewer rows than a batch


@pytest.mark.parametrize("batch", [10, 17, 1, 68])
@pytest.mark.parametrize("window", [1, 32, 10_000])
def test_every_row_comes_once_in_each_epoch(store, batch, window):
    usable = store.usable("train", SITE)
    order = BatchOrder(usable, batch, seed=3, epochs=2, window_rows=window)
    assert len(usable) == TRAIN_ROWS and order.per_epoch == TRAIN_ROWS // batch
    # The length of a run depends on no site: the next epoch makes up for sinks.
    assert len(order) == store.manifest.tokens["train"] // batch * 2
    epochs = [[order.rows(e * order.per_epoch + i) for i in range(order.per_epoch)] for e in range(2)]
    for epoch in epochs:
        rows = np.concatenate(epoch)
        assert len(set(rows)) == len(rows) == order.per_epoch * batch  # all but the remainder, none twice
        assert set(rows) <= set(usable.rows())
        np.testing.assert_array_equal(usable.rows()[order.ranks(0)], order.rows(0))
    assert batch == TRAIN_ROWS or not np.array_equal(*epochs)


def test_the_first_batch_reads_and_checks_only_its_window(make_store):
    """Damage in a shard of another window is not noticed before that window, and then in one line."""
    store = make_store("float32").store
    order = BatchOrder(store.usable("train", SITE), 5, seed=0, epochs=1, window_rows=16)
    damaged = int(order.rows(len(order) - 1)[0] // 16)
    path = store.folder / SITE / f"shard-{damaged:05d}.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    batches = make_batches(Store.open(store.folder), PARTS, 5, 0, 1, 16)
    batches[0]
    with pytest.raises(UserError, match=rf"shard-{damaged:05d}.npy is damaged: block 0 \(rows 0 to 15") as raised:
        batches[len(batches) - 1]
    assert "\n" not in str(raised.value)


def test_ranges_of_rows_with_exceptions():
    usable = RowRange(5, 23, np.array([5, 9, 10, 22]), 8)
    kept = [row for row in range(5, 23) if row not in (5, 9, 10, 22)]
    assert usable.rows().tolist() == kept and usable.shard_counts().tolist() == [2, 6, 6]
    assert usable.rank(usable.rows()).tolist() == list(range(len(kept)))
    empty = RowRange(0, 0, np.zeros(0, np.int64), 8)
    assert len(empty) == 0 == len(BatchOrder(empty, 1, 0, 3, 8))


@pytest.mark.parametrize("processes", [2, 5])
def test_processes_share_the_batches_of_one(store, processes):
    share = BATCH // processes
    shares = [read(store, slice_of_batch=slice(share * process, share * (process + 1))) for process in range(processes)]
    joined = [np.concatenate(parts) for parts in zip(*shares, strict=True)]
    assert np.array_equal(joined, read(store))


@pytest.mark.parametrize("same_tokens", [True, False])
def test_a_column_of_a_batch_gives_rows_that_are_no_sinks_at_its_input_and_target(make_store, same_tokens, monkeypatch):
    other = next(site for site in known_store.SITES if site != SITE)
    monkeypatch.setitem(known_store.SITES, other, known_store.SITES[SITE])
    store = make_store("bfloat16").store
    sites = (SITE, other)
    both = store.rows("train", *sites)
    assert set(both) == set(store.rows("train", SITE)) & set(store.rows("train", other))
    inputs, targets = make_batches(store, (sites, (other, other)), BATCH, 3, 1, WINDOW, same_tokens=same_tokens)[0]
    assert inputs.shape == targets.shape == (2, BATCH, store.d(SITE))
    assert inputs.dtype == targets.dtype == store.dtype == "bfloat16"
    (rows_B,) = row_ids(store, inputs[:1])
    np.testing.assert_array_equal(targets[0], store.read(other, np.array(rows_B)))
    assert set(rows_B) <= set(both)
    assert np.array_equal(*targets) == same_tokens, "the second column keeps the first token of a document"
    ((alone,), _) = make_batches(store, ((other,), (other,)), BATCH, 3, 1, WINDOW)[0]
    assert np.array_equal(inputs[1], alone) != same_tokens
