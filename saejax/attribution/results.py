"""Results of the stage ``attribute``."""

import dataclasses
from collections.abc import Mapping

from saejax.attribution.graph.data import GraphScores


@dataclasses.dataclass(frozen=True)
class GraphTarget:
    """What a graph explains.

    Attributes:
      label: a token, a difference of two such as "' Paris' - ' Rome'", or the name of a direction.
      logit: the logit or the difference, as the model gives it.
      weight: in influences: the probability of a token, 1 for others.
    """

    label: str
    logit: float
    weight: float


@dataclasses.dataclass(frozen=True)
class EdgeCorrelation:
    """How well edges foretell what happens, over all targets that an edge reaches; None where fewer than 3 do.

    Attributes:
      pearson: correlation, -1 to 1.
      spearman: of the ranks.
      sign: share of equal signs, 0 to 1.
    """

    pearson: float | None
    spearman: float | None
    sign: float | None


@dataclasses.dataclass(frozen=True)
class DoublingResults:
    """Features changed one by one.

    Attributes:
      features: how many.
      held_error: their activation added 64 times with all frozen as the graph does, a 64th of what happens against the
        edges: the largest difference over the largest edge. With SAEs against derivatives taken forwards.
      free: edges against what happens when activations are doubled and nothing is frozen.
    """

    features: int
    held_error: float
    free: EdgeCorrelation


@dataclasses.dataclass(frozen=True)
class CurveResults:
    """The model run with a part of the graph alone, for growing shares of influence; a number for each share.

    Attributes:
      share: of the influence of all nodes, 0 to 1.
      features: that are kept.
      errors: that are kept.
      readout: the first target with these alone.
      complement: the first target with all others alone.
      faithfulness: ``readout`` between ``empty`` (0) and ``model`` (1); None where these two are the same.
      incompleteness: ``complement`` likewise.
      model: the first target of the whole model.
      empty: the first target without any feature and error.
      rest: what is left out becomes "zero", or "mean": each feature's mean activation over all positions but the first
        of all prompts of the run, for features that are active in the prompt (the others stay at 0, and so do errors).
    """

    share: tuple[float, ...]
    features: tuple[int, ...]
    errors: tuple[int, ...]
    readout: tuple[float | None, ...]
    complement: tuple[float | None, ...]
    faithfulness: tuple[float | None, ...]
    incompleteness: tuple[float | None, ...]
    model: float
    empty: float
    rest: str


@dataclasses.dataclass(frozen=True)
class LeadingHead:
    """An attention head that carries much of a graph.

    Attributes:
      layer: of the head.
      head: its number in the layer.
      share: of its targets' inputs that vanishes without the head, mean over targets, 0 to 1.
    """

    layer: int
    head: int
    share: float


@dataclasses.dataclass(frozen=True)
class HeadResults:
    """The heads that carry the edges; ``heads/<slug>.json`` has those of each edge.

    Attributes:
      edges: whose heads are known.
      too_large: why there are none; "" where there are.
      leading: the heads of the largest shares, at most ten.
    """

    edges: int
    too_large: str
    leading: tuple[LeadingHead, ...]


@dataclasses.dataclass(frozen=True)
class SourcePair:
    """What a pair of sources adds to a score.

    Attributes:
      query: id of the node that adds to the query; "own_bias": biases of the head's own layer.
      key: id of the node that adds to the key, likewise.
      part: of the score, before the softmax.
    """

    query: str
    key: str
    part: float


@dataclasses.dataclass(frozen=True)
class KeyScore:
    """The score of a query with one key.

    Attributes:
      key: its position.
      weight: how much the query attends to it, 0 to 1.
      score: before softmax and capping.
      pairs: those that add most to it, the largest by size first.
      rest: what all other pairs add.
    """

    key: int
    weight: float
    score: float
    pairs: tuple[SourcePair, ...]
    rest: float


@dataclasses.dataclass(frozen=True)
class QueryScores:
    """The scores of one head at one position, split over pairs of sources.

    Attributes:
      layer: of the head.
      head: its number in the layer.
      query: position of the query.
      keys: those that it attends to most.
    """

    layer: int
    head: int
    query: int
    keys: tuple[KeyScore, ...]


@dataclasses.dataclass(frozen=True)
class GraphResults:
    """The graph of one prompt; also in ``<slug>.json``.

    Attributes:
      prompt: its text.
      tokens: their texts.
      targets: what is explained.
      active: active features of the prompt.
      traced: those that have a node.
      features: that are kept by pruning.
      errors: that are kept by pruning.
      edges: that are kept by pruning.
      scores: of the whole graph.
      unexplained: what rows with bias nodes lack of their pre-activations: the largest by size, over the largest value.
      supernodes: groups of nodes in the document's ``qParams.supernodes``; their members and the logits are pinned.
      seconds: of tracing.
      doubling: None: not asked for.
      circuits: None: not asked for, or a graph of SAEs.
      heads: None: not asked for, or a graph of SAEs.
      query_key: of each head that is looked into: those asked for, or the one that carries most into the last position.
    """

    prompt: str
    tokens: tuple[str, ...]
    targets: tuple[GraphTarget, ...]
    active: int
    traced: int
    features: int
    errors: int
    edges: int
    scores: GraphScores
    unexplained: float
    supernodes: int
    seconds: float
    doubling: DoublingResults | None
    circuits: CurveResults | None
    heads: HeadResults | None
    query_key: tuple[QueryScores, ...]


@dataclasses.dataclass(frozen=True)
class AttributeResults:
    """Attribution graphs.

    Attributes:
      transcoders: the set that they were made with; "" with SAEs.
      dictionaries: the SAEs' folders; none with transcoders.
      graphs: by slug.
    """

    transcoders: str
    dictionaries: tuple[str, ...]
    graphs: Mapping[str, GraphResults]
