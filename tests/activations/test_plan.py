"""The shapes to which batches are padded for programs with fixed shapes."""

import itertools

import numpy as np
import pytest

from saejax.activations import plan as plan_module
from saejax.activations.documents import COLUMNS, Documents
from saejax.activations.plan import Plan


def make_plan(lengths, batch_tokens=64, shard_rows=10**6):
    offsets_N = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    table_Nx5 = np.zeros((len(lengths), len(COLUMNS)), np.int32)
    table_Nx5[:, COLUMNS.index("source")] = np.arange(len(lengths))
    documents = Documents(np.zeros(offsets_N[-1], np.int32), offsets_N, table_Nx5, ("group",))
    return Plan(documents, shard_rows, batch_tokens, last=0, seed=0)


def cost(lengths, chosen, program):
    padded = [min(c for c in chosen if c >= length) for length in lengths]
    return sum(padded) + program * len(chosen)


@pytest.mark.parametrize("program", [0, 30, 100, 10**6])
def test_padding_and_programs_cost_the_least_together(monkeypatch, program):
    monkeypatch.setattr(plan_module, "_PROGRAM", program)
    lengths = np.random.default_rng(0).choice([1, 3, 4, 9, 17, 18, 30, 31], 40)
    plan = make_plan(lengths)
    chosen = {plan.padded_shape(length)[1] for length in lengths.tolist()}
    below = sorted(set(lengths.tolist()))[:-1]
    subsets = itertools.chain.from_iterable(itertools.combinations(below, n) for n in range(len(below) + 1))
    least = min(cost(lengths, (*subset, max(lengths)), program) for subset in subsets)
    assert cost(lengths, chosen, program) == least
    assert len(chosen) == {0: len(below) + 1, 10**6: 1}.get(program, len(chosen))


def test_every_batch_fits_its_shape(monkeypatch):
    monkeypatch.setattr(plan_module, "_PROGRAM", 50)
    plan = make_plan(np.random.default_rng(1).integers(1, 90, 50), batch_tokens=64, shard_rows=300)
    shapes = set()
    for shard in range(plan.shards):
        for batch in plan.batches(shard):
            documents, length = batch.ids_BxT.shape
            rows, padded = plan.padded_shape(length)
            assert documents <= rows and length <= padded and (rows * padded <= 64 or rows == 1)
            shapes.add((rows, padded))
    assert 2 < len(shapes) < 15
