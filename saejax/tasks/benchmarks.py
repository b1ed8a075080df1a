"""Benchmarks: which there are, and which of their items are asked.

- ``gsm8k``: word problems of primary school with worked solutions that end in "#### number" (Cobbe et al., 2021); as
  multiple choice, for models too weak to answer, ``number_choices`` says among which numbers.
- ``math``: competition problems whose solutions hold the answer in ``\\boxed{}`` (Hendrycks et al., 2021).
- ``logic``: multiple choice, six tasks of BIG-Bench Hard (Suzgun et al., 2022) under one name.

Items are read from the hub or from local files (``benchmark_files``) and chosen by seed.
"""

import dataclasses
import re
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from saejax.errors import UserError, one_of
from saejax.settings import BENCHMARKS, TaskConfig
from saejax.tasks.answers import last_boxed
from saejax.tasks.benchmark_files import TRAIN, Origin, Row, find, training_files
from saejax.tasks.hub import hub_configurations
from saejax.tasks.number_choices import number_choices, plain_number
from saejax.workspace import fingerprint

_CHOICES = {"boolean_expressions": ("True", "False"), "web_of_lies": ("Yes", "No")}
LOGIC_TASKS = (
    "logical_deduction_three_objects",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "boolean_expressions",
    "web_of_lies",
    "date_understanding",
)
_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
      id: where it stands, such as "test:17": file or hub configuration, and line or row from 1.
      task: of logic, the task; "" for others.
      question: the text of the question, its options included.
      solution: what a perfect model would write: the worked solution, or of multiple choice the right choice.
      answer: the final answer alone.
      choices: the answers to choose from; empty where none are given.
    """

    id: str
    task: str
    question: str
    solution: str
    answer: str
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """How a benchmark is read and scored.

    Attributes:
      hub: its data set's id on the hub.
      configurations: the data set's configurations to read.
      parts: the tasks it consists of; ("",) if it is one.
      examples: how many items are asked by default.
      shots: worked examples before each question by default.
      scores: ways of scoring it, the default first.
      question: how a question is asked; "{}" stands for it. The answer follows.
      instruction: what a chat model is told beforehand.
      stop: texts that end a generated answer.
      parse: makes an item of a row.
      training: the hub's data set and its configurations whose split "train" goes with it; empty: there is none.
      brief: the instruction where the final answer alone is asked for; "": it always is, or never.
    """

    hub: str
    configurations: tuple[str, ...]
    parts: tuple[str, ...]
    examples: int
    shots: int
    scores: tuple[str, ...]
    question: str
    instruction: str
    stop: tuple[str, ...]
    parse: Callable[[Row], Item]
    training: tuple[str, tuple[str, ...]] = ("", ())
    brief: str = ""


def _gsm8k(row: Row) -> Item:
    question, solution = (row.text(column, ("question", "answer")) for column in ("question", "answer"))
    answer = final_number(solution)
    if not answer:
        raise UserError(f"{row.where}: 'answer' does not end in '#### ' and a number: fix or remove the row")
    return Item(row.name, "", question, solution, answer)


def final_number(solution: str) -> str:
    """What a solution of gsm8k ends in; "" if it has no final answer."""
    _, mark, answer = solution.rpartition("####")
    return answer.strip() if mark else ""


def _math(row: Row) -> Item:
    columns = ("problem", "solution")
    question, solution = (row.text(column, columns) for column in columns)
    answer = row.text("answer", (*columns, "answer")) if "answer" in row.fields else last_boxed(solution)
    if not answer:
        raise UserError(
            f"{row.where}: 'solution' has no \\boxed{{...}} with an answer, and there is no column 'answer': fix or "
            "remove the row"
        )
    return Item(row.name, "", question, solution, answer)


def _logic(row: Row) -> Item:
    question, answer = (row.text(column, ("input", "target")) for column in ("input", "target"))
    choices = _CHOICES.get(row.part) or tuple(re.findall(r"^\([A-Z]\)", question, re.MULTILINE))
    if answer not in choices:
        raise UserError(
            f"{row.where}: 'target' is {answer!r}, which is not one of {', '.join(choices) or 'its options (none)'}: "
            "fix or remove the row"
        )
    return Item(row.name, row.part, question, answer, answer, choices)


DEFINITIONS = {
    "gsm8k": Benchmark(
        hub="openai/gsm8k",
        configurations=("main",),
        parts=("",),
        examples=500,
        shots=5,
        scores=("generate", "choice", "likelihood"),
        question="Question: {}\nAnswer:",
        instruction="Solve the problem step by step. End with a line that holds '#### ' and the answer as a number.",
        stop=("Question:", "</s>", "<|im_end|>"),
        parse=_gsm8k,
        training=("openai/gsm8k", ("main",)),
        brief="Answer with a number alone.",
    ),
    "math": Benchmark(
        hub="HuggingFaceH4/MATH-500",
        configurations=("default",),
        parts=("",),
        examples=100,
        shots=4,
        scores=("generate", "likelihood"),
        question="Problem:\n{}\n\nSolution:",
        instruction="Solve the problem step by step and put the final answer into \\boxed{}.",
        stop=("Problem:",),
        parse=_math,
        training=("EleutherAI/hendrycks_math", _SUBJECTS),
    ),
    "logic": Benchmark(
        hub="SaylorTwift/bbh",
        configurations=LOGIC_TASKS,
        parts=LOGIC_TASKS,
        examples=200,
        shots=3,
        scores=("choice", "likelihood"),
        question="Q: {}\nA:",
        instruction="Answer with the right choice alone.",
        stop=(),
        parse=_logic,
    ),
}


def definition(name: str) -> Benchmark:
    """A benchmark by its name; a ``UserError`` lists them."""
    return DEFINITIONS[one_of(name, BENCHMARKS, "benchmark")]


def way(name: str, task: TaskConfig) -> str:
    """How a benchmark is scored: "generate", "choice" or "likelihood"; a ``UserError`` if it cannot be scored so."""
    ways = definition(name).scores
    if task.score == "auto":
        return ways[0]
    if task.score not in ways:
        raise UserError(f"--task.score={task.score} does not fit {name}: expected one of {', '.join(('auto', *ways))}")
    return task.score


def origin(name: str, task: TaskConfig) -> Origin:
    """Where the items of a benchmark come from.

    Raises:
      UserError: ``--task.path`` names no such place, or the hub data set has not what is expected.
    """
    known = definition(name)
    if task.path:
        files = find(task.path, name, len(task.benchmarks) > 1, known.parts)
        if files is not None:
            return Origin(files=files)
    hub, names = task.path or known.hub, known.configurations
    if hub != known.hub:
        there = hub_configurations(hub, task.revision)
        missing = [wanted for wanted in names if wanted not in there]
        if missing and len(known.parts) > 1:
            raise UserError(
                f"the data set {hub} has no configuration {', '.join(missing)}, only {', '.join(there)}: expected one "
                "for each task of logic"
            )
        names = tuple(there) if missing else names
    by_part = {part: (part,) for part in known.parts} if len(known.parts) > 1 else {"": names}
    return Origin(hub=hub, configurations=by_part, revision=task.revision)


def identity(name: str, task: TaskConfig) -> str:
    """A hash, 16 hexadecimal digits, of what is read: the content of local files; of the hub, the id and the revision.

    Raises:
      UserError: see ``origin``.
    """
    return fingerprint([name, *origin(name, task).identity()])


def read_items(name: str, task: TaskConfig) -> list[Item]:
    """The items to ask: ``task.examples`` of them, in an order drawn from ``task.seed``.

    Raises:
      UserError: a file or the hub cannot be read, a row lacks a column or an answer, or there are too few items.
    """
    known, source = definition(name), origin(name, task)
    items = [known.parse(row) for row in source.rows()]
    if way(name, task) == "choice":
        items = _with_choices(items)
    wanted = task.examples or known.examples
    if len(items) < wanted:
        asked = "were asked for" if task.examples else f"are asked by default of {name}"
        advice = f"give --task.examples={len(items)} or fewer" if items else "name another file"
        raise UserError(f"{name} has {len(items)} examples in {source}, but {wanted} {asked}: {advice}")
    rng = np.random.default_rng((task.seed, zlib.crc32(name.encode())))
    return [items[i] for i in rng.permutation(len(items))[:wanted]]


def _with_choices(items: Sequence[Item]) -> list[Item]:
    """Items as multiple choice: those that have no choices get numbers to choose among."""
    bare = [item for item in items if not item.choices]
    right = [plain_number(item.answer, item.id) for item in bare]
    made = {
        item.id: dataclasses.replace(item, answer=answer, solution=answer, choices=choices)
        for item, answer, choices in zip(bare, right, number_choices(right), strict=True)
    }
    return [made.get(item.id, item) for item in items]


def training_items(name: str, task: TaskConfig) -> list[Item]:
    """The items that are not asked, to train on: of the train split where there is one, else those left over.

    Raises:
      UserError: see ``read_items``; or all items are asked.
    """
    known, asked = definition(name), {item.question for item in read_items(name, task)}
    source = _training_origin(name, task) or origin(name, task)
    left = [item for item in map(known.parse, source.rows()) if item.question not in asked]
    if not left:
        raise UserError(
            f"--corpus.path={name}: all examples in {source} are asked, none is left as text: lower --task.examples, "
            "or give a folder with a train split"
        )
    return left


def training_identity(name: str, task: TaskConfig) -> str:
    """A hash, 16 hexadecimal digits, of what ``training_items`` depends on; see ``identity``."""
    source = _training_origin(name, task)
    asked = [task.examples or definition(name).examples, task.seed]
    return fingerprint([identity(name, task), *asked, *(source.identity() if source else [])])


def _training_origin(name: str, task: TaskConfig) -> Origin | None:
    """The train split that goes with a benchmark; None if there is none."""
    known, asked = definition(name), origin(name, task)
    if asked.files:
        files = training_files(asked.files, known.parts)
        return Origin(files=files) if files else None
    if asked.hub != known.hub or not known.training[0]:
        return None
    hub, configurations = known.training
    return Origin(hub=hub, configurations={"": configurations}, revision="main", split=TRAIN)
