"""Contexts in which features of transcoders fire, searched in texts."""

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from saejax.attribution.local.model import LocalModel
from saejax.attribution.local.prompt_run import Active, NothingActive
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import encode, token_text

_BEFORE, _AFTER = 10, 3  # tokens of a context around its strongest one
_TOKENS = 64  # of each text that are read
_CONTEXTS = 5  # of a feature, the strongest ones
Context = dict[str, Any]  # ``tokens`` and ``activations``, of equal length


@dataclasses.dataclass(frozen=True)
class ContextSearch:
    """Searches texts, which are run once, when the first feature is looked for."""

    model: LanguageModel
    transcoders: LayerTranscoders
    texts: Sequence[str]

    @functools.cached_property
    def _firings(self) -> list[tuple[Active, list[str]]]:
        """The active features of each text, and its tokens."""
        firings, as_text = [], token_text(self.model.tokenizer)
        most = min(_TOKENS, self.model.config.context)
        for text in self.texts:
            ids = encode(self.model.tokenizer, text)[:most]
            try:
                local = LocalModel(self.model, self.transcoders, ids)
            except NothingActive:  # as on words that a small vocabulary does not have
                continue
            firings.append((local.active, [as_text(int(token)) for token in local.ids_P]))
        return firings

    def contexts(self, features: Collection[tuple[int, int]]) -> dict[tuple[int, int], tuple[Context, ...]]:
        """Return the strongest firings of features, one of each text at most; none of those that do not fire.

        Args:
          features: layer and index of each.
        """
        contexts: dict[tuple[int, int], list[Context]] = {feature: [] for feature in features}
        for active, words in self._firings if contexts else ():
            for (layer, index), feature_contexts in contexts.items():
                in_layer = active.of_layer(layer)
                fires_A = active.feature_A[in_layer] == index
                value_P = np.zeros(len(words))
                value_P[active.position_A[in_layer][fires_A]] = active.value_A[in_layer][fires_A]
                if fires_A.any():
                    peak = int(value_P.argmax())
                    near = slice(max(peak - _BEFORE, 0), peak + _AFTER + 1)
                    feature_contexts.append(dict(tokens=words[near], activations=value_P[near].tolist()))
        return {
            feature: tuple(sorted(some, key=lambda context: -max(context["activations"]))[:_CONTEXTS])
            for feature, some in contexts.items()
        }
