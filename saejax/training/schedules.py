"""How learning rate and sparsity change over the steps."""

import jax
import jax.numpy as jnp
import optax

from saejax.settings import TrainConfig


def learning_rate(config: TrainConfig, steps: int) -> optax.Schedule:
    """Rises linearly from 0 over ``warmup`` of the steps, stays, falls linearly to 0 over ``decay`` of them."""
    up, down = round(config.warmup * steps), round(config.decay * steps)

    def schedule(step: jax.Array) -> jax.Array:
        rising = (step + 1) / max(up, 1)
        falling = (steps - step) / max(down, 1)
        return config.learning_rate * jnp.clip(jnp.minimum(rising, falling), 0.0, 1.0)

    return schedule


def l1_coefficient(config: TrainConfig, steps: int) -> optax.Schedule:
    """Rises linearly from 0 over ``warmup`` of the steps, so that features form before they are thinned out."""
    up = max(round(config.warmup * steps), 1)
    return lambda step: config.l1 * jnp.minimum((step + 1) / up, 1.0)
