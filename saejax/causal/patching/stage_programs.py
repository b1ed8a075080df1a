"""The large programs of the stage ``patch``, with shapes in place of arrays."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.causal.cost import prompt_length
from saejax.causal.patching import features, heads, paths, programs, subspace
from saejax.causal.patching.pairs import FEW, STEP, filled_rows, group_lengths
from saejax.causal.programs import SplitShapes
from saejax.costs.cost import PlannedRun
from saejax.costs.passes import pass_flops
from saejax.costs.programs import Program, abstract_params, by_row, placed
from saejax.interventions.rows import filled_features
from saejax.interventions.split_model import PROMPTS
from saejax.models.lengths import rows_per_batch
from saejax.models.sites import Site
from saejax.models.split import SplitPoint
from saejax.parallel.mesh import fitting_sharding
from saejax.settings import HEADS, PatchConfig, TaskConfig

Params = dict[str, jax.ShapeDtypeStruct]


def patch_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """Those of one kind of site that is patched, beside the stream if there is any, of heads, and of features."""
    patch = plan.configs[PatchConfig]
    if not plan.configs[TaskConfig].has_behaviours:
        return []
    # A kind that is not the stream keeps that, too.
    kinds = sorted((kind for kind in patch.kinds if kind != HEADS), key=lambda kind: kind.startswith("resid_p"))
    found = _of_sites(plan, mesh, kinds[0]) if kinds else []
    found += _of_heads(plan, mesh) if HEADS in patch.kinds else []
    return found + (_of_features(plan, mesh) if patch.dictionary else [])


def _of_sites(plan: PlannedRun, mesh: Mesh, kind: str) -> list[Program]:
    """A run that is recorded, beside that of the other side, and rows that run from a patched value on."""
    model, length, site = plan.model, prompt_length(plan), Site(kind, 0)
    point, params = SplitPoint(model, site, site, mesh), abstract_params(model, mesh, plan.dtype)
    lengths_P = np.full(plan.configs[TaskConfig].test_prompts, length)
    pairs = len(next(group_lengths(point, params, lengths_P))[1])
    given = tuple(by_row(mesh, shape, jnp.int32) for shape in ((pairs, length), (pairs,), (pairs, 2)))
    run = placed(jax.eval_shape(functools.partial(programs.record, point), params, *given), mesh)
    count = rows_per_batch(plan.configs[PatchConfig].batch_rows * length, length, STEP)
    rows = [by_row(mesh, shape, jnp.int32) for shape in [(count,)] * 5 + [(count, 2)]]
    patched = (point, length, params, run, run.patches, np.int32(0), *rows)
    size, record = f"{pairs} pairs of {length} tokens", (point, params, *given)
    flops = functools.partial(pass_flops, model, length=length, layers=model.n_layers)
    kept = run if run.patches is run.stream_KxBxTxD else (run.stream_KxBxTxD, run.past)  # of the other side
    return [
        Program("patch: record", size, programs.record, record, run, flops(pairs * length)),
        Program("patch: rows", f"{count} patched prompts", programs.run_rows, patched, kept, flops(count * length)),
    ]


def _of_heads(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """Nodes of all heads recorded, their slopes and effects, and rows with a node or a path patched."""
    model, length, count = plan.model, prompt_length(plan), filled_rows(plan.configs[PatchConfig].batch_rows)
    params = abstract_params(model, mesh, plan.dtype)
    given = [by_row(mesh, shape, jnp.int32) for shape in ((FEW, length), (FEW,), (FEW, 2))]
    nodes = _by_pair(mesh, jax.eval_shape(functools.partial(heads.record_heads, model), params, given[0]))
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    row = [by_row(mesh, shape, jnp.int32) for shape in ((count, length), (count,), (count, 2))]
    patch = _node_patch(plan, mesh, count)
    flops = functools.partial(pass_flops, model, length=length, layers=model.n_layers)
    size, rows = f"{FEW} pairs of {length} tokens", f"{count} patched prompts"
    slopes, several = (model, params, *given, layer), (nodes, nodes)
    found = [
        Program("patch: heads", size, heads.record_heads, (model, params, given[0]), nodes, flops(FEW * length)),
        Program("patch: slopes", size, heads.slopes, slopes, several, 3.0 * flops(FEW * length)),
        Program("patch: effects", size, heads.effects, (model, *several, nodes), params, 0.0),
        Program("patch: nodes", rows, heads.patch_nodes, (model, params, *row, patch), (), flops(count * length)),
    ]
    if plan.configs[PatchConfig].paths:
        written = _by_pair(mesh, jax.eval_shape(functools.partial(paths.record_written, model), params, given[0]))
        ends = by_row(mesh, (count,), jnp.int32)
        mlp_RxD = by_row(mesh, (count, model.d_model), written.mlp_out.dtype)
        senders = paths.Senders(patch, ends, mlp_RxD, ends)
        path = (model, "query", params, layer, layer, *row, written, senders)
        found.append(Program("patch: paths", rows, paths.patch_paths, path, (), 2.0 * flops(count * length)))
    return found


def _node_patch(plan: PlannedRun, mesh: Mesh, count: int) -> heads.NodePatch:
    ends = by_row(mesh, (count,), jnp.int32)
    return heads.NodePatch(ends, ends, ends, ends, by_row(mesh, (count, plan.model.d_head), plan.dtype))


def _by_pair(mesh: Mesh, tree: Any) -> Any:
    """Of all layers: pairs split over ``data`` and heads over ``model``, as the compiler leaves them."""

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = (None, "data", None, "model", None) if leaf.ndim == 5 else (None, "data", None, None)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=fitting_sharding(mesh, leaf.shape, *spec))

    return jax.tree.map(place, tree)


def _of_features(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """Those of ``ablate`` with all features of the counterparts put in, of parts of a value, of a learned subspace."""
    patch, shapes = plan.configs[PatchConfig], SplitShapes(plan, mesh, "patch")
    gathered, rows = filled_features(shapes.used.n_features), shapes.rows()
    size = f"{PROMPTS} pairs of {shapes.length} tokens"
    parts = (shapes.point, "error", shapes.params, shapes.dictionary, rows, rows)
    flops = shapes.tail_flops(PROMPTS) + 3 * shapes.encode_flops(PROMPTS)
    found = [
        shapes.head(),
        shapes.slopes(patch.estimate, "counterpart"),
        shapes.features("counterpart", gathered),
        shapes.tail(gathered, patch.batch_rows),
        shapes.program("parts", size, features.run_parts, parts, flops),
    ]
    if patch.das:
        raw_DxK = jax.ShapeDtypeStruct((shapes.used.d_in, patch.das), jnp.float32)
        state = jax.eval_shape(subspace.OPTIMISER.init, raw_DxK)
        real_B = by_row(mesh, (PROMPTS,), bool)
        step = (shapes.point, shapes.params, raw_DxK, state, 0.0, rows, rows.value_BxTxD, real_B)
        flops = 3.0 * shapes.tail_flops(PROMPTS)
        found.append(shapes.program("subspace", size, subspace.learn_step, step, flops))
    return found
