"""Graphs: their nodes, files and pruning; ``saejax.trace`` returns a ``Graph``."""

from saejax.attribution.graph.graph import Graph as Graph
