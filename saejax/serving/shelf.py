"""The graphs of a folder, and what readers say of them: labels of features and groups of nodes.

A graph is a file that a list ``graph-metadata.json`` names, as every ``attribute`` unit and circuit-tracer write one; a
folder without such lists may hold graphs in Neuronpedia's format themselves. Units are only read: what readers save is
kept in ``DIR/serve/``, in files that the stages take.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saejax.attribution.forms.document import DocumentMetadata, GraphDocument, check_document
from saejax.attribution.forms.graph_folder import INDEX
from saejax.attribution.forms.page import read_shown
from saejax.dictionaries.labels import trained_of_folders
from saejax.errors import UserError
from saejax.files import locked, read_json, write_json
from saejax.interpret.labels import read_labels, write_label
from saejax.runner.stage import folder_name
from saejax.runner.workspace import STARTED, SUMMARY, current_units

_SAVED = "serve"  # the folder for what readers save
_ANY = 1 << 40  # features that a dictionary may have; which there are is not known here


@dataclasses.dataclass(frozen=True)
class ShelvedGraph:
    """A graph of the folder.

    Attributes:
      id: its path in the folder, without ".json"; what pages call it.
      path: its file.
      entry: what a list says of it, such as ``slug`` and ``prompt``.
    """

    id: str
    path: Path
    entry: Mapping[str, Any]

    @property
    def unit(self) -> Path | None:
        """The folder of the unit that made it; None: another program did."""
        folder = self.path.parent.parent
        return folder if self.path.parent.name == "graphs" and (folder / SUMMARY).exists() else None


class Shelf:
    """The graphs of a folder.

    Args:
      root: a workdir, or any folder with graphs.
      labels: a file of labels to read and write; None: one for each set of dictionaries, in ``serve/``.
    """

    def __init__(self, root: Path, labels: Path | None = None):
        self.root, self._labels = root, labels
        self._read: dict[str, tuple[float, GraphDocument]] = {}
        self._looked: dict[tuple[Path, float], DocumentMetadata | None] = {}  # metadata of files without a list

    def graphs(self) -> dict[str, ShelvedGraph]:
        """All graphs by id, those changed last first."""
        found = [graph for path in self._lists() for graph in self._of_list(path)] or self._loose()
        found.sort(key=lambda graph: (-graph.path.stat().st_mtime, graph.id))
        return {graph.id: graph for graph in found}

    def _lists(self) -> list[Path]:
        """Return the lists of graphs: those of current units, by paths that stay when settings change, and others."""
        units = current_units(self.root)
        places = [self.root / name if (self.root / name).exists() else folder for name, folder in units.items()]
        lists = [path for place in places for path in sorted(place.rglob(INDEX))]
        for path in sorted(self.root.rglob(INDEX)):
            within = path.relative_to(self.root).parents
            if not any((self.root / folder / STARTED).exists() for folder in within):
                lists.append(path)
        return lists

    def find(self, graph: str) -> ShelvedGraph:
        """The graph of an id.

        Raises:
          UserError: there is none.
        """
        if not (found := self.graphs().get(graph)):
            raise UserError(f"there is no graph {graph!r} in {self.root}")
        return found

    def document(self, graph: ShelvedGraph) -> GraphDocument:
        """The graph, with the groups that were saved in place of its own.

        Raises:
          UserError: the file is no graph.
        """
        changed = graph.path.stat().st_mtime
        if self._read.get(graph.id, (0.0,))[0] != changed:
            document = check_document(read_json(graph.path))
            self._read = {graph.id: (changed, document)}  # of one: they are large
        document = self._read[graph.id][1]
        saved = self._saved_groups(graph).get(document["metadata"]["slug"])
        if saved is None:
            return document
        return {**document, "qParams": {**document["qParams"], "supernodes": saved}}

    def shown(self, graph: ShelvedGraph) -> dict[str, Any]:
        """What the graph's own page shows beside it: heads and tables."""
        return read_shown(graph.unit / f"{graph.path.stem}.html") if graph.unit else {}

    def save_groups(self, graph: ShelvedGraph, groups: Sequence[Sequence[str]]) -> Path:
        """Keeps groups, of each its label and the ids of its nodes, for ``--graph.supernodes``; returns the file.

        Raises:
          UserError: these are no groups of nodes of the graph.
        """
        document = self.document(graph)
        ids = {node["node_id"] for node in document["nodes"]}
        members = [member for group in groups for member in group[1:]]
        if not all(len(group) > 1 for group in groups) or len(set(members)) < len(members) or set(members) - ids:
            raise UserError("these are no groups: expected of each a label and nodes of the saved graph, each once")
        path = self._groups_file(graph)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{path.name}.lock")):
            write_json(path, self._saved_groups(graph) | {document["metadata"]["slug"]: [list(one) for one in groups]})
        return path

    def labels(self, graph: ShelvedGraph, folders: Sequence[str]) -> dict[tuple[int, int], str]:
        """What readers call features, by layer and number.

        Args:
          folders: the set's, or those of SAEs.

        Raises:
          UserError: the file of labels is damaged.
        """
        path, document = self._labels_file(folders), self.document(graph)
        if not path.exists():
            return {}
        layers = {int(node["layer"]) for node in document["nodes"] if node["layer"] != "E"}
        names = self._names(folders, layers)
        read = {layer: read_labels(path, name, _ANY, several=False, flag="--labels") for layer, name in names.items()}
        return {(layer, feature): one.label for layer, labels in read.items() for feature, one in labels.items()}

    def save_label(self, folders: Sequence[str], layer: int, feature: int, label: str) -> Path:
        """Keeps a label, for ``--atlas.labels``; returns the file. See ``labels``."""
        path = self._labels_file(folders)
        write_label(path, self._names(folders, {layer})[layer], feature, label, "by hand", "--labels")
        return path

    def _labels_file(self, folders: Sequence[str]) -> Path:
        return self._labels or self.root / _SAVED / folder_name("-".join(folders)) / "labels.csv"

    def _names(self, folders: Sequence[str], layers: set[int]) -> dict[int, str]:
        """The names of the dictionaries of some layers: those of the atlas, or "layer 3" of sets of other origin."""
        trained = trained_of_folders(folders)
        return {layer: trained[layer][1] if layer in trained else f"layer {layer}" for layer in layers}

    def _groups_file(self, graph: ShelvedGraph) -> Path:
        return self.root / _SAVED / folder_name(graph.id.rpartition("/graphs/")[0] or "graphs") / "groups.json"

    def _saved_groups(self, graph: ShelvedGraph) -> dict[str, Any]:
        path = self._groups_file(graph)
        return read_json(path) if path.exists() else {}

    def _of_list(self, path: Path) -> list[ShelvedGraph]:
        """The graphs of a list that are there; entries that lead elsewhere are left out."""
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))["graphs"]
            slugs = [(entry, entry["slug"]) for entry in entries]
        except (ValueError, KeyError, TypeError):
            return []
        return [graph for entry, slug in slugs if (graph := self._at(path.parent / f"{slug}.json", entry))]

    def _loose(self) -> list[ShelvedGraph]:
        """Graphs that stand in the folder without a list."""
        found = []
        for path in sorted(self.root.glob("*.json")):
            key = path, path.stat().st_mtime
            if key not in self._looked:
                try:
                    self._looked[key] = check_document(json.loads(path.read_text(encoding="utf-8")))["metadata"]
                except (ValueError, UserError):
                    self._looked[key] = None
            entry = self._looked[key]
            if entry is not None and (graph := self._at(path, entry)):
                found.append(graph)
        return found

    def _at(self, path: Path, entry: Mapping[str, Any]) -> ShelvedGraph | None:
        inside = path.is_file() and path.resolve().is_relative_to(self.root.resolve()) and isinstance(entry, Mapping)
        return ShelvedGraph(path.relative_to(self.root).with_suffix("").as_posix(), path, entry) if inside else None
