"""Parts of edges that go through heads: what is gone when a head is taken out; results and tables of a graph."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from graph_pages import scores
from made_graphs import assert_heads_are_the_only_way, heads_by_edge
from made_transcoders import made_set

from saejax.attribution.forms import outputs
from saejax.attribution.forms.neuronpedia import to_document
from saejax.attribution.forms.outputs import attention_tables
from saejax.attribution.graph.nodes import LOGIT
from saejax.attribution.heads import contributions
from saejax.attribution.heads.contributions import head_contributions, read_attention
from saejax.attribution.heads.query_key import OWN_BIAS
from saejax.attribution.local.rows import RowTracer
from saejax.attribution.local.sources import Sources
from saejax.attribution.requests import read_heads
from saejax.attribution.results import HeadResults
from saejax.attribution.trace.prompt import trace_prompt
from saejax.attribution.trace.targets import Direction
from saejax.errors import UserError
from saejax.runner.config import Configs
from saejax.settings import GraphConfig

IDS = [5, 17, 33, 8, 41]


@pytest.fixture(scope="module", params=[False, True])
def traced(lm, request):
    targets = [7, Direction(np.eye(lm.config.d_model, dtype=np.float32)[3], layer=2, position=4)]
    return trace_prompt(lm, made_set(lm, 24, skip=request.param), IDS, targets=targets)


@pytest.fixture(scope="module")
def pruned(traced):
    return traced.graph.prune(0.9, 0.98)


plain = pytest.mark.parametrize("traced", [False], indirect=True)


def edges_of(graph):
    return list(zip(*(part.tolist() for part in graph.edges()), strict=True))


def edges_without(traced, layer, head):
    """The whole matrix of a replacement model in which a head adds nothing; its weights elsewhere are as they were."""
    local, readouts = traced.local, traced.readouts
    model = copy.copy(local.model)
    params = dict(model.params)
    params["layers.o_HxKxD"] = params["layers.o_HxKxD"].at[layer, head].set(0)
    model.params = params
    changed, sources, active = copy.copy(local), Sources.of(local), local.active
    changed.model = model
    matrix_TxS = np.zeros((len(active) + len(readouts.labels), len(sources.nodes)), np.float32)
    rows, put = RowTracer(changed, sources, len(matrix_TxS)), matrix_TxS[len(active) :].__setitem__
    rows(active.layer_A, active.position_A, changed.encoder_rows(np.arange(len(active))), matrix_TxS.__setitem__)
    rows(readouts.layer_K, readouts.position_K, readouts.vector_KxD, put, in_stream=True)
    return matrix_TxS


@plain  # a head that is taken out changes the norm before its layer's skip path, which is to be held
def test_a_part_is_what_vanishes_without_the_head(traced):
    graph, pruned = traced.graph, traced.graph.prune(1.0, 1.0)
    found = heads_by_edge(head_contributions(traced.local, traced.readouts, pruned))
    edges, whole = edges_of(pruned), pruned.pruning.node_N
    row_of = {node: row for row, node in enumerate(graph.target_R.tolist())}
    scale, compared = max(abs(weight) for *_, weight in edges), 0
    for layer, head in ((0, 1), (2, 0), (3, 3)):
        without_TxS = edges_without(traced, layer, head)
        for source, target, _ in edges:
            if pruned.nodes.layer_N[target] == layer:  # the norm before what this layer's features read moves, too
                continue
            row, column = row_of[int(whole[target])], int(whole[source])
            wanted = graph.adjacency_RxS[row, column] - without_TxS[row, column]
            ours = found.get((source, target), {}).get((layer, head), 0.0)
            assert abs(ours - wanted) < 1e-5 * scale
            compared += abs(wanted) > 1e-3 * scale
    assert len(edges) > 200 and compared > 50


def test_heads_alone_move_between_positions(traced):
    assert_heads_are_the_only_way(traced)


def test_blocks_and_groups_of_sources_and_targets_change_nothing(traced, monkeypatch):
    pruned = traced.graph.prune(1.0, 1.0)
    whole = head_contributions(traced.local, traced.readouts, pruned)
    assert len(np.unique(whole.source_E)) > 32
    monkeypatch.setattr(contributions, "_BLOCK", (16, 16))
    monkeypatch.setattr(contributions, "free_bytes", lambda mesh: 0)  # as many groups as blocks
    parts = head_contributions(traced.local, traced.readouts, pruned)
    np.testing.assert_allclose(parts.value_ExLxH, whole.value_ExLxH, atol=1e-6)
    # By the nodes' ids the largest contributions, to four digits.
    named, ids = whole.by_edge(top=2), pruned.ids
    assert named.keys() == {(ids[source], ids[target]) for source, target in heads_by_edge(whole)}
    for (source, target), heads in heads_by_edge(whole).items():
        wanted = sorted(heads.items(), key=lambda item: -abs(item[1]))[:2]
        assert [head[:2] for head in named[ids[source], ids[target]]] == [head for head, _ in wanted]
        values = [head[2] for head in named[ids[source], ids[target]]]
        np.testing.assert_allclose(values, [value for _, value in wanted], rtol=1e-3)


def test_leading_heads_are_signed_sums(traced, pruned):
    """No share is reported: one head can reach more than a target's input, and heads do not add up."""
    found = head_contributions(traced.local, traced.readouts, pruned)
    _, target_E, weight_E = pruned.edges()
    input_N = np.bincount(target_E, np.abs(weight_E), len(pruned.nodes))
    net = np.zeros((len(pruned.nodes), 4, 4))
    largest = {}
    for (source, target), heads in heads_by_edge(found).items():
        for (layer, head), value in heads.items():
            net[target, layer, head] += value
            if abs(value) > abs(largest.get((layer, head), (0,))[0]):
                largest[layer, head] = value, (source, target)
    targets = np.unique(target_E)
    mean = (net[targets] / input_N[targets, None, None]).mean(axis=0)
    size = (np.abs(net[targets]) / input_N[targets, None, None]).mean(axis=0)
    ids, leading = pruned.ids, found.results(5).leading
    assert [size[h.layer, h.head] for h in leading] == sorted((size[h.layer, h.head] for h in leading), reverse=True)
    for h in leading:
        assert h.mean == pytest.approx(mean[h.layer, h.head], abs=1e-6)
        assert h.logit == pytest.approx(net[pruned.slice_of(LOGIT).start, h.layer, h.head], abs=1e-6)
        value, (source, target) = largest[h.layer, h.head]
        assert (h.contribution, h.source, h.target) == (pytest.approx(value), ids[source], ids[target])


@plain
def test_results_and_tables(traced, pruned):
    found = read_attention(traced, pruned, True, [(2, 1, -1), (0, 0, 0)])
    assert found.heads.edges == len(found.contributions.by_edge()) > 10
    leading, score, _ = attention_tables(found, pruned)
    assert leading.rows[0][0] == f"{found.heads.leading[0].layer}.{found.heads.leading[0].head}"
    assert [(one.layer, one.head, one.query) for one in found.query_key] == [(2, 1, len(IDS) - 1), (0, 0, 0)]
    split = found.query_key[0]
    assert len(split.keys) == 3
    assert score.title.startswith(f"Head {split.layer}.{split.head} at ")
    # Every block of the table is a score, its pairs and the others; pairs and others add up.
    ids, starts = set(pruned.ids), [n for n, row in enumerate(score.rows) if row[1] == "score"]
    for key, start, stop in zip(split.keys, starts, [*starts[1:], len(score.rows)], strict=True):
        block = score.rows[start:stop]
        assert block[0][3] == key.score and block[-1][1:] == ["all other pairs", "", key.rest]
        assert sum(row[3] for row in block[1:]) == pytest.approx(key.score, abs=1e-5)
        for row, pair in zip(block[1:-1], key.pairs, strict=True):
            for name, cell in ((pair.query, row[1]), (pair.key, row[2])):
                kind = name.split("_")[0]
                expected = {"own": "biases of the head", "first": "MLP of layer", "bias": "biases of layer"}
                assert cell == name if name in ids else cell.startswith(expected.get(kind, ("feature", "error", "␣")))
    assert any(pair.query == OWN_BIAS or "_" in pair.query for key in split.keys for pair in key.pairs)


@plain
def test_of_a_graph_without_edges_or_what_is_not_requested_there_is_nothing(traced, pruned):
    graph = traced.graph.prune(0.0, 0.0)
    bare = dataclasses.replace(graph, adjacency_RxS=np.zeros_like(graph.adjacency_RxS))
    found = read_attention(traced, bare, True, [])
    assert found.heads == HeadResults(edges=0, leading=()) and found.contributions.by_edge() == {}
    assert found.query_key == () and attention_tables(found, bare) == []
    nothing = read_attention(traced, pruned, False, [])
    assert attention_tables(nothing, pruned) == [] and nothing.heads is None and nothing.query_key == ()


@plain
def test_the_page_has_the_heads_of_the_strongest_edges(monkeypatch, tmp_path, traced, pruned):
    written = {}
    monkeypatch.setattr(outputs, "_HEADS_ON_PAGE", 5)
    monkeypatch.setattr(outputs, "write_page", lambda path, document, **rest: written.update(rest))
    attention = read_attention(traced, pruned, True, [])
    (tmp_path / "heads").mkdir()
    run = SimpleNamespace(folder=tmp_path, configs=Configs(GraphConfig()))
    outputs.write_outputs(run, "one", traced.graph, pruned, [], attention, {})
    ids, (source_E, target_E, _) = pruned.ids, pruned.edges()
    score_E = np.array(scores(to_document(pruned, "one")))
    strongest = {(ids[source_E[edge]], ids[target_E[edge]]) for edge in np.argsort(-score_E, kind="stable")[:5]}
    assert set(written["heads"]) == strongest & set(attention.contributions.by_edge())
    assert 0 < len(written["heads"]) < len(attention.contributions.by_edge())


def test_heads_are_read_from_a_flag():
    def read(*texts):
        return read_heads(GraphConfig(query_key=texts))

    assert read() == []
    assert read("12.3", " 0.0@5", "1.2@-3", "12.3") == [(12, 3, -1), (0, 0, 5), (1, 2, -3)]
    for wrong in (("12",), ("a.b",), ("1.2@",), ("1.2", "none"), ("-1.0",)):
        with pytest.raises(UserError, match="--graph.query_key=.*expected layer.head"):
            read(*wrong)
