"""Buffers made by the model: every training token once an epoch, shuffled, the same whenever they are made."""

import contextlib
import dataclasses
import functools
import itertools
import re

import numpy as np
import pytest
from torch_sites import relative_error

from saejax.activations import device_buffers
from saejax.activations import stream as stream_of
from saejax.activations.request import PairReader
from saejax.activations.settings import CaptureConfig
from saejax.activations.store import Store
from saejax.activations.stream import BufferOrder, ModelStream
from saejax.activations.text import corpus_documents
from saejax.errors import UserError
from saejax.files import write_json
from saejax.models.settings import ModelConfig
from saejax.parallel.settings import MeshConfig
from saejax.runner.registry import default_configs
from saejax.runner.workspace import Run
from saejax.stages.capture.run import run_capture
from saejax.tasks.settings import CorpusConfig

SITES = ("resid_post.1", "mlp_out.0")
BUFFER = 100


@pytest.fixture(params=["torch", "jax"])
def backend(request):
    """By torch the rows pass through the host; by JAX they stay on the devices."""
    return request.param


@pytest.fixture
def run(tiny_llama, tmp_path, backend):
    """A run over 60 short documents."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(f"The {i % 7} dogs run near {i} rivers, and {i + 3} trees." for i in range(60)))
    configs = default_configs() | ModelConfig(path=str(tiny_llama), backend=backend)
    configs |= CorpusConfig(path=str(corpus), held_out=0.2, context=20)
    configs |= CaptureConfig(sites=SITES, store_dtype="float32", max_sink_share=1.0, batch_tokens=128)

    return Run("capture", "", tmp_path, configs, {}, say=lambda line: None)


def test_a_request_to_stop_is_heard_while_the_second_of_two_models_reads():
    read = []

    class Reads:
        def __init__(self, name):
            self.name, self.widths = name, {}

        def read(self, batches, take):
            read.extend((self.name, batch) for batch in batches)

    def batches():
        for number in range(40):
            if ("second", 0) in read:  # a signal came meanwhile
                return
            yield number

    PairReader(Reads("first"), Reads("second")).read(batches(), None)
    assert len(read) < 20 and [batch for name, batch in read if name == "second"] == [0, 1, 2, 3]


def test_a_buffer_says_how_far_it_is(run, monkeypatch):
    """With large buffers of a large model it takes many minutes."""
    lines = []
    monkeypatch.setattr("saejax.activations.progress.SAY_EVERY", 0.0)
    with contextlib.closing(make_stream(dataclasses.replace(run, say=lines.append), buffer=1000)) as stream:
        assert stream.fill(0)
    assert re.fullmatch(r"buffer 1 of 2: [0-9]+ of 1,000 tokens  .* s to go", lines[0])
    assert lines[-1].startswith("buffer 1 of 2: 1,000 tokens, ")


def make_stream(run, parts=(SITES,), buffer=BUFFER):
    """The stream of the run's settings."""
    documents = functools.partial(corpus_documents, run.configs)
    return ModelStream(run.configs, parts, buffer, documents, run.say, run.stopping)


def all_rows(stream):
    """Every vector at the first site, without the sink rule."""
    vectors = []
    for buffer in range(len(stream)):
        assert stream.fill(buffer)
        vectors.append(stream.read(SITES[0], np.arange(stream.size(buffer))).copy())
    return vectors


def test_the_buffers_hold_the_training_rows_of_a_store(run, tmp_path):
    stream = make_stream(run)
    vectors = all_rows(stream)
    assert [len(part) for part in vectors[:-1]] == [BUFFER] * (len(stream) - 1) and len(stream) > 3
    write_json(run.folder / "started.json", {})
    run_capture(run)
    store = Store.open(run.folder)
    index = np.arange(store.manifest.rows)
    document_R, _, _ = store.tokens(index)
    expected = store.read(SITES[0], index[store.documents.split_N[document_R] == 0])
    assert len(np.concatenate(vectors)) == len(expected)
    direction = np.random.default_rng(0).normal(size=64)
    a, b = (np.sort(values @ direction) for values in (np.concatenate(vectors), expected))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert (stream.d(SITES[0]), stream.dtype) == (64, np.float32)
    assert stream.model.fingerprint == store.model.fingerprint


@pytest.mark.parametrize("backend", ["jax"], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_the_devices_the_rows_are_those_of_the_host(run, dtype, monkeypatch):
    capture = dataclasses.replace(run.configs[CaptureConfig], store_dtype=dtype)
    run = dataclasses.replace(run, configs=run.configs | capture | MeshConfig(member=2))
    parts = [(SITES[1], SITES[0]), (SITES[0], SITES[0].replace("1", "0"))]  # inputs and targets of two members
    there = make_stream(run, parts)
    monkeypatch.setattr(stream_of, "_device_buffers", lambda *arguments: None)
    here = make_stream(run, parts)
    assert here.on_devices is None and there.sites == here.sites
    for buffer in (0, len(here) - 1, 1):  # the last one is shorter
        assert here.fill(buffer) and there.fill(buffer)
        rows_R = here.rows("train", *here.sites)
        np.testing.assert_array_equal(there.rows("train", *there.sites), rows_R)
        for part, held in zip(parts, there.on_devices, strict=True):
            assert held.shape == (2, 100, 64) and here.dtype == there.dtype
            for site, rows_RxD in zip(part, np.asarray(held).view(here.dtype), strict=True):
                # Two programs: a value in the middle of two of bfloat16, which are 2^-7 apart, may go to either.
                within = dict(float32=1e-5, bfloat16=1e-5 + 2**-7)[dtype]
                assert relative_error(rows_RxD[rows_R], here.read(site, rows_R)) < within
                np.testing.assert_array_equal(there.read(site, rows_R[:3]), rows_RxD[rows_R[:3]])
    for site in here.sites:
        assert there.max_norm(site) == pytest.approx(here.max_norm(site), rel=1e-6)


@pytest.mark.parametrize("backend", ["jax"], indirect=True)
def test_nothing_passes_through_the_host(run, monkeypatch):
    stream, programs = make_stream(run), []
    write = stream._buffers._write

    def noted(*given):
        programs.append(write.lower(*given).compile().as_text())
        return write(*given)

    monkeypatch.setattr(stream._buffers, "_write", noted)
    assert stream.fill(0) and programs
    assert not any(re.search(r"infeed|outfeed|callback|host_transfer|send-done|recv-done", text) for text in programs)


def test_a_value_that_is_not_finite_ends_it(run):
    stream = make_stream(run)
    assert stream.fill(0)
    norms = stream._norms[SITES[0]]
    stream._norms = {**stream._norms, SITES[0]: np.where(np.arange(len(norms)) == 7, np.nan, norms)}
    document, position, _ = stream._plan.index(0)[7].tolist()
    place = stream._plan.documents.place(document, position)
    with pytest.raises(UserError, match=f"resid_post.1 are NaN or infinite: {re.escape(place)}: expected finite"):
        stream._check(stream._plan, 0)


@pytest.mark.parametrize("backend", ["jax"], indirect=True)
def test_a_buffer_that_does_not_fit_is_refused(run, monkeypatch):
    monkeypatch.setattr(device_buffers, "free_bytes", lambda mesh: 1000)
    with pytest.raises(UserError, match="a buffer of 104 tokens takes 0.00 GB on each device"):
        make_stream(run)


def test_a_buffer_comes_out_the_same_whenever_it_is_made(run):
    stream = make_stream(run)
    first = all_rows(stream)
    repeated = make_stream(run)
    assert repeated.fill(0) and repeated.fill(2)
    np.testing.assert_array_equal(repeated.read(SITES[0], np.arange(BUFFER)), first[2])


def test_sinks_are_left_out_by_the_first_buffers_median(run):
    stream = make_stream(run)
    stream.fill(0)
    norms = np.linalg.norm(stream.read(SITES[0], np.arange(BUFFER)).astype(np.float64), axis=1)
    assert stream.max_norm(SITES[0]) == pytest.approx(10 * np.median(norms), rel=1e-6)
    stream._max_norms[SITES[0]] = float(np.quantile(norms, 0.7))
    kept = stream.rows("train", *SITES)
    assert len(kept) == 70 and norms[kept].max() <= np.quantile(norms, 0.7)
    before = stream.max_norm(SITES[1])
    stream.fill(1)
    assert stream.max_norm(SITES[1]) == before


def test_held_out_rows_keep_their_own_norms(run):
    stream = make_stream(run)
    assert stream.read_held_out(40)
    norm_N = np.linalg.norm(stream._held_out[SITES[0]].astype(np.float64), axis=1)
    assert stream.fill(0) and len(norm_N) > 20
    stream._max_norms[SITES[0]] = float(np.median(norm_N)) * (1 + 1e-6)
    kept = stream.held_out(len(norm_N), SITES[0])[SITES[0]]
    np.testing.assert_array_equal(kept, stream._held_out[SITES[0]][norm_N <= stream.max_norm(SITES[0])])


def test_the_last_positions_of_held_out_rows_are_those_of_their_texts(run):
    """Of a text in pieces, the sample may hold the first ones alone."""
    configs = run.configs | dataclasses.replace(run.configs[CaptureConfig], last=1)
    configs |= dataclasses.replace(run.configs[CorpusConfig], context=6, held_out=0.5)
    stream = make_stream(dataclasses.replace(run, configs=configs))
    whole, sample = stream.documents, stream.documents.sample(20)
    assert stream.read_held_out(20)
    ends = {}
    for text, end in zip(whole.column("source"), whole.column("start") + whole.lengths_N, strict=True):
        ends[text] = max(end, ends.get(text, 0))
    own = range(sample.train_count, len(sample))
    last = [i for i in own if sample.column("start")[i] + sample.lengths_N[i] == ends[sample.column("source")[i]]]
    assert len(stream._held_out[SITES[0]]) == len(last) < len(own)


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
    assert not np.array_equal(order.places(0, 0, 20), order.places(1, 0, 20)), "each epoch has an order of its own"


def test_rows_fill_up_for_sinks_each_before_any_twice():
    order = BufferOrder((20,), 5, seed=1)
    places = order.places(0, 0, 17)  # three of the 20 are sinks
    assert places.shape == (4, 5) and sorted(places.ravel()[:17]) == list(range(17))
    assert len(set(places.ravel()[17:])) == 3
