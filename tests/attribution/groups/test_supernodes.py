"""Supernodes: clusters against their definition, sums of edges against a loop, files, and the stage."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from made_graphs import make_graph
from made_transcoders import made_set

from saejax import load_model, save_transcoders
from saejax.attribution import requests
from saejax.attribution.forms.network import to_networkx
from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import FEATURE, LOGIT, Nodes
from saejax.attribution.groups.cluster import alikeness, cluster
from saejax.attribution.groups.supernodes import Supernode, as_groups, collapse, named, read_groups
from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.runner import command
from saejax.settings import GraphConfig

WIDTH, POSITIONS = 16, 6


def planted(seed=0, kinds=4, features=28, layers=5):
    """A graph in which each feature is one of some kinds, at random; those of one kind have most in common.

    Returns:
      The graph, what is needed of its replacement model, and the kind of each feature.
    """
    rng = np.random.default_rng(seed)
    graph = make_graph(features=features, layers=layers, positions=3)
    kind_F = rng.integers(0, kinds, features)
    layer_F, position_F = np.sort(rng.integers(0, layers, features)), rng.integers(1, POSITIONS, features)
    order = np.lexsort((np.arange(features), position_F, layer_F))
    own = Nodes.of(FEATURE, layer_F[order], position_F[order], np.arange(features), 1 + rng.random(features))
    others = graph.nodes[graph.count(FEATURE) :]
    mean_KxS = rng.normal(size=(kinds, graph.adjacency_RxS.shape[1]))
    mean_TxK = rng.normal(size=(len(graph.adjacency_RxS), kinds))
    noise = 0.4 * rng.normal(size=graph.adjacency_RxS.shape)
    noise[:features] += mean_KxS[kind_F]
    noise[:, :features] += mean_TxK[:, kind_F]
    written_FxD = rng.normal(size=(kinds, WIDTH))[kind_F] + 0.4 * rng.normal(size=(features, WIDTH))
    active = SimpleNamespace(layer_A=own.layer_N, position_A=own.position_N, feature_A=own.index_N, value_A=own.value_N)
    dictionaries = SimpleNamespace(rows_of=lambda name, layer_F, feature_F: written_FxD[feature_F])
    replacement = SimpleNamespace(
        active=active, ids_P=np.zeros(POSITIONS), dictionaries=dictionaries, written=written_FxD
    )
    graph = dataclasses.replace(
        graph, nodes=Nodes.joined(own, others), adjacency_RxS=noise.astype(np.float32), tokens=tuple("abcdef")
    )
    return graph, replacement, kind_F


def cosine(a, b):
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return max(float(a @ b) / size, 0.0) if size else 0.0


def alike(graph, replacement, a, b, others=()):
    """How alike two features are, from the definition."""
    nodes, edges = graph.nodes, graph.adjacency_RxS.astype(np.float64)

    def activity(node):
        found = []
        for one in (replacement, *others):
            for position in range(len(one.ids_P)):
                hit = (one.active.layer_A == nodes.layer_N[node]) & (one.active.feature_A == nodes.index_N[node])
                found.append(one.active.value_A[hit & (one.active.position_A == position)].sum())
        return np.array(found, np.float64)

    of_edges = cosine(edges[a], edges[b]) / 2 + cosine(edges[:, a], edges[:, b]) / 2
    return (cosine(replacement.written[a], replacement.written[b]) + cosine(activity(a), activity(b)) + of_edges) / 3


def test_alikeness_is_as_defined():
    graph, replacement, _ = planted()
    second = SimpleNamespace(ids_P=np.zeros(3), active=SimpleNamespace(
        layer_A=graph.nodes.layer_N[[0, 4, 9]], position_A=np.array([1, 1, 2]),
        feature_A=graph.nodes.index_N[[0, 4, 9]], value_A=np.array([1.0, 2.0, 3.0]),
    ))  # fmt: skip
    graph.adjacency_RxS[3], graph.adjacency_RxS[:, 3] = 0, 0  # a node without edges is not alike in them
    for others in ((), (second,)):
        found_FxF = alikeness(graph, replacement, others)
        for a in range(0, 28, 3):
            for b in range(0, 28, 4):
                assert found_FxF[a, b] == pytest.approx(alike(graph, replacement, a, b, others), abs=1e-6)
    assert np.array_equal(found_FxF, found_FxF.T) and np.isfinite(found_FxF).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "limits", [dict(similarity=0.6, layers=9, positions=9), dict(similarity=0.3, layers=1, positions=1)]
)
def test_groups_hold_what_is_alike_and_could_not_be_larger(seed, limits):
    graph, replacement, kind_F = planted(seed)
    groups = [set(group.nodes) for group in cluster(graph, replacement, most=99, **limits)]
    assert groups and all(len(group) > 1 for group in groups)
    nodes = graph.nodes

    def fit(a, b):
        near = abs(int(nodes.layer_N[a]) - int(nodes.layer_N[b])) <= limits["layers"]
        near &= abs(int(nodes.position_N[a]) - int(nodes.position_N[b])) <= limits["positions"]
        return near and alike(graph, replacement, a, b) >= limits["similarity"]

    assert all(fit(a, b) for group in groups for a in group for b in group if a != b)
    grouped = set().union(*groups)
    assert sum(map(len, groups)) == len(grouped)
    units = [*groups, *({node} for node in range(28) if node not in grouped)]
    for i, one in enumerate(units):
        for other in units[:i]:
            assert not all(fit(a, b) for a in one for b in other), "these two could be one group"
    if limits["similarity"] == 0.6:
        assert all(len(set(kind_F[list(group)])) == 1 for group in groups)


def test_the_most_influential_groups_come_first_and_are_named():
    graph, replacement, _ = planted()
    found = cluster(graph, replacement, similarity=0.3, layers=9, positions=9)
    assert [group.nodes for group in found] == [
        group.nodes for group in cluster(graph, replacement, similarity=0.3, layers=9, positions=9)
    ]
    fewer = cluster(graph, replacement, similarity=0.3, layers=9, positions=9, most=2)
    assert len(found) > 2 and fewer == found[:2]
    # Each layer's influence flows from the logits' weights; the strongest group has the largest sum.
    shares = np.abs(graph.adjacency_RxS[:, : graph.slice_of(2).stop]).astype(np.float64)
    shares /= shares.sum(axis=1, keepdims=True)
    influence_S, layer_T = np.zeros(shares.shape[1]), graph.nodes.layer_N[graph.target_R]
    weight_T = np.concatenate([np.zeros(28), graph.probability_K])
    for layer in sorted(set(layer_T), reverse=True):
        rows = np.flatnonzero(layer_T == layer)
        influence_S += (weight_T[rows] + np.where(rows < 28, influence_S[np.minimum(rows, 27)], 0)) @ shares[rows]
    sums = [influence_S[list(group.nodes)].sum() for group in found]
    assert sums == sorted(sums, reverse=True)
    strongest = max(found[0].nodes, key=lambda node: influence_S[node])
    token = "abcdef"[graph.nodes.position_N[strongest]]
    low, high = (of(graph.nodes.layer_N[list(found[0].nodes)]) for of in (min, max))
    assert found[0].label == (f"{token}, layers {low} to {high}" if low < high else f"{token}, layer {low}")
    last = found[0].nodes[-1]
    pair = int(graph.nodes.layer_N[last]), int(graph.nodes.index_N[last])
    assert cluster(graph, replacement, similarity=0.3, layers=9, positions=9, labels={pair: "x"})[0].label == "x"


def test_edges_of_groups_are_sums_and_networkx_has_them():
    graph = make_graph(features=6)
    groups = [Supernode("left", (0, 2)), Supernode("right", (5, 1, 12)), Supernode("left", (18,))]
    found = collapse(graph, groups)
    ids, wanted = graph.ids, {}
    unit = {node: number for number, group in enumerate(groups) for node in group.nodes}
    names = [ids[members[0]] if len(members) == 1 else None for members in found.members]
    for source, target, weight in zip(*graph.edges()):
        ends = tuple(unit.get(node, ids[node]) for node in (source, target))
        if ends[0] != ends[1]:
            wanted[ends] = wanted.get(ends, 0) + float(weight)
    key = [number if number < 3 else names[number] for number in range(len(names))]
    edges = {(key[s], key[t]): found.weight_UxU[t, s] for t, s in zip(*found.weight_UxU.nonzero())}
    assert edges.keys() == wanted.keys()
    assert all(edges[ends] == pytest.approx(wanted[ends], abs=1e-9) for ends in wanted)
    assert found.labels[:4] == ("left", "right", "left", ids[3])
    made = to_networkx(graph, groups)
    assert list(made)[:4] == ["left", "right", "left (2)", ids[3]] and made.number_of_edges() == len(wanted)
    assert made.nodes["right"] == dict(kind="supernode", members=[ids[5], ids[1], ids[12]])
    assert made.nodes[ids[3]]["kind"] == "feature"
    assert made.edges["left", "right"]["weight"] == pytest.approx(wanted[0, 1])
    assert collapse(graph, []).weight_UxU.shape == (len(ids), len(ids))


def test_groups_of_ids():
    graph = make_graph()
    ids = graph.ids
    groups = [["a", ids[0], ids[-1]], ["a", ids[3]]]
    assert as_groups(graph, named(graph, groups)) == groups
    with pytest.raises(UserError, match="supernode 'b' names 'E_9_9', and no node of the graph has that id"):
        named(graph, [["b", "E_9_9"]])
    with pytest.raises(UserError, match=f"node '{ids[0]}' is in the supernodes 'a' and 'b'"):
        named(graph, [["a", ids[0]], ["b", ids[1], ids[0]]])
    with pytest.raises(UserError, match="once"):
        named(graph, [["a", ids[0], ids[0]]])


def test_odd_graphs_and_parameters():
    graph, replacement, _ = planted()
    none = dataclasses.replace(make_graph(features=1), tokens=tuple("abc"))
    assert cluster(none, replacement) == []
    assert cluster(graph, replacement, similarity=1.0) == [] and cluster(graph, replacement, most=0) == []
    for wrong in (dict(similarity=1.5), dict(similarity=float("nan")), dict(layers=-1), dict(most=-1)):
        with pytest.raises(UserError, match="expected 0"):
            cluster(graph, replacement, **wrong)


GROUPS = [["a", "1_2_3"], ["b", "2_2_3", "E_4_0"]]


@pytest.mark.parametrize(
    "content,wanted",
    [
        ({"one": GROUPS}, dict(one=GROUPS, two=[])),
        ({"*": GROUPS, "two": []}, dict(one=GROUPS, two=[])),
        (dict(pinnedIds=["1_2_3"], supernodes=GROUPS, linkType="both"), dict(one=GROUPS, two=GROUPS)),
        (dict(metadata=dict(slug="two"), qParams=dict(supernodes=GROUPS), nodes=[]), dict(one=[], two=GROUPS)),
        ({"three": GROUPS}, "has supernodes for three: expected one, two, or [*] for all"),
        ({"one": [["a"]]}, "holds no supernodes"),
        ({"one": [["a", 3]]}, "holds no supernodes"),
        ({"one": None}, "holds no supernodes"),
        ([GROUPS], "holds no supernodes"),
        ("{", "holds no supernodes"),
    ],
)
def test_files_of_groups(tmp_path, content, wanted):
    file = tmp_path / "groups.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    config = GraphConfig(supernodes=str(file))
    if isinstance(wanted, dict):
        assert read_groups(config, ["one", "two"]) == wanted
    else:
        with pytest.raises(UserError, match=wanted) as error:
            read_groups(config, ["one", "two"])
        assert "\n" not in str(error.value)
    assert read_groups(GraphConfig(supernodes="cluster"), ["one"]) == {}


def in_pairs(transcoder):
    """The transcoder with its second half of features made like the first, but for how strongly they fire."""
    arrays = {name: np.array(array) for name, array in transcoder.arrays.items()}
    for name, factor in dict(W_enc_DxF=0.5, b_enc_F=0.5, W_dec_FxD=1.0).items():
        halves = arrays[name].T if name == "W_enc_DxF" else arrays[name]
        halves[24:] = factor * halves[:24]
    return Dictionary(transcoder.config, **arrays)


def test_the_stage_writes_groups_and_takes_back_what_the_page_saves(tiny_llama, one_device, tmp_path, capsys):
    lm = load_model(str(tiny_llama), mesh=one_device)
    save_transcoders(tmp_path / "set", [in_pairs(transcoder) for transcoder in made_set(lm)])
    flags = [f"--model.path={tiny_llama}", f"--graph.transcoders={tmp_path / 'set'}", "--graph.token_ids=5,17,33,8"]
    flags += ["--graph.doubled=0", "--graph.slug=ids", "--graph.node_threshold=1.0", f"--workdir={tmp_path / 'run'}"]

    def attribute(groups, *more):
        code = command.run(["attribute"], "", ["attribute", *flags, f"--graph.supernodes={groups}", *more])
        folder = tmp_path / "run" / "attribute" / "ids"
        if code:
            return code, capsys.readouterr().err
        return json.loads((folder / "graphs" / "ids.json").read_text()), json.loads((folder / "ids.json").read_text())

    document, results = attribute("cluster", "--graph.circuit_rest=mean")
    params, graph = document["qParams"], Graph.load(tmp_path / "run" / "attribute" / "ids" / "ids-graph")
    assert results["supernodes"] == len(params["supernodes"]) > 3
    assert all(
        {str((int(id.split("_")[1]) + 24) % 48) for id in ids} & {id.split("_")[1] for id in ids}
        for _, *ids in params["supernodes"]
    )  # pairs are together
    logits = graph.ids[graph.slice_of(LOGIT)]
    assert params["pinnedIds"] == [member for group in params["supernodes"] for member in group[1:]] + logits
    assert as_groups(graph, named(graph, params["supernodes"])) == params["supernodes"]
    assert results["circuits"]["rest"] == "mean"
    saved = tmp_path / "ids-state.json"
    state = params | dict(supernodes=[["mine", *params["supernodes"][0][1:], logits[0]]])
    saved.write_text(json.dumps(state))
    found, results = attribute(saved, "--graph.circuits=false")
    assert found["qParams"]["supernodes"] == state["supernodes"] and results["supernodes"] == 1
    config = GraphConfig(transcoders=str(tmp_path / "set"), supernodes=str(saved))
    before = requests.identity(config)
    assert before != requests.identity(GraphConfig(transcoders=str(tmp_path / "set")))
    saved.write_text(json.dumps(state | dict(supernodes=[["mine", "9_9_9"]])))
    assert requests.identity(config) != before
    code, message = attribute(saved, "--graph.circuits=false")
    assert code == 2 and "names '9_9_9'" in message and message.count("\n") == 1
    code, message = attribute(tmp_path / "none.json")
    assert code == 2 and "none.json does not exist" in message
