"""Supernodes of a graph: groups of nodes that do one thing together, named by hand or in a file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from saejax.attribution.graph.data import GraphData
from saejax.errors import UserError
from saejax.settings.attribution import GraphConfig
from saejax.tasks.files import decode, read_bytes

_GROUPS = '{"paris": [["cities", "3_17_4", "5_208_4"]]}, or a state that the page saved'


class Supernode(NamedTuple):
    """A group of nodes, as places in the graph's table, under a name."""

    label: str
    nodes: tuple[int, ...]


def named(graph: GraphData, groups: Sequence[Sequence[str]]) -> list[Supernode]:
    """Return the groups of Neuronpedia's ``qParams.supernodes``, each a label and ids of nodes.

    Raises:
      UserError: the graph has no node of an id, or a node is in two groups.
    """
    place = {node_id: node for node, node_id in enumerate(graph.ids)}
    supernodes = []
    for label, *members in groups:
        unknown = [member for member in members if member not in place]
        if unknown:
            raise UserError(
                f"the supernode {label!r} names {unknown[0]!r}, and no node of the graph has that id: was it made of "
                "another prompt, or is it pruned away?"
            )
        supernodes.append(Supernode(label, tuple(place[member] for member in members)))
    check_apart(graph, supernodes)
    return supernodes


def as_groups(graph: GraphData, supernodes: Sequence[Supernode]) -> list[list[str]]:
    """Return Neuronpedia's ``qParams.supernodes``: of each group the label, then the ids of its nodes."""
    ids = graph.ids
    return [[group.label, *(ids[node] for node in group.nodes)] for group in supernodes]


def check_apart(graph: GraphData, supernodes: Sequence[Supernode]) -> None:
    """Refuse, with a ``UserError``, groups that share a node, or have one twice."""
    owner: dict[int, str] = {}
    for label, nodes in supernodes:
        for node in nodes:
            if node in owner:
                raise UserError(
                    f"the node {graph.ids[node]!r} is in the supernodes {owner[node]!r} and {label!r}: expected "
                    "it in one, once"
                )
            owner[node] = label


def read_groups(config: GraphConfig, slugs: Sequence[str]) -> dict[str, list[list[str]]]:
    """Return the supernodes in the file of ``--graph.supernodes`` by graph: label and ids of nodes of each.

    The file holds supernodes by graph, "*" for all others; or what the page saves, its state or the whole graph.

    Args:
      config: of the stage.
      slugs: the graphs of this run.

    Raises:
      UserError: the file cannot be read, is no such file, or is for none of these graphs.
    """
    if not config.supernodes:
        return {}
    path = Path(config.supernodes)
    text = decode(read_bytes(path, "--graph.supernodes", "name a file of supernodes"), path)
    groups = _by_graph(text)
    if not all(map(_are_groups, groups.values())) or not groups:
        raise UserError(f"{path} holds no supernodes: expected {_GROUPS}")
    if not {"*", *slugs} & set(groups):
        raise UserError(f"{path} has supernodes for {', '.join(groups)}: expected {', '.join(slugs)}, or * for all")
    return {slug: groups.get(slug, groups.get("*", [])) for slug in slugs}


def _by_graph(text: str) -> dict[str, Any]:
    """Return what a file of supernodes holds for each graph, unchecked."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    params, metadata = content.get("qParams"), content.get("metadata")
    if isinstance(params, dict) and isinstance(metadata, dict):  # a whole graph
        return {str(metadata.get("slug", "*")): params.get("supernodes")}
    return {"*": content.get("supernodes")} if "pinnedIds" in content else content


def _are_groups(groups: Any) -> bool:
    """Return whether this is a list of groups, each a label followed by ids."""
    return isinstance(groups, list) and all(
        isinstance(group, list) and len(group) > 1 and all(isinstance(part, str) for part in group) for group in groups
    )
