r"""The benchmarks: how each is read, asked and scored.

- ``gsm8k``: word problems of primary school with worked solutions that end in "#### number" (Cobbe et al., 2021).
- ``math``: competition problems whose solutions hold the answer in ``\boxed{}`` (Hendrycks et al., 2021).
- ``logic``: multiple choice, six tasks of BIG-Bench Hard (Suzgun et al., 2022) under one name.
- ``logiqa``: multiple choice, questions of civil service examinations (Liu et al., 2020; LogiQA 2.0, 2023).
- ``commonsense``: multiple choice, CommonsenseQA (Talmor et al., 2019), and files laid out like it, such as ARC's.
- ``word_problems``: multiple choice, problems of one and two steps and logic of one hop, made from templates.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from saejax.errors import UserError, one_of
from saejax.tasks.answers import last_boxed, number_value
from saejax.tasks.benchmark_files import TEST, Row
from saejax.tasks.files import shown
from saejax.tasks.settings import BENCHMARKS, TaskConfig

_CHOICES = {"boolean_expressions": ("True", "False"), "web_of_lies": ("Yes", "No")}
LOGIC_TASKS = (
    "logical_deduction_three_objects",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "boolean_expressions",
    "web_of_lies",
    "date_understanding",
)
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of options
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
    """One question."""

    id: str  #: where it stands, such as "test:17": file or hub configuration, and line or row from 1
    task: str  #: of logic, the task; of word_problems, the operation and the number of steps; "" for others
    question: str  #: the text of the question, its options included
    solution: str  #: what a perfect model would write: the worked solution, or of multiple choice the right choice
    answer: str  #: the final answer alone
    choices: tuple[str, ...] = ()  #: the answers to choose from; empty where none are given
    #: whether it may only judge features, because no item that chooses them may have its template.
    held_out: bool = False
    #: the user's own, from a column "category"; else MATH's subject and level, or the task; empty where there is none.
    categories: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The definition of a benchmark: its data set, prompts and ways of scoring."""

    hub: str  #: its data set's id on the hub; "": its items are made from templates
    examples: int  #: how many items are asked by default
    shots: int  #: worked examples before each question by default
    scores: tuple[str, ...]  #: ways of scoring it, the default first
    question: str  #: how a question is asked; "{}" stands for it. The answer follows.
    instruction: str  #: what a chat model is told beforehand
    stop: tuple[str, ...]  #: texts that end a generated answer
    parse: Callable[[Row], Item]  #: makes an item of a row
    configurations: tuple[str, ...] = ("default",)  #: the data set's configurations to read
    parts: tuple[str, ...] = ("",)  #: the tasks it consists of; ("",) if it is one
    #: the hub's data set and its configurations whose split "train" goes with it; empty: there is none.
    training: tuple[str, tuple[str, ...]] = ("", ())
    new_tokens: int = 0  #: longest generated answer by default, in tokens; 0: none is generated
    splits: tuple[str, ...] = TEST  #: names of the split that is asked, in local files; on the hub the first


def _categories(row: Row, *published: str) -> tuple[str, ...]:
    """Return the text of the row's column "category", or else of the columns in which categories are published."""
    category = row.fields.get("category")
    if category is None:
        return tuple(name for name in published if name)
    if not isinstance(category, str | int) or isinstance(category, bool) or not str(category).strip():
        raise UserError(f"{row.where}: 'category' is {shown(category)}: expected text; fix it or remove the column")
    return (str(category).strip(),)


def _gsm8k(row: Row) -> Item:
    question, solution = (row.text(column, ("question", "answer")) for column in ("question", "answer"))
    _, mark, answer = solution.rpartition("####")
    # Of an answer such as "1/2" no number that a model writes would be right.
    if not mark or number_value(answer) is None:
        raise UserError(f"{row.where}: 'answer' does not end in '#### ' and a number: fix or remove the row")
    return Item(row.name, "", question, solution, answer.strip(), categories=_categories(row))


def _math(row: Row) -> Item:
    columns = ("problem", "solution")
    question, solution = (row.text(column, columns) for column in columns)
    stated = row.fields.get("answer")  # of a published row None beside a boxed one; of AIME's files a whole number
    is_text = isinstance(stated, str | int) and not isinstance(stated, bool)
    answer = (str(stated).strip() if is_text else "") or last_boxed(solution)
    if stated is not None and not (is_text and answer):
        raise UserError(f"{row.where}: 'answer' is {shown(stated)}: expected text; fix or remove the row")
    if not answer:
        raise UserError(
            f"{row.where}: 'solution' has no \\boxed{{...}} with an answer, and there is no column 'answer': fix or "
            "remove the row"
        )
    # "subject" and 3 in MATH-500, "type" and "Level 3" as first published.
    subject, level = row.fields.get("subject", row.fields.get("type")), row.fields.get("level")
    numbered = f"level {level}" if isinstance(level, int) else level
    kept = [str(name).strip().lower() for name in (subject, numbered) if isinstance(name, str)]
    return Item(row.name, "", question, solution, answer, categories=_categories(row, *kept))


def _logic(row: Row) -> Item:
    question, answer = (row.text(column, ("input", "target")) for column in ("input", "target"))
    choices = _CHOICES.get(row.part) or tuple(re.findall(r"^\([A-Z]\)", question, re.MULTILINE))
    if answer not in choices:
        raise UserError(
            f"{row.where}: 'target' is {answer!r}, which is not one of {', '.join(choices) or 'its options (none)'}: "
            "fix or remove the row"
        )
    return Item(row.name, row.part, question, answer, answer, choices, categories=_categories(row, row.part))


def _word_problem(row: Row) -> Item:
    fields = row.fields
    answer, choices = fields["answer"], tuple(fields["choices"])
    return Item(
        row.name, fields["category"], fields["question"], answer, answer, choices, fields["held_out"], _categories(row)
    )


def _multiple_choice(row: Row) -> Item:
    """Return the item of a row with a question, its options and the right one, in any of the published layouts.

    - CommonsenseQA and ARC on the hub: question, choices = {label: [...], text: [...]}, answerKey;
    - OpenBookQA: question_stem in place of question;
    - LogiQA: context or text, question or query, options = [...], and answer, correct_option or label, counted from 0
      or a letter.
    """
    stem, options, labels = _question_and_options(row)
    keys = ("answerKey", "answer", "correct_option", "label")
    key = next((row.fields[name] for name in keys if name in row.fields), None)
    right = _right_option(key, labels)
    if right is None:
        raise UserError(
            f"{row.where}: the right answer is {shown(key)}, which is not one of {', '.join(labels) or 'its options'}: "
            "fix the row, or take a split whose answers are published (of CommonsenseQA that is validation)"
        )
    letters = [f"({letter})" for letter in _LETTERS[: len(options)]]
    lines = [f"{letter} {option}" for letter, option in zip(letters, options, strict=True)]
    question = "\n".join([stem, "Options:", *lines])
    return Item(row.name, "", question, letters[right], letters[right], tuple(letters), categories=_categories(row))


def _question_and_options(row: Row) -> tuple[str, list[str], list[str]]:
    """Return the text of a question, its options and their labels."""
    fields: Mapping[str, Any] = row.fields
    choices: Any = next((fields[name] for name in ("choices", "options") if fields.get(name) is not None), [])
    columns = [choices.get("label"), choices.get("text")] if isinstance(choices, Mapping) else [None, choices]
    if columns[0] is None and isinstance(columns[1], list):
        columns[0] = [*_LETTERS[: len(columns[1])]]
    labels, options = (_texts(row, column) for column in columns)
    texts = [fields.get("context") or fields.get("text")]
    texts.append(next((fields[name] for name in ("question", "query", "question_stem") if fields.get(name)), None))
    if not isinstance(texts[1], str):
        has = ", ".join(map(repr, row.fields)) or "none"
        raise UserError(
            f"{row.where} has the columns {has}: expected 'question', 'choices' and 'answerKey', or 'text', "
            "'question', 'options' and 'answer'; fix or rename them"
        )
    if not 2 <= len(options) == len(set(labels)) == len(labels) <= len(_LETTERS):
        raise UserError(
            f"{row.where} has {len(options)} options with the labels {', '.join(labels) or '(none)'}: expected 2 to "
            f"{len(_LETTERS)} options, each with a label of its own; fix or remove the row"
        )
    return "\n".join(text.strip() for text in texts if isinstance(text, str) and text.strip()), options, labels


def _texts(row: Row, values: object) -> list[str]:
    """Return options or labels as text; a ``UserError`` where they are no list of texts or numbers."""
    if not isinstance(values, list) or not all(isinstance(value, str | int | float) for value in values):
        raise UserError(
            f"{row.where}: its options are {shown(values)}: expected a list of texts; fix or remove the row"
        )
    return [str(value).strip() for value in values]


def _right_option(key: object, labels: Sequence[str]) -> int | None:
    """Return the index of the right option: its label, in any case, or a number from 0 where labels are letters."""
    # Labels first: "1" is the label of the first option in some rows of ARC, not the index of the second.
    named = str(key).strip() if isinstance(key, int | str) and not isinstance(key, bool) else ""
    for label in (named, named.upper()):
        if label in labels:
            return list(labels).index(label)
    is_index = re.fullmatch("[0-9]+", named) and set(labels) <= set(_LETTERS)
    return int(named) if is_index and int(named) < len(labels) else None


# How multiple choice is asked and scored.
_multiple_choice_benchmark = functools.partial(
    Benchmark,
    examples=200,
    shots=3,
    scores=("choice", "likelihood"),
    question="Q: {}\nA:",
    instruction="Answer with the right choice alone.",
    stop=(),
)

DEFINITIONS = {
    "gsm8k": Benchmark(
        hub="openai/gsm8k",
        configurations=("main",),
        examples=500,
        shots=5,
        scores=("generate", "likelihood"),
        question="Question: {}\nAnswer:",
        instruction="Solve the problem step by step. End with a line that holds '#### ' and the answer as a number.",
        stop=("Question:", "</s>", "<|im_end|>"),
        parse=_gsm8k,
        training=("openai/gsm8k", ("main",)),
        new_tokens=256,
    ),
    "math": Benchmark(
        hub="HuggingFaceH4/MATH-500",
        examples=100,
        shots=4,
        scores=("generate", "likelihood"),
        question="Problem:\n{}\n\nSolution:",
        instruction="Solve the problem step by step and put the final answer into \\boxed{}.",
        stop=("Problem:",),
        parse=_math,
        training=("EleutherAI/hendrycks_math", _SUBJECTS),
        new_tokens=1024,  # a quarter of the reference solutions is longer than 256
    ),
    "logic": _multiple_choice_benchmark(
        hub="SaylorTwift/bbh", configurations=LOGIC_TASKS, parts=LOGIC_TASKS, parse=_logic
    ),
    "logiqa": _multiple_choice_benchmark(
        hub="lucasmccabe/logiqa", parse=_multiple_choice, training=("lucasmccabe/logiqa", ("default",))
    ),
    "commonsense": _multiple_choice_benchmark(
        hub="tau/commonsense_qa",
        parse=_multiple_choice,
        training=("tau/commonsense_qa", ("default",)),
        splits=("validation", "dev", "test"),  # the answers of its test split are not published
    ),
    "word_problems": _multiple_choice_benchmark(hub="", parse=_word_problem, question="Question: {}\nAnswer:"),
}


def definition(name: str) -> Benchmark:
    """Return a benchmark by its name; a ``UserError`` lists them."""
    return DEFINITIONS[one_of(name, BENCHMARKS, "benchmark")]


def way(name: str, task: TaskConfig) -> str:
    """Return how a benchmark is scored, "generate", "choice" or "likelihood"; a ``UserError`` if it cannot be."""
    ways = definition(name).scores
    if task.score == "auto":
        return ways[0]
    if task.score not in ways:
        raise UserError(f"--task.score={task.score} does not fit {name}: expected one of {', '.join(('auto', *ways))}")
    return task.score


def answer_tokens(name: str, task: TaskConfig) -> int:
    """Return the length in tokens at which a generated answer to a benchmark is cut off."""
    return task.max_new_tokens or definition(name).new_tokens
