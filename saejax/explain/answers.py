"""What was asked and answered: kept in a file as it comes, so that no question is paid for twice.

``answers.jsonl`` has a line for each answer: a hash of the question and the model, the question's text, the answer and
its tokens. A line that a run which was killed left unfinished is not read.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from saejax.errors import UserError
from saejax.explain.endpoint import Answer, Keep
from saejax.explain.questions import EmbeddingRequest, Question
from saejax.runner.parts import Progress
from saejax.runner.workspace import Run, fingerprint
from saejax.stages.explain import ExplainConfig

ANSWERS = "answers.jsonl"
_AT_ONCE = 64  # questions that are handed over together; between two such lots a run can stop
_LETTERS = 3  # characters of a token of a prompt, by which is judged beforehand what a question takes


class Judge(Protocol):
    """What answers questions."""

    def ask(self, questions: Sequence[Any], keep: Keep) -> None:
        """Calls ``keep`` with the number of each question and its answer."""
        ...


class Answers:
    """The answers of a model, kept in a folder.

    Args:
      folder: where they are kept.
      judge: answers what has no answer yet.

    Attributes:
      spent: tokens of all prompts and of all answers, those of earlier runs included.
    """

    def __init__(self, run: Run, folder: Path, judge: Judge):
        self._run, self._path, self._judge = run, folder / ANSWERS, judge
        self._limit, self._model = run.configs[ExplainConfig].most_tokens, run.configs[ExplainConfig].model
        self._known: dict[str, Answer] = {}
        for line in self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else ():
            try:
                kept = json.loads(line)
            except json.JSONDecodeError:
                continue
            self._known[kept["question"]] = Answer(kept["answer"], tuple(kept["tokens"]))

    @property
    def spent(self) -> tuple[int, int]:
        """Tokens of all prompts and of all answers."""
        asked, told = zip(*(answer.tokens for answer in self._known.values()), strict=True) if self._known else ((), ())
        return sum(asked), sum(told)

    def __len__(self) -> int:
        return len(self._known)

    def all(self, questions: Sequence[Question | EmbeddingRequest], label: str) -> list[str | None]:
        """The answers to questions, those that have none yet asked for.

        Args:
          questions: any number.
          label: what they are about, for messages.

        Raises:
          UserError: the limit of tokens is reached, or the judge gives no answers; those that came are kept.
          Interrupted: asked to stop, likewise.
        """
        keys = [self._key(question) for question in questions]
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in self._known}
        left, on_progress = list(missing.items()), Progress(self._run, "answers").of_part(label, 0)
        while left:
            on_progress(len(missing) - len(left), len(missing))
            lot = left[: self._affordable([question for _, question in left[:_AT_ONCE]])]
            if not lot:
                raise UserError(
                    f"--explain.most_tokens={self._limit}: {sum(self.spent):,} tokens are spent and {len(left):,} "
                    f"questions of about {sum(_most(question) for _, question in left):,} tokens are left; what was "
                    "answered is kept: raise the limit and run again"
                )
            self._ask(lot)
            left = left[len(lot) :]
        return [self._known[key].text for key in keys]

    def _affordable(self, questions: Sequence[Question | EmbeddingRequest]) -> int:
        """How many of the first questions the limit has room for, whatever is answered."""
        room = self._limit - sum(self.spent)
        for count, question in enumerate(questions):
            room -= _most(question)
            if room < 0:
                return count
        return len(questions)

    def _ask(self, lot: Sequence[tuple[str, Question | EmbeddingRequest]]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        whole = not self._path.exists() or self._path.read_bytes()[-1:] in (b"", b"\n")
        with self._path.open("a", encoding="utf-8") as file:
            file.write("" if whole else "\n")  # after a line that was left unfinished

            def keep(number: int, answer: Answer) -> None:
                key, question = lot[number]
                self._known[key] = answer
                line = dict(question=key, text=question.text, answer=answer.text, tokens=answer.tokens)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()

            self._judge.ask([question for _, question in lot], keep)

    def _key(self, question: Question | EmbeddingRequest) -> str:
        return fingerprint(dict(model=self._model) | dataclasses.asdict(question))


def _most(question: Question | EmbeddingRequest) -> int:
    """The tokens that a question and its answer take, at most, roughly."""
    return len(question.task + question.text) // _LETTERS + question.most
