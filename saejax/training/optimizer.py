"""The optimiser of a member: one chain of Optax, the constraints that hold after every step, and the schedules.

    freeze -> project out radial gradient -> measure norm -> clip -> Adam -> weight decay
           -> learning rate

Learning rates are the members' own, so the chain's update takes them as an argument: ``update(grads, state, params,
learning_rate=...)``.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from saejax.dictionaries.joined import row_lengths, row_normals
from saejax.dictionaries.kinds.base import Arrays, Kind
from saejax.training.settings import TrainConfig

_FROZEN = {"none": (), "decoder": ("W_dec_FxD",), "encoder": ("W_enc_DxF",)}


class GradientNorm(NamedTuple):
    """State of ``measure_norm``: the global norm of the last gradient."""

    gradient_norm: jax.Array


def make_optimizer(config: TrainConfig, widths: Sequence[int] = ()) -> optax.GradientTransformationExtraArgs:
    """Return the transformation of gradients into updates.

    Weight decay is decoupled (Loshchilov and Hutter, 2019) and applies to the encoder alone: the decoder's rows have
    unit norm and its bias starts at the data's mean, which decay would undo.

    Args:
      config: the settings.
      widths: widths of the parts of a joined site; (): one site.
    """
    frozen = _FROZEN[config.freeze]
    # Clipping before Adam leaves its moments untouched by single outlier batches.
    update = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    mu_dtype = config.mu_dtype if config.mu_dtype != "float32" else None  # None: the parameters' dtype
    update.append(optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=mu_dtype))
    if config.weight_decay:
        decayed = {"W_enc_DxF"} - {*frozen}
        update.append(optax.add_decayed_weights(config.weight_decay, mask=lambda params: _named(params, decayed)))
    whole = optax.chain(*update, scale_by_learning_rate())
    # Frozen arrays are zeroed before the norm is measured: it covers trained arrays alone.
    first = [optax.masked(optax.set_to_zero(), lambda params: _named(params, frozen))] if frozen else []
    if config.decoder_norm == "unit":
        first.append(project_out_radial_gradient(widths))
    return optax.chain(*first, measure_norm(), whole)


def project_out_radial_gradient(widths: Sequence[int] = ()) -> optax.GradientTransformation:
    """Remove from the decoder's gradient the component along its unit rows, whose length is restored after each step.

    Args:
      widths: widths of the parts of a joined site, over which a row's length is a sum; (): one site.
    """

    def update(grads: Arrays, params: Arrays | None) -> Arrays:
        assert params is not None
        grad_FxD, W_dec_FxD = grads["W_dec_FxD"], params["W_dec_FxD"]
        if widths:  # the normal of the set of rows of one length is not the row, but its parts' directions
            normal_FxD = row_normals(W_dec_FxD, widths)
            square_Fx1 = jnp.sum(jnp.square(normal_FxD), axis=-1, keepdims=True)
            W_dec_FxD = normal_FxD / jnp.sqrt(jnp.maximum(square_Fx1, 1e-30))
        along_Fx1 = jnp.sum(grad_FxD * W_dec_FxD, axis=-1, keepdims=True)
        return grads | dict(W_dec_FxD=grad_FxD - along_Fx1 * W_dec_FxD)

    return optax.stateless(update)


def measure_norm() -> optax.GradientTransformation:
    """Record the gradient's global norm: values that are not finite in the gradient would enter the next state."""
    return optax.GradientTransformation(
        lambda params: GradientNorm(jnp.zeros((), jax.tree.leaves(params)[0].dtype)),
        lambda grads, state, params=None: (grads, GradientNorm(optax.global_norm(grads))),
    )


def scale_by_learning_rate() -> optax.GradientTransformationExtraArgs:
    """Multiply by minus the argument ``learning_rate`` of the update."""

    def update(updates: Arrays, state: Any, params: Any = None, *, learning_rate: jax.Array, **extra: Any) -> Any:
        return jax.tree.map(lambda update: -learning_rate * update, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def apply_constraints(
    config: TrainConfig, kind: Kind, params: Arrays, before: Arrays, widths: Sequence[int] = ()
) -> Arrays:
    """Return the arrays with unit rows if asked for, the kind's constraints, and frozen arrays as they were.

    Args:
      config: the settings.
      kind: the kind of dictionary.
      params: arrays after an update.
      before: arrays before it.
      widths: widths of the parts of a joined site; (): one site.
    """
    if config.decoder_norm == "unit":
        W_dec_FxD = params["W_dec_FxD"]
        # A step along the tangent still makes a row longer, by a second-order term.
        norm_Fx1 = jnp.linalg.norm(W_dec_FxD, axis=-1, keepdims=True)
        length_Fx1 = row_lengths(W_dec_FxD, widths)[:, None] if widths else norm_Fx1
        params = params | dict(W_dec_FxD=W_dec_FxD / length_Fx1)
    return kind.constrain(params) | {name: before[name] for name in _FROZEN[config.freeze]}


def penalty_schedule(config: TrainConfig, steps: int) -> optax.Schedule:
    """Return the weight of the penalty, which rises linearly so that features form before they are thinned out."""
    return linear_warmup(round(config.penalty_warmup * steps) or config.warmup)


def linear_warmup(up: int) -> optax.Schedule:
    """Return a schedule that rises linearly from 0 to 1 over ``up`` steps."""
    return optax.join_schedules([lambda step: (step + 1) / max(up, 1), optax.constant_schedule(1.0)], [up])


def usual_learning_rate(n_features: int) -> float:
    """Return the peak learning rate that serves dictionaries of this width; see ``TrainConfig``."""
    return 2e-4 / math.sqrt(n_features / 2**14)


def learning_rate_schedule(config: TrainConfig, steps: int) -> optax.Schedule:
    """Return a factor in [0, 1]: it rises over ``warmup`` steps, stays, and falls to 0 over the share ``decay``."""
    # Both schedules count whole steps, so that the last one has a rate above 0.
    down = round(config.decay * steps)
    warmup = linear_warmup(config.warmup)
    fall = optax.join_schedules(
        [optax.constant_schedule(1.0), lambda step: (down - step) / max(down, 1)], [steps - down]
    )
    return lambda step: jnp.clip(jnp.minimum(warmup(step), fall(step)), 0.0, 1.0)


def decay_start(config: TrainConfig, steps: int) -> int:
    """Return the number of steps up to which a run of ``steps`` steps is the same as any longer one."""
    return steps - max(round(config.decay * steps), 1)


def _named(params: Arrays, names: Any) -> dict[str, bool]:
    return {key: key in names for key in params}
