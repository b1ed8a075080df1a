"""A graph comes back from its files as it was, and damaged files are refused."""

import dataclasses
import json
import shutil
import sys
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from made_graphs import make_graph

from saejax.attribution.forms.neuronpedia import to_document
from saejax.attribution.graph import Graph, circuit_tracer
from saejax.attribution.graph.data import BIAS, FEATURE, LOGIT, GraphScores, Pruning
from saejax.attribution.graph.graph import ARRAYS, DESCRIPTION
from saejax.errors import UserError
from saejax.runner import command_line
from saejax.serving.session import ModelSession, targets_of
from saejax.serving.store import GraphStore


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
    kinds = ["feature"] * 2 + ["error"] * 3 + ["token"] * 3 + ["bias"] + ["logit"] * 2
    assert graph.nodes.kind_N.tolist() == kinds and graph.count("token", "logit") == 5
    assert graph.target_R.tolist() == [0, 1, 9, 10]
    assert graph.slice_of("token") == slice(5, 8) and graph.slice_of("first_mlp") == slice(8, 8)
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


def with_description(**fields):
    def add(folder):
        description = json.loads((folder / DESCRIPTION).read_text())
        (folder / DESCRIPTION).write_text(json.dumps(description | fields))

    return add


NO_ARRAYS = "graph.safetensors is missing or damaged"
OTHER_VERSION = "an older or a newer version of saejax wrote it"


@pytest.mark.parametrize(
    "damage,message",
    [
        (with_arrays(lambda content: content[:-4]), NO_ARRAYS),
        (with_arrays(lambda content: content[:-1] + bytes([content[-1] ^ 1])), NO_ARRAYS),
        (lambda folder: (folder / ARRAYS).unlink(), NO_ARRAYS),
        (lambda folder: (folder / DESCRIPTION).write_text('{"a"'), "graph.json is not valid JSON"),
        (without("prompt"), f"prompt is missing in graph.json: {OTHER_VERSION}"),
        (with_description(direction="down"), f"direction is unknown in graph.json: {OTHER_VERSION}"),
        (with_description(pruning=dict(node_threshold=0.8)), "influence_N, node_N are missing in graph.safetensors"),
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


def test_fields_of_pruning_that_came_since_have_defaults_and_others_are_refused(tmp_path):
    graph = make_graph().prune(1.0, 1.0)
    graph.save(tmp_path)
    path = tmp_path / DESCRIPTION
    description = json.loads(path.read_text())
    pruning = description["pruning"]
    older = {name: value for name, value in pruning.items() if name not in ("top_edges", "min_weight")}
    path.write_text(json.dumps(description | dict(pruning=older)))
    assert same(Graph.load(tmp_path), graph)
    for wrong, problem in (
        (older | dict(steepness=2), "steepness is unknown in pruning of graph.json"),
        ({name: value for name, value in older.items() if name != "replacement"}, "replacement is missing in pruning"),
    ):
        path.write_text(json.dumps(description | dict(pruning=wrong)))
        with pytest.raises(UserError, match=f"{problem}.*: {OTHER_VERSION}"):
            Graph.load(tmp_path)


class LogitTarget(NamedTuple):
    token_str: str
    vocab_idx: int


class UnifiedConfig:
    def __init__(self, **fields):
        self.__dict__.update(fields)


class Other:
    pass


@pytest.fixture
def named(monkeypatch):
    """Gives classes of this file the names of circuit-tracer's, where they are installed."""
    homes = {
        LogitTarget: "circuit_tracer.attribution.targets",
        UnifiedConfig: "circuit_tracer.utils.tl_nnsight_mapping",
    }
    for one, home in homes.items():
        parts = home.split(".")
        for k in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:k]), ModuleType(parts[k - 1]))
        module = ModuleType(home)
        setattr(module, one.__name__, one)
        monkeypatch.setitem(sys.modules, home, module)
        monkeypatch.setattr(one, "__module__", home)


def save_as_circuit_tracer(path, graph, **changes) -> None:
    """What its ``Graph.to_pt`` writes of a graph; features in another order than ours."""
    kind_N, features = graph.nodes.kind_N, graph.count(FEATURE)
    order_F = np.random.default_rng(0).permutation(features)
    count = len(graph.nodes)
    order_N = np.concatenate([order_F, np.arange(features, count)])
    matrix_NxN = np.zeros((count, count), np.float32)
    matrix_NxN[np.ix_(graph.target_R, np.flatnonzero(kind_N != LOGIT))] = graph.adjacency_RxS
    nodes = graph.nodes[order_N]
    active_Ax3 = np.stack([nodes.layer_N, nodes.position_N, nodes.index_N], axis=1)[:features]
    silent_1x3 = np.array([[0, 0, 999]], np.int32)
    saved = dict(
        input_string=graph.prompt,
        adjacency_matrix=torch.tensor(matrix_NxN[np.ix_(order_N, order_N)]),
        cfg=UnifiedConfig(n_layers=graph.n_layers, model_name="m", tokenizer_name="t", dtype=torch.float32),
        active_features=torch.tensor(np.concatenate([silent_1x3, active_Ax3])),
        logit_targets=[LogitTarget(label, 11 + k) for k, label in enumerate(graph.labels)],
        logit_probabilities=torch.tensor(graph.probability_K),
        vocab_size=99,
        input_tokens=torch.tensor(graph.ids_P),
        selected_features=torch.arange(1, 1 + features),
        activation_values=torch.tensor(nodes.value_N[:features]),
        scan_name=["a", "b"],
    )
    torch.save(saved | changes, path)


def test_a_graph_of_circuit_tracer_is_read_where_its_classes_are_installed(tmp_path, named, monkeypatch):
    graph = make_graph()
    kept = graph.nodes.kind_N != BIAS
    graph = dataclasses.replace(graph, nodes=graph.nodes[kept], adjacency_RxS=graph.adjacency_RxS[:, kept[:-2]])
    path, texts = tmp_path / "one.pt", {5: "a", 6: " b", 7: "ü"}
    tokenizer = SimpleNamespace(convert_ids_to_tokens=texts.get, decode=lambda ids, **_: texts[ids[0]])
    for old in ({}, dict(logit_targets=torch.tensor([11, 12]), scan="s")):
        texts |= {11: " c", 12: "d"}
        save_as_circuit_tracer(path, graph, **old)
        read = Graph.load(path, tokenizer)
        for name in ("kind_N", "layer_N", "position_N", "index_N", "value_N"):
            np.testing.assert_array_equal(getattr(read.nodes, name), getattr(graph.nodes, name), name)
        np.testing.assert_array_equal(read.adjacency_RxS, graph.adjacency_RxS)
        assert (read.tokens, read.labels, read.prompt) == (graph.tokens, graph.labels, graph.prompt)
    assert read.scores() == graph.scores() and read.prune().ids == graph.prune().ids
    document = to_document(read.prune(), "one")
    # A server shows it, prunes it again, and explains the difference of two of its outputs.
    monkeypatch.setattr(circuit_tracer, "_tokenizer", lambda name: tokenizer)
    store = GraphStore(tmp_path)
    ((name, stored),) = store.graphs().items()
    assert (name, stored.metadata["prompt"], len(stored.metadata["prompt_tokens"])) == ("one.pt", graph.prompt, 3)
    assert store.document(stored)["links"] == document["links"]
    session = ModelSession(command_line.read_configs(command_line.stage_flags(), ["serve"]), named=False)
    outputs = read.ids[read.slice_of(LOGIT)]
    other = session.prune(stored, document, 0.5, 0.9, outputs)
    wanted = to_document(read.difference(*read.labels).prune(0.5, 0.9), "one")
    assert other["links"] == wanted["links"] and [node["node_id"] for node in other["nodes"]][-1] == "3_-1_2"
    with pytest.raises(UserError, match="'9_9_9' are not two logits of this graph"):
        session.prune(stored, document, 0.5, 0.9, [outputs[0], "9_9_9"])
    # Its custom targets have numbers behind the vocabulary: they are directions, which no run of the model reads.
    config = UnifiedConfig(n_layers=graph.n_layers, model_name="m", tokenizer_name="t", d_vocab=12)
    save_as_circuit_tracer(path, graph, cfg=config)
    read = Graph.load(path, tokenizer)
    assert (read.labels, read.nodes.index_N[-2:].tolist()) == (graph.labels, [11, -1])
    assert targets_of(to_document(read.prune(), "one")) == [11]
    torch.save(dict(input_string="a"), path)
    for read_it in (lambda: Graph.load(path, tokenizer), lambda: circuit_tracer.read_metadata(path)):
        with pytest.raises(UserError, match="no graph of circuit-tracer"):
            read_it()


def test_other_objects_and_missing_classes_are_one_line(tmp_path, named, monkeypatch):
    path = tmp_path / "one.pt"
    save_as_circuit_tracer(path, make_graph(), more=Other())
    with pytest.raises(UserError, match="objects other than tensors"):
        Graph.load(path)
    save_as_circuit_tracer(path, make_graph())
    monkeypatch.setitem(sys.modules, "circuit_tracer.attribution.targets", None)
    with pytest.raises(UserError, match="LogitTarget, which is not installed: .*create_graph_files") as caught:
        Graph.load(path)
    assert "\n" not in str(caught.value)
