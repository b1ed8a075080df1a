"""Contexts, promoted tokens and labels of the features in circuits.

Files of the set or of the user go first. A feature that they do not describe is searched in the embedded corpus and the
traced prompts, and the tokens that it promotes are those of its decoder row, read by the model's unembedding.
"""

import dataclasses
from collections.abc import Collection, Mapping

import jax.numpy as jnp
import numpy as np

from saejax.attribution.forms.features import Feature, FeatureDetails
from saejax.attribution.forms.outputs import details_of_features
from saejax.attribution.local.contexts import ContextSearch
from saejax.interpret.neighbours import output_tokens
from saejax.models.tokens import token_text
from saejax.settings import GraphConfig

_PROMOTED = 5  # tokens that a page shows


@dataclasses.dataclass(frozen=True)
class FeatureSearch:
    """Describes features, by files and by what is found in texts."""

    search: ContextSearch  #: finds contexts of those that the files do not describe
    config: GraphConfig  #: names the set and files of its features
    labels: Mapping[Feature, str]  #: that are used in place of those in the files

    def describe(self, features: Collection[Feature]) -> dict[Feature, FeatureDetails]:
        """Return the details of features."""
        recorded = details_of_features(self.config, list(features))
        details = {feature: recorded.get(feature, FeatureDetails()) for feature in features}
        # Only what the files do not say is searched for, as it takes a pass of the model for each text.
        contexts = self.search.contexts([feature for feature in features if not details[feature].examples])
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

    def _promoted(self, features: Collection[Feature]) -> dict[Feature, tuple[str, ...]]:
        """Return the tokens whose logits features raise most, by what they write to their own layer."""
        model = self.search.model
        tokens, as_text = dict[Feature, tuple[str, ...]](), token_text(model.tokenizer)
        for layer in sorted({layer for layer, _ in features}):
            indices = sorted(index for its_layer, index in features if its_layer == layer)
            rows_UxD = self.search.transcoders.writes(layer, np.array(indices))[:, 0]
            raised = output_tokens(model, jnp.asarray(rows_UxD, jnp.float32), _PROMOTED).raised()
            tokens |= {(layer, i): tuple(map(as_text, ids)) for i, ids in zip(indices, raised, strict=True)}
        return tokens
