"""Trace a prompt into an attribution graph.

``trace_prompt`` reads from top to bottom, in four phases that are logged with their times (absl's ``logging.info``):

1. The prompt is run. Its local replacement model holds what is frozen (``LocalModel``); with SAEs in place of
   transcoders, the run holds what they read (``SaeRun``).
2. The targets are chosen: logits, differences of logits, or directions (``read_targets``).
3. Rows are computed by pulling targets back to all sources, or from gradients (``gradient``): first the rows of
   readouts, then the rows of features, in rounds of the most influential ones so far (``attribute_in_rounds``).
4. The rows become a graph (``make_graph``).

Its memory is estimated before phase 1, and again before phase 3, when the features of the prompt are counted
(``check_memory``, ``check_gradient_memory``).

Rows. A row has a number for each source, and most sources of a long prompt are active features that never get a row:
1,024 tokens with 540 active features each have 550,000, which for 8,192 rows is 18 GB. So rows are whole only until
they have ``WHOLE`` numbers together. Then features keep a column if they have a row already or are among the most
influential so far, several times as many as rows are wanted; no other gets a row any more. What the features without a
column contribute to a row is kept as one sum. Errors, tokens and biases always have their columns.

Rankings. Influences are defined in ``graph.data``. Between two rounds they are looked for anew, while the devices
wait: so a row's weights are summed once, when it is written, and read only where it may have any, from features of
lower layers.

Memory. A graph is made in two parts, and the larger one counts: in the layers, each transcoder's encoder beside its
layer, with the activations of all its features; in the rows, the directions of the sources, batches of cotangents and
their products, and on the host the rows of the graph. The largest arrays that are alive at once are counted, so a run
may take a quarter more or less. Arrays are fp32.
"""

import bisect
import contextlib
import ctypes
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jax.sharding import Mesh

from saejax.arguments import check_classes
from saejax.attribution.graph import Graph
from saejax.attribution.graph.data import ERROR, FEATURE, LOGIT, TOKEN, Nodes, logit_weights, sweep
from saejax.attribution.local.dictionaries import READ_AT_ONCE, LayerSaes, LayerTranscoders
from saejax.attribution.local.model import AnySet, LocalModel, open_set
from saejax.attribution.local.rows import (
    WIDTH,
    Direction,
    Put,
    Readouts,
    RowTracer,
    Target,
    as_targets,
    batch_tokens,
    chunk_size,
    read_targets,
)
from saejax.attribution.local.state import AT_ONCE, PromptRun, padded, prompt_ids
from saejax.attribution.trace.gradient import GradientRows, SaeRun
from saejax.dictionaries import DictionaryConfig
from saejax.dictionaries.bos import follow_bos
from saejax.errors import UserError
from saejax.models.config import DecoderConfig
from saejax.models.language_model import LanguageModel
from saejax.models.parameters import parameter_table as model_table
from saejax.models.tokens import text_of, token_text
from saejax.parallel.mesh import free_bytes, free_host_bytes, part_size
from saejax.progress import OnProgress, show_progress, silent

# Writes the rows of some of the active features, or of the readouts (None), over all sources.
FillRows = Callable[[np.ndarray | None, Put], None]
PHASES = 4
WHOLE = 1 << 28  # numbers that whole rows may have together: 1 GiB
_SPARE = 4  # features with a column for each that gets a row
_LEAST = 1 << 15  # features with a column, at the least
_LEAST_ROWS = 256  # that are whole, at the least
_BLOCK = 1 << 20  # numbers that are copied at once
_IN_CACHE = 1 << 16  # numbers of rows that a ranking works on at once: they stay in a core's cache
ROUNDS, ROUND_ROWS = 4, 2048  # rankings, at the least, and features that are attributed between two, at the most
_FP32 = 4
_PROGRAMS = 400 * 2**20  # bytes of compiled programs and of compiling them, on the host
_ACTS_COPIES = 3  # activations of a layer: before and after the sparsity function, and masked
_SCORES_COPIES = 2.5  # attention weights, and what they are computed from


class Traced(NamedTuple):
    """A graph, the run of its prompt, and the readouts that it explains."""

    graph: Graph
    local: Any  #: a ``LocalModel``, or with SAEs a ``SaeRun``
    readouts: Readouts


@check_classes
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
            logits = len(targets) or max_logits
            check_gradient_memory(model, opened.check(model), len(ids_P), None, max_features, logits)
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
            check_gradient_memory(model, run.dictionaries, len(ids_P), len(run.active), max_features, len(readouts))
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
) -> "tuple[np.ndarray, RowStore]":
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

    def fill_rows(new_F: np.ndarray | None, start: int | None) -> None:
        put = store.put(start)

        def put_and_count(row_B: np.ndarray, value_BxS: np.ndarray) -> None:
            nonlocal done
            put(row_B, value_BxS)
            # Rows come from several threads, and a caller's progress is not made for that.
            with lock:
                done += len(row_B)
                on_progress(done, total)

        fill(new_F, put_and_count)
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
    store: "RowStore",
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


def columns_kept(rows: int, active: int, other_sources: int) -> int:
    """Return how many columns the rows have in the end.

    Args:
      rows: their number.
      active: number of active features.
      other_sources: number of sources that are no features.
    """
    if rows * (active + other_sources) <= WHOLE:
        return active + other_sources
    return min(active, max(_SPARE * rows, _LEAST)) + other_sources


class RowStore:
    """Rows of features, in the order in which they come, and rows of targets that are no features, which stand last.

    Args:
      count: features that get a row.
      targets: rows of targets that are no features, K.
      active: active features, which are the first of the sources.
      scored: number of sources, the first ones, that take part in influences.
      sources: their number S.

    Attributes:
      row_BxC: fp32 rows that there is room for, over the sources that have a column.
      column_C: which sources these are, ascending.
      dropped_R: fp32 sums over the sources that have none.
      size_R: float64 sums of absolute values over all scored sources.
    """

    def __init__(self, count: int, targets: int, active: int, scored: int, sources: int):
        self._count, self._targets, self._active, self._scored = count, targets, active, scored
        self._room = columns_kept(count + targets, active, sources - active)
        first = count if self._room == sources else min(count, max(WHOLE // sources - targets, _LEAST_ROWS))
        self.row_BxC = np.zeros((first + targets, sources), np.float32)
        self.column_C = np.arange(sources)
        self.dropped_R, self.size_R = np.zeros(count + targets, np.float32), np.empty(count + targets)
        self._left_X = np.empty(0, np.int64)

    def room(self, done: int) -> int:
        """Return how many feature rows still fit after ``done`` of them, before columns have to be given up."""
        return len(self.row_BxC) - self._targets - done

    def put(self, start: int | None) -> Put:
        """Return the writer of the rows from ``start`` on, or (None) of the rows that belong to no feature."""
        first = -self._targets if start is None else start

        def write(row_B: np.ndarray, value_BxS: np.ndarray) -> None:
            size_B = np.abs(value_BxS[:, : self._scored]).sum(axis=1, dtype=np.float64)
            self.size_R[first + row_B] = np.where(size_B > 0, size_B, 1.0)  # nothing to divide
            self._write(first + row_B, value_BxS)

        return write

    def _write(self, row_B: np.ndarray, value_BxS: np.ndarray) -> None:
        if not len(self._left_X):
            self.row_BxC[row_B] = value_BxS
            return
        self.row_BxC[row_B] = value_BxS[:, self.column_C]
        self.dropped_R[row_B] = value_BxS[:, self._left_X].sum(axis=1)

    def narrow(self, ranked_A: np.ndarray, done: int) -> None:
        """Give up columns of features, and make room for the remaining rows.

        Args:
          ranked_A: active features, first the features that are to keep their column.
          done: rows of features that there are.
        """
        old, sources = self.row_BxC, len(self.column_C)
        kept_S = np.ones(sources, bool)
        kept_S[: self._active] = False
        kept_S[ranked_A[: self._room - (sources - self._active)]] = True
        self.column_C, self._left_X = np.flatnonzero(kept_S), np.flatnonzero(~kept_S)
        self.row_BxC = np.zeros((self._count + self._targets, len(self.column_C)), np.float32)
        for row in (*range(done), *range(-self._targets, 0)):  # one by one: there is no room for copies
            self._write(np.array([row]), old[row][None])

    def sort(self, order_F: np.ndarray) -> None:
        """Reorder the rows of features in place: there is no room for a second copy.

        Args:
          order_F: which row comes to each place.
        """
        rows_FxC, step = self.row_BxC[: self._count], max(_BLOCK // self._count, 1)
        for start in range(0, rows_FxC.shape[1], step):
            columns = slice(start, start + step)
            rows_FxC[:, columns] = rows_FxC[order_F, columns]
        for values_R in (self.dropped_R, self.size_R):
            values_R[: self._count] = values_R[order_F]

    def leave_out(self, left_X: np.ndarray) -> None:
        """Drop columns when all rows are there, in place: there is no room for a second copy.

        Args:
          left_X: the places of features that go; ``dropped_R`` gets their contributions.
        """
        kept = np.delete(np.arange(len(self.column_C)), left_X)
        flat, width = self.row_BxC.reshape(-1), len(kept)
        for row, values in enumerate(self.row_BxC):  # where its new place ends, no row begins that is still to be read
            self.dropped_R[row] += values[left_X].sum()
            flat[row * width : (row + 1) * width] = values[kept]
        # refcheck=False: the loop's views of rows still exist, and are not used any more.
        self.row_BxC.resize((len(self.row_BxC), width), refcheck=False)
        self.column_C = self.column_C[kept]


def rank(store: RowStore, layer_A: np.ndarray, chosen_F: np.ndarray, weight_K: np.ndarray) -> np.ndarray:
    """Rank the active features that may get a row by their influence through features that have one, largest first.

    Args:
      store: the rows; the readouts' rows are there already.
      layer_A: layers of the active features.
      chosen_F: indices of the features that have a row, in the order of their rows.
      weight_K: weights of the readouts.
    """
    features = int(np.searchsorted(store.column_C, len(layer_A)))
    layer_C, column_F = layer_A[store.column_C[:features]], np.searchsorted(store.column_C, chosen_F)
    count, above, influence_C = len(chosen_F), 1 + int(layer_A.max(initial=0)), np.zeros(features)
    row_R = np.concatenate([np.arange(count), np.arange(-len(weight_K), 0)])  # the readouts' rows stand last

    def add(layer: int, targets: np.ndarray, passed_on: np.ndarray) -> None:
        rows, columns = row_R[targets], int(np.searchsorted(layer_C, layer))  # of lower layers
        factor_R, step = (passed_on / store.size_R[rows]).astype(np.float32), max(_IN_CACHE // max(columns, 1), 1)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            size_BxX = np.abs(store.row_BxC[rows[part], :columns])
            # Not ``@``: for so few numbers BLAS wakes threads, which then wait busily while the devices' work.
            influence_C[:columns] += np.einsum("b,bc->c", factor_R[part], size_BxX)

    layer_R = np.concatenate([layer_A[chosen_F], np.full(len(weight_K), above)])
    column_R = np.concatenate([column_F, np.full(len(weight_K), -1)])
    sweep(layer_R, column_R, np.concatenate([np.zeros(count), logit_weights(weight_K)]), influence_C, add)
    # Features that have a row come last: no other influence is below 0.
    influence_C[column_F] = -1
    return store.column_C[np.argsort(-influence_C, kind="stable")[: features - count]]


class Memory(NamedTuple):
    """Bytes on each device, and on the host beside them."""

    device: int
    host: int

    def fits(self, free: "Memory", mesh: Mesh) -> bool:
        """Return whether a need fits into what is free; CPU devices share the host's memory."""
        if mesh.devices.flat[0].platform == "cpu":
            return self.device * mesh.size + self.host <= free.host
        return self.device <= free.device and self.host <= free.host

    def describe(self, mesh: Mesh) -> str:
        """Return the amounts in words."""
        if mesh.devices.flat[0].platform == "cpu":
            return f"{(self.device * mesh.size + self.host) / 2**30:.1f} GiB"
        return f"{self.device / 2**30:.1f} GiB a device and {self.host / 2**30:.1f} on the host"


@dataclasses.dataclass(frozen=True)
class GraphSize:
    """The sizes that, with the number of tokens, determine the memory of a graph."""

    model: DecoderConfig  #: the decoder
    transcoder: DictionaryConfig  #: one of the set's, which all have one size
    active: float  #: active features of a layer at a position, mean
    max_features: int | None = None  #: maximum number of features with rows; None: all active ones
    logits: int = 10  #: maximum number of targets that are no features
    cross_layer: bool = False  #: whether features also write to later layers

    @property
    def writes(self) -> float:
        """Mean number of layers that a feature writes to."""
        return (self.model.n_layers + 1) / 2 if self.cross_layer else 1.0

    def active_features(self, tokens: int) -> int:
        """Return the active features of a prompt; its first position has none."""
        return int(self.active * self.model.n_layers * (tokens - 1))

    def traced(self, tokens: int) -> int:
        """Return the number of features with rows."""
        active = self.active_features(tokens)
        return min(self.max_features or active, active)


def certain_active(transcoder: DictionaryConfig) -> float:
    """Return the active features of a layer at a position that are certain before a prompt is run."""
    return transcoder.k if transcoder.kind == "topk" else 0.0


def estimate_memory(size: GraphSize, tokens: int, mesh: Mesh) -> Memory:
    """Return what a graph takes beside the model; see the top of this module.

    Args:
      size: of the graph.
      tokens: of the prompt, its special first one included.
      mesh: the devices.
    """
    model, length, width = size.model, padded(tokens), size.model.d_model
    features = size.transcoder.n_features
    active, traced = size.active_features(tokens), size.traced(tokens)
    has_bias = any("_bias" in name for name in model_table(model))
    streams = model.n_layers * width * ((4 if has_bias else 2) * length + (width if size.transcoder.skip else 0))
    heads = model.d_head * (2 * model.n_heads + 2 * model.n_kv_heads)
    inside = 6 * width + max(heads, (3 if model.gated else 2) * model.d_mlp)  # of a position in a layer
    attention = _SCORES_COPIES * model.n_heads * length**2

    # Layers: two encoders, the one that is left and the next; streams are copied when they are stacked.
    encoder = part_size(mesh.shape, (width, features), None, "model")
    acts = features * max(1, min(length, AT_ONCE // features))
    in_layer = 2 * encoder + _ACTS_COPIES * acts + inside * length + attention
    layers_device = streams + model.n_layers * length * width + in_layer
    layers_host = 2 * width * features + acts + 8 * active

    # Rows.
    directions, blocks = bank_sizes(size, tokens)
    positions = batch_tokens(mesh.devices.flat[0].platform, length)
    batch = positions * (2 * width + WIDTH * blocks / length) + inside * positions / 8 + attention
    at_once = 2 if mesh.size == 1 else 1
    rows_device = streams + part_size(mesh.shape, (width,), "model") * directions + at_once * batch
    sources = active + model.n_layers * (tokens + 2) + tokens
    entries = sources + active * (size.writes - 1)
    targets = traced + size.logits
    columns = columns_kept(targets, active, sources - active)
    # Rows are copied when columns are given up while they are computed.
    adjacency = targets * columns + (WHOLE if columns < sources else 0)
    encoders = width * (min(traced, ROUND_ROWS) if traced < active else traced)
    rows_host = adjacency + 2 * at_once * positions / length * entries + encoders
    rows_host += min(READ_AT_ONCE, width * directions)
    return Memory(int(_FP32 * max(layers_device, rows_device)), int(_FP32 * max(layers_host, rows_host)) + _PROGRAMS)


def bank_sizes(size: GraphSize, tokens: int) -> tuple[int, int]:
    """Return the rows of the table of directions of a graph's sources, and its blocks; see ``rows.SourceBank``."""
    layers, active = size.model.n_layers, size.active_features(tokens)
    of_features = min(active, layers * size.transcoder.n_features) * size.writes
    entries = active * size.writes + layers * (tokens + 2) + tokens
    # A block holds sources of one layer and position, and the last one of each is half empty.
    slots = entries + WIDTH // 2 * (layers + 1) * tokens
    return int(of_features + (2 * layers + 1) * padded(tokens)), int(-(-slots // WIDTH))


def return_freed() -> None:
    """Give freed memory back to the system: the C library keeps it, and a program's compiler has freed much of it.

    Only GNU's library can do this.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # TypeError: Windows has no such handle
        ctypes.CDLL(None).malloc_trim(0)


def free_memory(mesh: Mesh) -> Memory:
    """Return what is free now."""
    return Memory(free_bytes(mesh), free_host_bytes())


def check_memory(size: GraphSize, tokens: int, mesh: Mesh, make_room: Callable[[], None] | None = None) -> None:
    """Refuse a prompt whose graph does not fit into what is free now.

    Args:
      size: of the graph.
      tokens: of the prompt.
      mesh: the devices.
      make_room: called where it does not fit, to free what can be read again; None: nothing can.

    Raises:
      UserError: it does not fit; the message says first how many tokens would.
    """
    free, need = free_memory(mesh), estimate_memory(size, tokens, mesh)
    if make_room and not need.fits(free, mesh):
        make_room()
        free = free_memory(mesh)
    if need.fits(free, mesh):
        return
    # A longer prompt takes more.
    lengths = range(2, size.model.context + 1)
    limit = 1 + bisect.bisect(lengths, 0, key=lambda length: not estimate_memory(size, length, mesh).fits(free, mesh))
    fitting = f"about {limit:,} tokens fit" if limit > 1 else "no prompt fits"
    fewer = f", or trace fewer features than {size.traced(tokens):,} (max_features)" if size.traced(tokens) else ""
    raise UserError(
        f"{fitting} into the memory that is free, {free.describe(mesh)}, and the prompt has {tokens:,} tokens, whose "
        f"graph would take {need.describe(mesh)}: shorten it{fewer}"
    )


def estimate_prompt_memory(model: LanguageModel, saes: LayerSaes, tokens: int) -> Memory:
    """Return what the run of a prompt with SAEs takes beside the model: one SAE after the other reads its site.

    Args:
      model: the language model.
      saes: of some of its sites.
      tokens: of the prompt.
    """
    length, width, features = padded(tokens), model.config.d_model, max(config.n_features for config in saes.configs)
    # The values at all layers of each kind of site come from one program.
    values = len({"resid_pre", *(site.kind for site in saes.sites)}) * model.config.n_layers * length * width
    acts = features * max(1, min(length, AT_ONCE // features))
    attention = _SCORES_COPIES * model.config.n_heads * length**2
    device = values + 2 * width * features + _ACTS_COPIES * acts + attention
    return Memory(int(_FP32 * device), _FP32 * (acts + len(saes.sites) * length * width))


def estimate_gradient_memory(
    model: LanguageModel, saes: LayerSaes, tokens: int, active: int, features: int, logits: int
) -> Memory:
    """Return what the rows of a graph with SAEs take beside the model and the run of the prompt.

    Args:
      model: the language model.
      saes: of some of its sites.
      tokens: of the prompt.
      active: number of its active features.
      features: number of features with rows.
      logits: number of targets that are no features.
    """
    mesh, sites, length, width = model.mesh, len(saes.sites), padded(tokens), model.config.d_model
    batch = chunk_size(mesh.devices.flat[0].platform, length, mesh)
    at_once = 2 if mesh.size == 1 else 1
    others, targets = (sites + 1) * tokens + sites, features + logits
    columns = columns_kept(targets, active, others)
    adjacency = targets * columns + (WHOLE if columns < active + others else 0)
    # Gradients at all sites and the tokens: on the devices, on the host, and stacked there; then their products.
    gradients = (sites + 2) * batch * length * width
    table = min(active, sum(config.n_features for config in saes.configs)) * width
    encoders = width * min(features, ROUND_ROWS if features < active else features)
    host = adjacency + table + encoders + at_once * (2 * gradients + 2 * batch * (active + others))
    return Memory(int(_FP32 * at_once * gradients), int(_FP32 * host))


def check_gradient_memory(
    model: LanguageModel, saes: LayerSaes, tokens: int, active: int | None, max_features: int | None, logits: int
) -> None:
    """Refuse a prompt whose graph with SAEs does not fit into what is free now.

    Args:
      model: the language model.
      saes: of some of its sites.
      tokens: of the prompt.
      active: number of its active features; None: it is yet to be run, and those of ``certain_active`` count.
      max_features: maximum number of features with rows; None: all active ones.
      logits: number of targets that are no features.

    Raises:
      UserError: its run or its rows do not fit.
    """
    mesh, needs = model.mesh, list[Memory]()
    if active is None:
        needs.append(estimate_prompt_memory(model, saes, tokens))
        active = int(sum(map(certain_active, saes.configs)) * (tokens - 1))  # of the first position, often a sink, none
    features = min(max_features or active, active)
    needs.append(estimate_gradient_memory(model, saes, tokens, active, features, logits))
    free, need = free_memory(mesh), Memory(*map(max, zip(*needs, strict=True)))
    if not need.fits(free, mesh):
        fewer = f", or trace fewer features than {features:,} (max_features)" if features else ""
        raise UserError(
            f"the graph would take {need.describe(mesh)}, and {free.describe(mesh)} is free: shorten the prompt of "
            f"{tokens:,} tokens{fewer}"
        )
