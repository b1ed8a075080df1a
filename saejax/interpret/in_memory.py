"""The contexts of features, from activations in memory."""

import tempfile
from collections.abc import Sequence

from saejax.activations.in_memory import Activations
from saejax.activations.store import Store
from saejax.dictionaries import Dictionary
from saejax.interpret import contexts
from saejax.interpret.feature_record import FeatureContext
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import token_piece


def top_contexts(
    lm: LanguageModel, acts: Activations | Store, dictionary: Dictionary, features: Sequence[int], count: int = 5
) -> dict[int, list[FeatureContext]]:
    """Return the contexts in which features fire most, strongest first, each a dict of tokens and activations.

    Contexts come from different texts as long as there are enough, and none repeats another.

    Args:
      lm: the model, whose tokenizer spells the tokens.
      acts: result of ``capture``, or a store, with the dictionary's site.
      dictionary: the dictionary.
      features: indices of features.
      count: contexts of each.
    """
    pieces = list(map(token_piece(lm.tokenizer), range(lm.config.vocab)))
    with tempfile.TemporaryDirectory(prefix="saejax-contexts-") as folder:
        store = acts if isinstance(acts, Store) else acts.save(folder)
        return contexts.top_contexts(store, dictionary, features, count, pieces, lm.mesh)
