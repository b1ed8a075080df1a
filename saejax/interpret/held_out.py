"""The held-out contexts that labels are judged on: with a feature, without it, and near misses.

A *near miss* is a context in which similar features fire strongly and the feature itself does not. A label of the topic
alone holds for these, too.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from saejax.interpret import contexts
from saejax.interpret.feature_record import FeatureContext
from saejax.interpret.firings import Block, blocks
from saejax.interpret.records import group_draws
from saejax.interpret.text import CodedText

MIN_FIRINGS = 10  # on held-out text, for a feature to be judged
_DRAWS = 1  # contexts from each tenth of a feature's firings: ten, which a judge reads in two questions
_TRIES = 50  # positions tried for each context without the feature, or the strongest of a similar feature
_Firings = tuple[np.ndarray, np.ndarray]  # places and activations


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The held-out contexts of a feature."""

    feature: int  #: its index
    active: list[FeatureContext]  #: contexts in which it fires, the weakest tenth of its firings first
    silent: list[FeatureContext]  #: as many in which it does not fire, or fewer if it fires almost everywhere
    near: list[FeatureContext]  #: as many near misses in different documents, or fewer


def held_out(
    folder: Path, features: int, similar: Mapping[int, Sequence[int]], place: np.ndarray, text: CodedText, seed: int
) -> Iterator[HeldOut]:
    """Yield the contexts of features.

    Args:
      folder: folder with the firings on held-out text, written by ``firings.record``.
      features: number of features of the dictionary.
      similar: features that fire at least ``MIN_FIRINGS`` times, each with its most similar features.
      place: encoded places of the text.
      text: text of the store.
      seed: seed of the silent contexts; each feature has its own generator.
    """
    in_text = np.zeros(int(place.max()) + 1 + contexts.AFTER, bool)
    in_text[place] = True
    strongest = _strongest_firings(folder, features, {other for others in similar.values() for other in others})
    for block in blocks(folder, features):
        for i in (i for i in range(block.size) if block.first + i in similar):
            # A generator for each feature: its contexts do not depend on which other features are judged.
            rng, of_feature = np.random.default_rng((seed, block.first + i)), block.of(i)
            drawn, _ = group_draws(block.value[of_feature], block.place[of_feature], _DRAWS)
            others = [strongest[other] for other in similar[block.first + i] if other in strongest]
            tried = rng.choice(place, min(_TRIES * len(drawn), len(place)), replace=False)
            silent, near = _silent_places(block, text, tried, i), _near_places(block, text, others, i)
            places = block.place[of_feature][drawn], silent[: len(drawn)], near[: len(drawn)]
            yield HeldOut(block.first + i, *(contexts.contexts(block, text, in_text, i, some) for some in places))


def _strongest_firings(folder: Path, features: int, wanted: set[int]) -> dict[int, _Firings]:
    """Return the ``_TRIES`` strongest firings of features that fire."""
    firings: dict[int, _Firings] = {}
    for block in blocks(folder, features):
        for feature in wanted & set(range(block.first, block.first + block.size)):
            part = block.of(feature - block.first)
            order = np.argsort(-block.value[part], kind="stable")[:_TRIES]
            if len(order):
                firings[feature] = block.place[part][order], block.value[part][order]
    return firings


def _silent_places(block: Block, text: CodedText, place: np.ndarray, feature: int) -> np.ndarray:
    """Return the places in whose contexts a feature does not fire."""
    around, _ = contexts.surroundings(text, place)
    return place[~block.at(np.full(around.shape, feature), around).any(axis=1)]


def _near_places(block: Block, text: CodedText, others: Sequence[_Firings], feature: int) -> np.ndarray:
    """Return places of a feature's near misses, one of each document, those where another fires most first."""
    if not others:
        return np.zeros(0, np.int64)
    # Activations of different features have different units: each is taken over its feature's largest.
    share = np.concatenate([value / value[0] for _, value in others])
    place = np.concatenate([place for place, _ in others])[np.argsort(-share, kind="stable")]
    silent = _silent_places(block, text, place, feature)
    return silent[np.sort(np.unique(text.document(silent), return_index=True)[1])]
