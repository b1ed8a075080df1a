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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saejax.attribution import circuits, supernodes, validation
from saejax.attribution.attribute import Traced, prompt_ids, trace_prompt
from saejax.attribution.figure import draw_graph, save_figure
from saejax.attribution.gradient import TracedSaes, trace_saes
from saejax.attribution.graph import ERROR, FEATURE, LOGIT, Graph
from saejax.attribution.graph_folder import write_graph
from saejax.attribution.memory import GraphSize, certain_active, check_room
from saejax.attribution.neuronpedia import node_ids, to_document
from saejax.attribution.page import write_page
from saejax.attribution.replacement import Replacement
from saejax.attribution.requests import CLUSTER, Request, read_groups, read_requests
from saejax.attribution.saes import SaeSet
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
      UserError: a prompt, its targets, the transcoders or SAEs and the model do not go together.
    """
    config: GraphConfig = run.configs["graph"]
    behaviours = read_behaviours(run) if config.behaviours else None
    requests = {request.slug: request for request in read_requests(config, behaviours)}
    groups = read_groups(config, list(requests))

    def begin() -> Measure:
        dictionaries = _open(config)
        model = load_run_model(run)
        dictionaries.check(model)
        for request in requests.values():
            _check_request(model, dictionaries, request, config)
        means = None
        if config.circuits and config.circuit_rest == "mean" and isinstance(dictionaries, TranscoderSet):
            texts = [prompt_ids(model, request.prompt, prepend=True) for request in requests.values()]
            means = circuits.mean_activations(Replacement.of(model, dictionaries, ids_P) for ids_P in texts)

        def measure(slug: str, tick: Tick) -> Measured:
            tick(0, 1)
            return _trace(run, model, dictionaries, requests[slug], groups.get(slug, []), means)

        return measure

    graphs = each_part(run, list(requests), begin)
    return dict(transcoders=config.transcoders, dictionaries=list(config.dictionaries), graphs=graphs)


def _open(config: GraphConfig) -> TranscoderSet | SaeSet:
    if config.dictionaries:
        return SaeSet.of(config.dictionaries)
    return open_transcoders(config.transcoders, config.revision, config.subfolder)


def _check_request(
    model: LanguageModel, dictionaries: TranscoderSet | SaeSet, request: Request, config: GraphConfig
) -> None:
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


def _trace(
    run: Run,
    model: LanguageModel,
    dictionaries: TranscoderSet | SaeSet,
    request: Request,
    groups: Sequence[Sequence[str]],
    means: Mapping[int, np.ndarray] | None,
) -> Measured:
    config: GraphConfig = run.configs["graph"]
    start = time.monotonic()
    options: dict[str, Any] = dict(
        targets=request.targets,
        max_logits=config.max_logits,
        logit_mass=config.logit_mass,
        max_features=config.max_features or None,
    )
    traced: Traced | TracedSaes
    if isinstance(dictionaries, SaeSet):
        options |= dict(estimate=config.estimate, direct=config.direct)
        traced = trace_saes(model, dictionaries, request.prompt, **options)
    else:
        traced = trace_prompt(model, dictionaries, request.prompt, **options)
    seconds = time.monotonic() - start
    pruned = traced.graph.prune(config.node_threshold, config.edge_threshold, config.top_edges)
    if config.supernodes == CLUSTER:
        _, prompt_run, _ = traced
        groups = supernodes.as_groups(pruned, supernodes.cluster(pruned, prompt_run))
    supernodes.named(pruned, groups)  # before anything is written
    _write(run, request.slug, pruned, groups)
    results = _describe(traced.graph, pruned) | dict(supernodes=len(groups), seconds=round(seconds, 2))
    results |= _checked(traced, config, means)
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


def _describe(graph: Graph, pruned: Graph) -> dict[str, Any]:
    return dict(
        prompt=graph.prompt,
        tokens=list(graph.tokens),
        targets=[
            dict(label=label, logit=float(logit), weight=float(weight))
            for label, logit, weight in zip(graph.labels, graph.logit_K, graph.probability_K, strict=True)
        ],
        active=graph.settings["active_features"],
        traced=graph.count(FEATURE),
        features=pruned.count(FEATURE),
        errors=pruned.count(ERROR),
        edges=int((pruned.adjacency_TxS != 0).sum()),
        scores=dataclasses.asdict(graph.scores()),
        unexplained=float(abs(graph.unexplained_T).max() / abs(graph.value_T).max()),
    )


def _checked(
    traced: Traced | TracedSaes, config: GraphConfig, means: Mapping[int, np.ndarray] | None
) -> dict[str, Any]:
    """What came of running the graph."""
    doubling = curve = None
    if isinstance(traced, TracedSaes):
        if config.doubled:
            doubling = validation.double_saes(*traced, config.doubled, config.seed).results()
        return dict(doubling=doubling, circuits=curve)
    graph, replacement, readouts = traced
    if config.doubled:
        doubling = validation.double(replacement, graph, readouts, config.doubled, config.seed).results()
    if config.circuits:
        found = circuits.curve(replacement, graph, readouts, means=means)
        curve = {
            name: _listed(getattr(found, f"{name}_C"))
            for name in ("share", "features", "errors", "readout", "complement", "faithfulness", "incompleteness")
        } | dict(model=found.model, empty=found.empty, rest=config.circuit_rest)
    return dict(doubling=doubling, circuits=curve)


def _listed(values_C: np.ndarray) -> list[float | None]:
    """For JSON, which has no NaN: None in its place."""
    return [value if np.isfinite(value) else None for value in values_C.tolist()]


def _write(run: Run, slug: str, pruned: Graph, groups: Sequence[Sequence[str]]) -> None:
    """Writes the graph in all its forms, over what a run that was killed may have left."""
    folder: Path = part_file(run, slug, "-graph")
    shutil.rmtree(folder, ignore_errors=True)
    pruned.save(folder)
    pinned = node_ids(pruned)[pruned.slice_of(LOGIT)] if groups else []  # what the groups explain
    document = to_document(pruned, slug, supernodes=groups, pinned=pinned)
    write_graph(run.folder / "graphs", document, replace=True)
    write_page(part_file(run, slug, ".html"), document)
    save_figure(draw_graph(document), part_file(run, slug, ".svg"))
