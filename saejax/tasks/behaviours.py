"""Behaviours: prompts with a correct and a wrong answer, and the same prompt turned around.

Of every behaviour there are train prompts, which choose features, and test prompts, which judge them. ``recipes`` says
what the behaviours are, ``draw`` makes their prompts.

Each prompt has a *counterpart*: the same text with other content, for which the wrong answer is the better one and the
correct answer the worse one. What does not depend on the content cannot be right about both.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from saejax.errors import UserError
from saejax.files import write_lines

SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt whose last position predicts an answer."""

    behaviour: str  #: its name
    split: str  #: "train" or "test"
    text: str  #: what the model reads
    correct: str  #: the correct answer as it goes on from ``text``, with a leading space where a word follows
    wrong: str  #: a wrong answer, with another first token. It is the counterpart's correct answer.
    #: the text with other content; in SmolLM2's tokens as long as ``text``. "" if a prompt of the user's own has none.
    counterpart: str = ""
    counterpart_correct: str = ""  #: the better answer to ``counterpart``
    #: the content items of the text and of its counterpart; none of prompts of the user's own.
    items: tuple[str, ...] = ()
    #: the words around the content; prompts of one template are not independent. "" if it is not known.
    template: str = ""
    #: further labels of a prompt of the user's own, name and class, for probes.
    labels: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class PromptScore:
    """The model's scores on a prompt; the baseline adds them to the prompt's line."""

    logit_diff: float  #: logit of the correct answer's first token minus the wrong one's, at the last position
    top1: bool  #: whether the correct one is the highest of all
    counterpart_logit_diff: float | None  #: of the counterpart, its own correct answer first; None if there is none
    #: correct_log_likelihood and wrong_log_likelihood: of the whole answers after the text, nats; None in files of
    #: before.
    correct_log_likelihood: float | None = None
    wrong_log_likelihood: float | None = None


SCORES = tuple(field.name for field in dataclasses.fields(PromptScore))


def write_prompts(path: Path, prompts: Sequence[Prompt], scores: Sequence[PromptScore] | None = None) -> None:
    """Write prompts as JSON lines, each with its scores if there are any."""
    added = [dataclasses.asdict(score) for score in scores] if scores is not None else [{}] * len(prompts)
    write_lines(path, (dataclasses.asdict(prompt) | score for prompt, score in zip(prompts, added, strict=True)))


def read_prompts(path: Path) -> list[Prompt]:
    """Read what ``write_prompts`` wrote, without the scores.

    Raises:
      UserError: the file is missing, or a line is not a prompt; the message names the line.
    """

    def prompt(record: dict[str, Any]) -> Prompt:
        fields = {key: value for key, value in record.items() if key not in SCORES}
        labels = tuple((name, value) for name, value in fields.get("labels", ()))
        return Prompt(**fields | dict(items=tuple(fields["items"]), labels=labels))

    return _read_lines(path, prompt, "a prompt")


def read_logit_diffs(path: Path) -> list[float]:
    """Return the clean logit difference of every prompt that ``read_prompts`` reads, in the same order.

    Raises:
      UserError: as ``read_prompts``, or a prompt has no score.
    """
    return _read_lines(path, lambda record: float(record["logit_diff"]), "a prompt with its scores")


def _read_lines(path: Path, read: Callable[[dict[str, Any]], Any], what: str) -> list[Any]:
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # other line separators are part of a text
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run the stage baseline first") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            records.append(read(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(
                f"line {number} of {path} is not {what}: the file is damaged; delete its folder and run the stage "
                "baseline again"
            ) from None
    return records
