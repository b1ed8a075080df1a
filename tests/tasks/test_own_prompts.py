"""Behaviours of the user's own, from a file."""

import gzip
import json
import re

import pytest

from saejax.errors import UserError
from saejax.runner import command
from saejax.tasks.behaviours import read_prompts, write_prompts
from saejax.tasks.own_prompts import identity, read_own_prompts
from saejax.tasks.settings import TaskConfig

LINES = [
    dict(behaviour="plural", text=f"{number}", correct=" cats", wrong=" dogs", counterpart="One")
    for number in ("Two", "Three", "Four", "Five", "Six", "Seven")
]
SPLIT = [dict(line, split="test" if i < 2 else "train") for i, line in enumerate(LINES)]


def letters(text, verbose=False, add_special_tokens=True):
    """A tokenizer of letters, of those that begin a word with the space before it."""
    return dict(input_ids=[hash(piece) for piece in re.findall(r"\\.*| \w|.", text)])


@pytest.fixture
def read(tmp_path):
    def read(lines, name="own.jsonl", **changes):
        path = tmp_path / name
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        task = TaskConfig(**dict(train_prompts=3, test_prompts=2, prompts=str(path)) | changes)
        return read_own_prompts(task, letters)

    return read


@pytest.mark.parametrize("name", ["own.jsonl", "own.jsonl.gz"])
def test_given_splits_are_kept(read, name):
    prompts = read(SPLIT, name)["plural"]
    assert [prompt.split for prompt in prompts] == ["train"] * 4 + ["test"] * 2
    assert [prompt.text for prompt in prompts] == ["Four", "Five", "Six", "Seven", "Two", "Three"]
    assert (prompts[0].counterpart, prompts[0].counterpart_correct, prompts[0].items) == ("One", " dogs", ())


def test_splits_are_drawn_by_seed_where_none_is_given(read):
    first, again, reseeded = read(LINES)["plural"], read(LINES)["plural"], read(LINES, seed=7)["plural"]
    assert first == again != reseeded
    assert [prompt.split for prompt in first] == ["train"] * 3 + ["test"] * 2
    assert len({prompt.text for prompt in first}) == 5


@pytest.mark.parametrize(("pairs", "train", "test", "apart"), [(20, 24, 16, 0), (20, 25, 14, 0), (20, 25, 15, 1)])
def test_a_prompt_and_the_one_that_turns_it_around_are_of_one_split(read, pairs, train, test, apart):
    lines = []
    for n in range(pairs):
        line = dict(behaviour="plural", text=f"one {n}", correct=" cat", wrong=" dogs", counterpart=f"two {n}")
        lines += [line, line | dict(text=f"two {n}", correct=" dogs", wrong=" cat", counterpart=f"one {n}")]
    for seed in range(5):
        found = read(lines, seed=seed, train_prompts=train, test_prompts=test)["plural"]
        sides = [{p.text.split()[1] for p in found if p.split == split} for split in ("train", "test")]
        assert len(sides[0] & sides[1]) == apart and [p.split for p in found] == ["train"] * train + ["test"] * test
        assert len({p.text for p in found}) == train + test


def test_a_counterpart_may_be_missing_a_template_be_named_and_a_text_hold_any_separator(read, tmp_path):
    line = {key: value for key, value in LINES[0].items() if key != "counterpart"}
    prompt = next(p for p in read([line, *LINES[1:5]])["plural"] if p.text == "Two")
    assert prompt.counterpart == prompt.counterpart_correct == prompt.template == ""
    lines = [dict(line, text=f"a\u2028b\x85 {line['text']}", template=f"t{i % 2}") for i, line in enumerate(LINES)]
    prompts = read(lines)["plural"]
    write_prompts(tmp_path / "prompts.jsonl", prompts)
    assert read_prompts(tmp_path / "prompts.jsonl") == prompts and {p.template for p in prompts} == {"t0", "t1"}


def test_the_identity_is_of_the_content(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(json.dumps(LINES[0]))
    a, b = (TaskConfig(prompts=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl"))
    assert identity(a) == identity(b) != identity(TaskConfig()) == "" and not read_own_prompts(TaskConfig(), letters)
    (tmp_path / "b.jsonl").write_text(json.dumps(LINES[1]))
    assert identity(a) != identity(b)
    with pytest.raises(UserError, match="--task.prompts=.*none.jsonl does not exist"):
        identity(TaskConfig(prompts=str(tmp_path / "none.jsonl")))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no prompts"),
        (["{"], "line 1 is not JSON"),
        ([*LINES, ["list"]], "line 7 lacks behaviour, text, correct, wrong"),
        ([[LINES[0]], *LINES], "line 1 is not JSON Lines, but begins an array: expected an object in each line"),
        ([dict(behaviour="plural", text="Two", correct=" cats")], "line 1 lacks wrong"),
        ([LINES[0] | dict(answer="x")], "line 1 has the unknown field 'answer'"),
        ([LINES[0] | dict(correct=" ")], "'correct' is \" \": expected a string that is not blank"),
        ([LINES[0] | dict(behaviour="复/数")], 'the behaviour "复/数" names files: use letters'),
        ([LINES[0] | dict(behaviour="b" * 300)], "bbb... names files: use letters, digits, '_' and '-', at most"),
        ([LINES[0] | dict(behaviour="..")], 'the behaviour ".." names files'),
        ([LINES[0] | dict(behaviour="a\x01")], "names files"),
        ([LINES[0] | dict(behaviour="a ")], "names files"),
        ([*LINES, LINES[0] | dict(behaviour="Plural", text="Six")], "has the behaviour 'Plural', and an earlier"),
        ([LINES[0] | dict(labels={"b" * 300: "c"})], "bbb... names files: use letters, digits and '_', at"),
        ([LINES[0] | dict(split="held_out")], "'split' is \"held_out\": expected train or test"),
        ([SPLIT[0], *LINES[1:]], "only some prompts of 'plural' have a 'split'"),
        (SPLIT[1:], "has 1 test prompt of 'plural': expected at least 2"),
        (LINES[:4], "has 4 prompts of 'plural', but 3 train and 2 test prompts were asked for"),
        ([line | dict(behaviour="Capital") for line in LINES], 'the name "Capital" is taken'),
        ([line | dict(behaviour="summary") for line in LINES], 'the name "summary" is taken'),
        ([line | dict(behaviour="index") for line in LINES], 'the name "index" is taken'),
        # The effects of held-out text stand in the table under this name.
        ([line | dict(behaviour="Text") for line in LINES], 'the name "Text" is taken'),
        ([*LINES, LINES[2]], "line 7 has the text of an earlier line of 'plural'"),
        ([line | dict(wrong=" cows") for line in LINES], r"line 1: 'Two' with .* begin with the same token"),
        ([*LINES[:3], LINES[3] | dict(counterpart="Four\\")], "line 4: 'Five' .*joined"),
        ([*LINES, LINES[0] | dict(text="Nine", counterpart="Nine")], "line 7: 'counterpart' is the text itself"),
        ([LINES[0] | dict(labels="yes")], 'is "yes"'),
        ([LINES[0] | dict(labels={"answer": "a"})], "none of"),
        ([LINES[0] | dict(labels={"a b": "c"})], "digits and '_'"),
        ([LINES[0] | dict(labels={"a": 1})], "'a' is 1"),
    ],
)
def test_bad_files(read, lines, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        read(lines)


def test_a_text_that_the_tokenizer_cannot_read_is_told_with_its_line(tmp_path, lm):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(LINES[0]) + "\n" + json.dumps(LINES[1] | dict(text="Six \ud800")))
    with pytest.raises(UserError, match=r"own.jsonl, line 2: the text 'Six .* has an unpaired surrogate"):
        read_own_prompts(TaskConfig(prompts=str(path)), lm.tokenizer)


def test_all_bad_lines_are_listed_at_once(read):
    bad = [dict(LINES[0], answer="x"), dict(LINES[1], correct=" dogs"), LINES[2], ["list"]]
    with pytest.raises(UserError, match="own.jsonl: 4 lines are no prompts: line 1 has the unknown field") as raised:
        read([*bad[:2], *LINES[2:], *bad[2:]])
    message = str(raised.value)
    assert "\n" not in message and all(f"line {number}" in message for number in (1, 2, 7, 8))
    # A fault that many lines have is told once, and a message does not name thousands of lines.
    with pytest.raises(UserError, match="30 lines are no prompts: line 1 lacks .*; and so in the lines 2, 3, .*, 30$"):
        read([0] * 30)
    with pytest.raises(UserError, match="25 lines are no prompts: line 1 has .*; and so in the lines 21, 22, .*, 25$"):
        read([LINES[0] | {f"field {n}": "x"} for n in range(25)])
    with pytest.raises(UserError, match="lines 2, 3, .*, 101 and 1,899 more$"):
        read([0] * 2000)
    mixed = [LINES[0] | dict(split="train"), LINES[1], *([line | dict(behaviour="other") for line in LINES[:2]])]
    with pytest.raises(UserError, match="2 behaviours cannot be tested: only some .*'plural'.*'other'"):
        read(mixed)


def test_bad_files_end_a_run_before_a_model_is_looked_for(tmp_path, capsys):
    file = tmp_path / "own.jsonl"
    file.write_text('{"behaviour": "plural"}\n{\n')
    flags = [f"--workdir={tmp_path / 'run'}", "--model.path=./nowhere", "--task.behaviours=", f"--task.prompts={file}"]
    assert command.run(["baseline", "preflight"], "", ["program", *flags]) == 2
    error = capsys.readouterr().err
    assert "2 lines are no prompts: line 1 lacks text, correct, wrong" in error and "; line 2 is not JSON" in error
