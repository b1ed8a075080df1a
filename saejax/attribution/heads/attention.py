"""Where a graph's attention came from: the heads that carry its edges, and a few heads' scores split over pairs."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import Nodes
from saejax.attribution.heads.edges import Carried, TooLarge, edge_heads
from saejax.attribution.heads.query_key import HeadScore, split_scores
from saejax.attribution.results import HeadResults, KeyScore, LeadingHead, QueryScores, SourcePair
from saejax.attribution.trace.prompt import Traced
from saejax.attribution.trace.sources import Sources

OWN = "own_bias"  # stands for the biases of the head's own layer, beside ids of nodes
_LEADING = 10  # heads that results and the page name


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


@dataclasses.dataclass(frozen=True)
class Attention:
    """What was found.

    Attributes:
      carried: the heads of each edge; empty where they were not asked for or the graph is too large.
      too_large: why there are no heads of edges; "": there are; None: they were not asked for.
      leading: the heads that carry most, the largest share first.
      scores: of each head that is looked into, a score for each key.
      sources: the nodes that the pairs of scores name by their places.
    """

    carried: Carried
    too_large: str | None
    leading: Sequence[Leading] = ()
    scores: Sequence[Sequence[HeadScore]] = ()
    sources: Nodes | None = None

    @property
    def heads(self) -> HeadResults | None:
        """Results; None: not asked for."""
        if self.too_large is None:
            return None
        leading = tuple(LeadingHead(one.layer, one.head, one.share) for one in self.leading)
        return HeadResults(len(self.carried), self.too_large, leading)

    def query_key(self, graph: Graph) -> tuple[QueryScores, ...]:
        """Results: the scores of the heads that were looked into, of the graph that is given."""
        names = self.source_ids(graph) if self.scores else []
        return tuple(
            QueryScores(each[0].layer, each[0].head, each[0].query, tuple(_key_score(score, names) for score in each))
            for each in self.scores
        )

    def source_ids(self, graph: Graph) -> list[str]:
        """The ids of all sources, in the graph or not, and of the head's own biases."""
        assert self.sources is not None
        return [*self.sources.ids(graph.n_layers), OWN]


def attend(traced: Traced, pruned: Graph, heads: bool, asked: Sequence[tuple[int, int, int]] | None) -> Attention:
    """Finds where the attention of a pruned graph came from.

    Args:
      traced: what the graph was cut from.
      pruned: the graph.
      heads: whether the heads of edges are asked for.
      asked: layer, head and position of the query of each score to split; None: of the head that carries most into the
        last position, which only heads of edges tell.

    Raises:
      UserError: a head or a position does not exist.
    """
    carried: Carried = {}
    too_large: str | None = None
    if heads:
        too_large = ""
        try:
            carried = edge_heads(traced.replacement, traced.readouts, pruned)
        except TooLarge as error:
            too_large = str(error)
    leading = leading_heads(pruned, carried)[:_LEADING]
    if asked is None:
        last = len(pruned.ids_P) - 1
        asked = [(one.layer, one.head, last) for one in leading_heads(pruned, carried, last)[:1]]
    if not asked:
        return Attention(carried, too_large, leading)
    sources = Sources.of(traced.replacement)
    scores = [split_scores(traced.replacement, sources, *one) for one in asked]
    return Attention(carried, too_large, leading, scores, sources.nodes)


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


def _key_score(score: HeadScore, names: Sequence[str]) -> KeyScore:
    parts = zip(score.query_N.tolist(), score.key_N.tolist(), score.part_N.tolist(), strict=True)
    pairs = tuple(SourcePair(names[query], names[key], part) for query, key, part in parts)
    return KeyScore(score.key, score.weight, score.value, pairs, score.rest)
