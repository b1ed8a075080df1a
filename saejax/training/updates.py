"""How gradients change a member's arrays: one chain of optax, and what must hold after every step.

    freeze -> turn unit rows -> measure norm -> (mean over ``accumulate`` steps) -> clip -> Adam -> weight decay -> rate

Learning rates are the members' own, so the chain's update takes them as an argument: ``update(grads, state, params,
learning_rate=...)``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from saejax.dictionaries.joined import row_lengths, row_normals
from saejax.dictionaries.kinds.base import Arrays, Kind
from saejax.settings import TrainConfig

_FROZEN = {"none": (), "decoder": ("W_dec_FxD",), "encoder": ("W_enc_DxF",)}


class GradientNorm(NamedTuple):
    """State of ``measure_norm``: the global norm of the newest gradient."""

    gradient_norm: jax.Array


def make_optimizer(config: TrainConfig, widths: Sequence[int] = ()) -> optax.GradientTransformationExtraArgs:
    """What turns gradients into updates; weight decay is decoupled (Loshchilov and Hutter, 2019), of the encoder alone.

    The decoder's rows have unit norm and its bias starts at the data's mean: to decay those would undo that.

    Args:
      widths: of the parts of a joined site; (): one site.
    """
    frozen = _FROZEN[config.freeze]
    update = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    mu_dtype = config.mu_dtype if config.mu_dtype != "float32" else None  # None: that of the parameters
    update.append(optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=mu_dtype))
    if config.weight_decay:
        decayed = {"W_enc_DxF"} - {*frozen}
        update.append(optax.add_decayed_weights(config.weight_decay, mask=lambda params: _named(params, decayed)))
    whole = optax.chain(*update, scale_by_learning_rate())
    if config.accumulate > 1:
        steps = optax.MultiSteps(whole, config.accumulate)
        whole = optax.GradientTransformationExtraArgs(steps.init, steps.update)
    first = [optax.masked(optax.set_to_zero(), lambda params: _named(params, frozen))] if frozen else []
    if config.decoder_norm == "unit":
        first.append(turn_rows(widths))
    return optax.chain(*first, measure_norm(), whole)


def turn_rows(widths: Sequence[int] = ()) -> optax.GradientTransformation:
    """Removes from the gradient of the decoder the part that changes its unit rows' length, which is undone anyway."""

    def update(grads: Arrays, params: Arrays | None) -> Arrays:
        assert params is not None
        grad_FxD, W_dec_FxD = grads["W_dec_FxD"], params["W_dec_FxD"]
        if widths:  # no row itself is at a right angle to the rows of one length, but the sum of its parts' directions
            normal_FxD = row_normals(W_dec_FxD, widths)
            square_Fx1 = jnp.sum(jnp.square(normal_FxD), axis=-1, keepdims=True)
            W_dec_FxD = normal_FxD / jnp.sqrt(jnp.maximum(square_Fx1, 1e-30))
        along_Fx1 = jnp.sum(grad_FxD * W_dec_FxD, axis=-1, keepdims=True)
        return grads | dict(W_dec_FxD=grad_FxD - along_Fx1 * W_dec_FxD)

    return optax.stateless(update)


def measure_norm() -> optax.GradientTransformation:
    """Keeps the gradient's global norm; what is not finite in the gradient would be in the next state."""
    return optax.GradientTransformation(
        lambda params: GradientNorm(jnp.zeros((), jax.tree.leaves(params)[0].dtype)),
        lambda grads, state, params=None: (grads, GradientNorm(optax.global_norm(grads))),
    )


def scale_by_learning_rate() -> optax.GradientTransformationExtraArgs:
    """Multiplies by minus the argument ``learning_rate``."""

    def update(updates: Arrays, state: Any, params: Any = None, *, learning_rate: jax.Array, **extra: Any) -> Any:
        return jax.tree.map(lambda update: -learning_rate * update, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def constrained(config: TrainConfig, kind: Kind, params: Arrays, before: Arrays, widths: Sequence[int] = ()) -> Arrays:
    """What holds after every step: unit rows if asked for, what the kind says, frozen arrays as they were."""
    if config.decoder_norm == "unit":
        W_dec_FxD = params["W_dec_FxD"]
        norm_Fx1 = jnp.linalg.norm(W_dec_FxD, axis=-1, keepdims=True)
        length_Fx1 = row_lengths(W_dec_FxD, widths)[:, None] if widths else norm_Fx1
        params = params | dict(W_dec_FxD=W_dec_FxD / length_Fx1)
    return kind.constrain(params) | {name: before[name] for name in _FROZEN[config.freeze]}


def penalty_share(config: TrainConfig, steps: int) -> optax.Schedule:
    """Rises linearly from 0 over the penalty's warm-up, so that features form before they are thinned out."""
    return rising(config.penalty_warmup or config.warmup, steps)


def rising(share: float, steps: int) -> optax.Schedule:
    """Rises linearly from 0 to 1 over a share of the steps."""
    up = round(share * steps)
    return optax.join_schedules([lambda step: (step + 1) / max(up, 1), optax.constant_schedule(1.0)], [up])


def learning_rate(config: TrainConfig, steps: int) -> optax.Schedule:
    """Rises over ``warmup`` of the steps, stays, and falls to 0 over ``decay`` of them; a factor between 0 and 1."""
    down = round(config.decay * steps)
    if config.decay_shape == "cosine":
        fall = optax.cosine_decay_schedule(1.0, max(down, 1))
    else:
        fall = lambda step: (down - step) / max(down, 1)  # noqa: E731
    rise, whole = (
        rising(config.warmup, steps),
        optax.join_schedules([optax.constant_schedule(1.0), fall], [steps - down]),
    )
    return lambda step: jnp.clip(jnp.minimum(rise(step), whole(step)), 0.0, 1.0)


def _named(params: Arrays, names: Any) -> dict[str, bool]:
    return {key: key in names for key in params}
