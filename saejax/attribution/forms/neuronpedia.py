"""Graphs as Neuronpedia and circuit-tracer's viewer read them.

``to_document`` gives the JSON, node by node and key by key as circuit-tracer writes it, but for the ids of errors
(``Nodes.ids`` says why).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from saejax.attribution.forms.document import (
    DocumentLink,
    DocumentMetadata,
    DocumentNode,
    GraphDocument,
    check_document,
)
from saejax.attribution.forms.packed import shortest
from saejax.attribution.graph import Graph
from saejax.attribution.graph.data import Pruning
from saejax.attribution.graph.nodes import ERROR, FEATURE, LOGIT, TOKEN
from saejax.errors import UserError
from saejax.runner.workspace import package_versions

_TYPES = {
    FEATURE: "cross layer transcoder",  # of per-layer transcoders, too: the viewers know no other
    ERROR: "mlp reconstruction error",
    TOKEN: "embedding",
    LOGIT: "logit",
}
# How Neuronpedia calls settings of ours; others keep their names.
_SETTINGS = {"max_logits": "max_n_logits", "logit_mass": "desired_logit_prob", "max_features": "max_feature_nodes"}


def to_document(
    graph: Graph,
    slug: str,
    *,
    scan: str = "",
    source_set: str = "",
    labels: Mapping[tuple[int, int], str] | None = None,
    supernodes: Sequence[Sequence[str]] = (),
    pinned: Sequence[str] = (),
    info: Mapping[str, Any] | None = None,
) -> GraphDocument:
    """Return a pruned graph as Neuronpedia's JSON: ``metadata``, ``qParams``, ``nodes``, ``links``.

    Args:
      graph: a pruned graph, since the format holds cumulative influences and has no bias nodes.
      slug: the graph's name in addresses and file names.
      scan: where viewers look for the features: Neuronpedia by its id of the model, circuit-tracer's by the address of
        the set. By default that id, which is the last part of the model's name in small letters; without
        ``source_set`` the address, if the set is on the hub.
      source_set: the set's name at Neuronpedia, such as "gemmascope-transcoder-16k".
      labels: (layer, feature) -> what the feature is called.
      supernodes: of each its label and the ids of the nodes in it, which are pinned; see ``supernodes.as_groups``.
      pinned: ids of more nodes to pin.
      info: more for ``metadata.info``, such as ``description``, ``creator_name`` and ``create_time_ms``.

    Raises:
      UserError: the graph is not pruned, the slug is no file name, a supernode names a node that is not there, or two
        logits have the same token.
    """
    if graph.pruning is None:
        raise UserError("the graph is not pruned: prune it first (nodes=1, edges=1 keeps all that has influence)")
    check_slug(slug)
    ids = graph.ids
    source_E, target_E, weight_E = graph.edges()
    links = [
        DocumentLink(source=ids[source], target=ids[target], weight=weight)
        for source, target, weight in zip(source_E.tolist(), target_E.tolist(), shortest(weight_E).tolist())
    ]
    groups = [list(group) for group in supernodes]
    pins = list(dict.fromkeys([*(member for group in groups for member in group[1:]), *pinned]))
    unknown = set(pins) - set(ids)
    if unknown:
        raise UserError(f"supernodes name {min(unknown)!r}, and no node of the graph has that id")
    document = GraphDocument(
        metadata=_metadata(graph, slug, scan or _scan(graph, source_set), source_set, info or {}),
        qParams=dict(pinnedIds=pins, supernodes=groups, linkType="both", clickedId="", sg_pos=""),
        nodes=_nodes(graph, ids, labels or {}),
        links=links,
    )
    return check_document(document)


def cantor_pair(layer: int, feature: int) -> int:
    """One number for a layer and a feature, as the viewers look features up: (l + f)(l + f + 1) / 2 + f."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def _nodes(graph: Graph, ids: list[str], labels: Mapping[tuple[int, int], str]) -> list[DocumentNode]:
    assert graph.pruning
    nodes, document_nodes = graph.nodes, list[DocumentNode]()
    columns = (column.tolist() for column in (nodes.kind_N, nodes.layer_N, nodes.position_N, nodes.index_N))
    first_logit = graph.slice_of(LOGIT).start
    rows = zip(
        ids, *columns, shortest(nodes.value_N).tolist(), shortest(graph.pruning.influence_N).tolist(), strict=True
    )
    for k, (node_id, kind, layer, position, index, value, share) in enumerate(rows):
        token = int(node_id.split("_")[1])
        number, name, label = {
            FEATURE: (cantor_pair(layer, index), f"{layer}_{index}-0", labels.get((layer, index), "")),
            ERROR: (-1, f"{layer}_{position}-0", ""),
            TOKEN: (position, f"E_{index}-{position}", ""),
            LOGIT: (token, f"L_{token}-{position}", f'Output "{_logit_label(graph, k)}" (p={value:.3f})'),
        }[kind]
        document_nodes.append(
            DocumentNode(
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
        )
    return document_nodes


def _logit_label(graph: Graph, k: int) -> str:
    return graph.labels[k - graph.slice_of(LOGIT).start] if k >= graph.slice_of(LOGIT).start else ""


def _metadata(graph: Graph, slug: str, scan: str, source_set: str, info: Mapping[str, Any]) -> DocumentMetadata:
    assert graph.pruning
    settings = {_SETTINGS.get(name, name): value for name, value in graph.settings.items() if value is not None}
    generator = dict(name="saejax", version=package_versions().get("saejax", ""))
    metadata = DocumentMetadata(
        slug=slug,
        scan=scan,
        transcoder_list=[],
        prompt_tokens=list(graph.tokens),
        prompt=graph.prompt,
        node_threshold=graph.pruning.node_threshold,
        schema_version=1,  # says that ``feature`` is a Cantor pair
        info=dict(generator=generator) | dict(info),
        generation_settings=settings | dict(transcoders=graph.transcoders.get("name", "")),
        pruning_settings=_pruning_settings(graph.pruning),
        replacement_score=graph.pruning.scores.replacement,
        completeness_score=graph.pruning.scores.completeness,
    )
    if source_set:
        metadata["feature_details"] = dict(neuronpedia_source_set=source_set)
    return metadata


def _scan(graph: Graph, source_set: str) -> str:
    """Return the name under which viewers look up the features; see ``to_document``."""
    name, commit = str(graph.transcoders.get("name", "")), graph.transcoders.get("revision")
    if commit and not source_set:
        owner, repository, *folder = name.split("/")
        return f"{owner}/{repository}" + (f"//{'/'.join(folder)}" if folder else "") + f"@{commit}"
    return str(graph.model.get("name", "")).rstrip("/").split("/")[-1].lower()


def _pruning_settings(pruning: Pruning) -> dict[str, float]:
    settings: dict[str, float] = dict(node_threshold=pruning.node_threshold, edge_threshold=pruning.edge_threshold)
    return settings | (dict(top_edges=pruning.top_edges) if pruning.top_edges else {})


def check_slug(slug: str) -> None:
    """Raise ``UserError`` for a slug that cannot be the name of a graph's file."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", slug) or slug == "graph-metadata":
        raise UserError(f"{slug!r} cannot name a graph: use letters, digits, '.', '_' and '-', as in a file's name")
