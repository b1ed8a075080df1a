"""Where a graph's attention came from: the leading heads, results and tables."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from made_transcoders import made_set
from pages import scores

from saejax.attribution.forms import outputs
from saejax.attribution.forms.neuronpedia import to_document
from saejax.attribution.forms.outputs import attention_tables
from saejax.attribution.heads.contributions import read_attention
from saejax.attribution.heads.query_key import OWN_BIAS
from saejax.attribution.requests import read_heads
from saejax.attribution.results import HeadResults
from saejax.attribution.trace.prompt import trace_prompt
from saejax.errors import UserError
from saejax.runner.config import Configs
from saejax.settings import GraphConfig

IDS = [5, 17, 33, 8, 41]


@pytest.fixture(scope="module")
def traced(lm):
    return trace_prompt(lm, made_set(lm, 24), IDS, targets=[7])


@pytest.fixture(scope="module")
def pruned(traced):
    return traced.graph.prune(0.9, 0.98)


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


def test_of_a_graph_without_edges_or_what_is_not_requested_there_is_nothing(traced, pruned):
    graph = traced.graph.prune(0.0, 0.0)
    bare = dataclasses.replace(graph, adjacency_RxS=np.zeros_like(graph.adjacency_RxS))
    found = read_attention(traced, bare, True, [])
    assert found.heads == HeadResults(edges=0, leading=()) and found.contributions.by_edge() == {}
    assert found.query_key == () and attention_tables(found, bare) == []
    nothing = read_attention(traced, pruned, False, [])
    assert attention_tables(nothing, pruned) == [] and nothing.heads is None and nothing.query_key == ()


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
