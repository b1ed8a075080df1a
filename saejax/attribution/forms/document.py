"""The JSON of a graph as Neuronpedia and circuit-tracer's viewer read it, and what must be true of it.

A document has four keys: ``metadata`` (what was asked of which model), ``qParams`` (what a reader has selected and
pinned), ``nodes`` and ``links``. The keys and types below are those of Neuronpedia's published schema; the rest is what
a viewer relies on without saying so: ids that are unique, links between nodes that exist, numbers that are finite.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NotRequired, TypedDict

from saejax.errors import UserError

FEATURE_TYPE, ERROR_TYPE = "cross layer transcoder", "mlp reconstruction error"


class DocumentNode(TypedDict):
    """A node under the keys of the format; keys that other programs leave out are ``NotRequired``."""

    node_id: str
    feature: int | None  # ``neuronpedia.cantor_pair`` of layer and number
    layer: str | int  # "E" of tokens
    ctx_idx: int  # position in the prompt
    feature_type: str
    jsNodeId: str
    clerp: str  # label
    influence: NotRequired[float | None]  # cumulative share, 0 to 1, small for the most influential
    activation: NotRequired[float | None]
    token_prob: NotRequired[float]
    is_target_logit: NotRequired[bool]
    run_idx: NotRequired[int]
    reverse_ctx_idx: NotRequired[int]


class DocumentLink(TypedDict):
    """An edge, between ids of nodes."""

    source: str
    target: str
    weight: float


class DocumentMetadata(TypedDict):
    """Model, prompt and settings of a graph."""

    slug: str
    scan: str
    prompt_tokens: list[str]
    prompt: str
    transcoder_list: NotRequired[list[str]]
    node_threshold: NotRequired[float]
    schema_version: NotRequired[int]
    info: NotRequired[Mapping[str, Any]]
    generation_settings: NotRequired[Mapping[str, Any] | None]  # each program has its own
    pruning_settings: NotRequired[Mapping[str, float] | None]
    replacement_score: NotRequired[float]
    completeness_score: NotRequired[float]
    feature_details: NotRequired[Mapping[str, str]]


class QParams(TypedDict, total=False):
    """The reader's selection and pinned nodes."""

    pinnedIds: list[str]
    supernodes: list[list[str]]  # of each its label and the ids of its nodes
    linkType: str
    clickedId: str
    sg_pos: str


class GraphDocument(TypedDict):
    """A graph."""

    metadata: DocumentMetadata
    qParams: QParams
    nodes: list[DocumentNode]
    links: list[DocumentLink]


_METADATA = {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str}
_QPARAMS = {"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str}
_NODE = {
    "node_id": str,
    "feature": (Integral, type(None)),
    "layer": (str, Integral),
    "ctx_idx": Integral,
    "feature_type": str,
    "jsNodeId": str,
    "clerp": str,
}
_NODE_OPTIONAL = {"influence": (Real, type(None)), "activation": (Real, type(None))}
_LINK = {"source": str, "target": str, "weight": Real}


def read_document(document: Any) -> GraphDocument:
    """Return a graph document of any program, such as a file's JSON, with ids that are unique.

    Raises:
      UserError: names the first thing that is not as it must be.
    """
    return check_document(_with_unique_errors(document))


def _with_unique_errors(document: Any) -> Any:
    """Return a document whose errors have our ids, ``{layer}_-1_{position}``; anything else is returned as it is.

    circuit-tracer calls an error ``0_{layer}_{position}``, which is also the id of the feature of layer 0 whose index
    is the error's layer. Its links come target by target, and a target's sources in the order of the nodes, features
    first; so where a graph has both, the link's neighbours tell which of the two it starts from. Where they do not, it
    is the error, unless the target is too low for that.
    """
    try:
        nodes = list(document["nodes"])
        errors = {
            f"0_{node['layer']}_{node['ctx_idx']}": index
            for index, node in enumerate(nodes)
            if node["feature_type"] == ERROR_TYPE and node["node_id"] == f"0_{node['layer']}_{node['ctx_idx']}"
        }
        if not errors:
            return document
        place = {node["node_id"]: index for index, node in enumerate(nodes) if node["feature_type"] != ERROR_TYPE}
        links = _resolve_links(nodes, document["links"], errors, place)
        renamed = {old: f"{nodes[index]['layer']}_-1_{nodes[index]['ctx_idx']}" for old, index in errors.items()}
        for old, index in errors.items():
            nodes[index] = {**nodes[index], "node_id": renamed[old]}
        names = {old: new for old, new in renamed.items() if old not in place}  # of collisions, pins are the features
        params = dict(document["qParams"])
        for key in ("pinnedIds", "clickedId"):
            if isinstance(params.get(key), list):
                params[key] = [names.get(name, name) for name in params[key]]
            elif isinstance(params.get(key), str):
                params[key] = names.get(params[key], params[key])
        if isinstance(params.get("supernodes"), list):
            params["supernodes"] = [
                [group[0], *(names.get(name, name) for name in group[1:])] for group in params["supernodes"]
            ]
        return {**document, "qParams": params, "nodes": nodes, "links": links}
    except (KeyError, TypeError, AttributeError, IndexError):
        return document  # ``check_document`` says what is wrong with it


def _resolve_links(
    nodes: Sequence[Any], links: Sequence[Any], errors: Mapping[str, int], place: Mapping[str, int]
) -> list[Any]:
    """Return the links with saejax's ids of errors as sources; see ``_with_unique_errors``.

    Args:
      nodes: nodes of the document.
      links: links of the document.
      errors: index of each error, by circuit-tracer's id.
      place: index of each other node, by id.
    """
    # The index of the next source that is certain, for each link, within its target's links.
    following: list[int] = [len(nodes)] * len(links)
    for e in range(len(links) - 2, -1, -1):
        after = links[e + 1]
        if after["target"] == links[e]["target"]:
            is_open = after["source"] in errors and after["source"] in place
            following[e] = following[e + 1] if is_open else _index(after["source"], errors, place)
    resolved, previous, target = [], -1, ""
    for e, link in enumerate(links):
        source = link["source"]
        if link["target"] != target:
            previous, target = -1, link["target"]
        if source not in errors:
            index = place[source]
        elif source not in place:
            index = errors[source]
        else:
            as_feature, as_error = place[source], errors[source]
            # Where both are sources of one target, the feature comes first, as in the table of nodes.
            returns = e + 1 < len(links) and any(
                later["source"] == source for later in links[e + 1 : e + 1 + len(nodes)] if later["target"] == target
            )
            # An error acts on layers above its own only.
            above = _height(nodes[place[target]]) > _height(nodes[as_error]) if target in place else True
            fits = [previous < candidate < following[e] for candidate in (as_feature, as_error)]
            is_error = above and not returns and (fits[1] or not fits[0])
            index = as_error if is_error else as_feature
        previous = index
        node = nodes[index]
        is_error_node = node["feature_type"] == ERROR_TYPE
        resolved.append({**link, "source": f"{node['layer']}_-1_{node['ctx_idx']}"} if is_error_node else link)
    return resolved


def _index(source: str, errors: Mapping[str, int], place: Mapping[str, int]) -> int:
    return place[source] if source in place else errors[source]


def _height(node: Mapping[str, Any]) -> int:
    return int(node["layer"]) if str(node["layer"]).isdigit() else -1


def check_document(document: Any) -> GraphDocument:
    """Check a graph document and return it.

    Raises:
      UserError: names the first thing that is not as it must be.
    """
    _check_keys(document, {"metadata": Mapping, "qParams": Mapping, "nodes": list, "links": list}, "the graph")
    metadata = document["metadata"]
    _check_keys(metadata, _METADATA, "metadata")
    _check_optional(document["qParams"], _QPARAMS, "qParams")
    if not all(isinstance(token, str) for token in metadata["prompt_tokens"]):
        raise UserError("metadata.prompt_tokens of the graph must be a list of strings")
    if not document["nodes"]:
        raise UserError("the graph has no nodes: prune it less")
    for k, node in enumerate(document["nodes"]):
        _check_node(node, f"nodes[{k}]", len(metadata["prompt_tokens"]))
    counts = Counter(node["node_id"] for node in document["nodes"])
    twice = [name for name, times in counts.items() if times > 1]
    if twice:
        raise UserError(
            f"{len(twice)} node ids of the graph are not unique, such as {twice[0]!r}: ids tell nodes apart"
        )
    for k, link in enumerate(document["links"]):
        _check_keys(link, _LINK, f"links[{k}]")
        if not math.isfinite(link["weight"]):
            raise UserError(f"links[{k}].weight of the graph is {link['weight']}: weights must be finite")
        for end in ("source", "target"):
            if link[end] not in counts:
                raise UserError(f"links[{k}].{end} of the graph is {link[end]!r}, and no node has that id")
    return document


def _check_node(node: Any, where: str, n_tokens: int) -> None:
    _check_keys(node, _NODE, where)
    _check_optional(node, _NODE_OPTIONAL, where)
    if not 0 <= node["ctx_idx"] < n_tokens:
        raise UserError(f"{where}.ctx_idx of the graph is {node['ctx_idx']}: the prompt has {n_tokens} tokens")
    if node["layer"] != "E" and not str(node["layer"]).isdigit():
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


_WORDS: dict[Any, str] = {
    str: "a string",
    list: "a list",
    Mapping: "an object",
    Integral: "an integer",
    Real: "a number",
}
_WORDS[type(None)] = "null"
