"""How a decoder is run, apart from what it is: what differentiation goes by, and what a gradient keeps in memory."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class RunRules:
    """Rules of a run. None changes a value of the model itself. Hashable, so that it can be static under ``jax.jit``.

    Attributes:
      backward: what differentiation goes by: "gradient", the function itself; "relp", the rules of relevance patching
        (Jafari et al., 2025, arXiv 2508.21258): the factors of norms and the attention weights are constants, an
        activation is a constant ratio of its input, and a gated product passes half to each side. Values stay.
      first_fixes: whether all prompts of a batch take the factors of norms and the attention weights of the first one.
      remat: whether a gradient computes each layer again from the stream that enters it, which takes the least
        memory; otherwise the results of matrix products are kept from the forward pass.
    """

    backward: str = "gradient"
    first_fixes: bool = False
    remat: bool = False

    def factor(self, value: jax.Array) -> jax.Array:
        """A factor of a norm, or scores of attention: the first prompt's, or constant, where the rules say so."""
        if self.first_fixes:
            value = jnp.broadcast_to(value[:1], value.shape)
        return lax.stop_gradient(value) if self.backward == "relp" else value

    def activation(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """What an activation function gives, y, for its input x."""
        if self.backward == "gradient":
            return y
        share = x * lax.stop_gradient(jnp.where(x == 0, 0.0, y / jnp.where(x == 0, 1.0, x)))
        return lax.stop_gradient(y - share) + share

    def product(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a * b, as in a gated MLP."""
        if self.backward == "gradient":
            return a * b
        return 0.5 * (a * lax.stop_gradient(b) + lax.stop_gradient(a) * b)

    @property
    def kept(self) -> Callable[..., bool]:
        """What of a layer a gradient keeps from the forward pass."""
        policies = jax.checkpoint_policies
        return policies.nothing_saveable if self.remat else policies.dots_saveable


GRADIENT = RunRules()
