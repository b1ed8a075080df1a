"""Items and prompts of benchmarks: what is asked, in which words, and what a file must hold."""

import dataclasses
import itertools
import json
import os
import re
from collections import Counter
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from benchmark_rows import GSM8K, LOGIC, MATH, write_all, write_lines

from saejax.errors import UserError
from saejax.models import source
from saejax.settings import BENCHMARKS, ModelConfig, TaskConfig
from saejax.tasks import exemplars
from saejax.tasks.answers import last_boxed
from saejax.tasks.benchmark_prompts import make_prompter
from saejax.tasks.benchmarks import DEFINITIONS, LOGIC_TASKS, Item, definition, read_items
from saejax.tasks.number_choices import number_choices, plain_number

DATA = Path(os.environ.get("SAEJAX_DATA") or Path(__file__).parents[3] / "shared" / "data")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("benchmarks"))


def read(folder, name, **changes) -> list[Item]:
    return read_items(name, TaskConfig(benchmarks=BENCHMARKS, path=str(folder), **changes))


# Items


def test_items_hold_what_the_rows_say(folder):
    by_id = {item.id: item for item in read(folder, "gsm8k", examples=12)}
    assert by_id["test:3"] == Item("test:3", "", GSM8K[2]["question"], GSM8K[2]["answer"], "9")
    by_id = {item.id: item for item in read(folder, "math", examples=8)}
    assert by_id["math:1"] == Item("math:1", "", MATH[0]["problem"], MATH[0]["solution"], "4")
    by_id = {item.id: item for item in read(folder, "logic", examples=15)}
    assert len(by_id) == 15
    deduction = by_id["logical_deduction_three_objects:2"]
    assert deduction.choices == ("(A)", "(B)", "(C)") and deduction.answer == deduction.solution == "(B)"
    assert deduction.task == "logical_deduction_three_objects"
    assert by_id["boolean_expressions:1"].choices == ("True", "False")
    assert by_id["web_of_lies:1"].choices == ("Yes", "No")


def test_the_seed_chooses(folder):
    ids = [[item.id for item in read(folder, "gsm8k", examples=6, seed=seed)] for seed in (42, 42, 43)]
    assert ids[0] == ids[1] != ids[2] and len(set(ids[0])) == 6
    assert [item.id for item in read(folder, "gsm8k", examples=3)] == ids[0][:3]
    assert sorted(item.id for item in read(folder, "gsm8k", examples=12, seed=1)) == sorted(
        item.id for item in read(folder, "gsm8k", examples=12, seed=2)
    )


def test_too_few_examples_are_said(folder, tmp_path):
    with pytest.raises(
        UserError, match="gsm8k has 12 examples in .*test.jsonl, but 13 were asked for: .*examples=12 or"
    ):
        read(folder, "gsm8k", examples=13)
    for name, default, there in (("gsm8k", 500, 12), ("math", 100, 8), ("logic", 200, 15)):
        with pytest.raises(
            UserError, match=f"{name} has {there} examples .* but {default} are asked by default of {name}"
        ):
            read(folder, name)
    empty = write_lines(tmp_path / "empty.jsonl", [])
    with pytest.raises(UserError, match="has 0 examples .* name another file"):
        read_items("gsm8k", TaskConfig(path=str(empty), examples=1))


@pytest.mark.parametrize(
    "name, row, said",
    [
        (
            "gsm8k",
            dict(question="q", solution="#### 3"),
            "has no column 'answer', only 'question', 'solution': expected",
        ),
        ("gsm8k", dict(question=" ", answer="#### 3"), "'question' is \" \": expected text"),
        ("gsm8k", dict(question="q", answer=None), "'answer' is null: expected text"),
        ("gsm8k", dict(question="q", answer=3), "'answer' is 3: expected text"),
        ("gsm8k", dict(question="q", answer="3"), "'answer' does not end in '#### ' and a number"),
        ("gsm8k", dict(question="q", answer="3\n#### "), "'answer' does not end in '#### ' and a number"),
        ("math", dict(problem="p"), "has no column 'solution'"),
        ("math", dict(problem="p", solution="It is 3."), r"'solution' has no \\boxed"),
        ("math", dict(problem="p", solution=r"It is \boxed{}."), r"'solution' has no \\boxed"),
        ("math", dict(problem="p", solution="It is 3.", answer=""), "'answer' is \"\": expected text"),
        ("logic", dict(input="True is", target="Maybe"), "'target' is 'Maybe', which is not one of True, False"),
        ("logic", dict(input="True is", answer="True"), "has no column 'target'"),
    ],
)
def test_bad_rows_are_refused_with_their_line(tmp_path, name, row, said):
    good = dict(gsm8k=GSM8K[0], math=MATH[0], logic=LOGIC["boolean_expressions"][0])[name]
    path = write_lines(tmp_path / "boolean_expressions.jsonl", [good, row])
    with pytest.raises(UserError, match=said) as caught:
        read_items(name, TaskConfig(path=str(path), examples=1))
    assert f"{path}, line 2" in str(caught.value)


def test_options_without_a_list_are_refused(tmp_path):
    path = write_lines(tmp_path / "date_understanding.jsonl", [dict(input="What day is it?", target="(A)")])
    with pytest.raises(UserError, match="line 1: 'target' is '.A.', which is not one of its options .none."):
        read_items("logic", TaskConfig(path=str(path), examples=1))


def test_an_answer_column_is_used_where_there_is_one(tmp_path):
    row = dict(problem="p", solution="Thus 1/2.", answer=r"\frac12")
    path = write_lines(tmp_path / "math.jsonl", [row])
    assert read_items("math", TaskConfig(path=str(path), examples=1))[0].answer == r"\frac12"


def test_an_unknown_benchmark_is_refused():
    with pytest.raises(UserError, match="unknown benchmark 'mmlu': expected one of gsm8k, math, logic"):
        definition("mmlu")
    with pytest.raises(UserError, match="benchmarks is 'mmlu': expected one of gsm8k, math, logic"):
        TaskConfig(benchmarks=("mmlu",))


@pytest.mark.skipif(not DATA.is_dir(), reason=f"real benchmarks are not in {DATA}; name their folder in SAEJAX_DATA")
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


# Worked examples: every answer is worked out again


def test_the_calculations_of_gsm8k_examples_are_right():
    for _, solution in exemplars.GSM8K:
        steps = re.findall(r"<<([0-9.*/+-]+)=([0-9.]+)>>([0-9]+)", solution)
        assert steps and solution.count("<<") == len(steps)
        for calculation, result, repeated in steps:
            assert eval(calculation) == float(result) and result == repeated
        assert solution.endswith(f"#### {steps[-1][1]}")


def test_the_answers_of_math_examples_are_right():
    answers = [last_boxed(solution) for _, solution in exemplars.MATH]
    roots = [x for x in range(1, 100) if x * x - 3 * x == 28]
    throws = list(itertools.product("HT", "HT", range(1, 7)))
    share = sum(throw[:2] == ("H", "H") and throw[2] < 3 for throw in throws), len(throws)
    assert answers[:4] == [str(roots[0]), r"\frac{1}{12}", "5", str(2**10 % 7)] and share[1] == 12 * share[0]
    assert 5 + 4 * 5 == 5**2
    assert answers[4] == "3a - 3" and all((a * a - 9) / (a + 3) + 2 * a == 3 * a - 3 for a in range(1, 9))


def test_the_answers_of_true_and_false_examples_are_right():
    for question, answer in exemplars.LOGIC["boolean_expressions"]:
        assert str(eval(question.removesuffix(" is"))) == answer
    for question, answer in exemplars.LOGIC["web_of_lies"]:
        sentences = question.removeprefix("Question: ").split(". ")
        truthful = {sentences[0].split()[0]: "tells the truth" in sentences[0]}
        for speaker, other, claim in (re.fullmatch(r"(\w+) says (\w+) (.+)", s).groups() for s in sentences[1:-1]):
            truthful[speaker] = truthful[other] == (claim == "tells the truth")
        asked = re.fullmatch(r"Does (\w+) tell the truth\?", sentences[-1])[1]
        assert answer == ("Yes" if truthful[asked] else "No")


# What each example of an ordering says, as conditions on places (0 is left, first, cheapest or lowest), by initials.
ORDERS = {
    "Three jars": ("hsr", lambda p: p["r"] < p["s"] < p["h"], 0),
    "Three runners": ("OPR", lambda p: p["P"] < p["R"] < p["O"], 1),
    "Three lamps": ("dfw", lambda p: p["f"] == 2 and p["w"] > p["d"], 0),
    "Five books": (
        ["red", "blue", "green", "white", "black"],
        lambda p: p["white"] == 0 and p["black"] == 4 and p["red"] == 1 and p["green"] < p["blue"],
        2,
    ),
    "Five boats": ("HOSTW", lambda p: p["T"] == 1 and p["H"] == 4 and p["W"] < p["T"] and p["O"] > p["S"], 3),
    "Five cheeses": ("BCEFG", lambda p: p["E"] == 4 and p["F"] == 0 and p["B"] > p["C"] and p["G"] > p["B"], 3),
    "Seven pots": (
        ["basil", "chives", "dill", "mint", "parsley", "sage", "thyme"],
        lambda p: (
            p["mint"] == 0
            and p["thyme"] == 6
            and p["sage"] == 3
            and p["basil"] == 1
            and p["dill"] == 2
            and p["chives"] < p["parsley"]
        ),
        4,
    ),
    "Seven skiers": (
        "ABCDEFG",
        lambda p: (
            p["C"] == 0 and p["G"] == 6 and p["D"] == 2 and p["F"] == p["D"] - 1 and p["A"] == 5 and p["E"] < p["B"]
        ),
        4,
    ),
    "Seven towers": (
        "ABCFLOP",
        lambda p: p["O"] == 6 and p["F"] == 0 and p["C"] > p["A"] > p["P"] > p["B"] > p["L"],
        5,
    ),
}


def test_the_answers_of_orderings_follow_and_are_the_only_ones():
    tasks = [task for task in LOGIC_TASKS if task.startswith("logical_deduction")]
    shown = [example for task in tasks for example in exemplars.LOGIC[task]]
    assert len(shown) == len(ORDERS)
    for question, answer in shown:
        objects, holds, place = next(order for start, order in ORDERS.items() if question.startswith(start))
        orders = [dict(zip(order, range(9))) for order in itertools.permutations(objects)]
        there = {next(name for name in objects if p[name] == place) for p in orders if holds(p)}
        options = dict(re.findall(r"^(\([A-Z]\)) (?:The )?(?:jar of )?(\w+)", question, re.M))
        assert len(options) == len(objects) and len(there) == 1
        assert options[answer].startswith(there.pop())


def test_the_answers_of_dates_are_right():
    days = [date(2023, 3, 17 - 2), date.fromordinal(date(2001, 1, 31).toordinal() + 7), date(2008, 6, 10 - 1)]
    for (question, answer), day in zip(exemplars.LOGIC["date_understanding"], days, strict=True):
        assert f"{answer} {day:%m/%d/%Y}\n" in question + "\n" and question.count(f"{day:%m/%d/%Y}") == 1
    assert date(2023, 3, 17).strftime("%A") == "Friday"


# Prompts


class Chat:
    """A tokenizer's chat template, as far as prompts need it."""

    chat_template = "one"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def prompter(name, tokenizer=None, **changes):
    return make_prompter(name, TaskConfig(**changes), tokenizer)


def test_questions_are_asked_as_usual():
    item = Item("a:1", "", "How many?", "So 3.\n#### 3", "3")
    assert prompter("gsm8k", shots=0).prompt(item) == "Question: How many?\nAnswer:"
    assert prompter("math", shots=0).prompt(item) == "Problem:\nHow many?\n\nSolution:"
    item = dataclasses.replace(item, task="web_of_lies")
    assert prompter("logic", shots=0).prompt(item) == "Q: How many?\nA:"
    (question, answer), *_ = exemplars.LOGIC["web_of_lies"]
    assert prompter("logic", shots=1).prompt(item) == f"Q: {question}\nA: {answer}\n\nQ: How many?\nA:"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_worked_examples_come_first_and_have_the_form_of_items(name):
    known = DEFINITIONS[name]
    for part in known.parts:
        item = Item("a:1", part, "Why?", "", "")
        whole = prompter(name).prompt(item)
        shown = (dict(gsm8k=exemplars.GSM8K, math=exemplars.MATH) | exemplars.LOGIC)[part or name][: known.shots]
        assert len(shown) == known.shots == dict(gsm8k=5, math=4, logic=3)[name]
        assert whole == "".join(f"{known.question.format(q)} {a}\n\n" for q, a in shown) + known.question.format("Why?")
        assert not any(stop in answer for _, answer in shown for stop in known.stop)


def test_examples_are_read_as_items_are(tmp_path):
    rows = [dict(question=q, answer=a) for q, a in exemplars.GSM8K]
    write_lines(tmp_path / "gsm8k.jsonl", rows)
    write_lines(tmp_path / "math.jsonl", [dict(problem=q, solution=a) for q, a in exemplars.MATH])
    for task in LOGIC_TASKS:
        write_lines(tmp_path / "logic" / f"{task}.jsonl", [dict(input=q, target=a) for q, a in exemplars.LOGIC[task]])
    assert [len(read(tmp_path, name, examples=n)) for name, n in (("gsm8k", 8), ("math", 5), ("logic", 18))] == [
        8,
        5,
        18,
    ]


def test_the_chat_template_holds_the_examples_as_turns():
    item = Item("a:1", "", "How many?", "", "")
    (question, answer), *_ = exemplars.GSM8K
    chat = prompter("gsm8k", Chat(), shots=1, chat_template=True)
    start = "<user>Solve the problem step by step. End with a line that holds '#### ' and the answer as a number.\n\n"
    assert chat.prompt(item) == f"{start}{question}<assistant>{answer}<user>How many?<assistant>"
    assert chat.delimiter == "" and prompter("gsm8k").delimiter == " "
    assert prompter("gsm8k", Chat(), shots=0, chat_template=True).prompt(item) == f"{start}How many?<assistant>"


def test_smollm2s_own_template():
    tokenizer = source.load_tokenizer(source.resolve(ModelConfig()))
    chat = prompter("logic", tokenizer, shots=0, chat_template=True)
    text = chat.prompt(Item("a:1", "web_of_lies", "Does it?", "", ""))
    assert (
        text.endswith("<|im_start|>assistant\n") and text.count("Answer with the right choice alone.\n\nDoes it?") == 1
    )
    assert chat.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_prompts_that_cannot_be_made_are_refused():
    with pytest.raises(UserError, match="shots=9: gsm8k has 8 worked examples; expected 0 to 8"):
        prompter("gsm8k", shots=9)
    with pytest.raises(UserError, match="tokenizer has no chat template"):
        prompter("gsm8k", object(), chat_template=True)


def test_no_worked_example_is_from_a_benchmark():
    if not DATA.is_dir():
        pytest.skip(f"real benchmarks are not in {DATA}; name their folder in SAEJAX_DATA")
    files = [DATA / "gsm8k" / "test.jsonl", *sorted((DATA / "logic").glob("*.jsonl"))]
    real = {value for path in files for line in path.open(encoding="utf-8") for value in json.loads(line).values()}
    own = {q for q, _ in (*exemplars.GSM8K, *itertools.chain(*exemplars.LOGIC.values()))}
    assert not own & real


# Numbers as choices


def test_gsm8k_as_choices(folder):
    items = read(folder, "gsm8k", examples=12, score="choice")
    assert len(items) == 12
    for item in items:
        assert item.answer == item.solution and item.choices.count(item.answer) == 1
        assert list(item.choices) == sorted(item.choices, key=int) and len(item.choices) == 4
    assert max(int(choice) / int(item.answer) for item in items for choice in item.choices) < 3, "of like size"
    assert [item.id for item in items] == [item.id for item in read(folder, "gsm8k", examples=12)]
    one = prompter("gsm8k", score="choice", shots=1)
    (question, _), *_ = exemplars.GSM8K
    assert one.prompt(items[0]) == f"Question: {question}\nAnswer: 6\n\nQuestion: {items[0].question}\nAnswer:"
    chat = prompter("gsm8k", Chat(), shots=0, chat_template=True, score="choice").prompt(items[0])
    assert chat.startswith("<user>Answer with a number alone.\n\n")


@pytest.mark.parametrize("equal", [1, 7])
def test_a_model_that_does_not_read_the_question_is_right_by_chance(equal):
    """Whatever numbers it prefers, over all questions it is exactly as often right as by guessing."""
    rng = np.random.default_rng(0)
    answers = [str(n) for n in np.repeat(rng.choice(9999, 41, replace=False), equal)]
    rng.shuffle(answers)
    choices = number_choices(answers)
    guessing = sum(1 / len(own) for own in choices)
    assert {len(own) for own in choices} <= {4, 5}
    for seed in range(5):
        liking = dict(zip(answers, np.random.default_rng(seed).normal(size=len(answers)), strict=True))
        right = sum(max(own, key=liking.__getitem__) == answer for own, answer in zip(choices, answers, strict=True))
        assert right == pytest.approx(guessing)


def test_numbers_are_written_alike():
    found = [plain_number(text, "") for text in ("1,250", "$3", "-7.", "2.50", "10", "1e3", "0.0")]
    assert found == ["1250", "3", "-7", "2.5", "10", "1000", "0"]
    for text in ("many", "nan", ""):
        with pytest.raises(UserError, match=r"test:3: the answer .* is no number: fix or remove the row"):
            plain_number(text, "test:3")
    with pytest.raises(UserError, match="too few questions have different answers"):
        number_choices(["3", "3", "3.0"])
    assert number_choices([]) == [] and number_choices(["2", "1"]) == [("1", "2")] * 2


@pytest.mark.skipif(not DATA.is_dir(), reason=f"real benchmarks are not in {DATA}; name their folder in SAEJAX_DATA")
def test_all_of_gsm8k_as_choices():
    items = read_items("gsm8k", TaskConfig(path=str(DATA / "gsm8k" / "test.jsonl"), examples=1319, score="choice"))
    assert {len(set(item.choices)) for item in items} <= {4, 5} and all(item.answer in item.choices for item in items)
    often = Counter(item.answer for item in items)
    right = sum(max(item.choices, key=lambda choice: (often[choice], choice)) == item.answer for item in items)
    assert right == pytest.approx(sum(1 / len(item.choices) for item in items)), "the commonest number is no cue"
