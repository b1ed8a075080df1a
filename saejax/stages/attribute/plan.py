"""The graphs that the stage ``attribute`` will trace, and its program that takes the most, with shapes for arrays."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.attribution.local import rows
from saejax.attribution.local.layers import FrozenModel
from saejax.attribution.local.readouts import padded
from saejax.attribution.local.sources import WIDTH, SourceBank
from saejax.attribution.local.transcoders import open_transcoders
from saejax.attribution.settings import GraphConfig
from saejax.attribution.trace.prompt import GraphSize, bank_sizes, certain_active
from saejax.costs.plan import CHARACTERS_PER_TOKEN, PlannedRun
from saejax.costs.programs import Program, abstract_params, whole
from saejax.dictionaries import DictionaryConfig
from saejax.models.settings import ModelConfig
from saejax.parallel.mesh import fitting_sharding
from saejax.stages.attribute.requests import Request, read_requests, unit_name

_ACTIVE = 64  # features per layer and token, where the kind of dictionary does not say how many
_PROMPT = 16  # tokens: the behaviours' prompts have 7 to 32


@dataclasses.dataclass(frozen=True)
class PlannedGraphs:
    """The graphs that are asked for."""

    lengths: tuple[int, ...]  #: about how many tokens each prompt has
    size: GraphSize  #: what else decides what a graph takes

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(self.lengths)

    @property
    def rows(self) -> int:
        """Features that get rows, of all graphs."""
        return sum(self.size.traced(tokens) for tokens in self.lengths)


def planned_graphs(plan: PlannedRun, behaviour_prompts: int = 0) -> PlannedGraphs | None:
    """Return the planned graphs on one model; None if they are of SAEs, or their transcoders are unknown.

    Args:
      plan: the planned run.
      behaviour_prompts: number of traced prompts of behaviours; 0: the prompts that ``GraphConfig`` names.

    Raises:
      UserError: the stage cannot trace the prompts or use the transcoders.
    """
    config = plan.configs[GraphConfig]
    lengths = [_PROMPT] * (behaviour_prompts or len(config.behaviours)) or [
        _tokens(request) for request in read_requests(config)
    ]
    replacement = _transcoder(plan, config) if config.transcoders else None
    if replacement is None:
        return None
    transcoder, cross_layer = replacement
    active = certain_active(transcoder) or _ACTIVE
    most = config.max_features or None
    size = GraphSize(plan.model, transcoder, active, most, config.max_logits, cross_layer)
    return PlannedGraphs(tuple(lengths), size)


def _tokens(request: Request) -> int:
    """Return about how many tokens a prompt has, one before it included."""
    if isinstance(request.prompt, str):
        return 2 + round(len(request.prompt) / CHARACTERS_PER_TOKEN)
    return len(request.prompt)


def _transcoder(plan: PlannedRun, config: GraphConfig) -> tuple[DictionaryConfig, bool] | None:
    """Return one of the set's transcoders: of a folder, of a set on the hub, or of those that the run will train.

    Returns:
      What it is, and whether the set is a cross-layer one; None: nothing is known of it.
    """
    folder = Path(config.transcoders).expanduser()
    if folder.is_dir():
        opened = open_transcoders(config.transcoders, choice=config.l0)
        return opened.check_shape(plan.model, plan.configs[ModelConfig].path).configs[0], opened.cross_layer
    if assumed := plan.assumed_transcoder():
        return assumed, False
    trained = (stack.dictionary for stack in plan.stacks.values())
    return next(((config, False) for config in trained if config.target and config.kind == folder.name), None)


def attribute_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """Return the program that computes rows of the longest prompt's graph, which takes the most memory.

    Raises:
      UserError: prompts or transcoders are not what the stage takes.
    """
    planned = planned_graphs(plan) if unit_name(plan.configs[GraphConfig]) else None
    return [rows_program(plan, mesh, planned, "attribute")] if planned else []


def rows_program(plan: PlannedRun, mesh: Mesh, planned: PlannedGraphs, stage: str) -> Program:
    """Return the program that computes rows of graphs, for the longest prompt.

    Args:
      plan: the planned run.
      mesh: its devices.
      planned: the graphs.
      stage: that traces them.
    """
    size, model, length = planned.size, plan.model, padded(planned.longest)
    count, chunks = rows.chunk_size(plan.platform, length, mesh), rows.CHUNKS
    table, blocks = bank_sizes(size, planned.longest)

    def abstract(shape: tuple[int, ...], dtype: jnp.dtype, *spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=fitting_sharding(mesh, shape, *spec))

    width, index = model.d_model, np.dtype(np.int32)
    bank = SourceBank(
        abstract((table, width), jnp.float32, None, "model"), whole(mesh, (blocks, WIDTH), index),
        whole(mesh, (blocks,), index),
    )  # fmt: skip
    batch = rows.TargetBatch(
        abstract((chunks, count, width), jnp.float32, None, "data", None),
        abstract((chunks, count), index, None, "data"),
        abstract((chunks, count), index, None, "data"),
        np.full(chunks, model.n_layers, np.int32),
    )
    stream_LxTxD = whole(mesh, (model.n_layers, length, width), jnp.float32)
    skip_LxDxD = whole(mesh, (model.n_layers, width, width), jnp.float32) if size.transcoder.skip else None
    places = np.zeros(model.n_layers + 2, np.int32), np.zeros(model.n_layers + 1, np.int32)
    params = abstract_params(model, mesh, plan.dtype)
    flops = rows.row_flops(model, np.full(count * chunks, model.n_layers), length)
    flops += 2.0 * count * chunks * blocks * WIDTH * width
    return Program(
        f"{stage}: rows",
        f"{count * chunks:,} targets, {table:,} directions",
        rows.contributions,
        (FrozenModel(model, params, skip_LxDxD=skip_LxDxD), mesh, stream_LxTxD, bank, *places, batch),
        stream_LxTxD,  # the errors, beside it
        flops,
        runs=planned.rows / (count * chunks),
    )
