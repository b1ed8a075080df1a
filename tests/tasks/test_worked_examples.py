"""Worked examples: their answers are right, and they stand before the questions as they should."""

import dataclasses
import itertools
import json
import re
from datetime import date

import pytest
from benchmark_rows import DATA, NEEDS_DATA, Chat, prompter, read, write_lines

from saejax.errors import UserError
from saejax.models import source
from saejax.models.settings import ModelConfig
from saejax.stages.baseline import plan as planned
from saejax.tasks.answers import last_boxed
from saejax.tasks.benchmark_definitions import DEFINITIONS, LOGIC_TASKS, Item
from saejax.tasks.benchmark_prompts import worked_examples
from saejax.tasks.settings import BENCHMARKS, TaskConfig


def test_the_calculations_of_gsm8k_examples_are_right():
    for _, solution in worked_examples()["gsm8k"]:
        steps = re.findall(r"<<([0-9.*/+-]+)=([0-9.]+)>>([0-9]+)", solution)
        assert steps and solution.count("<<") == len(steps)
        for calculation, result, repeated in steps:
            assert eval(calculation) == float(result) and result == repeated
        assert solution.endswith(f"#### {steps[-1][1]}")


def test_the_answers_of_math_examples_are_right():
    answers = [last_boxed(solution) for _, solution in worked_examples()["math"]]
    roots = [x for x in range(1, 100) if x * x - 3 * x == 28]
    throws = list(itertools.product("HT", "HT", range(1, 7)))
    share = sum(throw[:2] == ("H", "H") and throw[2] < 3 for throw in throws), len(throws)
    assert answers[:4] == [str(roots[0]), r"\frac{1}{12}", "5", str(2**10 % 7)] and share[1] == 12 * share[0]
    assert 5 + 4 * 5 == 5**2
    assert answers[4] == "3a - 3" and all((a * a - 9) / (a + 3) + 2 * a == 3 * a - 3 for a in range(1, 9))


def test_the_answers_of_true_and_false_examples_are_right():
    for question, answer in worked_examples()["boolean_expressions"]:
        assert str(eval(question.removesuffix(" is"))) == answer
    for question, answer in worked_examples()["web_of_lies"]:
        sentences = question.removeprefix("Question: ").split(". ")
        truthful = {sentences[0].split()[0]: "tells the truth" in sentences[0]}
        for speaker, subject, claim in (re.fullmatch(r"(\w+) says (\w+) (.+)", s).groups() for s in sentences[1:-1]):
            truthful[speaker] = truthful[subject] == (claim == "tells the truth")
        asked = re.fullmatch(r"Does (\w+) tell the truth\?", sentences[-1])[1]
        assert answer == ("Yes" if truthful[asked] else "No")


# What each example of an ordering says, as a condition on places (0 is left, first, cheapest or lowest): the objects by
# their initials, or by as many letters as tell them apart, the condition, and the place that is asked for.
ORDERS = {
    "Three jars": ("h s r", "r < s < h", 0),
    "Three runners": ("O P R", "P < R < O", 1),
    "Three lamps": ("d f w", "f == 2 and w > d", 0),
    "Five books": ("red blu gre whi bla", "whi == 0 and bla == 4 and red == 1 and gre < blu", 2),
    "Five boats": ("H O S T W", "T == 1 and H == 4 and W < T and O > S", 3),
    "Five cheeses": ("B C E F G", "E == 4 and F == 0 and B > C and G > B", 3),
    "Seven pots": ("b c d m p s t", "m == 0 and t == 6 and s == 3 and b == 1 and d == 2 and c < p", 4),
    "Seven skiers": ("A B C D E F G", "C == 0 and G == 6 and D == 2 and F == D - 1 and A == 5 and E < B", 4),
    "Seven towers": ("A B C F L O P", "O == 6 and F == 0 and C > A > P > B > L", 5),
}


def test_the_answers_of_orderings_follow_and_are_the_only_ones():
    tasks = [task for task in LOGIC_TASKS if task.startswith("logical_deduction")]
    shown = [example for task in tasks for example in worked_examples()[task]]
    assert len(shown) == len(ORDERS)
    for question, answer in shown:
        objects, condition, place = next(order for start, order in ORDERS.items() if question.startswith(start))
        objects, condition = objects.split(), compile(condition, "<order>", "eval")
        orders = itertools.permutations(objects)
        there = {order[place] for order in orders if eval(condition, dict(zip(order, range(9))))}
        options = dict(re.findall(r"^(\([A-Z]\)) (?:The )?(?:jar of )?(\w+)", question, re.M))
        assert len(options) == len(objects) and len(there) == 1
        assert options[answer].startswith(there.pop())


def test_the_answers_of_dates_are_right():
    days = [date(2023, 3, 17 - 2), date.fromordinal(date(2001, 1, 31).toordinal() + 7), date(2008, 6, 10 - 1)]
    for (question, answer), day in zip(worked_examples()["date_understanding"], days, strict=True):
        assert f"{answer} {day:%m/%d/%Y}\n" in question + "\n" and question.count(f"{day:%m/%d/%Y}") == 1
    assert date(2023, 3, 17).strftime("%A") == "Friday"


def test_questions_are_asked_as_usual():
    item = Item("a:1", "", "How many?", "So 3.\n#### 3", "3")
    assert prompter("gsm8k", shots=0).prompt(item) == "Question: How many?\nAnswer:"
    assert prompter("math", shots=0).prompt(item) == "Problem:\nHow many?\n\nSolution:"
    item = dataclasses.replace(item, task="web_of_lies")
    assert prompter("logic", shots=0).prompt(item) == "Q: How many?\nA:"
    (question, answer), *_ = worked_examples()["web_of_lies"]
    assert prompter("logic", shots=1).prompt(item) == f"Q: {question}\nA: {answer}\n\nQ: How many?\nA:"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_worked_examples_come_first_and_have_the_form_of_items(name):
    known = DEFINITIONS[name]
    for part in known.parts:
        item = Item("a:1", part, "Why?", "", "")
        whole = prompter(name).prompt(item)
        shown = worked_examples()[part or name][: known.shots]
        assert len(shown) == known.shots == dict(gsm8k=5, math=4).get(name, 3)
        assert whole == "".join(f"{known.question.format(q)} {a}\n\n" for q, a in shown) + known.question.format("Why?")
        assert not any(stop in answer for _, answer in shown for stop in known.stop)


def test_examples_are_read_as_items_are(tmp_path):
    rows = [dict(question=q, answer=a) for q, a in worked_examples()["gsm8k"]]
    write_lines(tmp_path / "gsm8k.jsonl", rows)
    write_lines(tmp_path / "math.jsonl", [dict(problem=q, solution=a) for q, a in worked_examples()["math"]])
    for task in LOGIC_TASKS:
        write_lines(tmp_path / "logic" / f"{task}.jsonl", [dict(input=q, target=a) for q, a in worked_examples()[task]])
    counts = dict(gsm8k=8, math=5, logic=18)
    assert {name: len(read(tmp_path, name, examples=count)) for name, count in counts.items()} == counts


def test_the_chat_template_holds_the_examples_as_turns():
    item = Item("a:1", "", "How many?", "", "")
    (question, answer), *_ = worked_examples()["gsm8k"]
    chat = prompter("gsm8k", Chat(), shots=1, chat_template=True)
    start = "<user>Solve the problem step by step. End with a line that holds '#### ' and the answer as a number.\n\n"
    assert chat.prompt(item) == f"{start}{question}<assistant>{answer}<user>How many?<assistant>"
    assert chat.delimiter == "" and prompter("gsm8k").delimiter == " "
    assert prompter("gsm8k", Chat(), shots=0, chat_template=True).prompt(item) == f"{start}How many?<assistant>"


def test_a_template_that_can_think_is_told_not_to():
    class Thinking(Chat):  # as Qwen3's
        chat_template = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"

        def apply_chat_template(self, messages, tokenize, add_generation_prompt, enable_thinking=True):
            text = super().apply_chat_template(messages, tokenize, add_generation_prompt)
            return text if enable_thinking else f"{text}<think></think>"

    chat = prompter("gsm8k", Thinking(), shots=0, chat_template=True)
    assert chat.prompt(Item("a:1", "", "How many?", "", "")).endswith("How many?<assistant><think></think>")


def test_smollm2s_own_template():
    tokenizer = source.load_tokenizer(source.resolve(ModelConfig()))
    chat = prompter("logic", tokenizer, shots=0, chat_template=True)
    text = chat.prompt(Item("a:1", "web_of_lies", "Does it?", "", ""))
    assert text.count("Answer with the right choice alone.\n\nDoes it?") == 1
    assert text.endswith("<|im_start|>assistant\n")
    assert chat.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(UserError, match="tokenizer has no chat template"):
        prompter("gsm8k", object(), chat_template=True)


@NEEDS_DATA
def test_no_worked_example_is_from_a_benchmark():
    files = [DATA / "gsm8k" / "test.jsonl", *sorted((DATA / "logic").glob("*.jsonl"))]
    real = {value for path in files for line in path.open(encoding="utf-8") for value in json.loads(line).values()}
    own = {q for q, _ in itertools.chain(*worked_examples().values())}
    assert not own & real


def test_preflight_takes_the_length_of_prompts_from_worked_examples():
    lengths = [planned.prompt_tokens("gsm8k", TaskConfig(shots=shots)) for shots in (0, 1, 5, -1)]
    assert 200 < lengths[0] < lengths[1] < lengths[2] == lengths[3] < 1024
