"""Contexts, promoted tokens and names of the features in circuits.

Files of the set or of the user go first. A feature that they do not know is looked for in the embedded corpus, and the
tokens that it promotes are those of its decoder row, read by the model's unembedding.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from saejax.attribution.forms.features import EXAMPLES, Feature, FeatureDetails
from saejax.attribution.local.model import LocalModel
from saejax.attribution.local.prompt_run import Active
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.circuits.groups import THIRDS, Key, third_of
from saejax.interpret.neighbours import output_tokens
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import encode, token_text

_BEFORE, _AFTER = 10, 3  # tokens of a context around its strongest one
_TOKENS = 64  # of each text that are read
_TOP = 2  # tokens that name a feature
_PROMOTED = 5  # tokens that a page shows


class FeatureSearch:
    """Looks for features in texts, which are run once, when the first feature is looked for.

    Args:
      model: the language model.
      transcoders: of all its layers.
      texts: that are searched.
    """

    def __init__(self, model: LanguageModel, transcoders: LayerTranscoders, texts: Sequence[str]):
        self._model, self._transcoders, self._texts = model, transcoders, texts
        self._as_text = token_text(model.tokenizer)

    @functools.cached_property
    def _firings(self) -> list[tuple[Active, list[str]]]:
        """The active features of each text, and its tokens."""
        firings = []
        for text in self._texts:
            local = LocalModel(self._model, self._transcoders, encode(self._model.tokenizer, text)[:_TOKENS])
            firings.append((local.active, [self._as_text(int(token)) for token in local.ids_P]))
        return firings

    def find(self, features: Collection[Feature]) -> dict[Feature, tuple[dict[str, list], ...]]:
        """Return the strongest firings of features, one of each text at most; none of those that do not fire."""
        contexts: dict[Feature, list[tuple[float, dict[str, list]]]] = {feature: [] for feature in features}
        for active, words in self._firings if contexts else ():
            value_of: dict[Feature, np.ndarray] = {}
            # One number for layer and index, as ``np.isin`` compares single numbers.
            wide = int(active.feature_A.max(initial=0)) + 1
            wanted = [layer * wide + index for layer, index in features if index < wide]
            for row in np.flatnonzero(np.isin(active.layer_A.astype(np.int64) * wide + active.feature_A, wanted)):
                key = int(active.layer_A[row]), int(active.feature_A[row])
                value_of.setdefault(key, np.zeros(len(words)))[active.position_A[row]] = active.value_A[row]
            for key, value_P in value_of.items():
                peak = int(value_P.argmax())
                near = slice(max(peak - _BEFORE, 0), peak + _AFTER + 1)
                context = dict(tokens=words[near], activations=value_P[near].tolist())
                contexts[key].append((float(value_P[peak]), context))
        return {
            key: tuple(context for _, context in sorted(some, key=lambda pair: -pair[0])[:EXAMPLES])
            for key, some in contexts.items()
        }

    def promoted(self, features: Collection[Feature]) -> dict[Feature, tuple[str, ...]]:
        """Return the tokens whose logits features raise most, by what they write to their own layer."""
        tokens: dict[Feature, tuple[str, ...]] = {}
        for layer in sorted({layer for layer, _ in features}):
            indices = sorted(index for its_layer, index in features if its_layer == layer)
            rows_UxD = self._transcoders.writes(layer, np.array(indices))[:, 0]
            raised = output_tokens(self._model, jnp.asarray(rows_UxD, jnp.float32), _PROMOTED).raised()
            tokens |= {(layer, i): tuple(map(self._as_text, ids)) for i, ids in zip(indices, raised, strict=True)}
        return tokens

    def complete(
        self, features: Sequence[Feature], recorded: Mapping[Feature, FeatureDetails]
    ) -> dict[Feature, FeatureDetails]:
        """Return the details of features, with contexts and promoted tokens added where the recorded ones lack them."""
        details = {feature: recorded.get(feature, FeatureDetails()) for feature in features}
        # Only what the files do not say is searched for, as it takes a pass of the model for each text.
        searched = self.find([feature for feature in features if not details[feature].examples])
        promoted = self.promoted([feature for feature in features if not details[feature].top_logits])
        return {
            feature: dataclasses.replace(
                value,
                examples=value.examples or searched[feature],
                top_logits=value.top_logits or promoted[feature],
            )
            for feature, value in details.items()
        }


def telling_tokens(key: Key, details: FeatureDetails, n_layers: int) -> Counter[str]:
    """Return the tokens that tell a feature, quoted, with weights.

    They are those on which it fires; of a feature late at the last position, where the answer is read, those that it
    promotes, with an arrow.
    """
    says = key.role == "last" and third_of(key.layer, n_layers) == THIRDS[-1]
    return (details.promoted() if says else None) or details.peaks() or details.promoted()


def name_feature(key: Key, details: FeatureDetails, n_layers: int) -> str:
    """Return a feature's label, or else the tokens that tell it; its number if nothing is known."""
    tokens = telling_tokens(key, details, n_layers)
    by_tokens = " ".join(token for token, _ in tokens.most_common(_TOP))
    return details.label or by_tokens or f"layer {key.layer}, feature {key.feature}"
