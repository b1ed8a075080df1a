"""The shapes to which batches are padded for programs with fixed shapes."""

import itertools

import numpy as np
import pytest

from saejax.activations import plan as plan_module
from saejax.activations.documents import COLUMNS, Documents
from saejax.activations.plan import Plan
from saejax.activations.settings import CaptureConfig
from saejax.models.lengths import bucket_lengths
from saejax.tasks.corpora import read_corpus
from saejax.tasks.settings import CorpusConfig


def make_plan(lengths, batch_tokens=64, shard_rows=10**6, devices=1):
    table_Nx4 = np.zeros((len(lengths), len(COLUMNS)), np.int32)
    table_Nx4[:, COLUMNS.index("source")] = np.arange(len(lengths))
    documents = Documents.contiguous(np.zeros(sum(lengths), np.int32), lengths, table_Nx4, ("group",))
    return Plan(documents, shard_rows, batch_tokens, last=0, seed=0, devices=devices)


def cost(lengths, chosen, program):
    padded = [min(c for c in chosen if c >= length) for length in lengths]
    return sum(padded) + program * len(chosen)


@pytest.mark.parametrize("program", [0, 30, 100, 10**6])
def test_padding_and_programs_cost_the_least_together(program):
    lengths = np.random.default_rng(0).choice([1, 3, 4, 9, 17, 18, 30, 31], 40)
    chosen = set(bucket_lengths(np.bincount(lengths), program).tolist())
    below = sorted(set(lengths.tolist()))[:-1]
    subsets = itertools.chain.from_iterable(itertools.combinations(below, n) for n in range(len(below) + 1))
    least = min(cost(lengths, (*subset, max(lengths)), program) for subset in subsets)
    assert cost(lengths, chosen, program) == least
    assert len(chosen) == {0: len(below) + 1, 10**6: 1}.get(program, len(chosen))


@pytest.mark.parametrize("devices", [1, 4])
def test_every_batch_fits_its_shape(monkeypatch, devices):
    monkeypatch.setattr(plan_module, "_PROGRAM", 50)
    plan = make_plan(np.random.default_rng(1).integers(1, 90, 50), batch_tokens=64, shard_rows=300, devices=devices)
    shapes = set()
    for shard in range(plan.shards):
        for batch in plan.batches(shard):
            documents, length = batch.ids_BxT.shape
            rows, padded = batch.shape
            assert documents <= rows and length <= padded and not rows % devices
            assert rows * padded <= 64 * devices or rows == devices
            shapes.add((rows, padded))
    assert 2 < len(shapes) < 15


def web_lengths(median=500, context=1024, tokens=1_500_000):
    """Log-normal lengths of texts, cut at the context."""
    texts = np.exp(np.random.default_rng(2).normal(np.log(median), 1.1, tokens // median)).astype(int) + 1
    return np.concatenate([[context] * (length // context) + [length % context] for length in texts]).clip(1)


@pytest.mark.parametrize("per_device", [2048, 8192])
@pytest.mark.parametrize("texts", ["demo", "web", "short web"])
def test_few_rows_hold_no_document_on_eight_devices(texts, per_device):
    """At the default sizes of shards; and documents of a length go together, so that little is padding."""
    if texts == "demo":
        lengths = np.array([len(document.text) // 4 + 1 for document in read_corpus(CorpusConfig())]).clip(1, 512)
    else:
        lengths = web_lengths(500 if texts == "web" else 200)
    plan = make_plan(lengths, per_device, CaptureConfig().shard_rows, devices=8)
    batches = [batch for shard in range(plan.shards - 1) for batch in plan.batches(shard)]
    filler = 1 - sum(len(batch.documents_B) for batch in batches) / sum(batch.shape[0] for batch in batches)
    padding = 1 - sum(batch.stop_B.sum() for batch in batches) / sum(np.prod(batch.shape) for batch in batches)
    print(f"{filler:.1%} of the rows hold no document, {padding:.1%} of the tokens are padding")
    assert filler < 0.1 and padding < 0.2


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
