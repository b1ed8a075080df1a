"""What heads carry of a graph's edges, part by part: the largest heads of each edge, and shares of all."""

import dataclasses

import numpy as np

from saejax.attribution.graph import Graph


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


class Carried:
    """The heads that carry the edges of a graph, filled in by ``add``.

    Args:
      graph: a pruned one.
      layers, heads: of the model, and of each layer.
      top: how many heads of each edge are told apart, those of the largest parts by size.

    Attributes:
      source_E, target_E: the edges' ends, as places in the graph's table of nodes; target by target.
      head_ExJ, part_ExJ: the heads of the largest parts of each edge, each layer x heads + head, and the parts.
    """

    def __init__(self, graph: Graph, layers: int, heads: int, top: int = 3):
        self._nodes, self._heads = graph.nodes, heads
        self.source_E, self.target_E, weight_E = graph.edges()
        self._input_N = np.bincount(self.target_E, np.abs(weight_E), len(graph.nodes))
        self.head_ExJ = np.zeros((len(weight_E), min(top, layers * heads)), np.int32)
        self.part_ExJ = np.zeros(self.head_ExJ.shape, np.float32)
        # Of each target, through each head: from all sources, and from those at other positions.
        self._size_NxX, self._moved_NxX = np.zeros((2, len(graph.nodes), layers * heads), np.float32)
        self._largest_X, self._edge_X = np.zeros(layers * heads, np.float32), np.zeros(layers * heads, np.int64)

    def add(self, edge_E: np.ndarray, layer: int, part_ExX: np.ndarray) -> None:
        """Enters the parts of some edges, ascending, that go through the heads of a layer and those above; each once.

        Args:
          part_ExX: head by head from the first of ``layer`` on, of one layer or several.
        """
        own = slice(layer * self._heads, layer * self._heads + part_ExX.shape[1])
        size_ExX, target_E = np.abs(part_ExX), self.target_E[edge_E]
        positions = self._nodes.position_N
        elsewhere_E = positions[self.source_E[edge_E]] != positions[target_E]
        start_B = np.flatnonzero(np.diff(target_E, prepend=-1))  # where another target begins
        self._size_NxX[target_E[start_B], own] += np.add.reduceat(size_ExX, start_B)
        self._moved_NxX[target_E[start_B], own] += np.add.reduceat(size_ExX * elsewhere_E[:, None], start_B)
        best_X = size_ExX.argmax(axis=0)
        part_X = np.take_along_axis(part_ExX, best_X[None], axis=0)[0]
        larger_X = np.abs(part_X) > np.abs(self._largest_X[own])
        self._largest_X[own] = np.where(larger_X, part_X, self._largest_X[own])
        self._edge_X[own] = np.where(larger_X, edge_E[best_X], self._edge_X[own])
        count, row_E = self.part_ExJ.shape[1], np.arange(len(edge_E))
        new_ExK = np.empty((len(edge_E), min(count, size_ExX.shape[1])), np.int32)
        for column in range(new_ExK.shape[1]):  # the largest one by one: numpy sorts short rows slowly
            new_ExK[:, column] = size_ExX.argmax(axis=1)
            size_ExX[row_E, new_ExK[:, column]] = -1
        part_ExC = np.concatenate([self.part_ExJ[edge_E], np.take_along_axis(part_ExX, new_ExK, axis=1)], axis=1)
        head_ExC = np.concatenate([self.head_ExJ[edge_E], new_ExK + np.int32(own.start)], axis=1)
        top_ExJ = np.argpartition(-np.abs(part_ExC), count - 1, axis=1)[:, :count]
        self.part_ExJ[edge_E] = np.take_along_axis(part_ExC, top_ExJ, axis=1)
        self.head_ExJ[edge_E] = np.take_along_axis(head_ExC, top_ExJ, axis=1)

    def by_edge(self) -> dict[tuple[int, int], list[tuple[int, int, float]]]:
        """(source, target) -> (layer, head, part) of its largest parts, the largest first; edges without any left out.

        Edges within one position may be such that no head carries.
        """
        order_ExJ = np.argsort(-np.abs(self.part_ExJ), axis=1, kind="stable")
        heads, parts = (np.take_along_axis(all_, order_ExJ, axis=1).tolist() for all_ in (self.head_ExJ, self.part_ExJ))
        found = {}
        ends = zip(self.source_E.tolist(), self.target_E.tolist(), strict=True)
        for edge, own_heads, own_parts in zip(ends, heads, parts, strict=True):
            pairs = zip(own_heads, own_parts, strict=True)
            some = [(*divmod(head, self._heads), part) for head, part in pairs if part]
            if some:
                found[edge] = some
        return found

    def leading(self, position: int | None = None) -> list[Leading]:
        """The heads that carry some edges of the graph, the largest share first.

        Args:
          position: edges into targets at this position alone, from sources at others; None: all.
        """
        targets_N, size_NxX = self._input_N > 0, self._size_NxX
        if position is not None:
            targets_N, size_NxX = targets_N & (self._nodes.position_N == position), self._moved_NxX
        share_X = (size_NxX[targets_N] / self._input_N[targets_N, None]).sum(axis=0) / max(targets_N.sum(), 1)
        best = [head for head in np.argsort(-share_X, kind="stable").tolist() if share_X[head] > 0]
        found = []
        for head in best:
            layer, own = divmod(head, self._heads)
            edge = int(self.source_E[self._edge_X[head]]), int(self.target_E[self._edge_X[head]])
            found.append(Leading(layer, own, float(share_X[head]), edge, float(self._largest_X[head])))
        return found
