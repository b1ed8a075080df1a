"""No sparsity function: f = pre, of both signs, with an L1 penalty."""

import jax
import jax.numpy as jnp

from saejax.dictionaries.kinds.base import Dictionary, Facts, Numbers
from saejax.dictionaries.kinds.standard import Standard
from saejax.settings.kinds import LinearConfig


class Linear(Standard):
    """Pre-activations themselves; the penalty is that of ``Standard`` on their sizes."""

    name = "linear"
    about = "has an L1 penalty on the activations and no ReLU"
    numbers = ("fires_above",)
    signed = True
    elementwise = True
    no_free_decoder = "leaves open what --train.linear.fires_above is compared with"

    def encode(self, dictionary: Dictionary, pre_xF: jax.Array, projected_xF: jax.Array, numbers: Numbers) -> jax.Array:
        """Return the pre-activations."""
        return pre_xF

    def fires(self, f_xF: jax.Array, numbers: Numbers) -> jax.Array:
        """Return where |f| exceeds ``fires_above``."""
        return jnp.abs(f_xF) > numbers["fires_above"]

    def facts(self, values: Numbers, settings: LinearConfig, n_features: int) -> Facts:
        """Return the threshold above which a feature counts as firing."""
        return Facts(fires_above=settings.fires_above)
