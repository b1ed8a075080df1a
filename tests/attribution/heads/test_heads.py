"""Parts of edges that go through heads: what is gone when a head is taken out."""

import copy
import dataclasses

import numpy as np
import pytest
from made_transcoders import made_set

from saejax import load_model
from saejax.attribution.graph.nodes import FEATURE, LOGIT, TOKEN
from saejax.attribution.heads import cut
from saejax.attribution.heads import edges as heads
from saejax.attribution.heads.passes import Placed
from saejax.attribution.trace.prompt import trace_prompt
from saejax.attribution.trace.rows import RowTracer
from saejax.attribution.trace.sources import Sources
from saejax.attribution.trace.targets import Direction

IDS = [5, 17, 33, 8, 41]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "skip"])
def traced(tiny_llama, one_device, request):
    lm = load_model(str(tiny_llama), mesh=one_device)
    targets = [7, Direction(np.eye(lm.config.d_model, dtype=np.float32)[3], layer=2, position=4)]
    return trace_prompt(lm, made_set(lm, 24, skip=request.param), IDS, targets=targets)


def edges_of(graph):
    return list(zip(*(part.tolist() for part in graph.edges()), strict=True))


def edges_without(traced, layer, head):
    """The whole matrix of a replacement model in which a head adds nothing; its weights elsewhere are as they were."""
    replacement, readouts = traced.replacement, traced.readouts
    model = copy.copy(replacement.model)
    params = dict(model.params)
    params["layers.o_HxKxD"] = params["layers.o_HxKxD"].at[layer, head].set(0)
    model.params = params
    changed = dataclasses.replace(replacement, model=model)
    sources = Sources.of(replacement)
    active = replacement.active
    matrix_TxS = np.zeros((len(active) + len(readouts.labels), len(sources.nodes)), np.float32)
    rows = RowTracer(changed, sources, len(matrix_TxS))
    rows(active.layer_A, active.position_A, changed.encoder_rows(np.arange(len(active))), matrix_TxS.__setitem__)
    rows(
        readouts.layer_K,
        readouts.position_K,
        readouts.vector_KxD,
        matrix_TxS[len(active) :].__setitem__,
        in_stream=True,
    )
    return matrix_TxS


def test_a_part_is_what_vanishes_without_the_head(traced):
    graph = traced.graph
    if traced.replacement.skip_LxDxD is not None:
        pytest.skip("a head that is taken out changes the norm before its layer's skip path, which is to be held")
    pruned = graph.prune(1.0, 1.0)
    found = heads.edge_heads(traced.replacement, traced.readouts, pruned, top=100).by_edge()
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
            ours = {(one, other): part for one, other, part in found.get((source, target), [])}.get((layer, head), 0.0)
            assert abs(ours - wanted) < 1e-5 * scale
            compared += abs(wanted) > 1e-3 * scale
    assert len(edges) > 200 and compared > 50


def test_heads_alone_move_between_positions(traced):
    """From what enters a layer to what reads in it, heads of that layer are the only way to another position."""
    pruned = traced.graph.prune(1.0, 1.0)
    found = heads.edge_heads(traced.replacement, traced.readouts, pruned, top=100).by_edge()
    nodes, compared = pruned.nodes, 0
    for source, target, weight in edges_of(pruned):
        moves = nodes.position_N[source] != nodes.position_N[target]
        assert not moves or (source, target) in found
        if moves and nodes.kind_N[target] == FEATURE and nodes.layer_N[target] == nodes.layer_N[source] + 1:
            carried = found[source, target]
            assert {layer for layer, _, _ in carried} == {nodes.layer_N[target]}
            assert sum(part for *_, part in carried) == pytest.approx(weight, abs=1e-5)
            compared += 1
    assert compared > 10


def test_groups_and_blocks_of_sources_and_targets_change_nothing(traced, monkeypatch):
    pruned = traced.graph.prune(1.0, 1.0)
    whole = heads.edge_heads(traced.replacement, traced.readouts, pruned, top=4).by_edge()
    assert len(np.unique([source for source, _ in whole])) > 32
    monkeypatch.setattr(heads, "heads_block", lambda platform, length: 16)
    monkeypatch.setattr(heads, "free_bytes", lambda mesh: 0)  # as many groups as blocks
    parts = heads.edge_heads(traced.replacement, traced.readouts, pruned, top=4).by_edge()
    assert parts.keys() == whole.keys()
    for edge, carried in whole.items():
        assert [head[:2] for head in parts[edge]] == [head[:2] for head in carried]
        np.testing.assert_allclose([head[2] for head in parts[edge]], [head[2] for head in carried], atol=1e-6)


def test_of_a_dense_graph_the_most_influential_nodes_edges_are_left_and_their_parts_are_the_same(traced, monkeypatch):
    pruned, config = traced.graph.prune(1.0, 1.0), traced.replacement.model.config
    assert cut.within(pruned, traced.graph, config) == (pruned, None)
    monkeypatch.setattr(cut, "_LEAST", 0.0)
    rows = cut.graph_flops(traced.graph, config)
    monkeypatch.setattr(cut, "graph_flops", lambda graph, model: 0.4 * rows)
    left, share = cut.within(pruned, traced.graph, config)
    edges, nodes = edges_of(left), left.nodes
    ends = np.unique([edge[:2] for edge in edges])
    others = ends[~np.isin(nodes.kind_N[ends], (TOKEN, LOGIT))]
    influence_N = pruned.pruning.influence_N
    assert 0 < share < 1 and len(others) > 5 and share == pytest.approx(float(influence_N[others].max()), abs=0.02)
    kept = influence_N <= share
    assert edges == [
        edge for edge in edges_of(pruned) if all(kept[n] or nodes.kind_N[n] in (TOKEN, LOGIT) for n in edge[:2])
    ]
    length, each = len(IDS), 2 * config.d_model * config.d_head * (config.n_heads + config.n_kv_heads)
    need = 0.0
    for source in {source for source, *_ in edges}:
        need += each * (config.n_layers - 1 - nodes.layer_N[source]) * (length - nodes.position_N[source])
    for target in {target for _, target, _ in edges}:
        layers = config.n_layers if nodes.kind_N[target] == LOGIT else nodes.layer_N[target] + 1
        need += each * layers * (nodes.position_N[target] + 1)
    assert 0.2 * rows < need < 0.4 * rows
    found = {name: heads.edge_heads(traced.replacement, traced.readouts, one).by_edge() for name, one in
             dict(left=left, all=pruned).items()}  # fmt: skip
    assert 20 < len(found["left"]) < len(found["all"])
    for edge, carried in found["left"].items():
        assert [head[:2] for head in carried] == [head[:2] for head in found["all"][edge]]
        np.testing.assert_allclose([head[2] for head in carried], [head[2] for head in found["all"][edge]], atol=1e-6)


def test_blocks_of_sources_leave_out_what_is_before_them():
    layer_S, position_S = (part.reshape(-1) for part in np.mgrid[:6, :16])
    entries = Placed(np.arange(96), layer_S, position_S, np.zeros((96, 1), np.float32))
    blocks = heads.source_blocks(entries, 6, 16, 12)
    assert np.array_equal(np.sort(np.concatenate([block.chosen_B for block in blocks])), np.arange(96))
    for block in blocks:
        assert len(block.chosen_B) == 12 and np.ptp(position_S[block.chosen_B]) < 4
        assert layer_S[block.chosen_B].min() == block.layer and position_S[block.chosen_B].min() >= block.position
    assert {block.position for block in blocks} == {0, 4, 8, 12} and max(block.layer for block in blocks) == 3
    # Of all the values, 6 layers at 16 positions of 96 sources, less than a half is kept.
    assert sum((6 - block.layer) * (16 - block.position) * len(block.chosen_B) for block in blocks) < 96 * 6 * 16 / 2


def test_named_heads(traced):
    pruned = traced.graph.prune(0.99, 0.999)
    carried = heads.edge_heads(traced.replacement, traced.readouts, pruned, top=2)
    found = carried.by_edge()
    assert all(len(some) <= 2 for some in found.values())
    ids = [f"n{place}" for place in range(len(pruned.nodes))]
    named = heads.named_heads(carried, ids)
    assert len(named) == len(found) and all(source.startswith("n") for source, _ in named)
    for some, own in zip(found.values(), named.values(), strict=True):
        assert [part[:2] for part in some] == [part[:2] for part in own]
        assert [part[2] for part in some] == pytest.approx([part[2] for part in own], rel=1e-3)
