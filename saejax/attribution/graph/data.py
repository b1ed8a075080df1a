"""The attribution graph: its nodes, the matrix of its edges, its prompt and model, and how influence is defined.

The nodes are one table, kind after kind, in this order:

feature     an active feature at a position, in the order (layer, position, feature)
error       what a layer's transcoder does not explain of the MLP's output at a position, or an SAE of its site's
            value; (layer, position)
token       the embedding of the token at a position
first_mlp   the MLP's output at the first position (or first few), which no feature explains; one for each layer
bias        what the biases of a layer's attention, norms and decoder add, at all positions; one for each layer
logit       a logit, or a difference of two

The sources of edges are all nodes but the logits; their targets are the features and the logits. So a graph of N nodes
has the first S of them as columns, and as rows the features and then the logits, R of them: ``adjacency_RxS[r, s]`` is
what source s adds to the pre-activation of target r. Nodes of the kinds first_mlp and bias are there or not; they
complete the sums (``unexplained_R``) and take no part in influences, scores and pruning.

The influence of a node counts all paths from it to the logits. With N[r, s] = |A[r, s]| / sum_s |A[r, s]|, the share
of target r's input that comes from source s, and w the weights of the logits (their probabilities),

    influence = w (N + N^2 + N^3 + ...)

Edges go up through the layers, so one sweep over the rows from the logits down (``sweep``) gives this sum exactly.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from saejax.errors import one_of
from saejax.short_reprs import has_short_repr

KINDS = ("feature", "error", "token", "first_mlp", "bias", "logit")
DTYPES: tuple[Any, ...] = (np.dtype("U9"), np.int32, np.int32, np.int32, np.float32)  # of the columns of ``Nodes``
FEATURE, ERROR, TOKEN, FIRST_MLP, BIAS, LOGIT = KINDS


@has_short_repr
@dataclasses.dataclass(frozen=True)
class Nodes:
    """The table of nodes; plain arrays of one length N."""

    kind_N: np.ndarray  #: kind in words, in the order of ``KINDS``
    layer_N: np.ndarray  #: int32 layer; -1 for tokens, the number of layers for logits
    position_N: np.ndarray  #: int32 position in the prompt; 0 for biases, the last one for logits
    #: int32 number of the feature, id of the token, or id of the logit's token; -1 where there is none.
    index_N: np.ndarray
    value_N: np.ndarray  #: float32 activation of a feature, weight of a logit in influences (its probability), else 0

    def __len__(self) -> int:
        return len(self.kind_N)

    def __getitem__(self, chosen: np.ndarray | slice) -> "Nodes":
        return Nodes(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))

    @classmethod
    def of(cls, kind: str, layer: Any, position: Any, index: Any = -1, value: Any = 0) -> "Nodes":
        """Return nodes of one kind.

        Args:
          kind: one of ``KINDS``.
          layer: the column of layers [N]; in all columns a number stands for an array of it.
          position: of tokens [N].
          index: of features [N], or the node's number in its kind.
          value: activations [N].
        """
        arrays: Any = np.broadcast_arrays(*map(np.atleast_1d, (kind, layer, position, index, value)))
        return cls(*(array.astype(dtype) for array, dtype in zip(arrays, DTYPES, strict=True)))

    @classmethod
    def joined(cls, *parts: "Nodes") -> "Nodes":
        """Return the parts' nodes, one after the other."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def ids(self, n_layers: int) -> list[str]:
        """Return the ids of the nodes, circuit-tracer's and unique, in the order of the table.

        Args:
          n_layers: of the model.
        """
        ids, differences = [], 0
        columns = self.kind_N, self.layer_N, self.position_N, self.index_N
        for kind, layer, position, index in zip(*(column.tolist() for column in columns)):
            if kind == FEATURE:
                ids.append(f"{layer}_{index}_{position}")
            elif kind == ERROR:
                ids.append(f"{layer}_-1_{position}")
            elif kind == TOKEN:
                ids.append(f"E_{index}_{position}")
            elif kind == LOGIT:
                differences += index < 0  # a difference is no token: -1, -2, ...
                ids.append(f"{n_layers + 1}_{index if index >= 0 else -differences}_{position}")
            else:
                ids.append(f"{kind}_{layer}")
        return ids


def name_difference(first: str, second: str) -> str:
    """Return the label of the difference of two logits: their texts as they are, in quotes, as pages show tokens.

    Args:
      first: the text of a token.
      second: the text of the token that is subtracted.
    """
    quoted = (f'"{text}"' if "'" in text else f"'{text}'" for text in (first, second))
    return " - ".join(quoted)


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
        """Return the number of nodes of some kinds, such as "feature"; see ``KINDS``.

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


def logit_weights(probability_K: np.ndarray) -> np.ndarray:
    """Return the weights of logits in influences: their probabilities times a power of two, float64 [K].

    Influences count as shares of their sum, which the factor does not change. Without it those of an improbable target
    would be too small for float32.

    Args:
      probability_K: fp32 probabilities, 0 to 1; where all are 0 in fp32, weights are equal.
    """
    weight_K = probability_K.astype(np.float64)
    largest = weight_K.max(initial=0.0)
    return weight_K * 2.0 ** -np.frexp(largest)[1] if largest > 0 else np.ones(len(weight_K))


def sweep(
    layer_R: np.ndarray,
    column_R: np.ndarray,
    weight_R: np.ndarray,
    influence_S: np.ndarray,
    add: Callable[[int, np.ndarray, np.ndarray], None],
) -> None:
    """Go down through the layers of targets, so that all of a target's influence is there when it is passed on.

    Args:
      layer_R: layer of each target; logits are above all layers.
      column_R: index of each target among the sources; -1 for a logit, which is none.
      weight_R: weights of the logits; 0 for others.
      influence_S: influence of the sources so far, to which ``add`` adds.
      add: called with a layer, its targets, and of each the influence that it passes on to its sources.
    """
    for layer in np.unique(layer_R)[::-1].tolist():
        rows = np.flatnonzero(layer_R == layer)
        # A logit has its weight alone; -1 would take the last source.
        passed_on = weight_R[rows] + np.where(column_R[rows] >= 0, influence_S[column_R[rows]], 0)
        add(layer, rows, passed_on)
