"""A decoder with its weights and its tokenizer, on its devices."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from saejax.models import source, tokens
from saejax.models.config import DecoderConfig
from saejax.models.rules import GRADIENT, RunRules
from saejax.models.tokens import Tokens


class LoadedModel:
    """What a language model is made of.

    Attributes:
      config: sizes and choices of the decoder.
      params: its parameters, for the functions of ``saejax.models.decoder`` and ``run``.
      tokenizer: the model's own.
      source: where it came from.
      mesh: the devices it is on.
      rules: how its gradients are taken.
    """

    def __init__(
        self,
        config: DecoderConfig,
        params: dict[str, jax.Array],
        tokenizer: Any,
        source: source.ModelSource,
        mesh: Mesh,
        rules: RunRules = GRADIENT,
    ):
        self.config, self.params, self.tokenizer, self.source, self.mesh = config, params, tokenizer, source, mesh
        self.rules = rules

    def tokenize(self, texts: Sequence[str], bos: str = "auto") -> Tokens:
        """Return the token ids of texts.

        Args:
          texts: at least one.
          bos: "auto" (what the tokenizer puts in front, once), "always" or "never".

        Raises:
          UserError: a text is empty or longer than the context, or the model has no tokenizer.
        """
        return tokens.tokenize(self.tokenizer, texts, self.config.context, bos)

    def token_id(self, text: str) -> int:
        """Return the id of the token with which an answer continues a text: " Paris" and "Paris" differ."""
        return tokens.continuation_ids(self.tokenizer, text)[0]
