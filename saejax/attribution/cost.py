"""What the stage ``attribute`` takes: which prompts, which transcoders, operations and memory."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import psutil
from jax.sharding import Mesh

from saejax.attribution.checks.kept import RUNS as KEPT_RUNS
from saejax.attribution.graph.pruning import RUNS
from saejax.attribution.heads.cut import most_flops, pair_flops
from saejax.attribution.local.dictionaries import KEPT_SHARE
from saejax.attribution.local.replacement import padded
from saejax.attribution.local.transcoders import open_transcoders
from saejax.attribution.requests import Request, read_requests
from saejax.attribution.trace.memory import GIB, Bytes, GraphSize, certain_active, graph_bytes
from saejax.attribution.trace.room import PHASES, Room, check_room, fitting_tokens
from saejax.attribution.trace.rows import row_flops
from saejax.costs.cost import CHARACTERS_PER_TOKEN, START, Cost, PlannedRun
from saejax.costs.passes import pass_flops, weight_bytes
from saejax.dictionaries import DictionaryConfig
from saejax.models.config import DecoderConfig
from saejax.settings import GraphConfig, ModelConfig, PreflightConfig
from saejax.tasks.cost import PROMPT

_OVERHEAD = 1.4
_CHECKS = 2.0  # how much longer checks take than their products, which are small, as measured on two prompts
_READ = 1e9  # bytes of transcoders that are read in a second


@dataclasses.dataclass(frozen=True)
class PlannedGraphs:
    """The graphs that are asked for.

    Attributes:
      lengths: about how many tokens each prompt has.
      size: what else decides what a graph takes.
      doubled: features that are doubled one by one.
      judged: prompts on which orders of features are compared.
    """

    lengths: tuple[int, ...]
    size: GraphSize
    doubled: int
    judged: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(self.lengths)

    @property
    def rows(self) -> int:
        """Features that get rows, of all graphs."""
        return sum(self.size.traced(tokens) for tokens in self.lengths)


def attribute_cost(plan: PlannedRun, name: str) -> Cost:
    """All graphs of a unit; all but the model's own products is fp32, whatever its dtype.

    Raises:
      UserError: prompts or transcoders are not what the stage takes, or the longest prompt's graph does not fit into
        what is free on the plan's mesh; the message says first how many tokens would.
    """
    planned = planned_graphs(plan)
    if planned is None:
        missing = f"{plan.configs[GraphConfig].transcoders} is no folder here, so its sizes are not known"
        why = "the graphs of SAEs follow no formula" if plan.configs[GraphConfig].dictionaries else missing
        return Cost(lines=[f"attribute/{name} is not counted: {why}"])
    flops = sum(_flops(planned, tokens) for tokens in planned.lengths) + planned.judged * _judged_flops(planned)
    cost = Cost(flops=flops, overhead=_OVERHEAD, host_seconds=2 * START + _read_seconds(planned))
    if plan.mesh is None:
        return cost
    room = _room(plan, plan.mesh)
    check_room(planned.size, planned.longest, plan.mesh, room)
    needs = graph_bytes(planned.size, planned.longest, plan.mesh)
    most = fitting_tokens(planned.size, plan.mesh, room)
    details = dict(
        prompts=len(planned.lengths),
        tokens=planned.longest,
        rows=planned.rows,
        fitting_tokens=most,
        bytes={phase: dict(device=bytes_.device, host=bytes_.host) for phase, bytes_ in needs.items()},
    )
    return dataclasses.replace(cost, lines=[_line(name, planned, needs, most)], details=details)


def planned_graphs(plan: PlannedRun) -> PlannedGraphs | None:
    """The graphs of a configuration on one model; None if they are of SAEs, or nothing is known of their transcoders.

    Raises:
      UserError: prompts or transcoders are not what the stage takes.
    """
    config = plan.configs[GraphConfig]
    lengths = [PROMPT] * len(config.behaviours) or [_tokens(request) for request in read_requests(config)]
    found = _transcoder(plan, config) if config.transcoders else None
    if found is None:
        return None
    transcoder, cross_layer = found
    active = certain_active(transcoder) or plan.configs[PreflightConfig].active_features
    size = graph_size(config, plan.model, transcoder, active, cross_layer)
    return PlannedGraphs(tuple(lengths), size, config.doubled, len(config.behaviours) * config.kept_prompts)


def graph_size(
    config: GraphConfig, model: DecoderConfig, transcoder: DictionaryConfig, active: float, cross_layer: bool
) -> GraphSize:
    """What decides how much memory a graph takes.

    Args:
      config: the stage's settings.
      model, transcoder, active, cross_layer: see ``GraphSize``.
    """
    return GraphSize(
        model,
        transcoder,
        active,
        config.max_features or None,
        config.max_logits,
        checked=bool(config.circuits or config.doubled or config.kept_prompts),
        heads=config.heads,
        cross_layer=cross_layer,
        together=KEPT_RUNS if config.kept_prompts else RUNS,
    )


def _flops(planned: PlannedGraphs, tokens: int) -> float:
    """A run with the transcoders; rows, which start in the middle on average, and their sources; heads; checks."""
    model, size, length = planned.size.model, planned.size, padded(tokens)
    run = pass_flops(model, length, length, model.n_layers)
    explained = 4.0 * size.transcoder.d_in * size.transcoder.n_features * model.n_layers * length
    rows, active = size.traced(tokens), size.active_features(tokens)
    down = row_flops(model, rows * (model.n_layers + 1) / 2 + size.logits * model.n_layers, (tokens + 1) / 2)
    read_off = rows * active / 4 * 2.0 * model.d_model
    checks = (RUNS * (run + 1.5 * explained) + 2 * planned.doubled * run) if size.checked else 0.0
    heads = _heads_flops(size, tokens, down) if size.heads else 0.0
    return run + explained + down + read_off + heads + _CHECKS * checks


def _judged_flops(planned: PlannedGraphs) -> float:
    """A behaviour's prompt on which orders are compared: traced, and run with parts of its features."""
    size, length = dataclasses.replace(planned.size, checked=False, heads=False), padded(PROMPT)
    explained = 6.0 * size.transcoder.d_in * size.transcoder.n_features * size.model.n_layers * length
    run = pass_flops(size.model, length, length, size.model.n_layers) + explained
    return _flops(dataclasses.replace(planned, size=size), PROMPT) + _CHECKS * KEPT_RUNS * run


def _heads_flops(size: GraphSize, tokens: int, down: float) -> float:
    """Heads of edges, at the most: both passes and the products of all nodes, or as many as ``heads.cut`` leaves."""
    sources = size.traced(tokens) + size.model.n_layers * tokens
    up = row_flops(size.model, sources * (size.model.n_layers - 1) / 2, (tokens + 1) / 2)
    pairs = (size.traced(tokens) + size.logits) * sources * pair_flops(size.model, tokens)
    return min(down + up + pairs, most_flops(down))


def _read_seconds(planned: PlannedGraphs) -> float:
    """Seconds in which transcoders are read: once if memory holds them all, else to trace and for each check."""
    size, transcoder = planned.size, planned.size.transcoder
    whole = size.model.n_layers * 2 * 4 * transcoder.d_in * transcoder.n_features
    kept = whole <= psutil.virtual_memory().available // KEPT_SHARE
    return (1 if kept else len(planned.lengths) * (1 + 3 * size.checked)) * whole / _READ


def _room(plan: PlannedRun, mesh: Mesh) -> Room:
    """What is left beside the weights; nothing is known of the host of devices that are not here."""
    device, left = mesh.devices.flat[0], plan.limit - weight_bytes(plan.model, plan.axes, plan.dtype)
    if device.platform == "cpu":
        return Room(left, left * mesh.size)
    here = device.client == jax.devices()[0].client
    return Room(left, psutil.virtual_memory().available if here else sys.maxsize)


def _line(name: str, planned: PlannedGraphs, needs: Mapping[str, Bytes], most: int) -> str:
    """What the graphs take, the limit first."""
    phase = max(needs, key=lambda name: sum(needs[name]))
    count = f"{len(planned.lengths)} prompts, the longest" if len(planned.lengths) > 1 else "a prompt"
    return (
        f"attribute/{name}: up to about {most:,} tokens fit; {count} of about {planned.longest:,}, "
        f"{planned.rows:,} rows in all: {needs[phase].device / GIB:.2f} GiB a device beside the model, "
        f"{needs[phase].host / GIB:.2f} on the host, for {PHASES[phase]}"
    )


def _tokens(request: Request) -> int:
    """About how many tokens a prompt has, one before it included."""
    if isinstance(request.prompt, str):
        return 2 + round(len(request.prompt) / CHARACTERS_PER_TOKEN)
    return len(request.prompt)


def _transcoder(plan: PlannedRun, config: GraphConfig) -> tuple[DictionaryConfig, bool] | None:
    """One of the set's transcoders: of a folder that is there, or of those that the run will train into it.

    Returns:
      What it is, and whether the set is a cross-layer one; None: nothing is known of it.
    """
    folder = Path(config.transcoders).expanduser() / config.subfolder
    if folder.is_dir():
        opened = open_transcoders(config.transcoders, config.revision, config.subfolder, config.l0)
        return opened.check_shape(plan.model, plan.configs[ModelConfig].path).configs[0], opened.cross_layer
    trained = (stack.dictionary for stack in plan.stacks.values())
    return next(((own, False) for own in trained if own.target and own.kind == folder.name), None)
