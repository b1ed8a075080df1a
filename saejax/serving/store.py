"""The graphs of a folder, and what readers say of them: labels of features; pins, groups of nodes and their places.

A graph is a file in Neuronpedia's format, or a .pt file of circuit-tracer's, in the folder itself or beside a list
``graph-metadata.json``, as every ``attribute`` unit and circuit-tracer write one. Units are only read: what readers
save is kept in ``DIR/serve/``, in files that the stages take.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saejax.attribution.forms.document import (
    GraphDocument,
    check_document,
    check_groups,
    check_metadata,
    check_pins,
    read_state,
)
from saejax.attribution.forms.features import Feature, FeatureDetails
from saejax.attribution.forms.neuronpedia import INDEX, read_list, to_document
from saejax.attribution.graph import Graph, circuit_tracer
from saejax.attribution.settings import GraphConfig
from saejax.dictionaries.labels import labels_of_sheets
from saejax.dictionaries.names import folder_name, unique_folder_name
from saejax.errors import UserError
from saejax.files import file_sha256, locked, read_json, write_json
from saejax.interpret.labels import write_label
from saejax.page.graph.page import PageTable
from saejax.runner.labels import names_and_sites, names_of_layers
from saejax.runner.results import load_summary
from saejax.runner.workspace import STARTED, SUMMARY, current_units
from saejax.stages.attribute.outputs import details_of_features, read_tables
from saejax.unicode import has_surrogates

_SAVED = "serve"  # the folder for what readers save


@dataclasses.dataclass(frozen=True)
class StoredGraph:
    """A graph of the folder."""

    id: str  #: its path in the folder, ".json" left out; what pages call it
    path: Path  #: its file
    metadata: Mapping[str, Any]  #: of its document, such as ``slug`` and ``prompt``

    @property
    def unit(self) -> Path | None:
        """The folder of the unit that made it; None: another program did."""
        folder = self.path.parent.parent
        return folder if self.path.parent.name == "graphs" and (folder / SUMMARY).exists() else None

    @property
    def whole(self) -> Path | None:
        """The place of the graph before pruning, in its unit or in circuit-tracer's file; None: there is none."""
        if self.path.suffix == ".pt":
            return self.path
        folder = self.unit / f"{self.path.stem}-graph" if self.unit else None
        return folder if folder and (folder / "graph.json").exists() else None

    def load_whole(self) -> Graph:
        """Return the graph before pruning.

        Raises:
          UserError: it is not saved, or damaged.
        """
        if self.whole is None:
            raise UserError(f"the whole graph of {self.id} is not saved: trace its prompt here, then prune that")
        file = self.whole / "graph.json" if self.whole.is_dir() else self.whole
        return _load_whole(self.whole, file.stat().st_mtime_ns)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of its file."""
        return _sha256(self.path, self.path.stat().st_mtime_ns)


@functools.lru_cache(64)
def _sha256(path: Path, changed: int) -> str:
    return file_sha256(path)


@functools.lru_cache(1)  # they are large
def _load_whole(place: Path, changed: int) -> Graph:
    return Graph.load(place)


@functools.lru_cache(1)
def _read_graph(path: Path, changed: int) -> GraphDocument:
    if path.suffix == ".pt":
        slug = re.sub("[^A-Za-z0-9]+", "-", path.stem).strip("-") or "graph"
        return to_document(_load_whole(path, changed).prune(), slug)
    return check_document(read_json(path))


@functools.lru_cache(1024)
def _read_metadata(path: Path, changed: int) -> Mapping[str, Any] | str | None:
    """Return a graph's metadata; what is wrong with it; None: it is something else.

    Nodes and links are checked when the graph is opened: of many graphs that would take a minute.
    """
    try:
        if path.suffix == ".pt":
            return circuit_tracer.read_metadata(path)
        content = json.loads(path.read_text(encoding="utf-8"))
        return check_metadata(content) if isinstance(content, dict) and "nodes" in content else None
    except UserError as error:
        return " ".join(str(error).split())
    except (OSError, ValueError, RecursionError):
        return "is not JSON, or is cut off"


class GraphStore:
    """The graphs of a folder.

    Args:
      root: a workdir, or any folder with graphs.

    Attributes:
      problems: what is wrong with files and units that are not listed, a line each, by path; as of the last ``graphs``.
    """

    def __init__(self, root: Path):
        self.root, self.problems = root, dict[str, str]()

    def graphs(self) -> dict[str, StoredGraph]:
        """Return all graphs by id, the most recently changed first; damaged files and units are noted as problems."""
        problems, graphs = dict[str, str](), list[tuple[int, StoredGraph]]()
        for folder in self._folders(problems):
            listed = self._listed(folder, problems)
            for path in sorted({*folder.glob("*.json"), *folder.glob("*.pt"), *listed}):
                name, problem = path.relative_to(self.root), ""
                if path.name == INDEX or path.is_dir():
                    continue
                if has_surrogates(str(name)):  # bytes that are no UTF-8, of which no address can be made
                    problem = "has a name that is no text: rename it"
                elif not path.is_file():
                    problem = "is a link to nothing" if path.is_symlink() else "is in the list of graphs, and is gone"
                elif not path.resolve().is_relative_to(self.root.resolve()):
                    problem = "is a link out of the folder"
                else:
                    try:
                        changed = path.stat().st_mtime_ns
                    except OSError:  # it was removed just now
                        continue
                    metadata = _read_metadata(path, changed)
                    if isinstance(metadata, Mapping):
                        graphs.append((-changed, StoredGraph(name.as_posix().removesuffix(".json"), path, metadata)))
                        continue
                    # Beside graphs there may be other files, which nobody listed.
                    problem = metadata or ("is in the list of graphs, and is none" if path in listed else "")
                if problem:
                    problems[name.as_posix()] = problem
        self.problems = problems  # in one step, as requests come from several threads
        return {graph.id: graph for _, graph in sorted(graphs, key=lambda entry: (entry[0], entry[1].id))}

    def _listed(self, folder: Path, problems: dict[str, str]) -> set[Path]:
        """Return the files that the list of a folder names there; a damaged list is noted."""
        try:
            entries = read_list(folder / INDEX)["graphs"]
        except UserError:
            problems[(folder / INDEX).relative_to(self.root).as_posix()] = "is no list of graphs, or is cut off"
            return set()
        slugs = (str(entry.get("slug", "")) for entry in entries if isinstance(entry, Mapping))
        # Not of names that lead elsewhere, or that no file can have.
        return {folder / f"{slug}.json" for slug in slugs if re.fullmatch(r"[\w.-]{1,200}", slug, re.ASCII)}

    def _folders(self, problems: dict[str, str]) -> list[Path]:
        """Return the folders of graphs: of current units, by paths that stay when settings change, and others."""
        units: Mapping[str, Path] = {}
        try:
            units = current_units(self.root)
        except (UserError, OSError, ValueError, KeyError, TypeError) as error:
            problems["."] = " ".join(str(error).split())
        places = [self.root / name if (self.root / name).exists() else folder for name, folder in units.items()]
        folders = [self.root, *(path.parent for place in places for path in sorted(place.rglob(INDEX)))]
        for path in sorted(self.root.rglob(INDEX)):
            within = path.relative_to(self.root).parents
            if not any((self.root / folder / STARTED).exists() for folder in within):
                folders.append(path.parent)
        return list(dict.fromkeys(folders))

    def find(self, graph: str) -> StoredGraph:
        """Return the graph with an id.

        Raises:
          UserError: no graph has it.
        """
        if not (stored := self.graphs().get(graph)):
            raise UserError(f"there is no graph {graph!r} in {self.root}")
        return stored

    def document(self, graph: StoredGraph) -> GraphDocument:
        """Return the graph, with the groups, pins and places that were saved in place of its own.

        Raises:
          UserError: the file is no graph, or gone.
        """
        try:
            document = _read_graph(graph.path, graph.path.stat().st_mtime_ns)
        except OSError:
            raise UserError(f"{graph.path} is gone, or cannot be read") from None
        saved = self._saved_states(graph).get(document["metadata"]["slug"], {})
        return {**document, "qParams": {**document["qParams"], **saved}} if saved else document

    def tables(self, graph: StoredGraph) -> list[PageTable]:
        """Return the tables that the graph's own page shows below it."""
        return read_tables(graph.unit / "tables" / f"{graph.path.stem}.json") if graph.unit else []

    def lens(self, graph: StoredGraph) -> str:
        """Return the Jacobian lens that read the tokens of a graph's features, as its unit names it; "": none did."""
        return str(load_summary(graph.unit).config.get("graph", {}).get("lens", "")) if graph.unit else ""

    def details(
        self, graph: StoredGraph, features: Sequence[Feature], config: GraphConfig, fetched: int = 0
    ) -> dict[Feature, FeatureDetails]:
        """Return the details of features of a graph, also from its unit and from ``features/`` in the folder.

        Only the first ``fetched`` features' are fetched from the hub; the others are known if they were.
        """
        return details_of_features(config, features, [place for place in (graph.unit, self.root) if place], fetched)

    def save_state(self, graph: StoredGraph, saved: Any) -> Path:
        """Save groups, pins and the places of their boxes for ``--graph.supernodes``, and return the file.

        Args:
          graph: the graph.
          saved: a state of the page, or groups alone, each a label and ids of nodes.

        Raises:
          UserError: it is neither, or a group or pin names a node that is not in the graph, or groups repeat a node.
        """
        document, state = self.document(graph), read_state(saved)
        if state is None:
            raise UserError("these are no groups: expected of each a label and nodes of the saved graph")
        groups, pins = state["supernodes"], state.get("pinnedIds", [])
        ids, members = {node["node_id"] for node in document["nodes"]}, {name for group in groups for name in group[1:]}
        if graph.whole and not members | set(pins) <= ids:  # pruned away, they are on the page with other thresholds
            ids |= set(graph.load_whole().ids)
        check_groups(ids, groups)
        check_pins(ids, pins)
        path = self._groups_file(graph)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{path.name}.lock")):
            write_json(path, self._saved_states(graph) | {document["metadata"]["slug"]: state})
        return path

    def labels(self, folders: Sequence[str]) -> dict[tuple[int, int], str]:
        """Return the labels that readers gave features, by layer and index.

        Args:
          folders: the folder of the set, or the SAEs' folders.

        Raises:
          UserError: the file of labels is damaged.
        """
        path = self._labels_file(folders)
        return labels_of_sheets(path, "--atlas.labels", names_and_sites(folders)) if path.exists() else {}

    def save_label(self, folders: Sequence[str], layer: int, feature: int, label: str) -> Path:
        """Save a label, for ``--atlas.labels``; return the file. See ``labels``."""
        path = self._labels_file(folders)
        write_label(path, names_of_layers(folders, {layer})[layer], feature, label, "by hand", "--atlas.labels")
        return path

    def _labels_file(self, folders: Sequence[str]) -> Path:
        return self.root / _SAVED / unique_folder_name(*map(os.path.normpath, folders)) / "labels.csv"

    def _groups_file(self, graph: StoredGraph) -> Path:
        unit = graph.id.rpartition("/graphs/")[0] if graph.unit else ""
        name = folder_name(unit)
        if name != unit.replace("/", "-"):  # the name of another unit may read the same
            name = unique_folder_name(unit)
        # Files of other programs may share a slug: each has a folder of its own.
        return self.root / _SAVED / (name if unit else graph.id) / "groups.json"

    def _saved_states(self, graph: StoredGraph) -> dict[str, dict[str, Any]]:
        """Return what was saved, by the graph's name; earlier versions saved groups alone."""
        path = self._groups_file(graph)
        saved = read_json(path) if path.exists() else {}
        read = {slug: read_state(state) for slug, state in saved.items()} if isinstance(saved, dict) else {"": None}
        states = {slug: state for slug, state in read.items() if state is not None}
        if len(states) < len(read):
            raise UserError(f"{path} is no file of groups: mend or remove it")
        return states
