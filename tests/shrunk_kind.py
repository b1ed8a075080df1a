"""A made-up kind in a file of its own, as users write them: activations less a margin that each feature learns."""

import dataclasses

import jax
import jax.numpy as jnp

from saejax.config import Config, setting
from saejax.dictionaries import Dictionary
from saejax.dictionaries.kinds import Kind, register
from saejax.dictionaries.kinds.base import Arrays, EncodedBatch, EncoderInputs, Numbers


@dataclasses.dataclass(frozen=True)
class ShrunkConfig(Config):
    """Settings of shrunk dictionaries."""

    strength: tuple[float, ...] = setting((0.5,), "coefficient of the penalty (or a list)", low=0.0, swept=True)
    margin: float = setting(0.02, "margins at the start", low=0.0)
    width: float = setting(0.1, "coefficient of the margins' mean square", low=0.0)


@register
class Shrunk(Kind):
    """f = max(pre - margin, 0); the penalty is strength * mean over tokens of sum_i log(1 + f_i |W_dec_i|)."""

    name = "shrunk"
    about = "takes a margin that each feature learns off its activations"
    Settings = ShrunkConfig
    vectors = ("margin_F",)

    def encode(self, dictionary: Dictionary, inputs: EncoderInputs, numbers: Numbers) -> jax.Array:
        pre_xF, margin_F = inputs.pre_xF, dictionary.arrays["margin_F"]
        shape = (1,) * (pre_xF.ndim - 1) + margin_F.shape
        return jax.nn.relu(pre_xF - margin_F.reshape(shape))

    def penalty(self, batch: EncodedBatch) -> jax.Array:
        sizes_BxF = jnp.log1p(batch.f_BxF * batch.dictionary.decoder_norms_F[None])
        return batch.values["strength"] * jnp.mean(jnp.sum(sizes_BxF, axis=-1))

    def losses(self, batch: EncodedBatch) -> dict[str, jax.Array]:
        return dict(margins=batch.settings.width * jnp.mean(jnp.square(batch.dictionary.arrays["margin_F"])))

    def start(self, settings: ShrunkConfig) -> dict[str, float]:
        return dict(margin_F=settings.margin)

    def constrain(self, params: Arrays) -> Arrays:
        return params | dict(margin_F=jnp.maximum(params["margin_F"], 0.0))
