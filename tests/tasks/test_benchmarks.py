"""Items and prompts of benchmarks: what is asked, in which words, and what a file must hold."""

import dataclasses
import re

import pytest
from benchmark_rows import DATA, GSM8K, LOGIC, MATH, NEEDS_DATA, read, write_lines

from saejax.errors import UserError
from saejax.tasks.benchmark_definitions import Item
from saejax.tasks.benchmarks import read_items
from saejax.tasks.settings import TaskConfig


def test_items_hold_what_the_rows_say(folder):
    by_id = {item.id: item for item in read(folder, "gsm8k", examples=12)}
    assert by_id["test:3"] == Item("test:3", "", GSM8K[2]["question"], GSM8K[2]["answer"], "9")
    by_id = {item.id: item for item in read(folder, "math", examples=8)}
    assert by_id["math:1"] == Item("math:1", "", MATH[0]["problem"], MATH[0]["solution"], "4", categories=("level 1",))
    by_id = {item.id: item for item in read(folder, "logic", examples=15)}
    assert len(by_id) == 15
    deduction = by_id["logical_deduction_three_objects:2"]
    assert deduction.choices == ("(A)", "(B)", "(C)") and deduction.answer == deduction.solution == "(B)"
    assert deduction.task == "logical_deduction_three_objects"
    assert by_id["boolean_expressions:1"].choices == ("True", "False")
    assert by_id["web_of_lies:1"].choices == ("Yes", "No")


def test_categories_are_kept(folder, tmp_path):
    """MATH's subject and level in both layouts in which they are published, logic's task, and the user's own column."""
    solved = dict(problem="1 + 1?", solution="It is \\boxed{2}.")
    rows = [dict(subject="Algebra", level=3), dict(type="Algebra", level="Level 3"), dict(level=2, category="mine"), {}]
    path = write_lines(tmp_path / "math.jsonl", [solved | row for row in rows])
    items = sorted(read_items("math", TaskConfig(path=str(path), examples=4)), key=lambda item: item.id)
    assert [item.categories for item in items] == [("algebra", "level 3")] * 2 + [("mine",), ()]
    assert {item.categories for item in read(folder, "logic", examples=15)} >= {("web_of_lies",)}
    solved = dict(question="1 + 1?", answer="#### 2")
    path = write_lines(tmp_path / "gsm8k.jsonl", [solved | dict(category=3), solved | dict(category=[])])
    with pytest.raises(UserError, match=r"'category' is \[\]: expected text"):
        read_items("gsm8k", TaskConfig(path=str(path), examples=2))
    path = write_lines(tmp_path / "gsm8k.jsonl", [solved | dict(category=3), solved])
    assert {item.categories for item in read_items("gsm8k", TaskConfig(path=str(path), examples=2))} == {("3",), ()}


def test_the_seed_chooses(folder):
    ids = [[item.id for item in read(folder, "gsm8k", examples=6, seed=seed)] for seed in (42, 42, 43)]
    assert ids[0] == ids[1] != ids[2] and len(set(ids[0])) == 6
    assert [item.id for item in read(folder, "gsm8k", examples=3)] == ids[0][:3]
    first, second = (sorted(item.id for item in read(folder, "gsm8k", examples=12, seed=seed)) for seed in (1, 2))
    assert first == second


def test_too_few_examples_are_said(folder, tmp_path):
    few = "gsm8k has 12 examples in .*test.jsonl, but 13 were asked for: .*examples=12 or"
    with pytest.raises(UserError, match=few):
        read(folder, "gsm8k", examples=13)
    for name, default, there in (("gsm8k", 500, 12), ("math", 100, 8), ("logic", 200, 15)):
        few = f"{name} has {there} examples .* but {default} are asked by default of {name}"
        with pytest.raises(UserError, match=few):
            read(folder, name)
    empty = write_lines(tmp_path / "empty.jsonl", [])
    with pytest.raises(UserError, match="has 0 examples .* name another file"):
        read_items("gsm8k", TaskConfig(path=str(empty), examples=1))


@pytest.mark.parametrize(
    "name, row, said",
    [
        ("gsm8k", dict(question="q", solution=""), "has no column 'answer', only 'question', 'solution': expected"),
        ("gsm8k", dict(question=" ", answer="#### 3"), "'question' is \" \": expected text"),
        ("gsm8k", dict(question="q", answer=None), "'answer' is null: expected text"),
        ("gsm8k", dict(question="q", answer=3), "'answer' is 3: expected text"),
        ("gsm8k", dict(question="q", answer="3"), "'answer' does not end in '#### ' and a number"),
        ("gsm8k", dict(question="q", answer="#### seven"), "'answer' does not end in '#### ' and a number"),
        ("gsm8k", dict(question="q", answer="#### 1/2"), "'answer' does not end in '#### ' and a number"),
        ("math", dict(problem="p"), "has no column 'solution'"),
        ("math", dict(problem="p", solution="It is 3."), r"'solution' has no \\boxed"),
        ("math", dict(problem="p", solution=r"It is \boxed{}."), r"'solution' has no \\boxed"),
        ("math", dict(problem="p", solution="It is 3.", answer=""), "'answer' is \"\": expected text"),
        ("logic", dict(input="True is", target="Maybe"), "'target' is 'Maybe', which is not one of True, False"),
        ("logic", dict(input="True is", answer="True"), "has no column 'target'"),
        ("date_understanding", dict(input="What day is it?", target="(A)"), "'.A.', which is not one of its options"),
    ],
)
def test_bad_rows_are_refused_with_their_line(tmp_path, name, row, said):
    part, name = (name, "logic") if name in LOGIC else ("boolean_expressions", name)
    good = dict(gsm8k=GSM8K[0], math=MATH[0], logic=LOGIC[part][0])[name]
    path = write_lines(tmp_path / f"{part}.jsonl", [good, row])
    with pytest.raises(UserError, match=said) as caught:
        read_items(name, TaskConfig(path=str(path), examples=1))
    assert f"{path}, line 2" in str(caught.value)


def test_all_bad_rows_are_refused_at_once(tmp_path):
    bad = [dict(question="2 + 2?", answer="4"), dict(question="2 + 3?"), dict(question=" ", answer="#### 1")]
    path = write_lines(tmp_path / "gsm8k.jsonl", [GSM8K[0], *bad, bad[0]])
    said = (
        "gsm8k.jsonl: 4 rows are no questions with answers: line 2: 'answer' does not end in .*; line 3 has no column "
        "'answer', .*; line 4: 'question' is .*; and so in the row gsm8k:5$"
    )
    with pytest.raises(UserError, match=said):
        read_items("gsm8k", TaskConfig(path=str(path), examples=1))


def test_an_answer_column_is_used_and_an_unknown_benchmark_refused(tmp_path):
    path = write_lines(tmp_path / "math.jsonl", [dict(problem="p", solution="Thus 1/2.", answer=r"\frac12")])
    assert read_items("math", TaskConfig(path=str(path), examples=1))[0].answer == r"\frac12"
    with pytest.raises(UserError, match="unknown benchmark 'mmlu': expected one of gsm8k, math, logic"):
        read_items("mmlu", TaskConfig(path=str(path)))


@NEEDS_DATA
def test_real_files_are_read_whole():
    both = TaskConfig(benchmarks=("gsm8k", "logic"), path=str(DATA))
    items = read_items("gsm8k", dataclasses.replace(both, examples=1319))
    assert sum("," in item.answer for item in items) == 14 and sum(item.answer.startswith("-") for item in items) == 2
    assert all(re.fullmatch(r"-?[0-9,]+", item.answer) for item in items)
    train = TaskConfig(path=str(DATA / "gsm8k" / "train.jsonl.gz"), examples=7473)
    assert sum("," in item.answer for item in read_items("gsm8k", train)) == 93 - 14
    items = read_items("logic", dataclasses.replace(both, examples=1500))
    assert {len(item.choices) for item in items} == {2, 3, 5, 6, 7}
    assert len(read_items("gsm8k", both)) == 500 and len(read_items("logic", both)) == 200
