"""Contexts, promoted tokens and names of the features in circuits.

Files of the set or of the user go first. A feature that they do not know is looked for in the embedded corpus, and the
tokens that it promotes are those of its decoder row, read by the model's unembedding.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from saejax.attribution.forms.features import EXAMPLES, Feature, FeatureDetails
from saejax.attribution.local.model import LocalModel
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.circuits.groups import THIRDS, Key, third_of
from saejax.interpret.neighbours import output_tokens
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import encode, token_text

_BEFORE, _AFTER = 10, 3  # tokens of a context around its strongest one
_TOKENS = 64  # of each text that are read
_TOP = 2  # tokens that name a feature
_PROMOTED = 5  # tokens that a page shows


class _Firings(NamedTuple):
    """The active features of a text: layers, indices, positions and activations [A], and its tokens."""

    layer_A: np.ndarray
    feature_A: np.ndarray
    position_A: np.ndarray
    value_A: np.ndarray
    words: list[str]


class FeatureSearch:
    """Looks for features in texts, which are run once, when the first feature is looked for.

    Args:
      model: the language model.
      transcoders: of all its layers.
      texts: that are searched.
    """

    def __init__(self, model: LanguageModel, transcoders: LayerTranscoders, texts: Sequence[str]):
        self._model, self._transcoders, self._texts = model, transcoders, texts

    @functools.cached_property
    def _firings(self) -> list[_Firings]:
        as_text, firings = token_text(self._model.tokenizer), []
        for text in self._texts:
            local = LocalModel(self._model, self._transcoders, encode(self._model.tokenizer, text)[:_TOKENS])
            active, words = local.active, [as_text(int(token)) for token in local.ids_P]
            firings.append(
                _Firings(active.layer_A, active.feature_A, active.position_A, np.asarray(active.value_A), words)
            )
        return firings

    def find(self, features: Collection[Feature]) -> dict[Feature, FeatureDetails]:
        """Return the strongest firings of features, one of each text at most; nothing of those that do not fire."""
        contexts: dict[Feature, list[tuple[float, dict[str, list]]]] = {feature: [] for feature in features}
        for text in self._firings if contexts else ():
            value_of: dict[Feature, np.ndarray] = {}
            for place in _rows_of(text, features):
                key = int(text.layer_A[place]), int(text.feature_A[place])
                value_P = value_of.setdefault(key, np.zeros(len(text.words)))
                value_P[text.position_A[place]] = text.value_A[place]
            for key, value_P in value_of.items():
                peak = int(value_P.argmax())
                near = slice(max(peak - _BEFORE, 0), peak + _AFTER + 1)
                context = dict(tokens=text.words[near], activations=value_P[near].tolist())
                contexts[key].append((float(value_P[peak]), context))
        return {
            key: FeatureDetails(tuple(context for _, context in sorted(some, key=lambda pair: -pair[0])[:EXAMPLES]))
            for key, some in contexts.items()
            if some
        }

    def promoted(self, features: Collection[Feature]) -> dict[Feature, tuple[str, ...]]:
        """Return the tokens whose logits features raise most, by what they write to their own layer."""
        as_text = token_text(self._model.tokenizer)
        tokens: dict[Feature, tuple[str, ...]] = {}
        for layer in sorted({layer for layer, _ in features}):
            indices = sorted(index for its_layer, index in features if its_layer == layer)
            rows_UxD = self._transcoders.writes(layer, np.array(indices))[:, 0]
            raised = output_tokens(self._model, jnp.asarray(rows_UxD, jnp.float32), _PROMOTED).raised()
            tokens |= {(layer, index): tuple(map(as_text, ids)) for index, ids in zip(indices, raised, strict=True)}
        return tokens

    def complete(
        self, features: Sequence[Feature], recorded: Mapping[Feature, FeatureDetails]
    ) -> dict[Feature, FeatureDetails]:
        """Return the details of features, with contexts and promoted tokens added where the recorded ones lack them."""
        details = {feature: recorded.get(feature, FeatureDetails()) for feature in features}
        # Only what the files do not say is searched for, as it takes a pass of the model for each text.
        searched = self.find([feature for feature in features if not details[feature].examples])
        promoted = self.promoted([feature for feature in features if not details[feature].top_logits])
        for feature, value in details.items():
            examples = value.examples or searched.get(feature, value).examples
            up = value.top_logits or promoted.get(feature, ())
            details[feature] = dataclasses.replace(value, examples=examples, top_logits=up)
        return details


def _rows_of(text: _Firings, features: Collection[Feature]) -> Iterator[int]:
    """Return the rows of a text's firings that are of these features."""
    # One number for layer and index, as ``np.isin`` compares single numbers.
    wide = int(text.feature_A.max(initial=0)) + 1
    wanted = [layer * wide + index for layer, index in features if index < wide]
    yield from np.flatnonzero(np.isin(text.layer_A.astype(np.int64) * wide + text.feature_A, wanted)).tolist()


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
