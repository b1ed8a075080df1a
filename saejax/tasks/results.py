"""Results of the stages ``baseline`` and ``benchmark``."""

import dataclasses
from collections.abc import Mapping

from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class BaselineScores:
    """The model's scores on a behaviour's prompts of one split."""

    n: int  #: prompts
    accuracy: Interval  #: share of the prompts whose correct answer has a higher logit than the wrong one
    top1: Interval  #: share whose correct answer has the highest logit of all tokens
    logit_diff: Interval  #: mean logit of the correct answer minus the wrong one's
    separation: Interval  #: its mean over its standard deviation, cut at 1e6
    #: share of the counterparts that prefer their own answer; None where no prompt has one
    counterpart_accuracy: Interval | None
    answer_accuracy: Interval  #: share whose whole correct answer is likelier than the whole wrong one
    log_likelihood: Interval  #: mean log-likelihood of the whole correct answer, nats


@dataclasses.dataclass(frozen=True)
class PromptExample:
    """A prompt."""

    text: str  #: what the model reads
    correct: str  #: the answer, as it goes on from the text
    wrong: str  #: likewise
    logit_diff: float  #: logit of the correct minus that of the wrong answer


@dataclasses.dataclass(frozen=True)
class BaselineBehaviour:
    """The model's scores on a behaviour, by split."""

    train: BaselineScores  #: on the prompts that choose features
    test: BaselineScores  #: on those that judge them
    flags: tuple[str, ...]  #: what is weak, in words
    examples: tuple[PromptExample, ...]  #: the first test prompts
    p_value: float  #: of the exact binomial test that the model is right on more than half of the train prompts
    left_out: str | None = None  #: why the causal tests leave it out; None: they do not
    #: drafts that this model's tokenizer cannot be asked and in whose place others were drawn, by why; None: there were
    #: none
    replaced: Mapping[str, int] | None = None

    @property
    def splits(self) -> dict[str, BaselineScores]:
        """The scores by the name of the split."""
        return dict(test=self.test, train=self.train)


@dataclasses.dataclass(frozen=True)
class BaselineResults:
    """Baseline scores of the unedited model."""

    behaviours: Mapping[str, BaselineBehaviour]  #: by name
    #: behaviours that the causal tests leave out, and why; one with too few prompts for this model's tokenizer is not
    #: measured at all. None: none is left out
    left_out: Mapping[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class ChoiceScores:
    """Scores on one of logic's tasks."""

    n: int  #: items
    raw: Interval  #: accuracy where the likeliest choice is the answer
    normalised: Interval  #: where the likeliest per character is


@dataclasses.dataclass(frozen=True)
class UnparsedExample:
    """An answer in which no final answer was found."""

    id: str  #: of the item
    output: str  #: the last 300 characters of what the model wrote


@dataclasses.dataclass(frozen=True)
class BenchmarkResults:
    """The model on a benchmark."""

    score: str  #: how items were scored: generate, choice or likelihood
    n: int  #: items
    origin: str  #: where they came from
    #: share of right answers by rule: "strict" and "flexible" of generated ones, "raw" and "normalised" of choices;
    #: not of likelihoods
    accuracy: Mapping[str, Interval] | None = None
    chance: float | None = None  #: accuracy of guessing; of choices
    tasks: Mapping[str, ChoiceScores] | None = None  #: scores on each of logic's tasks; of choices
    unparsed: Mapping[str, int] | None = None  #: answers without a final answer, by rule; of generated ones
    unparsed_examples: tuple[UnparsedExample, ...] | None = None  #: the first of them by the strict rule
    cut: int | None = None  #: answers cut at the token limit; of generated ones
    log_likelihood_per_token: Interval | None = None  #: of the reference solution, nats; of likelihoods
    #: share of its tokens that were the likeliest where they stand; of likelihoods
    token_accuracy: Interval | None = None
