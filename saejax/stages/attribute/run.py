"""The stage ``attribute``: prompts to attribution graphs.

A prompt is a part in the sense of ``runner.parts``; ``outputs`` writes its files.
"""

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from saejax.attribution.forms.neuronpedia import pin_as_saved, to_document
from saejax.attribution.graph import Graph
from saejax.attribution.graph.data import ERROR, FEATURE
from saejax.attribution.graph.pruning import emptying_threshold
from saejax.attribution.heads.query_key import check_head, split_scores
from saejax.attribution.local.dictionaries import LayerSaes, LayerTranscoders, open_saes, open_transcoders
from saejax.attribution.local.model import LocalModel
from saejax.attribution.local.rows import Target, target_pairs, token_of
from saejax.attribution.local.state import prompt_ids
from saejax.attribution.results import AttributeResults, GraphResults, GraphTarget
from saejax.attribution.settings import GraphConfig
from saejax.attribution.trace.prompt import (
    GraphSize,
    Traced,
    certain_active,
    check_gradient_memory,
    check_memory,
    trace_prompt,
)
from saejax.errors import UserError
from saejax.models.language_model import LanguageModel
from saejax.parallel.collectives import from_first_process, is_first_process, process_count
from saejax.progress import OnProgress, silent
from saejax.runner.parts import Measure, Measured, each_part, part_file
from saejax.runner.workspace import Run
from saejax.stages.attribute.descriptions import Descriptions, Parts
from saejax.stages.attribute.outputs import score_table, write_outputs
from saejax.stages.attribute.requests import Request, read_heads, read_labels, read_requests, read_states
from saejax.stages.attribute.traces import (
    find_trace,
    read_trace,
    trace_key,
    write_trace,
)
from saejax.stages.inputs import load_run_model, read_behaviours
from saejax.tasks.answer_tokens import answer_ids
from saejax.wording import counted


def open_parts(run: Run) -> tuple[LanguageModel, LayerTranscoders | LayerSaes]:
    """Return the model that a run traces, and its transcoders or SAEs; they go together."""
    dictionaries = open_set(run.configs[GraphConfig])
    model = load_run_model(run, *dictionaries.configs)
    dictionaries.check(model)
    return model, dictionaries


def run_attribute(
    run: Run, opened: Callable[[Run], Any] = open_parts, trace: Callable[..., Any] | None = None
) -> AttributeResults:
    """Trace each prompt, prune its graph and write it.

    Args:
      run: of the stage.
      opened: gives the model and the dictionaries, as ``open_parts`` does.
      trace: in place of ``trace_request``, with its first four arguments; None: that itself.

    Returns:
      The results, with a graph for each prompt.

    Raises:
      UserError: a prompt, its targets, the transcoders or SAEs and the model do not go together.
    """
    config = run.configs[GraphConfig]
    behaviours = read_behaviours(run, config.behaviours, "--graph.behaviours") if config.behaviours else None
    requests = {request.slug: request for request in read_requests(config, behaviours)}
    states, labels = read_states(config, list(requests)), read_labels(config)

    def begin() -> Measure:
        parts = functools.cache(lambda: opened(run))  # the model is loaded where something runs it
        traces = {slug: find_trace(run, request) for slug, request in requests.items()}
        is_traced = from_first_process(np.array([traces[slug] is not None for slug in requests], np.int32))
        dictionaries = open_set(config) if is_traced.all() else parts()[1]
        dictionaries.check_features(labels, config.labels or "its workdir")
        descriptions = Descriptions(run, parts)  # for all prompts
        for request, is_there in zip(requests.values(), is_traced, strict=True):  # before hours are spent on the first
            if not is_there or config.query_key:
                model, dictionaries = parts()
                _check_request(model, dictionaries, request, config)

        def measure(slug: str, on_progress: OnProgress) -> Measured:
            on_progress(0, 1)
            request, saved = requests[slug], traces[slug] if is_traced[list(requests).index(slug)] else None
            return _measure(run, parts, descriptions, saved, request, states.get(slug, {}), labels, on_progress, trace)

        return measure

    graphs = each_part(run, list(requests), begin, GraphResults, "texts for contexts")
    return AttributeResults(config.transcoders, config.dictionaries, graphs)


def open_set(config: GraphConfig) -> LayerTranscoders | LayerSaes:
    """Return the transcoders or SAEs that are named, of which no array is read yet."""
    if config.dictionaries:
        return open_saes(config.dictionaries, config.estimate, config.direct)
    return open_transcoders(config.transcoders, choice=config.l0)


def _check_request(
    model: LanguageModel, dictionaries: LayerTranscoders | LayerSaes, request: Request, config: GraphConfig
) -> None:
    """Check that a prompt can be traced.

    Raises:
      UserError: it is empty or too long, a target is not one token, a head does not exist, or there is too little
        memory.
    """
    try:
        ids_P = prompt_ids(model, request.prompt, chat=config.chat_template)
        target_pairs(model, _targets(model, request))
        for head in read_heads(config):
            check_head(model.config, *head, tokens=len(ids_P))
        most = config.max_features or None
        if isinstance(dictionaries, LayerSaes):
            logits = len(request.targets) or config.max_logits
            check_gradient_memory(model, dictionaries, len(ids_P), None, most, logits)
        else:
            first, across = dictionaries.configs[0], dictionaries.cross_layer
            active = certain_active(first)
            size = GraphSize(model.config, first, active, most, config.max_logits, across)
            check_memory(size, len(ids_P), model.mesh)
    except UserError as error:
        raise UserError(f"{request.slug}: {error}") from None


def _targets(model: LanguageModel, request: Request) -> list[Target]:
    """Return the tokens that a request's targets mean.

    Raises:
      UserError: a target is not one token, or an answer has no token of its own after the prompt.
    """
    id_of: Callable[[Any], int] = functools.partial(token_of, model)
    if request.answers:
        text = str(request.prompt)  # of a behaviour
        id_of = lambda answer: answer_ids(model.tokenizer, text, answer)[0]  # noqa: E731
    return [
        (id_of(target[0]), id_of(target[1])) if isinstance(target, tuple) else id_of(target)
        for target in request.targets
    ]


def _measure(
    run: Run,
    parts: Parts,
    descriptions: Descriptions,
    saved: Path | None,
    request: Request,
    state: Mapping[str, Any],
    labels: Mapping[tuple[int, int], str],
    on_progress: OnProgress,
    trace: Callable[..., Traced] | None = None,
) -> Measured:
    config = run.configs[GraphConfig]
    run_of: Callable[[], Any]  # the run of the prompt
    if saved:
        graph, seconds = read_trace(saved)
        run_of = functools.cache(lambda: LocalModel(*parts(), graph.ids_P))
        run.say(f"{request.slug}: traced before, in {saved.parent.name}")
    else:
        start = time.monotonic()
        if trace:
            traced = trace(*parts(), request, config)
        else:
            # Asked in a pool of threads, which several processes would do at different places.
            ask = (lambda done, rows: on_progress(0, 0)) if process_count() == 1 else silent
            traced = trace_request(*parts(), request, config, ask)
        # Tracing alone: how long pruning and pages take depends on other settings.
        graph, seconds = traced.graph, time.monotonic() - start
        run_of = lambda: traced.local  # noqa: E731
    if is_first_process():
        write_trace(part_file(run, request.slug, "-graph"), graph, trace_key(run.configs, request), seconds)
    pruned = graph.prune(config.node_threshold, config.edge_threshold, config.top_edges, config.min_weight)
    document = to_document(
        pruned, request.slug, source_set=config.source_set, labels=labels, **pin_as_saved(pruned, state)
    )
    scores = tuple(split_scores(run_of(), *head) for head in read_heads(config))
    descriptions.write(document, saved, on_progress)
    empty = None if pruned.count(FEATURE) else explain_empty(graph, config)
    write_outputs(run, document, [score_table(score, pruned) for score in scores], empty or "")
    results = GraphResults(
        prompt=graph.prompt,
        tokens=graph.tokens,
        targets=tuple(
            GraphTarget(label, float(logit), float(weight))
            for label, logit, weight in zip(graph.labels, graph.logit_K, graph.probability_K, strict=True)
        ),
        active=graph.settings["active_features"],
        traced=graph.count(FEATURE),
        untraced=float(abs(graph.untraced_R).sum() / abs(graph.value_R).sum()),
        features=pruned.count(FEATURE),
        errors=pruned.count(ERROR),
        edges=int((pruned.adjacency_RxS != 0).sum()),
        scores=graph.scores(),
        unexplained=float(abs(graph.unexplained_R).max() / abs(graph.value_R).max()),
        seconds=round(seconds, 2),
        query_key=scores,
        empty=empty,
    )
    return Measured(results, f"{_message(results)}; open {part_file(run, request.slug, '.html')}")


def explain_empty(graph: Graph, config: GraphConfig) -> str:
    """Return why pruning keeps no feature of a whole graph, and which flag to change."""
    thresholds = (config.node_threshold, config.edge_threshold, config.top_edges, config.min_weight)
    name = emptying_threshold(graph, *thresholds)
    field = dict(nodes="node_threshold", edges="edge_threshold").get(name, name)
    if not field:
        return "No feature is kept: none that was traced has a path to the answer; trace more by --graph.max_features."
    change = "lower it" if field == "min_weight" else "leave it out" if field == "top_edges" else "raise it"
    return (
        f"No feature is kept: --graph.{field}={getattr(config, field):g} drops all of them, or their edges, beside "
        f"errors and tokens; {change}."
    )


def trace_request(
    model: LanguageModel,
    dictionaries: LayerTranscoders | LayerSaes,
    request: Request,
    config: GraphConfig,
    on_progress: OnProgress = silent,
) -> Traced:
    """Return the graph of a prompt as a configuration wants it; ``on_progress`` as in ``trace_prompt``."""
    return trace_prompt(
        model,
        dictionaries,
        request.prompt,
        targets=_targets(model, request),
        max_logits=config.max_logits,
        max_features=config.max_features or None,
        chat=config.chat_template,
        on_progress=on_progress,
    )


def _message(results: GraphResults) -> str:
    """Return a graph's results in a line."""
    traced, empty = results.traced / max(results.active, 1), f". {results.empty}" if results.empty else ""
    return (
        f"{counted(results.active, 'active feature')}, {results.traced:,} traced in {results.seconds:.1f} s; kept "
        f"{counted(results.features, 'feature')}, {counted(results.errors, 'error')}, "
        f"{counted(results.edges, 'edge')}; replacement {results.scores.replacement:.2f}, "
        f"completeness {results.scores.completeness:.2f} with "
        f"{traced:.0%} of the active features traced ({results.untraced:.1%} untraced input){empty}"
    )
