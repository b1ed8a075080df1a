"""An attribution graph: which features, errors and tokens of a prompt made which features and logits, and how much."""

import os
from pathlib import Path
from typing import Self

from saejax.attribution.graph.data import GraphData, GraphScores
from saejax.attribution.graph.files import load, save
from saejax.attribution.graph.pruning import prune, scores


class Graph(GraphData):
    """A graph, as ``saejax.trace`` makes it; its fields are those of ``GraphData``."""

    def scores(self) -> GraphScores:
        """Return replacement and completeness scores, of the whole graph where this is a part of one."""
        return self.pruning.scores if self.pruning else scores(self)

    def prune(self, nodes: float = 0.8, edges: float = 0.98, top_edges: int = 0) -> Self:
        """Return the most influential part of the graph: ``pruning.prune``, which has the same arguments."""
        return prune(self, nodes, edges, top_edges)

    def save(self, folder: str | os.PathLike) -> None:
        """Write ``graph.json`` and ``graph.safetensors``; the folder is made.

        Raises:
          UserError: it holds a graph already; nothing is replaced.
        """
        save(Path(folder), self)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Self:
        """Read what ``save`` wrote.

        Raises:
          UserError: a file is missing or damaged, or was written by a later version.
        """
        return load(Path(folder), cls)
