"""Supernodes that a user names in a file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saejax.errors import UserError
from saejax.settings import GraphConfig
from saejax.tasks.files import decode, read_bytes

CLUSTER = "cluster"  # instead of a file of supernodes
_GROUPS = '{"paris": [["cities", "3_17_4", "5_208_4"]]}, or a state that the page saved'


def read_groups(config: GraphConfig, slugs: Sequence[str]) -> dict[str, list[list[str]]]:
    """The supernodes of a file that ``--graph.supernodes`` names, by graph: of each its label and the ids of its nodes.

    The file holds supernodes by graph, "*" for all others; or what the page saves, its state or the whole graph.

    Args:
      slugs: the graphs of this run.

    Raises:
      UserError: the file cannot be read, is no such file, or is for none of these graphs.
    """
    if config.supernodes in ("", CLUSTER):
        return {}
    path = Path(config.supernodes)
    text = decode(read_bytes(path, "--graph.supernodes", f"name a file of supernodes, or {CLUSTER!r}"), path)
    found = _by_graph(text)
    if not all(map(_are_groups, found.values())) or not found:
        raise UserError(f"{path} holds no supernodes: expected {_GROUPS}")
    if not {"*", *slugs} & set(found):
        raise UserError(f"{path} has supernodes for {', '.join(found)}: expected {', '.join(slugs)}, or * for all")
    return {slug: found.get(slug, found.get("*", [])) for slug in slugs}


def _by_graph(text: str) -> dict[str, Any]:
    """What stands for each graph in a file of supernodes, whatever it is."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    params, metadata = found.get("qParams"), found.get("metadata")
    if isinstance(params, dict) and isinstance(metadata, dict):  # a whole graph
        return {str(metadata.get("slug", "*")): params.get("supernodes")}
    return {"*": found.get("supernodes")} if "pinnedIds" in found else found


def _are_groups(groups: Any) -> bool:
    """Whether this is a list of labels with ids behind them."""
    return isinstance(groups, list) and all(
        isinstance(group, list) and len(group) > 1 and all(isinstance(part, str) for part in group) for group in groups
    )
