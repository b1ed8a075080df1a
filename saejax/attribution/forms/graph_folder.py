"""A folder of graphs as circuit-tracer's local server shows them: a file for each, and a list of them."""

import json
from pathlib import Path
from typing import Any

from saejax.attribution.forms.document import GraphDocument, check_document
from saejax.attribution.forms.neuronpedia import check_slug
from saejax.errors import UserError
from saejax.files import locked, write_json, write_text

INDEX = "graph-metadata.json"  # the list
_LISTED = ("slug", "scan", "transcoder_list", "prompt_tokens", "prompt", "node_threshold", "schema_version")


def write_graph(folder: Path, document: GraphDocument, *, replace: bool = False) -> Path:
    """Write ``folder/<slug>.json`` and enter the graph in ``folder/graph-metadata.json``.

    The entries of other graphs stay, also when several processes write at once.

    Args:
      folder: folder of graphs, created if it does not exist.
      document: a graph from ``to_document``.
      replace: whether a graph of the same slug may be replaced.

    Returns:
      The path of the graph.

    Raises:
      UserError: there is a graph of that slug and ``replace`` is False, or the list is damaged.
    """
    check_document(document)
    folder, metadata = Path(folder), document["metadata"]
    slug, path = metadata["slug"], folder / f"{metadata['slug']}.json"
    check_slug(slug)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f".{INDEX}.lock"):
        listed = _listed(folder / INDEX)
        slugs = [item.get("slug") if isinstance(item, dict) else None for item in listed["graphs"]]
        if not replace and (slug in slugs or path.exists()):
            raise UserError(f"{folder} has a graph {slug!r} already: name another slug, or ask for it to be replaced")
        entry = {name: value for name, value in metadata.items() if name in _LISTED}
        place = slugs.index(slug) if slug in slugs else len(slugs)
        others = [item for item, name in zip(listed["graphs"], slugs) if name != slug]
        # Before its entry: a list never names a graph that is not there. Without indents: graphs are large.
        write_text(path, json.dumps(document, allow_nan=False, separators=(",", ":")))
        write_json(folder / INDEX, {**listed, "graphs": [*others[:place], entry, *others[place:]]})
    return path


def _listed(path: Path) -> dict[str, Any]:
    """Return the list of a folder's graphs; what is no such list is left alone."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"graphs": []}
    except ValueError:
        listed = None
    if not isinstance(listed, dict) or not isinstance(listed.get("graphs"), list):
        raise UserError(f"{path} is no list of graphs: move it away, or name another folder")
    return listed
