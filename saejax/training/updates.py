"""How gradients change a member's arrays: projection, clipping, Adam, and what must hold after every step."""

import functools

import jax
import jax.numpy as jnp
import optax

from saejax.dictionaries import DictionaryConfig
from saejax.settings import TrainConfig
from saejax.training.objective import Arrays

_FROZEN = {"none": (), "decoder": ("W_dec_FxD",), "encoder": ("W_enc_DxF",)}


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Adam's direction after clipping, with decoupled weight decay (Loshchilov and Hutter, 2019) of the encoder.

    The decoder's rows have unit norm and its bias starts at the data's mean: to decay those would undo that. The
    learning rate is not in here, because members have their own.
    """
    parts = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    parts.append(optax.scale_by_adam())
    if config.weight_decay:
        only_encoder = functools.partial(_named, "W_enc_DxF")
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=only_encoder))
    return optax.chain(*parts)


def _named(name: str, params: Arrays) -> dict[str, bool]:
    return {key: key == name for key in params}


def projected(config: TrainConfig, grads: Arrays, params: Arrays) -> Arrays:
    """Gradients of what may move: none of what is frozen, and of unit rows only the part that turns them."""
    grads = grads | {name: jnp.zeros_like(grads[name]) for name in _FROZEN[config.freeze]}
    if config.decoder_norm == "unit":
        grads["W_dec_FxD"] = _tangent(grads["W_dec_FxD"], params["W_dec_FxD"])
    return grads


def constrained(config: TrainConfig, dictionary: DictionaryConfig, params: Arrays, before: Arrays) -> Arrays:
    """What holds after every step: unit rows if asked for, thresholds of at least 0, frozen arrays as they were."""
    params = dict(params)
    if config.decoder_norm == "unit":
        W_dec_FxD = params["W_dec_FxD"]
        params["W_dec_FxD"] = W_dec_FxD / jnp.linalg.norm(W_dec_FxD, axis=-1, keepdims=True)
    if dictionary.kind == "jumprelu":
        params["threshold_F"] = jnp.maximum(params["threshold_F"], 0.0)
    return params | {name: before[name] for name in _FROZEN[config.freeze]}


def _tangent(grad_FxD: jax.Array, W_dec_FxD: jax.Array) -> jax.Array:
    """The part of the gradient that turns the unit rows; the part along them would be undone anyway."""
    return grad_FxD - jnp.sum(grad_FxD * W_dec_FxD, axis=-1, keepdims=True) * W_dec_FxD
