"""The stage ``attribute``: prompts to attribution graphs, each checked by running it.

A prompt is a part in the sense of ``causal.stages``. Beside its results in ``<slug>.json`` it has

    <slug>.html          the interactive page
    <slug>.svg           a figure for print
    <slug>-graph/        the pruned graph, for ``Graph.load``
    heads/<slug>.json    the attention heads that carry each edge
    graphs/<slug>.json   the same as Neuronpedia and circuit-tracer's viewer read it, listed in graph-metadata.json
"""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

from saejax.attribution import circuits, validation
from saejax.attribution.attention import Attention, attend
from saejax.attribution.attribute import Traced, prompt_ids, trace_prompt
from saejax.attribution.figure import draw_graph, save_figure
from saejax.attribution.graph import ERROR, FEATURE, Graph
from saejax.attribution.graph_folder import write_graph
from saejax.attribution.heads import named_heads
from saejax.attribution.neuronpedia import node_ids, to_document
from saejax.attribution.page import write_page
from saejax.attribution.query_key import check_head
from saejax.attribution.requests import Request, read_heads, read_requests
from saejax.attribution.transcoders import TranscoderSet, open_transcoders
from saejax.causal.stages import Measure, Measured, Tick, each_part, load_run_model, part_file, read_behaviours
from saejax.models.language_model import LanguageModel
from saejax.settings import GraphConfig
from saejax.workspace import Run, write_text


def run_attribute(run: Run) -> dict[str, Any]:
    """Traces each prompt, prunes its graph, checks it and writes it.

    Returns:
      The results; WORKSPACE.md describes them.

    Raises:
      UserError: a prompt, its targets, the transcoders and the model do not go together.
    """
    config: GraphConfig = run.configs["graph"]
    behaviours = read_behaviours(run) if config.behaviours else None
    requests = {request.slug: request for request in read_requests(config, behaviours)}

    def begin() -> Measure:
        transcoders = open_transcoders(config.transcoders, config.revision, config.subfolder)
        model = load_run_model(run)
        transcoders.check(model)
        for request in requests.values():  # before the first is traced
            for head in read_heads(config) or []:
                check_head(model.config, *head, tokens=len(prompt_ids(model, request.prompt, prepend=True)))

        def measure(slug: str, tick: Tick) -> Measured:
            tick(0, 1)
            return _trace(run, model, transcoders, requests[slug])

        return measure

    return dict(transcoders=config.transcoders, graphs=each_part(run, list(requests), begin))


def _trace(run: Run, model: LanguageModel, transcoders: TranscoderSet, request: Request) -> Measured:
    config: GraphConfig = run.configs["graph"]
    start = time.monotonic()
    traced = trace_prompt(
        model,
        transcoders,
        request.prompt,
        targets=request.targets,
        max_logits=config.max_logits,
        logit_mass=config.logit_mass,
        max_features=config.max_features or None,
    )
    seconds = time.monotonic() - start
    pruned = traced.graph.prune(config.node_threshold, config.edge_threshold)
    attention = attend(traced, pruned, config.heads, read_heads(config))
    _write(run, request.slug, pruned, attention)
    results = _describe(traced, pruned) | dict(seconds=round(seconds, 2)) | _checked(traced, config)
    results |= dict(heads=attention.heads, query_key=attention.query_key)
    scores = results["scores"]
    said = (
        f"{results['active']:,} active features, {results['traced']:,} traced in {seconds:.1f} s; kept "
        f"{results['features']} features, {results['errors']} errors, {results['edges']:,} edges; replacement "
        f"{scores['replacement']:.2f}, completeness {scores['completeness']:.2f}"
    )
    if doubling := results["doubling"]:
        pearson = doubling["free"]["pearson"]
        foretold = "none" if pearson is None else f"{pearson:.2f}"
        said += f"; edges off by {doubling['held_error']:.1e}, correlation with what happens {foretold}"
    if attention.heads and attention.heads["too_large"]:
        said += f"; no heads of edges: {attention.heads['too_large']}"
    return Measured(results, said)


def _describe(traced: Traced, pruned: Graph) -> dict[str, Any]:
    graph, replacement = traced.graph, traced.replacement
    return dict(
        prompt=graph.prompt,
        tokens=list(graph.tokens),
        targets=[
            dict(label=label, logit=float(logit), weight=float(weight))
            for label, logit, weight in zip(graph.labels, graph.logit_K, graph.probability_K, strict=True)
        ],
        active=len(replacement.active),
        traced=graph.count(FEATURE),
        features=pruned.count(FEATURE),
        errors=pruned.count(ERROR),
        edges=int((pruned.adjacency_TxS != 0).sum()),
        scores=dataclasses.asdict(graph.scores()),
        unexplained=float(abs(graph.unexplained_T).max() / abs(graph.value_T).max()),
    )


def _checked(traced: Traced, config: GraphConfig) -> dict[str, Any]:
    """What came of running the graph."""
    graph, replacement, readouts = traced
    doubling = curve = None
    if config.doubled:
        doubling = validation.double(replacement, graph, readouts, config.doubled, config.seed).results()
    if config.circuits:
        found = circuits.curve(replacement, graph, readouts)
        curve = {
            name: getattr(found, f"{name}_C").tolist()
            for name in ("share", "features", "errors", "readout", "complement", "faithfulness", "incompleteness")
        } | dict(model=found.model, empty=found.empty)
    return dict(doubling=doubling, circuits=curve)


def _write(run: Run, slug: str, pruned: Graph, attention: Attention) -> None:
    """Writes the graph in all its forms, over what a run that was killed may have left."""
    folder: Path = part_file(run, slug, "-graph")
    shutil.rmtree(folder, ignore_errors=True)
    pruned.save(folder)
    document = to_document(pruned, slug)
    write_graph(run.folder / "graphs", document, replace=True)
    carried = named_heads(attention.carried, node_ids(pruned))
    if carried:
        edges = [dict(source=source, target=target, heads=heads) for (source, target), heads in carried.items()]
        (run.folder / "heads").mkdir(exist_ok=True)
        lines = ",\n".join(json.dumps(edge, separators=(",", ":")) for edge in edges)
        write_text(run.folder / "heads" / f"{slug}.json", f'{{"edges":[\n{lines}\n]}}\n')
    write_page(part_file(run, slug, ".html"), document, heads=carried, tables=attention.tables)
    save_figure(draw_graph(document), part_file(run, slug, ".svg"))
