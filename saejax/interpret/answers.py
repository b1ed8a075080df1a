"""Questions and answers, kept in a file as they arrive, so that no question is paid for twice.

``answers.jsonl`` has a line for each answer: a hash of model and question, the question's text, the answer and its
token counts. A last line that a killed run left incomplete is ignored.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from saejax.errors import UserError
from saejax.interpret.judges import Answer, OnAnswer
from saejax.interpret.questions import Question
from saejax.runner.parts import Progress
from saejax.runner.workspace import Run, fingerprint
from saejax.stages.explain import ExplainConfig

ANSWERS = "answers.jsonl"
_AT_ONCE = 64  # questions handed over together; a run can stop between two such lots
_LETTERS = 3  # characters per token, for estimates before asking
_REPLY = 200  # tokens of a reply, for these estimates


class Judge(Protocol):
    """A language model that answers questions."""

    def ask(self, questions: Sequence[Question], on_answer: OnAnswer) -> None:
        """Call ``on_answer`` with the number of each question and its answer."""
        ...


class Answers:
    """The answers of a model, kept in a folder.

    Args:
      run: the run of the stage.
      folder: folder of the file.
      judge: answers questions that have no answer yet.
    """

    def __init__(self, run: Run, folder: Path, judge: Judge):
        self._run, self._path, self._judge = run, folder / ANSWERS, judge
        self._limit, self._model = run.configs[ExplainConfig].most_tokens, run.configs[ExplainConfig].model
        self._answers: dict[str, Answer] = {}
        for line in self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else ():
            try:
                kept = json.loads(line)
            except json.JSONDecodeError:
                continue
            self._answers[kept["question"]] = Answer(kept["answer"], tuple(kept["tokens"]))

    @property
    def spent(self) -> tuple[int, int]:
        """Tokens of all prompts and of all replies, those of earlier runs included."""
        tokens = [answer.tokens for answer in self._answers.values()]
        return sum(prompt for prompt, _ in tokens), sum(reply for _, reply in tokens)

    def __len__(self) -> int:
        return len(self._answers)

    def all(self, questions: Sequence[Question], label: str) -> list[str | None]:
        """Return the replies to questions, asking those that have none yet.

        Args:
          questions: the questions.
          label: their subject, for log lines.

        Raises:
          UserError: the limit of tokens is reached, or the judge gives no answers; those that arrived are kept.
          Interrupted: asked to stop, likewise.
        """
        keys = [self._key(question) for question in questions]
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in self._answers}
        left, on_progress = list(missing.items()), Progress(self._run, "answers").of_part(label, 0)
        while left:
            on_progress(len(missing) - len(left), len(missing))
            lot = left[: self._affordable([question for _, question in left[:_AT_ONCE]])]
            if not lot:
                raise UserError(
                    f"--explain.most_tokens={self._limit}: {sum(self.spent):,} tokens are spent and {len(left):,} "
                    f"questions of about {sum(_estimate_tokens(question) for _, question in left):,} tokens are left; "
                    "answers so far are kept: raise the limit and run again"
                )
            self._ask(lot)
            left = left[len(lot) :]
        return [self._answers[key].text for key in keys]

    def _affordable(self, questions: Sequence[Question]) -> int:
        """Return how many of the first questions the limit has room for."""
        room = self._limit - sum(self.spent)
        for count, question in enumerate(questions):
            room -= _estimate_tokens(question)
            if room < 0:
                return count
        return len(questions)

    def _ask(self, lot: Sequence[tuple[str, Question]]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        complete = not self._path.exists() or self._path.read_bytes()[-1:] in (b"", b"\n")
        with self._path.open("a", encoding="utf-8") as file:
            file.write("" if complete else "\n")  # end the line that a killed run left incomplete

            def keep(number: int, answer: Answer) -> None:
                key, question = lot[number]
                self._answers[key] = answer
                line = dict(question=key, text=question.text, answer=answer.text, tokens=answer.tokens)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()

            self._judge.ask([question for _, question in lot], keep)

    def _key(self, question: Question) -> str:
        return fingerprint(dict(model=self._model) | dataclasses.asdict(question))


def _estimate_tokens(question: Question) -> int:
    """Return roughly the tokens of a question and its reply."""
    return len(question.task + question.text) // _LETTERS + _REPLY
