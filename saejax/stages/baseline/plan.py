"""The programs of the stage ``benchmark``, with shapes in place of arrays."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.costs.plan import PlannedRun
from saejax.costs.programs import Program, abstract_params, by_row
from saejax.flops import head_flops, pass_flops
from saejax.interventions.settings import StudyConfig
from saejax.models import decoding
from saejax.models.edits import fit_values
from saejax.parallel.mesh import BY_DOCUMENT, Axis, fitting_sharding
from saejax.tasks.benchmark_definitions import answer_tokens, definition, way
from saejax.tasks.benchmark_prompts import worked_examples
from saejax.tasks.own_prompts import read_own_prompts
from saejax.tasks.settings import TaskConfig

QUESTION = 1000  # characters of the longest questions of a batch
PER_TOKEN = 3  # characters: worked solutions are mostly numbers


def benchmark_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """Return the prefill and the decoding loop, if benchmarks are answered by generation.

    The prefill has the largest cache: for a moment it exists with and without room for the new tokens.
    """
    if not generates(plan):
        return []
    rows, length, new = generated_batch(plan)
    model, params = plan.model, abstract_params(plan.model, mesh, plan.dtype)
    ids_BxT, pad_B = by_row(mesh, (rows, length), jnp.int32), by_row(mesh, (rows,), jnp.int32)
    greedy = jax.eval_shape(lambda: decoding.sampling_params(0.0, 1.0, 0))
    ends = np.zeros(1, np.int32)
    edits = fit_values((), (rows, length), length)
    arguments = (params, ids_BxT, pad_B, ends, edits, greedy)
    prefill = functools.partial(decoding.prefill, model, new)
    state = _placed_state(jax.eval_shape(prefill, *arguments), mesh)
    size, calls = f"{rows} prompts of {length} tokens, {new} new", _batches(plan)
    prefill_flops = pass_flops(model, rows * length, length, model.n_layers) + head_flops(model, rows)
    decode_flops = pass_flops(model, rows * new, length + new, model.n_layers) + head_flops(model, rows * new)
    decoded = (model, params, state, np.int32(new), ends, edits, greedy)
    return [
        Program("benchmark: prefill", size, decoding.prefill, (model, new, *arguments), (), prefill_flops, calls),
        Program("benchmark: decoding", size, decoding.decode, decoded, (), decode_flops, calls),
    ]


def _placed_state(state: Any, mesh: Mesh) -> Any:
    """Return the shapes of a decoding state: prompts split as by ``by_row``, key-value heads over ``model``."""
    specs: dict[int, tuple[Axis, ...]] = {5: (None, BY_DOCUMENT, None, "model", None)}
    specs |= {2: (BY_DOCUMENT, None), 1: (BY_DOCUMENT,), 0: ()}
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=fitting_sharding(mesh, leaf.shape, *specs[len(leaf.shape)])
        ),
        state,
    )


def _batches(plan: PlannedRun) -> float:
    """Return the number of batches of generated answers: of benchmarks, and of studies under all their conditions."""
    return sum(_generated_answers(plan)) / plan.configs[TaskConfig].batch


def studied_share(plan: PlannedRun) -> float:
    """Return which share of the generated answers studies ask for; 0 where none are generated."""
    of_benchmarks, of_studies = _generated_answers(plan)
    return of_studies / max(of_benchmarks + of_studies, 1)


def _generated_answers(plan: PlannedRun) -> tuple[int, int]:
    """Return how many answers are generated for benchmarks, and for studies of them."""
    task, study = plan.configs[TaskConfig], plan.configs[StudyConfig]
    answers = sum(
        task.examples or definition(name).examples for name in task.benchmarks if way(name, task) == "generate"
    )
    judging = [count_judging(study, task, name) for name in study.benchmarks if way(name, task) == "generate"]
    return answers, sum(judging) * count_conditions(study)


def count_conditions(study: StudyConfig) -> int:
    """Return under how many conditions a study scores answers: unedited, top features in two ways, control sets."""
    return 3 + (2 + (study.untrained_dictionaries > 0)) * study.scored_sets


def count_judging(study: StudyConfig, task: TaskConfig, name: str) -> int:
    """Return how many items of a benchmark judge features in a study: half of them."""
    items = min(study.items, task.examples or definition(name).examples)
    return items - items // 2


def generates(plan: PlannedRun) -> bool:
    """Return whether answers are generated, for benchmarks or for studies of them."""
    task = plan.configs[TaskConfig]
    return any(way(name, task) == "generate" for name in (*task.benchmarks, *plan.configs[StudyConfig].benchmarks))


def generated_batch(plan: PlannedRun) -> tuple[int, int, int]:
    """Return rows, tokens of a prompt and new tokens of a batch of benchmark answers."""
    task, context = plan.configs[TaskConfig], plan.model.context
    names = {*task.benchmarks, *plan.configs[StudyConfig].benchmarks}
    new = min(max((answer_tokens(name, task) for name in names), default=1), context - 1)
    length = max((prompt_tokens(name, task) for name in names if way(name, task) == "generate"), default=1)
    return task.batch, min(decoding.decoding_length(length), context - new), new


def prompt_tokens(name: str, task: TaskConfig) -> int:
    """Return about how many tokens the prompts of a benchmark with generated answers have, from its worked examples."""
    benchmark = definition(name)
    shown = worked_examples()[name][: benchmark.shots if task.shots < 0 else task.shots]
    worked = sum(len(benchmark.question.format(question)) + len(answer) for question, answer in shown)
    return (worked + QUESTION) // PER_TOKEN


def count_all_behaviours(task: TaskConfig) -> int:
    """Return the number of behaviours that are measured, the user's own included."""
    return len(task.behaviours) + len(read_own_prompts(task, None))
