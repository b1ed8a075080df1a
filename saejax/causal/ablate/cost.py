"""What the stage ``ablate`` takes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from saejax.causal import ablation_programs, screening
from saejax.causal.ablate import dose, nested, text, verdict
from saejax.causal.ablation import FEATURES
from saejax.causal.activation_sources import ActivationSource
from saejax.causal.circuits import measure as circuits
from saejax.causal.circuits import sizes
from saejax.causal.cost import FIRING, causal_cost, edited_bytes, kept_prompts, layers_above, prompt_length
from saejax.causal.rows import filled_features, full_batch
from saejax.causal.screening import points
from saejax.causal.split import PROMPTS, SiteRows, run_head
from saejax.costs.cost import START, Cost, PlannedRun
from saejax.costs.passes import pass_flops
from saejax.costs.programs import Program, abstract_dictionary, abstract_params, by_row, placed, whole
from saejax.models.rules import RunRules
from saejax.models.sites import Site
from saejax.models.split import SplitPoint
from saejax.models.tree import Tree
from saejax.settings import ESTIMATES, AblateConfig
from saejax.tasks.cost import PROMPT, count_all_behaviours

_COMPILE = 5.0  # seconds in which a behaviour's programs are compiled, whose prompts have a length of their own


def ablate_cost(plan: PlannedRun, name: str) -> Cost:
    """The tail on every test prompt without each of the sets, and its gradient on every train prompt."""
    task, ablate, used = plan.configs["task"], plan.configs["ablate"], plan.dictionary("ablate")
    behaviours, prompts = count_all_behaviours(task), (task.train_prompts, task.test_prompts)
    rows = FIRING * expected_rows(ablate, *prompts, behaviours, used.n_features)
    slopes = points(ablate.estimate) * task.train_prompts * (1 + len(ablate.baselines) + len(ablate.repeats))
    if ablate.effects == "all":
        slopes += sum(map(points, ESTIMATES)) * task.test_prompts
    tokens = int(behaviours * (rows + 3 * slopes)) * PROMPT
    if ablate.text_documents:  # the head of the vocabulary is as much again
        doses = dose.SIZES * (1 + len(ablate.baselines)) * min(text.FOR_DOSE, ablate.text_documents)
        tokens += 2 * behaviours * (doses + ablate.text_documents) * text.LENGTH
    flops = pass_flops(plan.model, tokens, PROMPT, layers_above(plan, used))
    more = dict(
        host_seconds=START + _COMPILE * behaviours * (1 + len(ablate.baselines) / 2 + len(ablate.repeats)),
        batches=dict(prompts=PROMPTS, rows=ablate.batch_rows),
    )
    return causal_cost(plan, flops, edited_bytes(plan, used, _gathered(plan), ablate.batch_rows), used, **more)


def expected_rows(ablate: AblateConfig, train: int, test: int, behaviours: int, features: int) -> float:
    """How many rows, each a set that is removed from a prompt, a behaviour has; those that change nothing included.

    Args:
      ablate: the stage's settings.
      train, test: prompts of the behaviour.
      behaviours: of the run.
      features: of the dictionary. Where every one that fires is removed by itself, that is about a quarter.
    """
    drawn: float = ablate.draws + min(ablate.draws, verdict.CONTROLS)
    if ablate.curve:
        drawn += min(ablate.top, nested.SIZES) + nested.DRAWS * min(ablate.top, nested.CONTROL_SIZES)
    # Features one by one, each with three of its like; all together, and those of the other behaviours.
    sets: float = 4 * ablate.top + behaviours
    sets += dose.SIZES * (1 + len(ablate.baselines)) + 2 * ablate.greedy
    if ablate.circuit_tests:
        sets += 3 * circuits.DRAWS + ablate.top + 3 * len(sizes.SHARES)
        drawn += len(sizes.SHARES) * sizes.DRAWS
    if ablate.effects == "all":
        sets += features * (1 + len(ablate.compare)) / 4
    if ablate.repeats:
        drawn += len(ablate.repeats) * (ablate.draws + min(ablate.draws, verdict.CONTROLS))
        sets += len(ablate.repeats) * (4 * ablate.top + 1)
    # Greedy sets: N steps over what is left of the candidates.
    grown = ablate.greedy * ((nested.CANDIDATES - 0.5) * ablate.greedy + 0.5)
    return drawn * min(ablate.draw_prompts or test, test) + sets * test + grown * train


def _gathered(plan: PlannedRun) -> int:
    """The features whose activations are kept at once, filled up; a circuit kept alone is all others removed."""
    ablate, features = plan.configs["ablate"], plan.dictionary("ablate").n_features
    most = ablate.top * (1 + ablate.matches)
    if ablate.circuit_tests or ablate.effects == "all":
        most = max(most, features if ablate.circuit_tests else FEATURES)
    return filled_features(min(features, most))


def ablate_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """The head, the slopes, the features that are removed, and the tail without them."""
    if not plan.configs["task"].has_behaviours:
        return []
    shapes = _Shapes(plan, mesh)
    return [shapes.head(), shapes.slopes(), shapes.features(), shapes.tail()]


class _Shapes:
    """The stage's programs with shapes in place of arrays."""

    def __init__(self, plan: PlannedRun, mesh: Mesh):
        self._plan, self._mesh, self._ablate = plan, mesh, plan.configs["ablate"]
        self._model, self._used, self._kept = plan.model, plan.dictionary("ablate"), plan.configs["train"].state_dtype
        self._length, self._prompts, self._gathered = prompt_length(plan), kept_prompts(plan), _gathered(plan)
        self._site = Site.parse(self._used.site)
        rules = RunRules(remat=plan.configs["model"].remat)
        self._point = SplitPoint(self._model, self._site, self._site, mesh, rules)
        self._params = abstract_params(self._model, mesh, plan.dtype)
        self._dictionary = abstract_dictionary(self._used, plan.configs["train"], mesh)
        self._size = f"{PROMPTS} prompts of {self._length} tokens"

    def _value(self, place: Callable, count: int) -> jax.ShapeDtypeStruct:
        """The stream, the site's value or what is read, of so many prompts."""
        return place(self._mesh, (count, self._length, self._used.d_in), self._plan.dtype)

    def _domain(self, place: Callable, count: int) -> jax.ShapeDtypeStruct:
        return place(self._mesh, (count, self._length), bool)

    def _ends(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Last positions and answers."""
        return by_row(self._mesh, (PROMPTS,), jnp.int32), by_row(self._mesh, (PROMPTS, 2), jnp.int32)

    def _source(self) -> ActivationSource:
        kind = self._ablate.replacement
        return ActivationSource(
            kind,
            mean_F=jax.ShapeDtypeStruct((self._used.n_features,), jnp.float32) if kind == "mean" else None,
            seed=jax.ShapeDtypeStruct((), jnp.uint32) if kind == "random" else None,
        )

    def _flops(self, prompts: int, layers: int) -> float:
        return pass_flops(self._model, prompts * self._length, self._length, layers)

    def _encode_flops(self, prompts: int) -> float:
        return 2.0 * prompts * self._length * self._used.d_in * self._used.n_features

    def head(self) -> Program:
        ids_BxT = by_row(self._mesh, (PROMPTS, self._length), jnp.int32)
        rows = ids_BxT, self._ends()[0], self._domain(by_row, PROMPTS)
        arguments = (self._point, "keep", self._params, self._dictionary, *rows)
        return Program("ablate: head", self._size, run_head, arguments, (), self._flops(PROMPTS, self._site.layer + 1))

    def slopes(self) -> Program:
        value, domain = self._value(by_row, PROMPTS), self._domain(by_row, PROMPTS)
        counts = [whole(self._mesh, (self._used.n_features,), dtype) for dtype in (jnp.int32, self._kept)]
        lent = dict(counterpart=(value, domain), random=tuple(counts)).get(self._ablate.replacement, ())
        many = points(self._ablate.estimate)
        rows = SiteRows(value, value, value, domain, *self._ends())
        arguments = (self._point, many, self._params, self._dictionary, rows, self._source(), lent)
        above = layers_above(self._plan, self._used)
        flops = 3.0 * many * self._flops(PROMPTS, above) + 2.0 * self._encode_flops(PROMPTS)
        return Program("ablate: attribution", self._size, screening.score_features, arguments, (), flops)

    def features(self) -> Program:
        prompts, k = self._prompts, self._gathered
        sides = [self._value(whole, prompts), self._domain(whole, prompts)]
        sides *= 2 if self._ablate.replacement == "counterpart" else 1
        features_K = whole(self._mesh, (k,), jnp.int32)
        return Program(
            "ablate: features",
            f"{prompts} prompts, {k} features",
            ablation_programs.gather,
            (self._point, self._dictionary, self._source(), sides, features_K, prompts),
            self._params,
            len(sides) / 2 * self._encode_flops(prompts),
        )

    def tail(self) -> Program:
        prompts, k, length = self._prompts, self._gathered, self._length
        value, shards = self._value(whole, prompts), self._mesh.shape["data"]
        past = placed(jax.eval_shape(self._point.record, self._params, value, value)[1], self._mesh)
        f_BxTxK = whole(self._mesh, (prompts, length, k), self._kept)
        W_dec_KxD = whole(self._mesh, (k, self._used.d_in), self._kept)
        clean = ablation_programs.CleanValues(value, value, f_BxTxK, W_dec_KxD, past, None)
        rows = self._ablate.batch_rows
        own = -(-rows // shards)  # of a shard
        tokens = full_batch(own * length, length)
        shapes = ((own,), (own,), (own, length), (tokens,), (tokens,))
        tree = Tree(*(by_row(self._mesh, (shards, *shape), jnp.int32) for shape in shapes))
        edited = (by_row(self._mesh, (shards, own, k), bool), by_row(self._mesh, (shards, own, 2), jnp.int32))
        flops = self._flops(rows, layers_above(self._plan, self._used)) + 2.0 * rows * length * k * self._used.d_in
        arguments = (self._point, self._params, clean, tree, tree.place_SxR, *edited)
        return Program(
            "ablate: tail", f"{rows} edited prompts", ablation_programs.run_rows, arguments, self._dictionary, flops
        )
