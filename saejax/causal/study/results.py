"""Results of the stage ``study``."""

import dataclasses
from collections.abc import Mapping

from saejax.causal.results import ControlMatch, RankedFeature
from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class ItemScore:
    """A test item under a condition; a line of `items.jsonl`.

    Attributes:
      condition: clean; top/zero and top/random, the top features set to zero, or each replaced, where it fires, by one
        of up to 256 activations where it fires on train items (a feature that never does stays as it is);
        control-<n>/zero and /random, the same with matched random features.
      id: of the item.
      log_likelihood: of the reference solution, nats.
      tokens: of the reference solution.
      answer: the model's, where answers were judged.
      correct: whether it is right, by the strict or the raw rule, where answers were judged.
    """

    condition: str
    id: str
    log_likelihood: float
    tokens: int
    answer: str | None = None
    correct: bool | None = None


@dataclasses.dataclass(frozen=True)
class ChosenFeatures:
    """What is replaced, and with what: `features.json`, kept for a run that goes on.

    Attributes:
      top: the top features.
      controls: of each draw its features.
      match: how well they match.
      pools: feature -> up to 256 activations where it fires on train items.
    """

    top: tuple[RankedFeature, ...]
    controls: tuple[tuple[int, ...], ...]
    match: ControlMatch
    pools: Mapping[int, tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class StudyEffect:
    """What replacing the top features does to a score.

    Attributes:
      after: the score.
      drop: before - after.
      controls: mean drop of each draw of matched random features.
      control_drop: mean of all draws.
      percentile: share of the draws with a smaller drop.
      difference: the drop beyond the controls' mean, paired by item.
    """

    after: Interval
    drop: Interval
    controls: tuple[float, ...]
    control_drop: float
    percentile: float
    difference: Interval


@dataclasses.dataclass(frozen=True)
class StudyEffects:
    """A score on the test items.

    Attributes:
      before: any edit.
      zero: with features set to zero; None if it was not measured.
      random: with features replaced at random; None if it was not measured.
    """

    before: Interval
    zero: StudyEffect | None
    random: StudyEffect | None

    @property
    def replaced(self) -> dict[str, StudyEffect | None]:
        """By replacement."""
        return dict(zero=self.zero, random=self.random)


@dataclasses.dataclass(frozen=True)
class StudyItems:
    """Items of the benchmark.

    Attributes:
      train: that choose features.
      test: that judge them.
    """

    train: int
    test: int


@dataclasses.dataclass(frozen=True)
class StudyJudgement:
    """What the scores say.

    Attributes:
      at_chance: whether accuracy's interval before any edit holds that of guessing (of generated answers: whether
        nothing is right). Then only log-likelihoods are compared, unless `study.even_at_chance` is set. None without
        accuracy.
      accuracy: None if it was not measured.
      log_likelihood_per_token: of the reference, nats.
      verdicts: by replacement; None where there is none.
      reason: in words.
    """

    at_chance: bool | None
    accuracy: StudyEffects | None
    log_likelihood_per_token: StudyEffects
    verdicts: Mapping[str, bool | None]
    reason: str


@dataclasses.dataclass(frozen=True)
class StudyResults(StudyJudgement):
    """What replacing a dictionary's top features does to a benchmark's score.

    Attributes:
      dictionary: its name.
      site: that it writes to, or reads.
      rule: of the verdicts, in words.
      score: how items are scored: generate, choice or likelihood.
      items: how many.
      chance: accuracy of guessing; 0 of generated answers.
      top, controls, match: as in `features.json`.
      origin: of the items.
    """

    dictionary: str
    site: str
    rule: str
    score: str
    items: StudyItems
    chance: float
    top: tuple[RankedFeature, ...]
    controls: tuple[tuple[int, ...], ...]
    match: ControlMatch
    origin: str
