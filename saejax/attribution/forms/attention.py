"""Where a graph's attention came from: the heads that carry its edges, and a few heads' scores split over pairs.

Both come as results, and as the page shows them: heads beside edges, and tables.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from saejax.attribution.forms.neuronpedia import node_ids
from saejax.attribution.forms.page import Table
from saejax.attribution.graph.graph import BIAS, ERROR, FEATURE, FIRST_MLP, TOKEN, Graph, Nodes
from saejax.attribution.heads.heads import Carried, TooLarge, edge_heads
from saejax.attribution.heads.query_key import Score, split_scores
from saejax.attribution.trace.prompt import Traced
from saejax.attribution.trace.sources import Sources

OWN = "own_bias"  # stands for the biases of the head's own layer, beside ids of nodes
_LEADING = 10  # heads that results and the page name
_NOTE = (
    "The score of a query with a key, before the softmax, is a sum over pairs: what one source adds to the query times "
    "what another adds to the key. The largest pairs are shown; those that are no buttons are not in the pruned graph."
)
_LEADING_NOTE = (
    "The share of its targets' inputs that vanishes without the head, mean over targets, and the edge of which it "
    "carries most."
)


@dataclasses.dataclass(frozen=True)
class Attention:
    """What was found.

    Attributes:
      carried: the heads of each edge; empty where they were not asked for or the graph is too large.
      heads, query_key: results, as WORKSPACE.md describes them; None: not asked for.
      tables: for the page.
    """

    carried: Carried
    heads: dict[str, Any] | None
    query_key: list[dict[str, Any]]
    tables: list[Table]


@dataclasses.dataclass(frozen=True)
class Leading:
    """A head, by how much it carries.

    Attributes:
      layer, head: which.
      share: mean over targets of the part of its inputs that goes through the head, by size, 0 to 1.
      edge: source and target, by their place in the graph's table, of the largest part.
      part: of this edge.
    """

    layer: int
    head: int
    share: float
    edge: tuple[int, int]
    part: float


def attend(traced: Traced, pruned: Graph, heads: bool, asked: Sequence[tuple[int, int, int]] | None) -> Attention:
    """Finds where the attention of a pruned graph came from.

    Args:
      traced: what the graph was cut from.
      heads: whether the heads of edges are asked for.
      asked: layer, head and position of the query of each score to split; None: of the head that carries most into the
        last position, which only heads of edges tell.

    Raises:
      UserError: a head or a position does not exist.
    """
    carried: Carried = {}
    results: dict[str, Any] | None = None
    tables = []
    if heads:
        try:
            carried = edge_heads(traced.replacement, traced.readouts, pruned)
            results = dict(edges=len(carried), too_large="")
        except TooLarge as error:
            results = dict(edges=0, too_large=str(error))
        best = leading_heads(pruned, carried)[:_LEADING]
        results["leading"] = [dict(layer=one.layer, head=one.head, share=one.share) for one in best]
        if best:
            tables.append(_leading_table(best, pruned))
    if asked is None:
        last = len(pruned.ids_P) - 1
        asked = [(one.layer, one.head, last) for one in leading_heads(pruned, carried, last)[:1]]
    found = []
    if asked:
        sources = Sources.of(traced.replacement)
        for layer, head, position in asked:
            scores = split_scores(traced.replacement, sources, layer, head, position)
            found.append(_score_results(scores, sources.nodes, pruned))
            tables.append(_score_table(scores, sources.nodes, pruned))
    return Attention(carried, results, found, tables)


def leading_heads(graph: Graph, carried: Carried, position: int | None = None) -> list[Leading]:
    """The heads that carry some edges of a graph, the largest share first.

    Args:
      graph: a pruned one.
      carried: its edges' heads, of ``heads.edge_heads``.
      position: edges into targets at this position alone, from sources at others; None: all.
    """
    nodes, (_, target_E, weight_E) = graph.nodes, graph.edges()
    input_N = np.bincount(target_E, np.abs(weight_E), len(nodes))
    targets_N = input_N > 0
    if position is not None:
        targets_N &= nodes.position_N == position
    share: dict[tuple[int, int], float] = {}
    largest: dict[tuple[int, int], tuple[float, tuple[int, int]]] = {}
    for (source, target), parts in carried.items():
        if not targets_N[target] or (position is not None and nodes.position_N[source] == position):
            continue
        for layer, head, part in parts:
            own = layer, head
            share[own] = share.get(own, 0.0) + abs(part) / input_N[target]
            if own not in largest or abs(part) > abs(largest[own][0]):
                largest[own] = part, (source, target)
    order = sorted(share, key=lambda own: (-share[own], own))
    return [Leading(*own, float(share[own] / targets_N.sum()), largest[own][1], largest[own][0]) for own in order]


def _leading_table(best: Sequence[Leading], graph: Graph) -> Table:
    ids = node_ids(graph)
    rows: list[list[str | float]] = [
        [f"{one.layer}.{one.head}", f"{one.share:.1%}".replace("%", " %"), ids[one.edge[0]], ids[one.edge[1]], one.part]
        for one in best
    ]
    return Table("Attention heads that carry most", ["Head", "Share", "From", "To", "Part"], rows, _LEADING_NOTE)


def _score_table(scores: Sequence[Score], nodes: Nodes, graph: Graph) -> Table:
    """A block of rows for each key: the score, its largest pairs, all others."""
    first, ids = scores[0], set(node_ids(graph))
    names = _source_ids(nodes, graph)
    rows: list[list[str | float]] = []
    for score in scores:
        rows.append([f"{_place(graph, score.key)}, {score.weight:.0%}".replace("%", " %"), "score", "", score.value])
        for query, key, part in zip(score.query_N.tolist(), score.key_N.tolist(), score.part_N.tolist(), strict=True):
            told = (names[n] if names[n] in ids else _words(nodes, n, graph) for n in (query, key))
            rows.append(["", *told, part])
        rows.append(["", "all other pairs", "", score.rest])
    keys = ", ".join(f"{_place(graph, score.key)} {score.weight:.0%}".replace("%", " %") for score in scores)
    title = f"Head {first.layer}.{first.head} at {_place(graph, first.query)} looks at {keys}"
    return Table(title, ["Key", "Source of the query", "Source of the key", "Adds"], rows, _NOTE)


def _score_results(scores: Sequence[Score], nodes: Nodes, graph: Graph) -> dict[str, Any]:
    names, first = _source_ids(nodes, graph), scores[0]
    keys = []
    for score in scores:
        parts = zip(score.query_N.tolist(), score.key_N.tolist(), score.part_N.tolist(), strict=True)
        pairs = [dict(query=names[query], key=names[key], part=part) for query, key, part in parts]
        keys.append(dict(key=score.key, weight=score.weight, score=score.value, pairs=pairs, rest=score.rest))
    return dict(layer=first.layer, head=first.head, query=first.query, keys=keys)


def _source_ids(nodes: Nodes, graph: Graph) -> list[str]:
    """The ids of all sources, in the graph or not, and of the head's own biases."""
    return [*node_ids(dataclasses.replace(graph, nodes=nodes)), OWN]


def _words(nodes: Nodes, n: int, graph: Graph) -> str:
    """A source that is not in the graph."""
    if n == len(nodes):
        return "biases of the head's layer"
    kind, layer, place = nodes.kind_N[n], nodes.layer_N[n], _place(graph, int(nodes.position_N[n]))
    return {
        FEATURE: f"feature {nodes.index_N[n]} layer {layer} · {place}",
        ERROR: f"error layer {layer} · {place}",
        TOKEN: f"{place} token",
        FIRST_MLP: f"MLP of layer {layer} at {place}",
        BIAS: f"biases of layer {layer}",
    }[int(kind)]


def _place(graph: Graph, position: int) -> str:
    """A token as the page shows it, and where it is."""
    return f"{graph.tokens[position].replace(' ', '␣')} ({position})"
