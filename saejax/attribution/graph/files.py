"""The files of a graph: arrays in safetensors, all else in JSON.

graph.safetensors   the edges, as a bit for each place in the matrix and the weights of those that are there; the other
                    arrays of ``Graph``; and, under names such as "nodes.layer_N", the table of nodes
graph.json          schema version, texts, settings, scores, SHA-256 of the other file. Written last.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import load_file

from saejax.attribution.graph.data import GraphData, GraphScores, Pruning
from saejax.attribution.graph.nodes import DTYPES, FEATURE, KINDS, LOGIT, TOKEN, Nodes
from saejax.dictionaries.formats import tensors
from saejax.errors import UserError
from saejax.files import file_sha256, read_json, write_json

AnyGraph = TypeVar("AnyGraph", bound=GraphData)
DESCRIPTION, ARRAYS = "graph.json", "graph.safetensors"
SCHEMA_VERSION = 2
_TEXTS = ("tokens", "labels", "prompt", "n_layers", "model", "transcoders", "settings")
_ARRAYS = dict(  # of ``GraphData`` -> under which name in the file
    value_R="value_T",
    constant_R="constant_T",
    untraced_R="untraced_T",
    ids_P="ids_P",
    logit_K="logit_K",
)
_COLUMNS = tuple(field.name for field in dataclasses.fields(Nodes))
_DTYPES = dict(zip(_COLUMNS, DTYPES, strict=True)) | {"ids_P": np.int32, "node_N": np.int32}  # others: float32


def save(folder: Path, graph: GraphData) -> None:
    """Write a graph atomically.

    Raises:
      UserError: the folder holds a graph already.
    """
    is_edge_RxS = graph.adjacency_RxS != 0
    arrays = {stored: getattr(graph, name) for name, stored in _ARRAYS.items()}
    arrays |= dict(edge_bits=np.packbits(is_edge_RxS.reshape(-1)), edge_weights=graph.adjacency_RxS[is_edge_RxS])
    arrays |= {f"nodes.{name}": getattr(graph.nodes, name) for name in _COLUMNS}
    description = dict(schema_version=SCHEMA_VERSION, **{name: getattr(graph, name) for name in _TEXTS})
    if pruning := graph.pruning:
        arrays |= dict(node_N=pruning.node_N, influence_N=pruning.influence_N)
        how = {name: getattr(pruning, name) for name in ("node_threshold", "edge_threshold", "top_edges")}
        description["pruning"] = how | dataclasses.asdict(pruning.scores)
    with tensors.whole_folder(folder, DESCRIPTION, ARRAYS) as temporary:
        tensors.write(temporary / ARRAYS, arrays)
        write_json(temporary / DESCRIPTION, description | dict(sha256=file_sha256(temporary / ARRAYS)))


def load(folder: Path, kind: type[AnyGraph]) -> AnyGraph:
    """Read what ``save`` wrote, as a graph of the class ``kind``.

    Raises:
      UserError: a file is missing or damaged, or was written by a later version.
    """
    description, file = read_json(folder / DESCRIPTION), folder / ARRAYS
    version = description.get("schema_version") if isinstance(description, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"{folder / DESCRIPTION} has the schema version {version}: expected {SCHEMA_VERSION}")
    if not file.is_file() or file_sha256(file) != description.get("sha256"):
        raise UserError(f"{file} is missing or damaged: it is not what {DESCRIPTION} describes; trace the prompt again")
    try:
        graph = _build_graph(kind, description, load_file(file))
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / DESCRIPTION} is damaged ({error} is missing): trace the prompt again") from None
    if problem := _problem(graph):
        raise UserError(f"{folder} holds no graph that fits together: {problem}; trace the prompt again")
    return graph


def _build_graph(kind: type[AnyGraph], description: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> AnyGraph:
    texts: dict[str, Any] = {name: description[name] for name in _TEXTS}
    texts |= {name: tuple(texts[name]) for name in ("tokens", "labels")}
    pruning = None
    if stored_pruning := description.get("pruning"):
        scores = GraphScores(stored_pruning["replacement"], stored_pruning["completeness"])
        kept = arrays["node_N"], arrays["influence_N"]
        top_edges = stored_pruning.get("top_edges", 0)
        pruning = Pruning(stored_pruning["node_threshold"], stored_pruning["edge_threshold"], *kept, scores, top_edges)
    nodes = Nodes(*(arrays[f"nodes.{name}"] for name in _COLUMNS))
    logits = int((nodes.kind_N == LOGIT).sum())
    shape = int((nodes.kind_N == FEATURE).sum()) + logits, len(nodes) - logits
    # Bits are filled up to whole bytes.
    is_edge = np.unpackbits(arrays["edge_bits"])[: shape[0] * shape[1]].astype(bool)
    if is_edge.size != shape[0] * shape[1] or is_edge.sum() != len(arrays["edge_weights"]):
        raise KeyError("edge_weights")
    adjacency_RxS = np.zeros(shape, np.float32)
    adjacency_RxS.reshape(-1)[is_edge] = arrays["edge_weights"]
    stored = {name: arrays[stored] for name, stored in _ARRAYS.items()}
    return kind(adjacency_RxS=adjacency_RxS, nodes=nodes, pruning=pruning, **texts | stored)


def _problem(graph: GraphData) -> str:
    """Return the first thing that does not fit in a graph that was read; "" if all does."""
    nodes, logits = graph.nodes, graph.count(LOGIT)
    count, positions = len(nodes), len(graph.ids_P)
    targets = graph.count(FEATURE) + logits
    shapes = {
        **{name: (getattr(nodes, name), (count,)) for name in _COLUMNS},
        "adjacency_RxS": (graph.adjacency_RxS, (targets, count - logits)),
        **{name: (getattr(graph, name), (targets,)) for name in ("value_R", "constant_R", "untraced_R")},
        "ids_P": (graph.ids_P, (positions,)),
        "logit_K": (graph.logit_K, (logits,)),
    }
    if graph.pruning:
        shapes |= {name: (getattr(graph.pruning, name), (count,)) for name in ("node_N", "influence_N")}
    for name, (array, shape) in shapes.items():
        dtype = np.dtype(_DTYPES.get(name, np.float32))
        if array.shape != shape or array.dtype != dtype:
            return f"{name} has the shape {array.shape} in {array.dtype}, expected {shape} in {dtype}"
        if not np.isfinite(array).all():
            return f"{name} is not finite"
    # Slices of kinds are found by bisection, which needs this order.
    if (np.diff(nodes.kind_N) < 0).any() or (count and not 0 <= nodes.kind_N[0] <= nodes.kind_N[-1] < len(KINDS)):
        return "the nodes are not in the order of their kinds"
    if count and not 0 <= nodes.position_N.min() <= nodes.position_N.max() < positions:
        return "a node stands outside the prompt"
    if (len(graph.tokens), len(graph.labels), graph.count(TOKEN)) != (positions, logits, positions):
        return "tokens or labels are missing"
    return ""
