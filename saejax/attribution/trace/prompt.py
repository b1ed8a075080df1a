"""Trace a prompt into an attribution graph.

``trace_prompt`` reads from top to bottom, in four phases that are logged with their times (absl's ``logging.info``):

1. The prompt is run. Its local replacement model holds what is frozen (``LocalModel``); with SAEs in place of
   transcoders, the run holds what they read (``SaeRun``).
2. The targets are chosen: logits, differences of logits, or directions (``read_targets``).
3. Rows are computed by pulling targets back to all sources, or from gradients (``gradient``): first the rows of
   readouts, then the rows of features, in rounds of the most influential ones so far (``attribute_in_rounds``).
4. The rows become a graph (``make_graph``).

Its memory is estimated before phase 1, and again before phase 3, when the features of the prompt are counted
(``memory``).
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import ERROR, FEATURE, LOGIT, TOKEN, Nodes
from saejax.attribution.local.dictionaries import LayerSaes
from saejax.attribution.local.model import AnySet, LocalModel, open_set
from saejax.attribution.local.prompt_run import PromptRun, prompt_ids
from saejax.attribution.local.readouts import Direction, Readouts, Target, as_targets, read_targets
from saejax.attribution.local.rows import Put, RowTracer
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.attribution.trace.gradient import GradientRows, SaeRun
from saejax.attribution.trace.memory import (
    GraphSize,
    certain_active,
    check_gradient_memory,
    check_memory,
    return_freed,
)
from saejax.attribution.trace.row_store import ROUND_ROWS, ROUNDS, RowStore, rank
from saejax.dictionaries.bos import follow_bos
from saejax.errors import UserError
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import text_of, token_text
from saejax.progress import OnProgress, show_progress, silent

# Writes the rows of some of the active features, or of the readouts (None), over all sources.
FillRows = Callable[[np.ndarray | None, Put], None]
PHASES = 4


class Traced(NamedTuple):
    """A graph, the run of its prompt, and the readouts that it explains."""

    graph: Graph
    local: Any  #: a ``LocalModel``, or with SAEs a ``SaeRun``
    readouts: Readouts


def trace(
    model: LanguageModel,
    dictionaries: AnySet | LayerSaes,
    prompt: str | Sequence[int],
    *,
    targets: Sequence[Target] | str | int | Direction = (),
    max_logits: int = 10,
    logit_mass: float = 0.95,
    max_features: int | None = None,
    chat: bool = False,
    on_progress: OnProgress | None = None,
) -> Graph:
    """Return the attribution graph of a prompt; for arguments and errors see ``trace_prompt``.

    Args:
      model: the language model.
      dictionaries: a transcoder for each layer; or SAEs of some, from ``open_saes``: edges are then estimates.
      prompt: the text, or its token ids.
      targets: what is explained; (): the most probable next tokens.
      max_logits: maximum number of next tokens.
      logit_mass: probability, 0 to 1, that these have together.
      max_features: maximum number of features with rows, the most influential ones; None: all.
      chat: whether the prompt is put into the tokenizer's chat template.
      on_progress: takes the rows that are done and all; None: a bar, where somebody looks on.
    """
    options: dict[str, Any] = dict(max_logits=max_logits, logit_mass=logit_mass, max_features=max_features, chat=chat)
    with show_progress("trace") as bar:
        return trace_prompt(
            model, dictionaries, prompt, targets=targets, on_progress=on_progress or bar, **options
        ).graph


def trace_prompt(
    model: LanguageModel,
    dictionaries: AnySet | LayerSaes,
    prompt: str | Sequence[int],
    *,
    targets: Sequence[Target] | str | int | Direction = (),
    max_logits: int = 10,
    logit_mass: float = 0.95,
    max_features: int | None = None,
    chat: bool = False,
    on_progress: OnProgress = silent,
) -> Traced:
    """Trace a prompt.

    Args:
      model: the language model.
      dictionaries: a transcoder for each layer: an open set, dictionaries in memory, or what ``open_transcoders``
        opens; or SAEs of some layers, whose features are used at all positions but attention sinks.
      prompt: the text, which begins as the dictionaries' training texts (``follow_bos``), or its token ids, which
        are taken as they are. At the first position no feature of a transcoder is used.
      targets: what is explained: a token, as its id or a text; or several; pairs of them, for the difference of their
        logits; or a ``Direction`` of the stream, by its name. (): the most probable next tokens.
      max_logits: maximum number of tokens that are explained, if no targets are named; 1 or more.
      logit_mass: the smallest set of most probable tokens with this total probability is explained, 0 to 1.
      max_features: maximum number of features with nodes, the most influential ones; None: all active ones.
      chat: put a text into the tokenizer's chat template, as a user's turn.
      on_progress: called with the rows of the graph that are done and of all; may raise to stop.

    Returns:
      The whole graph, the run of the prompt, and the targets.

    Raises:
      UserError: dictionaries, model, prompt or targets do not go together, or the graph does not fit into the free
        memory; the message says why.
    """
    if max_features is not None and (not isinstance(max_features, Integral) or max_features < 1):
        raise UserError(f"max_features is {max_features}: expected 1 or more, or None for all")
    is_share = isinstance(logit_mass, Real) and 0 <= logit_mass <= 1
    if not isinstance(max_logits, Integral) or max_logits < 1 or not is_share:
        raise UserError(
            f"max_logits is {max_logits} and logit_mass {logit_mass}: expected 1 or more, and a probability, 0 to 1"
        )
    targets = as_targets(targets)
    settings: dict[str, Any] = dict(max_logits=max_logits, logit_mass=logit_mass, max_features=max_features)
    opened = dictionaries if isinstance(dictionaries, LayerSaes) else open_set(dictionaries)
    model = follow_bos(model, opened.configs)
    ids_P = prompt_ids(model, prompt, chat)
    with _phase(1, f"the prompt of {len(ids_P):,} tokens is run"):
        if isinstance(opened, LayerSaes):
            run: LocalModel | SaeRun = SaeRun.of(model, opened, ids_P)
            kind = "direct" if opened.direct else "total"
            settings["edges"] = f"{kind} {opened.estimate} x activation, first-order estimates"
        else:
            run = _run_in_memory(model, opened, ids_P, max_features, len(targets) or max_logits)
    with _phase(2, "targets are read"):
        readouts = read_targets(run, targets, max_logits, logit_mass)
    count = min(max_features or len(run.active), len(run.active))
    with _phase(3, f"rows of {len(readouts):,} targets and {count:,} of {len(run.active):,} active features"):
        if isinstance(run, SaeRun):
            check_gradient_memory(run, count, len(readouts))
            gradient_rows = GradientRows(run, readouts)
            fill: FillRows = gradient_rows
            nodes = gradient_rows.nodes
        else:
            fill, nodes = _pull_back(run, readouts, count), run.sources.nodes
        chosen_F, store = attribute_in_rounds(run, nodes, readouts, fill, count, on_progress)
    with _phase(4, "the rows become a graph"):
        graph = make_graph(run, nodes, readouts, chosen_F, store, prompt, settings)
    return Traced(graph, run, readouts)


@contextlib.contextmanager
def _phase(number: int, what: str) -> Iterator[None]:
    """Log that a phase of a trace begins, and how long it took; it begins with all freed memory given back."""
    logging.info("trace, phase %d of %d: %s", number, PHASES, what)
    start = time.monotonic()
    return_freed()
    yield
    logging.info("trace, phase %d of %d took %.2f s", number, PHASES, time.monotonic() - start)


def _run_in_memory(
    model: LanguageModel, dictionaries: LayerTranscoders, ids_P: np.ndarray, max_features: int | None, logits: int
) -> LocalModel:
    """Return the local model; memory is checked before it is made, and again when its features are counted."""
    dictionaries.check(model)
    config, first = model.config, dictionaries.configs[0]

    def check(active: float) -> None:
        """Check the memory with so many active features of a layer at a position, without the encoders if need be."""
        size = GraphSize(config, first, active, max_features, logits, dictionaries.cross_layer)
        check_memory(size, len(ids_P), model.mesh, dictionaries.forget)

    check(certain_active(first))
    local = LocalModel(model, dictionaries, ids_P)
    # The features of this prompt, counted, in place of the number that was certain before.
    check(len(local.active) / (config.n_layers * (len(ids_P) - 1)))
    return local


def _pull_back(local: LocalModel, readouts: Readouts, count: int) -> FillRows:
    """Return what pulls readouts, and ``count`` features, back to all sources."""
    rows, active = RowTracer(local, local.sources, count + len(readouts)), local.active
    top_K = np.full(len(readouts), local.model.config.n_layers, np.int32)

    def fill(new_F: np.ndarray | None, put: Put) -> None:
        if new_F is None:
            rows(top_K, np.full_like(top_K, len(local.ids_P) - 1), readouts.vector_KxD, put, in_stream=True)
        else:
            rows(active.layer_A[new_F], active.position_A[new_F], local.encoder_rows(new_F), put)

    return fill


def attribute_in_rounds(
    run: PromptRun, nodes: Nodes, readouts: Readouts, fill: FillRows, count: int, on_progress: OnProgress = silent
) -> tuple[np.ndarray, RowStore]:
    """Attribute the logits and the features that get nodes, in rounds: in each the most influential ones so far.

    The first ranking sees what acts on the logits directly, the later ones also what acts through the features that
    have rows by then: of the 64 truly most influential features of a small model's graph four rounds find 59, one 47.

    Args:
      run: of the prompt.
      nodes: the S sources; active features come first, sources without a part in influences last.
      readouts: the targets.
      fill: gives rows over all sources, of features, or (None) of the readouts.
      count: number of features that get nodes.
      on_progress: called with the rows done and of all, from one thread at a time; may raise to stop.

    Returns:
      Which of the active features these are, ascending; and their rows.
    """
    active, total, lock = run.active, count + len(readouts), threading.Lock()
    scored = int(np.isin(nodes.kind_N, (FEATURE, ERROR, TOKEN)).sum())
    store, done = RowStore(count, len(readouts), len(active), scored, len(nodes)), 0

    def counted(put: Put) -> Put:
        def write(row_B: np.ndarray, value_BxS: np.ndarray) -> None:
            nonlocal done
            put(row_B, value_BxS)
            # Rows come from several threads, and a caller's progress is not made for that.
            with lock:
                done += len(row_B)
                on_progress(done, total)

        return write

    def fill_rows(new_F: np.ndarray | None, start: int | None) -> None:
        fill(new_F, counted(store.put(start)))
        return_freed()  # what compiling took would else stay beside the rows, which become more

    fill_rows(None, None)
    chosen = np.empty(0, np.int64)
    while len(chosen) < count:
        # Where all get rows, their order does not matter.
        new = np.arange(count)
        if count < len(active):
            ranked = rank(store, active.layer_A, chosen, readouts.weight_K)
            # Only once the memory of whole rows is full: a column that is given up does not come back.
            if not store.room(len(chosen)):
                store.narrow(np.concatenate([chosen, ranked]), len(chosen))
            new = ranked[: min(-(-count // ROUNDS), ROUND_ROWS, store.room(len(chosen)))]
        logging.info("trace: %d of %d features have rows, the next %d are pulled back", len(chosen), count, len(new))
        fill_rows(new, len(chosen))
        chosen = np.concatenate([chosen, new])
    # In the order of the active features, which the nodes have, too.
    order = np.argsort(chosen)
    if count < len(active):
        store.sort(order)
        # Features that got no row have no column: what they contribute becomes one number of each row.
        store.leave_out(np.flatnonzero((store.column_C < len(active)) & ~np.isin(store.column_C, chosen)))
    return chosen[order], store


def make_graph(
    run: PromptRun,
    nodes: Nodes,
    readouts: Readouts,
    chosen_F: np.ndarray,
    store: RowStore,
    prompt: str | Sequence[int],
    settings: Mapping[str, Any],
) -> Graph:
    """Return the graph of the rows.

    Args:
      run: of the prompt.
      nodes: the sources.
      readouts: what is explained.
      chosen_F: places in ``run.active`` of the features with a row, ascending.
      store: the rows.
      prompt: the text, or the token ids.
      settings: how the graph was made.
    """
    active, model = run.active, run.model
    text, source = token_text(model.tokenizer), model.source
    # The difference of two logits has no token of its own.
    token_K = np.where(readouts.pair_Kx2[:, 1] < 0, readouts.pair_Kx2[:, 0], -1)
    of_logits = Nodes.of(LOGIT, model.config.n_layers, len(run.ids_P) - 1, token_K, readouts.weight_K)
    return Graph(
        adjacency_RxS=store.row_BxC,
        nodes=Nodes.joined(nodes[store.column_C], of_logits),
        value_R=np.concatenate([active.value_A[chosen_F], readouts.value_K]),
        constant_R=np.concatenate([run.constants(chosen_F), readouts.constant_K]),
        untraced_R=store.dropped_R,
        ids_P=run.ids_P,
        tokens=tuple(text(int(token)) for token in run.ids_P),
        logit_K=readouts.logit_K,
        labels=readouts.labels,
        prompt=prompt if isinstance(prompt, str) else text_of(model.tokenizer, run.ids_P),
        n_layers=model.config.n_layers,
        model=dict(
            name=source.name, revision=source.revision, fingerprint=source.fingerprint, family=model.config.family
        ),
        transcoders=run.dictionaries.describe(),
        settings=dict(
            settings,
            active_features=len(active),
            traced_features=len(chosen_F),
            targets=readouts.pair_Kx2.tolist(),
        ),
    )
