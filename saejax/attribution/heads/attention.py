"""Where a graph's attention came from: the heads that carry its edges, and a few heads' scores split over pairs."""

import dataclasses
from collections.abc import Sequence

from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import Nodes
from saejax.attribution.heads.carried import Carried, Leading
from saejax.attribution.heads.cut import within
from saejax.attribution.heads.edges import edge_heads
from saejax.attribution.heads.query_key import HeadScore, split_scores
from saejax.attribution.results import HeadResults, KeyScore, LeadingHead, QueryScores, SourcePair
from saejax.attribution.trace.prompt import Traced
from saejax.attribution.trace.sources import Sources

OWN = "own_bias"  # stands for the biases of the head's own layer, beside ids of nodes
_LEADING = 10  # heads that results and the page name


@dataclasses.dataclass(frozen=True)
class Attention:
    """What was found.

    Attributes:
      carried: the heads of each edge; None: not asked for.
      within: heads are known of edges between the nodes of this share of influence alone; None: of all edges.
      leading: the heads that carry most, the largest share first.
      scores: of each head that is looked into, a score for each key.
      sources: the nodes that the pairs of scores name by their places.
    """

    carried: Carried | None = None
    within: float | None = None
    leading: Sequence[Leading] = ()
    scores: Sequence[Sequence[HeadScore]] = ()
    sources: Nodes | None = None

    @property
    def heads(self) -> HeadResults | None:
        """Results; None: not asked for."""
        if self.carried is None:
            return None
        leading = tuple(LeadingHead(one.layer, one.head, one.share) for one in self.leading)
        return HeadResults(len(self.carried.by_edge()), leading, self.within)

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
    carried, share = None, None
    if heads:
        known, share = within(pruned, traced.graph, traced.replacement.model.config)
        carried = edge_heads(traced.replacement, traced.readouts, known)
    leading = carried.leading()[:_LEADING] if carried else []
    if asked is None:
        last = len(pruned.ids_P) - 1
        asked = [(one.layer, one.head, last) for one in (carried.leading(last)[:1] if carried else [])]
    if not asked:
        return Attention(carried, share, leading)
    sources = Sources.of(traced.replacement)
    scores = [split_scores(traced.replacement, sources, *one) for one in asked]
    return Attention(carried, share, leading, scores, sources.nodes)


def _key_score(score: HeadScore, names: Sequence[str]) -> KeyScore:
    parts = zip(score.query_N.tolist(), score.key_N.tolist(), score.part_N.tolist(), strict=True)
    pairs = tuple(SourcePair(names[query], names[key], part) for query, key, part in parts)
    return KeyScore(score.key, score.weight, score.value, pairs, score.rest)
