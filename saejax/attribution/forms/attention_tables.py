"""The page's tables of attention: heads with large contributions, and scores split over pairs of sources."""

from collections.abc import Sequence

from saejax.attribution.forms.page import PageTable
from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import BIAS, ERROR, FEATURE, FIRST_MLP, TOKEN, Nodes
from saejax.attribution.heads.attention import Attention
from saejax.attribution.heads.query_key import HeadScore
from saejax.page.tables import percent

_NOTE = (
    "The score of a query with a key, before the softmax, is a sum over pairs: what one source adds to the query times "
    "what another adds to the key. The largest pairs are listed; those that are no buttons are not in the pruned graph."
)
_LEADING_NOTE = (
    "A head's contribution to an edge is what the edge loses without the head. To the output: the sum of its "
    "contributions to edges into the first output. Mean: of its contributions to a target, over the target's input by "
    "size, over all targets. Both are signed, and heads do not add up: a path through two heads counts for both."
)


def attention_tables(attention: Attention, graph: Graph) -> list[PageTable]:
    """Return the tables below a pruned graph: its leading heads, and each head whose scores were split."""
    tables = [_leading_table(attention, graph)] if attention.leading else []
    if attention.sources is not None:
        tables += [_score_table(scores, attention.sources, attention.names, graph) for scores in attention.scores]
    return tables


def _leading_table(attention: Attention, graph: Graph) -> PageTable:
    ids = graph.ids
    rows: list[list[str | float]] = [
        [f"{h.layer}.{h.head}", h.logit, h.mean, ids[h.edge[0]], ids[h.edge[1]], h.contribution]
        for h in attention.leading
    ]
    columns = ["Head", "To the output", "Mean", "Largest from", "to", "Contribution"]
    return PageTable("Attention heads with the largest contributions", columns, rows, _LEADING_NOTE)


def _score_table(scores: Sequence[HeadScore], nodes: Nodes, names: Sequence[str], graph: Graph) -> PageTable:
    """Return a block of rows for each key: the score, its largest pairs, all others."""
    first, ids = scores[0], set(graph.ids)
    rows: list[list[str | float]] = []
    for score in scores:
        rows.append([f"{_place(graph, score.key)}, {percent(score.weight)}", "score", "", score.value])
        for query, key, part in zip(score.query_N.tolist(), score.key_N.tolist(), score.part_N.tolist(), strict=True):
            shown = (names[n] if names[n] in ids else _words(nodes, n, graph) for n in (query, key))
            rows.append(["", *shown, part])
        rows.append(["", "all other pairs", "", score.rest])
    keys = ", ".join(f"{_place(graph, score.key)} {percent(score.weight)}" for score in scores)
    title = f"Head {first.layer}.{first.head} at {_place(graph, first.query)} attends to {keys}"
    return PageTable(title, ["Key", "Source of the query", "Source of the key", "Contribution"], rows, _NOTE)


def _words(nodes: Nodes, n: int, graph: Graph) -> str:
    """Describe a source that is not in the graph."""
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
    """Return a token as the page shows it, and its position."""
    return f"{graph.tokens[position].replace(' ', '␣')} ({position})"
