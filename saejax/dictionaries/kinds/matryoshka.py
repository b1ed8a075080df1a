"""BatchTopK whose leading features must reconstruct by themselves, in nested groups (Bussmann et al., 2025)."""

import jax

from saejax.dictionaries.kinds.base import Coder, Facts, Numbers
from saejax.dictionaries.kinds.batchtopk import BatchTopK
from saejax.dictionaries.kinds.groups import group_reconstructions, group_sizes
from saejax.settings.kinds import MatryoshkaConfig


class Matryoshka(BatchTopK):
    """The errors of all groups are summed."""

    name = "matryoshka"
    about = "keeps the largest activations of a batch, and nested groups of its features rebuild by themselves"
    no_free_decoder = "has no penalty to hold it in a matryoshka dictionary"

    def reconstructions(self, member: Coder, f_BxF: jax.Array, x_BxD: jax.Array) -> list[jax.Array]:
        """Those of the nested groups, ascending."""
        return group_reconstructions(member, f_BxF, x_BxD)

    def facts(self, values: Numbers, own: MatryoshkaConfig, n_features: int) -> Facts:
        """The groups as numbers of features."""
        return super().facts(values, own, n_features) | Facts(
            groups=group_sizes("matryoshka.groups", own.groups, n_features)
        )
