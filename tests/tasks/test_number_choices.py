"""Numbers to choose among: gsm8k as multiple choice."""

from collections import Counter

import numpy as np
import pytest
from benchmark_rows import DATA, NEEDS_DATA, Chat, prompter, read

from saejax.errors import UserError
from saejax.settings import TaskConfig
from saejax.tasks.benchmark_prompts import worked_examples
from saejax.tasks.benchmarks import read_items
from saejax.tasks.number_choices import number_choices, plain_number


def test_gsm8k_as_choices(folder):
    items = read(folder, "gsm8k", examples=12, score="choice")
    assert len(items) == 12
    for item in items:
        assert item.answer == item.solution and item.choices.count(item.answer) == 1
        assert list(item.choices) == sorted(item.choices, key=int) and len(item.choices) == 4
    assert max(int(choice) / int(item.answer) for item in items for choice in item.choices) < 3, "of like size"
    assert [item.id for item in items] == [item.id for item in read(folder, "gsm8k", examples=12)]
    one = prompter("gsm8k", score="choice", shots=1)
    (question, _), *_ = worked_examples()["gsm8k"]
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


@NEEDS_DATA
def test_all_of_gsm8k_as_choices():
    items = read_items("gsm8k", TaskConfig(path=str(DATA / "gsm8k" / "test.jsonl"), examples=1319, score="choice"))
    assert {len(set(item.choices)) for item in items} <= {4, 5} and all(item.answer in item.choices for item in items)
    often = Counter(item.answer for item in items)
    right = sum(max(item.choices, key=lambda choice: (often[choice], choice)) == item.answer for item in items)
    assert right == pytest.approx(sum(1 / len(item.choices) for item in items)), "the commonest number is no cue"
