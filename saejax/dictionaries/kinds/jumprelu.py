"""Pre-activations above a threshold that each feature learns (Rajamanoharan et al., 2024; Conerly et al., 2025)."""

import jax
import jax.numpy as jnp

from saejax.dictionaries import losses, sparsity, straight_through
from saejax.dictionaries.kinds.base import Arrays, Coder, EncodedBatch, Facts, Kind, MemberEncoder, Numbers
from saejax.dictionaries.kinds.groups import group_counts, group_reconstructions, group_sizes
from saejax.settings.kinds import JumpReLUConfig


class JumpReLU(Kind):
    """f = pre where it exceeds the feature's threshold, else 0; the penalty is a function of L0."""

    name = "jumprelu"
    about = "keeps activations above a threshold that each feature learns"
    vectors = ("threshold_F",)
    jumprelu = True

    def encode(self, member: MemberEncoder, pre_xF: jax.Array, projected_xF: jax.Array, numbers: Numbers) -> jax.Array:
        """Without gradients to the thresholds."""
        return sparsity.threshold(pre_xF, member.arrays["threshold_F"])

    def encode_in_training(
        self,
        member: MemberEncoder,
        pre_BxF: jax.Array,
        projected_BxF: jax.Array,
        values: Numbers,
        own: JumpReLUConfig,
    ) -> tuple[jax.Array, jax.Array]:
        """With straight-through gradients to the thresholds."""
        f_BxF = straight_through.jumprelu(pre_BxF, member.arrays["threshold_F"], own.bandwidth)
        return f_BxF, jnp.zeros((), pre_BxF.dtype)

    def reconstructions(self, member: Coder, f_BxF: jax.Array, x_BxD: jax.Array) -> list[jax.Array]:
        """Those of the nested groups if there are any."""
        if member.config.groups:
            return group_reconstructions(member, f_BxF, x_BxD)
        return super().reconstructions(member, f_BxF, x_BxD)

    def penalty(self, batch: EncodedBatch) -> jax.Array | None:
        """By ``l0_penalty``."""
        own, arrays, coefficient = batch.own, batch.member.arrays, batch.values["l0_coefficient"]
        if own.l0_penalty == "tanh":
            widths = batch.member.config.widths
            return coefficient * losses.tanh_norm_weighted(batch.f_BxF, arrays["W_dec_FxD"], widths=widths)
        active_BxF = straight_through.step(batch.pre_BxF, arrays["threshold_F"], own.bandwidth)
        if batch.member.config.groups:
            active_BxF *= group_counts(batch.member.config.groups)[None]
        l0 = jnp.mean(jnp.sum(active_BxF, axis=-1))
        if own.l0_penalty == "target":
            l0 = jnp.square(l0 / batch.values["target_l0"] - 1)
        return coefficient * l0

    def losses(self, batch: EncodedBatch) -> dict[str, jax.Array]:
        """The pull on dead features, if it is asked for."""
        if not batch.own.dead_pre_activation:
            return {}
        arrays = batch.member.arrays
        rows = arrays["W_dec_FxD"], batch.member.config.widths
        pull = losses.dead_pre_activation(batch.pre_BxF, arrays["threshold_F"], batch.dead_F, *rows)
        return dict(dead_pre_activation=batch.own.dead_pre_activation * pull)

    def start(self, own: JumpReLUConfig) -> dict[str, float]:
        """Thresholds above 0, where the kernel sees pre-activations of both sides."""
        return dict(threshold_F=own.initial_threshold)

    def facts(self, values: Numbers, own: JumpReLUConfig, n_features: int) -> Facts:
        """The groups as numbers of features."""
        facts = super().facts(values, own, n_features)
        return facts | Facts(groups=group_sizes("jumprelu.nested", own.nested, n_features)) if own.nested else facts

    def constrain(self, params: Arrays) -> Arrays:
        """Thresholds of at least 0."""
        return params | dict(threshold_F=jnp.maximum(params["threshold_F"], 0.0))
