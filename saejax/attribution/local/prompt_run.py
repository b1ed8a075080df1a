"""What targets, graphs and groups see of a model that was run on a prompt with transcoders or SAEs."""

from typing import Protocol

import jax
import numpy as np

from saejax.attribution.local.active import Active
from saejax.attribution.local.dictionaries import LayerDictionaries
from saejax.models.language_model import LanguageModel
from saejax.models.rules import RunRules


class PromptRun(Protocol):
    """A model that was run on a prompt, as targets and graphs see it; ``Replacement`` is one."""

    @property
    def model(self) -> LanguageModel:
        """The model."""

    @property
    def dictionaries(self) -> LayerDictionaries:
        """The transcoders or SAEs whose features are nodes."""

    @property
    def rules(self) -> RunRules:
        """The rules by which gradients go through it."""

    @property
    def ids_P(self) -> np.ndarray:
        """int32 token ids."""

    @property
    def active(self) -> Active:
        """The active features."""

    @property
    def logits_V(self) -> np.ndarray:
        """fp32 logits at the last position."""

    @property
    def last_D(self) -> jax.Array:
        """The stream leaving the last layer at the last position, fp32."""

    @property
    def stream_LxTxD(self) -> jax.Array:
        """The stream entering each layer, fp32."""

    def constants(self, chosen_F: np.ndarray) -> np.ndarray:
        """What biases of their own add to the pre-activations of some of the active features, fp32 [F]."""
