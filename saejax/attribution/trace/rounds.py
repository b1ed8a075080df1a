"""Tracing in rounds: choose features, compute their rows, and build the graph."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import ERROR, FEATURE, LOGIT, TOKEN, Nodes
from saejax.attribution.local.prompt_run import PromptRun
from saejax.attribution.local.readouts import Readouts
from saejax.attribution.local.rows import Put
from saejax.attribution.trace.ranking import Ranking
from saejax.attribution.trace.row_store import RowStore
from saejax.models.tokens import token_text
from saejax.runner.parts import OnProgress, silent

# Writes the rows of some of the active features, or of the readouts (None), over all sources.
FillRows = Callable[[np.ndarray | None, Put], None]
AnyRun = TypeVar("AnyRun", bound=PromptRun)

ROUNDS, ROUND_ROWS = 4, 2048  # rankings, at the least, and features that are attributed between two, at the most


class Traced(NamedTuple, Generic[AnyRun]):
    """A graph, the run of the prompt that it is of, and what it explains."""

    graph: Graph
    local: AnyRun
    readouts: Readouts


def attribute_in_rounds(
    run: PromptRun, nodes: Nodes, readouts: Readouts, fill: FillRows, count: int, on_progress: OnProgress = silent
) -> tuple[np.ndarray, RowStore]:
    """Attribute the logits and the features that get nodes, in rounds: in each the most influential ones so far.

    The first ranking sees what acts on the logits directly, the later ones also what acts through the features that
    have rows by then: of the 64 truly most influential features of a small model's graph four rounds find 59, one 47.

    Args:
      run: of the prompt.
      nodes: the S sources; active features come first, those that take no part in influences last.
      readouts: the targets.
      fill: gives rows over all sources, of features, or (None) of the readouts.
      count: number of features that get nodes.
      on_progress: called with the rows done and of all, from one thread at a time; may raise to stop.

    Returns:
      Which of the active features these are, ascending; and their rows.
    """
    active, total, lock = run.active, count + len(readouts.labels), threading.Lock()
    store = RowStore(count, len(readouts.labels), len(active), len(nodes))
    done = 0

    def counted(put: Put) -> Put:
        def write(row_B: np.ndarray, value_BxS: np.ndarray) -> None:
            nonlocal done
            put(row_B, value_BxS)
            # Rows come from several threads, and a caller's progress is not made for that.
            with lock:
                done += len(row_B)
                on_progress(done, total)

        return write

    fill(None, counted(store.put(None)))
    scored = int(np.isin(nodes.kind_N, (FEATURE, ERROR, TOKEN)).sum())
    ranking, chosen = Ranking(run, readouts, store, scored), np.empty(0, np.int64)
    while len(chosen) < count:
        # Where all get rows, their order does not matter.
        new = np.arange(count)
        if count < len(active):
            ranked = ranking(chosen)
            # Only once the memory of whole rows is full: a column that is given up does not come back.
            if not store.room(len(chosen)):
                store.narrow(np.concatenate([chosen, ranked]), len(chosen))
            new = ranked[: min(-(-count // ROUNDS), ROUND_ROWS, store.room(len(chosen)))]
        fill(new, counted(store.put(len(chosen))))
        chosen = np.concatenate([chosen, new])
    # In the order of the active features, which is that of the nodes.
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
    of_logits = Nodes.of(LOGIT, model.config.n_layers, readouts.position_K, readouts.token_K, readouts.weight_K)
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
        prompt=prompt if isinstance(prompt, str) else str(model.tokenizer.decode(run.ids_P)),
        n_layers=model.config.n_layers,
        model=dict(
            name=source.name, revision=source.revision, fingerprint=source.fingerprint, family=model.config.family
        ),
        transcoders=run.dictionaries.describe(),
        settings=dict(settings, active_features=len(active), traced_features=len(chosen_F)),
    )
