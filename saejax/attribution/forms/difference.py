"""What two graphs of one set have in common: of two prompts, or of one prompt traced or pruned in two ways.

Positions are aligned from the end of the prompts, where their outputs are. A feature is the same in both if its layer,
number and aligned position are.
"""

import dataclasses
from typing import Any

import numpy as np

from saejax.attribution.forms.document import DocumentNode, GraphDocument
from saejax.errors import UserError

_FEATURE = "cross layer transcoder"
Key = tuple[str, ...]  # of a node: kind, layer and number, and aligned position


@dataclasses.dataclass(frozen=True)
class ComparedFeature:
    """A feature of one graph or of both.

    Attributes:
      ids: of its node in each; None: it is not in that graph.
      activations: in each prompt; None likewise.
      shares: cumulative share of influence, small for the most influential; None likewise.
    """

    ids: tuple[str | None, str | None]
    activations: tuple[float | None, float | None]
    shares: tuple[float | None, float | None]


@dataclasses.dataclass(frozen=True)
class GraphDifference:
    """Two graphs side by side.

    Attributes:
      features: of each graph.
      shared: of them in both.
      jaccard: shared ones over those of either; None: there are none.
      shifted: the same with the second prompt a position off: what would be shared without regard to the position.
      elsewhere: of the first graph's features those that the second has, at any position.
      edges: between nodes of both graphs, that stand in either.
      correlation: Pearson correlation of their weights, 0 where there is none; None: fewer than 3.
      found: features, those that differ most in influence first.
      outputs: text, and probability in each graph; None: not explained there.
    """

    features: tuple[int, int]
    shared: int
    jaccard: float | None
    shifted: float | None
    elsewhere: int
    edges: int
    correlation: float | None
    found: tuple[ComparedFeature, ...]
    outputs: tuple[tuple[str, float | None, float | None], ...]


def compare_graphs(first: GraphDocument, second: GraphDocument) -> GraphDifference:
    """Compares two graphs in Neuronpedia's format.

    Raises:
      UserError: they were made with different sets, whose features are different things.
    """
    sets = [(one["metadata"].get("generation_settings") or {}).get("transcoders", "") for one in (first, second)]
    if all(sets) and sets[0] != sets[1]:
        raise UserError(f"the graphs are of different sets, {sets[0]} and {sets[1]}: their features do not compare")
    keyed = [_nodes(one) for one in (first, second)]
    own = [{key: node for key, node in nodes.items() if key[0] == _FEATURE} for nodes in keyed]
    found = [
        ComparedFeature(*(_pair(own, key, name) for name in ("node_id", "activation", "influence")))
        for key in dict.fromkeys([*own[0], *own[1]])
    ]
    moved = {(*key[:-1], str(int(key[-1]) + 1)) for key in own[1]}
    weights = _weights(first, second, keyed)
    return GraphDifference(
        features=(len(own[0]), len(own[1])),
        shared=len(own[0].keys() & own[1].keys()),
        jaccard=_jaccard(set(own[0]), set(own[1])),
        shifted=_jaccard(set(own[0]), moved),
        elsewhere=len({key[:-1] for key in own[0]} & {key[:-1] for key in own[1]}),
        edges=len(weights),
        correlation=_correlation(weights),
        found=tuple(sorted(found, key=_difference, reverse=True)),
        outputs=_outputs(keyed),
    )


def _nodes(document: GraphDocument) -> dict[Key, DocumentNode]:
    last = len(document["metadata"]["prompt_tokens"]) - 1
    found: dict[Key, DocumentNode] = {}
    for node in document["nodes"]:
        parts = node["node_id"].split("_")
        # A token is the same node at a position whatever it is, and an error is known by its layer.
        name = parts[1] if node["feature_type"] in (_FEATURE, "logit") else ""
        found[node["feature_type"], str(node["layer"]), name, str(node["ctx_idx"] - last)] = node
    return found


def _pair(own: list[dict[Key, DocumentNode]], key: Key, name: str) -> Any:
    return tuple(nodes[key].get(name) if key in nodes else None for nodes in own)


def _jaccard(first: set[Key], second: set[Key]) -> float | None:
    return len(first & second) / len(first | second) if first | second else None


def _weights(first: GraphDocument, second: GraphDocument, keyed: list[dict[Key, Any]]) -> np.ndarray:
    """The weights in both graphs of edges between nodes that both have, [E, 2]; 0: no edge."""
    both, found = keyed[0].keys() & keyed[1].keys(), dict[tuple[Key, Key], list[float]]()
    for place, (document, nodes) in enumerate(zip((first, second), keyed, strict=True)):
        key_of = {node["node_id"]: key for key, node in nodes.items() if key in both}
        for link in document["links"]:
            if link["source"] in key_of and link["target"] in key_of:
                found.setdefault((key_of[link["source"]], key_of[link["target"]]), [0.0, 0.0])[place] = link["weight"]
    return np.array(list(found.values()), np.float64).reshape(-1, 2)


def _correlation(weights: np.ndarray) -> float | None:
    if len(weights) < 3 or not weights.std(axis=0).all():
        return None
    return float(np.corrcoef(weights.T)[0, 1])


def _difference(feature: ComparedFeature) -> float:
    """By how much the influence differs: one that is missing stands behind all others, at the share 1."""
    first, second = (1.0 if share is None else share for share in feature.shares)
    return abs(first - second)


def _outputs(keyed: list[dict[Key, DocumentNode]]) -> tuple[tuple[str, float | None, float | None], ...]:
    own = [{key: node for key, node in nodes.items() if key[0] == "logit"} for nodes in keyed]
    keys = dict.fromkeys([*own[0], *own[1]])
    clerps = {key: (own[0].get(key) or own[1][key])["clerp"] for key in keys}
    return tuple((clerps[key].rpartition(" (p=")[0] or clerps[key], *_pair(own, key, "token_prob")) for key in keys)
