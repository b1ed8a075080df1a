"""Scored items of a benchmark, a class for each way of scoring; each is a line of ``items.jsonl``."""

import dataclasses
from collections.abc import Sequence

from saejax.tasks.answers import Verdict


@dataclasses.dataclass(frozen=True)
class ScoredItem:
    """The fields that every way of scoring gives.

    Attributes:
      id: of the item.
      task: one of logic's tasks; "" elsewhere.
      prompt: the text that the model was given.
      reference: the right answer.
    """

    id: str
    task: str
    prompt: str
    reference: str

    @property
    def judged(self) -> tuple[str | None, bool | None]:
        """Return the answer and whether it is right, by the flexible or the raw rule; None where none is asked for."""
        return None, None


@dataclasses.dataclass(frozen=True)
class GeneratedItem(ScoredItem):
    """A generated answer.

    Attributes:
      output: what the model wrote.
      finished: why it ended: "eos", "stop" or "length".
      strict, flexible: what the rules say.
    """

    output: str
    finished: str
    strict: Verdict
    flexible: Verdict

    @property
    def judged(self) -> tuple[str | None, bool | None]:
        """Return all that the model wrote, and whether the flexible rule finds the right answer in it."""
        return self.output, self.flexible.correct


@dataclasses.dataclass(frozen=True)
class ChosenItem(ScoredItem):
    """An answer of several.

    Attributes:
      choices: the answers.
      log_likelihoods: of each after the prompt, nats.
      raw, normalised: of the likeliest one, and of the likeliest per character.
    """

    choices: Sequence[str]
    log_likelihoods: Sequence[float]
    raw: Verdict
    normalised: Verdict

    @property
    def judged(self) -> tuple[str | None, bool | None]:
        """The likeliest choice, and whether it is right."""
        return self.raw.answer, self.raw.correct


@dataclasses.dataclass(frozen=True)
class ReferenceItem(ScoredItem):
    """The likelihood of the reference solution after the prompt.

    Attributes:
      solution: its text.
      tokens: how many it has.
      log_likelihood, log_likelihood_per_token: nats.
      token_accuracy: share of its tokens that were the likeliest where they stand.
    """

    solution: str
    tokens: int
    log_likelihood: float
    log_likelihood_per_token: float
    token_accuracy: float


WAYS: dict[str, type[ScoredItem]] = dict(generate=GeneratedItem, choice=ChosenItem, likelihood=ReferenceItem)
