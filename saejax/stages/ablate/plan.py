"""The programs of the stage ``ablate`` with shapes in place of arrays, which preflight compiles.

They are: clean runs, attribution for answers and for placebo targets, changes of features, the layers above the site.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from saejax.costs.plan import PlannedRun
from saejax.costs.programs import Program, abstract_dictionary, abstract_params, by_row, placed, whole
from saejax.flops import pass_flops
from saejax.interventions import slopes
from saejax.interventions.ablation import expected_rows
from saejax.interventions.behaviour_prompts import STEPS, TOKENS
from saejax.interventions.edits import GATHERED, ActivationReplacement, filled_features
from saejax.interventions.rows import CleanValues, PromptTree, few_rows, fill, gather, run_rows
from saejax.interventions.settings import AblateConfig
from saejax.interventions.split_model import (
    GROUP_TOKENS,
    LENGTH_STEP,
    PROGRAM_TOKENS,
    row_step,
    rows_at_once,
    run_head,
)
from saejax.models.sites import Site
from saejax.models.split import PrefixKV, SharedPrefixBatch, SplitPoint
from saejax.parallel.mesh import document_devices
from saejax.stages.baseline.plan import count_all_behaviours
from saejax.tasks.behaviours import Prompt
from saejax.tasks.settings import TaskConfig
from saejax.training.settings import TrainConfig

PROMPT_TOKENS = 32  # of a prompt of a behaviour; the built-in ones have 7 to 32
_FIRING = 0.85  # share of the rows that are run: a set that changes nothing on a prompt is not


def prompt_length(plan: PlannedRun) -> int:
    """Return the tokens of a behaviour's prompt, padded."""
    return -(-min(PROMPT_TOKENS, plan.model.context) // LENGTH_STEP) * LENGTH_STEP


def ranking_prompts(plan: PlannedRun) -> int:
    """Return how many train prompts of a behaviour choose features."""
    ablate, task = plan.configs[AblateConfig], plan.configs[TaskConfig]
    return min(ablate.attribution_prompts or task.train_prompts, task.train_prompts)


def kept_prompts(plan: PlannedRun, mesh: Mesh, count: int) -> int:
    """Return ``count`` prompts of a behaviour, filled up to whole runs of the head, or as many as one group holds."""
    length = min(PROMPT_TOKENS, plan.model.context)
    step = row_step(length, document_devices(mesh))
    most = max(GROUP_TOKENS // length // step, 1)
    return step * min(-(-count // step), most)


def ablate_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """Return the programs of the stage, each with its expected number of calls; none without behaviours.

    Programs of a crosscoder are not planned.

    Args:
      plan: the run.
      mesh: the devices.
    """
    if not plan.configs[TaskConfig].has_behaviours:
        return []
    ablate, task, train = plan.configs[AblateConfig], plan.configs[TaskConfig], plan.configs[TrainConfig]
    used, length, ranking = plan.dictionary("ablate"), prompt_length(plan), ranking_prompts(plan)
    prompts = kept_prompts(plan, mesh, max(task.train_prompts, task.test_prompts))
    at_once, shards = rows_at_once(prompts, length), document_devices(mesh)
    if used.widths:  # programs of several sites are not planned
        return []
    reads, writes = Site.parse(used.site), Site.parse(used.target or used.site)
    point = SplitPoint(plan.model, writes, reads, mesh)
    params, dictionary = abstract_params(plan.model, mesh, plan.dtype), abstract_dictionary(used, train, mesh)
    source = _abstract_replacement(ablate, used.n_features)

    def value(place: Callable, count: int) -> jax.ShapeDtypeStruct:
        """Return the shape of the stream, the site's value or what is read, of ``count`` prompts."""
        return place(mesh, (count, length, used.d_in), plan.dtype)

    def domain(place: Callable, count: int) -> jax.ShapeDtypeStruct:
        """Return the shape of the editable positions of ``count`` prompts."""
        return place(mesh, (count, length), bool)

    def program(name: str, size: str, function: Callable, arguments: tuple, flops: float, runs: float) -> Program:
        """Return a program; model and dictionary are kept in memory even where it does not read them."""
        argument_ids = {id(argument) for argument in arguments}
        kept: list[Any] = [tree for tree in (params, dictionary) if id(tree) not in argument_ids]
        return Program(f"ablate: {name}", size, function, arguments, kept, flops, runs)

    def suffix_flops(count: int) -> float:
        return pass_flops(plan.model, count * length, length, plan.model.n_layers - reads.layer - 1)

    def encode_flops(count: int) -> float:  # the decoder has as many
        return 2.0 * count * length * used.d_in * used.n_features

    behaviours, trainings = count_all_behaviours(task), 1 + len(ablate.repeats)
    test = [Prompt("", "test", "", "", "")] * task.test_prompts
    named: Mapping[str, Sequence[Prompt]] = {str(number): test for number in range(behaviours)}
    edited_rows = _FIRING * behaviours * expected_rows(ablate, named, "0", used.n_features)
    ranked = behaviours * ranking / at_once
    points = STEPS if ablate.attribution == "integrated" else 1
    bases = trainings + len(ablate.baselines) + ablate.untrained_dictionaries + bool(ablate.untrained_dictionaries)
    size = f"{at_once} prompts of {length} tokens"
    counts = tuple(whole(mesh, (used.n_features,), dtype) for dtype in (jnp.int32, train.state_dtype))

    def slope_programs(name: str, targets: int, most: int, points: float, dictionaries: float) -> list[Program]:
        """Return the slopes of some targets on as many prompts as ``most`` tokens hold, and attributions by them."""
        # Rows that share no tokens, each read from its first one on.
        count = min(-(-ranking // shards), max(most // length, 1))
        kept = kept_prompts(plan, mesh, ranking)
        tree = _abstract_tree(mesh, fill(count), length, fill(count * length))
        place: Any = whole(mesh, tree.prompt_SxR.shape, jnp.int32)
        rows = PromptTree(tree, by_row(mesh, tree.prompt_SxR.shape, jnp.int32), place)
        clean, editable = value(whole, kept), domain(whole, kept)
        # Random replacements are drawn from each feature's own activations, so their counts travel along.
        counterpart = (clean, editable) if ablate.replacement == "counterpart" and targets == 1 else None
        sides = slopes.Sides(clean, editable, counterpart, counts if ablate.replacement == "random" else None)
        targets_CxSxRx2 = whole(mesh, (targets, *tree.prompt_SxR.shape, 2), jnp.int32)
        value_SxNxD = by_row(mesh, (*tree.row_SxN.shape, used.d_in), plan.dtype)
        shape = targets, *value_SxNxD.shape
        slope_CxSxNxD = jax.ShapeDtypeStruct(shape, plan.dtype, sharding=slopes.place_slopes(mesh, shape))
        size = f"{count * shards} prompts of {length} tokens"
        sloped = point, params, _abstract_past(point, params, clean), clean, value_SxNxD, rows, targets_CxSxRx2
        scored = point, dictionary, sides, tree, slope_CxSxNxD, source
        flops = [(1 + targets) * each(count * shards) for each in (suffix_flops, encode_flops)]
        runs = behaviours * ranking / (count * shards)
        return [
            program(f"{name}slopes", size, slopes.target_slopes, sloped, flops[0], runs * points),
            program(f"{name}attribution", size, slopes.score_slopes, scored, flops[1], runs * dictionaries),
        ]

    ids_BxT, last_B = by_row(mesh, (at_once, length), jnp.int32), by_row(mesh, (at_once,), jnp.int32)
    head = (point, ablate.error, params, dictionary, ids_BxT, last_B, domain(by_row, at_once))
    head_flops = pass_flops(plan.model, at_once * length, length, writes.layer + 1)
    programs = [program("head", size, run_head, head, head_flops, 2 * ranked)]
    # Dictionaries share slopes without an edit.
    programs += slope_programs("", 1, PROGRAM_TOKENS, points * (bases if points > 1 else trainings), bases)
    if ablate.placebo_targets:
        sharing = trainings if ablate.error == "keep" else 1  # dictionaries of the site
        groups = max(TOKENS, ablate.placebo_targets) / slopes.TARGETS
        programs += slope_programs("placebo ", slopes.TARGETS, slopes.TARGET_TOKENS, groups * points, groups * sharing)

    # The engine gathers the columns of the features that a group of edits needs, filled up to a few widths.
    gathered = filled_features(min(used.n_features, max(GATHERED, ablate.top)))
    sides = [value(whole, prompts), domain(whole, prompts)] * (2 if ablate.replacement == "counterpart" else 1)
    chosen = (point, dictionary, source, sides, whole(mesh, (gathered,), jnp.int32), prompts)
    flops = len(sides) / 2 * encode_flops(prompts)
    size = f"{prompts} prompts, {gathered} features"
    # Each dictionary or basis encodes the test prompts for its list, its dose and its edit.
    programs.append(program("features", size, gather, chosen, flops, 3 * behaviours * bases))

    # Rows that share no tokens, each changed from its start on: batches are full.
    batch = ablate.batch_rows
    f_PxTxK = whole(mesh, (prompts, length, gathered), train.state_dtype)
    W_dec_KxD = whole(mesh, (gathered, used.d_in), train.state_dtype)
    edited = _edited_rows(point, params, value(whole, prompts), f_PxTxK, W_dec_KxD, batch)
    flops = suffix_flops(batch) + 2.0 * batch * length * gathered * used.d_in
    programs.append(program("tail", f"{batch} edited prompts", run_rows, edited, flops, edited_rows / batch))
    return programs


def _abstract_replacement(config: AblateConfig, features: int) -> ActivationReplacement:
    """Return what replaces the activations of a dictionary's features, with shapes in place of arrays."""
    return ActivationReplacement(
        config.replacement,
        mean_F=jax.ShapeDtypeStruct((features,), jnp.float32) if config.replacement == "mean" else None,
        seed=jax.ShapeDtypeStruct((), jnp.uint32) if config.replacement == "random" else None,
    )


def _edited_rows(
    point: SplitPoint,
    params: Any,
    value_PxTxD: jax.ShapeDtypeStruct,
    f_PxTxK: jax.ShapeDtypeStruct,
    W_dec_KxD: jax.ShapeDtypeStruct,
    batch: int,
) -> tuple:
    """Return the arguments of the program that runs a batch of edited prompts, each changed from its start on."""
    mesh, (_, length, gathered) = point.mesh, f_PxTxK.shape
    past = _abstract_past(point, params, value_PxTxD)
    clean = CleanValues(value_PxTxD, value_PxTxD, f_PxTxK, W_dec_KxD, past, None, None)
    of_shard = -(-batch // document_devices(mesh))
    tree = _abstract_tree(mesh, few_rows(of_shard), length, fill(of_shard * length))
    answers_SxRx2 = by_row(mesh, (*tree.prompt_SxR.shape, 2), jnp.int32)
    fraction_SxRxK = by_row(mesh, (*tree.prompt_SxR.shape, gathered), jnp.float32)
    return point, params, clean, tree, tree.prompt_SxR, answers_SxRx2, fraction_SxRxK, None


def _abstract_past(point: SplitPoint, params: Any, value_PxTxD: jax.ShapeDtypeStruct) -> PrefixKV:
    """Return keys and values of the clean run above the site."""
    past = jax.eval_shape(point.run_suffix_with_kv, params, value_PxTxD, value_PxTxD)[1]
    return placed(past, past.placements(point.mesh))


def _abstract_tree(mesh: Mesh, rows: int, length: int, tokens: int) -> SharedPrefixBatch:
    """Return the tree of so many rows and tokens of each shard, one shard for each device that has rows."""
    shapes = ((rows,), (rows,), (rows, length), (tokens,), (tokens,))
    return SharedPrefixBatch(*(by_row(mesh, (document_devices(mesh), *shape), jnp.int32) for shape in shapes))
