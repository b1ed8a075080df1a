"""A graph comes back from its files as it was, and damaged files are refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from made_graphs import make_graph

from saejax.attribution.graph import Graph
from saejax.attribution.graph.data import GraphScores, Pruning
from saejax.attribution.graph.graph import ARRAYS, DESCRIPTION
from saejax.attribution.graph.nodes import LOGIT, TOKEN
from saejax.errors import UserError


def same(a, b) -> bool:
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return a == b


@pytest.mark.parametrize("pruned", [False, True])
def test_a_graph_comes_back_as_it_was(pruned, tmp_path):
    graph = make_graph()
    if pruned:
        influence_N = np.linspace(0, 1, len(graph.nodes), dtype=np.float32)
        node_N = np.arange(len(graph.nodes), dtype=np.int32)
        pruning = Pruning(0.8, 0.98, node_N, influence_N, GraphScores(0.5, 0.75))
        graph = dataclasses.replace(graph, pruning=pruning)
    graph.save(tmp_path / "a" / "b")
    assert same(Graph.load(tmp_path / "a" / "b"), graph)
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [DESCRIPTION, ARRAYS]
    with pytest.raises(UserError, match="already holds graph.json"):
        graph.save(tmp_path / "a" / "b")


def test_nodes_rows_and_columns(tmp_path):
    graph = make_graph(features=2, layers=1)
    assert graph.nodes.kind_N.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 4, 5, 5]
    assert graph.target_R.tolist() == [0, 1, 9, 10]
    assert graph.slice_of(TOKEN) == slice(5, 8) and graph.count(TOKEN, LOGIT) == 5
    assert graph.probability_K.tolist() == pytest.approx([0.6, 0.3])
    graph.adjacency_RxS[1:] = 0
    source_E, target_E, weight_E = graph.edges()
    assert source_E.tolist() == list(range(9)) and set(target_E) == {0}
    assert np.array_equal(weight_E, graph.adjacency_RxS[0])
    missing = graph.value_R[0] - graph.constant_R[0] - graph.untraced_R[0] - graph.adjacency_RxS[0].sum()
    assert graph.unexplained_R[0] == pytest.approx(missing, abs=1e-6)


def with_arrays(change):
    return lambda folder: (folder / ARRAYS).write_bytes(change((folder / ARRAYS).read_bytes()))


def without(name):
    def remove(folder):
        description = json.loads((folder / DESCRIPTION).read_text())
        description.pop(name)
        (folder / DESCRIPTION).write_text(json.dumps(description))

    return remove


def with_fields(**changes):
    def save(folder):
        shutil.rmtree(folder)
        dataclasses.replace(make_graph(), **changes).save(folder)

    return save


NO_ARRAYS = "graph.safetensors is missing or damaged"


@pytest.mark.parametrize(
    "damage,message",
    [
        (with_arrays(lambda content: content[:-4]), NO_ARRAYS),
        (with_arrays(lambda content: content[:-1] + bytes([content[-1] ^ 1])), NO_ARRAYS),
        (lambda folder: (folder / ARRAYS).unlink(), NO_ARRAYS),
        (lambda folder: (folder / DESCRIPTION).write_text('{"a"'), "graph.json is not valid JSON"),
        (without("prompt"), "graph.json is damaged .'prompt' is missing"),
        (with_fields(n_layers="2"), "n_layers is '2', expected a number"),
        (without("schema_version"), "schema version None: expected 2"),
        (with_fields(logit_K=np.zeros(3, np.float32)), "logit_K has the shape"),
        (with_fields(value_R=np.zeros(9)), "value_R has the shape .* in float64"),
        (with_fields(value_R=np.full(9, np.nan, np.float32)), "value_R is not finite"),
        (with_fields(labels=("a",)), "labels are missing"),
        (lambda folder: shutil.rmtree(folder), "does not exist"),
    ],
)
def test_damaged_files_are_refused(damage, message, tmp_path):
    make_graph().save(tmp_path / "graph")
    damage(tmp_path / "graph")
    with pytest.raises(UserError, match=message) as error:
        Graph.load(tmp_path / "graph")
    assert "\n" not in str(error.value)
