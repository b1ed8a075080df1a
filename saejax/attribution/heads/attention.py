"""Attention results of a graph on request: head contributions to edges, and scores split over pairs."""

import dataclasses
from collections.abc import Sequence

from saejax.attribution.graph import Graph
from saejax.attribution.heads.contributions import HeadContributions, head_contributions
from saejax.attribution.heads.query_key import split_scores
from saejax.attribution.local.model import LocalModel
from saejax.attribution.results import HeadResults, QueryScores
from saejax.attribution.trace.rounds import Traced


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention of a pruned graph.

    Attributes:
      contributions: of heads to edges; None: not requested.
      heads: their results.
      query_key: the scores of each head that is split.
    """

    contributions: HeadContributions | None = None
    heads: HeadResults | None = None
    query_key: tuple[QueryScores, ...] = ()


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
    results = contributions.results() if contributions else None
    return Attention(contributions, results, tuple(split_scores(traced.local, *head) for head in split_heads))
