"""The memory that a graph takes: estimated before the work starts, and again when the prompt's features are counted.

A graph is made in two phases, and the larger one counts: in the layers, each transcoder's encoder beside its layer,
with the activations of all its features; in the rows, the directions of the sources, batches of cotangents and their
products, and on the host the rows of the graph. The largest arrays that are alive at once are counted, so a run may
take a quarter more or less. Arrays are fp32.
"""

import bisect
import contextlib
import ctypes
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import psutil
from jax.sharding import Mesh

from saejax.attribution.local.dictionaries import READ_AT_ONCE
from saejax.attribution.local.prompt_run import AT_ONCE
from saejax.attribution.local.readouts import padded
from saejax.attribution.local.rows import TOKENS, batch_tokens
from saejax.attribution.local.sources import WIDTH
from saejax.attribution.trace.gradient import SaeRun
from saejax.attribution.trace.row_store import ROUND_ROWS, WHOLE, columns_kept
from saejax.dictionaries import DictionaryConfig
from saejax.errors import UserError
from saejax.models.config import DecoderConfig
from saejax.models.parameters import parameter_table as model_table
from saejax.parallel.mesh import document_devices, free_bytes, part_size

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


def return_freed() -> None:
    """Give freed memory back to the system: the C library keeps it, and a program's compiler has freed much of it.

    Only GNU's library can do this.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # TypeError: Windows has no such handle
        ctypes.CDLL(None).malloc_trim(0)


def free_memory(mesh: Mesh) -> Memory:
    """Return what is free now."""
    return Memory(free_bytes(mesh), psutil.virtual_memory().available)


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


def check_gradient_memory(run: SaeRun, features: int, logits: int) -> None:
    """Refuse a prompt whose graph with SAEs does not fit into what is free now.

    Args:
      run: of the prompt.
      features: number of features with rows.
      logits: number of targets that are no features.

    Raises:
      UserError: its rows do not fit.
    """
    mesh = run.model.mesh
    free, need = free_memory(mesh), estimate_gradient_memory(run, features, logits)
    if not need.fits(free, mesh):
        raise UserError(
            f"the graph would take {need.describe(mesh)}, and {free.describe(mesh)} is free: shorten the prompt of "
            f"{len(run.ids_P):,} tokens, or trace fewer features than {features:,} (max_features)"
        )
