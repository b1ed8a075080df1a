"""Measurements that are interrupted go on where they were, with the same bits."""

import dataclasses
import itertools

import numpy as np
import pytest

from saejax.errors import Interrupted
from saejax.interventions import engine as ablation
from saejax.interventions import resume as chunks
from saejax.interventions.resume import Chunks
from saejax.interventions.split_model import SplitModel

SHAPES = [(2, 3, 1), (1, 8, 4), (2, 1, 1), (1, 2, 1)]
PLAN = [np.arange(3), np.zeros((2, 2))]


@pytest.fixture
def values():
    return [np.random.default_rng(7).normal(size=shape).astype(np.float32) for shape in SHAPES]


def kept(folder, values, plan=PLAN):
    """Keeps values in folder, each call's worth of them in a chunk of its own."""
    for batch in values:
        with Chunks(folder, SHAPES, plan) as chunk:
            chunk.add(batch)
    return sorted(folder.glob("*"))


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32))


def test_what_was_kept_is_found(tmp_path, values):
    values[1][0, 0] = -0.0
    with pytest.raises(Interrupted), Chunks(tmp_path, SHAPES, PLAN) as chunk:
        chunk.add(values[0])
        chunk.add(values[1])
        raise Interrupted("stopped")
    assert len(list(tmp_path.glob("*"))) == 1
    assert_same(Chunks(tmp_path, SHAPES, PLAN).values, values[:2])
    assert len(kept(tmp_path, values[2:])) == 3
    assert_same(Chunks(tmp_path, SHAPES, PLAN).values, values)


def test_another_call_is_told_apart(tmp_path, values):
    kept(tmp_path, values)
    for other in ([np.arange(4), PLAN[1]], PLAN[:1], [PLAN[0].astype(np.int32), PLAN[1]], [PLAN[0], np.zeros((4, 1))]):
        assert not Chunks(tmp_path, SHAPES, other).values
    assert not Chunks(None, SHAPES, PLAN).values


@pytest.mark.parametrize("harm", ["truncated", "flipped", "missing", "empty", "longer"])
def test_a_damaged_chunk_ends_what_is_found(tmp_path, values, harm):
    kept(tmp_path, values)
    mark = chunks.digest(PLAN)
    path = tmp_path / f"{mark}-1.npz"
    data = bytearray(path.read_bytes())
    flipped = data.index(values[1].tobytes()) + 5
    data[flipped] ^= 16
    if harm == "missing":
        path.unlink()
    elif harm == "longer":
        path.write_bytes((tmp_path / f"{mark}-0.npz").read_bytes())  # not the length of any run of batches
    else:
        path.write_bytes(dict(truncated=data[:-30], flipped=data, empty=b"")[harm])
    assert_same(Chunks(tmp_path, SHAPES, PLAN).values, values[:1])
    kept(tmp_path, values[1:2])
    assert_same(Chunks(tmp_path, SHAPES, PLAN).values, values)


def test_a_chunk_is_written_every_few_seconds(tmp_path, values, monkeypatch):
    clock = itertools.count(step=0.4 * chunks._EVERY)
    monkeypatch.setattr(chunks.time, "monotonic", lambda: next(clock))
    with Chunks(tmp_path, SHAPES, PLAN) as chunk:
        for batch, files in zip(values, (0, 0, 1, 1), strict=True):
            chunk.add(batch)
            assert len(list(tmp_path.glob("*"))) == files
    assert_same(Chunks(tmp_path, SHAPES, PLAN).values, values)


def test_stopped_after_every_batch_it_ends_with_the_same_bits(tmp_path, tiny, make_dictionary, prompts, monkeypatch):
    split = SplitModel(tiny, make_dictionary("resid_post.1"))
    runs = split.run(prompts[:8])
    sets = [[feature] for feature in range(20)] + [[1, 2, 3], list(range(60))]
    whole = ablation.ablate_sets(split, runs, sets, 4, readouts=True)
    ran = []
    run_rows = ablation.run_rows
    monkeypatch.setattr(ablation, "run_rows", lambda *args: ran.append(1) or run_rows(*args))
    monkeypatch.setattr(ablation, "_IN_FLIGHT", 0)
    seen = []

    def once():
        """One attempt, stopped after its first batch."""

        def on_progress(done, total):
            seen.append((done, total))
            if done:
                raise Interrupted("stopped")

        return ablation.ablate_sets(split, runs, sets, 4, on_progress, readouts=True, folder=tmp_path)

    batches, left = 0, whole.tokens
    while left:
        with pytest.raises(Interrupted):
            once()
        batches += 1
        assert len(ran) == batches  # none twice
        (start, total), (done, _) = seen[-2:]
        assert (start, total) == (0, left) and done > 0
        left -= done
    assert batches >= 3
    found = once()
    assert len(ran) == batches and seen[-1] == (0, 0)
    for field in dataclasses.fields(found):
        a, b = getattr(found, field.name), getattr(whole, field.name)
        if field.name == "readouts":
            assert a.keys() == b.keys()
            for pair, others in zip(a.values(), b.values(), strict=True):
                assert_same(pair, others)
        else:
            np.testing.assert_array_equal(a, b)
    ran.clear()
    ablation.ablate_sets(split, runs, sets[:-1], 4, folder=tmp_path)
    assert ran  # another call
