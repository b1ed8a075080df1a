"""What dictionaries minimise. All are means over the tokens of a batch."""

import jax
import jax.numpy as jnp


def squared_error(x_BxD: jax.Array, x_hat_BxD: jax.Array) -> jax.Array:
    """Sum over the width of the squared error, mean over tokens (the convention of SAELens)."""
    return jnp.mean(jnp.sum(jnp.square(x_BxD - x_hat_BxD), axis=-1))


def l1_norm_weighted(f_BxF: jax.Array, W_dec_FxD: jax.Array) -> jax.Array:
    """Mean over tokens of sum_i f_i |W_dec_i|, so that shrinking f and growing the decoder gains nothing."""
    norms_1xF = jnp.linalg.norm(W_dec_FxD, axis=-1)[None]
    return jnp.mean(jnp.sum(f_BxF * norms_1xF, axis=-1))


def explained_variance(x_BxD: jax.Array, x_hat_BxD: jax.Array) -> jax.Array:
    """1 - sum of squared errors / sum of squared deviations from the batch mean; a progress figure."""
    deviations_BxD = x_BxD - jnp.mean(x_BxD, axis=0, keepdims=True)
    return 1 - jnp.sum(jnp.square(x_BxD - x_hat_BxD)) / jnp.sum(jnp.square(deviations_BxD))
