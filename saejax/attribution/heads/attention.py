"""Attention results of a graph on request: head contributions to edges, and scores split over pairs."""

import dataclasses
from collections.abc import Sequence

from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import Nodes
from saejax.attribution.heads.contributions import HeadContributions, LeadingHead, head_contributions
from saejax.attribution.heads.query_key import HeadScore, query_scores, source_names, split_scores
from saejax.attribution.local.model import LocalModel
from saejax.attribution.results import HeadResults, LeadingHeadResults, QueryScores
from saejax.attribution.trace.rounds import Traced


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention of a pruned graph.

    Attributes:
      contributions: of heads to edges; None: not requested.
      leading: the heads of the largest contributions.
      scores: of each head that is split, a score for each key.
      sources: the nodes that pairs of scores refer to by index; None: no head is split.
      names: their ids.
    """

    contributions: HeadContributions | None = None
    leading: Sequence[LeadingHead] = ()
    scores: Sequence[Sequence[HeadScore]] = ()
    sources: Nodes | None = None
    names: Sequence[str] = ()

    @property
    def heads(self) -> HeadResults | None:
        """Results of contributions; None: not requested."""
        if self.contributions is None:
            return None
        leading = tuple(LeadingHeadResults(head.layer, head.head, head.logit, head.mean) for head in self.leading)
        return HeadResults(len(self.contributions.by_edge()), leading)

    @property
    def query_key(self) -> tuple[QueryScores, ...]:
        """Results of the heads that are split."""
        return tuple(query_scores(scores, self.names) for scores in self.scores)


def read_attention(
    traced: Traced[LocalModel], pruned: Graph, heads: bool, split_heads: Sequence[tuple[int, int, int]]
) -> Attention:
    """Compute what is requested of the attention of a pruned graph.

    Args:
      traced: what the graph was pruned from.
      pruned: the graph.
      heads: whether contributions of heads to edges are requested.
      split_heads: layer, head and position of the query of each score to split.

    Raises:
      UserError: a head or a position does not exist.
    """
    contributions = head_contributions(traced.local, traced.readouts, pruned) if heads else None
    leading = contributions.leading() if contributions else []
    if not split_heads:
        return Attention(contributions, leading)
    scores = [split_scores(traced.local, *head) for head in split_heads]
    return Attention(contributions, leading, scores, traced.local.sources.nodes, source_names(traced.local, pruned))
