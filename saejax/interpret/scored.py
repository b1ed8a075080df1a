"""Detectors scored on held-out text, compared with those of other features and of random directions."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from saejax.dictionaries.labels import FOUND, Label
from saejax.interpret.detectors import Detector, DetectorScore, scores
from saejax.interpret.feature_record import DetectorRecord, FeatureRecord, MeanInterval
from saejax.interpret.firings import blocks
from saejax.interpret.labels import bars, partners
from saejax.interpret.results import LabelCounts
from saejax.interpret.text import CodeCounts, CodedText
from saejax.results import Interval
from saejax.tasks.scoring import bootstrap_mean, wilson_of

_RESAMPLES, _SEED = 2000, 789

Detectors = Sequence[Mapping[str, tuple[Detector, float]]]  # of each feature: family -> detector, F1 on the search text


@dataclasses.dataclass
class Scored:
    """The detectors of all features with their scores on held-out text.

    Attributes:
      text: text of the store, which describes codes in words.
      detectors: detectors of each feature and their F1 on the search text.
      score: scores of each feature by family.
      chosen: family with the largest F1 on the search text; "" without a detector.
      rate: firing rate of each feature on held-out text.
      shuffled: F1 of the detector of another feature that fires about as often.
    """

    text: CodedText
    detectors: Detectors
    score: list[dict[str, DetectorScore]]
    chosen: list[str]
    rate: np.ndarray
    shuffled: np.ndarray

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
        other = partners(rate, [bool(family) for family in chosen])
        score: list[dict[str, DetectorScore]] = []
        shuffled, fires = np.zeros(len(detectors)), np.zeros(len(detectors))
        for block in blocks(folder, len(detectors)):
            numbers = range(block.first, block.first + block.size)
            tried = [[detector for detector, _ in detectors[i].values()] for i in numbers]
            others = [[detectors[other[i]][chosen[other[i]]][0]] if other[i] >= 0 else [] for i in numbers]
            results = scores(block, text, bases, [a + b for a, b in zip(tried, others, strict=True)])
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
