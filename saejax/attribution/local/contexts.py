"""Contexts in which features of transcoders fire, searched in texts."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from saejax.attribution.local.model import LocalModel
from saejax.attribution.local.prompt_run import Active, NothingActive
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import encode, token_text
from saejax.progress import OnProgress, silent

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
    #: the active features of each text that was run, and its tokens; None: there are none.
    _runs: list[tuple[Active, list[str]] | None] = dataclasses.field(default_factory=list, init=False)

    def _firings(self, on_progress: OnProgress) -> Iterator[tuple[Active, list[str]]]:
        as_text, most = token_text(self.model.tokenizer), min(_TOKENS, self.model.config.context)
        for number, text in enumerate(self.texts):
            if number == len(self._runs):
                on_progress(number, len(self.texts))
                ids = encode(self.model.tokenizer, text)[:most]
                try:
                    local = LocalModel(self.model, self.transcoders, ids)
                    self._runs.append((local.active, [as_text(int(token)) for token in local.ids_P]))
                except NothingActive:  # as on words that a small vocabulary does not have
                    self._runs.append(None)
            if run := self._runs[number]:
                yield run

    def contexts(
        self, features: Collection[tuple[int, int]], on_progress: OnProgress = silent
    ) -> dict[tuple[int, int], tuple[Context, ...]]:
        """Return the strongest firings of features, one of each text at most; none of those that do not fire.

        Args:
          features: layer and index of each.
          on_progress: called with the texts run and of all; may raise to stop.
        """
        contexts: dict[tuple[int, int], list[Context]] = {feature: [] for feature in features}
        for active, words in self._firings(on_progress) if contexts else ():
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
