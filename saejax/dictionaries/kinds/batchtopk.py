"""The B k largest pre-activations of a whole batch of B tokens; a threshold at inference (Bussmann et al., 2024)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from saejax.config import Config, setting
from saejax.dictionaries import sparsity
from saejax.dictionaries.kinds.base import Arrays, Dictionary, EncoderInputs, Kind, Numbers


@dataclasses.dataclass(frozen=True)
class BatchTopKConfig(Config):
    """Settings of batchtopk dictionaries alone."""

    across_layers: bool = setting(
        False,
        "of a cross-layer transcoder: keep the largest activations of a batch in all layers together, so that layers "
        "share the k features per token and layer as they need them; otherwise each layer keeps k",
    )


class BatchTopK(Kind):
    """k active features per token on average; the threshold at inference is calibrated after training."""

    name = "batchtopk"
    about = "keeps the largest activations of a batch, k of them per token on average"
    Settings: ClassVar[type[Config]] = BatchTopKConfig
    reads = ("k",)
    vectors = ("threshold_F",)
    elementwise = True
    jumprelu = True
    no_free_decoder = "has no penalty to hold it in a batchtopk dictionary"

    def encode(self, dictionary: Dictionary, inputs: EncoderInputs, numbers: Numbers) -> jax.Array:
        """Return pre-activations above the threshold, so that a token's features do not depend on other tokens."""
        return sparsity.threshold(inputs.pre_xF, dictionary.arrays["threshold_F"])

    def encode_in_training(
        self, dictionary: Dictionary, inputs: EncoderInputs, values: Numbers, settings: Any
    ) -> jax.Array:
        """Return the largest activations of the batch."""
        return sparsity.batch_topk(inputs.pre_xF, values["k"])

    def finish(self, arrays: Arrays, kept: jax.Array) -> Arrays:
        """Give all features the threshold that keeps the same activations."""
        return arrays | dict(threshold_F=jnp.full_like(arrays["threshold_F"], kept))

    def resume(self, arrays: Arrays) -> Arrays:
        """Reset the threshold: training does without, and calibrates it after the last step."""
        return arrays | dict(threshold_F=jnp.zeros_like(arrays["threshold_F"]))
