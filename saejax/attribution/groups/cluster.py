"""Supernodes found by clustering: features of a graph that are alike.

How alike two features at their positions are is the mean of three cosines, each 0 where it is negative:

    decoder   of the directions that they write, W_dec
    activity  of their activations over the positions of the prompt, and of other prompts that are given
    edges     of what feeds them (their rows of the graph) and of what they feed (their columns), the mean of the two

Nodes that are too many layers or positions apart are not alike at all. Groups are merged as long as any two nodes of
the result are alike enough (agglomerative clustering with complete linkage), so that is what a supernode promises.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from saejax.attribution.graph.data import GraphData
from saejax.attribution.graph.nodes import FEATURE
from saejax.attribution.graph.pruning import source_influence
from saejax.attribution.groups.supernodes import Supernode
from saejax.attribution.local.prompt_run import PromptRun
from saejax.errors import UserError

_FAR = 2.0  # distance of nodes that may not be in one group; others are at most 1 apart


def cluster(
    graph: GraphData,
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
    influence_F = source_influence(graph)[: len(features)]
    found = [np.flatnonzero(group_F == group) for group in np.unique(group_F)]
    found = [members for members in found if len(members) > 1]
    found.sort(key=lambda members: (-influence_F[members].sum(), members[0]))
    return [
        Supernode(_label(graph, members[np.argsort(-influence_F[members], kind="stable")], labels or {}),
                  tuple(members.tolist()))
        for members in found[:most]
    ]  # fmt: skip


def alikeness(graph: GraphData, run: PromptRun, others: Sequence[PromptRun] = ()) -> np.ndarray:
    """How alike any two features of a graph are; layers and positions play no part.

    Args:
      graph: pruned or whole.
      run: what the graph is of.
      others: more prompts of the same model and dictionaries.

    Returns:
      float64 [F, F], 0 to 1.
    """
    count = graph.count(FEATURE)
    edges_FxF = (_cosines(graph.adjacency_RxS[:count]) + _cosines(graph.adjacency_RxS[:, :count].T)) / 2
    parts = _cosines(_decoders(graph, run)), _cosines(_activity(graph, (run, *others))), edges_FxF
    return np.clip(sum(parts) / len(parts), 0, 1)


def _decoders(graph: GraphData, run: PromptRun) -> np.ndarray:
    """The direction that each feature writes, fp32 [F, D]."""
    features = graph.nodes[graph.slice_of(FEATURE)]
    return run.dictionaries.rows_of("W_dec", features.layer_N, features.index_N)


def _activity(graph: GraphData, runs: Sequence[PromptRun]) -> np.ndarray:
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


def _label(graph: GraphData, members: np.ndarray, labels: Mapping[tuple[int, int], str]) -> str:
    """A name for a group whose nodes are given from the most influential one down."""
    nodes = graph.nodes[members]
    for pair in zip(nodes.layer_N.tolist(), nodes.index_N.tolist(), strict=True):
        if labels.get(pair):
            return labels[pair]
    low, high = int(nodes.layer_N.min()), int(nodes.layer_N.max())
    token = graph.tokens[int(nodes.position_N[0])]
    return f"{token.strip() or repr(token)}, {f'layer {low}' if low == high else f'layers {low} to {high}'}"
