"""Text from tables, patterns, the hub and benchmarks, and shares of several sources."""

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from benchmark_rows import GSM8K, write_lines
from huggingface_hub.errors import HTTPError

from saejax.activations.documents import make_documents
from saejax.errors import UserError
from saejax.tasks import text_sources
from saejax.tasks.benchmarks import read_items
from saejax.tasks.corpora import identity, is_held_out, read_corpus, split
from saejax.tasks.settings import CorpusConfig, TaskConfig

ROWS = [dict(text=f"Row {n} of a table.", group=f"table/{n % 5}") for n in range(20)]


def words(text, add_special_tokens=False, verbose=False):
    """A tokenizer: a token for each word."""
    ids = [[len(word) for word in each.split()] for each in ([text] if isinstance(text, str) else text)]
    return dict(input_ids=ids[0] if isinstance(text, str) else ids)


def texts(path, task=None, **settings):
    return [document.text for document in read_corpus(CorpusConfig(path=str(path), **settings), task)]


def test_tables_give_what_lines_give(tmp_path):
    lines, table = write_lines(tmp_path / "a.jsonl", ROWS), tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), table)
    assert read_corpus(CorpusConfig(path=str(table))) == read_corpus(CorpusConfig(path=str(lines)))


def test_of_a_table_only_texts_that_are_not_blank_are_read(tmp_path):
    """Data sets made line by line have blank rows; other columns may hold what Python cannot, or much of it."""
    text, late = pyarrow.array(["a", "", "b", " \n"]), pyarrow.array([2**62] * 4, pyarrow.timestamp("us"))
    table, file = pyarrow.table(dict(text=text, date=late)), tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, file)
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert texts(file) == texts(tmp_path / "a.arrow") == ["a", "b"]
    with pytest.raises(UserError, match="a.parquet is not a whole parquet file .date value out of range"):
        texts(file, field="date")
    pyarrow.parquet.write_table(pyarrow.table(dict(content=text, author=text)), file)
    with pytest.raises(UserError, match="row 1 has no field 'text', only 'content', 'author'"):
        texts(file)
    pyarrow.parquet.write_table(pyarrow.table(dict(text=pyarrow.array([b"\xff"]).view(pyarrow.string()))), file)
    with pytest.raises(UserError, match="a.parquet is not a whole parquet file .*can't decode"):
        texts(file)


def test_a_pattern_gives_all_its_files_and_a_field_its_column(tmp_path):
    for name in ("b", "a"):
        write_lines(tmp_path / f"{name}.jsonl", [dict(content=f"{name} {n}") for n in range(2)])
    pattern = tmp_path / "*.jsonl"
    assert texts(pattern, field="content") == ["a 0", "a 1", "b 0", "b 1"]
    with pytest.raises(UserError, match="a.jsonl: 2 lines .* line 1 has no field 'text', only .* --corpus.field names"):
        texts(pattern)
    with pytest.raises(UserError, match="matches no file"):
        texts(tmp_path / "*.txt")
    before = identity(CorpusConfig(path=str(pattern), field="content"))
    write_lines(tmp_path / "b.jsonl", [dict(content="other")])
    assert identity(CorpusConfig(path=str(pattern), field="content")) != before


def test_each_source_is_on_both_sides_of_the_split(tmp_path):
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", [row | dict(group=f"{name} {row['group']}") for row in ROWS])
    documents = read_corpus(CorpusConfig(path=str(tmp_path / "*.jsonl")))
    assert {document.group for document in documents} == {f"{name}/{name} table/{n}" for name in "ab" for n in range(5)}
    for side in split(documents, 0.2, seed=1):
        assert {document.source for document in side} == {0, 1}


@pytest.mark.parametrize("stream", [False, True])
def test_copies_and_groups_stand_on_one_side_whatever_the_files_that_hold_them(tmp_path, stream):
    def book(text):
        return f"book {int(text.split()[1]) % 10}" if text.startswith("piece") else text

    texts = [f"copy {n % 20}" for n in range(25)]
    for name, start in (("a", 0), ("b", 20)):
        pieces = [f"piece {n}" for n in range(start, start + 20)]
        rows = [dict(text=text) for text in texts] + [dict(text=text, group=book(text)) for text in pieces]
        write_lines(tmp_path / f"shard-{name}.jsonl", rows)
    for seed in range(3):
        config = CorpusConfig(path=str(tmp_path / "*.jsonl"), stream=stream, held_out=0.3, seed=seed)
        found = read_corpus(config)
        held_out = {d.index for d in found if is_held_out(d, config)} if stream else None
        held_out = held_out or {d.index for d in split(found, config.held_out, seed)[1]}
        sides = [{book(d.text) for d in found if (d.index in held_out) == side} for side in (False, True)]
        assert all(sides) and not sides[0] & sides[1] and len(found) == 90


def test_weights_are_shares_of_the_tokens(tmp_path):
    files = [write_lines(tmp_path / f"{name}.jsonl", [dict(text=f"{name} " * 50)] * 40) for name in ("x", "yy")]

    def documents(**settings):
        return make_documents(CorpusConfig(path=",".join(map(str, files)), **settings), words, context=256)

    found = documents(weights=(3, 1), max_tokens=1000, held_out=0.3)
    assert np.bincount(found.ids_T).tolist() == [0, 750, 250]
    with pytest.raises(UserError, match="more tokens than there are: source 1 1,000; lower"):
        documents(weights=(3, 1), max_tokens=4000)
    for wrong in (dict(weights=(1.0,), max_tokens=9), dict(weights=(1, 1)), dict(weights=(0, 0), max_tokens=9)):
        with pytest.raises(UserError, match="expected a weight for each of 2 sources"):
            documents(**wrong)


def test_a_data_set_in_the_hubs_layout_is_read_as_far_as_it_is_wanted(tmp_path, monkeypatch):
    (tmp_path / "set" / "data").mkdir(parents=True)
    rows = [dict(text=f"{n:04d} characters" if n != 3 else " ") for n in range(50)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(text_sources, "hub_commit", lambda hub, revision: revision)
    source = text_sources.hub_source(str(tmp_path / "set"), "", "main", "train", "text", most=15 * 10)
    assert [text for text, _ in source.texts()] == [row["text"] for row in rows[:11] if row["text"].strip()]
    wrong = text_sources.hub_source(str(tmp_path / "set"), "", "main", "train", "body", most=1)
    with pytest.raises(UserError, match="row 1 has no field 'body', only 'text'"):
        list(wrong.texts())


@pytest.mark.parametrize("error", [ConnectionError("Server Disconnected"), HTTPError("peer closed the connection")])
def test_a_data_set_whose_connection_breaks(monkeypatch, error):
    def rows():
        yield from (dict(text="one"), dict(text="two"))
        raise error

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows())
    monkeypatch.setattr(text_sources, "hub_commit", lambda hub, revision: revision)
    found = text_sources.hub_source("me/set", "", "main", "train", "text", most=0).texts()
    assert [next(found), next(found)] == [("one", ""), ("two", "")]
    with pytest.raises(UserError, match=rf"me/set \(revision main\) could not be read from the hub \({error}\): check"):
        next(found)


def test_addresses_of_the_hub(monkeypatch):
    monkeypatch.setattr(text_sources, "hub_source", lambda *read: read)
    for path, expected in {
        "hf://me/set": ("me/set", "", "main", "train"),
        "hf://me/set/part@abc:test": ("me/set", "part", "abc", "test"),
        "hf://me/set:train[:10%]": ("me/set", "", "main", "train[:10%]"),
    }.items():
        (source,) = text_sources.text_sources(CorpusConfig(path=path, max_tokens=10), TaskConfig())
        assert source[:4] == expected
    with pytest.raises(UserError, match="expected hf://ORG/NAME"):
        texts("hf://alone", max_tokens=5)
    with pytest.raises(UserError, match="takes --corpus.max_tokens"):
        texts("hf://me/set")


def test_a_benchmark_gives_its_train_split_or_what_is_not_asked(tmp_path, folder):
    write_lines(tmp_path / "gsm8k" / "test.jsonl", GSM8K)
    task = TaskConfig(path=str(tmp_path), examples=5, benchmarks=("gsm8k",))
    asked = {item.question for item in read_items("gsm8k", task)}
    left = [row for row in GSM8K if row["question"] not in asked]
    assert texts("gsm8k", task) == [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in left]
    config, before = CorpusConfig(path="gsm8k"), identity(CorpusConfig(path="gsm8k"), task)
    assert identity(config, TaskConfig(path=str(tmp_path), examples=5, seed=1)) != before
    # A train split; one of its questions is asked, too.
    train = [dict(GSM8K[0], question="How many legs has a spider?"), next(row for row in GSM8K if row not in left)]
    write_lines(tmp_path / "gsm8k" / "train.jsonl", train)
    assert texts("gsm8k", task) == [f"Question: {train[0]['question']}\nAnswer: {train[0]['answer']}"]
    assert identity(config, task) != before
    with pytest.raises(UserError, match="all examples in .* are asked, none is left"):
        texts("logic", TaskConfig(path=str(folder / "logic"), examples=15))
