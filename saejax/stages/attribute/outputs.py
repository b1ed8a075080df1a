"""Write the files of a graph, in the folder of its run.

<slug>.html          the interactive page
<slug>-graph/        the whole graph, for ``Graph.load``: to prune it again, nothing has to be traced
tables/<slug>.json   on request: the page's tables of attention scores
graphs/<slug>.json   the pruned graph as Neuronpedia and circuit-tracer's viewer read it, listed in graph-metadata.json
features/<layer>_<index>.json  contexts of features that no file describes, as Neuronpedia writes them
lens.json            on request: tokens that features raise and lower, as a Jacobian lens reads them
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from saejax.attribution.forms.document import GraphDocument, feature_of
from saejax.attribution.forms.features import (
    EXAMPLES,
    FEATURES,
    Feature,
    FeatureDetails,
    cut_context,
    name_quantiles,
    read_details,
)
from saejax.attribution.forms.neuronpedia import write_graph
from saejax.attribution.graph import Graph
from saejax.attribution.heads.query_key import OWN_BIAS
from saejax.attribution.results import QueryScores
from saejax.attribution.settings import GraphConfig
from saejax.errors import UserError
from saejax.files import read_json, write_json
from saejax.interpret.feature_record import FeatureRecord, read_records
from saejax.interpret.records import LOWEST, PER_OCTAVE
from saejax.page.graph.page import FULL, PageTable, kept_features, write_page
from saejax.page.tables import percent
from saejax.parallel.collectives import is_first_process
from saejax.runner.labels import trained_layers
from saejax.runner.parts import part_file
from saejax.runner.stacks import find_results
from saejax.runner.workspace import Run
from saejax.unicode import visible_token

_LENS = "lens.json"
_NOTE = (
    "The score of a query with a key, before the softmax, is a sum over pairs: what one source adds to the query times "
    "what another adds to the key. The largest pairs are listed; those that are no buttons are not in the pruned graph."
)


def write_outputs(run: Run, document: GraphDocument, tables: Sequence[PageTable], note: str = "") -> None:
    """Write a pruned graph in all its forms, over what a run that was killed may have left; the first process does.

    Args:
      run: of the stage.
      document: the pruned graph.
      tables: tables below the graph.
      note: a sentence above it.
    """
    if not is_first_process():
        return
    slug = document["metadata"]["slug"]
    write_graph(run.folder / "graphs", document)
    if tables:
        write_tables(run.folder / "tables" / f"{slug}.json", tables)
    config = run.configs[GraphConfig]
    note = f"{lens_note(config.lens)} {note}".strip()
    details = details_of_features(config, kept_features(document), [run.folder])
    write_page(part_file(run, slug, ".html"), document, tables=tables, details=details, note=note)


def details_of_features(
    config: GraphConfig, features: Sequence[Feature], places: Sequence[Path] = (), fetched: int = FULL
) -> dict[Feature, FeatureDetails]:
    """Return what is known of features: of each what ``interpret`` tells in its workdir, or else what files tell.

    Args:
      config: names the set and a folder of feature files.
      features: layers and indices, the most influential first.
      places: units, and other folders that may hold ``features/`` with more feature files, or the reading of a lens.
      fetched: number of them, the first ones, whose files may be fetched from the hub.

    Raises:
      UserError: a file is damaged.
    """
    dictionaries = [config.transcoders] if config.transcoders else config.dictionaries
    more = [place / FEATURES for place in places if (place / FEATURES).is_dir()]
    interpreted = interpreted_details(dictionaries, features)
    missing = [feature for feature in features if feature not in interpreted]
    details = interpreted | read_details(
        dictionaries, [*filter(None, [config.features]), *more], missing, features[:fetched]
    )
    for read in map(read_lens, places):
        for feature in read.keys() & set(features):
            raised, lowered = read[feature]
            # In place of what files say: the lens was asked for.
            details[feature] = dataclasses.replace(
                details.get(feature, FeatureDetails()), top_logits=raised, bottom_logits=lowered
            )
    return details


def lens_note(lens: str) -> str:
    """Return the sentence on a page of a graph that names the lens which read its features' tokens; "": none did."""
    return f"Tokens that features raise and lower are read by the Jacobian lens {lens}." if lens else ""


def write_lens(folder: Path, read: Mapping[Feature, tuple[Sequence[str], Sequence[str]]]) -> None:
    """Add what a lens reads of features, the tokens that each raises and lowers, to the file of a unit."""
    texts = {f"{layer}_{index}": ends for (layer, index), ends in (read_lens(folder) | dict(read)).items()}
    write_json(folder / _LENS, texts)


def read_lens(folder: Path) -> dict[Feature, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return what ``write_lens`` wrote; {} if there is no such file."""
    texts = read_json(folder / _LENS) if (folder / _LENS).exists() else {}
    return {feature_of(dict(node_id=name)): (tuple(up), tuple(down)) for name, (up, down) in texts.items()}


def interpreted_details(
    dictionaries: Iterable[str | Path], features: Sequence[Feature]
) -> dict[Feature, FeatureDetails]:
    """Return what the stage ``interpret`` tells of features, where the workdir that trained a dictionary has it."""
    details, trained = dict[Feature, FeatureDetails](), trained_layers(dictionaries)
    for layer in {layer for layer, _ in features} & set(trained):
        if not (folder := find_results(trained[layer].workdir, "interpret", trained[layer].name)):
            continue
        wanted = {index for member_layer, index in features if member_layer == layer}
        for index, record in read_records(folder, wanted).items():
            if "examples" in record:
                details[layer, index] = _details_of(record)
    return details


def _details_of(record: FeatureRecord) -> FeatureDetails:
    groups: dict[str, list[dict[str, list]]] = {}
    for context in record.get("groups", ()):
        name = f"{10 * context['group']} to {10 * context['group'] + 10} % of firings"
        groups.setdefault(name, []).append(cut_context(context["tokens"], context["acts"]))
    contexts = tuple(cut_context(example["tokens"], example["acts"]) for example in record["examples"][:EXAMPLES])
    up, down = (tuple(text for text, _ in some) for some in (record.get("up", ()), record.get("down", ())))
    counts = record.get("histogram", ())
    used = [i for i, count in enumerate(counts) if count]
    within = range(used[0], used[-1] + 1) if used else ()  # the middles of bins, also of empty ones between others
    bars = [(2 ** ((i + 0.5) / PER_OCTAVE + LOWEST), counts[i]) for i in within]
    return FeatureDetails(contexts, up, down, "", name_quantiles(groups), tuple(bars))


def write_tables(path: Path, tables: Sequence[PageTable]) -> None:
    """Write the tables that a page shows below its graph."""
    path.parent.mkdir(exist_ok=True)
    write_json(path, list(map(dataclasses.asdict, tables)))


def read_tables(path: Path) -> list[PageTable]:
    """Return what ``write_tables`` wrote; [] if there is no such file.

    Raises:
      UserError: the file is damaged.
    """
    try:
        return [PageTable(**table) for table in read_json(path)] if path.is_file() else []
    except TypeError:
        raise UserError(f"{path} is damaged: trace the prompt again") from None


def score_table(scores: QueryScores, graph: Graph) -> PageTable:
    """Return the table of a head below a pruned graph, with a block for each key: score, largest pairs, all others."""
    ids, rows = set(graph.ids), list[list[str | float]]()
    for key in scores.keys:
        rows.append([f"{_place(graph, key.key)}, {percent(key.weight)}", "score", "", key.score])
        for pair in key.pairs:
            shown = (name if name in ids else _words(name, graph) for name in (pair.query, pair.key))
            rows.append(["", *shown, pair.part])
        rows.append(["", "all other pairs", "", key.rest])
    keys = ", ".join(f"{_place(graph, key.key)} {percent(key.weight)}" for key in scores.keys)
    title = f"Head {scores.layer}.{scores.head} at {_place(graph, scores.query)} attends to {keys}"
    return PageTable(title, ["Key", "Source of the query", "Source of the key", "Contribution"], rows, _NOTE)


def _words(name: str, graph: Graph) -> str:
    """Describe a source that is not in the graph, by its id."""
    if name == OWN_BIAS:
        return "biases of the head's layer"
    *first, last = name.split("_")
    if first == ["bias"]:
        return f"biases of layer {last}"
    if first == ["first", "mlp"]:
        return f"MLP of layer {last} at {_place(graph, 0)}"
    layer, index = first
    place = _place(graph, int(last))
    if layer == "E":
        return f"{place} token"
    return f"error layer {layer} · {place}" if index == "-1" else f"feature {index} layer {layer} · {place}"


def _place(graph: Graph, position: int) -> str:
    """Return a token as the page shows it, and its position."""
    return f"{visible_token(graph.tokens[position])} ({position})"
