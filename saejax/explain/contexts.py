"""The held-out contexts by which labels are judged: with a feature, from tenths of its firings, and without it."""

import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from saejax.explain.questions import active
from saejax.interpret import describe
from saejax.interpret.feature_record import FeatureContext
from saejax.interpret.firings import Block, blocks
from saejax.interpret.text import CodedText

FEWEST = 10  # firings on held-out text of a feature that is judged, at least
_TRIED = 50  # places looked at for each context without the feature


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The contexts of a feature.

    Attributes:
      feature: its number.
      active: contexts in which it fires, the weakest tenth of its firings first.
      silent: as many in which it does not fire, or fewer if it fires almost everywhere.
      wrong: for each of ``silent`` places of tokens, as many as are marked in ``active`` on average, rounded up.
    """

    feature: int
    active: list[FeatureContext]
    silent: list[FeatureContext]
    wrong: list[list[int]]

    @property
    def right(self) -> list[bool]:
        """Of the active and the silent contexts, whether the feature is active."""
        return [True] * len(self.active) + [False] * len(self.silent)


def held_out(
    folder: Path, features: int, wanted: Collection[int], place: np.ndarray, text: CodedText, draws: int, seed: int
) -> Iterator[HeldOut]:
    """The contexts of features that fire at least ``FEWEST`` times.

    Args:
      folder: with the firings on held-out text, of ``firings.record``.
      features: of the dictionary.
      wanted: which of them.
      place: the places that were encoded.
      text: of the store.
      draws: contexts from each tenth of a feature's firings.
      seed: of the contexts without it, and of ``wrong``; each feature has draws of its own.
    """
    known = np.zeros(int(place.max()) + 1 + describe.AFTER, bool)
    known[place] = True
    for block in blocks(folder, features):
        own = [i for i in range(block.size) if block.first + i in wanted and block.counts[i] >= FEWEST]
        if own:
            drawn, _ = describe.group_draws(block, describe.weakest_first(block), draws)
        for i in own:
            rng = np.random.default_rng((seed, block.first + i))
            firings = block.place[drawn[slice(*np.searchsorted(block.feature[drawn], [i, i + 1]))]]
            shown = describe.contexts(block, text, known, i, firings)
            without = _silent(block, text, place, i, rng, len(shown))
            silent = describe.contexts(block, text, known, i, without)
            marks = -(-sum(len(active(context)) for context in shown) // len(shown))
            lengths = [len(context["tokens"]) for context in silent]
            wrong = [sorted(rng.choice(length, min(marks, length), replace=False).tolist()) for length in lengths]
            yield HeldOut(block.first + i, shown, silent, wrong)


def _silent(
    block: Block, text: CodedText, place: np.ndarray, feature: int, rng: np.random.Generator, count: int
) -> np.ndarray:
    """Up to ``count`` of the places ``place`` in whose contexts a feature fires nowhere."""
    tried = rng.choice(place, min(_TRIED * count, len(place)), replace=False)
    around, _ = describe.surroundings(text, tried)
    return tried[~block.at(np.full(around.shape, feature), around).any(axis=1)][:count]
