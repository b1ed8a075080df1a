"""The held-out contexts that labels are judged on, with a feature and without it, and the scores of replies."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from saejax.interpret import contexts
from saejax.interpret.feature_record import FeatureContext
from saejax.interpret.firings import Block, blocks
from saejax.interpret.questions import GROUP, Question, detect
from saejax.interpret.records import group_draws
from saejax.interpret.text import CodedText
from saejax.results import Interval
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


def held_out(
    folder: Path, features: int, wanted: Collection[int], place: np.ndarray, text: CodedText, seed: int
) -> Iterator[HeldOut]:
    """Yield the contexts of features.

    Args:
      folder: folder with the firings on held-out text, written by ``firings.record``.
      features: number of features of the dictionary.
      wanted: features that fire at least ``MIN_FIRINGS`` times.
      place: encoded places of the text.
      text: text of the store.
      seed: seed of the silent contexts; each feature has its own generator.
    """
    in_text = np.zeros(int(place.max()) + 1 + contexts.AFTER, bool)
    in_text[place] = True
    for block in blocks(folder, features):
        for i in (i for i in range(block.size) if block.first + i in wanted):
            # A generator for each feature: its contexts do not depend on which other features are judged.
            rng, of_feature = np.random.default_rng((seed, block.first + i)), block.of(i)
            drawn, _ = group_draws(block.value[of_feature], block.place[of_feature], _DRAWS)
            firings = block.place[of_feature][drawn]
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
    shown, fires = [*held.active, *held.silent], [True] * len(held.active) + [False] * len(held.silent)
    # The order does not depend on the label, so a label and its control answer the same questions.
    order = np.random.default_rng((seed, held.feature, 0)).permutation(len(shown))
    groups = [order[start : start + GROUP].tolist() for start in range(0, len(shown), GROUP)]
    return [(detect(label, [shown[i] for i in group]), [fires[i] for i in group]) for group in groups]


def detection_score(correct: Sequence[Sequence[bool]], read: Sequence[Sequence[bool] | None]) -> Interval | None:
    """Return the balanced accuracy of yes and no replies, with its 95 % Wilson interval.

    Args:
      correct: for each question whether the feature fires in each of its contexts.
      read: the parsed replies; None: unparsed.

    Returns:
      None if only contexts of one class were scored.
    """
    pairs = [
        pair for truth, reply in zip(correct, read, strict=True) if reply for pair in zip(truth, reply, strict=True)
    ]
    correct_by_class = [[called == fires for fires, called in pairs if fires == side] for side in (True, False)]
    if not all(correct_by_class):
        return None
    # The mean of both shares, or always "yes" would score high where few contexts are silent. These few weigh half, so
    # the interval is that of twice the harmonic mean of both numbers.
    count = 4 / sum(1 / len(side) for side in correct_by_class)
    return wilson_of(float(np.mean([np.mean(side) for side in correct_by_class])), count)


def is_kept(score: Interval | None, control: float | None) -> bool:
    """Return whether the lower end of a label's accuracy is above the accuracy of the control, and above chance."""
    # The interval's lower end, because the best of thousands of labels would often exceed a control by luck.
    # Without a control nothing shows that this label says more than any.
    return score is not None and control is not None and score.low > max(CHANCE, control)
