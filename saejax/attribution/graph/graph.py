"""An attribution graph: which features, errors and tokens of a prompt made which features and logits, and how much.

A folder holds it in two files, arrays in safetensors, all else in JSON:

graph.safetensors   the edges, as a bit for each place in the matrix and the weights of edges that are there; the other
                    arrays of ``Graph``; and, under names such as "nodes.layer_N", the table of nodes
graph.json          schema version, texts, settings, scores, SHA-256 of the other file. Written last.
"""

import dataclasses
import html
import os
import sys
import tempfile
import webbrowser
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from safetensors.numpy import load_file

from saejax.arguments import suggests_names
from saejax.attribution.graph import circuit_tracer
from saejax.attribution.graph.data import (
    DTYPES,
    FEATURE,
    KINDS,
    LOGIT,
    TOKEN,
    GraphData,
    GraphScores,
    Nodes,
    Pruning,
    name_difference,
)
from saejax.attribution.graph.pruning import prune_each, score_subgraph, scores
from saejax.attribution.settings import GraphConfig
from saejax.dictionaries.formats import tensors
from saejax.errors import UserError, file_errors
from saejax.files import file_sha256, read_json, write_json, write_text

if TYPE_CHECKING:
    import networkx

Groups = Mapping[str, Sequence[str]]  # name of each group of nodes -> their ids
DESCRIPTION, ARRAYS = "graph.json", "graph.safetensors"
SCHEMA_VERSION = 2
_TEXTS = ("tokens", "labels", "prompt", "n_layers", "model", "transcoders", "settings")
_PRUNING = ("node_threshold", "edge_threshold", "top_edges", "min_weight")  # the last two have defaults
_SCORES = tuple(field.name for field in dataclasses.fields(GraphScores))
# Fields of ``GraphData`` -> under which name in the file.
_ARRAYS = dict(value_R="value_T", constant_R="constant_T", untraced_R="untraced_T", ids_P="ids_P", logit_K="logit_K")
_COLUMNS = tuple(field.name for field in dataclasses.fields(Nodes))
_DTYPES = dict(zip(_COLUMNS, DTYPES, strict=True)) | {"ids_P": np.int32, "node_N": np.int32}  # others: float32


@suggests_names
class Graph(GraphData):
    """A graph, as ``saejax.trace`` makes it; it has the fields of ``GraphData``."""

    def scores(self) -> GraphScores:
        """Return replacement and completeness scores, of the whole graph where this is a part of one."""
        return self.pruning.scores if self.pruning else scores(self)

    def score_subgraph(self, nodes: Collection[str]) -> GraphScores:
        """Return the scores with some features alone, such as a circuit's; see ``pruning.score_subgraph``."""
        return score_subgraph(self, nodes)

    def prune(self, nodes: float = 0.8, edges: float = 0.98, top_edges: int = 0, min_weight: float = 0.0) -> Self:
        """Return the most influential part of the graph; see ``pruning.prune_each``.

        Influence counts what reaches the logits. The size of a weight does not: a large edge may end at a feature that
        changes nothing, and late features have larger inputs than early ones.

        Args:
          nodes: share of the influence of all nodes, 0 to 1.
          edges: share of the scores of all edges between them, 0 to 1.
          top_edges: maximum number of edges of each target; 0: any number.
          min_weight: smallest size of an edge, in units of the target's pre-activation.

        Raises:
          UserError: the graph is pruned already, a share is not between 0 and 1, or a number is negative.
        """
        return next(prune_each(self, [nodes], edges, top_edges, min_weight))

    def difference(self, first: str, second: str) -> Self:
        """Return the graph that explains the difference of two of its logits, the first less the second.

        Nothing is traced: edges are linear in the explained readout, so edges of the difference are differences.

        Args:
          first: the text of a logit, one of ``labels``.
          second: that of another.

        Raises:
          UserError: the graph is pruned, does not explain both logits, or two of its logits have one of these texts.
        """
        if self.pruning:
            raise UserError("this graph is pruned: take the difference of the whole one, then prune it")
        targets = self.settings["targets"]
        # A direction may be called as a token, and several tokens may have one text.
        tokens = [place for place, (token, minus) in enumerate(targets) if minus < 0 <= token]
        places = {label: [place for place in tokens if self.labels[place] == label] for label in (first, second)}
        if first == second or not all(places.values()):
            raise UserError(
                f"{first!r} and {second!r} are not two logits of this graph: expected two of "
                f"{sorted({self.labels[place] for place in tokens})}"
            )
        for label, same in places.items():
            if len(same) > 1:
                ids = ", ".join(str(targets[place][0]) for place in same)
                raise UserError(f"{label!r} is the text of the tokens {ids} of this graph: trace the pair of ids")
        start, features = self.slice_of(LOGIT).start, self.count(FEATURE)
        pair = [place for (place,) in places.values()]
        node = Nodes.of(LOGIT, self.n_layers, self.nodes.position_N[start], -1, 1.0)

        def less(value_Rx: np.ndarray) -> np.ndarray:
            """Return rows of features, and the difference of two others."""
            plus, minus = (value_Rx[[features + place]] for place in pair)
            return np.concatenate([value_Rx[:features], plus - minus])

        rows: dict[str, Any] = {
            name: less(getattr(self, name)) for name in ("adjacency_RxS", "value_R", "constant_R", "untraced_R")
        }
        return dataclasses.replace(
            self,
            **rows,
            nodes=Nodes.joined(self.nodes[:start], node),
            logit_K=self.logit_K[pair[:1]] - self.logit_K[pair[1:]],
            labels=(name_difference(first, second),),
            settings={**self.settings, "targets": [[targets[place][0] for place in pair]]},
        )

    def supernodes(self, groups: Groups) -> np.ndarray:
        """Return the edges between groups of nodes: the sums of their weights, float64 [G, G], targets by sources.

        Args:
          groups: name of each of the G groups -> ids of its nodes, as in ``ids``; a node may be in several.

        Raises:
          UserError: the graph has no such node, or a group none.
        """
        groups = _checked_groups(groups)
        place = {name: node for node, name in enumerate(self.ids)}
        for name, members in groups.items():
            if missing := [member for member in members if member not in place]:
                raise UserError(
                    f"supernodes: {name!r} holds {missing[0]!r}, which is no node of this graph: see its ids"
                )
        member_GxN = np.zeros((len(groups), len(self.nodes)))
        for group, members in enumerate(groups.values()):
            member_GxN[group, [place[member] for member in members]] = 1
        return member_GxN[:, self.target_R] @ self.adjacency_RxS @ member_GxN[:, : self.adjacency_RxS.shape[1]].T

    def save_page(
        self,
        path: str | os.PathLike,
        labels: Mapping[tuple[int, int], str] | None = None,
        *,
        features: str | os.PathLike = "",
        contexts: Any = None,
        supernodes: Groups | str | os.PathLike | None = None,
    ) -> None:
        """Write the interactive page of the graph, a file that is complete in itself; a whole graph is pruned first.

        Args:
          path: the file, such as graph.html; one that exists is replaced, and its folder is made.
          labels: (layer, feature) -> what the feature is called.
          features: a folder of feature files, whose contexts and labels the page shows, as ``--graph.features`` takes
            it; "": none but those in the folder ``features`` of a local set, and what ``interpret`` tells of a set
            that was trained in a workdir.
          contexts: a ``saejax.ContextSearch`` of the graph's transcoders, whose texts are searched for features that
            have no name; None: nothing is searched.
          supernodes: name of each group of nodes -> their ids, as in ``ids``; or a file as ``--graph.supernodes`` takes
            it, such as the state that a page saved; None: no groups.

        Raises:
          UserError: nothing of the graph is left, the path is a folder, labels are of something else, a group names a
            node that is not in the pruned graph, or a file is missing or damaged.
        """
        # Before a folder is made.
        page = self._page(labels, features=features, contexts=contexts, supernodes=supernodes)
        write_text(_made_place(path), page)

    def _page(
        self,
        labels: Mapping[tuple[int, int], str] | None = None,
        *,
        features: str | os.PathLike = "",
        contexts: Any = None,
        supernodes: Groups | str | os.PathLike | None = None,
    ) -> str:
        from saejax.page.graph.page import graph_page
        from saejax.stages.attribute.descriptions import describe_graph
        from saejax.stages.attribute.requests import read_states

        graph, checked = self if self.pruning else self.prune(), _checked_labels(labels)
        state: Mapping[str, Any] = {}
        if isinstance(supernodes, str | os.PathLike) and supernodes:
            states = read_states(GraphConfig(supernodes=os.fspath(supernodes)), [])
            if "*" not in states and len(states) > 1:
                raise UserError(
                    f"{supernodes} has supernodes for {', '.join(states)}: expected one graph, or * for all"
                )
            state = states.get("*", next(iter(states.values())))
        elif supernodes:
            state = dict(supernodes=[[name, *members] for name, members in _checked_groups(supernodes).items()])
        return graph_page(graph, checked, describe_graph(graph, os.fspath(features), contexts), state)

    def show(
        self,
        labels: Mapping[tuple[int, int], str] | None = None,
        *,
        features: str | os.PathLike = "",
        contexts: Any = None,
        supernodes: Groups | str | os.PathLike | None = None,
    ) -> None:
        """Show the page: in a notebook below the cell, elsewhere in a browser. See ``save_page``."""
        page = self._page(labels, features=features, contexts=contexts, supernodes=supernodes)
        ipython = sys.modules.get("IPython")
        if ipython and "ipykernel" in sys.modules:
            return ipython.display.display(ipython.display.HTML(_framed(page)))
        path = Path(tempfile.mkdtemp(prefix="saejax-")) / "graph.html"
        write_text(path, page)
        if not webbrowser.open(path.as_uri()):
            print(f"open {path.as_uri()} in a browser")

    def _repr_html_(self) -> str:
        """Return the page in a frame, as notebooks show it."""
        return _framed(self._page())

    def save_figure(
        self,
        path: str | os.PathLike,
        labels: Mapping[tuple[int, int], str] | None = None,
        nodes: int = 40,
        *,
        features: str | os.PathLike = "",
        contexts: Any = None,
    ) -> None:
        """Write a figure for print, layers by positions; a whole graph is pruned first.

        Args:
          path: the file, which ends in .svg, .pdf or .png; one that exists is replaced, and its folder is made.
          labels: (layer, feature) -> what the feature is called; of others the page's name, or else their number.
          nodes: maximum number of features and errors, the most influential ones.
          features: as of ``save_page``.
          contexts: as of ``save_page``.

        Raises:
          UserError: the name has another ending, the number is no whole one of 0 or above, or labels are of something
            else.
        """
        from saejax.page.graph.figure import save_figure
        from saejax.stages.attribute.descriptions import describe_graph

        graph, checked = self if self.pruning else self.prune(), _checked_labels(labels)
        details = describe_graph(graph, os.fspath(features), contexts)
        names = {feature: detail.name for feature, detail in details.items() if detail.name}
        save_figure(_made_place(path), graph, names | checked, nodes)

    def to_networkx(self) -> "networkx.DiGraph":
        """Return a directed graph with edges from sources to targets; this graph may be pruned or whole.

        Returns:
          A ``networkx.DiGraph`` whose nodes are called as in ``ids`` and have ``kind``, ``layer``, ``position``,
          ``index``, ``value`` (activation, or weight of a logit), ``token``, and for a pruned graph ``influence``
          (cumulative share). Edges have ``weight``.
        """
        import networkx

        digraph = networkx.DiGraph(prompt=self.prompt, model=self.model.get("name", ""))
        ids, nodes, first = self.ids, self.nodes, self.slice_of(LOGIT).start
        columns = (nodes.kind_N, nodes.layer_N, nodes.position_N, nodes.index_N, nodes.value_N)
        rows = zip(ids, *(column.tolist() for column in columns), strict=True)
        for node, (name, kind, layer, position, index, value) in enumerate(rows):
            token = self.labels[node - first] if kind == LOGIT else self.tokens[position]
            facts = dict(kind=kind, layer=layer, position=position, index=index, value=value, token=token)
            if self.pruning:
                facts["influence"] = float(self.pruning.influence_N[node])
            digraph.add_node(name, **facts)
        ends = zip(*(part.tolist() for part in self.edges()), strict=True)
        digraph.add_weighted_edges_from((ids[a], ids[b], weight) for a, b, weight in ends)
        return digraph

    def save(self, folder: str | os.PathLike) -> None:
        """Write ``graph.json`` and ``graph.safetensors``, whole or not at all; the folder is made.

        Raises:
          UserError: it holds a graph already; nothing is replaced.
        """
        is_edge_RxS = self.adjacency_RxS != 0
        arrays = {stored: getattr(self, name) for name, stored in _ARRAYS.items()}
        arrays |= dict(edge_bits=np.packbits(is_edge_RxS.reshape(-1)), edge_weights=self.adjacency_RxS[is_edge_RxS])
        arrays |= {f"nodes.{name}": getattr(self.nodes, name) for name in _COLUMNS}
        # Safetensors holds no text: the place of each kind in ``KINDS``.
        arrays["nodes.kind_N"] = np.repeat(np.arange(len(KINDS), dtype=np.int8), [self.count(kind) for kind in KINDS])
        description = dict(schema_version=SCHEMA_VERSION, **{name: getattr(self, name) for name in _TEXTS})
        if pruning := self.pruning:
            arrays |= dict(node_N=pruning.node_N, influence_N=pruning.influence_N)
            how = {name: getattr(pruning, name) for name in _PRUNING}
            description["pruning"] = how | dataclasses.asdict(pruning.scores)
        with tensors.whole_folder(Path(folder), DESCRIPTION, ARRAYS) as temporary:
            tensors.write(temporary / ARRAYS, arrays)
            write_json(temporary / DESCRIPTION, description | dict(sha256=file_sha256(temporary / ARRAYS)))

    @classmethod
    @file_errors()
    def load(cls, folder: str | os.PathLike, tokenizer: Any = None) -> Self:
        """Read what ``save`` wrote, or a file of circuit-tracer, whose classes have to be installed for that.

        Args:
          folder: the folder, or the file, which ends in .pt.
          tokenizer: of a file of circuit-tracer: what reads the ids of its prompt; None: the one that it names.

        Raises:
          UserError: a file is missing or damaged, or was written by another version; or circuit-tracer is missing.
        """
        folder = Path(folder)
        if folder.suffix == ".pt":
            graph = cls(**circuit_tracer.read_fields(folder, tokenizer))
            if problem := _problem(graph):
                raise UserError(f"{folder} holds no graph that fits together: {problem}; save it again")
            return graph
        description, file = read_json(folder / DESCRIPTION), folder / ARRAYS
        version = description.get("schema_version") if isinstance(description, dict) else None
        if version != SCHEMA_VERSION:
            raise UserError(f"{folder / DESCRIPTION} has the schema version {version}: expected {SCHEMA_VERSION}")
        if not file.is_file() or file_sha256(file) != description.get("sha256"):
            raise UserError(
                f"{file} is missing or damaged: it is not what {DESCRIPTION} describes; trace the prompt again"
            )
        arrays = load_file(file)
        _check_names(folder, description, arrays)
        try:
            graph = cls(**_read_fields(description, arrays))
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder} holds no graph that fits together: {error}; trace the prompt again") from None
        if problem := _problem(graph):
            raise UserError(f"{folder} holds no graph that fits together: {problem}; trace the prompt again")
        return graph


def _made_place(path: str | os.PathLike) -> Path:
    """Return the path of a file that is to be written, whose folder is made; refuse a folder."""
    place = Path(path)
    if place.is_dir():
        raise UserError(f"{place} is a folder: name a file in it, such as {place / 'graph.html'}")
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _checked_labels(labels: Mapping[tuple[int, int], str] | None) -> dict[tuple[int, int], str]:
    """Return labels of features by their layers and indices; refuse all else, which would name nothing in silence."""
    if not isinstance(labels or {}, Mapping):
        raise UserError('labels is no dictionary: expected such as {(3, 17): "cities"}, by layer and feature')
    for feature, label in (labels or {}).items():
        pair = feature if isinstance(feature, tuple) else ()
        if len(pair) != 2 or not all(isinstance(number, Integral) for number in pair) or not isinstance(label, str):
            raise UserError(f'the label {label!r} of {feature!r}: expected such as {{(3, 17): "cities"}}')
    return dict(labels or {})


def _checked_groups(groups: Any) -> dict[str, list[str]]:
    """Return the ids of the nodes in each group, of which none is empty."""
    if not isinstance(groups, Mapping):
        raise UserError('groups is no dictionary: expected such as {"cities": ["3_17_4", "5_208_4"]}')
    checked = {str(name): [ids] if isinstance(ids, str) else list(ids) for name, ids in groups.items()}
    for name, members in checked.items():
        if not members:
            raise UserError(f"supernodes: {name!r} holds no node")
    return checked


def _framed(page: str) -> str:
    """Return a page in a frame that stands in a notebook."""
    frame = 'width="100%" height="900" style="border: 0" sandbox="allow-scripts allow-downloads"'
    return f'<iframe {frame} srcdoc="{html.escape(page)}"></iframe>'


def _check_names(folder: Path, description: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Check that the files of a graph have what this version writes, and nothing else.

    Thresholds of pruning that came since have defaults. All else makes up a graph, and has none.

    Raises:
      UserError: something is missing, or unknown: its meaning would be ignored.
    """
    pruning = description.get("pruning")
    needed, optional = {"schema_version", "sha256", *_TEXTS}, {"pruning"}
    expected = {*_ARRAYS.values(), "edge_bits", "edge_weights", *(f"nodes.{name}" for name in _COLUMNS)}
    groups: list[tuple[str, Collection[str], set[str], set[str]]] = [
        (DESCRIPTION, description, needed, optional),
        (ARRAYS, arrays, expected | ({"node_N", "influence_N"} if pruning else set()), set()),
    ]
    if isinstance(pruning, Mapping):
        groups.append((f"pruning of {DESCRIPTION}", pruning, {*_PRUNING[:2], *_SCORES}, {*_PRUNING[2:]}))
    for where, names, wanted, more in groups:
        for problem, left in (("missing", wanted - {*names}), ("unknown", {*names} - wanted - more)):
            if left:
                raise UserError(
                    f"{folder}: {', '.join(sorted(left))} {'is' if len(left) == 1 else 'are'} {problem} in {where}: an "
                    "older or a newer version of saejax wrote it, or it is damaged; trace the prompt again"
                )


def _read_fields(description: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    fields: dict[str, Any] = {name: description[name] for name in _TEXTS}
    fields |= {name: tuple(fields[name]) for name in ("tokens", "labels")}
    fields |= {name: arrays[stored] for name, stored in _ARRAYS.items()}
    kind_N, *columns = (arrays[f"nodes.{name}"] for name in _COLUMNS)
    is_kind_N = (kind_N >= 0) & (kind_N < len(KINDS))
    fields["nodes"] = nodes = Nodes(np.array([*KINDS, ""])[np.where(is_kind_N, kind_N, len(KINDS))], *columns)
    if stored := description.get("pruning"):
        scores = GraphScores(*(stored[name] for name in _SCORES))
        thresholds = {name: stored[name] for name in _PRUNING if name in stored}
        kept: dict[str, Any] = dict(node_N=arrays["node_N"], influence_N=arrays["influence_N"])
        fields["pruning"] = Pruning(**thresholds, **kept, scores=scores)
    logits = int((nodes.kind_N == LOGIT).sum())
    shape = int((nodes.kind_N == FEATURE).sum()) + logits, len(nodes) - logits
    # Bits are filled up to whole bytes.
    is_edge = np.unpackbits(arrays["edge_bits"])[: shape[0] * shape[1]].astype(bool)
    if is_edge.size != shape[0] * shape[1] or is_edge.sum() != len(arrays["edge_weights"]):
        raise KeyError("edge_weights")
    fields["adjacency_RxS"] = np.zeros(shape, np.float32)
    fields["adjacency_RxS"].reshape(-1)[is_edge] = arrays["edge_weights"]
    return fields


def _problem(graph: GraphData) -> str:
    """Return the first thing that does not fit in a graph that was read; "" if all does."""
    if type(graph.n_layers) is not int:
        return f"n_layers is {graph.n_layers!r:.40}, expected a number"
    nodes, logits, positions = graph.nodes, graph.count(LOGIT), len(graph.ids_P)
    count, targets = len(nodes), graph.count(FEATURE) + logits
    arrays = {name: (getattr(nodes, name), count) for name in _COLUMNS}
    arrays |= {name: (getattr(graph, name), targets) for name in ("value_R", "constant_R", "untraced_R")}
    arrays |= dict(ids_P=(graph.ids_P, positions), logit_K=(graph.logit_K, logits))
    if graph.pruning:
        arrays |= {name: (getattr(graph.pruning, name), count) for name in ("node_N", "influence_N")}
    for name, (array, length) in arrays.items():
        dtype = np.dtype(_DTYPES.get(name, np.float32))
        if array.shape != (length,) or array.dtype != dtype:
            return f"{name} has the shape {array.shape} in {array.dtype}, expected ({length},) in {dtype}"
        if array.dtype.kind != "U" and not np.isfinite(array).all():
            return f"{name} is not finite"
    if not np.isfinite(graph.adjacency_RxS).all():
        return "adjacency_RxS is not finite"
    if nodes.kind_N.tolist() != [kind for kind in KINDS for _ in range(graph.count(kind))]:
        return "the nodes are not in the order of their kinds"
    if count and not 0 <= nodes.position_N.min() <= nodes.position_N.max() < positions:
        return "a node stands outside the prompt"
    if (len(graph.tokens), len(graph.labels), graph.count(TOKEN)) != (positions, logits, positions):
        return "tokens or labels are missing"
    return ""
