"""The benchmark of templates: answers worked out again, held-out templates, choices that no guess prefers."""

import dataclasses
import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest

from saejax.errors import UserError
from saejax.interventions.settings import StudyConfig
from saejax.stages.study.measure import split_items
from saejax.tasks import benchmarks
from saejax.tasks.benchmark_prompts import worked_examples
from saejax.tasks.settings import TaskConfig
from saejax.tasks.word_problems import PER_TEMPLATE, make_questions, read_data

TASK = TaskConfig(benchmarks=("word_problems",), examples=400, shots=0)


@pytest.fixture(scope="module")
def items():
    return benchmarks.read_items("word_problems", TASK)


def work_out(question: str) -> str:
    """The answer, from the text alone."""
    if "What is" in question:
        kind = re.search(r"(?:is|be) a (\w+)\.", question)[1]
        every = {}
        for pattern in (r"[Aa]ll (\w+?)e?s are (\w+)", r"[Ee]very (\w+) is (\w+)", r"[Ww]hatever is a (\w+) is (\w+)"):
            every |= dict(re.findall(pattern, question))
        return every.get(kind) or every[kind.rstrip("e")]
    a, *rest = map(int, re.findall(r"\d+", question))
    b, c = [*rest, None, None][:2]
    if re.search(r"buys \d+ bags|table, and each of", question):
        return f"{a} + {b} * {c} = {a + b * c}"
    if re.search(r"bags|shelves|children|boxes|crates|each of|gets", question):
        return f"{a} * {b} = {a * b}" if c is None else f"{a} * {b} + {c} = {a * b + c}"
    if "removes" in question and question.index("removes") < question.index("adds"):
        return f"{a} - {b} + {c} = {a - b + c}"
    if "adds" in question or "brings" in question:
        return f"{a} + {b} - {c} = {a + b - c}"
    if "gives away" in question:
        return f"{a} - {b} + {c} = {a - b + c}"
    return f"{a} - {b} = {a - b}" if re.search(r"gives|takes|loses", question) else f"{a} + {b} = {a + b}"


def form(choice: str) -> str:
    """The operations of a choice, such as "n + n * n"."""
    return re.sub(r"\d+", "n", choice.partition(" = ")[0])


def test_answers_are_right(items):
    for item in items:
        assert work_out(item.question) == item.answer, item.question
        assert item.answer in item.choices and len(set(item.choices)) == len(item.choices) > 1
    for question, answer in worked_examples()["word_problems"]:
        assert work_out(question) == answer
        assert not set(re.findall(r"Otto|Vera|glims|spoons", question)) & set(json.loads(read_data())["names"])


def test_wrong_choices_are_right_calculations_of_the_same_numbers(items):
    for item in (item for item in items if "logic" not in item.task):
        for choice in item.choices:
            calculation, _, value = choice.partition(" = ")
            assert set(calculation) <= set("0123456789+-* ") and eval(calculation) == int(value)
            assert re.findall(r"\d+", calculation) == re.findall(r"\d+", item.answer.partition(" = ")[0])


def test_no_guess_does_better_than_chance():
    logic = [row for row in make_questions() if "logic" in row["category"]]
    assert 2 * sum(row["answer"] == row["choices"][0] for row in logic) == len(logic) == 3 * PER_TEMPLATE
    problems = [row for row in make_questions() if "logic" not in row["category"]]
    for held_out, steps in itertools.product((False, True), (1, 2)):
        some = [row for row in problems if row["held_out"] == held_out and f", {steps} step" in row["category"]]
        offered = {tuple(sorted(map(form, row["choices"]))) for row in some}
        right = Counter(form(row["answer"]) for row in some)
        # All offer the same forms, each as often right: whichever a model likes, it is right in one of 3, or of 4.
        assert offered == {tuple(sorted(right))} and len(right) == 2 + steps and len(set(right.values())) == 1


def test_numbers_do_not_tell_the_operation():
    ranges = {}
    for row in make_questions():
        if "logic" not in row["category"]:
            numbers = list(map(int, re.findall(r"\d+", row["answer"].partition(" = ")[0])))
            ranges.setdefault(form(row["answer"]), []).append(numbers)
    for several in ([one for one in ranges.values() if len(one[0]) == count] for count in (2, 3)):
        every = np.array(list(itertools.chain(*several)))
        error = every.std(axis=0) / 60**0.5  # of a mean over the fewest questions of a form
        assert all((np.abs(np.mean(one, axis=0) - every.mean(axis=0)) < 3 * error).all() for one in several)


def test_questions_are_the_same_everywhere_and_all_differ():
    questions = [row["question"] for row in make_questions()]
    assert questions == [row["question"] for row in make_questions()] and len(set(questions)) == len(questions)
    categories = Counter(row["category"] for row in make_questions())
    assert len(categories) == 6 and set(categories.values()) == {3 * PER_TEMPLATE}
    assert len(benchmarks.identity("word_problems", TASK)) == 16
    with_path = dataclasses.replace(TASK, path="/nowhere")
    assert benchmarks.identity("word_problems", with_path) == benchmarks.identity("word_problems", TASK)


def test_held_out_templates_choose_no_features(items):
    train, test = split_items(items, StudyConfig(items=100), "word_problems")
    assert not any(item.held_out for item in train) and 20 <= sum(item.held_out for item in test) <= 45
    assert {*train, *test} == set(items[:100]) and len(train) + len(test) == 100
    ids = [item.id for item in train]
    assert len(ids) == 50 and len(set(ids)) == 50


def test_copies_of_a_question_judge_and_choose_nothing(items):
    """A file of one's own may hold a question twice; features that it chose would be judged by it."""
    copied = [*items[:40], *(dataclasses.replace(item, id=f"{item.id} again") for item in items[:20])]
    train, test = split_items(copied, StudyConfig(items=60), "word_problems")
    assert not {item.question for item in train} & {item.question for item in test}
    assert train and sorted(item.id for item in (*train, *test)) == sorted(item.id for item in copied)
    with pytest.raises(UserError, match="the others ask the same"):
        split_items([dataclasses.replace(items[0], id=str(i), held_out=False) for i in range(6)], StudyConfig(), "mine")
