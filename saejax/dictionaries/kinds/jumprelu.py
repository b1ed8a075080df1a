"""Pre-activations above a threshold that each feature learns (Rajamanoharan et al., 2024; Conerly et al., 2025)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from saejax.config import Config, setting
from saejax.dictionaries import sparsity
from saejax.dictionaries.kinds.base import Arrays, Dictionary, EncodedBatch, EncoderInputs, Facts, Kind, Numbers
from saejax.dictionaries.kinds.groups import group_counts, group_reconstructions, group_sizes
from saejax.reductions import over_last


@dataclasses.dataclass(frozen=True)
class JumpReLUConfig(Config):
    """Settings of JumpReLU dictionaries alone."""

    l0_coefficient: tuple[float, ...] = setting(
        (1.0,),
        "coefficient of the L0 penalty (or a list); with the penalty 'target', about five times the squared error "
        "per token keeps L0 within a tenth of the target, and less leaves it above",
        low=0.0,
        swept=True,
    )
    l0_penalty: str = setting(
        "step",
        "penalty: the number of active features (step), a tanh of their size (tanh), or (L0 / target - 1)^2 (target)",
        choices=("step", "tanh", "target"),
    )
    target_l0: tuple[float, ...] = setting(
        (64.0,), "L0 aimed at by the penalty 'target' (or a list)", low=1.0, swept=True
    )
    bandwidth: float = setting(0.05, "width of the kernel that estimates the thresholds' gradient", low=1e-6, high=1e6)
    initial_threshold: float = setting(0.01, "thresholds at the start", low=0.0, high=1e6)
    pre_activation: float = setting(
        0.0,
        "coefficient of the pre-activation loss, the mean over tokens of sum max(threshold - pre, 0) |W_dec| over dead "
        "features, which brings them back (3e-6 in Conerly et al., 2025); 0: off",
        low=0.0,
    )
    nested: tuple[float, ...] = setting(
        (),
        "shares of the features, ascending to 1, that must reconstruct by themselves, as in a matryoshka dictionary; "
        "empty: no nested groups",
        low=0.0,
        high=1.0,
    )


class JumpReLU(Kind):
    """f = pre where it exceeds the feature's threshold, else 0; the penalty is a function of L0."""

    name = "jumprelu"
    about = "keeps activations above a threshold that each feature learns"
    Settings: ClassVar[type[Config]] = JumpReLUConfig
    vectors = ("threshold_F",)
    elementwise = True
    jumprelu = True

    def encode(self, dictionary: Dictionary, inputs: EncoderInputs, numbers: Numbers) -> jax.Array:
        """Return activations, without gradients to the thresholds."""
        return sparsity.threshold(inputs.pre_xF, dictionary.arrays["threshold_F"])

    def encode_in_training(
        self, dictionary: Dictionary, inputs: EncoderInputs, values: Numbers, settings: JumpReLUConfig
    ) -> jax.Array:
        """Return activations, with straight-through gradients to the thresholds."""
        return sparsity.jumprelu(inputs.pre_xF, dictionary.arrays["threshold_F"], settings.bandwidth)

    def reconstructions(self, dictionary: Dictionary, f_BxF: jax.Array, x_BxD: jax.Array) -> list[jax.Array]:
        """Return the reconstructions by each nested group, or by all features if there are no groups."""
        if dictionary.config.groups:
            return group_reconstructions(dictionary, f_BxF, x_BxD)
        return super().reconstructions(dictionary, f_BxF, x_BxD)

    def penalty(self, batch: EncodedBatch) -> jax.Array | None:
        """Return the penalty that ``l0_penalty`` names."""
        settings, coefficient = batch.settings, batch.values["l0_coefficient"]
        if settings.l0_penalty == "tanh":  # a smooth L0 (Conerly et al., 2025)
            active_BxF = jnp.tanh(4.0 * batch.f_BxF * batch.dictionary.decoder_norms_F[None])
        else:
            threshold_F = batch.dictionary.arrays["threshold_F"]
            active_BxF = sparsity.step(batch.pre_BxF, threshold_F, settings.bandwidth)
        if settings.l0_penalty == "target":  # which is of all features, each once
            l0 = jnp.mean(over_last(jnp.sum, active_BxF))
            return coefficient * jnp.square(l0 / batch.values["target_l0"] - 1)
        if batch.dictionary.config.groups:
            # Once for each reconstruction that the feature is part of, as their errors are summed, too.
            active_BxF *= group_counts(batch.dictionary.config.groups)[None]
        return coefficient * jnp.mean(over_last(jnp.sum, active_BxF))

    def losses(self, batch: EncodedBatch) -> dict[str, jax.Array]:
        """Return the pre-activation loss of dead features, as in SAELens, if there is one."""
        if not batch.settings.pre_activation:
            return {}
        threshold_F, norms_F = batch.dictionary.arrays["threshold_F"], batch.dictionary.decoder_norms_F
        missing_F = jnp.mean(jax.nn.relu(sparsity.row(threshold_F, 2) - batch.pre_BxF), axis=0)
        return dict(pre_activation=batch.settings.pre_activation * jnp.sum(missing_F * norms_F * batch.dead_F))

    def start(self, settings: JumpReLUConfig) -> dict[str, float]:
        """Return thresholds above 0, where the kernel sees pre-activations on both sides."""
        return dict(threshold_F=settings.initial_threshold)

    def facts(self, values: Numbers, settings: JumpReLUConfig, n_features: int) -> Facts:
        """Return the groups as numbers of features."""
        facts = super().facts(values, settings, n_features)
        return (
            facts | Facts(groups=group_sizes("jumprelu.nested", settings.nested, n_features))
            if settings.nested
            else facts
        )

    def constrain(self, params: Arrays) -> Arrays:
        """Keep thresholds at 0 or above."""
        # A threshold below 0 would let negative activations through.
        return params | dict(threshold_F=jnp.maximum(params["threshold_F"], 0.0))
