"""Edits of whole sites: the controls beside edits of features."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from saejax.errors import UserError
from saejax.models.edits import ForwardPass, Positions, Span, Values, check_width
from saejax.models.sites import Site


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SiteEdit:
    """Changes all of a site: x' = factor x + offset.

    Attention sinks are positions like others here: a site has no rule for them, as a dictionary has. Padding passes
    untouched. ``positions`` are "all", "last" (each prompt's last token and, in generation, every new one) or
    (start, stop), counted from 0 in each text; a stop of None is the end. Sites are named as in "resid_post.15".
    All methods raise a ``UserError`` for a site, positions or shapes that cannot be; a width that is not the site's is
    found when a model runs.

    Attributes:
      factor: scalar, 0 where x is replaced.
      offset: what is added, N is D.
      positions: where it acts.
      site: static.
    """

    factor: jax.Array
    offset: Values
    positions: Positions
    site: Site = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def ablate(cls, site: str | Site, positions: str | Span = "all") -> Self:
        """x' = 0."""
        return cls._of(site, 0.0, Values(jnp.zeros((1, 1, 1)), False), positions)

    @classmethod
    def set(cls, site: str | Site, vector: Any, positions: str | Span = "all") -> Self:
        """x' = vector, [D], such as the site's mean over some text."""
        return cls._of(site, 0.0, _vector(vector, "the vector"), positions)

    @classmethod
    def patch(cls, site: str | Site, values_BxTxD: Any, positions: str | Span = "all") -> Self:
        """x' = values, such as those that another run captured there; new tokens have none and pass unchanged."""
        return cls._of(site, 0.0, Values.of_prompts(values_BxTxD, None, "what is patched in"), positions)

    @classmethod
    def steer(cls, site: str | Site, direction: Any, amount: float = 1.0, positions: str | Span = "all") -> Self:
        """x' = x + amount x direction, [D]. The direction is taken as long as it is."""
        return cls._of(site, 1.0, _vector(np.float32(amount) * np.asarray(direction), "the direction"), positions)

    @classmethod
    def _of(cls, site: str | Site, factor: float, offset: Values, positions: str | Span) -> Self:
        site = site if isinstance(site, Site) else Site.parse(site)
        return cls(jnp.float32(factor), offset, Positions.of(positions), site)

    def __call__(self, value_BxTxD: jax.Array, run: ForwardPass) -> jax.Array:
        """The edited site."""
        offset, known_BxT = self.offset.at(run)
        if offset.shape[-1] > 1:
            check_width(self.site, value_BxTxD.shape[-1], "an edit", offset.shape[-1])
        new_BxTxD = (self.factor * value_BxTxD + offset).astype(value_BxTxD.dtype)
        return jnp.where((self.positions.at(run) & known_BxT)[..., None], new_BxTxD, value_BxTxD)


def _vector(vector: Any, what: str) -> Values:
    if np.ndim(vector) != 1 or np.size(vector) < 2:
        raise UserError(f"{what} has the shape {np.shape(vector)}: expected one number for each dimension of the site")
    return Values.everywhere(vector, np.size(vector), what)
