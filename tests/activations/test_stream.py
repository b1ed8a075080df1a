"""Buffers made by the model: every training token once an epoch, shuffled, the same whenever they are made."""

import itertools

import numpy as np
import pytest

from saejax.activations.capture import run_capture
from saejax.activations.store import Store
from saejax.activations.stream import BufferOrder, ModelStream
from saejax.registry import GROUPS
from saejax.settings import CaptureConfig, CorpusConfig, ModelConfig
from saejax.workspace import Run, write_json

SITES = ("resid_post.1", "mlp_out.0")
BUFFER = 100


@pytest.fixture
def make_run(tiny_llama, tmp_path):
    """A run over 60 short documents."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(f"The {i % 7} dogs run near {i} rivers, and {i + 3} trees." for i in range(60)))
    configs = {group: cls() for group, cls in GROUPS.items()} | dict(
        model=ModelConfig(path=str(tiny_llama)),
        corpus=CorpusConfig(path=str(corpus), held_out=0.2, context=20),
        capture=CaptureConfig(sites=SITES, store_dtype="float32", max_sink_share=1.0, batch_tokens=128),
    )

    def make(stopping=lambda: False):
        return Run("train", "topk", tmp_path, configs, {}, say=lambda line: None, stopping=stopping)

    return make


def all_rows(stream):
    """Every vector at the first site, without the sink rule."""
    vectors = []
    for buffer in range(len(stream)):
        assert stream.fill(buffer)
        vectors.append(stream.read(SITES[0], np.arange(stream.size(buffer))).copy())
    return vectors


def test_the_buffers_hold_the_training_rows_of_a_store(make_run, tmp_path):
    run = make_run()
    stream = ModelStream(run, SITES, BUFFER)
    vectors = all_rows(stream)
    assert [len(part) for part in vectors[:-1]] == [BUFFER] * (len(stream) - 1) and len(stream) > 3
    write_json(run.folder / "started.json", {})
    run_capture(run)
    store = Store.open(run.folder)
    index = np.arange(store.manifest["rows"])
    document_R, _, _ = store.tokens(index)
    expected = store.read(SITES[0], index[store.documents.split_N[document_R] == 0])
    assert len(np.concatenate(vectors)) == len(expected)
    direction = np.random.default_rng(0).normal(size=64)
    a, b = (np.sort(values @ direction) for values in (np.concatenate(vectors), expected))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert (stream.d(SITES[0]), stream.dtype) == (64, np.float32)
    assert stream.model["fingerprint"] == store.model["fingerprint"]


def test_a_buffer_comes_out_the_same_whenever_it_is_made(make_run):
    stream = ModelStream(make_run(), SITES, BUFFER)
    first = all_rows(stream)
    other = ModelStream(make_run(), SITES, BUFFER)
    assert other.fill(0) and other.fill(2)
    np.testing.assert_array_equal(other.read(SITES[0], np.arange(BUFFER)), first[2])


def test_sinks_are_left_out_by_the_first_buffers_median(make_run):
    stream = ModelStream(make_run(), SITES, BUFFER)
    stream.fill(0)
    norms = np.linalg.norm(stream.read(SITES[0], np.arange(BUFFER)).astype(np.float64), axis=1)
    assert stream.max_norm(SITES[0]) == pytest.approx(10 * np.median(norms), rel=1e-6)
    stream._max_norms[SITES[0]] = float(np.quantile(norms, 0.7))
    kept = stream.rows("train", *SITES)
    assert len(kept) == 70 and norms[kept].max() <= np.quantile(norms, 0.7)
    before = stream.max_norm(SITES[1])
    stream.fill(1)
    assert stream.max_norm(SITES[1]) == before


def test_it_stops_while_a_buffer_is_made(make_run):
    asked = iter([False, True])
    stream = ModelStream(make_run(lambda: next(asked)), SITES, 400)  # several batches
    assert not stream.fill(0) and next(asked, None) is None


def test_every_row_comes_once_an_epoch():
    sizes, batch = (20, 20, 7, 3), 5
    order = BufferOrder(sizes, batch, seed=1)
    assert order.per_epoch == 4 + 4 + 1
    visited = []
    for epoch in range(3):
        seen = []
        for step in range(epoch * 9, epoch * 9 + 9):
            at, buffer, first, stop = order.locate(step)
            assert at == epoch and first <= step < stop
            seen += [(buffer, row) for row in order.places(epoch, buffer, sizes[buffer])[step - first]]
        assert len(set(seen)) == len(seen) == 45
        visited.append([buffer for buffer, _ in itertools.groupby(buffer for buffer, _ in seen)])
        rows = [row for buffer, row in seen if buffer == 0]
        assert rows != sorted(rows) and sorted(rows) == list(range(20))
    assert visited[0] == [0, 1, 2] and any(order != [0, 1, 2] for order in visited[1:])


def test_rows_fill_up_for_sinks_each_before_any_twice():
    order = BufferOrder((20,), 5, seed=1)
    places = order.places(0, 0, 17)  # three of the 20 are sinks
    assert places.shape == (4, 5) and sorted(places.ravel()[:17]) == list(range(17))
    assert len(set(places.ravel()[17:])) == 3
