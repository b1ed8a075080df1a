"""Scored items of a benchmark, a class for each way of scoring; each is a line of ``items.jsonl``."""

import dataclasses
from collections.abc import Sequence

from saejax.tasks.answers import Verdict


@dataclasses.dataclass(frozen=True)
class ScoredItem:
    """The fields that every way of scoring gives."""

    id: str  #: of the item
    task: str  #: one of logic's tasks; "" elsewhere
    question: str  #: the question alone
    prompt: str  #: the text that the model was given
    reference: str  #: the right answer

    @property
    def judged(self) -> tuple[str | None, bool | None]:
        """Return the answer and whether it is right, by the flexible or the raw rule; None where none is asked for."""
        return None, None


@dataclasses.dataclass(frozen=True)
class GeneratedItem(ScoredItem):
    """A generated answer."""

    output: str  #: what the model wrote
    finished: str  #: why it ended: "eos", "stop" or "length"
    #: strict and flexible: what the rules say.
    strict: Verdict
    flexible: Verdict

    @property
    def judged(self) -> tuple[str | None, bool | None]:
        """Return all that the model wrote, and whether the flexible rule finds the right answer in it."""
        return self.output, self.flexible.correct


@dataclasses.dataclass(frozen=True)
class ChosenItem(ScoredItem):
    """An answer of several."""

    choices: Sequence[str]  #: the answers
    log_likelihoods: Sequence[float]  #: of each after the prompt, nats
    #: raw and normalised: of the likeliest one, and of the likeliest per character.
    raw: Verdict
    normalised: Verdict

    @property
    def judged(self) -> tuple[str | None, bool | None]:
        """The likeliest choice, and whether it is right."""
        return self.raw.answer, self.raw.correct


@dataclasses.dataclass(frozen=True)
class ReferenceItem(ScoredItem):
    """The likelihood of the reference solution after the prompt."""

    solution: str  #: its text
    tokens: int  #: how many it has
    #: log_likelihood and log_likelihood_per_token: nats.
    log_likelihood: float
    log_likelihood_per_token: float
    token_accuracy: float  #: share of its tokens that were the likeliest where they stand


WAYS: dict[str, type[ScoredItem]] = dict(generate=GeneratedItem, choice=ChosenItem, likelihood=ReferenceItem)
