"""Labels without a language model: the simple rule (detector) that best predicts where a feature fires.

A detector is a set of codes of one family of ``text``: it predicts firing where the text has one of them. For each
family the set of at most ``MOST`` codes with the largest F1 on the search text is found exactly. F1 = 2 TP / (P + N),
with TP firings predicted, P predictions, N firings. For a given value v of F1, the set that maximises 2 TP - v P has
the codes with the largest positive 2 TP - v P; raising v to the F1 of that set until it no longer changes is
Dinkelbach's method (Management Science 13, 1967), which ends at the maximum. Codes with too few firings are left out.

Detectors are scored on held-out text, beside those of other features and of random directions (``Scored``).
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
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
from saejax.tasks.scoring import bootstrap_mean, wilson_of

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


@dataclasses.dataclass(frozen=True)
class DetectorScore:
    """Scores of a detector."""

    precision: Interval  #: share of its predictions on which the feature fires, with its 95 % Wilson interval
    recall: Interval  #: share of the feature's firings that it predicts, likewise
    f1: Interval  #: their harmonic mean, a function of TP / (TP + FP + FN), whose Wilson interval gives its ends


def _ranges(numbers: Sequence[int]) -> str:
    """Return numbers as ranges: "0, 4 to 7"."""
    rising = sorted(numbers)
    starts = [n for n in rising if n - 1 not in numbers]
    ends = [n for n in rising if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))


class PairCounts:
    """Number of firings of each feature of a block on each code of a family; pairs that occur, sorted.

    Attributes:
      feature: feature of each pair, counted from the block's first.
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
        self.feature, self.code, self.count = feature[at], code[at], np.diff(np.append(at, len(code)))
        self.total = np.add.reduceat(value[order], at, dtype=np.float64) if len(at) else np.zeros(0)

    def of(self, feature: int, codes: Codes) -> int:
        """Return the number of firings of a feature on any of some codes."""
        of_feature = slice(*np.searchsorted(self.feature, [feature, feature + 1]))
        return int(self.count[of_feature][np.isin(self.code[of_feature], codes)].sum())


def search(block: Block, family: str, base: CodeCounts, pairs: PairCounts) -> list[tuple[Detector, float] | None]:
    """Return the best detector of a family for every feature of a block, with its F1; None where there is none.

    Args:
      block: firings on the search text.
      family: one of ``FAMILIES``.
      base: frequency of each code in the search text.
      pairs: counts of the block and the family.
    """
    fires, most = block.counts, _POSITIONS if family == "position" else MOST
    # The best set would otherwise collect codes on which the feature happened to fire once or twice.
    kept = pairs.count >= np.maximum(_SEEN, _SHARE * fires[pairs.feature])
    feature, code, hits = pairs.feature[kept], pairs.code[kept], pairs.count[kept]
    occurrences, best = base[code], np.zeros(block.size)
    chosen = np.zeros(len(feature), bool)
    # The F1 of the best single code, from which Dinkelbach's method may start: no best set is below it.
    np.maximum.at(best, feature, 2 * hits / np.maximum(occurrences + fires[feature], 1))
    starts = np.searchsorted(feature, np.arange(block.size))
    while True:
        surplus = 2 * hits - best[feature] * occurrences
        order = np.lexsort((-surplus, feature))
        rank = np.empty(len(feature), np.int64)
        rank[order] = np.arange(len(feature)) - starts[feature[order]]
        picked = (rank < most) & (surplus > 0)
        hits_of = np.bincount(feature, hits * picked, block.size)
        f1 = 2 * hits_of / np.maximum(np.bincount(feature, occurrences * picked, block.size) + fires, 1)
        # A relative tolerance, so that rounding cannot make the loop go on for ever.
        better = f1 > best * (1 + 1e-12)
        if not len(feature) or not (better.any() or not chosen.any()):
            break
        chosen, best = picked, np.maximum(best, f1)
    detectors: list[tuple[Detector, float] | None] = []
    for number in range(block.size):
        of_feature = slice(*np.searchsorted(feature, [number, number + 1]))
        order = np.argsort(-hits[of_feature], kind="stable")
        codes = tuple(code[of_feature][order][chosen[of_feature][order]].tolist())
        detectors.append((Detector(family, codes), float(best[number])) if codes else None)
    return detectors


def best_detectors(
    block: Block, text: CodedText, bases: Mapping[str, CodeCounts], output: Sequence[Codes]
) -> tuple[list[dict[str, tuple[Detector, float]]], PairCounts]:
    """Return the best detectors of every feature of a block on the search text, and the block's counts of tokens.

    Args:
      block: firings on the search text.
      text: the search text.
      bases: frequency of each code in the search text, by family.
      output: tokens that each feature promotes most; empty: unknown.

    Returns:
      For every feature, family -> (detector, F1 on the search text); and the counts of tokens.
    """
    detectors: list[dict[str, tuple[Detector, float]]] = [{} for _ in range(block.size)]
    tokens = None
    for family in FAMILIES:
        pairs = PairCounts(block, text.code(family, block.place))
        tokens = tokens or pairs
        for by_family, best in zip(detectors, search(block, family, bases[family], pairs), strict=True):
            by_family |= {family: best} if best else {}
        if family == "next" and output:
            for number, codes in enumerate(output):
                # Not searched for: what the decoder promotes is fixed before any firing is seen.
                places = int(bases[family][np.array(codes, np.int64)].sum()) + int(block.counts[number])
                if places and codes:
                    f1 = 2 * pairs.of(number, codes) / places
                    detectors[number] |= {OUTPUT: (Detector(OUTPUT, codes), f1)} if f1 else {}
    assert tokens
    return detectors, tokens


def scores(
    block: Block, text: CodedText, bases: Mapping[str, CodeCounts], detectors: Sequence[Sequence[Detector]]
) -> list[list[DetectorScore]]:
    """Return the scores of detectors on a text.

    Args:
      block: firings on the text.
      text: the text.
      bases: frequency of each code there, by family.
      detectors: detectors of each feature of the block.
    """
    wanted = {detector.looks_at for of_feature in detectors for detector in of_feature}
    pairs = {family: PairCounts(block, text.code(family, block.place)) for family in wanted}
    return [
        [
            _score(
                pairs[detector.looks_at].of(number, detector.codes),
                int(bases[detector.looks_at][np.array(detector.codes, np.int64)].sum()),
                int(block.counts[number]),
            )
            for detector in of_feature
        ]
        for number, of_feature in enumerate(detectors)
    ]


def _score(hits: int, places: int, fires: int) -> DetectorScore:
    union = _share(hits, places + fires - hits)
    # F1 is a rising function of TP / (TP + FP + FN), a plain share: it takes its ends from that share's Wilson
    # interval.
    f1 = Interval(*(2 * share / (1 + share) for share in (union.mean, union.low, union.high)))
    return DetectorScore(_share(hits, places), _share(hits, fires), f1)


def _share(hits: int, of: int) -> Interval:
    return wilson_of(hits / of, of) if of else Interval(0.0, 0.0, 1.0)


Detectors = Sequence[Mapping[str, tuple[Detector, float]]]  # of each feature: family -> detector, F1 on the search text


@dataclasses.dataclass
class Scored:
    """The detectors of all features with their scores on held-out text."""

    text: CodedText  #: text of the store, which describes codes in words
    detectors: Detectors  #: detectors of each feature and their F1 on the search text
    score: list[dict[str, DetectorScore]]  #: scores of each feature by family
    chosen: list[str]  #: family with the largest F1 on the search text; "" without a detector
    rate: np.ndarray  #: firing rate of each feature on held-out text
    shuffled: np.ndarray  #: F1 of the detector of another feature that fires about as often

    @classmethod
    def of(
        cls, folder: Path, detectors: Detectors, text: CodedText, bases: Mapping[str, CodeCounts], rate: np.ndarray
    ) -> Self:
        """Score detectors.

        Args:
          folder: folder with the firings on held-out text.
          detectors: detectors of each feature, with their F1 on the search text.
          text: text of the store.
          bases: frequency of each code in the held-out text.
          rate: firing rate of each feature on the search text, which selects other features.
        """
        # Chosen on the search text: the best of several scores on held-out text would be too high.
        chosen = [
            max(by_family, key=lambda family: by_family[family][1]) if by_family else "" for by_family in detectors
        ]
        # A feature that fires as often: F1 depends on the rate, so a rarer or more frequent one would be too easy to
        # exceed.
        partner_N = partners(rate, [bool(family) for family in chosen])
        score: list[dict[str, DetectorScore]] = []
        shuffled, fires = np.zeros(len(detectors)), np.zeros(len(detectors))
        for block in blocks(folder, len(detectors)):
            numbers = range(block.first, block.first + block.size)
            tried = [[detector for detector, _ in detectors[i].values()] for i in numbers]
            borrowed = [[detectors[j][chosen[j]][0]] if j >= 0 else [] for j in partner_N[numbers]]
            results = scores(block, text, bases, [a + b for a, b in zip(tried, borrowed, strict=True)])
            for i, candidates, result in zip(numbers, tried, results, strict=True):
                score.append(dict(zip(detectors[i], result[: len(candidates)], strict=True)))
                shuffled[i] = result[-1].f1.mean if len(result) > len(candidates) else 0.0
            fires[block.first : block.first + block.size] = block.counts
        return cls(text, detectors, score, chosen, fires / max(1, bases["position"].places), shuffled)

    @property
    def f1(self) -> np.ndarray:
        """F1 of the chosen detector of each feature; 0 where there is none."""
        return np.array(
            [by_family[family].f1.mean if family else 0.0 for by_family, family in zip(self.score, self.chosen)]
        )

    def labels(self, random: "Scored") -> dict[int, Label]:
        """Return the labels by feature: chosen detectors that exceed random directions and another feature's label.

        The lower end of the F1's interval has to be above both.
        """
        bar = np.maximum(bars(self.rate, random.rate, random.f1), self.shuffled)
        return {
            i: Label(self.detectors[i][family][0].says(self.text), FOUND, f1=round(by_family[family].f1.mean, 4))
            for i, (by_family, family) in enumerate(zip(self.score, self.chosen, strict=True))
            # The interval's lower end, since a feature with few held-out firings can reach a high F1 by luck.
            if family and by_family[family].f1.low > bar[i]
        }

    def counts(self, live: np.ndarray, labels: Mapping[int, Label]) -> LabelCounts:
        """Return shares and means over live features, with intervals over these."""
        count, labelled = int(live.sum()), sum(bool(live[i]) for i in labels)
        share = labelled / max(count, 1)
        f1 = bootstrap_mean(self.f1[live], _SEED, _RESAMPLES) if count else None
        return LabelCounts(
            count, labelled, share, f1.mean if f1 else 0.0, wilson_of(share, count) if count else None, f1
        )

    def mean_shuffled(self, live: np.ndarray) -> float:
        """Return the mean F1 of other features' detectors over live features."""
        return float(self.shuffled[live].mean()) if live.any() else 0.0

    def families(self, labels: Mapping[int, Label]) -> dict[str, int]:
        """Return the number of labels by family."""
        return dict(Counter(self.chosen[i] for i in labels).most_common())

    def describe(self, record: FeatureRecord) -> None:
        """Add a feature's detectors to its record, the chosen one first."""
        feature = record["feature"]
        by_family, chosen, score = self.detectors[feature], self.chosen[feature], self.score[feature]
        record["detectors"] = [
            DetectorRecord(
                family=family,
                says=by_family[family][0].says(self.text),
                search_f1=round(by_family[family][1], 4),
                precision=_rounded(score[family].precision),
                recall=_rounded(score[family].recall),
                f1=_rounded(score[family].f1),
            )
            for family in sorted(by_family, key=lambda family: (family != chosen, -by_family[family][1]))
        ]
        record["shuffled_f1"] = round(float(self.shuffled[feature]), 4)


def _rounded(share: Interval) -> MeanInterval:
    return MeanInterval(mean=round(share.mean, 4), low=round(share.low, 4), high=round(share.high, 4))
