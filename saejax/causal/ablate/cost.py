"""What the stage ``ablate`` takes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from saejax.causal import ablation_programs, screening
from saejax.causal.ablate import dose, nested, text
from saejax.causal.ablation import FEATURES
from saejax.causal.activation_sources import ActivationSource
from saejax.causal.circuits import measure as circuits
from saejax.causal.circuits import sizes
from saejax.causal.cost import FIRING, causal_cost, edited_bytes, kept_prompts, layers_above, prompt_length
from saejax.causal.screening import points
from saejax.causal.split import PROMPTS, run_head
from saejax.costs.cost import START, Cost, PlannedRun
from saejax.costs.passes import pass_flops
from saejax.costs.programs import Program, abstract_dictionary, abstract_params, by_row, placed, whole
from saejax.models.rules import RunRules
from saejax.models.sites import Site
from saejax.models.split import SplitPoint
from saejax.models.tree import Tree
from saejax.settings import ESTIMATES
from saejax.tasks.cost import PROMPT, count_all_behaviours

_COMPILE = 5.0  # seconds in which a behaviour's programs are compiled, whose prompts have a length of their own


def ablate_cost(plan: PlannedRun, name: str) -> Cost:
    """The tail on every test prompt without each of the sets, and its gradient on every train prompt."""
    task, ablate, used = plan.configs["task"], plan.configs["ablate"], plan.dictionary("ablate")
    behaviours, sets = count_all_behaviours(task), _sets(plan)
    # Greedy sets: N steps over what is left of the candidates, on train prompts.
    grown = ablate.greedy * ((nested.CANDIDATES - 0.5) * ablate.greedy + 0.5) * task.train_prompts
    slopes = points(ablate.estimate) * task.train_prompts * (1 + len(ablate.baselines) + (behaviours > 1) / 3)
    if ablate.effects == "all":
        slopes += sum(map(points, ESTIMATES)) * task.test_prompts
    tokens = int(behaviours * (task.test_prompts * sets + grown + 3 * slopes)) * PROMPT
    if ablate.text_documents:  # the head of the vocabulary is as much again
        doses = dose.SIZES * (1 + len(ablate.baselines)) * min(text.FOR_DOSE, ablate.text_documents)
        tokens += 2 * behaviours * (doses + ablate.text_documents) * text.LENGTH
    flops = pass_flops(plan.model, tokens, PROMPT, layers_above(plan, used))
    more = dict(
        host_seconds=START + _COMPILE * behaviours * (1 + len(ablate.baselines) / 2),
        batches=dict(prompts=PROMPTS, rows=ablate.batch_rows),
    )
    return causal_cost(plan, flops, edited_bytes(plan, used, _gathered(plan), ablate.batch_rows), used, **more)


def _sets(plan: PlannedRun) -> float:
    """How many sets are removed from a test prompt and run.

    About one row in six changes nothing and is not run. Where every feature is removed by itself, most rows are such:
    a feature fires on a few per cent of tokens.
    """
    ablate, task = plan.configs["ablate"], plan.configs["task"]
    share = min(ablate.draw_prompts or task.test_prompts, task.test_prompts) / task.test_prompts
    sets = FIRING * (ablate.draws * share + 4 * ablate.top + 1)  # features one by one, each with three of its like
    sets += FIRING * dose.SIZES * (1 + len(ablate.baselines)) + count_all_behaviours(task) - 1
    if ablate.curve:
        sets += FIRING * (min(ablate.top, nested.SIZES) + nested.DRAWS * min(ablate.top, nested.CONTROL_SIZES))
    if ablate.circuit_tests:
        sets += 3 * circuits.DRAWS + ablate.top + len(sizes.SHARES) * (3 + sizes.DRAWS * share)
    if ablate.effects == "all":
        sets += 0.2 * plan.dictionary("ablate").n_features * (1 + len(ablate.compare))
    return sets


def _gathered(plan: PlannedRun) -> int:
    """The features whose activations are kept at once, filled up; a circuit kept alone is all others removed."""
    ablate, features = plan.configs["ablate"], plan.dictionary("ablate").n_features
    most = ablate.top * (1 + ablate.matches)
    if ablate.circuit_tests or ablate.effects == "all":
        most = max(most, features if ablate.circuit_tests else FEATURES)
    return 2 ** (min(features, most) - 1).bit_length()


def ablate_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """The head, the slopes, the features that are removed, and the tail without them."""
    if not plan.configs["task"].has_behaviours:
        return []
    model, length, ablate = plan.model, prompt_length(plan), plan.configs["ablate"]
    used, train, prompts, k = plan.dictionary("ablate"), plan.configs["train"], kept_prompts(plan), _gathered(plan)
    site, d, f, rows = Site.parse(used.site), used.d_in, used.n_features, ablate.batch_rows
    point = SplitPoint(model, site, site, mesh, RunRules(remat=plan.configs["model"].remat))
    params, dictionary = abstract_params(model, mesh, plan.dtype), abstract_dictionary(used, train, mesh)

    def values(place: Callable, count: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """The stream and the site's value."""
        return place(mesh, (count, length, d), plan.dtype), place(mesh, (count, length, d), plan.dtype)

    def ends(count: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Last positions and answers."""
        return by_row(mesh, (count,), jnp.int32), by_row(mesh, (count, 2), jnp.int32)

    stream_BxTxD, value_BxTxD = values(whole, prompts)
    domain_BxT = whole(mesh, (prompts, length), bool)
    past = placed(jax.eval_shape(point.record, params, stream_BxTxD, value_BxTxD)[1], mesh)
    f_BxTxK = whole(mesh, (prompts, length, k), train.state_dtype)
    W_dec_KxD = whole(mesh, (k, d), train.state_dtype)
    bank = ablation_programs.CleanValues(stream_BxTxD, value_BxTxD, f_BxTxK, W_dec_KxD, past, None)
    sides = [value_BxTxD, domain_BxT] * (2 if ablate.replacement == "counterpart" else 1)
    source = ActivationSource(
        ablate.replacement,
        mean_F=jax.ShapeDtypeStruct((f,), jnp.float32) if ablate.replacement == "mean" else None,
        seed=jax.ShapeDtypeStruct((), jnp.uint32) if ablate.replacement == "random" else None,
    )
    above, encode = layers_above(plan, used), 2.0 * length * d * f  # of a prompt
    size = f"{PROMPTS} prompts of {length} tokens"
    shards = mesh.shape["data"]
    own = -(-rows // shards)  # of a shard
    shapes = ((own,), (own,), (own, length), (own * length,), (own * length,))
    tree = Tree(*(by_row(mesh, (shards, *shape), jnp.int32) for shape in shapes))
    ids_BxT, wanted_BxT = by_row(mesh, (PROMPTS, length), jnp.int32), by_row(mesh, (PROMPTS, length), bool)
    head = (point, "keep", params, dictionary, ids_BxT, ends(PROMPTS)[0], wanted_BxT)
    read_BxTxD = values(by_row, PROMPTS)[1]
    sums = whole(mesh, (f,), jnp.int32), whole(mesh, (f,), train.state_dtype)
    lent = dict(counterpart=(read_BxTxD, wanted_BxT), random=sums).get(ablate.replacement, ())
    slopes = (*values(by_row, PROMPTS), read_BxTxD, wanted_BxT, *ends(PROMPTS), source, lent)
    many, features_K = points(ablate.estimate), whole(mesh, (k,), jnp.int32)
    edited = (by_row(mesh, (shards, own, k), bool), by_row(mesh, (shards, own, 2), jnp.int32))
    slope_flops = 3.0 * many * pass_flops(model, PROMPTS * length, length, above) + 2.0 * PROMPTS * encode
    return [
        Program("ablate: head", size, run_head, head, (), pass_flops(model, PROMPTS * length, length, site.layer + 1)),
        Program(
            "ablate: attribution",
            size,
            screening.score_features,
            (point, many, params, dictionary, *slopes),
            (),
            slope_flops,
        ),
        Program(
            "ablate: features",
            f"{prompts} prompts, {k} features",
            ablation_programs.gather,
            (point, dictionary, source, sides, features_K, prompts),
            params,
            len(sides) / 2 * prompts * encode,
        ),
        Program(
            "ablate: tail",
            f"{rows} edited prompts",
            ablation_programs.run_rows,
            (point, params, bank, tree, tree.place_SxR, *edited),
            dictionary,
            pass_flops(model, rows * length, length, above) + 2.0 * rows * length * k * d,
        ),
    ]
