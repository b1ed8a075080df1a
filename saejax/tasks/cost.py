"""What the stages ``baseline`` and ``benchmark`` take."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.costs.cost import START, Cost, DeviceBytes, PlannedRun
from saejax.costs.passes import generated_bytes, head_flops, layer_bytes, pass_flops, weight_bytes
from saejax.costs.programs import Program, abstract_params, by_row
from saejax.models import decoding
from saejax.models.edits import fit_values
from saejax.settings import PreflightConfig, StudyConfig, TaskConfig
from saejax.tasks.baseline import BATCH
from saejax.tasks.benchmark_definitions import definition, way
from saejax.tasks.own_prompts import count_behaviours

PROMPT = 16  # tokens: the behaviours' prompts have 7 to 32
OVERHEAD = 0.6
CHOICES = 4  # of a question of the logic benchmark
_NEW = 4  # a generated token costs about as much as so many that are read


def baseline_cost(plan: PlannedRun, name: str) -> Cost:
    """Every prompt once, with its counterpart."""
    task, dtype = plan.configs[TaskConfig], plan.dtype
    texts = 2 * count_all_behaviours(task) * (task.train_prompts + task.test_prompts)
    length = min(plan.configs[PreflightConfig].prompt_tokens, plan.model.context)
    kept = weight_bytes(plan.model, plan.axes, dtype)
    return Cost(
        DeviceBytes(model=kept, activations=layer_bytes(plan, BATCH, length, dtype)),
        pass_flops(plan.model, texts * PROMPT, PROMPT, plan.model.n_layers),
        dtype,
        OVERHEAD,
        START,
    )


def benchmark_cost(plan: PlannedRun, name: str) -> Cost:
    """Return the prompts, once or once a choice; of generated answers every token."""
    task, length, dtype = plan.configs[TaskConfig], plan.configs[PreflightConfig].benchmark_tokens, plan.dtype
    tokens = item_tokens(name, task, length) * (task.examples or definition(name).examples)
    flops = pass_flops(plan.model, tokens, length, plan.model.n_layers)
    come_and_go = generated_bytes(plan, *generated_batch(plan)) if way(name, task) == "generate" else 0
    kept = weight_bytes(plan.model, plan.axes, dtype)
    return Cost(DeviceBytes(model=kept, activations=come_and_go), flops, dtype, OVERHEAD, 2 * START)


def benchmark_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """Return the pass over the prompts, which holds the largest cache: with and without room for the new tokens."""
    if not generates(plan):
        return []
    params = abstract_params(plan.model, mesh, plan.dtype)
    return [prefill_program(plan, mesh, "benchmark: prefill", params)]


def prefill_program(
    plan: PlannedRun, mesh: Mesh, name: str, params: Mapping[str, Any], edits: Sequence[Any] = ()
) -> Program:
    """Return the pass over a batch of prompts of benchmarks.

    Args:
      plan: the run.
      mesh: its devices.
      name: of the program.
      params: of the model.
      edits: for a batch as ``generated_batch`` says.
    """
    rows, length, new = generated_batch(plan)
    ids_BxT, pad_B = by_row(mesh, (rows, length), jnp.int32), by_row(mesh, (rows,), jnp.int32)
    greedy = jax.eval_shape(lambda: decoding.sampling_params(0.0, 1.0, 0))
    fitted = fit_values(edits, (rows, length), length)
    return Program(
        name,
        f"{rows} prompts of {length} tokens, {new} new",
        decoding.prefill,
        (plan.model, new, params, ids_BxT, pad_B, np.zeros(1, np.int32), fitted, greedy),
        (),
        pass_flops(plan.model, rows * length, length, plan.model.n_layers) + head_flops(plan.model, rows),
    )


def generates(plan: PlannedRun) -> bool:
    """Whether answers are generated, for benchmarks or for studies of them."""
    task = plan.configs[TaskConfig]
    return any(way(name, task) == "generate" for name in (*task.benchmarks, *plan.configs[StudyConfig].benchmarks))


def generated_batch(plan: PlannedRun) -> tuple[int, int, int]:
    """Rows, tokens of a prompt and new tokens of a batch of benchmark answers."""
    task, context = plan.configs[TaskConfig], plan.model.context
    new = min(task.max_new_tokens, context - 1)
    return task.batch, min(plan.configs[PreflightConfig].benchmark_tokens, context - new), new


def count_all_behaviours(task: TaskConfig) -> int:
    """How many behaviours are measured, the user's own included."""
    return len(task.behaviours) + count_behaviours(task)


def item_tokens(name: str, task: TaskConfig, length: int) -> int:
    """About how many tokens it takes to score an item of a benchmark whose prompts have this length."""
    each = dict(generate=length + _NEW * task.max_new_tokens, choice=CHOICES * length, likelihood=length)
    return each[way(name, task)]
