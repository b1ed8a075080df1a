"""The attribution graph: its nodes, the matrix of its edges, and its prompt and model.

The sources of edges are all nodes but the logits; their targets are the features and the logits. So a graph of N nodes
has the first S of them as columns, and as rows the features and then the logits, R of them: ``adjacency_RxS[r, s]`` is
what source s adds to the pre-activation of target r. Nodes of the kinds first_mlp and bias are there or not; they
complete the sums (``unexplained_R``) and take no part in influences, scores and pruning.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from saejax.attribution.graph.nodes import FEATURE, KINDS, LOGIT, Nodes
from saejax.errors import one_of
from saejax.short_reprs import has_short_repr


@dataclasses.dataclass(frozen=True)
class GraphScores:
    """Replacement and completeness scores of a graph, each between 0 and 1."""

    replacement: float  #: influence of the tokens, as a share of the influence of tokens and errors together
    completeness: float  #: mean over nodes, weighted by influence, of the share of a node's input that no error gives


@has_short_repr
@dataclasses.dataclass(frozen=True)
class Pruning:
    """The nodes and edges of the whole graph that pruning keeps."""

    #: node_threshold and edge_threshold: the shares of influence that were kept.
    node_threshold: float
    edge_threshold: float
    node_N: np.ndarray  #: int32 place of each kept node in the table of the whole graph
    #: float32 cumulative share of influence of each kept node: of all nodes with at least as much. It is small for
    #: the most influential ones.
    influence_N: np.ndarray
    scores: GraphScores  #: of the whole graph
    top_edges: int = 0  #: most edges of a target that were kept; 0: any number
    min_weight: float = 0.0  #: smallest size of the edges that were kept


@has_short_repr
@dataclasses.dataclass(frozen=True)
class GraphData:
    """A graph of one prompt; ``graph.Graph`` is this and what is done with it."""

    adjacency_RxS: np.ndarray  #: float32 weights of the edges, targets by sources; 0: no edge
    nodes: Nodes  #: the N nodes
    #: float32 pre-activation of each feature, and each logit less the mean over the vocabulary, before capping.
    value_R: np.ndarray
    constant_R: np.ndarray  #: float32 part of it that the target's own biases are (encoder, norm, unembedding)
    untraced_R: np.ndarray  #: float32 part of it that active features without a node add
    ids_P: np.ndarray  #: int32 token ids of the prompt
    tokens: tuple[str, ...]  #: their texts
    logit_K: np.ndarray  #: float32 logits of the targets, as the model gives them
    labels: tuple[str, ...]  #: the texts of the logits: a token, or both of a difference; or the name of a direction
    prompt: str  #: the text
    n_layers: int  #: of the model
    model: Mapping[str, Any]  #: that was traced: name, revision, fingerprint, family
    #: that were, or SAEs: name, revision, kind, n_features, layers, skip, model (that they were trained on); of
    #: transcoders ``reads`` and ``cross_layer``, of SAEs ``sites``.
    transcoders: Mapping[str, Any]
    #: how the graph was made: max_logits, logit_mass, max_features (None: no limit), active_features (of the prompt),
    #: traced_features (those with a node), targets (of each logit its token and -1, of a difference both tokens), and
    #: with SAEs ``edges``, what an edge estimates.
    settings: Mapping[str, Any]
    #: for a pruned graph, the whole graph, which ``value_R`` and its parts then describe.
    pruning: Pruning | None = None

    def count(self, *kinds: str) -> int:
        """Return the number of nodes of some kinds, such as "feature"; see ``nodes.KINDS``.

        Raises:
          UserError: there is no such kind.
        """
        for kind in kinds:
            one_of(kind, KINDS, "kind of node")
        return int(np.isin(self.nodes.kind_N, kinds).sum())

    def slice_of(self, kind: str) -> slice:
        """Return the slice of the node table that holds the nodes of a kind; see ``count``."""
        one_of(kind, KINDS, "kind of node")
        start = self.count(*KINDS[: KINDS.index(kind)])
        return slice(start, start + self.count(kind))

    @property
    def target_R(self) -> np.ndarray:
        """The node of each row."""
        return np.flatnonzero(np.isin(self.nodes.kind_N, (FEATURE, LOGIT)))

    @property
    def probability_K(self) -> np.ndarray:
        """Weights of the logits in influences, fp32: their probabilities."""
        return self.nodes.value_N[self.slice_of(LOGIT)]

    @property
    def unexplained_R(self) -> np.ndarray:
        """The residual of each target's value, float64: rounding alone where the graph has bias nodes."""
        # In float64: thousands of edges cancel, and their rounding in fp32 would look like input that is missing.
        parts = self.adjacency_RxS.sum(axis=1, dtype=np.float64), self.constant_R, self.untraced_R
        return self.value_R - sum(part.astype(np.float64) for part in parts)

    def edges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the edges: node of the source, node of the target, weight, each [E]; target by target."""
        row_E, source_E = np.nonzero(self.adjacency_RxS)
        return source_E, self.target_R[row_E], self.adjacency_RxS[row_E, source_E]

    @property
    def ids(self) -> list[str]:
        """The ids of the nodes, as Neuronpedia and supernodes name them."""
        return self.nodes.ids(self.n_layers)
