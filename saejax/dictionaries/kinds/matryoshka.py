"""BatchTopK whose leading features must reconstruct by themselves, in nested groups (Bussmann et al., 2025)."""

import jax

from saejax.dictionaries.kinds.base import Coder, Facts, Numbers
from saejax.dictionaries.kinds.batchtopk import BatchTopK
from saejax.dictionaries.matmul import group_products, matmul
from saejax.dictionaries.sparsity import row
from saejax.errors import UserError
from saejax.settings.kinds import MatryoshkaConfig


class Matryoshka(BatchTopK):
    """The errors of all groups are summed."""

    name = "matryoshka"
    about = "keeps the largest activations of a batch, and nested groups of its features rebuild by themselves"
    no_free_decoder = "has no penalty to hold it in a matryoshka dictionary"

    def reconstructions(self, member: Coder, f_BxF: jax.Array, x_BxD: jax.Array) -> list[jax.Array]:
        """Those of the nested groups, ascending."""
        arrays, operands = member.arrays, member.operands
        nested, partial = [], row(arrays["b_dec_D"], 2)
        if "W_skip_DxD" in arrays:
            partial += matmul(x_BxD, arrays["W_skip_DxD"], operands)
        for product_BxD in group_products(f_BxF, arrays["W_dec_FxD"], member.config.groups, operands):
            partial += product_BxD
            nested.append(partial)
        return nested

    def facts(self, values: Numbers, own: MatryoshkaConfig, n_features: int) -> Facts:
        """The groups as numbers of features."""
        groups = tuple(round(share * n_features) for share in own.groups)
        if not groups or sorted(set(groups)) != list(groups) or groups[0] < 1 or groups[-1] != n_features:
            raise UserError(
                f"--train.matryoshka.groups={own.groups} gives groups of {groups} features: expected shares ascending "
                "to 1"
            )
        return super().facts(values, own, n_features) | Facts(groups=groups)
