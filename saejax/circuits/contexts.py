"""Contexts of the features in a circuit, where no files of feature descriptions know them."""

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from saejax.attribution.forms.features import EXAMPLES, Feature, FeatureDetails
from saejax.attribution.local.model import LocalModel
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import encode, token_text

_BEFORE, _AFTER = 10, 3  # tokens of a context around its strongest one
_TOP = 2  # tokens that name a feature


def find_contexts(
    model: LanguageModel,
    transcoders: LayerTranscoders,
    texts: Sequence[str],
    features: Collection[Feature],
    tokens: int = 64,
) -> dict[Feature, FeatureDetails]:
    """Return the strongest firings of features in texts, one of each text at most.

    Args:
      model: the language model.
      transcoders: of all its layers.
      texts: that are searched.
      features: (layer, index) of those that are looked for.
      tokens: of each text that are read.
    """
    wanted, as_text = set(features), token_text(model.tokenizer)
    found: dict[Feature, list[tuple[float, dict[str, list]]]] = {feature: [] for feature in features}
    for text in texts if wanted else ():
        local = LocalModel(model, transcoders, encode(model.tokenizer, text)[:tokens])
        active, words = local.active, [as_text(int(token)) for token in local.ids_P]
        value_of: dict[Feature, np.ndarray] = {}
        columns = (
            active.layer_A.tolist(),
            active.feature_A.tolist(),
            active.position_A.tolist(),
            active.value_A.tolist(),
        )
        for layer, feature, position, value in zip(*columns, strict=True):
            if (layer, feature) in wanted:
                value_of.setdefault((layer, feature), np.zeros(len(words)))[position] = value
        for key, value_P in value_of.items():
            peak = int(value_P.argmax())
            near = slice(max(peak - _BEFORE, 0), peak + _AFTER + 1)
            found[key].append((float(value_P[peak]), dict(tokens=words[near], activations=value_P[near].tolist())))
    return {
        key: FeatureDetails(tuple(context for _, context in sorted(some, key=lambda one: -one[0])[:EXAMPLES]))
        for key, some in found.items()
        if some
    }


def name_feature(feature: Feature, details: FeatureDetails | None) -> str:
    """Return a feature's label, or else the tokens on which it fires most strongly; its number if nothing is known."""
    if details and details.label:
        return details.label
    if not details or not details.examples:
        return f"{feature[0]}.{feature[1]}"
    peaks = Counter[str]()
    for rank, context in enumerate(details.examples):
        peak = max(range(len(context["tokens"])), key=context["activations"].__getitem__)
        peaks[context["tokens"][peak].strip() or "␣"] += 3 if rank == 0 else 2  # of ties, the strongest
    return " ".join(f"“{token}”" for token, _ in peaks.most_common(_TOP))
