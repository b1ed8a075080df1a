"""An attribution graph: which features, errors and tokens of a prompt made which features and logits, and by how much.

Its nodes stand in one table, kind after kind:

    feature     an active feature at a position, in the order (layer, position, feature)
    error       what a layer's transcoder does not explain of the MLP's output at a position, or an SAE of its site's
                value; (layer, position)
    token       the embedding of the token at a position
    first_mlp   the MLP's output at the first position, which no feature explains; one for each layer
    bias        what the biases of a layer's attention, norms and decoder add, at all positions; one for each layer
    logit       a logit, a difference of two, or another direction of the last layer's output

The sources of edges are all nodes but the logits; their targets are the features and the logits. So a graph of N nodes
has the first S of them as columns, and as rows the features and then the logits, T of them: ``adjacency_TxS[t, s]`` is
what source s adds to the pre-activation of target t. Nodes of the kinds first_mlp and bias are there or not; they
complete the sums (``unexplained_T``) and take no part in influences, scores and pruning.

Letters: N nodes, S sources, T targets, F features, K logits, P positions (tokens of the prompt), L layers.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("feature", "error", "token", "first_mlp", "bias", "logit")
DTYPES = (np.int8, np.int32, np.int32, np.int32, np.float32)  # of the columns of ``Nodes``
FEATURE, ERROR, TOKEN, FIRST_MLP, BIAS, LOGIT = range(len(KINDS))


@dataclasses.dataclass(frozen=True)
class Nodes:
    """The table of nodes; plain arrays of one length N.

    Attributes:
      kind_N: int8 index into ``KINDS``, ascending.
      layer_N: int32 layer; -1 for tokens, the number of layers for logits.
      position_N: int32 position in the prompt; 0 for biases, the last one for logits.
      index_N: int32 number of the feature, id of the token, or id of the logit's token; -1 where there is none.
      value_N: float32 activation of a feature, weight of a logit in influences (its probability), else 0.
    """

    kind_N: np.ndarray
    layer_N: np.ndarray
    position_N: np.ndarray
    index_N: np.ndarray
    value_N: np.ndarray

    def __len__(self) -> int:
        return len(self.kind_N)

    def __getitem__(self, chosen: np.ndarray | slice) -> "Nodes":
        return Nodes(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))

    @classmethod
    def of(cls, kind: int, layer: Any, position: Any, index: Any = -1, value: Any = 0) -> "Nodes":
        """Nodes of one kind; numbers stand for arrays of them."""
        arrays: Any = np.broadcast_arrays(*map(np.atleast_1d, (kind, layer, position, index, value)))
        return cls(*(array.astype(dtype) for array, dtype in zip(arrays, DTYPES, strict=True)))

    @classmethod
    def joined(cls, *parts: "Nodes") -> "Nodes":
        """The parts' nodes, one after the other."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@dataclasses.dataclass(frozen=True)
class Scores:
    """How much of the graph goes through features; each between 0 and 1.

    Attributes:
      replacement: influence of the tokens, of that of tokens and errors together.
      completeness: mean over nodes, weighted by influence, of the share of a node's input that no error gives.
    """

    replacement: float
    completeness: float


@dataclasses.dataclass(frozen=True)
class Pruning:
    """What a pruned graph keeps of the whole one.

    Attributes:
      node_threshold, edge_threshold: the shares of influence that were kept.
      node_N: int32 place of each kept node in the table of the whole graph.
      influence_N: float32 cumulative share of influence of each kept node: that of all nodes with at least as much. It
        is small for the most influential ones.
      scores: of the whole graph.
      top_edges: most edges of a target that were kept; 0: any number.
    """

    node_threshold: float
    edge_threshold: float
    node_N: np.ndarray
    influence_N: np.ndarray
    scores: Scores
    top_edges: int = 0


@dataclasses.dataclass(frozen=True)
class Graph:
    """An attribution graph of one prompt; see the top of this module for its nodes.

    Attributes:
      adjacency_TxS: float32 weights of the edges, targets by sources; 0: no edge.
      nodes: the N nodes.
      value_T: float32 pre-activation of each feature, and each logit less the mean over the vocabulary, before capping.
      constant_T: float32 part of it that the target's own biases are (encoder, norm, unembedding).
      unkept_T: float32 part of it that active features without a node add.
      ids_P: int32 token ids of the prompt.
      tokens: their texts.
      logit_K: float32 logits of the targets, as the model gives them.
      labels: the texts of the logits: a token, or a name of the direction.
      prompt: the text.
      n_layers: of the model.
      model: name, revision, fingerprint and family of the model.
      transcoders: name and revision of the set of transcoders or SAEs, their kind and number of features, and more.
      settings: how the graph was made.
      pruning: for a pruned graph, what it was cut from; then ``value_T`` and its parts are those of the whole one.
    """

    adjacency_TxS: np.ndarray
    nodes: Nodes
    value_T: np.ndarray
    constant_T: np.ndarray
    unkept_T: np.ndarray
    ids_P: np.ndarray
    tokens: tuple[str, ...]
    logit_K: np.ndarray
    labels: tuple[str, ...]
    prompt: str
    n_layers: int
    model: Mapping[str, Any]
    transcoders: Mapping[str, Any]
    settings: Mapping[str, Any]
    pruning: Pruning | None = None

    def count(self, *kinds: int) -> int:
        """Number of nodes of these kinds."""
        return int(np.isin(self.nodes.kind_N, kinds).sum())

    def slice_of(self, kind: int) -> slice:
        """Where the nodes of a kind stand in the table."""
        start, stop = np.searchsorted(self.nodes.kind_N, [kind, kind + 1])
        return slice(int(start), int(stop))

    @property
    def target_T(self) -> np.ndarray:
        """The node of each row."""
        return np.flatnonzero(np.isin(self.nodes.kind_N, (FEATURE, LOGIT)))

    @property
    def probability_K(self) -> np.ndarray:
        """Weights of the logits in influences, fp32: their probabilities."""
        return self.nodes.value_N[self.slice_of(LOGIT)]

    @property
    def unexplained_T(self) -> np.ndarray:
        """What is missing from each target's value, float64: rounding alone where the graph has bias nodes."""
        parts = self.adjacency_TxS.sum(axis=1, dtype=np.float64), self.constant_T, self.unkept_T
        return self.value_T - sum(part.astype(np.float64) for part in parts)

    def edges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The edges: node of the source, node of the target, weight, each [E]; target by target."""
        row_E, source_E = np.nonzero(self.adjacency_TxS)
        return source_E, self.target_T[row_E], self.adjacency_TxS[row_E, source_E]

    def scores(self) -> Scores:
        """Replacement and completeness scores, of the whole graph where this is a part of one."""
        from saejax.attribution.graph.pruning import scores

        return self.pruning.scores if self.pruning else scores(self)

    def prune(self, nodes: float = 0.8, edges: float = 0.98, top_edges: int = 0) -> "Graph":
        """The most influential part of the graph; see ``pruning.prune``.

        Args:
          nodes: share of the influence of all nodes that is kept, 0 to 1.
          edges: share of the influence of the edges between them that is kept, 0 to 1.
          top_edges: most edges of a target that are kept, the largest ones; 0: any number.
        """
        from saejax.attribution.graph.pruning import prune

        return prune(self, nodes, edges, top_edges)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes ``graph.json`` and ``graph.safetensors``; the folder is made, and nothing is replaced."""
        from saejax.attribution.graph.files import save

        save(Path(folder), self)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Graph":
        """Reads what ``save`` wrote; a ``UserError`` if it is missing or damaged."""
        from saejax.attribution.graph.files import load

        return load(Path(folder))
