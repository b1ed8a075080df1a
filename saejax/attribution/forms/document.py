"""The JSON of a graph as Neuronpedia and circuit-tracer's viewer read it, and what must be true of it.

A document has four keys. ``metadata`` names the model, the prompt and the settings; ``qParams`` holds what a reader has
selected, pinned and grouped (``supernodes``: of each its label and the ids of its nodes); ``nodes`` and ``links`` are
the graph. A node has a unique ``node_id``, ``feature`` (``neuronpedia.cantor_pair`` of layer and number), ``layer``
("E" of tokens), ``ctx_idx`` (its position in the prompt), ``feature_type``, ``clerp`` (its label), ``influence``
(cumulative share, 0 to 1, small for the most influential), ``activation`` and ``token_prob``. Names and types are those
of Neuronpedia's published schema; a viewer relies on the rest without saying so: ids that are unique, links
between nodes that exist, numbers that are finite.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from saejax.errors import UserError

GraphDocument = Mapping[str, Any]
DocumentNode = Mapping[str, Any]

FEATURE_TYPE, ERROR_TYPE = "cross layer transcoder", "mlp reconstruction error"

_METADATA = dict(slug=str, scan=str, prompt_tokens=list, prompt=str)
_METADATA_OPTIONAL = dict.fromkeys(
    ("feature_details", "generation_settings", "pruning_settings"), (Mapping, type(None))
)
_QPARAMS = dict(pinnedIds=list, supernodes=list, linkType=str, clickedId=str, sg_pos=str)
_NODE: dict[str, Any] = dict(node_id=str, feature=(Integral, type(None)), layer=(str, Integral), ctx_idx=Integral)
_NODE |= dict(feature_type=str, jsNodeId=str, clerp=str)
_NODE_OPTIONAL = dict.fromkeys(("influence", "activation", "token_prob"), (Real, type(None)))
_LINK = dict(source=str, target=str, weight=Real)
_WORDS: dict[Any, str] = {str: "a string", list: "a list", Mapping: "an object", Integral: "an integer"}
_WORDS |= {Real: "a number", type(None): "null"}


def check_document(document: Any) -> dict[str, Any]:
    """Check a graph document and return it.

    Raises:
      UserError: names the first thing that is not as it must be.
    """
    metadata = check_metadata(document)
    _check_optional(document["qParams"], _QPARAMS, "qParams")
    if not document["nodes"]:
        raise UserError("the graph has no nodes: prune it less")
    for k, node in enumerate(document["nodes"]):
        _check_node(node, f"nodes[{k}]", len(metadata["prompt_tokens"]))
    counts = Counter(node["node_id"] for node in document["nodes"])
    twice = [name for name, times in counts.items() if times > 1]
    if twice:
        raise UserError(
            f"{len(twice)} node ids of the graph are not unique, such as {twice[0]!r}: ids tell nodes apart (before "
            "July 2026 circuit-tracer gave errors the ids of features: write the graph anew with a later version)"
        )
    for k, link in enumerate(document["links"]):
        _check_keys(link, _LINK, f"links[{k}]")
        if not math.isfinite(link["weight"]):
            raise UserError(f"links[{k}].weight of the graph is {link['weight']}: weights must be finite")
        for end in ("source", "target"):
            if link[end] not in counts:
                raise UserError(f"links[{k}].{end} of the graph is {link[end]!r}, and no node has that id")
    return document


def describe_sources(metadata: Mapping[str, Any]) -> list[str]:
    """Return the names of a graph's model and transcoders in words, where its metadata say them.

    ``scan`` is where viewers find the features: the model's id at Neuronpedia, or the address of the transcoders.
    """
    settings, scan = metadata.get("generation_settings") or {}, metadata["scan"]
    model = settings.get("model") or ("" if "/" in scan else scan)
    return [*([f"model {model}"] if model else []), *([f"transcoders {scan}"] if "/" in scan else [])]


def check_metadata(document: Any) -> Mapping[str, Any]:
    """Check that a document has the keys of a graph, and return its metadata; nodes and links are not looked at.

    Raises:
      UserError: as of ``check_document``.
    """
    _check_keys(document, {"metadata": Mapping, "qParams": Mapping, "nodes": list, "links": list}, "the graph")
    metadata = document["metadata"]
    _check_keys(metadata, _METADATA, "metadata")
    _check_optional(metadata, _METADATA_OPTIONAL, "metadata")
    if not all(isinstance(token, str) for token in metadata["prompt_tokens"]):
        raise UserError("metadata.prompt_tokens of the graph must be a list of strings")
    return metadata


def _check_node(node: Any, where: str, n_tokens: int) -> None:
    _check_keys(node, _NODE, where)
    _check_optional(node, _NODE_OPTIONAL, where)
    if not 0 <= node["ctx_idx"] < n_tokens:
        raise UserError(f"{where}.ctx_idx of the graph is {node['ctx_idx']}: the prompt has {n_tokens} tokens")
    if node["layer"] != "E" and not re.fullmatch(r"[0-9]{1,4}", str(node["layer"])):  # a page has a row for each
        raise UserError(f"{where}.layer of the graph is {node['layer']!r}: expected a number, or E for a token")
    for name in _NODE_OPTIONAL:
        if node.get(name) is not None and not math.isfinite(node[name]):
            raise UserError(f"{where}.{name} of the graph is {node[name]}: expected a finite number or null")


def _check_keys(item: Any, types: Mapping[str, Any], where: str) -> None:
    if not isinstance(item, Mapping):
        raise UserError(f"{where} must be an object with the keys {', '.join(types)}; it is a {type(item).__name__}")
    missing = [name for name in types if name not in item]
    if missing:
        raise UserError(f"{where} has no {', '.join(missing)}: is this a graph in Neuronpedia's format?")
    _check_optional(item, types, where)


def _check_optional(item: Mapping[str, Any], types: Mapping[str, Any], where: str) -> None:
    for name, kind in types.items():
        # JSON's booleans are integers to Python, and no key here takes one.
        if name in item and (not isinstance(item[name], kind) or isinstance(item[name], bool)):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            expected = " or ".join(_WORDS.get(allowed, allowed.__name__) for allowed in kinds)
            raise UserError(f"{where}.{name} must be {expected}; it is {item[name]!r:.60}")


def feature_nodes(document: GraphDocument) -> list[DocumentNode]:
    """Return the nodes that are features, and whose id says which."""
    return [
        node
        for node in document["nodes"]
        if node["feature_type"] == FEATURE_TYPE and re.fullmatch(r"[0-9]{1,4}_[0-9]{1,9}(_.*)?", node["node_id"])
    ]


def feature_of(node: DocumentNode) -> tuple[int, int]:
    """Return the layer and the index of a node that is a feature."""
    layer, index = node["node_id"].split("_")[:2]
    return int(layer), int(index)


def are_groups(groups: Any) -> bool:
    """Return whether this is a list of groups, each a label followed by ids."""
    return isinstance(groups, list) and all(
        isinstance(group, list) and len(group) > 1 and all(isinstance(part, str) for part in group) for group in groups
    )


def read_state(saved: Any) -> dict[str, Any] | None:
    """Return what was saved of the pins of a page, under the names that ``qParams`` of a document have.

    Args:
      saved: a list of groups; or a state that a page saved, or all ``qParams``.

    Returns:
      ``supernodes``, the groups; and of a state also ``pinnedIds`` and ``sg_pos``, the places of the boxes of pins, as
      far as it has them. None: it is nothing of this.
    """
    state = dict(supernodes=saved) if isinstance(saved, list) else saved
    if not isinstance(state, Mapping) or not are_groups(state.get("supernodes")):
        return None
    pins, places = state.get("pinnedIds", []), state.get("sg_pos", "")
    if not isinstance(places, str) or not isinstance(pins, list) or not all(isinstance(name, str) for name in pins):
        return None
    return {name: state[name] for name in ("supernodes", "pinnedIds", "sg_pos") if name in state}


def check_pins(ids: Collection[str], pins: Collection[str]) -> None:
    """Check that all pinned nodes are in a graph.

    Args:
      ids: of the graph's nodes.
      pins: ids of those that are pinned.

    Raises:
      UserError: one is not.
    """
    if unknown := set(pins) - set(ids):
        raise UserError(
            f"{min(unknown)!r} is pinned, and no node of the graph has that id: was it made of another prompt, or is "
            "it pruned away?"
        )


def check_groups(ids: Collection[str], groups: Sequence[Sequence[str]]) -> None:
    """Check groups as in ``qParams.supernodes``, each a label and ids of nodes.

    Args:
      ids: of the graph's nodes.
      groups: of each the label and the ids.

    Raises:
      UserError: the graph has no node of an id, or a node is in two groups, or in one twice.
    """
    id_set, label_of = set(ids), dict[str, str]()
    for label, *members in groups:
        for member in members:
            if member not in id_set:
                raise UserError(
                    f"the supernode {label!r} names {member!r}, and no node of the graph has that id: was it made of "
                    "another prompt, or is it pruned away?"
                )
            if member in label_of:
                raise UserError(
                    f"the node {member!r} is in the supernodes {label_of[member]!r} and {label!r}: expected it in one, "
                    "once"
                )
            label_of[member] = label
