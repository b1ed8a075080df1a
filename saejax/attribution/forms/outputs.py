"""The files of a graph, in the folder of its run:

<slug>.html          the interactive page
<slug>.svg           a figure for print
<slug>-graph/        the pruned graph, for ``Graph.load``
heads/<slug>.json    the attention heads that carry each edge
graphs/<slug>.json   the same as Neuronpedia and circuit-tracer's viewer read it, listed in graph-metadata.json
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saejax.attribution.forms.attention_tables import attention_tables
from saejax.attribution.forms.figure import draw_graph, save_figure
from saejax.attribution.forms.graph_folder import write_graph
from saejax.attribution.forms.neuronpedia import to_document
from saejax.attribution.forms.page import write_page
from saejax.attribution.forms.scores import strongest
from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import LOGIT
from saejax.attribution.heads.attention import Attention
from saejax.attribution.heads.edges import named_heads
from saejax.files import write_text
from saejax.parallel.collectives import is_first_process
from saejax.runner.parts import part_file
from saejax.runner.workspace import Run
from saejax.settings.attribution import GraphConfig

_HEADS_ON_PAGE = 20_000  # edges, the strongest ones, whose heads the page has; the file has all


def write_outputs(
    run: Run,
    slug: str,
    pruned: Graph,
    groups: Sequence[Sequence[str]],
    attention: Attention,
    labels: Mapping[tuple[int, int], str],
) -> None:
    """Writes a graph in all its forms, over what a run that was killed may have left; the first process does.

    Args:
      run: of the stage.
      slug: the graph's name.
      groups: its supernodes, as ``supernodes.as_groups`` gives them.
      attention: the heads of its edges.
      labels: (layer, feature) -> what the feature is called.
    """
    if not is_first_process():
        return
    folder: Path = part_file(run, slug, "-graph")
    shutil.rmtree(folder, ignore_errors=True)
    pruned.save(folder)
    ids = pruned.ids
    pinned = ids[pruned.slice_of(LOGIT)] if groups else []  # what the groups explain
    config = run.configs[GraphConfig]
    names: Any = dict(scan=config.scan, source_set=config.source_set, labels=labels)
    document = to_document(pruned, slug, supernodes=groups, pinned=pinned, **names)
    write_graph(run.folder / "graphs", document, replace=True)
    carried = named_heads(attention.carried, ids) if attention.carried else {}
    if carried:
        edges = [dict(source=source, target=target, heads=heads) for (source, target), heads in carried.items()]
        lines = ",\n".join(json.dumps(edge, separators=(",", ":")) for edge in edges)
        (run.folder / "heads").mkdir(exist_ok=True)
        write_text(run.folder / "heads" / f"{slug}.json", f'{{"edges":[\n{lines}\n]}}\n')
    first = [document["links"][place] for place in strongest(document)[:_HEADS_ON_PAGE]]
    ends = [(link["source"], link["target"]) for link in first]
    shown = {edge: carried[edge] for edge in ends if edge in carried}
    write_page(part_file(run, slug, ".html"), document, heads=shown, tables=attention_tables(attention, pruned))
    save_figure(draw_graph(document), part_file(run, slug, ".svg"))
