"""The held-out contexts that labels are judged on, with a feature and without it, and the scores of replies."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from saejax.interpret import contexts
from saejax.interpret.feature_record import FeatureContext
from saejax.interpret.firings import Block, blocks
from saejax.interpret.questions import GROUP, Question, detect
from saejax.interpret.records import group_draws, weakest_first
from saejax.interpret.results import FeatureScore
from saejax.interpret.text import CodedText
from saejax.tasks.scoring import wilson_of

MIN_FIRINGS = 10  # on held-out text, for a feature to be judged
CHANCE = 0.5
_DRAWS = 1  # contexts from each tenth of a feature's firings: ten, which a judge reads in two questions
_TRIES = 50  # positions tried for each context without the feature


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The held-out contexts of a feature."""

    feature: int  #: its index
    active: list[FeatureContext]  #: contexts in which it fires, the weakest tenth of its firings first
    silent: list[FeatureContext]  #: as many in which it does not fire, or fewer if it fires almost everywhere

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
            drawn, _ = group_draws(block, weakest_first(block), _DRAWS)
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


def detection(held: HeldOut, label: str, seed: int) -> list[tuple[Question, list[bool]]]:
    """Return questions in which of a feature's contexts it fires, and whether it does in each.

    Args:
      held: contexts of the feature.
      label: its label, or another feature's.
      seed: seed of the order of contexts, which is the same for every label.
    """
    shown, fires = [*held.active, *held.silent], held.fires
    # The order does not depend on the label, so a label and its control answer the same questions.
    order = np.random.default_rng((seed, held.feature, 0)).permutation(len(shown))
    groups = [order[start : start + GROUP].tolist() for start in range(0, len(shown), GROUP)]
    return [(detect(label, [shown[i] for i in group]), [fires[i] for i in group]) for group in groups]


def detection_score(correct: Sequence[Sequence[bool]], read: Sequence[Sequence[bool] | None]) -> FeatureScore | None:
    """Return the score of yes and no replies; None if only contexts of one class were scored.

    Args:
      correct: for each question whether the feature fires in each of its contexts.
      read: the parsed replies; None: unparsed.
    """
    pairs = [
        pair for truth, reply in zip(correct, read, strict=True) if reply for pair in zip(truth, reply, strict=True)
    ]
    count = Counter(pairs)  # (fires, called active)
    hit, missed, false, true = (count[pair] for pair in ((True, True), (True, False), (False, True), (False, False)))
    if not (hit + missed and false + true):
        return None
    # The mean of both shares: with few silent contexts, always "yes" would otherwise score high.
    recall, specificity = hit / (hit + missed), true / (false + true)
    f1 = 2 * hit / max(1, 2 * hit + false + missed)
    return FeatureScore((recall + specificity) / 2, hit / max(1, hit + false), recall, f1, len(pairs))


def is_kept(score: FeatureScore | None, control: FeatureScore | None) -> bool:
    """Return whether the lower end of the 95 % Wilson interval of accuracy is above the control's, and above chance."""
    if score is None:
        return False
    # The interval's lower end, because the best of thousands of labels would often exceed a control by luck.
    return wilson_of(score.accuracy, score.contexts).low > max(CHANCE, control.accuracy if control else CHANCE)
