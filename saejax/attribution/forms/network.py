"""Graphs as NetworkX's, for its algorithms: paths, centralities, communities."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import KINDS, LOGIT
from saejax.attribution.groups.supernodes import Supernode, collapse

if TYPE_CHECKING:
    import networkx


def to_networkx(graph: Graph, supernodes: Sequence[Supernode] = ()) -> "networkx.DiGraph":
    """A directed graph, from sources to targets; of whole graphs, too.

    Args:
      supernodes: groups that become one node each, called by their labels, of the kind "supernode" and with the ids of
        their ``members``; edges from and to them are sums. Of several groups of one label all but the first have a
        number behind it.

    Returns:
      A ``networkx.DiGraph`` whose nodes are called as in Neuronpedia's JSON and have ``kind``, ``layer``,
      ``position``, ``index``, ``value`` (activation, or weight of a logit), ``token``, and for a pruned graph
      ``influence`` (cumulative share). Edges have ``weight``.
    """
    import networkx

    made = networkx.DiGraph(prompt=graph.prompt, model=graph.model.get("name", ""))
    ids, nodes = graph.ids, graph.nodes
    columns = (nodes.kind_N, nodes.layer_N, nodes.position_N, nodes.index_N, nodes.value_N)
    for name, kind, layer, position, index, value in zip(ids, *(column.tolist() for column in columns), strict=True):
        token = graph.tokens[position] if kind != LOGIT else graph.labels[made.number_of_nodes() - len(ids)]
        made.add_node(
            name, kind=KINDS[kind], layer=layer, position=position, index=index, value=value, token=token
        )  # fmt: skip
    if graph.pruning:
        for name, share in zip(ids, graph.pruning.influence_N.tolist(), strict=True):
            made.nodes[name]["influence"] = share
    ends = zip(*(part.tolist() for part in graph.edges()), strict=True)
    made.add_weighted_edges_from((ids[a], ids[b], weight) for a, b, weight in ends)
    return _collapsed(made, graph, supernodes) if supernodes else made


def _collapsed(whole: "networkx.DiGraph", graph: Graph, supernodes: Sequence[Supernode]) -> "networkx.DiGraph":
    """The same with groups in place of their nodes."""
    import networkx

    units, ids = collapse(graph, supernodes), list(whole)
    made = networkx.DiGraph(**whole.graph)
    for unit, (label, members) in enumerate(zip(units.labels, units.members, strict=True)):
        if unit >= len(supernodes):
            made.add_node(label, **whole.nodes[label])
            continue
        taken, name = 1, label
        while name in made or name in whole:
            taken += 1
            name = f"{label} ({taken})"
        made.add_node(name, kind="supernode", members=[ids[node] for node in members])
    names = list(made)
    for target, source in zip(*units.weight_UxU.nonzero(), strict=True):
        made.add_edge(names[source], names[target], weight=float(units.weight_UxU[target, source]))
    return made
