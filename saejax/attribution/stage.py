"""The stage ``attribute``: prompts to attribution graphs, each checked by running it.

A prompt is a part in the sense of ``causal.stages``. Beside its results in ``<slug>.json`` it has

    <slug>.html          the interactive page
    <slug>.svg           a figure for print
    <slug>-graph/        the pruned graph, for ``Graph.load``
    graphs/<slug>.json   the same as Neuronpedia and circuit-tracer's viewer read it, listed in graph-metadata.json
"""

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from saejax.attribution import circuits, validation
from saejax.attribution.attribute import Traced, prompt_ids, trace_prompt
from saejax.attribution.figure import draw_graph, save_figure
from saejax.attribution.graph import ERROR, FEATURE, Graph
from saejax.attribution.graph_folder import write_graph
from saejax.attribution.memory import GraphSize, certain_active, check_room
from saejax.attribution.neuronpedia import to_document
from saejax.attribution.page import write_page
from saejax.attribution.requests import Request, read_requests
from saejax.attribution.targets import token_of
from saejax.attribution.transcoders import TranscoderSet, open_transcoders
from saejax.causal.stages import Measure, Measured, Tick, each_part, load_run_model, part_file, read_behaviours
from saejax.errors import UserError
from saejax.models.language_model import LanguageModel
from saejax.settings import GraphConfig
from saejax.workspace import Run


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
        for request in requests.values():
            _check_request(model, transcoders, request, config)

        def measure(slug: str, tick: Tick) -> Measured:
            tick(0, 1)
            return _trace(run, model, transcoders, requests[slug])

        return measure

    return dict(transcoders=config.transcoders, graphs=each_part(run, list(requests), begin))


def _check_request(model: LanguageModel, transcoders: TranscoderSet, request: Request, config: GraphConfig) -> None:
    """Refuses a prompt that cannot be traced, before hours are spent on others.

    Raises:
      UserError: it is empty or too long, a target is not one token, or there is too little memory.
    """
    first = transcoders.configs[0]
    size = GraphSize(
        model.config,
        first,
        certain_active(first),
        config.max_features or None,
        config.max_logits,
        checked=bool(config.circuits or config.doubled),
    )
    try:
        ids_P = prompt_ids(model, request.prompt, prepend=True)
        for target in request.targets:
            for token in target if isinstance(target, tuple) else (target,):
                token_of(model, token)
        check_room(size, len(ids_P), model.mesh)
    except UserError as error:
        raise UserError(f"{request.slug}: {error}") from None


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
    _write(run, request.slug, pruned)
    results = _describe(traced, pruned) | dict(seconds=round(seconds, 2)) | _checked(traced, config)
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
            name: _listed(getattr(found, f"{name}_C"))
            for name in ("share", "features", "errors", "readout", "complement", "faithfulness", "incompleteness")
        } | dict(model=found.model, empty=found.empty)
    return dict(doubling=doubling, circuits=curve)


def _listed(values_C: np.ndarray) -> list[float | None]:
    """For JSON, which has no NaN: None in its place."""
    return [value if np.isfinite(value) else None for value in values_C.tolist()]


def _write(run: Run, slug: str, pruned: Graph) -> None:
    """Writes the graph in all its forms, over what a run that was killed may have left."""
    folder: Path = part_file(run, slug, "-graph")
    shutil.rmtree(folder, ignore_errors=True)
    pruned.save(folder)
    document = to_document(pruned, slug)
    write_graph(run.folder / "graphs", document, replace=True)
    write_page(part_file(run, slug, ".html"), document)
    save_figure(draw_graph(document), part_file(run, slug, ".svg"))
