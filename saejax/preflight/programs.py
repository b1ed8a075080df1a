"""The jitted functions that the stages run, with arguments that are shapes only, placed as the stages place them.

So they can be lowered and compiled for devices that are not there. None is a copy: what is compiled here is what a
stage calls.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from saejax.causal import ablation_programs, screening
from saejax.causal.replacements import Replacement
from saejax.causal.split import PROMPTS, run_head
from saejax.dictionaries import Dictionary
from saejax.dictionaries.modules import parameter_table as dictionary_table
from saejax.evaluation import programs as evaluation
from saejax.evaluation.loss_recovered import VARIANTS
from saejax.evaluation.member_data import MemberData
from saejax.models import decoding
from saejax.models.generation import make_choice
from saejax.models.language_model import forward
from saejax.models.parameters import LAYERS, parameter_table
from saejax.models.sites import Site
from saejax.models.split import SplitPoint
from saejax.models.tree import Tree
from saejax.parallel import fitting_sharding, sharding
from saejax.preflight.costs import head_flops, pass_flops, step_flops
from saejax.preflight.work import Stack, Work
from saejax.training.members import SiteScale
from saejax.training.step import Trainer
from saejax.training.train import check_divides

_STEPS = 1000  # length of the run, of which only the schedules know


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted function of a stage.

    Attributes:
      name: stage and function.
      size: of its batch, in words.
      function: what the stage calls.
      arguments: what it is called with; arrays are shapes with their shardings.
      kept: arrays that the stage keeps on the devices beside the arguments.
      flops: of all devices, by ``costs``.
    """

    name: str
    size: str
    function: Callable
    arguments: tuple
    kept: Any
    flops: float

    def lower(self) -> jax.stages.Lowered:
        """Traces the function for the arguments' devices."""
        return self.function.lower(*self.arguments)  # type: ignore[attr-defined]


def stage_programs(work: Work, mesh: Mesh) -> list[Program]:
    """The large programs of benchmark (where answers are generated), capture, train, evaluate and ablate.

    Args:
      work: what they run.
      mesh: its devices need not exist.

    Raises:
      UserError: the mesh does not divide the training batch or the features.
    """
    trained = [_train(work, stack, mesh) for stack in work.stacks]
    generated = [_generate(work, mesh, *work.generated)] if work.generated else []
    return [*generated, _capture(work, mesh), *trained, *_evaluate(work, mesh), *_ablate(work, mesh)]


def abstract_params(work: Work, mesh: Mesh, dtype: str, layers: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The decoder's parameters as ``weights.load_params`` places them; only the first ``layers`` if that is given."""
    params = {}
    for name, (shape, spec) in parameter_table(work.model).items():
        shape = (layers or shape[0], *shape[1:]) if name.startswith(LAYERS) else shape
        params[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=fitting_sharding(mesh, shape, *spec))
    return params


def abstract_dictionary(work: Work, mesh: Mesh) -> Dictionary:
    """The tested dictionary, whole on every device."""
    config, train = work.tested, work.train
    module = nnx.eval_shape(lambda: Dictionary.initial(config, jax.random.key(0), train.matmul, train.state_dtype))
    return _placed(module, mesh)


def _placed(tree: Any, mesh: Mesh) -> Any:
    """The shapes of a tree, replicated."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(mesh)), tree)


def _by_row(mesh: Mesh, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """An array whose rows are split over ``data`` where that divides them."""
    where = fitting_sharding(mesh, shape, "data", *[None] * (len(shape) - 1))
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=where)


def _whole(mesh: Mesh, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding(mesh))


def _generate(work: Work, mesh: Mesh, rows: int, length: int, new: int) -> Program:
    """The pass over the prompts, which holds the largest cache: with and without room for the new tokens."""
    ids_BxT, pad_B = _by_row(mesh, (rows, length), jnp.int32), _by_row(mesh, (rows,), jnp.int32)
    greedy = jax.eval_shape(lambda: make_choice(0.0, 1.0, 0))
    return Program(
        "benchmark: prefill",
        f"{rows} prompts of {length} tokens, {new} new",
        decoding.prefill,
        (work.model, new, abstract_params(work, mesh, work.dtype), ids_BxT, pad_B, np.zeros(1, np.int32), (), greedy),
        (),
        pass_flops(work.model, rows * length, length, work.model.n_layers) + head_flops(work.model, rows),
    )


def _capture(work: Work, mesh: Mesh) -> Program:
    rows, length = work.batch
    rows += -rows % mesh.shape["data"]
    layers = 1 + max(site.layer for site in work.sites)
    params = abstract_params(work, mesh, work.capture, layers)
    ids_BxT, lengths_B = _by_row(mesh, (rows, length), jnp.int32), _by_row(mesh, (rows,), jnp.int32)
    return Program(
        "capture: forward",
        f"{rows} x {length} tokens to layer {layers - 1}",
        forward,
        (work.model, work.sites, False, params, ids_BxT, lengths_B),
        (),
        pass_flops(work.model, rows * length, length, layers),
    )


def _train(work: Work, stack: Stack, mesh: Mesh) -> Program:
    config, dictionary, members = work.train, stack.dictionary, stack.members
    d_in = dictionary.d_in
    check_divides(config, dictionary, len(members), mesh)
    metric_DxD = np.eye(d_in, dtype=np.float32) if config.whiten_error else None
    scale = SiteScale(1.0, 1.0, np.zeros(d_in, np.float32), metric_DxD=metric_DxD)
    trainer = Trainer(config, dictionary, members, mesh, _STEPS, [scale] * len(members))
    shape = (len(trainer.sites), config.batch, d_in)
    batch = jax.ShapeDtypeStruct(shape, work.stored, sharding=trainer.batch_sharding)
    many = f"{len(members)} members, " if len(members) > 1 else ""
    return Program(
        f"train: {dictionary.kind} step",
        f"{many}{config.batch} tokens, {d_in} -> {dictionary.n_features:,}",
        trainer.compiled,
        (trainer.abstract_state, trainer.abstract_hyper, (batch,) if config.form == "sae" else (batch, batch)),
        (),
        len(members) * step_flops(config.batch, d_in, dictionary.n_features),
    )


def _evaluate(work: Work, mesh: Mesh) -> list[Program]:
    rows, length = work.scored
    model, site, d, f = work.model, work.site, work.tested.d_in, work.tested.n_features
    target = Site.parse(work.tested.target or work.tested.site)
    tokens, variants, point = rows * length, len(VARIANTS), SplitPoint(model, target, site, mesh)
    params, member = abstract_params(work, mesh, work.dtype), _abstract_member(work, mesh)
    ids_BxT, lengths_B = _by_row(mesh, (rows, length), jnp.int32), _by_row(mesh, (rows,), jnp.int32)
    value_BxTxD = _by_row(mesh, (rows, length, d), work.dtype)
    inside_BxT, limit = _by_row(mesh, (rows, length), bool), _whole(mesh, (), jnp.float32)
    streams = jax.ShapeDtypeStruct(
        (variants, rows, length, d),
        work.dtype,
        sharding=fitting_sharding(mesh, (variants, rows, length, d), None, "data", None, None),
    )
    size = f"{rows} x {length} tokens"
    return [
        Program(
            "evaluate: head",
            size,
            evaluation.head,
            (point, params, ids_BxT, limit, limit),
            member,
            pass_flops(model, tokens, length, target.layer + 1),
        ),
        Program(
            "evaluate: stand-in",
            size,
            evaluation.stand_in,
            (member, value_BxTxD, value_BxTxD, inside_BxT),
            params,
            4.0 * tokens * d * f,
        ),
        Program(
            "evaluate: tail",
            size,
            evaluation.tail,
            (point, params, value_BxTxD, value_BxTxD),
            member,
            pass_flops(model, tokens, length, model.n_layers - target.layer),
        ),
        Program(
            "evaluate: compare",
            f"{size}, {variants} variants",
            evaluation.compare,
            (model, params, streams, ids_BxT, lengths_B),
            member,
            variants * head_flops(model, tokens),
        ),
    ]


def _abstract_member(work: Work, mesh: Mesh) -> MemberData:
    """The tested dictionary as evaluate places it."""
    arrays = {
        name: jax.ShapeDtypeStruct(shape, work.train.state_dtype, sharding=fitting_sharding(mesh, shape, *axes))
        for name, (shape, axes) in dictionary_table(work.tested).items()
    }
    k, fires_above = _whole(mesh, (), jnp.int32), _whole(mesh, (), jnp.float32)
    common = dataclasses.replace(work.tested, site="", target="", fires_above=0.0, max_norm=0.0)
    return MemberData(arrays, k, fires_above, common, "float32")


def _ablate(work: Work, mesh: Mesh) -> list[Program]:
    model, length = work.model, work.prompt
    point = SplitPoint(model, work.site, work.site, mesh, work.rules)
    params, dictionary = abstract_params(work, mesh, work.dtype), abstract_dictionary(work, mesh)
    d, f, k, rows = work.tested.d_in, work.tested.n_features, work.features, work.rows

    def values(place: Callable, count: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """The stream and the site's value."""
        return place(mesh, (count, length, d), work.dtype), place(mesh, (count, length, d), work.dtype)

    def ends(count: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Last positions and answers."""
        return _by_row(mesh, (count,), jnp.int32), _by_row(mesh, (count, 2), jnp.int32)

    stream_BxTxD, value_BxTxD = values(_whole, work.prompts)
    domain_BxT = _whole(mesh, (work.prompts, length), bool)
    past = _placed(jax.eval_shape(point.record, params, stream_BxTxD, value_BxTxD)[1], mesh)
    f_BxTxK = _whole(mesh, (work.prompts, length, k), work.train.state_dtype)
    W_dec_KxD = _whole(mesh, (k, d), work.train.state_dtype)
    bank = ablation_programs.Bank(stream_BxTxD, value_BxTxD, f_BxTxK, W_dec_KxD, past, None)
    sides = [value_BxTxD, domain_BxT] * (2 if work.replacement == "counterpart" else 1)
    replacement = Replacement(
        work.replacement,
        mean_F=jax.ShapeDtypeStruct((f,), jnp.float32) if work.replacement == "mean" else None,
        seed=jax.ShapeDtypeStruct((), jnp.uint32) if work.replacement == "random" else None,
    )
    below, above = work.site.layer + 1, model.n_layers - work.site.layer - 1
    encode = 2.0 * length * d * f  # of a prompt
    tail = pass_flops(model, rows * length, length, above)
    size = f"{PROMPTS} prompts of {length} tokens"
    shards = mesh.shape["data"]
    own = -(-rows // shards)  # of a shard
    shapes = ((own,), (own,), (own, length), (own * length,), (own * length,))
    tree = Tree(*(_by_row(mesh, (shards, *shape), jnp.int32) for shape in shapes))
    return [
        Program(
            "ablate: head",
            size,
            run_head,
            (
                point,
                "keep",
                params,
                dictionary,
                _by_row(mesh, (PROMPTS, length), jnp.int32),
                ends(PROMPTS)[0],
                _by_row(mesh, (PROMPTS, length), bool),
            ),
            (),
            pass_flops(model, PROMPTS * length, length, below),
        ),
        Program(
            "ablate: attribution",
            size,
            screening.score_features,
            (
                point,
                screening.points(work.estimate),
                params,
                dictionary,
                *values(_by_row, PROMPTS),
                values(_by_row, PROMPTS)[1],
                _by_row(mesh, (PROMPTS, length), bool),
                *ends(PROMPTS),
            ),
            (),
            3.0 * screening.points(work.estimate) * pass_flops(model, PROMPTS * length, length, above)
            + 2.0 * PROMPTS * encode,
        ),
        Program(
            "ablate: features",
            f"{work.prompts} prompts, {k} features",
            ablation_programs.gather,
            (point, dictionary, replacement, sides, _whole(mesh, (k,), jnp.int32), work.prompts),
            params,
            len(sides) / 2 * work.prompts * encode,
        ),
        Program(
            "ablate: tail",
            f"{rows} edited prompts",
            ablation_programs.run_rows,
            (
                point,
                params,
                bank,
                tree,
                tree.place_SxR,
                _by_row(mesh, (shards, own, k), bool),
                _by_row(mesh, (shards, own, 2), jnp.int32),
            ),
            dictionary,
            tail + 2.0 * rows * length * k * d,
        ),
    ]
