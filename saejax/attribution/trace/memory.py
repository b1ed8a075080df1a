"""How much memory a graph takes: known before the work starts.

A graph is made in phases, and what the first leaves stays in the others:

    layers    one transcoder after the other beside its layer, with the activations of all its features
    rows      directions of the sources, batches of cotangents and their products; on the host the rows of the graph
    heads     sources and targets of the pruned graph, some at a time, and what they do to the values of attention
    checks    features doubled, parts of the graph run alone, several prunings

The largest arrays that are alive at once are counted, so a run may take a quarter more or less. Arrays are fp32, and
sizes below are numbers of them until they are given out as bytes.
"""

import dataclasses
from math import prod
from typing import NamedTuple

from jax.sharding import Mesh

from saejax.attribution.graph.pruning import RUNS
from saejax.attribution.local.active import AT_ONCE
from saejax.attribution.local.replacement import padded
from saejax.attribution.trace.directions import READ_AT_ONCE
from saejax.attribution.trace.row_store import WHOLE, columns_kept
from saejax.attribution.trace.rows import batch_tokens
from saejax.attribution.trace.sources import WIDTH
from saejax.dictionaries import DictionaryConfig
from saejax.dictionaries.modules import parameter_table
from saejax.models.config import DecoderConfig
from saejax.models.parameters import parameter_table as model_table
from saejax.parallel.mesh import part_size

GIB = 2**30
_FP32 = 4
_PROGRAMS = 400 * 2**20  # bytes of compiled programs and of compiling them, on the host
_COPIES = 3  # of the activations of a layer: before and after the sparsity function, and masked
_SCORES = 2.5  # attention weights, and what they are made of
_ROUND = 2048  # features that are attributed between two rankings, at the most
_CHANGED = 8  # least sets of changed features that go through a layer together
_HEADS = {"cpu": 1 << 10, "gpu": 1 << 14, "tpu": 1 << 14}  # positions of the sources of a block, together
_HEADS_STEP, _HEADS_MOST = 16, 256  # sources of a block: a multiple, and the most


class Bytes(NamedTuple):
    """What a phase takes on each device, and on the host beside."""

    device: int
    host: int


@dataclasses.dataclass(frozen=True)
class GraphSize:
    """What decides how much memory a graph takes, beside the number of tokens.

    Attributes:
      model: the decoder.
      transcoder: one of the set's, which all have one size.
      active: active features of a layer at a position, a mean.
      max_features: most features that get rows; None: all active ones.
      logits: most targets that are no features.
      checked: whether the graph is checked by running it.
      heads: whether the heads of its edges are looked for.
      cross_layer: whether features write to later layers, too.
      together: most parts of the graph that are run side by side.
    """

    model: DecoderConfig
    transcoder: DictionaryConfig
    active: float
    max_features: int | None = None
    logits: int = 10
    checked: bool = False
    heads: bool = False
    cross_layer: bool = False
    together: int = RUNS

    @property
    def writes(self) -> float:
        """Layers that a feature writes to, a mean."""
        return (self.model.n_layers + 1) / 2 if self.cross_layer else 1.0

    def active_features(self, tokens: int) -> int:
        """Of a prompt; at its first position there are none."""
        return int(self.active * self.model.n_layers * (tokens - 1))

    def traced(self, tokens: int) -> int:
        """Features that get rows."""
        active = self.active_features(tokens)
        return min(self.max_features or active, active)


def certain_active(transcoder: DictionaryConfig) -> float:
    """Active features of a layer at a position of which one can be sure before a prompt is run."""
    return transcoder.k if transcoder.kind == "topk" else 0.0


def graph_bytes(size: GraphSize, tokens: int, mesh: Mesh) -> dict[str, Bytes]:
    """What a graph takes beside the model, by phase.

    Args:
      tokens: of the prompt, its special first one included.
      mesh: the devices.
    """
    phases = dict(layers=_layers(size, tokens, mesh), rows=_rows(size, tokens, mesh))
    if size.heads:
        phases["heads"] = _heads(size, tokens, mesh)
    if size.checked:
        phases["checks"] = _checks(size, tokens, mesh)
    return {name: Bytes(int(_FP32 * on), int(_FP32 * beside) + _PROGRAMS) for name, (on, beside) in phases.items()}


def bank_sizes(size: GraphSize, tokens: int) -> tuple[int, int]:
    """Rows of the table of directions of a graph's sources, and its blocks; see ``sources.SourceBank``."""
    layers, active = size.model.n_layers, size.active_features(tokens)
    of_features = min(active, layers * size.transcoder.n_features) * size.writes
    entries = active * size.writes + layers * (tokens + 2) + tokens
    # A block holds sources of one layer and position, and the last one of each is half empty.
    slots = entries + WIDTH // 2 * (layers + 1) * tokens
    return int(of_features + (2 * layers + 1) * padded(tokens)), int(-(-slots // WIDTH))


def heads_block(platform: str, length: int) -> int:
    """How many sources, or targets, go through the layers together when the heads of edges are looked for.

    Args:
      platform: of the devices.
      length: of the prompt, padded.
    """
    return min(max(_HEADS[platform] // length // _HEADS_STEP * _HEADS_STEP, _HEADS_STEP), _HEADS_MOST)


def _kept(size: GraphSize, length: int) -> float:
    """The streams, errors and biases of all layers, and skip paths."""
    model, width = size.model, size.model.d_model
    streams = 4 if any("_bias" in name for name in model_table(model)) else 2
    return model.n_layers * width * (streams * length + 2 + (width if size.transcoder.skip else 0))


def _attention(size: GraphSize, length: int) -> float:
    return _SCORES * size.model.n_heads * length**2


def _inside(size: GraphSize) -> int:
    """Of a position in a layer: the streams, queries, keys and values; the MLP's own."""
    model = size.model
    heads = model.d_head * (2 * model.n_heads + 2 * model.n_kv_heads)
    return 6 * model.d_model + max(heads, (3 if model.gated else 2) * model.d_mlp)


def _transcoders(size: GraphSize, mesh: Mesh) -> int:
    """A device's part of two of them: the one that is left, and the next."""
    table = parameter_table(size.transcoder).values()
    return 2 * sum(part_size(mesh.shape, shape, *spec) for shape, spec in table)


def _layers(size: GraphSize, tokens: int, mesh: Mesh) -> tuple[float, float]:
    length, features = padded(tokens), size.transcoder.n_features
    acts = features * max(1, min(length, AT_ONCE // features))
    stacked = size.model.n_layers * length * size.model.d_model  # streams are copied when they are put together
    running = _inside(size) * length + _attention(size, length)
    device = _transcoders(size, mesh) + _COPIES * acts + running + _kept(size, length) + stacked
    # The next one, as it is read and as it is placed, whatever the devices' number.
    read = 2 * sum(prod(shape) for shape, _ in parameter_table(size.transcoder).values())
    return device, read + acts + 8 * size.active_features(tokens)


def _rows(size: GraphSize, tokens: int, mesh: Mesh) -> tuple[float, float]:
    model, length, width = size.model, padded(tokens), size.model.d_model
    active, traced = size.active_features(tokens), size.traced(tokens)
    targets = traced + size.logits
    sources = active + model.n_layers * (tokens + 2) + tokens
    entries = sources + active * (size.writes - 1)
    directions, blocks = bank_sizes(size, tokens)
    bank = part_size(mesh.shape, (width,), "model") * directions
    slots = WIDTH * blocks
    positions = batch_tokens(mesh.devices.flat[0].platform, length)
    batch = positions * (2 * width + slots / length) + _inside(size) * positions / 8 + _attention(size, length)
    at_once = 2 if mesh.size == 1 else 1
    # Rows are copied when columns are given up while they come.
    columns = columns_kept(targets, active, sources - active)
    adjacency = targets * columns + (WHOLE if columns < sources else 0)
    read = 2 * at_once * positions / length * entries
    encoders = width * (min(traced, _ROUND) if traced < active else traced)
    device = _kept(size, length) + bank + at_once * batch
    return device, adjacency + read + encoders + min(READ_AT_ONCE, width * directions)


def _heads(size: GraphSize, tokens: int, mesh: Mesh) -> tuple[float, float]:
    """A block of sources kept in all layers, as more are only where they fit; and those that are on their way."""
    model, length = size.model, padded(tokens)
    positions = heads_block(mesh.devices.flat[0].platform, length) * length
    values = model.n_layers * model.n_kv_heads * model.d_head
    mixed = 3 * model.n_heads * model.d_head
    ends = model.d_model * (size.traced(tokens) + model.n_layers * tokens)  # vectors of the graph's nodes
    at_once = 2 if mesh.size == 1 else 1
    running = positions * (mixed + _inside(size)) + _attention(size, length)
    return _kept(size, length) + positions * values + at_once * running, ends


def _checks(size: GraphSize, tokens: int, mesh: Mesh) -> tuple[float, float]:
    model, length, features = size.model, padded(tokens), size.transcoder.n_features
    circuits = min(max(AT_ONCE // (length * features), 1), size.together)
    running = _inside(size) * length + _attention(size, length)
    acts = _COPIES * circuits * length * features
    device = _kept(size, length) + _transcoders(size, mesh) + max(acts + circuits * running, _CHANGED * running)
    traced = size.traced(tokens)
    graph = (traced + size.logits) * (traced + model.n_layers * (tokens + 2) + tokens)
    # The graph, its part while it is cut, its edges (bits of a byte each) and the part that is left.
    return device, 3.25 * graph
