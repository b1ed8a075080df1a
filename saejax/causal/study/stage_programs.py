"""The large programs of the stage ``study``, with shapes in place of arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.causal.programs import SplitShapes
from saejax.causal.study import references, removal
from saejax.causal.study.items import ITEMS
from saejax.costs.cost import PlannedRun
from saejax.costs.passes import head_flops, pass_flops
from saejax.costs.programs import Program, by_row, whole
from saejax.models.language_model import forward
from saejax.models.lengths import round_length, rows_per_batch
from saejax.models.sites import Site
from saejax.settings import PreflightConfig, StudyConfig, TaskConfig, TrainConfig
from saejax.tasks import likelihood
from saejax.tasks.benchmark_definitions import way
from saejax.tasks.cost import CHOICES, generated_batch, generates, prefill_program


def study_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """The head and the slopes of references, texts without single features, and the model with some redrawn."""
    study, task = plan.configs[StudyConfig], plan.configs[TaskConfig]
    if not study.benchmarks:
        return []
    shapes = SplitShapes(plan, mesh, "study")
    asked = min(plan.configs[PreflightConfig].benchmark_tokens, plan.model.context)
    rows = rows_per_batch(study.batch_tokens, asked, mesh.shape["data"])
    found = [shapes.head(rows, asked), *_of_references(plan, mesh, shapes, rows, asked)]
    texts = ITEMS * max(CHOICES if way(name, task) == "choice" else 1 for name in study.benchmarks)
    found.append(
        _likelihoods(plan, mesh, shapes, *likelihood.batch_shape(asked, texts, plan.model.context, mesh.shape["data"]))
    )
    if generates(plan):
        count, length, _ = generated_batch(plan)
        edits = (_redrawn(shapes, count, length, study.top),)
        found.append(prefill_program(plan, mesh, "study: prefill", shapes.params, edits))
    return found


def _of_references(plan: PlannedRun, mesh: Mesh, shapes: SplitShapes, rows: int, length: int) -> list[Program]:
    """So many answers, as long as what may be generated."""
    columns = min(round_length(min(plan.configs[TaskConfig].max_new_tokens, length)), length)
    value, domain = shapes.value(whole, rows, length), shapes.domain(whole, rows, length)
    answers = [by_row(mesh, (rows, columns), dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32)]
    batch = references.ReferenceBatch(value, value, value, domain, *answers)
    point = references.of_references(shapes.point)
    logits = head_flops(plan.model, rows * columns)
    slopes = (point, shapes.params, shapes.dictionary, batch)
    flops = 3.0 * (shapes.tail_flops(rows, length) + logits) + 2.0 * shapes.encode_flops(rows, length)
    size = f"{rows} x {length} tokens"
    found = [shapes.program("attribution", size, references.attribute, slopes, flops)]
    if plan.configs[StudyConfig].single:
        features_K, on_K, some_R = (
            np.zeros(removal.FEATURES, np.int32),
            np.ones(removal.FEATURES, bool),
            np.zeros(rows, int),
        )
        read = (shapes.point, shapes.dictionary, features_K, on_K, value, domain)
        f_BxTxK = whole(mesh, (rows, length, removal.FEATURES), plan.configs[TrainConfig].state_dtype)
        given = (shapes.point, shapes.params, shapes.dictionary, batch, f_BxTxK, features_K, some_R, some_R)
        flops = shapes.tail_flops(rows, length) + logits
        found += [
            shapes.program("features", size, removal.activations, read, shapes.encode_flops(rows, length)),
            shapes.program("single features", size, removal.without, given, flops),
        ]
    return found


def _likelihoods(plan: PlannedRun, mesh: Mesh, shapes: SplitShapes, rows: int, length: int) -> Program:
    """The model with features redrawn, to its last layer."""
    last = Site("resid_post", plan.model.n_layers - 1)
    ids_BxT, lengths_B = by_row(mesh, (rows, length), jnp.int32), by_row(mesh, (rows,), jnp.int32)
    edits = (_redrawn(shapes, rows, length, plan.configs[StudyConfig].top),)
    given = (plan.model, (last,), False, shapes.params, ids_BxT, lengths_B, edits)
    flops = pass_flops(plan.model, rows * length, length, plan.model.n_layers) + shapes.encode_flops(rows, length)
    return Program("study: likelihoods", f"{rows} x {length} tokens", forward, given, (), flops)


def _redrawn(shapes: SplitShapes, rows: int, length: int, top: int) -> Any:
    """An edit of top features in so many texts."""
    features = range(min(top, shapes.used.n_features))
    edit = shapes.dictionary.redraw(features, [[1.0]] * len(features), length, texts=range(rows))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf, edit
    )
