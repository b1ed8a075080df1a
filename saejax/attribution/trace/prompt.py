"""From a prompt to its attribution graph."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saejax.attribution.graph import pruning
from saejax.attribution.graph.graph import LOGIT, Graph, Nodes
from saejax.attribution.local.replacement import Replacement
from saejax.attribution.local.transcoders import TranscoderSet, open_transcoders
from saejax.attribution.trace.memory import GraphSize, certain_active, check_room
from saejax.attribution.trace.row_store import Put, RowStore
from saejax.attribution.trace.rows import Rows
from saejax.attribution.trace.sources import Sources
from saejax.attribution.trace.targets import PromptRun, Readouts, Target, read_targets
from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import Tokens, token_text

# Writes the rows of some of the active features, or of the readouts (None), over all sources.
FillRows = Callable[[np.ndarray | None, Put], None]


class Traced(NamedTuple):
    """A graph, the replacement model that it is of, and what it explains."""

    graph: Graph
    replacement: Replacement
    readouts: Readouts


def trace(
    model: LanguageModel,
    transcoders: TranscoderSet | Sequence[Dictionary] | str | Path,
    prompt: str | Sequence[int],
    **options: Any,
) -> Graph:
    """The attribution graph of a prompt: that of ``trace_prompt``, which has the same arguments."""
    return trace_prompt(model, transcoders, prompt, **options).graph


def trace_prompt(
    model: LanguageModel,
    transcoders: TranscoderSet | Sequence[Dictionary] | str | Path,
    prompt: str | Sequence[int],
    *,
    targets: Sequence[Target] = (),
    max_logits: int = 10,
    logit_mass: float = 0.95,
    max_features: int | None = None,
    bias_nodes: bool = True,
    prepend: bool = True,
    round_rows: int = 2048,
) -> Traced:
    """Traces a prompt.

    Args:
      model: the language model.
      transcoders: one for each layer: an open set, dictionaries in memory, or what ``open_transcoders`` opens.
      prompt: the text, or its token ids, which are taken as they are.
      targets: what is explained: tokens, as ids or texts of one token; pairs of them, for the difference of their
        logits; ``Direction``s. None: the most probable next tokens.
      max_logits, logit_mass: of the most probable tokens as few as have this probability together, at most so many.
      max_features: most features that get nodes, the most influential ones; None: all active ones.
      bias_nodes: whether biases, and the MLP's output at the first position, get nodes, so that sums are complete.
      prepend: put the tokenizer's first special token before a text that begins with none. At the first position no
        feature is used.
      round_rows: with ``max_features``, features that are attributed between two rankings.

    Raises:
      UserError: set, model, prompt or targets do not go together, or the graph does not fit into the free memory; the
        message says why.
    """
    if isinstance(transcoders, str | Path):
        transcoders = open_transcoders(transcoders)
    elif not isinstance(transcoders, TranscoderSet):
        transcoders = TranscoderSet.of(transcoders)
    check_max_features(max_features)
    ids_P = prompt_ids(model, prompt, prepend)
    transcoders.check(model)
    size = GraphSize(
        model.config,
        transcoders.configs[0],
        certain_active(transcoders.configs[0]),
        max_features,
        logits=len(targets) or max_logits,
    )
    check_room(size, len(ids_P), model.mesh)
    replacement = Replacement.of(model, transcoders, ids_P)
    density = len(replacement.active) / (model.config.n_layers * (len(ids_P) - 1))
    check_room(dataclasses.replace(size, active=density), len(ids_P), model.mesh)
    readouts = read_targets(replacement, targets, max_logits, logit_mass)
    sources = Sources.of(replacement, bias_nodes)
    active = replacement.active
    count = min(max_features or len(active), len(active))
    rows = Rows(replacement, sources, count + len(readouts.labels))

    def fill(new_F: np.ndarray | None, put: Put) -> None:
        if new_F is None:
            rows(readouts.layer_K, readouts.position_K, readouts.vector_KxD, put, in_stream=True)
        else:
            rows(active.layer_A[new_F], active.position_A[new_F], replacement.encoder_rows(new_F), put)

    chosen_F, store = attributed(replacement, len(sources.nodes), readouts, fill, count, round_rows)
    settings = dict(max_logits=max_logits, logit_mass=logit_mass, max_features=max_features)
    graph = graph_of(replacement, sources.nodes, readouts, chosen_F, store, prompt, settings)
    return Traced(graph, replacement, readouts)


def prompt_ids(model: LanguageModel, prompt: str | Sequence[int], prepend: bool) -> np.ndarray:
    """Token ids of a prompt, int32 [P]; see ``trace``.

    Raises:
      UserError: there are none, more than the model reads, or one that it does not know.
    """
    if not len(prompt):
        raise UserError("the prompt is empty: expected a text, or token ids")
    if not isinstance(prompt, str):
        ids_P = np.asarray(prompt, np.int32).reshape(-1)
    else:
        ids_P = model.tokenize([prompt]).ids_BxT[0]
        tokenizer = model.tokenizer
        first = [tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id]
        first = [token for token in first if token is not None]
        if prepend and first and not set(ids_P[:1].tolist()) & set(tokenizer.all_special_ids):
            ids_P = np.concatenate([first[:1], ids_P]).astype(np.int32)
    Tokens(ids_P[None], np.array([len(ids_P)], np.int32)).check(model.config.vocab, model.config.context)
    return ids_P


def check_max_features(max_features: int | None) -> None:
    """A ``UserError`` unless it is None or a number of features."""
    if max_features is not None and max_features < 1:
        raise UserError(f"max_features is {max_features}: expected 1 or more")


def attributed(
    run: PromptRun, sources: int, readouts: Readouts, fill: FillRows, count: int, round_rows: int
) -> tuple[np.ndarray, RowStore]:
    """Attributes the logits and the features that get nodes, in rounds: in each the most influential ones so far.

    Args:
      sources: their number S; active features come first.
      fill: gives rows over all sources, of features, or (None) of the readouts.
      count: number of features that get nodes.
      round_rows: features that are attributed between two rankings.

    Returns:
      Which of the active features these are, ascending; and their rows.
    """
    active = run.active
    store = RowStore(count, len(readouts.labels), len(active), sources)
    fill(None, store.put(None))
    chosen_F = np.empty(0, np.int64)
    while len(chosen_F) < count:
        new_F = np.arange(count)
        if count < len(active):
            ranked_F = _most_influential(run, readouts, store, chosen_F)
            if not store.room(len(chosen_F)):
                store.narrow(np.concatenate([chosen_F, ranked_F]), len(chosen_F))
            new_F = ranked_F[: min(round_rows, store.room(len(chosen_F)))]
        fill(new_F, store.put(len(chosen_F)))
        chosen_F = np.concatenate([chosen_F, new_F])
    order_F = np.argsort(chosen_F)
    if count < len(active):
        store.sort(order_F)
    return chosen_F[order_F], store


def _most_influential(run: PromptRun, readouts: Readouts, store: RowStore, chosen_F: np.ndarray) -> np.ndarray:
    """The features that may get a row, by their influence through those that have one, the largest first."""
    active, logits = run.active, len(readouts.labels)
    rows = store.row_TxC
    layer_T = np.zeros(len(rows), np.int32)
    column_T, weight_T = np.full(len(rows), -1), np.zeros(len(rows))
    layer_T[: len(chosen_F)] = active.layer_A[chosen_F]
    column_T[: len(chosen_F)] = np.searchsorted(store.column_C, chosen_F)
    layer_T[-logits:], weight_T[-logits:] = run.model.config.n_layers, readouts.weight_K
    influence_C = pruning.influence(rows, layer_T, column_T, weight_T, store.size_T[: len(rows)])
    features = np.searchsorted(store.column_C, len(active))
    influence_C[column_T[: len(chosen_F)]] = -1
    order_C = np.argsort(-influence_C[:features], kind="stable")[: features - len(chosen_F)]
    return store.column_C[order_C]


def graph_of(
    run: PromptRun,
    nodes: Nodes,
    readouts: Readouts,
    chosen_F: np.ndarray,
    store: RowStore,
    prompt: str | Sequence[int],
    settings: dict[str, Any],
) -> Graph:
    """The graph of the rows, with the columns of the features that have one; ``nodes`` are the sources."""
    active, model = run.active, run.model
    adjacency_TxS, nodes, unkept_T = store.row_TxC, nodes[store.column_C], store.dropped_T
    if len(chosen_F) < len(active):
        dropped_C = (store.column_C < len(active)) & ~np.isin(store.column_C, chosen_F)
        unkept_T = unkept_T + adjacency_TxS[:, dropped_C].sum(axis=1)
        adjacency_TxS, nodes = adjacency_TxS[:, ~dropped_C], nodes[~dropped_C]
    text = token_text(model.tokenizer)
    of_logits = Nodes.of(LOGIT, model.config.n_layers, readouts.position_K, readouts.token_K, readouts.weight_K)
    return Graph(
        adjacency_TxS=adjacency_TxS,
        nodes=Nodes.joined(nodes, of_logits),
        value_T=np.concatenate([active.value_A[chosen_F], readouts.value_K]),
        constant_T=np.concatenate([run.constants(chosen_F), readouts.constant_K]),
        unkept_T=unkept_T,
        ids_P=run.ids_P,
        tokens=tuple(text(int(token)) for token in run.ids_P),
        logit_K=readouts.logit_K,
        labels=readouts.labels,
        prompt=prompt if isinstance(prompt, str) else str(model.tokenizer.decode(run.ids_P)),
        n_layers=model.config.n_layers,
        model=dict(
            name=model.source.name, revision=model.source.revision, fingerprint=model.source.fingerprint,
            family=model.config.family,
        ),
        transcoders=run.dictionaries.describe(),
        settings=settings | dict(active_features=len(active)),
    )  # fmt: skip
