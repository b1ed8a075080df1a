"""Results of the stages ``baseline`` and ``benchmark``."""

import dataclasses
from collections.abc import Mapping

from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class BaselineScores:
    """How well the model has a behaviour, on the prompts of a split.

    Attributes:
      n: prompts.
      accuracy: share of the prompts whose correct answer has a higher logit than the wrong one.
      top1: share whose correct answer has the highest logit of all tokens.
      logit_diff: mean logit of the correct answer minus the wrong one's.
      separation: its mean over its standard deviation, cut at 1e6.
      counterpart_accuracy: share of the counterparts that prefer their own answer; None where no prompt has one.
    """

    n: int
    accuracy: Interval
    top1: Interval
    logit_diff: Interval
    separation: Interval
    counterpart_accuracy: Interval | None


@dataclasses.dataclass(frozen=True)
class PromptExample:
    """A prompt.

    Attributes:
      text: what the model reads.
      correct: the answer, as it goes on from the text.
      wrong: likewise.
      logit_diff: logit of the correct minus that of the wrong answer.
    """

    text: str
    correct: str
    wrong: str
    logit_diff: float


@dataclasses.dataclass(frozen=True)
class BaselineBehaviour:
    """How well the model has a behaviour.

    Attributes:
      train: on the prompts that choose features.
      test: on those that judge them.
      flags: what is weak, in words.
      examples: the first test prompts.
    """

    train: BaselineScores
    test: BaselineScores
    flags: tuple[str, ...]
    examples: tuple[PromptExample, ...]

    @property
    def splits(self) -> dict[str, BaselineScores]:
        """By name."""
        return dict(test=self.test, train=self.train)


@dataclasses.dataclass(frozen=True)
class BaselineResults:
    """What the model can do before anything is explained.

    Attributes:
      behaviours: by name.
    """

    behaviours: Mapping[str, BaselineBehaviour]


@dataclasses.dataclass(frozen=True)
class ChoiceScores:
    """Scores on one of logic's tasks.

    Attributes:
      n: items.
      raw: accuracy where the likeliest choice is the answer.
      normalised: where the likeliest per character is.
    """

    n: int
    raw: Interval
    normalised: Interval


@dataclasses.dataclass(frozen=True)
class UnparsedExample:
    """An answer in which no final answer was found.

    Attributes:
      id: of the item.
      output: the last 300 characters of what the model wrote.
    """

    id: str
    output: str


@dataclasses.dataclass(frozen=True)
class BenchmarkResults:
    """The model on a benchmark.

    Attributes:
      score: how items were scored: generate, choice or likelihood.
      n: items.
      origin: where they came from.
      accuracy: share of right answers by rule: "strict" and "flexible" of generated ones, "raw" and "normalised" of
        choices; not of likelihoods.
      chance: accuracy of guessing; of choices.
      tasks: scores on each of logic's tasks; of choices.
      unparsed: answers without a final answer, by rule; of generated ones.
      unparsed_examples: the first of them by the strict rule.
      cut: answers cut at the token limit; of generated ones.
      log_likelihood_per_token: of the reference solution, nats; of likelihoods.
      token_accuracy: share of its tokens that were the likeliest where they stand; of likelihoods.
    """

    score: str
    n: int
    origin: str
    accuracy: Mapping[str, Interval] | None = None
    chance: float | None = None
    tasks: Mapping[str, ChoiceScores] | None = None
    unparsed: Mapping[str, int] | None = None
    unparsed_examples: tuple[UnparsedExample, ...] | None = None
    cut: int | None = None
    log_likelihood_per_token: Interval | None = None
    token_accuracy: Interval | None = None
