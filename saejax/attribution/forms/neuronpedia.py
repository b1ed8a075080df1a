"""Graphs as other programs read them: Neuronpedia, circuit-tracer's viewer, and a folder of its server.

``to_document`` gives the JSON, node by node and key by key as circuit-tracer writes it. ``write_graph`` writes it into
a folder of graphs, a file for each, and a list of them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saejax.attribution.forms.document import (
    ERROR_TYPE,
    FEATURE_TYPE,
    GraphDocument,
    check_document,
    check_groups,
    check_pins,
)
from saejax.attribution.graph import Graph
from saejax.attribution.graph.data import ERROR, FEATURE, LOGIT, TOKEN
from saejax.dictionaries.formats.hooks import bare_model_name
from saejax.errors import UserError
from saejax.files import explain_bad_name, write_json, write_text
from saejax.versions import package_versions

_TYPES = {
    FEATURE: FEATURE_TYPE,  # of per-layer transcoders, too: the viewers know no other
    ERROR: ERROR_TYPE,
    TOKEN: "embedding",
    LOGIT: "logit",
}
# How Neuronpedia calls settings of ours; others keep their names.
_SETTINGS = {"max_logits": "max_n_logits", "logit_mass": "desired_logit_prob", "max_features": "max_feature_nodes"}
INDEX = "graph-metadata.json"  # the list
_LISTED = ("slug", "scan", "transcoder_list", "prompt_tokens", "prompt", "node_threshold", "schema_version")


def to_document(
    graph: Graph,
    slug: str,
    *,
    scan: str = "",
    source_set: str = "",
    labels: Mapping[tuple[int, int], str] | None = None,
    supernodes: Sequence[Sequence[str]] = (),
    pinned: Sequence[str] = (),
    places: str = "",
) -> dict[str, Any]:
    """Return a pruned graph as Neuronpedia's JSON: ``metadata``, ``qParams``, ``nodes``, ``links``.

    Args:
      graph: a pruned graph, since the format holds cumulative influences and has no bias nodes.
      slug: the graph's name in addresses and file names.
      scan: where viewers look for the features: Neuronpedia by its id of the model, circuit-tracer's by the address of
        the set. By default that id, which is the last part of the model's name in small letters; without
        ``source_set`` the address, if the set is on the hub.
      source_set: the set's name at Neuronpedia, such as "gemmascope-transcoder-16k".
      labels: (layer, feature) -> what the feature is called.
      supernodes: of each its label and the ids of the nodes in it, which are pinned.
      pinned: ids of more nodes to pin.
      places: where a reader put the boxes of pins: JSON as a page writes it; "": nowhere.

    Raises:
      UserError: the graph is not pruned, the slug is no file name, a supernode or a pin names a node that is not there,
        a node is in two supernodes, or two logits have the same token.
    """
    if graph.pruning is None:
        raise UserError("the graph is not pruned: prune it first (nodes=1, edges=1 keeps all that has influence)")
    check_slug(slug)
    ids = graph.ids
    source_E, target_E, weight_E = graph.edges()
    links = [
        dict(source=ids[source], target=ids[target], weight=weight)
        for source, target, weight in zip(source_E.tolist(), target_E.tolist(), shortest(weight_E).tolist())
    ]
    groups = [list(group) for group in supernodes]
    pins = list(dict.fromkeys([*(member for group in groups for member in group[1:]), *pinned]))
    check_groups(ids, groups)
    check_pins(ids, pinned)
    document = dict(
        metadata=_metadata(graph, slug, scan or _scan(graph, source_set), source_set),
        qParams=dict(pinnedIds=pins, supernodes=groups, linkType="both", clickedId="", sg_pos=places),
        nodes=_nodes(graph, ids, labels or {}),
        links=links,
    )
    return check_document(document)


def pin_as_saved(graph: Graph, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``to_document`` that show a pruned graph with the pins of ``document.read_state``.

    Of groups alone, which say nothing of pins, the logits are pinned, too: what the groups explain.
    """
    groups, pinned = state.get("supernodes", []), state.get("pinnedIds", [])
    if groups and not pinned:
        pinned = graph.ids[graph.slice_of(LOGIT)]
    return dict(supernodes=groups, pinned=pinned, places=state.get("sg_pos", ""))


def shortest(numbers: np.ndarray) -> np.ndarray:
    """fp32 numbers as fp64 with no more digits than tell them apart, in JSON half as long as their digits in fp64."""
    return numbers.astype(str).astype(np.float64)


def cantor_pair(layer: int, feature: int) -> int:
    """One number for a layer and a feature, as the viewers look features up: (l + f)(l + f + 1) / 2 + f."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def _nodes(graph: Graph, ids: list[str], labels: Mapping[tuple[int, int], str]) -> list[dict[str, Any]]:
    assert graph.pruning
    nodes, document_nodes = graph.nodes, []
    columns = (column.tolist() for column in (nodes.kind_N, nodes.layer_N, nodes.position_N, nodes.index_N))
    first_logit = graph.slice_of(LOGIT).start
    rows = zip(
        ids, *columns, shortest(nodes.value_N).tolist(), shortest(graph.pruning.influence_N).tolist(), strict=True
    )
    for k, (node_id, kind, layer, position, index, value, share) in enumerate(rows):
        token = int(node_id.split("_")[1])
        text = graph.labels[k - first_logit] if kind == LOGIT else ""
        number, name, label = {
            FEATURE: (cantor_pair(layer, index), f"{layer}_{index}-0", labels.get((layer, index), "")),
            ERROR: (-1, f"{layer}_-1-{position}", ""),
            TOKEN: (position, f"E_{index}-{position}", ""),
            LOGIT: (token, f"L_{token}-{position}", f'Output "{text}" (p={value:.3f})'),
        }[kind]
        node = dict(
            node_id=node_id,
            feature=number,
            layer={TOKEN: "E", LOGIT: str(graph.n_layers + 1)}.get(kind, str(layer)),
            ctx_idx=position,
            feature_type=_TYPES[kind],
            token_prob=value if kind == LOGIT else 0.0,
            is_target_logit=k == first_logit,
            run_idx=0,
            reverse_ctx_idx=0,
            jsNodeId=name,
            clerp=label,
            influence=None if kind == LOGIT else share,
            activation=value if kind == FEATURE else None,
        )
        document_nodes.append(node)
    return document_nodes


def _metadata(graph: Graph, slug: str, scan: str, source_set: str) -> dict[str, Any]:
    pruning = graph.pruning
    assert pruning
    settings = {_SETTINGS.get(name, name): value for name, value in graph.settings.items() if value is not None}
    shares: dict[str, float] = dict(node_threshold=pruning.node_threshold, edge_threshold=pruning.edge_threshold)
    limits = dict(top_edges=pruning.top_edges, min_weight=pruning.min_weight)
    generator = dict(name="saejax", version=package_versions().get("saejax", ""))
    metadata: dict[str, Any] = dict(
        slug=slug,
        scan=scan,
        transcoder_list=[],
        prompt_tokens=list(graph.tokens),
        prompt=graph.prompt,
        node_threshold=pruning.node_threshold,
        schema_version=1,  # says that ``feature`` is a Cantor pair
        info=dict(generator=generator),
        generation_settings=settings
        | dict(model=str(graph.model.get("name", "")), transcoders=graph.transcoders.get("name", "")),
        pruning_settings=shares | {name: value for name, value in limits.items() if value},
        replacement_score=pruning.scores.replacement,
        completeness_score=pruning.scores.completeness,
    )
    return metadata | (dict(feature_details=dict(neuronpedia_source_set=source_set)) if source_set else {})


def _scan(graph: Graph, source_set: str) -> str:
    """Return the name under which viewers look up the features; see ``to_document``."""
    name, commit = str(graph.transcoders.get("name", "")), graph.transcoders.get("revision")
    if commit and not source_set:
        owner, repository, *folder = name.split("/")
        return f"{owner}/{repository}" + (f"//{'/'.join(folder)}" if folder else "") + f"@{commit}"
    return bare_model_name(str(graph.model.get("name", "")))


def check_slug(slug: str) -> None:
    """Raise ``UserError`` for a slug that cannot be the name of a graph's file."""
    if slug == "graph-metadata":
        raise UserError(f"{slug!r} cannot name a graph: it names the list of graphs")
    if wanted := explain_bad_name(slug):
        raise UserError(f"{slug!r:.60} cannot name a graph: {wanted}")


def write_graph(folder: Path, document: GraphDocument) -> None:
    """Write ``folder/<slug>.json``, in place of a graph of this slug, and enter it in ``folder/graph-metadata.json``.

    The entries of other graphs stay.

    Args:
      folder: folder of graphs, created if it does not exist.
      document: a graph from ``to_document``.

    Raises:
      UserError: the slug is no file name, or the list is damaged.
    """
    check_document(document)
    folder, metadata = Path(folder), document["metadata"]
    slug, path = metadata["slug"], folder / f"{metadata['slug']}.json"
    check_slug(slug)
    folder.mkdir(parents=True, exist_ok=True)
    listed = read_list(folder / INDEX)
    slugs = [item.get("slug") if isinstance(item, dict) else None for item in listed["graphs"]]
    place = slugs.index(slug) if slug in slugs else len(slugs)
    listed["graphs"][place : place + 1] = [{name: value for name, value in metadata.items() if name in _LISTED}]
    # Before its entry: a list never names a graph that is not there. Without indents: graphs are large.
    write_text(path, json.dumps(document, allow_nan=False, separators=(",", ":")))
    write_json(folder / INDEX, listed)


def read_list(path: Path) -> dict[str, Any]:
    """Return the list of a folder's graphs, an empty one if there is no file.

    Raises:
      UserError: the file is no such list, or damaged.
    """
    try:
        listed = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"graphs": []}
    except (OSError, ValueError, RecursionError):
        listed = None
    if not isinstance(listed, dict) or not isinstance(listed.get("graphs"), list):
        raise UserError(f"{path} is no list of graphs: move it away, or name another folder")
    return listed
