"""Results of the stage ``attribute``."""

import dataclasses
from collections.abc import Mapping

from saejax.attribution.graph.data import GraphScores


@dataclasses.dataclass(frozen=True)
class GraphTarget:
    """A logit or logit difference that a graph explains."""

    label: str  #: a token, or a difference of two such as "' Paris' - ' Rome'"
    logit: float  #: the logit or the difference, as the model gives it
    weight: float  #: in influences: the probability of a token, 1 for a difference


@dataclasses.dataclass(frozen=True)
class SourcePair:
    """The contribution of a pair of sources to a score."""

    query: str  #: id of the node that adds to the query; "own_bias": biases of the head's own layer
    key: str  #: id of the node that adds to the key, likewise
    part: float  #: of the score, before the softmax


@dataclasses.dataclass(frozen=True)
class KeyScore:
    """The score of a query with one key."""

    key: int  #: its position
    weight: float  #: how much the query attends to it, 0 to 1
    score: float  #: before softmax and capping
    pairs: tuple[SourcePair, ...]  #: those that add most to it, the largest by size first
    rest: float  #: what all other pairs add


@dataclasses.dataclass(frozen=True)
class QueryScores:
    """The scores of one head at one position, split over pairs of sources."""

    layer: int  #: of the head
    head: int  #: its number in the layer
    query: int  #: position of the query
    keys: tuple[KeyScore, ...]  #: those that it attends to most


@dataclasses.dataclass(frozen=True)
class GraphResults:
    """The graph of one prompt; also in ``<slug>.json``."""

    prompt: str  #: text of the prompt
    tokens: tuple[str, ...]  #: texts of its tokens
    targets: tuple[GraphTarget, ...]  #: the explained logits
    active: int  #: number of active features of the prompt
    traced: int  #: those that have a node; scores of graphs with different traced shares do not compare
    #: input from active features without a node: sum of sizes over targets, over that of the targets' values
    untraced: float
    features: int  #: that are kept by pruning
    errors: int  #: that are kept by pruning
    edges: int  #: that are kept by pruning
    scores: GraphScores  #: of the graph before pruning; they depend on the share of active features that was traced
    #: what rows with bias nodes lack of their pre-activations: the largest by size, over the largest value
    unexplained: float
    seconds: float  #: time of tracing
    query_key: tuple[QueryScores, ...]  #: of each head of ``--graph.query_key``
    empty: str | None = None  #: why no feature is kept, and what to change; None: some are


@dataclasses.dataclass(frozen=True)
class AttributeResults:
    """Attribution graphs."""

    transcoders: str  #: the set of transcoders; "" for graphs of SAEs
    dictionaries: tuple[str, ...]  #: folders of the SAEs; none for graphs of transcoders
    graphs: Mapping[str, GraphResults]  #: results by slug
