"""The programs of the stage ``circuits`` that take the most, with shapes in place of arrays."""

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.attribution.local import layers
from saejax.attribution.local.layers import FrozenModel
from saejax.attribution.local.readouts import padded
from saejax.circuits.measure import EDITS, SETS
from saejax.circuits.study import MAX_GROUPS
from saejax.costs.plan import PlannedRun
from saejax.costs.programs import Program, abstract_params, by_row, whole
from saejax.flops import pass_flops
from saejax.stages.attribute.plan import planned_graphs, rows_program
from saejax.stages.circuits.settings import CircuitsConfig


def circuit_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """Return the programs that trace prompts, and that run a layer of all edits of a group."""
    config = plan.configs[CircuitsConfig]
    count = len(config.behaviours)
    planned = planned_graphs(plan, config.traced * count) if count else None
    if planned is None:
        return []
    model, length = plan.model, padded(planned.longest)
    rows = padded(len(EDITS) * SETS, 8)  # of a group, which run together
    streams = by_row(mesh, (1 + rows, length, model.d_model), jnp.float32)
    sizes = model.n_layers, model.d_model, model.d_model
    skip_LxDxD = whole(mesh, sizes, jnp.float32) if planned.size.transcoder.skip else None
    frozen = FrozenModel(model, abstract_params(model, mesh, plan.dtype), skip_LxDxD=skip_LxDxD)
    edits = Program(
        "circuits: a layer of edited runs",
        f"{rows} runs of {length} tokens",
        layers.run_layer,
        (frozen, "none", np.int32(0), streams, length),
        streams,
        pass_flops(model, (1 + rows) * length, length, 1),
        runs=float(config.measured * count * MAX_GROUPS * model.n_layers),
    )
    return [rows_program(plan, mesh, planned, "circuits"), edits]
