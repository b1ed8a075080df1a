"""The large programs of the stage ``steer``, with shapes in place of arrays."""

import jax.numpy as jnp
from jax.sharding import Mesh

from saejax.causal.programs import SplitShapes
from saejax.causal.steer import directions, programs
from saejax.causal.steer.methods import FACTORS
from saejax.costs.cost import PlannedRun
from saejax.costs.passes import head_flops
from saejax.costs.programs import Program, by_row, whole
from saejax.interventions.split_model import PROMPTS
from saejax.settings import SteerConfig, TaskConfig


def steer_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """The head, the slopes that directions are made of, and prompts in which features are clamped, which takes most."""
    steer = plan.configs[SteerConfig]
    if not steer.dictionary or not plan.configs[TaskConfig].has_behaviours:
        return []
    shapes = SplitShapes(plan, mesh, "steer")
    slopes = (shapes.point, shapes.params, shapes.rows())
    size = f"{PROMPTS} prompts of {shapes.length} tokens"
    rows = programs.rows_at_once(steer.batch_rows, len(FACTORS) * shapes.prompts)
    clamped = [by_row(mesh, (rows, steer.top), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32)]
    change = programs.SteeredTexts(by_row(mesh, (rows, shapes.used.d_in), jnp.float32), *clamped)
    clean, place_R = shapes.rows(whole, shapes.prompts), by_row(mesh, (rows,), jnp.int32)
    given = (shapes.point, shapes.params, shapes.dictionary, clean, place_R, change)
    flops = shapes.tail_flops(rows) + shapes.encode_flops(rows) + head_flops(plan.model, rows)
    return [
        shapes.head(),
        shapes.program("slopes", size, directions.last_slope, slopes, 3.0 * shapes.tail_flops(PROMPTS)),
        shapes.program("rows", f"{rows} steered prompts", programs.steer_rows, given, flops),
    ]
