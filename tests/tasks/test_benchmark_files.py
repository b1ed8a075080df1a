"""Rows of benchmarks: every format gives the same ones, and what cannot be read is said in one line."""

import gzip
import json
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from benchmark_rows import GSM8K, LOGIC, MATH, write_all, write_lines

from saejax.errors import UserError
from saejax.tasks import hub as hub_module
from saejax.tasks.benchmark_definitions import DEFINITIONS, LOGIC_TASKS
from saejax.tasks.benchmark_files import Origin, find
from saejax.tasks.benchmarks import identity, origin, read_items, training_items
from saejax.tasks.settings import TaskConfig

ONE = ("",)


def fields(path):
    return [dict(row.fields) for row in Origin(files=find(str(path), "gsm8k", False, ONE)).rows()]


def test_every_format_gives_the_same_rows(tmp_path):
    table = pyarrow.Table.from_pylist(GSM8K)
    lines = write_lines(tmp_path / "a.jsonl", GSM8K)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(tmp_path / "file.arrow", table.schema) as file:
        file.write_table(table)
    with pyarrow.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as file:
        file.write_table(table)
    datasets.Dataset.from_list(GSM8K).save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "file.arrow", "stream.arrow", "saved"):
        assert fields(tmp_path / name) == GSM8K, name


def test_a_row_says_where_it_stands(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text("\n" + json.dumps(GSM8K[0]) + "\n\n" + json.dumps(GSM8K[1]))
    rows = list(Origin(files={"": (path,)}).rows())
    assert [row.name for row in rows] == ["test:2", "test:4"] and rows[1].where == f"{path}, line 4"


def test_places(tmp_path):
    root = write_all(tmp_path / "all")
    gsm8k = {"": (root / "gsm8k" / "test.jsonl",)}
    assert find(str(root), "gsm8k", True, ONE) == find(str(root), "gsm8k", False, ONE) == gsm8k
    assert find(str(root / "gsm8k"), "gsm8k", False, ONE) == find(str(gsm8k[""][0]), "gsm8k", False, ONE) == gsm8k
    assert find(str(root), "math", True, ONE) == {"": (root / "math.jsonl",)}
    logic = {task: (root / "logic" / f"{task}.jsonl",) for task in LOGIC_TASKS}
    assert find(str(root), "logic", True, LOGIC_TASKS) == logic
    assert find(str(root / "logic"), "logic", False, LOGIC_TASKS) == logic
    lies = root / "logic" / "web_of_lies.jsonl"
    assert find(str(lies), "logic", False, LOGIC_TASKS) == {"web_of_lies": (lies,)}
    assert find("openai/gsm8k", "gsm8k", False, ONE) is None
    for name in ("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"):
        write_lines(tmp_path / "splits" / name, GSM8K)
    assert find(str(tmp_path / "splits"), "gsm8k", False, ONE)[""][0].name == "test-00000-of-00001.jsonl"


@pytest.mark.parametrize(
    "path, benchmark, several, said",
    [
        ("missing.jsonl", "gsm8k", False, "missing.jsonl does not exist: expected a file .* a folder .* or the hub id"),
        ("./a/b", "gsm8k", False, "does not exist"),
        ("one/notes.md", "gsm8k", False, "unknown format: expected one of .jsonl"),
        ("two", "gsm8k", False, "two has 2 data files: expected one named test, or one alone"),
        ("empty", "gsm8k", False, "empty has 0 data files"),
        ("one", "math", True, "one has nothing named math"),
        ("one/gsm8k.jsonl", "gsm8k", True, "is one file, but several benchmarks were asked for"),
        ("one", "logic", False, "one has 0 files named logical_deduction_three_objects: expected one for each of"),
        ("one/gsm8k.jsonl", "logic", False, "not named after a task of logic"),
    ],
)
def test_bad_places_are_refused(tmp_path, monkeypatch, path, benchmark, several, said):
    monkeypatch.chdir(tmp_path)
    for name in ("one/gsm8k.jsonl", "two/a.jsonl", "two/b.jsonl"):
        write_lines(tmp_path / name, GSM8K)
    (tmp_path / "one" / "notes.md").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=said):
        find(path, benchmark, several, LOGIC_TASKS if benchmark == "logic" else ONE)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.jsonl", b'{"question": "a"\n', "a.jsonl, line 1 is not JSON"),
        ("a.jsonl", b'{"question": "a", "answer": "#### 1"}\n[1]\n', r"a.jsonl, line 2 is \[1\]: expected an object"),
        ("a.jsonl", b"\xff\xfe\n", "is not UTF-8 at byte 0"),
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 999, mtime=0)[:-9], "not a whole gzip file"),
        ("a.parquet", b"PAR1 and no more", "not a whole parquet file"),
        ("a.arrow", b"ARROW1 and no more", "not a whole arrow file"),
        ("a.arrow", b"", "not a whole arrow file"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        fields(tmp_path / name)


def shard(split, number=0, count=1):
    return f"{split}-{number:05d}-of-{count:05d}.parquet"


QUESTION, CHOICES = "Where do wet boots go?", ["oven", "doormat", "bookshelf"]
BOOTS = dict(id="a", question=QUESTION, question_concept="boot", answerKey="B")
BOOTS |= dict(choices=dict(label=["A", "B", "C"], text=CHOICES))
NUMBERED = BOOTS | dict(choices=dict(label=["1", "2", "3"], text=CHOICES), answerKey="2")
# Benchmarks as they are published: of each layout, the content of every file.
LAYOUTS = {
    "gsm8k snapshot": {
        f"{part}/{shard(split)}": rows
        for part, test in (("main", GSM8K), ("socratic", GSM8K[:1]))
        for split, rows in (("test", test), ("train", [dict(question="More?", answer="#### 5")]))
    },
    "gsm8k shards": {f"data/{shard('test', n, 3)}": GSM8K[4 * n : 4 * n + 4] for n in range(3)},
    "gsm8k array": {"test.json": GSM8K},
    "logic repository": {f"bbh/{task}.json": dict(canary="a", examples=rows) for task, rows in LOGIC.items()},
    "logic snapshot": {f"{task}/{shard('test')}": rows for task, rows in LOGIC.items()},
    "math subjects": {
        f"{subject}/{shard(split)}": rows
        for n, subject in enumerate(DEFINITIONS["math"].training[1])
        for split, rows in (("test", [*MATH[n : n + 1], *MATH[7:][: n == 0]]), ("train", MATH[n : n + 1]))
    },
    "math empty answer": {"test.jsonl": [row | dict(answer="") for row in MATH]},
    "math whole numbers": {"test.jsonl": [row | dict(answer=(n + 2) ** 2) for n, row in enumerate(MATH)]},
    "math null answer": {"test.jsonl": [row | dict(answer=None) for row in MATH]},
    "commonsense hub": {
        f"data/{shard('validation')}": [BOOTS, BOOTS], f"data/{shard('test')}": [BOOTS | dict(answerKey="")] * 2,
    },
    "commonsense numbers": {"ARC-Easy-Test.jsonl": [NUMBERED, NUMBERED]},
    "commonsense whole numbers": {"test.jsonl": [NUMBERED | dict(answerKey=2)] * 2},
    "logiqa hub": {
        f"data/{shard('test')}": [dict(context="It rains.", query=QUESTION, options=CHOICES, correct_option=1)] * 2
    },
    "logiqa letters": {"test.jsonl": [dict(context="It rains.", question=QUESTION, options=CHOICES, label="b")] * 2},
    "logiqa second": {
        "test.jsonl": [dict(text="It rains.", question=QUESTION, options=CHOICES, answer=1)] * 2,
        "ood_test.jsonl": [dict(text="It snows.", question=QUESTION, options=CHOICES, answer=1)] * 2,
    },
}  # fmt: skip


def publish(layout, root):
    if layout == "gsm8k saved":
        rows = datasets.Dataset.from_list(GSM8K)
        datasets.DatasetDict(test=rows, train=rows.select([0])).save_to_disk(root)
        return root
    for name, content in LAYOUTS[layout].items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
        elif path.suffix == ".jsonl":
            write_lines(path, content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
    (root / "README.md").write_text("a card")
    return root


@pytest.mark.parametrize("layout", ["gsm8k saved", *LAYOUTS])
def test_published_layouts_are_read(tmp_path, layout):
    root, name = publish(layout, tmp_path / "published"), layout.split()[0]
    count = dict(gsm8k=12, logic=15, math=8).get(name, 2)
    items = read_items(name, TaskConfig(benchmarks=(name,), path=str(root), examples=count))
    assert len({item.id for item in items}) == count, "every item has a name of its own"
    if name == "gsm8k":
        assert {item.question for item in items} == {row["question"] for row in GSM8K}
    elif name == "math":
        assert {item.answer for item in items} == {str(n * n) for n in range(2, 10)}
    elif name == "logic":
        expected = sorted((task, row["input"], row["target"]) for task, rows in LOGIC.items() for row in rows)
        assert sorted((item.task, item.question, item.answer) for item in items) == expected
    else:
        asked = f"{QUESTION}\nOptions:\n(A) oven\n(B) doormat\n(C) bookshelf"
        asked = asked if name == "commonsense" else f"It rains.\n{asked}"
        assert {(item.question, item.answer, item.choices) for item in items} == {(asked, "(B)", ("(A)", "(B)", "(C)"))}


def test_the_train_split_is_found_in_published_layouts(tmp_path):
    publish("math subjects", tmp_path / "subjects")
    task = TaskConfig(benchmarks=("math",), path=str(tmp_path / "subjects"), examples=1)
    assert len({item.question for item in training_items("math", task)}) >= 6, "those of all subjects"
    root = publish("gsm8k snapshot", tmp_path / "snapshot")
    left = training_items("gsm8k", TaskConfig(benchmarks=("gsm8k",), path=str(root), examples=1))
    assert left and all(item.question == "More?" for item in left)
    publish("gsm8k saved", tmp_path / "saved")
    with pytest.raises(UserError, match="all examples in .* are asked"):  # its only training question is asked
        training_items("gsm8k", TaskConfig(benchmarks=("gsm8k",), path=str(tmp_path / "saved"), examples=12))


def test_what_is_not_whole_is_refused(tmp_path):
    (publish("gsm8k shards", tmp_path / "shards") / "data" / shard("test", 1, 3)).unlink()
    publish("commonsense hub", tmp_path / "csqa")
    for damaged in ("null", '"text"'):
        (tmp_path / "value.json").write_text(damaged)
        with pytest.raises(UserError, match="value.json holds .*expected a list of objects"):
            read_items("gsm8k", TaskConfig(path=str(tmp_path / "value.json"), examples=1))
    (tmp_path / "half.json").write_text(json.dumps(GSM8K)[:-9])
    for message, name, path in [
        ("lacks 1 of 3 shards of test", "gsm8k", "shards"),
        ("half.json, line 1 is not JSON", "gsm8k", "half.json"),
        ("take a split whose answers are published", "commonsense", f"csqa/data/{shard('test')}"),
    ]:
        with pytest.raises(UserError, match=message):
            read_items(name, TaskConfig(benchmarks=(name,), path=str(tmp_path / path), examples=1))


@pytest.mark.parametrize(
    "name, fields, said",
    [
        ("commonsense", dict(choices=["a", None], answer=0), 'its options are .* expected a list of texts'),
        ("commonsense", dict(choices=[dict(label="A"), dict(label="B", text="b")]), "expected a list of texts"),
        ("commonsense", dict(options="a ) 38 , b ) 27", answer="a"), "expected a list of texts"),
        ("commonsense", dict(choices=5, answer="A"), "expected a list of texts"),
        ("commonsense", dict(choices=["a"], answer=0), "1 options .* expected 2 to 26"),
        ("commonsense", dict(choices=[*map(str, range(30))], answer=28), "30 options .* expected 2 to 26"),
        ("commonsense", dict(choices=dict(label=[*map(str, range(27))], text=["a"] * 27), answer=1), "27 options"),
        ("commonsense", dict(choices=dict(label=["A", "A"], text=["a", "b"]), answerKey="A"), "a label of its own"),
        ("commonsense", dict(choices=["a", "b", "c"], answer="²"), "which is not one of A, B, C"),
        ("commonsense", dict(choices=["a", "b"], answer=True), "the right answer is true, which"),
        ("math", dict(problem="a", solution="b", answer=[4]), "'answer' is .4.: expected text"),
    ],
)  # fmt: skip
def test_rows_that_mean_nothing_are_refused(tmp_path, name, fields, said):
    path = write_lines(tmp_path / "test.jsonl", [dict(question="Which?") | fields])
    with pytest.raises(UserError, match=f"line 1.*{said}"):
        read_items(name, TaskConfig(benchmarks=(name,), path=str(path), examples=1))


def test_a_pointer_of_git_lfs_is_no_file(tmp_path):
    for name in ("test.jsonl", "test.parquet"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:35\nsize 4\n")
        with pytest.raises(UserError, match="is a pointer of Git LFS, .* git lfs pull"):
            fields(tmp_path / name)


# The hub, which no test can reach


def test_without_a_network_the_way_out_is_said():
    with pytest.raises(UserError, match="openai/gsm8k .revision main. could not be .* local file instead") as error:
        read_items("gsm8k", TaskConfig())
    assert "\n" not in str(error.value)


@pytest.fixture
def hub(monkeypatch):
    """A hub of three data sets; calls are recorded."""
    calls = []
    tables = {
        "openai/gsm8k": {"main": GSM8K, "socratic": []},
        "me/copy": {"default": GSM8K[:6], "more": GSM8K[6:]},
        "me/bbh": {**LOGIC, "snarks": []},
    }

    def load(name, configuration, split, revision, streaming):
        calls.append((name, configuration, split, revision))
        return datasets.Dataset.from_list(tables[name][configuration])

    def info(self, name, revision):
        return SimpleNamespace(sha=f"commit of {revision}")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    hub_module.hub_commit.cache_clear()
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name, revision: list(tables[name]))
    yield calls
    hub_module.hub_commit.cache_clear()  # the commits of this hub


def test_the_hub_is_asked_for_the_test_split_at_the_revision(hub):
    items = read_items("gsm8k", TaskConfig(examples=12, path="openai/gsm8k@abc"))
    assert hub == [("openai/gsm8k", "main", "test", "commit of abc")]
    assert {item.question for item in items} == {row["question"] for row in GSM8K}
    assert sorted(int(item.id.removeprefix("main:")) for item in items) == list(range(1, 13))


def test_another_data_set_is_read_with_all_its_configurations(hub):
    assert len(read_items("gsm8k", TaskConfig(path="me/copy", examples=12))) == 12
    assert len(read_items("logic", TaskConfig(path="me/bbh", examples=15))) == 15
    assert [call[1] for call in hub] == ["default", "more", *LOGIC_TASKS]
    absent = "openai/gsm8k has no configuration logical_deduction_three_objects, .* only main"
    with pytest.raises(UserError, match=absent):
        origin("logic", TaskConfig(path="openai/gsm8k"))


def test_identity_is_of_the_content(tmp_path, hub, monkeypatch):
    a = write_lines(tmp_path / "a.jsonl", GSM8K)
    copy = write_lines(tmp_path / "other" / "b.jsonl", GSM8K)
    mark = identity("gsm8k", TaskConfig(path=str(a)))
    assert len(mark) == 16 and identity("gsm8k", TaskConfig(path=str(copy))) == mark
    write_lines(copy, GSM8K[1:])
    assert identity("gsm8k", TaskConfig(path=str(copy))) != mark
    hubs = [TaskConfig(), TaskConfig(path="openai/gsm8k@abc"), TaskConfig(path="me/copy")]
    assert len({identity("gsm8k", task) for task in hubs} | {mark}) == 4
    assert not hub, "nothing is fetched for it"
    # A data set that moved on is another.
    before = identity("gsm8k", TaskConfig())
    hub_module.hub_commit.cache_clear()
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **more: SimpleNamespace(sha="0" * 40))
    assert identity("gsm8k", TaskConfig()) != before
    assert identity("gsm8k", TaskConfig(path="openai/gsm8k@" + "0" * 40)) == identity("gsm8k", TaskConfig()), (
        "a branch is its commit"
    )


def test_without_the_hub_the_commit_is_that_of_the_last_fetch_and_retries_are_quiet(tmp_path, monkeypatch):
    huggingface_hub.utils.logging.set_verbosity_warning()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub_module.hub_commit.cache_clear()
    with pytest.raises(UserError, match="commit of the data set me/never .* could not be found"):
        hub_module.hub_commit("me/never", "main")
    ref = tmp_path / "datasets--me--once" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text("1" * 40)
    assert hub_module.hub_commit("me/once", "main") == "1" * 40
    assert hub_module._fetched("a/b", "main", lambda: 3) == 3
    assert huggingface_hub.utils.logging.get_verbosity() == huggingface_hub.utils.logging.ERROR


def test_a_data_set_that_is_a_program_is_refused_in_one_line(hub, monkeypatch):
    def load(*args, **more):
        raise RuntimeError("Dataset scripts are no longer supported, but found copy.py")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match="could not be read from the hub .Dataset scripts .* local file instead"):
        read_items("gsm8k", TaskConfig())
