"""Labels without a language model: the simple rule (detector) that best predicts where a feature fires.

A detector is a set of codes of one family of ``text``: it predicts firing where the text has one of them. For each
family the set of at most ``MOST`` codes with the largest F1 on the search text is found exactly. F1 = 2 TP / (P + N),
with TP firings predicted, P predictions, N firings. For a given value v of F1, the set that maximises 2 TP - v P has
the codes with the largest positive 2 TP - v P; raising v to the F1 of that set until it no longer changes is
Dinkelbach's method (Management Science 13, 1967), which ends at the maximum. Codes with too few firings are left out.

Detectors are scored on held-out text, beside the detectors of other features and of random directions (``Scored``).
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from saejax.dictionaries.labels import FOUND, Label
from saejax.interpret.feature_record import DetectorRecord, FeatureRecord, MeanInterval
from saejax.interpret.firings import Block, blocks
from saejax.interpret.labels import bars, partners
from saejax.interpret.results import LabelCounts
from saejax.interpret.text import FAMILIES, CodeCounts, CodedText
from saejax.results import Interval
from saejax.statistics.intervals import bootstrap_mean, wilson_of

MOST = 8  # codes of a detector
_POSITIONS = 512  # positions of a detector: a range counts as one description
_SEEN = 3  # minimum firings on a code,
_SHARE = 0.01  # and minimum share of all firings of the feature
OUTPUT = "output"  # family of detectors of the next token that is not searched: the tokens that a feature promotes
_RESAMPLES, _SEED = 2000, 789
_BITS = 54  # of a code in a sort key, below the bits of the feature's index in its block
Codes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Detector:
    """A rule that predicts where a feature fires."""

    family: str  #: one of ``FAMILIES``, or ``OUTPUT``
    codes: Codes  #: codes on which it is predicted to fire, most frequent first
    search_f1: float  #: F1 on the search text

    @property
    def looks_at(self) -> str:
        """The family whose codes it reads."""
        return "next" if self.family == OUTPUT else self.family

    def says(self, text: CodedText) -> str:
        """Return the detector in words."""
        if self.family == "position":
            return f"position {_ranges(self.codes)}"
        listed = ", ".join(text.says(self.looks_at, code) for code in self.codes)
        front = {"previous": "after ", "next": "before ", OUTPUT: "says ", "pair": "ends ", "triple": "ends "}
        return front.get(self.family, "") + listed


def _ranges(numbers: Sequence[int]) -> str:
    """Return numbers as ranges: "0, 4 to 7"."""
    rising = sorted(numbers)
    starts = [n for n in rising if n - 1 not in numbers]
    ends = [n for n in rising if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))


class PairCounts:
    """Number of firings of each feature of a block on each code of a family; pairs that occur, sorted.

    Attributes:
      code: code of each pair.
      count: number of firings.
      total: summed activation.
    """

    def __init__(self, block: Block, code: np.ndarray):
        kept = code >= 0
        feature, code, value = block.feature[kept], code[kept], block.value[kept]
        short = code.max(initial=0) < 2**_BITS  # one key sorts five times as fast as two
        order = np.argsort(feature << _BITS | code) if short else np.lexsort((code, feature))
        feature, code = feature[order], code[order]
        new = np.ones(len(code), bool)
        new[1:] = (feature[1:] != feature[:-1]) | (code[1:] != code[:-1])
        at = np.flatnonzero(new)
        self.code, self.count = code[at], np.diff(np.append(at, len(code)))
        self.total = np.add.reduceat(value[order], at, dtype=np.float64) if len(at) else np.zeros(0)
        self._starts = np.searchsorted(feature[at], np.arange(block.size + 1))

    def of(self, feature: int) -> slice:
        """Return the slice of a feature's pairs; the feature is counted from the block's first."""
        return slice(int(self._starts[feature]), int(self._starts[feature + 1]))

    def hits(self, feature: int, codes: Codes) -> int:
        """Return the number of firings of a feature on any of some codes."""
        return int(self.count[self.of(feature)][np.isin(self.code[self.of(feature)], codes)].sum())


def search(block: Block, family: str, base: CodeCounts, pairs: PairCounts) -> list[Detector | None]:
    """Return the best detector of a family for every feature of a block; None where there is none.

    Args:
      block: firings on the search text.
      family: one of ``FAMILIES``.
      base: frequency of each code in the search text.
      pairs: counts of the block and the family.
    """
    most, occurrences = _POSITIONS if family == "position" else MOST, base[pairs.code]
    detectors: list[Detector | None] = []
    for feature, fires in enumerate(block.counts.tolist()):
        of_feature = pairs.of(feature)
        hits_C = pairs.count[of_feature]
        # The best set would otherwise collect codes on which the feature happened to fire once or twice.
        kept = np.flatnonzero(hits_C >= max(_SEEN, _SHARE * fires))
        chosen, f1 = _best_set(hits_C[kept], occurrences[of_feature][kept], fires, most)
        codes = tuple(pairs.code[of_feature][kept[chosen]].tolist())
        detectors.append(Detector(family, codes, f1) if codes else None)
    return detectors


def _best_set(hits_C: np.ndarray, occurrences_C: np.ndarray, fires: int, most: int) -> tuple[np.ndarray, float]:
    """Return the set of at most ``most`` codes with the largest F1, as indices by falling hits, and its F1."""
    # Dinkelbach's method may start from the F1 of the best single code: no best set is below it.
    best = float((2 * hits_C / np.maximum(occurrences_C + fires, 1)).max(initial=0.0))
    while True:
        surplus_C = 2 * hits_C - best * occurrences_C
        chosen = np.argsort(-surplus_C, kind="stable")[:most]
        chosen = np.sort(chosen[surplus_C[chosen] > 0])
        f1 = float(2 * hits_C[chosen].sum() / max(occurrences_C[chosen].sum() + fires, 1))
        # A relative tolerance, so that rounding cannot make the loop go on for ever.
        if f1 <= best * (1 + 1e-12):
            return chosen[np.argsort(-hits_C[chosen], kind="stable")], max(best, f1)
        best = f1


def best_detectors(
    block: Block, text: CodedText, bases: Mapping[str, CodeCounts], output: Sequence[Codes]
) -> list[Detector | None]:
    """Return the best detector of every feature of a block on the search text.

    Args:
      block: firings on the search text.
      text: the search text.
      bases: frequency of each code in the search text, by family.
      output: tokens that each feature promotes most; empty: unknown.
    """
    candidates: list[list[Detector | None]] = []
    for family in FAMILIES:
        pairs = PairCounts(block, text.code(family, block.place))
        candidates.append(search(block, family, bases[family], pairs))
        if family == "next":
            promoted = [_promoted(block, number, bases[family], pairs, ids) for number, ids in enumerate(output)]
            candidates.append(promoted or [None] * block.size)
    # Of equally good detectors the first family's is kept.
    return [
        max(filter(None, detectors), key=lambda d: d.search_f1, default=None)
        for detectors in zip(*candidates, strict=True)
    ]


def _promoted(block: Block, number: int, base: CodeCounts, pairs: PairCounts, codes: Codes) -> Detector | None:
    """Return the detector of the tokens that a block's feature promotes; None where it is never right."""
    # Not searched for: what the decoder promotes is fixed before any firing is seen.
    places = int(base[np.array(codes, np.int64)].sum()) + int(block.counts[number])
    hits = pairs.hits(number, codes)
    return Detector(OUTPUT, codes, 2 * hits / places) if hits else None


def make_scorer(block: Block, text: CodedText, bases: Mapping[str, CodeCounts]) -> Callable[[int, Detector], Interval]:
    """Return a function that gives a detector's F1 on a text, as a detector of a feature of a block.

    F1 is a rising function of the share TP / (TP + FP + FN), and takes its 95 % interval from that share's, Wilson's.

    Args:
      block: firings on the text.
      text: the text.
      bases: frequency of each code there, by family.
    """
    fires = block.counts
    pairs = functools.cache(lambda family: PairCounts(block, text.code(family, block.place)))

    def score(feature: int, detector: Detector) -> Interval:
        hits = pairs(detector.looks_at).hits(feature, detector.codes)
        places = int(bases[detector.looks_at][np.array(detector.codes, np.int64)].sum())
        union = places + int(fires[feature]) - hits
        share = wilson_of(hits / union, union) if union else Interval(0.0, 0.0, 1.0)
        return Interval(*(2 * end / (1 + end) for end in (share.mean, share.low, share.high)))

    return score


@dataclasses.dataclass
class Scored:
    """The detectors of all features with their scores on held-out text."""

    text: CodedText  #: text of the store, which describes codes in words
    detectors: Sequence[Detector | None]  #: detector of each feature
    score: list[Interval | None]  #: F1 of each feature's detector
    rate: np.ndarray  #: firing rate of each feature on held-out text
    shuffled: np.ndarray  #: F1 of the detector of another feature that fires about as often

    @classmethod
    def of(
        cls,
        folder: Path,
        detectors: Sequence[Detector | None],
        text: CodedText,
        bases: Mapping[str, CodeCounts],
        rate: np.ndarray,
    ) -> Self:
        """Score detectors.

        Args:
          folder: folder with the firings on held-out text.
          detectors: detector of each feature, chosen on the search text: the best of several scores on held-out text
            would be too high.
          text: text of the store.
          bases: frequency of each code in the held-out text.
          rate: firing rate of each feature on the search text, which selects other features.
        """
        # A feature that fires as often: F1 depends on the rate, so a rarer or more frequent one would be too easy to
        # exceed.
        partner_F = partners(rate, [bool(detector) for detector in detectors])
        scores: list[Interval | None] = []
        shuffled, fires = np.zeros(len(detectors)), np.zeros(len(detectors))
        for block in blocks(folder, len(detectors)):
            score = make_scorer(block, text, bases)
            for number in range(block.size):
                feature = block.first + number
                detector, partner = detectors[feature], partner_F[feature]
                borrowed = detectors[partner] if partner >= 0 else None
                scores.append(score(number, detector) if detector else None)
                shuffled[feature] = score(number, borrowed).mean if borrowed else 0.0
            fires[block.first : block.first + block.size] = block.counts
        return cls(text, detectors, scores, fires / max(1, bases["position"].places), shuffled)

    @property
    def f1(self) -> np.ndarray:
        """F1 of the detector of each feature; 0 where there is none."""
        return np.array([score.mean if score else 0.0 for score in self.score])

    def labels(self, random: "Scored") -> dict[int, Label]:
        """Return the labels by feature: detectors that exceed random directions and another feature's label.

        The lower end of the F1's interval has to be above both.
        """
        bar = np.maximum(bars(self.rate, random.rate, random.f1), self.shuffled)
        return {
            i: Label(detector.says(self.text), FOUND, f1=round(score.mean, 4))
            for i, (detector, score) in enumerate(zip(self.detectors, self.score, strict=True))
            # The interval's lower end, since a feature with few held-out firings can reach a high F1 by luck.
            if detector and score and score.low > bar[i]
        }

    def counts(self, live: np.ndarray, labels: Collection[int]) -> LabelCounts:
        """Return shares and means over live features, with intervals over these."""
        count, labelled = int(live.sum()), sum(bool(live[i]) for i in labels)
        if not count:
            return LabelCounts(0, labelled, None, None, None)
        f1, shuffled = bootstrap_mean(self.f1[live], _SEED, _RESAMPLES), float(self.shuffled[live].mean())
        return LabelCounts(count, labelled, wilson_of(labelled / count, count), f1, shuffled)

    def describe(self, record: FeatureRecord) -> None:
        """Add a feature's detector and its scores to its record."""
        detector, score = self.detectors[record["feature"]], self.score[record["feature"]]
        if detector and score:
            f1 = MeanInterval(mean=round(score.mean, 4), low=round(score.low, 4), high=round(score.high, 4))
            says, search_f1 = detector.says(self.text), round(detector.search_f1, 4)
            record["detector"] = DetectorRecord(family=detector.family, says=says, search_f1=search_f1, f1=f1)
        record["shuffled_f1"] = round(float(self.shuffled[record["feature"]]), 4)
