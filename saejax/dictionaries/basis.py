"""What a basis is: directions at a site with activations. Dictionaries are bases; so are neurons and components."""

import abc
from typing import Any

import jax

from saejax.dictionaries.description import DictionaryConfig


class Basis(abc.ABC):
    """What ablation and edits need of a basis; a pytree, passed to programs as it is.

    Attributes:
      config: the sites that it reads and writes, its width and its number of features.
      W_dec_FxD: what each feature adds where it is written, by its activation; an array, or a parameter that holds one.
    """

    config: DictionaryConfig
    W_dec_FxD: Any

    @property
    def site(self) -> str:
        """The site that is read."""
        return self.config.site

    @abc.abstractmethod
    def encode(self, x_xD: jax.Array) -> jax.Array:
        """Activations [..., F] of values [..., D] at the site that is read."""

    @abc.abstractmethod
    def decode(self, f_xF: jax.Array, x_xD: jax.Array | None = None) -> jax.Array:
        """Values [..., D] at the site that is written, of activations f and of x, what was read."""

    def output_scale(self, x_xD: jax.Array) -> jax.Array | None:
        """What ``W_dec_FxD`` is multiplied with at each token, [..., 1]; None for 1 at all of them."""
        return None

    @abc.abstractmethod
    def fires(self, f_xF: jax.Array) -> jax.Array:
        """Where activations count as active; bool, of their shape."""

    @abc.abstractmethod
    def is_not_sink(self, x_xD: jax.Array) -> jax.Array:
        """The positions at which the basis means something; bool, the shape of ``x`` without its last axis."""
