"""Results of the stages ``baseline`` and ``benchmark``."""

import dataclasses
from collections.abc import Mapping

from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class BaselineScores:
    """The model's scores on a behaviour's prompts of one split."""

    n: int  #: number of prompts
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

    text: str  #: the text that the model reads
    correct: str  #: the answer, as it goes on from the text
    wrong: str  #: the wrong answer, as it goes on from the text
    logit_diff: float  #: logit of the correct answer minus logit of the wrong answer


@dataclasses.dataclass(frozen=True)
class BaselineBehaviour:
    """The model's scores on a behaviour, by split."""

    train: BaselineScores  #: scores on the train prompts, which select features
    test: BaselineScores  #: scores on the test prompts, on which features are tested
    flags: tuple[str, ...]  #: weak points, in words
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

    behaviours: Mapping[str, BaselineBehaviour]  #: scores by behaviour
    #: behaviours that the causal tests leave out, and why; one with too few prompts for this model's tokenizer is not
    #: measured at all. None: none is left out
    left_out: Mapping[str, str] | None = None

    @property
    def weak(self) -> dict[str, str]:
        """The weak points, in words, of each behaviour that has some: tests of it prove little."""
        return {name: "; ".join(scores.flags) for name, scores in self.behaviours.items() if scores.flags}


@dataclasses.dataclass(frozen=True)
class ChoiceScores:
    """Scores on one of logic's tasks."""

    n: int  #: number of items
    raw: Interval  #: accuracy of the most probable choice
    normalised: Interval  #: accuracy of the choice that is most probable per character


@dataclasses.dataclass(frozen=True)
class UnparsedExample:
    """An answer in which no final answer was found."""

    id: str  #: id of the item
    output: str  #: the last 300 characters of what the model wrote


@dataclasses.dataclass(frozen=True)
class BenchmarkResults:
    """The model on a benchmark."""

    score: str  #: how items were scored: generate, choice or likelihood
    n: int  #: number of items
    origin: str  #: source of the items
    #: share of right answers by rule: "strict" and "flexible" of generated ones, "raw" and "normalised" of choices;
    #: not of likelihoods
    accuracy: Mapping[str, Interval] | None = None
    chance: float | None = None  #: accuracy of guessing; only for choices
    tasks: Mapping[str, ChoiceScores] | None = None  #: scores on each of logic's tasks; only for choices
    unparsed: Mapping[str, int] | None = None  #: number of generated answers without a final answer, by rule
    unparsed_examples: tuple[UnparsedExample, ...] | None = None  #: the first of them by the strict rule
    cut: int | None = None  #: number of generated answers that were cut at the token limit
    #: mean log-likelihood of the reference solution, nats per token; only for likelihoods
    log_likelihood_per_token: Interval | None = None
    #: share of its tokens that were the likeliest where they stand; of likelihoods
    token_accuracy: Interval | None = None
