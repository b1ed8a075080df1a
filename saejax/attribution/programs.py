"""The program of the stage ``attribute`` that takes the most, with shapes in place of arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.attribution.local import backward, rows
from saejax.attribution.local.frozen import FrozenModel
from saejax.attribution.local.readouts import padded
from saejax.attribution.local.sources import WIDTH, SourceBank
from saejax.attribution.planned import PlannedGraphs, planned_graphs
from saejax.attribution.requests import unit_name
from saejax.attribution.trace.memory import bank_sizes
from saejax.costs.plan import PlannedRun
from saejax.costs.programs import Program, abstract_params, whole
from saejax.parallel.mesh import fitting_sharding
from saejax.settings import GraphConfig


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
    batch = backward.TargetBatch(
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
    program = Program(
        f"{stage}: rows",
        f"{count * chunks:,} targets, {table:,} directions",
        backward.contributions,
        (FrozenModel(model), mesh, params, stream_LxTxD, skip_LxDxD, bank, *places, batch),
        stream_LxTxD,  # the errors, beside it
        flops,
    )
    return dataclasses.replace(program, runs=planned.rows / (count * chunks))
