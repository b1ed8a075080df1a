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

from saejax.causal import ablation, screening, split
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.evaluation import loss_recovered
from saejax.models import decoding
from saejax.models.generation import make_choice
from saejax.models.language_model import forward
from saejax.models.parameters import LAYERS, parameter_table
from saejax.parallel import fitting_sharding, sharding
from saejax.preflight.costs import head_flops, pass_flops, step_flops
from saejax.preflight.work import Work
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
    trained = [_train(work, dictionary, mesh) for dictionary in work.dictionaries]
    generated = [_generate(work, mesh, *work.generated)] if work.generated else []
    return [*generated, _capture(work, mesh), *trained, _evaluate(work, mesh), *_ablate(work, mesh)]


def abstract_params(work: Work, mesh: Mesh, dtype: str, layers: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The decoder's parameters as ``weights.load_params`` places them; only the first ``layers`` if that is given."""
    params = {}
    for name, (shape, spec) in parameter_table(work.model).items():
        shape = (layers or shape[0], *shape[1:]) if name.startswith(LAYERS) else shape
        params[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=fitting_sharding(mesh, shape, *spec))
    return params


def abstract_dictionary(work: Work, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State]:
    """The tested dictionary as a split module, whole on every device."""
    config, train = work.tested, work.train
    module = nnx.eval_shape(lambda: Dictionary.initial(config, jax.random.key(0), train.matmul, train.state_dtype))
    graph, state = nnx.split(module)
    return graph, _placed(state, mesh)


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


def _train(work: Work, dictionary: DictionaryConfig, mesh: Mesh) -> Program:
    config, d_in = work.train, dictionary.d_in
    check_divides(config, dictionary, mesh)
    trainer = Trainer(config, dictionary, mesh, _STEPS, 1.0, np.zeros(d_in, np.float32))
    batch = jax.ShapeDtypeStruct((config.batch, d_in), work.stored, sharding=trainer.batch_sharding)
    return Program(
        f"train: {dictionary.kind} step",
        f"{config.batch} tokens, {d_in} -> {dictionary.n_features:,}",
        trainer.step,
        (trainer.abstract_state, batch),
        (),
        step_flops(config.batch, d_in, dictionary.n_features),
    )


def _evaluate(work: Work, mesh: Mesh) -> Program:
    rows, length = work.scored
    model, site = work.model, work.site
    graph, state = abstract_dictionary(work, mesh)
    mean_D = _whole(mesh, (work.tested.d_in,), jnp.float32)
    ids_BxT, lengths_B = _by_row(mesh, (rows, length), jnp.int32), _by_row(mesh, (rows,), jnp.int32)
    tokens, above = rows * length, model.n_layers - site.layer
    variants = len(loss_recovered.VARIANTS)
    return Program(
        "evaluate: losses",
        f"{rows} x {length} tokens, {variants} variants",
        loss_recovered.document_losses,
        (model, site, graph, abstract_params(work, mesh, work.dtype), state, mean_D, ids_BxT, lengths_B),
        (),
        pass_flops(model, tokens, length, site.layer + variants * above)
        + variants * head_flops(model, tokens - rows)
        + 4.0 * tokens * work.tested.d_in * work.tested.n_features,
    )


def _ablate(work: Work, mesh: Mesh) -> list[Program]:
    model, prompts, length = work.model, split.PROMPTS, work.prompt
    cut = split.Cut(model, work.site, mesh)
    params, (graph, state) = abstract_params(work, mesh, work.dtype), abstract_dictionary(work, mesh)
    d, f, k, rows = work.tested.d_in, work.tested.n_features, work.features, work.rows

    def values(place: Callable, count: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """The stream and the site's value."""
        shape = (count, length, d)
        return place(mesh, shape, work.dtype), place(mesh, shape, work.dtype)

    def ends(count: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Last positions and answers."""
        return _by_row(mesh, (count,), jnp.int32), _by_row(mesh, (count, 2), jnp.int32)

    domain_BxT, row_domain_BxT = (place(mesh, (prompts, length), bool) for place in (_whole, _by_row))
    features_K = _whole(mesh, (k,), jnp.int32)
    bank = ablation.Bank(
        *values(_whole, prompts),
        _whole(mesh, (prompts, length, k), work.train.state_dtype),
        _whole(mesh, (k, d), work.train.state_dtype),
    )
    below, above = work.site.layer + 1, model.n_layers - work.site.layer - 1
    encode = 2.0 * prompts * length * d * f
    tail = pass_flops(model, rows * length, length, above)
    size, rows_size = f"{prompts} prompts of {length} tokens", f"{rows} edited prompts"
    place_R, members_RxK = _by_row(mesh, (rows,), jnp.int32), _by_row(mesh, (rows, k), bool)
    return [
        Program(
            "ablate: head",
            size,
            split.run_head,
            (cut, graph, params, state, _by_row(mesh, (prompts, length), jnp.int32), ends(prompts)[0]),
            (),
            pass_flops(model, prompts * length, length, below),
        ),
        Program(
            "ablate: attribution",
            size,
            screening.score_features,
            (cut, graph, params, state, *values(_by_row, prompts), row_domain_BxT, *ends(prompts)),
            (),
            3.0 * pass_flops(model, prompts * length, length, above) + 2.0 * encode,
        ),
        Program(
            "ablate: bank",
            f"{size}, {k} features",
            ablation.make_bank,
            (cut, graph, state, values(_whole, prompts)[1], domain_BxT, features_K),
            params,
            encode,
        ),
        Program(
            "ablate: edit",
            rows_size,
            ablation.edit_rows,
            (cut, bank, place_R, members_RxK),
            (params, state),
            2.0 * rows * length * k * d,
        ),
        Program(
            "ablate: tail",
            rows_size,
            ablation.run_tail,
            (cut, params, *values(_by_row, rows), *ends(rows)),
            (state, bank),
            tail,
        ),
    ]
