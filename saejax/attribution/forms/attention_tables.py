"""The page's tables of attention: heads with large contributions, and scores split over pairs of sources."""

from saejax.attribution.forms.page import PageTable
from saejax.attribution.graph import Graph
from saejax.attribution.heads.attention import Attention
from saejax.attribution.heads.query_key import OWN_BIAS
from saejax.attribution.results import QueryScores
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
    tables = [_score_table(scores, graph) for scores in attention.query_key]
    if not attention.heads or not attention.heads.leading:
        return tables
    rows: list[list[str | float]] = [
        [f"{h.layer}.{h.head}", h.logit, h.mean, h.source, h.target, h.contribution] for h in attention.heads.leading
    ]
    columns = ["Head", "To the output", "Mean", "Largest from", "to", "Contribution"]
    return [PageTable("Attention heads with the largest contributions", columns, rows, _LEADING_NOTE), *tables]


def _score_table(scores: QueryScores, graph: Graph) -> PageTable:
    """Return a block of rows for each key: the score, its largest pairs, all others."""
    ids, rows = set(graph.ids), list[list[str | float]]()
    for key in scores.keys:
        rows.append([f"{_place(graph, key.key)}, {percent(key.weight)}", "score", "", key.score])
        for pair in key.pairs:
            shown = (name if name in ids else _words(name, graph) for name in (pair.query, pair.key))
            rows.append(["", *shown, pair.part])
        rows.append(["", "all other pairs", "", key.rest])
    keys = ", ".join(f"{_place(graph, key.key)} {percent(key.weight)}" for key in scores.keys)
    title = f"Head {scores.layer}.{scores.head} at {_place(graph, scores.query)} attends to {keys}"
    return PageTable(title, ["Key", "Source of the query", "Source of the key", "Contribution"], rows, _NOTE)


def _words(name: str, graph: Graph) -> str:
    """Describe a source that is not in the graph, by its id."""
    if name == OWN_BIAS:
        return "biases of the head's layer"
    *first, last = name.split("_")
    if first == ["bias"]:
        return f"biases of layer {last}"
    if first == ["first", "mlp"]:
        return f"MLP of layer {last} at {_place(graph, 0)}"
    layer, index = first
    place = _place(graph, int(last))
    if layer == "E":
        return f"{place} token"
    return f"error layer {layer} · {place}" if index == "-1" else f"feature {index} layer {layer} · {place}"


def _place(graph: Graph, position: int) -> str:
    """Return a token as the page shows it, and its position."""
    return f"{graph.tokens[position].replace(' ', '␣')} ({position})"
