"""The stage ``attribute``: prompts to attribution graphs, each checked by running it.

A prompt is a part in the sense of ``causal.stages``; ``outputs`` writes its files.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saejax.attribution.checks import circuit_runs, circuits, validation
from saejax.attribution.forms.attention import Attention, attend
from saejax.attribution.forms.outputs import write_outputs
from saejax.attribution.graph.graph import ERROR, FEATURE, Graph
from saejax.attribution.groups import supernodes
from saejax.attribution.groups.supernode_files import CLUSTER, read_groups
from saejax.attribution.heads.query_key import check_head
from saejax.attribution.local.replacement import Replacement
from saejax.attribution.local.saes import SaeSet
from saejax.attribution.local.transcoders import TranscoderSet, open_transcoders
from saejax.attribution.requests import Request, read_heads, read_requests
from saejax.attribution.trace.gradient import TracedSaes, trace_saes
from saejax.attribution.trace.memory import GraphSize, certain_active, check_room
from saejax.attribution.trace.prompt import Traced, prompt_ids, trace_prompt
from saejax.attribution.trace.targets import token_of
from saejax.causal.stages import Measure, Measured, OnProgress, each_part, load_run_model, read_behaviours
from saejax.errors import UserError
from saejax.models.language_model import LanguageModel
from saejax.settings import GraphConfig
from saejax.workspace import Run

_NO_ATTENTION = Attention({}, None, [], [])  # of SAEs' graphs, whose edges are not paths


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
        for request in requests.values():  # before hours are spent on the first
            _check_request(model, dictionaries, request, config)
        means = None
        if config.circuits and config.circuit_rest == "mean" and isinstance(dictionaries, TranscoderSet):
            texts = [prompt_ids(model, request.prompt, prepend=True) for request in requests.values()]
            means = circuit_runs.mean_activations(Replacement.of(model, dictionaries, ids_P) for ids_P in texts)

        def measure(slug: str, on_progress: OnProgress) -> Measured:
            on_progress(0, 1)
            return _measure(run, model, dictionaries, requests[slug], groups.get(slug, []), means)

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
    """Refuses a prompt that cannot be traced.

    Raises:
      UserError: it is empty or too long, a target is not one token, a head does not exist, or there is too little
        memory.
    """
    try:
        ids_P = prompt_ids(model, request.prompt, prepend=True)
        _targets(model, request)
        for head in read_heads(config) or []:
            check_head(model.config, *head, tokens=len(ids_P))
        if isinstance(dictionaries, TranscoderSet):
            first, checked = dictionaries.configs[0], bool(config.circuits or config.doubled)
            most = config.max_features or None
            size = GraphSize(model.config, first, certain_active(first), most, config.max_logits, checked)
            check_room(size, len(ids_P), model.mesh)
    except UserError as error:
        raise UserError(f"{request.slug}: {error}") from None


def _targets(model: LanguageModel, request: Request) -> list[int | tuple[int, ...]]:
    """The tokens that a request's targets mean.

    Raises:
      UserError: a target is not one token.
    """
    id_of = model.token_id if request.answers else functools.partial(token_of, model)
    return [tuple(map(id_of, target)) if isinstance(target, tuple) else id_of(target) for target in request.targets]


def _measure(
    run: Run,
    model: LanguageModel,
    dictionaries: TranscoderSet | SaeSet,
    request: Request,
    groups: Sequence[Sequence[str]],
    means: Mapping[int, np.ndarray] | None,
) -> Measured:
    config: GraphConfig = run.configs["graph"]
    start = time.monotonic()
    traced = _trace(model, dictionaries, request, config)
    seconds = time.monotonic() - start
    graph, prompt_run, _ = traced
    pruned = graph.prune(config.node_threshold, config.edge_threshold, config.top_edges)
    if config.supernodes == CLUSTER:
        groups = supernodes.as_groups(pruned, supernodes.cluster(pruned, prompt_run))
    supernodes.named(pruned, groups)  # before anything is written
    attention = _NO_ATTENTION
    if isinstance(traced, Traced):
        attention = attend(traced, pruned, config.heads, read_heads(config))
    write_outputs(run, request.slug, pruned, groups, attention)
    results = _describe(graph, pruned) | dict(supernodes=len(groups), seconds=round(seconds, 2))
    results |= _checked(traced, config, means) | dict(heads=attention.heads, query_key=attention.query_key)
    return Measured(results, _said(results))


def _trace(
    model: LanguageModel, dictionaries: TranscoderSet | SaeSet, request: Request, config: GraphConfig
) -> Traced | TracedSaes:
    options: dict[str, Any] = dict(
        targets=_targets(model, request),
        max_logits=config.max_logits,
        logit_mass=config.logit_mass,
        max_features=config.max_features or None,
    )
    if isinstance(dictionaries, SaeSet):
        options |= dict(estimate=config.estimate, direct=config.direct)
        return trace_saes(model, dictionaries, request.prompt, **options)
    return trace_prompt(model, dictionaries, request.prompt, **options)


def _said(results: Mapping[str, Any]) -> str:
    """A graph's results in a line."""
    scores = results["scores"]
    said = (
        f"{results['active']:,} active features, {results['traced']:,} traced in {results['seconds']:.1f} s; kept "
        f"{results['features']} features, {results['errors']} errors, {results['edges']:,} edges; replacement "
        f"{scores['replacement']:.2f}, completeness {scores['completeness']:.2f}"
    )
    if doubling := results["doubling"]:
        pearson = doubling["free"]["pearson"]
        foretold = "none" if pearson is None else f"{pearson:.2f}"
        said += f"; edges off by {doubling['held_error']:.1e}, correlation with what happens {foretold}"
    if results["heads"] and results["heads"]["too_large"]:
        said += f"; no heads of edges: {results['heads']['too_large']}"
    return said


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
