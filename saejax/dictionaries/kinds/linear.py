"""No sparsity function: f = pre, of both signs, with an L1 penalty."""

import jax
import jax.numpy as jnp

from saejax.config import Config
from saejax.dictionaries.kinds.base import Dictionary, EncoderInputs, Facts, Numbers
from saejax.dictionaries.kinds.standard import Standard

# |f|, of inputs scaled to a mean norm of sqrt(d): a hundredth of a usual activation, far above rounding.
FIRES_ABOVE = 1e-3


class Linear(Standard):
    """Pre-activations themselves; with the penalty of ``Standard`` on their sizes."""

    name = "linear"
    about = "has an L1 penalty on the activations and no ReLU"
    numbers = ("fires_above",)
    signed = True
    elementwise = True
    no_free_decoder = "leaves open what activations are compared with to count as firing"

    def encode(self, dictionary: Dictionary, inputs: EncoderInputs, numbers: Numbers) -> jax.Array:
        """Return the pre-activations."""
        return inputs.pre_xF

    def fires(self, f_xF: jax.Array, numbers: Numbers) -> jax.Array:
        """Return where |f| exceeds ``fires_above``."""
        return jnp.abs(f_xF) > numbers["fires_above"]

    def facts(self, values: Numbers, settings: Config, n_features: int) -> Facts:
        """Return the threshold above which a feature counts as firing."""
        return Facts(fires_above=FIRES_ABOVE)
