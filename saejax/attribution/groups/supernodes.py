"""Supernodes of a graph: groups of nodes that do one thing together, found by clustering or named by hand.

How alike two features at their positions are is the mean of three cosines, each 0 where it is negative:

    decoder   of the directions that they write, W_dec
    activity  of their activations over the positions of the prompt, and of other prompts that are given
    edges     of what feeds them (their rows of the graph) and of what they feed (their columns), the mean of the two

Nodes that are too many layers or positions apart are not alike at all. Groups are merged as long as any two nodes of
the result are alike enough (agglomerative clustering with complete linkage), so that is what a supernode promises.

All is linear, so what a group does to another is the sum of the edges between their nodes (``collapse``).

Letters: N, S, T, F as in ``graph``; D width, U units (groups, and nodes that are in none), X positions of all prompts.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from saejax.attribution.forms.neuronpedia import node_ids
from saejax.attribution.graph import pruning
from saejax.attribution.graph.graph import FEATURE, Graph
from saejax.attribution.trace.targets import PromptRun
from saejax.errors import UserError

_FAR = 2.0  # distance of nodes that may not be in one group; others are at most 1 apart


class Supernode(NamedTuple):
    """A group of nodes, as places in the graph's table, under a name."""

    label: str
    nodes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Collapsed:
    """A graph whose nodes are groups, and the nodes that are in none.

    Attributes:
      labels: names of the groups, then ids of the other nodes in the graph's order.
      members: the nodes of each, as places in the graph's table.
      weight_UxU: float64 sums of the edges from one to another, targets by sources; 0 within a group.
    """

    labels: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    weight_UxU: np.ndarray


def cluster(
    graph: Graph,
    run: PromptRun,
    others: Sequence[PromptRun] = (),
    *,
    similarity: float = 0.4,
    layers: int = 6,
    positions: int = 1,
    most: int = 24,
    labels: Mapping[tuple[int, int], str] | None = None,
) -> list[Supernode]:
    """Groups the features of a graph; see the top of this module.

    Args:
      graph: pruned, for groups that can be read.
      run: what the graph is of.
      others: more prompts of the same model and dictionaries; features that are active together there are more alike.
      similarity: how alike any two nodes of a group are, 0 to 1; more makes smaller groups.
      layers, positions: how many of these two nodes of a group may be apart.
      most: at most so many groups, those with the largest influence.
      labels: (layer, feature) -> what the feature is called; a group is called as its most influential feature that has
        a name, or else by that feature's token and the group's layers.

    Returns:
      The groups of two nodes or more, the most influential first.

    Raises:
      UserError: a parameter is out of range, or a feature of the graph is not active in the prompt.
    """
    if not 0 <= similarity <= 1:
        raise UserError(f"similarity is {similarity}: expected 0 to 1")
    for name, value in dict(layers=layers, positions=positions, most=most).items():
        if value < 0:
            raise UserError(f"{name} is {value}: expected 0 or more")
    features = graph.nodes[graph.slice_of(FEATURE)]
    if len(features) < 2:
        return []
    distance_FxF = 1 - alikeness(graph, run, others)
    for column_N, reach in ((features.layer_N, layers), (features.position_N, positions)):
        distance_FxF[np.abs(column_N[:, None] - column_N[None]) > reach] = _FAR
    np.fill_diagonal(distance_FxF, 0)
    tree = hierarchy.linkage(squareform(distance_FxF, checks=False), "complete")
    group_F = hierarchy.fcluster(tree, 1 - similarity, "distance")
    influence_F = pruning.source_influence(graph)[: len(features)]
    found = [np.flatnonzero(group_F == group) for group in np.unique(group_F)]
    found = [members for members in found if len(members) > 1]
    found.sort(key=lambda members: (-influence_F[members].sum(), members[0]))
    return [
        Supernode(_label(graph, members[np.argsort(-influence_F[members], kind="stable")], labels or {}),
                  tuple(members.tolist()))
        for members in found[:most]
    ]  # fmt: skip


def alikeness(graph: Graph, run: PromptRun, others: Sequence[PromptRun] = ()) -> np.ndarray:
    """How alike any two features of a graph are, float64 [F, F] from 0 to 1; layers and positions play no part."""
    count = graph.count(FEATURE)
    edges_FxF = (_cosines(graph.adjacency_TxS[:count]) + _cosines(graph.adjacency_TxS[:, :count].T)) / 2
    parts = _cosines(_decoders(graph, run)), _cosines(_activity(graph, (run, *others))), edges_FxF
    return np.clip(sum(parts) / len(parts), 0, 1)


def collapse(graph: Graph, supernodes: Sequence[Supernode]) -> Collapsed:
    """Sums a graph's edges between groups; edges within a group are left out.

    Edges can go both ways between two groups whose layers overlap.

    Raises:
      UserError: a node is in two groups.
    """
    check_apart(graph, supernodes)
    grouped = {node for group in supernodes for node in group.nodes}
    ids = node_ids(graph)
    alone = [node for node in range(len(ids)) if node not in grouped]
    members = [group.nodes for group in supernodes] + [(node,) for node in alone]
    unit_N = np.empty(len(ids), np.int64)
    for unit, nodes in enumerate(members):
        unit_N[list(nodes)] = unit
    source_E, target_E, weight_E = graph.edges()
    weight_UxU = np.zeros((len(members), len(members)))
    np.add.at(weight_UxU, (unit_N[target_E], unit_N[source_E]), weight_E)
    np.fill_diagonal(weight_UxU, 0)
    labels = [group.label for group in supernodes] + [ids[node] for node in alone]
    return Collapsed(tuple(labels), tuple(members), weight_UxU)


def named(graph: Graph, groups: Sequence[Sequence[str]]) -> list[Supernode]:
    """The groups of Neuronpedia's ``qParams.supernodes``, each a label and ids of nodes.

    Raises:
      UserError: the graph has no node of an id, or a node is in two groups.
    """
    place = {node_id: node for node, node_id in enumerate(node_ids(graph))}
    found = []
    for label, *members in groups:
        unknown = [member for member in members if member not in place]
        if unknown:
            raise UserError(
                f"the supernode {label!r} names {unknown[0]!r}, and no node of the graph has that id: was it made of "
                "another prompt, or is it pruned away?"
            )
        found.append(Supernode(label, tuple(place[member] for member in members)))
    check_apart(graph, found)
    return found


def as_groups(graph: Graph, supernodes: Sequence[Supernode]) -> list[list[str]]:
    """The form of Neuronpedia's ``qParams.supernodes``: of each the label, then the ids of its nodes."""
    ids = node_ids(graph)
    return [[group.label, *(ids[node] for node in group.nodes)] for group in supernodes]


def check_apart(graph: Graph, supernodes: Sequence[Supernode]) -> None:
    """A ``UserError`` if a node is in two groups, or twice in one."""
    owner: dict[int, str] = {}
    for label, nodes in supernodes:
        for node in nodes:
            if node in owner:
                raise UserError(
                    f"the node {node_ids(graph)[node]!r} is in the supernodes {owner[node]!r} and {label!r}: expected "
                    "it in one, once"
                )
            owner[node] = label


def _decoders(graph: Graph, run: PromptRun) -> np.ndarray:
    """The direction that each feature writes, fp32 [F, D]."""
    features = graph.nodes[graph.slice_of(FEATURE)]
    return run.dictionaries.rows_of("W_dec", features.layer_N, features.index_N)


def _activity(graph: Graph, runs: Sequence[PromptRun]) -> np.ndarray:
    """The activation of each node's feature at every position of the prompts, fp32 [F, X]."""
    features = graph.nodes[graph.slice_of(FEATURE)]
    pairs = list(zip(features.layer_N.tolist(), features.index_N.tolist(), strict=True))
    row = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
    parts = []
    for run in runs:
        active, part = run.active, np.zeros((len(row), len(run.ids_P)), np.float32)
        keys = zip(active.layer_A.tolist(), active.feature_A.tolist(), strict=True)
        row_A = np.array([row.get(key, -1) for key in keys], np.int64)
        part[row_A[row_A >= 0], active.position_A[row_A >= 0]] = active.value_A[row_A >= 0]
        parts.append(part)
    return np.concatenate(parts, axis=1)[[row[pair] for pair in pairs]]


def _cosines(vector_FxD: np.ndarray) -> np.ndarray:
    """Cosines of rows, 0 where they are negative or a row is 0; float64 [F, F]."""
    vector_FxD = vector_FxD.astype(np.float64)
    norm_Fx1 = np.linalg.norm(vector_FxD, axis=1, keepdims=True)
    unit_FxD = vector_FxD / np.where(norm_Fx1 > 0, norm_Fx1, 1)
    return np.maximum(unit_FxD @ unit_FxD.T, 0)


def _label(graph: Graph, members: np.ndarray, labels: Mapping[tuple[int, int], str]) -> str:
    """A name for a group whose nodes are given from the most influential one down."""
    nodes = graph.nodes[members]
    for pair in zip(nodes.layer_N.tolist(), nodes.index_N.tolist(), strict=True):
        if labels.get(pair):
            return labels[pair]
    low, high = int(nodes.layer_N.min()), int(nodes.layer_N.max())
    token = graph.tokens[int(nodes.position_N[0])]
    return f"{token.strip() or repr(token)}, {f'layer {low}' if low == high else f'layers {low} to {high}'}"
