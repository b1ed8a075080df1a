"""Prompts of benchmark questions: worked examples first, plain or in the tokenizer's chat template.

The examples, in ``data/worked_examples.json``, have the form of the benchmark's items (of gsm8k, every calculation is
repeated between << and >>). All were written for this project; none is taken from a benchmark. Tests work the answers
out again.
"""

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any

from saejax.errors import UserError
from saejax.models.tokens import encode, make_chat_text
from saejax.tasks.benchmark_definitions import Item, definition
from saejax.tasks.settings import TaskConfig

_ENDS = "\n\n"  # between worked examples


@dataclasses.dataclass(frozen=True)
class Prompter:
    """Makes the prompts of one benchmark."""

    name: str  #: the benchmark
    shots: int  #: worked examples before each question
    chat: bool  #: whether the prompt is put into the chat template
    tokenizer: Any  #: of the model
    bos: str  #: how prompts begin, see ``tokens.encode``; a chat template writes the special tokens itself

    @property
    def delimiter(self) -> str:
        """The text between a prompt and its answer: a space, or nothing after a chat template."""
        return "" if self.chat else " "

    def prompt(self, item: Item) -> str:
        """Return the text before the answer to a question."""
        benchmark = definition(self.name)
        shown = _examples(self.name, item.task)[: self.shots]
        if not self.chat:
            worked = "".join(f"{benchmark.question.format(question)} {answer}{_ENDS}" for question, answer in shown)
            return worked + benchmark.question.format(item.question)
        messages = []
        for question, answer in shown:
            messages += [dict(role="user", content=question), dict(role="assistant", content=answer)]
        messages.append(dict(role="user", content=item.question))
        # Not as a system message, which some templates do not have.
        messages[0]["content"] = f"{benchmark.instruction}\n\n{messages[0]['content']}"
        # Answers are short: thoughts would be cut off, and no choice is likely where they should begin.
        thinks = "enable_thinking" in str(self.tokenizer.chat_template)
        options = dict(enable_thinking=False) if thinks else {}
        advice = "leave --task.chat_template out"
        return make_chat_text(self.tokenizer, messages, advice, add_generation_prompt=True, **options)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt."""
        return encode(self.tokenizer, text, self.bos)


def make_prompter(name: str, task: TaskConfig, tokenizer: Any, bos: str = "auto") -> Prompter:
    """Return the prompts of a benchmark as the settings want them; for ``bos`` see ``tokens.encode``.

    Raises:
      UserError: there are not so many worked examples, or the tokenizer has no chat template.
    """
    benchmark = definition(name)
    shots = benchmark.shots if task.shots < 0 else task.shots
    most = min(len(_examples(name, part)) for part in benchmark.parts)
    if shots > most:
        raise UserError(f"--task.shots={shots}: {name} has {most} worked examples; expected 0 to {most}")
    if task.chat_template and not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "--model.chat_template: the model's tokenizer has no chat template (base models have none): leave it out"
        )
    return Prompter(name, shots, task.chat_template, tokenizer, "never" if task.chat_template else bos)


@functools.cache
def worked_examples() -> Mapping[str, Sequence[tuple[str, str]]]:
    """Return questions with their worked solutions or right choices, by benchmark, or task of ``logic``."""
    text = (importlib.resources.files(__package__) / "data" / "worked_examples.json").read_text("utf-8")
    return {name: [(row["question"], row["answer"]) for row in rows] for name, rows in json.loads(text).items()}


def _examples(name: str, part: str) -> Sequence[tuple[str, str]]:
    return worked_examples()[part if name == "logic" else name]
