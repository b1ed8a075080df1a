"""Small made-up benchmarks for tests, written as files; where real ones are; how prompts are made of either."""

import json
import os
from pathlib import Path

import pytest

from saejax.tasks.benchmark_definitions import Item
from saejax.tasks.benchmark_prompts import make_prompter
from saejax.tasks.benchmarks import read_items
from saejax.tasks.settings import BENCHMARKS, TaskConfig

DATA = Path(os.environ.get("SAEJAX_DATA") or Path(__file__).parents[3] / "shared" / "data")
NEEDS_DATA = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"real benchmarks are not in {DATA}; name their folder in SAEJAX_DATA"
)

PEARS = "Nora has {} pears and buys {} more. How many has she?"
GSM8K = [
    dict(question=PEARS.format(n, n + 3), answer=f"{n} + {n + 3} = {2 * n + 3}\n#### {2 * n + 3}") for n in range(1, 13)
]
MATH = [
    dict(problem=f"What is ${n}^2$?", solution=rf"It is ${n} \cdot {n} = \boxed{{{n * n}}}$.", level="Level 1")
    for n in range(2, 10)
]
THREE = (
    "Three cups stand in a row: a tin cup, a red cup, and a tall cup. The {} cup is the leftmost.\nOptions:\n"
    "(A) The tin cup is the leftmost\n(B) The red cup is the leftmost\n(C) The tall cup is the leftmost"
)
OPTIONS = [dict(input=THREE.format(word), target=f"({letter})") for word, letter in zip(("tin", "red", "tall"), "ABC")]
TRUE = [dict(input="True and not False is", target="True"), dict(input="not True is", target="False")]
LIES = [dict(input="Question: Ana lies. Bo says Ana lies. Does Bo tell the truth?", target="Yes")]
ORDERINGS = [f"logical_deduction_{count}_objects" for count in ("three", "five", "seven")]
LOGIC = dict(boolean_expressions=TRUE, web_of_lies=LIES) | dict.fromkeys([*ORDERINGS, "date_understanding"], OPTIONS)

LOGIQA = [
    dict(text=f"Room {n} is not open.", question="Which room is open?", options=[f"room {n}", "the hall"], answer=1)
    for n in range(8)
]
COMMONSENSE = [
    dict(question=f"What holds {n} litres?", choices=dict(label=["A", "B"], text=["a tank", "a song"]), answerKey="A")
    for n in range(2, 10)
]


def write_lines(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_all(folder: Path) -> Path:
    """The benchmarks as a folder that ``--task.path`` can name."""
    write_lines(folder / "gsm8k" / "test.jsonl", GSM8K)
    write_lines(folder / "math.jsonl", MATH)
    for task, rows in LOGIC.items():
        write_lines(folder / "logic" / f"{task}.jsonl", rows)
    write_lines(folder / "logiqa.jsonl", LOGIQA)
    write_lines(folder / "commonsense.jsonl", COMMONSENSE)
    return folder


def read(folder, name, **changes) -> list[Item]:
    return read_items(name, TaskConfig(benchmarks=BENCHMARKS, path=str(folder), **changes))


class Chat:
    """A tokenizer's chat template, as far as prompts need it."""

    chat_template = "one"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def prompter(name, tokenizer=None, **changes):
    return make_prompter(name, TaskConfig(**changes), tokenizer)
