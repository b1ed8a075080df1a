"""The page's tables of attention: the heads that carry most, and scores split over pairs of sources."""

from collections.abc import Sequence

from saejax.attribution.forms.page import PageTable
from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import BIAS, ERROR, FEATURE, FIRST_MLP, TOKEN, Nodes
from saejax.attribution.heads.attention import Attention
from saejax.attribution.heads.query_key import HeadScore
from saejax.page.tables import percent

_NOTE = (
    "The score of a query with a key, before the softmax, is a sum over pairs: what one source adds to the query times "
    "what another adds to the key. The largest pairs are shown; those that are no buttons are not in the pruned graph."
)
_LEADING_NOTE = (
    "The share of its targets' inputs that vanishes without the head, mean over targets, and the edge of which it "
    "carries most."
)


def attention_tables(attention: Attention, graph: Graph) -> list[PageTable]:
    """The tables below a pruned graph: of its leading heads, and of each head that was looked into."""
    tables = [_leading_table(attention, graph)] if attention.leading else []
    if attention.sources is not None:
        names = attention.source_ids(graph)
        tables += [_score_table(scores, attention.sources, names, graph) for scores in attention.scores]
    return tables


def _leading_table(attention: Attention, graph: Graph) -> PageTable:
    ids, note = graph.ids, _LEADING_NOTE
    if attention.within is not None:
        share = percent(attention.within)
        note += f" Heads are known of edges between the nodes that have {share} of the influence alone."
    rows: list[list[str | float]] = [
        [f"{one.layer}.{one.head}", percent(one.share, 1), ids[one.edge[0]], ids[one.edge[1]], one.part]
        for one in attention.leading
    ]
    return PageTable("Attention heads that carry most", ["Head", "Share", "From", "To", "Part"], rows, note)


def _score_table(scores: Sequence[HeadScore], nodes: Nodes, names: Sequence[str], graph: Graph) -> PageTable:
    """A block of rows for each key: the score, its largest pairs, all others."""
    first, ids = scores[0], set(graph.ids)
    rows: list[list[str | float]] = []
    for score in scores:
        rows.append([f"{_place(graph, score.key)}, {percent(score.weight)}", "score", "", score.value])
        for query, key, part in zip(score.query_N.tolist(), score.key_N.tolist(), score.part_N.tolist(), strict=True):
            told = (names[n] if names[n] in ids else _words(nodes, n, graph) for n in (query, key))
            rows.append(["", *told, part])
        rows.append(["", "all other pairs", "", score.rest])
    keys = ", ".join(f"{_place(graph, score.key)} {percent(score.weight)}" for score in scores)
    title = f"Head {first.layer}.{first.head} at {_place(graph, first.query)} looks at {keys}"
    return PageTable(title, ["Key", "Source of the query", "Source of the key", "Adds"], rows, _NOTE)


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
