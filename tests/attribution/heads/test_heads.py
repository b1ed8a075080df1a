"""Parts of edges that go through heads: what is gone when a head is taken out; what the page has of them."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from made_graphs import all_heads, assert_heads_are_the_only_way, heads_by_edge
from made_transcoders import made_set

from saejax.attribution.forms.neuronpedia import to_document
from saejax.attribution.heads import contributions
from saejax.attribution.heads.contributions import largest_heads
from saejax.attribution.heads.query_key import OWN_BIAS, split_scores
from saejax.attribution.local.rows import RowTracer
from saejax.attribution.local.sources import Sources
from saejax.attribution.settings import GraphConfig
from saejax.attribution.trace.prompt import trace_prompt
from saejax.config import Configs
from saejax.errors import UserError
from saejax.stages.attribute import outputs
from saejax.stages.attribute.outputs import score_table
from saejax.stages.attribute.requests import read_heads

IDS = [5, 17, 33, 8, 41]


@pytest.fixture(scope="module", params=[False, True])
def traced(lm, request):
    return trace_prompt(lm, made_set(lm, 24, skip=request.param), IDS, targets=[7, (9, 11)])


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
    changed.model, changed.frozen = model, dataclasses.replace(local.frozen, params=params)
    matrix_TxS = np.zeros((len(active) + len(readouts.labels), len(sources.nodes)), np.float32)
    rows, put = RowTracer(changed, sources, len(matrix_TxS)), matrix_TxS[len(active) :].__setitem__
    rows(active.layer_A, active.position_A, changed.encoder_rows(np.arange(len(active))), matrix_TxS.__setitem__)
    rows(np.full(2, 4), np.full(2, len(IDS) - 1), readouts.vector_KxD, put, in_stream=True)
    return matrix_TxS


@plain  # a head that is taken out changes the norm before its layer's skip path, which is to be held
def test_a_part_is_what_vanishes_without_the_head(traced):
    graph, pruned = traced.graph, traced.graph.prune(1.0, 1.0)
    found = heads_by_edge(pruned, all_heads(traced, pruned))
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
    whole, named = all_heads(traced, pruned), largest_heads(traced.local, traced.readouts, pruned, top=2)
    assert len(np.unique(pruned.edges()[0])) > 32
    monkeypatch.setattr(contributions, "_BLOCK", (16, 16))
    monkeypatch.setattr(contributions, "free_bytes", lambda mesh: 0)  # as many groups as blocks
    parts = all_heads(traced, pruned)
    np.testing.assert_allclose(parts, whole, atol=1e-6)
    # By the nodes' ids the largest contributions, to four digits.
    ids, by_edge = pruned.ids, heads_by_edge(pruned, whole)
    assert named.keys() == {(ids[source], ids[target]) for source, target in by_edge}
    for (source, target), heads in by_edge.items():
        wanted = sorted(heads.items(), key=lambda item: -abs(item[1]))[:2]
        assert [head[:2] for head in named[ids[source], ids[target]]] == [head for head, _ in wanted]
        values = [head[2] for head in named[ids[source], ids[target]]]
        np.testing.assert_allclose(values, [value for _, value in wanted], rtol=1e-3)


@plain
def test_the_table_of_a_head_has_its_scores_and_pairs(traced, pruned):
    split = split_scores(traced.local, 2, 1, -1)
    score = score_table(split, pruned)
    assert (split.layer, split.head, split.query) == (2, 1, len(IDS) - 1) and len(split.keys) == 3
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
def test_of_a_graph_without_edges_there_is_nothing(traced):
    graph = traced.graph.prune(0.0, 0.0)
    bare = dataclasses.replace(graph, adjacency_RxS=np.zeros_like(graph.adjacency_RxS))
    assert largest_heads(traced.local, traced.readouts, bare) == {}


@plain
def test_the_page_and_a_file_have_the_heads(monkeypatch, tmp_path, traced, pruned):
    written = {}
    monkeypatch.setattr(outputs, "write_page", lambda path, document, **rest: written.update(rest))
    heads = largest_heads(traced.local, traced.readouts, pruned)
    run = SimpleNamespace(folder=tmp_path, configs=Configs(GraphConfig()))
    outputs.write_outputs(run, to_document(pruned, "one"), heads, [])
    assert written["heads"] == heads and len(heads) > 5
    shown = outputs.read_shown(tmp_path / "heads" / "one.json")["heads"]
    assert {edge: [tuple(head) for head in some] for edge, some in shown.items()} == heads


def test_heads_are_read_from_a_flag():
    def read(*texts):
        return read_heads(GraphConfig(query_key=texts))

    assert read() == []
    assert read("12.3", " 0.0@5", "1.2@-3", "12.3") == [(12, 3, -1), (0, 0, 5), (1, 2, -3)]
    for wrong in (("12",), ("a.b",), ("1.2@",), ("1.2", "none"), ("-1.0",)):
        with pytest.raises(UserError, match="--graph.query_key=.*expected layer.head"):
            read(*wrong)
