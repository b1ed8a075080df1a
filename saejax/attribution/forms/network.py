"""Graphs as NetworkX's, for its algorithms: paths, centralities, communities."""

from typing import TYPE_CHECKING

from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import KINDS, LOGIT

if TYPE_CHECKING:
    import networkx


def to_networkx(graph: Graph) -> "networkx.DiGraph":
    """Return a directed graph with edges from sources to targets; the graph may be pruned or whole.

    Returns:
      A ``networkx.DiGraph`` whose nodes are called as in Neuronpedia's JSON and have ``kind``, ``layer``,
      ``position``, ``index``, ``value`` (activation, or weight of a logit), ``token``, and for a pruned graph
      ``influence`` (cumulative share). Edges have ``weight``.
    """
    import networkx

    digraph = networkx.DiGraph(prompt=graph.prompt, model=graph.model.get("name", ""))
    ids, nodes = graph.ids, graph.nodes
    columns = (nodes.kind_N, nodes.layer_N, nodes.position_N, nodes.index_N, nodes.value_N)
    for name, kind, layer, position, index, value in zip(ids, *(column.tolist() for column in columns), strict=True):
        token = graph.tokens[position] if kind != LOGIT else graph.labels[digraph.number_of_nodes() - len(ids)]
        digraph.add_node(
            name, kind=KINDS[kind], layer=layer, position=position, index=index, value=value, token=token
        )  # fmt: skip
    if graph.pruning:
        for name, share in zip(ids, graph.pruning.influence_N.tolist(), strict=True):
            digraph.nodes[name]["influence"] = share
    ends = zip(*(part.tolist() for part in graph.edges()), strict=True)
    digraph.add_weighted_edges_from((ids[a], ids[b], weight) for a, b, weight in ends)
    return digraph
