"""A model that was run on a prompt with transcoders or SAEs, as targets, graphs and groups see it."""

import dataclasses

import jax
import numpy as np

from saejax.attribution.local.active import Active
from saejax.attribution.local.dictionaries import LayerDictionaries
from saejax.models.config import RunRules
from saejax.models.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class PromptRun:
    """A model that was run on a prompt with dictionaries.

    Attributes:
      model: the model.
      dictionaries: the transcoders or SAEs whose features are nodes.
      rules: those by which gradients go through the model.
      ids_P: int32 token ids.
      active: the active features.
      logits_V: fp32 logits at the last position.
      last_D: fp32, the stream leaving the last layer at the prompt's last position.
      stream_LxTxD: fp32, the stream entering each layer.
    """

    model: LanguageModel
    dictionaries: LayerDictionaries
    rules: RunRules
    ids_P: np.ndarray
    active: Active
    logits_V: np.ndarray
    last_D: jax.Array
    stream_LxTxD: jax.Array

    def constants(self, chosen_F: np.ndarray) -> np.ndarray:
        """What biases of no source add to the pre-activations of some active features: the encoder's, fp32 [F]."""
        return self.active.b_enc_A[chosen_F]
