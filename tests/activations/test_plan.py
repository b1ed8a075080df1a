"""The shapes to which batches are padded for programs with fixed shapes."""

import itertools

import numpy as np
import pytest

from saejax.activations import plan as plan_module
from saejax.activations.documents import COLUMNS, Documents
from saejax.activations.plan import Plan


def make_plan(lengths, batch_tokens=64, shard_rows=10**6):
    table_Nx4 = np.zeros((len(lengths), len(COLUMNS)), np.int32)
    table_Nx4[:, COLUMNS.index("source")] = np.arange(len(lengths))
    documents = Documents.contiguous(np.zeros(sum(lengths), np.int32), lengths, table_Nx4, ("group",))
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


@pytest.mark.parametrize(("tokens", "recorded"), [(10, []), (20, [28, 29]), (40, [28, 29, 8, 9])])
def test_of_some_documents_the_last_positions_are_those_of_their_texts(tokens, recorded):
    """Pieces stand in random order: here the second of a text first, then its last, another text, and its first."""
    table = np.array([[0, 0, source, start] for source, start in ((0, 10), (0, 20), (1, 0), (0, 0))], np.int32)
    whole = Documents.contiguous(np.arange(40, dtype=np.int32), [10] * 4, table, ("g",))
    some = whole.sample(tokens)
    plan = Plan(some, 100, 100, last=2, seed=0, whole=whole)
    index = plan.index(0) if plan.rows else np.zeros((0, 3), int)
    found = {(some.column("source")[document], some.column("start")[document] + at) for document, at, _ in index}
    assert found == {(number // 2, position) for number, position in enumerate(recorded)}
