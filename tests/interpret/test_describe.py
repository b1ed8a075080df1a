"""Every statistic against a plain computation from dense activations; contexts against SAEDashboard and brute force."""

import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import planted
import pytest

from saejax.activations.chunker import SPLITS
from saejax.activations.documents import COLUMNS, Documents
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.interpret import contexts, firings, neighbours
from saejax.interpret.contexts import as_example, strongest, top_contexts
from saejax.interpret.firings import Block
from saejax.interpret.records import BINS, GROUPS, LOWEST
from saejax.interpret.text import CodedText
from saejax.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("describe")
    store, dictionary = planted.make_store(folder / "store", documents=60), planted.dictionary(24)
    records = planted.describe(folder / "own", store, dictionary, examples=5, draws=3)
    json.dumps(records, allow_nan=False)
    return store, dictionary, records, planted.Dense(store, dictionary)


def test_counts_and_histogram(made):
    *_, records, dense = made
    for i, one in enumerate(records):
        own = dense.f[:, i][dense.f[:, i] > 0]
        assert one["fires"] == len(own) and one["rate"] == pytest.approx(len(own) / len(dense.f), rel=1e-3)
        if not len(own):
            assert "examples" not in one and i == len(planted.CONCEPTS)
            continue
        assert (one["mean"], one["max"]) == pytest.approx((own.mean(), own.max()), rel=1e-3)
        bins = [0] * BINS
        for value in own:
            bins[min(max(math.floor(2 * (math.log2(value) - LOWEST)), 0), BINS - 1)] += 1
        assert one["histogram"] == bins


def test_draws_are_those_of_the_largest_priority_in_each_tenth(made):
    *_, records, dense = made
    for i, one in enumerate(records):
        rows = np.flatnonzero(dense.f[:, i] > 0)
        rows = rows[np.argsort(dense.f[rows, i], kind="stable")]
        tenths = [[row for n, row in enumerate(rows) if n * GROUPS // len(rows) == group] for group in range(GROUPS)]
        expected = []
        for group, some in enumerate(tenths):
            drawn = sorted(some, key=lambda row: -int(firings.priority(dense.place[[row]])[0]))[:3]
            expected += [(group, int(dense.document[row]), int(dense.position[row])) for row in drawn]
        assert [(e["group"], e["document"], e["position"]) for e in one.get("groups", [])] == expected
        assert (len(one.get("tenths", [])) == GROUPS + 1) == bool(len(rows))
        if all(tenths):
            edges = [*(some[0] for some in tenths), rows[-1]]
            np.testing.assert_allclose(one["tenths"], dense.f[edges, i], rtol=1e-3)


def test_priorities_are_uniform_and_do_not_depend_on_their_company():
    every = firings.priority(np.arange(100_000)) / 2.0**64
    assert abs(every.mean() - 0.5) < 0.005 and abs(np.corrcoef(every[:-1], every[1:])[0, 1]) < 0.02
    assert firings.priority(np.array([77]))[0] / 2.0**64 == every[77]


def test_tokens_of_the_largest_sums(made):
    *_, records, dense = made
    for i, one in enumerate(records):
        if one["fires"]:
            total = {t: dense.f[dense.token == t, i].sum() for t in np.unique(dense.token)}
            best = sorted(total, key=lambda t: -total[t])[:8]
            assert [row["text"] for row in one["tokens"]] == [planted.TEXTS[t] for t in best if total[t]]
            for t, row in zip(best, one["tokens"], strict=False):
                here = dense.token == t
                assert (row["hits"], row["occurrences"]) == ((dense.f[here, i] > 0).sum(), here.sum())
                assert (row["sum"], row["mean"]) == pytest.approx((total[t], dense.f[here, i].mean()), rel=1e-3)


def test_nearest_rows(made, monkeypatch):
    monkeypatch.setattr(neighbours, "ROWS", 7)
    W = np.asarray(made[1].W_dec_FxD[...], np.float64)
    W /= np.linalg.norm(W, axis=1, keepdims=True)
    cosine = W @ W.T - 3 * np.eye(len(W))
    ids, found = neighbours.nearest_rows(made[1].W_dec_FxD[...], 3)
    np.testing.assert_allclose(found, -np.sort(-cosine, axis=1)[:, :3], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(cosine, ids, 1), found, atol=1e-6)


def test_on_a_cpu_xla_does_not_sort_the_vocabulary(lm):
    program = neighbours.logit_lens.lower(lm.config, 4, lm.params, jnp.zeros((8, 64))).compile().as_text()
    assert "TopK" in program and " sort(" not in program, "a sort takes forty times as long"


def test_output_tokens(lm):
    rows = np.random.default_rng(0).normal(size=(300, 64)).astype(np.float32)
    found = neighbours.output_tokens(lm, rows, 4)
    ids, logits = found.ids, found.logits
    params = {name: np.asarray(value, np.float64) for name, value in lm.params.items() if not name.startswith("layers")}
    head = params["embed_VxD"].T if lm.config.tied else params["unembed_DxV"]
    wide = rows.astype(np.float64)
    wide /= np.sqrt((wide**2).mean(1, keepdims=True) + lm.config.norm_eps)
    expected = (wide * params["final_norm_D"]) @ head
    expected -= expected.mean(1, keepdims=True)
    np.testing.assert_allclose(logits[:, :4], -np.sort(-expected, axis=1)[:, :4], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits[:, ::-1][:, :4], np.sort(expected, axis=1)[:, :4], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(expected, ids, 1), logits, rtol=1e-4, atol=1e-4)
    for row, counts in zip(expected, found.counts, strict=True):  # rounding may move a logit over an edge
        assert counts.sum() == len(row) and np.abs(counts - np.histogram(row, neighbours.BINS)[0]).sum() <= 4
    every = neighbours.output_tokens(lm, rows[:2], 1000)  # more than the model knows
    (raised,) = every.raised(slice(1, 2))
    assert sorted(raised) == list(range(lm.config.vocab)) and np.all(np.diff(every.logits[1, : len(raised)]) <= 0)


MADE = json.loads((Path(__file__).parent / "sae_dashboard.json").read_text())  # by scripts/dashboard_fixture.py
EXAMPLES = 8


@pytest.fixture(scope="module")
def of_dashboard(tmp_path_factory):
    """What we say of the dictionary's features, on a store of the same vectors."""
    folder, ids_NxT = tmp_path_factory.mktemp("dashboard"), np.array(MADE["ids"], np.int32)
    count, length = ids_NxT.shape
    values_NxTxD = np.array(MADE["embed"])[ids_NxT] + np.array(MADE["position"])
    padded = np.pad(values_NxTxD, ((0, 0), (0, 0), (0, planted.WIDTH - values_NxTxD.shape[2]))).astype(np.float32)
    table = np.zeros((count, len(COLUMNS)), np.int32)
    table[:, COLUMNS.index("group")] = np.arange(count)
    names = tuple(map(str, range(count)))
    documents = Documents.contiguous(ids_NxT.reshape(-1), np.full(count, length), table, names)
    store = planted.written(folder / "store", documents, padded)
    W_enc_DxF = np.array(MADE["W_enc"])
    W_enc_DxF = np.pad(W_enc_DxF, ((0, planted.WIDTH - len(W_enc_DxF)), (0, 0)))
    fields = dict(kind="standard", site=planted.SITE, d_in=planted.WIDTH, centred=False)
    arrays = dict(W_enc_DxF=W_enc_DxF, W_dec_FxD=W_enc_DxF.T, b_enc_F=MADE["b_enc"], b_dec_D=np.zeros(planted.WIDTH))
    arrays = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    dictionary = Dictionary(DictionaryConfig(n_features=W_enc_DxF.shape[1], **fields), **arrays)
    return planted.describe(folder / "own", store, dictionary, EXAMPLES, draws=1)


def test_firing_rates_and_the_strongest_contexts_are_those_of_saedashboard(of_dashboard):
    """The tool shows the strongest tokens, we the strongest of each document; order, places and activations."""
    shown, tokens = 0, np.array(MADE["ids"]).size
    for ours, theirs in zip(of_dashboard, MADE["features"], strict=True):
        density = float(theirs["title"].split("= ")[1].rstrip("%"))
        assert 100 * ours["fires"] / tokens == pytest.approx(density, abs=6e-4)
        first = {context["text"]: context for context in reversed(theirs["top"])}  # a text's strongest
        ranked = [context for context in theirs["top"] if first[context["text"]] is context][:EXAMPLES]
        examples = ours["examples"][: len(ranked)]
        assert [(e["document"], e["position"]) for e in examples] == [(c["text"], c["position"]) for c in ranked]
        for example, context in zip(examples, ranked, strict=True):
            start = example["position"] - example["peak"]
            for step, (piece, act) in enumerate(zip(example["tokens"], example["acts"], strict=True), start):
                if step:  # the tool leaves out the first token
                    assert piece == planted.TEXTS[context["ids"][step - 1]]
                    assert (act or 0.0) == pytest.approx(context["acts"][step - 1], rel=6e-3, abs=1e-4)
        shown += len(ranked)
    assert shown > 40


def search(activations, count, ids=None, groups=None):
    """(document, position) of the chosen contexts of a feature with these activations, a list for each document."""
    lengths = [len(row) for row in activations]
    ids = ids or [[100 * d + p for p in range(len(row))] for d, row in enumerate(activations)]
    table = np.zeros((len(lengths), len(COLUMNS)), np.int32)
    table[:, COLUMNS.index("split")] = SPLITS.index("train")
    table[:, COLUMNS.index("group")] = np.arange(len(lengths)) if groups is None else groups
    names = tuple(map(str, range(len(lengths))))
    documents = Documents.contiguous(np.concatenate(ids).astype(np.int32), np.array(lengths), table, names)
    text = CodedText(documents, [str(i) for i in range(100 * len(lengths) + 100)])
    value = np.concatenate(activations).astype(np.float32)
    place = np.flatnonzero(value > 0)
    block = Block(0, 1, np.zeros(len(place), np.int64), place, value[place])
    chosen = np.array(strongest(block, text, 0, count), np.int64)
    return list(zip(text.document(chosen).tolist(), text.position(chosen).tolist(), strict=True))


@pytest.fixture
def short(monkeypatch):
    """Contexts of one token before and after."""
    monkeypatch.setattr(contexts, "BEFORE", 1)
    monkeypatch.setattr(contexts, "AFTER", 1)


@pytest.mark.parametrize(
    ("activations", "expected"),
    [
        ([[9, 0, 0, 8, 0, 0, 7, 0, 6], [0, 2, 0]], [(0, 0), (0, 3), (1, 1)]),  # a new document comes first
        ([[9, 8, 7, 0, 0, 0, 3]], [(0, 0), (0, 2), (0, 6)]),  # a place inside a context that is shown is passed over
        ([[0, 0], [0, 0]], []),
    ],
)
def test_contexts_of_documents(short, activations, expected):
    assert search(activations, 3) == expected


def test_new_groups_come_before_more_documents_of_one_that_is_shown():
    assert [d for d, _ in search([[9, 0], [8, 0], [7, 0], [2, 0], [1, 0]], 3, groups=[0, 0, 0, 1, 1])] == [0, 1, 3]


def test_strong_documents_strong_places_and_repeated_contexts_crowd_nothing_out(short):
    assert search([[9, 0]] * 60 + [[2, 0]], 2, groups=[0] * 60 + [1])[1] == (60, 0)
    assert [d for d, _ in search([[9.0] * 60, [0, 2, 0]], 2, groups=[0, 0])] == [0, 1]
    assert search([[0, 5, 0]] * 11 + [[0, 3, 0]], 3, ids=[[1, 2, 3]] * 11 + [[1, 2, 4]]) == [(0, 1), (11, 1)]


def test_the_search_finds_what_brute_force_finds(tmp_path):
    """On a store whose documents all differ: the strongest place of each of the strongest documents."""
    store, dictionary = planted.make_store(tmp_path / "store"), planted.dictionary(40)
    found = top_contexts(store, dictionary, [3, 0, 39], 5, planted.TEXTS, make_mesh())
    assert list(found) == [3, 0, 39]
    dense = planted.Dense(store, dictionary)
    for feature, shown in found.items():
        best = {}
        for document, position, value in zip(dense.document, dense.position, dense.f[:, feature], strict=True):
            best[document] = max(best.get(document, (0.0, 0)), (float(value), -position))
        order = sorted(best, key=lambda document: -best[document][0])[:5]
        expected = [(document, -best[document][1]) for document in order if best[document][0] > 0]
        assert [(context["document"], context["position"]) for context in shown] == expected
        for context in shown:
            example, strongest = as_example(context, store.documents), best[context["document"]][0]
            assert example.activation == max(example.activations) == pytest.approx(strongest, rel=5e-3)
