"""The programs of the stage ``ablate`` with shapes in place of arrays, which preflight compiles.

They are: clean runs, attribution for answers and for placebo targets, changes of features, the layers above the site.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from saejax.costs.plan import PlannedRun
from saejax.costs.programs import Program, abstract_dictionary, abstract_params, by_row, placed, whole
from saejax.dictionaries import DictionaryConfig
from saejax.flops import pass_flops
from saejax.interventions import slopes
from saejax.interventions.ablation import expected_rows
from saejax.interventions.behaviour_prompts import STEPS, TOKENS
from saejax.interventions.edits import GATHERED, ActivationReplacement, filled_features
from saejax.interventions.rows import CleanValues, PromptTree, few_rows, fill, gather, run_rows, whole_rows
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
FIRING = 0.85  # share of the rows that are run: a set that changes nothing on a prompt is not
# Share of the time of rows of PROMPT_TOKENS that edited prompts take, in the demo: prompts are shorter, rows begin
# where they change, and share tokens. A fifth of the tokens are left, in smaller programs, and not all are planned.
SHORTER = 0.5


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


@dataclasses.dataclass(frozen=True)
class _Split:
    """The model, split at a dictionary's site, with shapes in place of arrays."""

    plan: PlannedRun
    mesh: Mesh

    @functools.cached_property
    def used(self) -> DictionaryConfig:
        """The dictionary whose features are ablated."""
        return self.plan.dictionary("ablate")

    @functools.cached_property
    def point(self) -> SplitPoint:
        """The model, split where the dictionary writes."""
        reads, writes = Site.parse(self.used.site), Site.parse(self.used.target or self.used.site)
        return SplitPoint(self.plan.model, writes, reads, self.mesh)

    @functools.cached_property
    def params(self) -> Any:
        """Parameters of the model."""
        return abstract_params(self.plan.model, self.mesh, self.plan.dtype)

    @functools.cached_property
    def dictionary(self) -> Any:
        """Parameters of the dictionary."""
        return abstract_dictionary(self.used, self.plan.configs[TrainConfig], self.mesh)

    @functools.cached_property
    def length(self) -> int:
        """Tokens of a prompt, padded."""
        return prompt_length(self.plan)

    @functools.cached_property
    def source(self) -> ActivationReplacement:
        """The replacement of the features' activations."""
        config, features = self.plan.configs[AblateConfig], self.used.n_features
        return ActivationReplacement(
            config.replacement,
            mean_F=jax.ShapeDtypeStruct((features,), jnp.float32) if config.replacement == "mean" else None,
            seed=jax.ShapeDtypeStruct((), jnp.uint32) if config.replacement == "random" else None,
        )

    def array(self, count: int, width: int) -> jax.ShapeDtypeStruct:
        """Return the shape of values at every position of ``count`` prompts."""
        return whole(self.mesh, (count, self.length, width), self.plan.dtype)

    def domain(self, place: Callable, count: int) -> jax.ShapeDtypeStruct:
        """Return the shape of the editable positions of ``count`` prompts."""
        return place(self.mesh, (count, self.length), bool)

    def program(self, name: str, size: str, function: Callable, arguments: tuple, flops: float, runs: float) -> Program:
        """Return a program; model and dictionary are kept in memory even where it does not read them."""
        argument_ids = {id(argument) for argument in arguments}
        kept: list[Any] = [tree for tree in (self.params, self.dictionary) if id(tree) not in argument_ids]
        return Program(f"ablate: {name}", size, function, arguments, kept, flops, runs)

    def suffix_flops(self, count: int) -> float:
        """Return the operations of the layers above the site on ``count`` prompts."""
        layers = self.plan.model.n_layers - Site.parse(self.used.site).layer - 1
        return pass_flops(self.plan.model, count * self.length, self.length, layers)

    def encode_flops(self, count: int) -> float:
        """Return the operations of the encoder on ``count`` prompts."""
        return 2.0 * count * self.length * self.used.d_in * self.used.n_features


def ablate_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """Return the programs of the stage, each with its expected number of calls; none without behaviours.

    Programs of a crosscoder are not planned.

    Args:
      plan: the run.
      mesh: the devices.
    """
    split = _Split(plan, mesh)
    # Programs of several sites are not planned.
    if not plan.configs[TaskConfig].has_behaviours or split.used.widths:
        return []
    ablate, task = plan.configs[AblateConfig], plan.configs[TaskConfig]
    behaviours, trainings, ranking = count_all_behaviours(task), 1 + len(ablate.repeats), ranking_prompts(plan)
    bases = trainings + len(ablate.baselines) + ablate.untrained_dictionaries + bool(ablate.untrained_dictionaries)
    prompts = kept_prompts(plan, mesh, max(task.train_prompts, task.test_prompts))
    at_once = rows_at_once(prompts, split.length, document_devices(mesh))
    ids_BxT, last_B = by_row(mesh, (at_once, split.length), jnp.int32), by_row(mesh, (at_once,), jnp.int32)
    head = split.point, ablate.error, split.params, split.dictionary, ids_BxT, last_B, split.domain(by_row, at_once)
    flops = pass_flops(plan.model, at_once * split.length, split.length, split.point.site.layer + 1)
    size, runs = f"{at_once} prompts of {split.length} tokens", 2 * behaviours * ranking / at_once
    programs = [split.program("head", size, run_head, head, flops, runs)]

    # Dictionaries share slopes without an edit.
    points = STEPS if ablate.attribution == "integrated" else 1
    programs += _slope_programs(split, "", 1, PROGRAM_TOKENS, points * (bases if points > 1 else trainings), bases)
    if ablate.placebo_targets:
        sharing = trainings if ablate.error == "keep" else 1  # dictionaries of the site
        groups = max(TOKENS, ablate.placebo_targets) / slopes.TARGETS
        limits = slopes.TARGETS, slopes.TARGET_TOKENS
        programs += _slope_programs(split, "placebo ", *limits, groups * points, groups * sharing)

    # The engine gathers the columns of the features that a group of edits needs, filled up to a few widths.
    gathered = filled_features(min(split.used.n_features, max(GATHERED, ablate.top)))
    clean_sides = [split.array(prompts, split.used.d_in), split.domain(whole, prompts)]
    sides = clean_sides * (2 if ablate.replacement == "counterpart" else 1)
    chosen = split.point, split.dictionary, split.source, sides, whole(mesh, (gathered,), jnp.int32), prompts
    flops, size = len(sides) / 2 * split.encode_flops(prompts), f"{prompts} prompts, {gathered} features"
    # Each dictionary or basis encodes the test prompts for its list, its dose and its edit.
    programs.append(split.program("features", size, gather, chosen, flops, 3 * behaviours * bases))

    # Rows that share no tokens, each changed from its start on: batches are full.
    test = [Prompt("", "test", "", "", "")] * task.test_prompts
    named: Mapping[str, Sequence[Prompt]] = {str(number): test for number in range(behaviours)}
    edited_rows = SHORTER * FIRING * behaviours * expected_rows(ablate, named, "0", split.used.n_features)
    batch = ablate.batch_rows
    flops = split.suffix_flops(batch) + 2.0 * batch * split.length * gathered * split.used.d_out
    edited = _edited_rows(split, prompts, gathered, batch)
    programs.append(split.program("tail", f"{batch} edited prompts", run_rows, edited, flops, edited_rows / batch))
    return programs


def _slope_programs(
    split: _Split, name: str, targets: int, most: int, points: float, dictionaries: float
) -> list[Program]:
    """Return the slopes of some targets on as many prompts as ``most`` tokens hold, and attributions by them."""
    plan, mesh, ablate = split.plan, split.mesh, split.plan.configs[AblateConfig]
    ranking, shards, length = ranking_prompts(plan), document_devices(mesh), split.length
    # Rows that share no tokens, each read from its first one on.
    count = min(-(-ranking // shards), max(most // length, 1))
    kept = kept_prompts(plan, mesh, ranking)
    tree = _abstract_tree(mesh, whole_rows(count), length, fill(count * length))
    place: Any = whole(mesh, tree.prompt_SxR.shape, jnp.int32)
    rows = PromptTree(tree, by_row(mesh, tree.prompt_SxR.shape, jnp.int32), place)
    stream, read = (split.array(kept, width) for width in (plan.model.d_model, split.used.d_in))
    editable = split.domain(whole, kept)
    counterpart = (read, editable) if ablate.replacement == "counterpart" and targets == 1 else None
    counts = None
    if ablate.replacement == "random":  # drawn from each feature's own activations
        dtypes = jnp.int32, plan.configs[TrainConfig].state_dtype
        counts = tuple(whole(mesh, (split.used.n_features,), dtype) for dtype in dtypes)
    sides = slopes.Sides(read, editable, counterpart, counts)
    targets_CxSxRx2 = whole(mesh, (targets, *tree.prompt_SxR.shape, 2), jnp.int32)
    value_SxNxD = by_row(mesh, (*tree.row_SxN.shape, split.used.d_out), plan.dtype)
    shape = targets, *value_SxNxD.shape
    slope_CxSxNxD = jax.ShapeDtypeStruct(shape, plan.dtype, sharding=slopes.place_slopes(mesh, shape))
    past = _abstract_past(split, kept)
    sloped = split.point, split.params, past, stream, value_SxNxD, rows, targets_CxSxRx2
    scored = split.point, split.dictionary, sides, tree, slope_CxSxNxD, split.source
    flops = [(1 + targets) * flops_of(count * shards) for flops_of in (split.suffix_flops, split.encode_flops)]
    runs = SHORTER * count_all_behaviours(plan.configs[TaskConfig]) * ranking / (count * shards)
    size = f"{count * shards} prompts of {length} tokens"
    return [
        split.program(f"{name}slopes", size, slopes.target_slopes, sloped, flops[0], runs * points),
        split.program(f"{name}attribution", size, slopes.score_slopes, scored, flops[1], runs * dictionaries),
    ]


def _edited_rows(split: _Split, prompts: int, gathered: int, batch: int) -> tuple:
    """Return the arguments of the program that runs a batch of edited prompts, each changed from its start on."""
    mesh, dtype = split.mesh, split.plan.configs[TrainConfig].state_dtype
    stream_PxTxD, value_PxTxO = (split.array(prompts, width) for width in (split.plan.model.d_model, split.used.d_out))
    f_PxTxK = whole(mesh, (prompts, split.length, gathered), dtype)
    W_dec_KxO = whole(mesh, (gathered, split.used.d_out), dtype)
    past = _abstract_past(split, prompts)
    clean = CleanValues(stream_PxTxD, value_PxTxO, f_PxTxK, W_dec_KxO, past, None, None)
    of_shard = -(-batch // document_devices(mesh))
    tree = _abstract_tree(mesh, few_rows(of_shard, document_devices(mesh)), split.length, fill(of_shard * split.length))
    answers_SxRx2 = by_row(mesh, (*tree.prompt_SxR.shape, 2), jnp.int32)
    fraction_SxRxK = by_row(mesh, (*tree.prompt_SxR.shape, gathered), jnp.float32)
    return split.point, split.params, clean, tree, tree.prompt_SxR, answers_SxRx2, fraction_SxRxK, None


def _abstract_past(split: _Split, prompts: int) -> PrefixKV:
    """Return keys and values of the clean run above the site, of so many prompts."""
    values = (split.array(prompts, width) for width in (split.plan.model.d_model, split.used.d_out))
    past = jax.eval_shape(split.point.run_suffix_with_kv, split.params, *values)[1]
    return placed(past, past.placements(split.mesh))


def _abstract_tree(mesh: Mesh, rows: int, length: int, tokens: int) -> SharedPrefixBatch:
    """Return the tree of so many rows and tokens of each shard, one shard for each device that has rows."""
    shapes = ((rows,), (rows,), (rows, length), (tokens,), (tokens,))
    return SharedPrefixBatch(*(by_row(mesh, (document_devices(mesh), *shape), jnp.int32) for shape in shapes))
