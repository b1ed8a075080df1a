"""Supernodes of a graph: groups of nodes that do one thing together, named by hand or in a file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saejax.attribution.graph.data import GraphData
from saejax.errors import UserError
from saejax.settings.attribution import GraphConfig
from saejax.tasks.files import decode, read_bytes

_GROUPS = '{"paris": [["cities", "3_17_4", "5_208_4"]]}, or a state that the page saved'


def check_groups(graph: GraphData, groups: Sequence[Sequence[str]]) -> None:
    """Check groups as in Neuronpedia's ``qParams.supernodes``, each a label and ids of nodes.

    Raises:
      UserError: the graph has no node of an id, or a node is in two groups, or in one twice.
    """
    ids, label_of = set(graph.ids), dict[str, str]()
    for label, *members in groups:
        for member in members:
            if member not in ids:
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
