"""The held-out contexts that labels are judged on: with a feature, from tenths of its firings, and without it."""

import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from saejax.interpret import contexts, describe
from saejax.interpret.feature_record import FeatureContext
from saejax.interpret.firings import Block, blocks
from saejax.interpret.text import CodedText

MIN_FIRINGS = 10  # on held-out text, for a feature to be judged
_DRAWS = 1  # contexts from each tenth of a feature's firings: ten, which a judge reads in two questions
_TRIES = 50  # positions tried for each context without the feature


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The held-out contexts of a feature.

    Attributes:
      feature: its index.
      active: contexts in which it fires, the weakest tenth of its firings first.
      silent: as many in which it does not fire, or fewer if it fires almost everywhere.
    """

    feature: int
    active: list[FeatureContext]
    silent: list[FeatureContext]

    @property
    def fires(self) -> list[bool]:
        """True for each active context, then False for each silent one."""
        return [True] * len(self.active) + [False] * len(self.silent)


def held_out(
    folder: Path, features: int, wanted: Collection[int], place: np.ndarray, text: CodedText, seed: int
) -> Iterator[HeldOut]:
    """Yield the contexts of the features that fire at least ``MIN_FIRINGS`` times.

    Args:
      folder: folder with the firings on held-out text, written by ``firings.record``.
      features: number of features of the dictionary.
      wanted: features to look at.
      place: encoded places of the text.
      text: text of the store.
      seed: seed of the silent contexts; each feature has its own generator.
    """
    in_text = np.zeros(int(place.max()) + 1 + contexts.AFTER, bool)
    in_text[place] = True
    for block in blocks(folder, features):
        chosen = [i for i in range(block.size) if block.first + i in wanted and block.counts[i] >= MIN_FIRINGS]
        if chosen:
            drawn, _ = describe.group_draws(block, describe.weakest_first(block), _DRAWS)
        for i in chosen:
            # A generator for each feature: its contexts do not depend on which other features are judged.
            rng = np.random.default_rng((seed, block.first + i))
            firings = block.place[drawn[slice(*np.searchsorted(block.feature[drawn], [i, i + 1]))]]
            active = contexts.contexts(block, text, in_text, i, firings)
            silent = contexts.contexts(block, text, in_text, i, _silent_places(block, text, place, i, rng, len(active)))
            yield HeldOut(block.first + i, active, silent)


def _silent_places(
    block: Block, text: CodedText, place: np.ndarray, feature: int, rng: np.random.Generator, count: int
) -> np.ndarray:
    """Return up to ``count`` of the encoded places in whose contexts a feature does not fire."""
    tried = rng.choice(place, min(_TRIES * count, len(place)), replace=False)
    around, _ = contexts.surroundings(text, tried)
    return tried[~block.at(np.full(around.shape, feature), around).any(axis=1)][:count]
