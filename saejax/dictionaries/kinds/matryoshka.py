"""BatchTopK whose leading features must reconstruct by themselves, in nested groups (Bussmann et al., 2025)."""

import dataclasses

import jax

from saejax.config import Config, setting
from saejax.dictionaries.kinds.base import Dictionary, Facts, Numbers
from saejax.dictionaries.kinds.batchtopk import BatchTopK
from saejax.dictionaries.kinds.groups import group_reconstructions, group_sizes


@dataclasses.dataclass(frozen=True)
class MatryoshkaConfig(Config):
    """Settings of matryoshka dictionaries alone."""

    groups: tuple[float, ...] = setting(
        (0.0625, 0.125, 0.25, 0.5, 1.0),
        "shares of the features, ascending to 1, that must reconstruct by themselves",
        low=0.0,
        high=1.0,
    )


class Matryoshka(BatchTopK):
    """BatchTopK; the errors of all groups are summed."""

    name = "matryoshka"
    about = "keeps the largest activations of a batch, and nested groups of its features rebuild by themselves"
    Settings = MatryoshkaConfig
    no_free_decoder = "has no penalty to hold it in a matryoshka dictionary"

    def reconstructions(self, dictionary: Dictionary, f_BxF: jax.Array, x_BxD: jax.Array) -> list[jax.Array]:
        """Return the reconstructions by each nested group, the smallest group first."""
        return group_reconstructions(dictionary, f_BxF, x_BxD)

    def facts(self, values: Numbers, settings: MatryoshkaConfig, n_features: int) -> Facts:
        """Return the groups as numbers of features."""
        return super().facts(values, settings, n_features) | Facts(
            groups=group_sizes("matryoshka.groups", settings.groups, n_features)
        )
