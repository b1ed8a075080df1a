"""The contexts and labels of features, from activations in memory."""

import tempfile
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path

import numpy as np

from saejax.activations.in_memory import Activations
from saejax.activations.joined import single_sites, with_joined
from saejax.activations.store import Store
from saejax.arguments import check_classes
from saejax.dictionaries import Dictionary
from saejax.errors import UserError, one_of
from saejax.interpret import contexts
from saejax.interpret.feature_record import FeatureContext
from saejax.interpret.rule_labels import RuleLabels, search_labels
from saejax.interpret.text import CodedText
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import token_piece
from saejax.progress import show_progress


@check_classes
def top_contexts(
    lm: LanguageModel, acts: Activations | Store, dictionary: Dictionary, features: Sequence[int] | int, count: int = 5
) -> dict[int, list[FeatureContext]]:
    """Return the contexts in which features fire most, strongest first, each a dict of tokens and activations.

    Contexts come from different texts as long as there are enough, and none repeats another.

    Args:
      lm: the model, whose tokenizer spells the tokens.
      acts: result of ``capture``, or a store, with the dictionary's site (of a crosscoder, all of its sites), and a
        transcoder's target: without it, its attention sinks are not known, and contexts may be of them.
      dictionary: the dictionary.
      features: indices of features, or one.
      count: contexts of each.

    Returns:
      The contexts of each feature by its index; [] where it fires nowhere.

    Raises:
      UserError: a feature does not exist or is named twice, or there are no activations of the dictionary's site.
    """
    chosen = dictionary.feature_indices(features).tolist()
    if not isinstance(count, Integral) or count < 1:
        raise UserError(f"count is {count!r}: expected a whole number, 1 or more")
    pieces = _pieces(lm)
    with tempfile.TemporaryDirectory(prefix="saejax-contexts-") as folder:
        store = acts if isinstance(acts, Store) else acts.save(folder)
        store = with_joined(store, [dictionary.site], {dictionary.site: dictionary.config.scales})
        with show_progress("top_contexts") as on_progress:
            return contexts.top_contexts(store, dictionary, chosen, count, pieces, lm.mesh, on_progress)


@check_classes
def label_features(lm: LanguageModel, acts: Activations | Store, dictionary: Dictionary, seed: int = 789) -> RuleLabels:
    """Label features by the simple rules that best predict where they fire, as the stage ``interpret`` does.

    A rule names tokens, their shapes, the tokens before, positions or the next token. It is a label if it predicts
    held-out firings better than the rules of other features and of random directions do.

    Args:
      lm: the model.
      acts: result of ``capture``, of whose texts the last third are held out; or a store with held-out text. Both sites
        of a transcoder have to be there.
      dictionary: the dictionary.
      seed: of the controls.

    Raises:
      UserError: there are fewer than three texts, or no activations of the dictionary's site.
    """
    with tempfile.TemporaryDirectory(prefix="saejax-labels-") as name:
        if isinstance(acts, Store):
            store = acts
        else:
            for site in single_sites([dictionary.site]):
                one_of(site, acts.values, "site of these activations")
            count = len(np.unique(acts.sources_of_pieces()))
            if count < 3:
                raise UserError(f"there are {count} texts: give at least 3, of which a third judges the labels")
            store = acts.save(Path(name) / "capture", held_out=count // 3)
        text, folder = CodedText(store.documents, _pieces(lm)), Path(name) / "firings"
        with show_progress("label_features") as bar:

            def begin_progress(doing: str, total: int, unit: str) -> Callable[[int], None]:
                done = 0

                def on_done(count: int) -> None:
                    nonlocal done
                    done += count
                    bar(done, total)

                return on_done

            return search_labels(lm, store, text, dictionary, folder, seed=seed, begin_progress=begin_progress).labels


def _pieces(lm: LanguageModel) -> list[str]:
    return list(map(token_piece(lm.tokenizer), range(lm.config.vocab)))
