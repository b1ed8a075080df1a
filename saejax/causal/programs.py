"""The programs that several causal stages run on a model split at a dictionary's site, with shapes in place of arrays.

Preflight compiles them: each stage's ``programs`` names those that it calls, and adds its own.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from saejax.costs.passes import pass_flops
from saejax.costs.plan import PlannedRun
from saejax.costs.programs import Program, abstract_dictionary, abstract_params, by_row, placed, whole
from saejax.dictionaries import DictionaryConfig
from saejax.interventions import engine_programs as ablation_programs
from saejax.interventions import slopes as screening
from saejax.interventions.replacement import ActivationReplacement
from saejax.interventions.rows import few_rows, full_batch
from saejax.interventions.split_model import GROUP_TOKENS, LENGTH_STEP, PROMPTS, SiteRows, run_head
from saejax.models.config import RunRules
from saejax.models.sites import Site
from saejax.models.split import SharedPrefixBatch, SplitPoint
from saejax.settings import ModelConfig, PreflightConfig, TaskConfig, TrainConfig


def prompt_length(plan: PlannedRun) -> int:
    """Return the tokens of a behaviour's prompt, padded."""
    return -(-min(plan.configs[PreflightConfig].prompt_tokens, plan.model.context) // LENGTH_STEP) * LENGTH_STEP


def kept_prompts(plan: PlannedRun) -> int:
    """Return the prompts of a behaviour, filled up to whole runs of the head, or as many as one group holds."""
    task = plan.configs[TaskConfig]
    length = min(plan.configs[PreflightConfig].prompt_tokens, plan.model.context)
    most = max(GROUP_TOKENS // length // PROMPTS, 1)
    return PROMPTS * min(-(-max(task.train_prompts, task.test_prompts) // PROMPTS), most)


def layers_above(plan: PlannedRun, used: DictionaryConfig) -> int:
    """Return the number of layers above a dictionary's site."""
    return plan.model.n_layers - Site.parse(used.site).layer - 1


class SplitShapes:
    """Programs of a stage on its dictionary.

    Args:
      stage: whose settings name the dictionary.

    Attributes:
      used, dictionary: its sizes, and its arrays on every device.
      point, params: the model split at its site, as ``SplitModel`` has it.
      length, prompts: tokens of a behaviour's prompt, padded, and how many prompts a clean run holds.
    """

    def __init__(self, plan: PlannedRun, mesh: Mesh, stage: str):
        self._plan, self._mesh, self._stage = plan, mesh, stage
        self.used, self._kept = plan.dictionary(stage), plan.configs[TrainConfig].state_dtype
        self.length, self.prompts = prompt_length(plan), kept_prompts(plan)
        reads, writes = Site.parse(self.used.site), Site.parse(self.used.target or self.used.site)
        rules = RunRules(remat=plan.configs[ModelConfig].remat)
        self.point = SplitPoint(plan.model, writes, reads, mesh, rules)
        self.params = abstract_params(plan.model, mesh, plan.dtype)
        self.dictionary = abstract_dictionary(self.used, plan.configs[TrainConfig], mesh)
        self._size = f"{PROMPTS} prompts of {self.length} tokens"

    def program(self, name: str, size: str, function: Callable, arguments: tuple, flops: float) -> Program:
        """One of the stage's own; what it is not given of the model and the dictionary is kept beside it."""
        given = {id(argument) for argument in arguments}
        kept = [one for one in (self.params, self.dictionary) if id(one) not in given]
        return Program(f"{self._stage}: {name}", size, function, arguments, kept, flops)

    def value(self, place: Callable, count: int, length: int | None = None) -> jax.ShapeDtypeStruct:
        """The stream, the site's value or what is read, of so many prompts."""
        return place(self._mesh, (count, length or self.length, self.used.d_in), self._plan.dtype)

    def domain(self, place: Callable, count: int, length: int | None = None) -> jax.ShapeDtypeStruct:
        """Where features count."""
        return place(self._mesh, (count, length or self.length), bool)

    def rows(self, place: Callable = by_row, count: int = PROMPTS) -> SiteRows:
        """So many rows of a clean run."""
        value, domain = self.value(place, count), self.domain(place, count)
        ends = place(self._mesh, (count,), jnp.int32), place(self._mesh, (count, 2), jnp.int32)
        return SiteRows(value, value, value, domain, *ends)

    def tail_flops(self, prompts: int, length: int | None = None) -> float:
        """Products of the layers above the site."""
        length = length or self.length
        return pass_flops(self._plan.model, prompts * length, length, layers_above(self._plan, self.used))

    def encode_flops(self, prompts: int, length: int | None = None) -> float:
        """Products of the encoder; as many are the decoder's."""
        return 2.0 * prompts * (length or self.length) * self.used.d_in * self.used.n_features

    def head(self, count: int = PROMPTS, length: int = 0, error: str = "keep") -> Program:
        """The layers below, of a behaviour's prompts or of longer texts."""
        length = length or self.length
        ids_BxT = by_row(self._mesh, (count, length), jnp.int32)
        rows = ids_BxT, by_row(self._mesh, (count,), jnp.int32), self.domain(by_row, count, length)
        flops = pass_flops(self._plan.model, count * length, length, self.point.site.layer + 1)
        arguments = (self.point, error, self.params, self.dictionary, *rows)
        return self.program("head", f"{count} prompts of {length} tokens", run_head, arguments, flops)

    def slopes(self, estimate: str, replacement: str) -> Program:
        """What ranks the features."""
        rows = self.rows()
        counts = [whole(self._mesh, (self.used.n_features,), dtype) for dtype in (jnp.int32, self._kept)]
        lent = dict(counterpart=(rows.read_BxTxD, rows.domain_BxT), random=tuple(counts)).get(replacement, ())
        many, backward = screening.points(estimate), screening.backward_of(estimate)
        point = dataclasses.replace(self.point, rules=dataclasses.replace(self.point.rules, backward=backward))
        arguments = (point, many, self.params, self.dictionary, rows, self._source(replacement), lent)
        flops = 3.0 * many * self.tail_flops(PROMPTS) + 2.0 * self.encode_flops(PROMPTS)
        return self.program("attribution", self._size, screening.score_features, arguments, flops)

    def placebos(self, replacement: str) -> Program:
        """Return the program that ranks the features for some placebo targets at once."""
        counts = [whole(self._mesh, (self.used.n_features,), dtype) for dtype in (jnp.int32, self._kept)]
        targets_Cx2 = whole(self._mesh, (screening.TARGETS, 2), jnp.int32)
        real_B = whole(self._mesh, (PROMPTS,), bool)
        sums = tuple(counts) if replacement == "random" else ()
        rows, source = self.rows(), self._source(replacement)
        arguments = (self.point, self.params, self.dictionary, rows, real_B, targets_Cx2, source, sums)
        flops = (1 + screening.TARGETS) * self.tail_flops(PROMPTS) + screening.TARGETS * self.encode_flops(PROMPTS)
        return self.program("placebo attribution", self._size, screening.score_targets, arguments, flops)

    def features(self, replacement: str, gathered: int) -> Program:
        """What is removed of so many features, filled up."""
        sides = [self.value(whole, self.prompts), self.domain(whole, self.prompts)]
        sides *= 2 if replacement == "counterpart" else 1
        features_K = whole(self._mesh, (gathered,), jnp.int32)
        arguments = (self.point, self.dictionary, self._source(replacement), sides, features_K, self.prompts)
        size, flops = f"{self.prompts} prompts, {gathered} features", len(sides) / 2 * self.encode_flops(self.prompts)
        return self.program("features", size, ablation_programs.gather, arguments, flops)

    def tail(self, gathered: int, rows: int) -> Program:
        """The layers above, of so many rows from which some of the features that were gathered are removed."""
        length, shards = self.length, self._mesh.shape["data"]
        value = self.value(whole, self.prompts)
        past = placed(jax.eval_shape(self.point.run_suffix_with_kv, self.params, value, value)[1], self._mesh)
        f_BxTxK = whole(self._mesh, (self.prompts, length, gathered), self._kept)
        W_dec_KxD = whole(self._mesh, (gathered, self.used.d_in), self._kept)
        clean = ablation_programs.CleanValues(value, value, f_BxTxK, W_dec_KxD, past, None, None)
        of_shard = -(-rows // shards)
        own, tokens = few_rows(of_shard), full_batch(of_shard * length, length)
        shapes = ((own,), (own,), (own, length), (tokens,), (tokens,))
        tree = SharedPrefixBatch(*(by_row(self._mesh, (shards, *shape), jnp.int32) for shape in shapes))
        edited = (
            by_row(self._mesh, (shards, own, 2), jnp.int32),
            by_row(self._mesh, (shards, own, gathered), jnp.float32),
            None,
        )
        flops = self.tail_flops(rows) + 2.0 * rows * length * gathered * self.used.d_in
        arguments = (self.point, self.params, clean, tree, tree.prompt_SxR, *edited)
        return self.program("tail", f"{rows} edited prompts", ablation_programs.run_rows, arguments, flops)

    def _source(self, replacement: str) -> ActivationReplacement:
        return ActivationReplacement(
            replacement,
            mean_F=jax.ShapeDtypeStruct((self.used.n_features,), jnp.float32) if replacement == "mean" else None,
            seed=jax.ShapeDtypeStruct((), jnp.uint32) if replacement == "random" else None,
        )
