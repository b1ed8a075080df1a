"""Graphs: their nodes, files and pruning; ``Graph`` is what ``saejax.trace`` returns."""

from saejax.attribution.graph.graph import Graph as Graph
