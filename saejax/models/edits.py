"""Edits: changes to the values at sites during a forward pass."""

from collections.abc import Sequence
from typing import Protocol

import jax

from saejax.models.sites import Site


class Edit(Protocol):
    """A change to the values at a site: a registered pytree whose ``site`` is static."""

    @property
    def site(self) -> Site:
        """Where it acts."""

    def __call__(self, value_BxTxD: jax.Array, mask_BxT: jax.Array) -> jax.Array:
        """The new value; ``mask_BxT`` is True at real positions."""


def edited(edits: Sequence[Edit], site: Site, value_BxTxD: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """The value at a site after the edits that act there, in their order."""
    for edit in edits:
        if edit.site == site:
            value_BxTxD = edit(value_BxTxD, mask_BxT)
    return value_BxTxD
