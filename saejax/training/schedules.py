"""How learning rate and penalty change over the steps: factors between 0 and 1."""

import jax
import jax.numpy as jnp

from saejax.settings import TrainConfig


def learning_rate(config: TrainConfig, steps: int, step: jax.Array) -> jax.Array:
    """Rises linearly from 0 over ``warmup`` of the steps, stays, falls linearly to 0 over ``decay`` of them."""
    up, down = round(config.warmup * steps), round(config.decay * steps)
    rising = (step + 1) / max(up, 1)
    falling = (steps - step) / max(down, 1)
    return jnp.clip(jnp.minimum(rising, falling), 0.0, 1.0)


def rising(config: TrainConfig, steps: int, step: jax.Array) -> jax.Array:
    """Rises linearly from 0 over ``warmup`` of the steps, so that features form before they are thinned out."""
    return jnp.minimum((step + 1) / max(round(config.warmup * steps), 1), 1.0)
