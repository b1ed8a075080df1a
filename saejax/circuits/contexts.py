"""Contexts, promoted tokens and labels of the features in circuits.

Files of the set or of the user go first. A feature that they do not describe is searched in the embedded corpus and the
traced prompts, and the tokens that it promotes are those of its decoder row, read by the model's unembedding.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from saejax.attribution.forms.features import EXAMPLES, Feature, FeatureDetails
from saejax.attribution.forms.outputs import details_of_features
from saejax.attribution.local.model import LocalModel
from saejax.attribution.local.prompt_run import Active
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.interpret.neighbours import output_tokens
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import encode, token_text
from saejax.settings import GraphConfig

_BEFORE, _AFTER = 10, 3  # tokens of a context around its strongest one
_TOKENS = 64  # of each text that are read
_PROMOTED = 5  # tokens that a page shows


@dataclasses.dataclass(frozen=True)
class FeatureSearch:
    """Describes features; the texts are run once, when the first feature is searched in them."""

    model: LanguageModel
    transcoders: LayerTranscoders
    config: GraphConfig  #: names the set and files of its features
    labels: Mapping[Feature, str]  #: that are used in place of those in the files
    texts: Sequence[str]  #: that are searched

    def describe(self, features: Collection[Feature]) -> dict[Feature, FeatureDetails]:
        """Return the details of features."""
        recorded = details_of_features(self.config, list(features))
        details = {feature: recorded.get(feature, FeatureDetails()) for feature in features}
        # Only what the files do not say is searched for, as it takes a pass of the model for each text.
        contexts = self._contexts([feature for feature in features if not details[feature].examples])
        promoted = self._promoted([feature for feature in features if not details[feature].top_logits])
        return {
            feature: dataclasses.replace(
                value,
                examples=value.examples or contexts[feature],
                top_logits=value.top_logits or promoted[feature],
                label=self.labels.get(feature, value.label),
            )
            for feature, value in details.items()
        }

    @functools.cached_property
    def _firings(self) -> list[tuple[Active, list[str]]]:
        """The active features of each text, and its tokens."""
        firings, as_text = [], token_text(self.model.tokenizer)
        for text in self.texts:
            local = LocalModel(self.model, self.transcoders, encode(self.model.tokenizer, text)[:_TOKENS])
            firings.append((local.active, [as_text(int(token)) for token in local.ids_P]))
        return firings

    def _contexts(self, features: Collection[Feature]) -> dict[Feature, tuple[dict[str, Any], ...]]:
        """Return the strongest firings of features, one of each text at most; none of those that do not fire."""
        contexts: dict[Feature, list[dict[str, Any]]] = {feature: [] for feature in features}
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
            feature: tuple(sorted(some, key=lambda context: -max(context["activations"]))[:EXAMPLES])
            for feature, some in contexts.items()
        }

    def _promoted(self, features: Collection[Feature]) -> dict[Feature, tuple[str, ...]]:
        """Return the tokens whose logits features raise most, by what they write to their own layer."""
        tokens, as_text = dict[Feature, tuple[str, ...]](), token_text(self.model.tokenizer)
        for layer in sorted({layer for layer, _ in features}):
            indices = sorted(index for its_layer, index in features if its_layer == layer)
            rows_UxD = self.transcoders.writes(layer, np.array(indices))[:, 0]
            raised = output_tokens(self.model, jnp.asarray(rows_UxD, jnp.float32), _PROMOTED).raised()
            tokens |= {(layer, i): tuple(map(as_text, ids)) for i, ids in zip(indices, raised, strict=True)}
        return tokens
