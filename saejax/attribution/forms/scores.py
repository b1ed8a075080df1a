"""Scores of the edges of a graph in Neuronpedia's format: one measure for all targets.

Weights are in the units of their targets, pre-activations and logits, so those of different targets do not compare.
The score of an edge is the share that it has of its target's input, by size, times the target's influence, as edges are
pruned (``graph.pruning``): the influence on the outputs that goes through it.
"""

import numpy as np

from saejax.attribution.forms.document import GraphDocument


def link_scores(document: GraphDocument) -> np.ndarray:
    """Return the score of each link, float64 [E]; the influence of an output is its probability.

    Args:
      document: a document that passes ``check_document``.
    """
    nodes, links = document["nodes"], document["links"]
    place = {node["node_id"]: n for n, node in enumerate(nodes)}
    source_E, target_E = (np.array([place[link[end]] for link in links], np.int64) for end in ("source", "target"))
    size_E = np.abs(np.array([link["weight"] for link in links], np.float64))
    is_output_N = np.array([node["feature_type"] == "logit" for node in nodes])
    chance_N = np.array([node.get("token_prob") or 0.0 for node in nodes])
    layer_N = np.array([-1 if node["layer"] == "E" else int(node["layer"]) for node in nodes])
    height_E = np.where(is_output_N, layer_N.max() + 1, layer_N)[target_E]
    influence_N = np.where(is_output_N, chance_N, 0.0)
    share_E = size_E / np.maximum(np.bincount(target_E, size_E, len(nodes)), np.finfo(float).tiny)[target_E]
    score_E = np.zeros(len(links))
    for height in np.unique(height_E)[::-1]:
        at_height = np.flatnonzero(height_E == height)
        score_E[at_height] = share_E[at_height] * influence_N[target_E[at_height]]
        influence_N += np.bincount(source_E[at_height], score_E[at_height], len(nodes))
    return score_E


def strongest(document: GraphDocument) -> np.ndarray:
    """Return the indices of links from the largest score to the smallest, of equal ones the larger weight first."""
    return ranked(document, link_scores(document))


def ranked(document: GraphDocument, score_E: np.ndarray) -> np.ndarray:
    """``strongest`` where the scores are known."""
    size_E = np.abs(np.array([link["weight"] for link in document["links"]], np.float64))
    return np.lexsort((-size_E, -score_E))
