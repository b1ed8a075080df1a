"""Every statistic against a plain computation from dense activations; contexts against those of SAEDashboard."""

import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import planted
import pytest
from tiny_models import save_tiny

from saejax.activations.documents import COLUMNS, Documents
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.interpret import firings, neighbours
from saejax.interpret.feature_record import feature_words, top_tokens
from saejax.interpret.records import BINS, GROUPS, LOWEST
from saejax.models.loading import load_model


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


def test_a_feature_without_a_label_is_named_by_the_tokens_of_the_largest_sums():
    tokens = [" two", "one", "two", "\n", "three", "", "four", " one"]
    acts = [1.0, 1.9, 1.0, -1.5, 0.2, 9.0, 0.0, 0.3]
    assert feature_words(tokens, acts) == ("one", "two", "\n"), "the sum counts, and spaces around a token do not"
    assert feature_words(tokens[-2:], [0.0, 2.0]) == ("one",) and feature_words([], []) == ()
    rows = [dict(text=text, sum=act) for text, act in zip(tokens, acts, strict=True)]
    assert top_tokens(dict(feature=0, tokens=rows)) == "“one” “two” “\n”" and top_tokens(dict(feature=0)) == ""


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
    ids, _ = neighbours.nearest_rows(made[1].W_dec_FxD[:3], 5)  # of three features, each has two others
    assert [sorted(row) for row in ids.tolist()] == [[1, 2], [0, 2], [0, 1]]


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


@pytest.mark.parametrize("family", ["gpt2", "phi"])
def test_output_tokens_leave_biases_out_in_pytorch_too(family, tmp_path, one_device):
    save_tiny(tmp_path, family)
    models = load_model(str(tmp_path), mesh=one_device), load_model(str(tmp_path), backend="torch")
    rows = np.random.default_rng(0).normal(size=(5, models[0].config.d_model)).astype(np.float32)
    jax_found, torch_found = (neighbours.output_tokens(model, jnp.asarray(rows), 6) for model in models)
    np.testing.assert_array_equal(torch_found.ids, jax_found.ids)
    np.testing.assert_allclose(torch_found.logits, jax_found.logits, rtol=1e-4, atol=1e-5)


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
