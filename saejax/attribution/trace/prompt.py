"""Trace a prompt into an attribution graph.

1. The model is run once. Its local replacement model holds what is frozen (``LocalModel``); with SAEs in place of
   transcoders, the run holds what they read (``SaeRun``).
2. The targets are chosen: logits, differences of logits, or directions (``read_targets``).
3. Rows are computed by pulling targets back to all sources, or from gradients (``gradient``): first the rows of
   readouts, then the rows of features, in rounds of the most influential ones so far (``attribute_in_rounds``).

Its memory is estimated before the work starts, and again when the features of the prompt are counted
(``check_memory``). A graph is made in two phases, and the larger one counts: in the layers, each transcoder's encoder
beside its layer, with the activations of all its features; in the rows, the directions of the sources, batches of
cotangents and their products, and on the host the rows of the graph. The largest arrays that are alive at once are
counted, so a run may take a quarter more or less. Arrays are fp32.
"""

import bisect
import dataclasses
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import psutil
from jax.sharding import Mesh

from saejax.attribution.graph import Graph
from saejax.attribution.local.dictionaries import READ_AT_ONCE, LayerSaes
from saejax.attribution.local.model import AnySet, LocalModel, open_set
from saejax.attribution.local.prompt_run import AT_ONCE, prompt_ids
from saejax.attribution.local.readouts import Direction, Readouts, Target, padded, read_targets
from saejax.attribution.local.rows import TOKENS, Put, RowTracer, batch_tokens
from saejax.attribution.local.sources import WIDTH
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.attribution.trace.gradient import GradientRows, SaeRun
from saejax.attribution.trace.rounds import (
    ROUND_ROWS,
    WHOLE,
    FillRows,
    Traced,
    attribute_in_rounds,
    columns_kept,
    make_graph,
)
from saejax.dictionaries import DictionaryConfig
from saejax.dictionaries.bos import follow_bos
from saejax.errors import UserError
from saejax.models.config import DecoderConfig
from saejax.models.language_model import LanguageModel
from saejax.models.parameters import parameter_table as model_table
from saejax.parallel.mesh import document_devices, free_bytes, part_size
from saejax.progress import OnProgress, show_progress, silent

_FP32 = 4
_PROGRAMS = 400 * 2**20  # bytes of compiled programs and of compiling them, on the host
_ACTS_COPIES = 3  # activations of a layer: before and after the sparsity function, and masked
_SCORES_COPIES = 2.5  # attention weights, and what they are computed from


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
    """Return the rows of the table of directions of a graph's sources, and its blocks; see ``sources.SourceBank``."""
    layers, active = size.model.n_layers, size.active_features(tokens)
    of_features = min(active, layers * size.transcoder.n_features) * size.writes
    entries = active * size.writes + layers * (tokens + 2) + tokens
    # A block holds sources of one layer and position, and the last one of each is half empty.
    slots = entries + WIDTH // 2 * (layers + 1) * tokens
    return int(of_features + (2 * layers + 1) * padded(tokens)), int(-(-slots // WIDTH))


def free_memory(mesh: Mesh) -> Memory:
    """Return what is free now."""
    return Memory(free_bytes(mesh), psutil.virtual_memory().available)


def check_memory(size: GraphSize, tokens: int, mesh: Mesh) -> None:
    """Refuse a prompt whose graph does not fit into what is free now.

    Raises:
      UserError: it does not fit; the message says first how many tokens would.
    """
    free, need = free_memory(mesh), estimate_memory(size, tokens, mesh)
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
    if max_logits < 1 or not 0 <= logit_mass <= 1:
        raise UserError(
            f"max_logits is {max_logits} and logit_mass {logit_mass}: expected 1 or more, and a probability, 0 to 1"
        )
    # A text is one token, not one for each of its letters.
    targets = [targets] if isinstance(targets, str | int | Direction) else list(targets)
    settings: dict[str, Any] = dict(max_logits=max_logits, logit_mass=logit_mass, max_features=max_features)
    # 1. The run.
    opened = dictionaries if isinstance(dictionaries, LayerSaes) else open_set(dictionaries)
    model = follow_bos(model, opened.configs)
    ids_P = prompt_ids(model, prompt, chat)
    if isinstance(opened, LayerSaes):
        run: LocalModel | SaeRun = SaeRun.of(model, opened, ids_P)
        kind = "direct" if opened.direct else "total"
        settings["edges"] = f"{kind} {opened.estimate} x activation, first-order estimates"
    else:
        run = _run(model, opened, ids_P, max_features, len(targets) or max_logits)
    # 2. The targets.
    readouts = read_targets(run, targets, max_logits, logit_mass)
    # 3. The rows.
    count = min(max_features or len(run.active), len(run.active))
    if isinstance(run, SaeRun):
        _check_gradient_memory(run, count, len(readouts))
        gradient_rows = GradientRows(run, readouts)
        fill: FillRows = gradient_rows
        nodes = gradient_rows.nodes
    else:
        fill, nodes = _fill_rows(run, readouts, count), run.sources.nodes
    chosen_F, store = attribute_in_rounds(run, nodes, readouts, fill, count, on_progress)
    return Traced(make_graph(run, nodes, readouts, chosen_F, store, prompt, settings), run, readouts)


def estimate_gradient_memory(run: SaeRun, features: int, logits: int) -> Memory:
    """Return what the rows of a graph with SAEs take beside the model and the run of the prompt.

    Args:
      run: of the prompt; its active features are counted.
      features: number of features with rows.
      logits: number of targets that are no features.
    """
    mesh, sites, active = run.model.mesh, len(run.dictionaries.sites), len(run.active)
    _, length, width = run.stream_LxTxD.shape
    batch = max(TOKENS[mesh.devices.flat[0].platform] // length, 1) * document_devices(mesh)
    at_once = 2 if mesh.size == 1 else 1
    others, targets = (sites + 1) * len(run.ids_P) + sites, features + logits
    columns = columns_kept(targets, active, others)
    adjacency = targets * columns + (WHOLE if columns < active + others else 0)
    # Gradients at all sites and the tokens: on the devices, on the host, and stacked there; then their products.
    gradients = (sites + 2) * batch * length * width
    table = min(active, sum(config.n_features for config in run.dictionaries.configs)) * width
    encoders = width * min(features, ROUND_ROWS if features < active else features)
    host = adjacency + table + encoders + at_once * (2 * gradients + 2 * batch * (active + others))
    return Memory(int(_FP32 * at_once * gradients), int(_FP32 * host))


def _check_gradient_memory(run: SaeRun, features: int, logits: int) -> None:
    """Raise ``UserError`` if the rows of a graph with SAEs do not fit into what is free now."""
    mesh = run.model.mesh
    free, need = free_memory(mesh), estimate_gradient_memory(run, features, logits)
    if not need.fits(free, mesh):
        raise UserError(
            f"the graph would take {need.describe(mesh)}, and {free.describe(mesh)} is free: shorten the prompt of "
            f"{len(run.ids_P):,} tokens, or trace fewer features than {features:,} (max_features)"
        )


def _fill_rows(local: LocalModel, readouts: Readouts, count: int) -> FillRows:
    """Return what pulls readouts, and ``count`` features, back to all sources."""
    rows, active = RowTracer(local, local.sources, count + len(readouts)), local.active
    top_K = np.full(len(readouts), local.model.config.n_layers, np.int32)

    def fill(new_F: np.ndarray | None, put: Put) -> None:
        if new_F is None:
            rows(top_K, np.full_like(top_K, len(local.ids_P) - 1), readouts.vector_KxD, put, in_stream=True)
        else:
            rows(active.layer_A[new_F], active.position_A[new_F], local.encoder_rows(new_F), put)

    return fill


def _run(
    model: LanguageModel, dictionaries: LayerTranscoders, ids_P: np.ndarray, max_features: int | None, logits: int
) -> LocalModel:
    """Return the local model; memory is checked before it is made, and again when its features are counted."""
    dictionaries.check(model)
    first = dictionaries.configs[0]

    def make_room(active: float) -> None:
        """Free the encoders that are in memory where the graph does not fit beside them."""
        size = GraphSize(model.config, first, active, max_features, logits, dictionaries.cross_layer)
        if not estimate_memory(size, len(ids_P), model.mesh).fits(free_memory(model.mesh), model.mesh):
            dictionaries.forget()
            check_memory(size, len(ids_P), model.mesh)

    make_room(certain_active(first))
    local = LocalModel(model, dictionaries, ids_P)
    # The features of this prompt, counted, in place of the number that was certain before.
    make_room(len(local.active) / (model.config.n_layers * (len(ids_P) - 1)))
    return local
