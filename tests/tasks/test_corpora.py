"""Reading, identity and split of text, and what the embedded corpus promises."""

import collections
import gzip
import json
import re

import pytest

from saejax.errors import UserError
from saejax.models import identity as hashes
from saejax.tasks import text_sources
from saejax.tasks.corpora import Document, identity, read_corpus, split
from saejax.tasks.settings import CorpusConfig
from saejax.tasks.text_sources import EMBEDDED


@pytest.fixture(scope="module")
def embedded() -> list[Document]:
    return read_corpus(CorpusConfig())


def written(tmp_path, content: str | bytes, name="text.jsonl") -> CorpusConfig:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return CorpusConfig(path=str(path))


def made(*groups: str, length=10) -> list[Document]:
    return [Document(f"{index:0{length}d}", group, index) for index, group in enumerate(groups)]


def groups_of(documents) -> set[str]:
    return {document.group for document in documents}


def kinds_of(documents) -> set[str]:
    return {group.split("/")[0] for group in groups_of(documents)}


def characters(documents) -> int:
    return sum(len(document.text) for document in documents)


def test_the_embedded_corpus_is_large_varied_and_clean(embedded):
    # SmolLM2's tokenizer cuts text into at least these pieces before it forms tokens, which never span two.
    piece = re.compile(r"'(?:s|t|re|ve|m|ll|d)\b|[^\W\d_]+|\d|(?:[^\w\s]|_)+")
    assert sum(len(piece.findall(document.text)) for document in embedded) > 250_000
    assert len(groups_of(embedded)) >= 100 and len(kinds_of(embedded)) >= 12
    assert EMBEDDED.stat().st_size < 1_000_000
    assert EMBEDDED.read_bytes()[4:8] == bytes(4)  # no time stamp: the bytes depend on the content alone
    sizes = collections.Counter()
    for document in embedded:
        sizes[document.group] += len(document.text)
    # No group gives more than 1 %. The limit was met in tokens; characters per token differ from group to group.
    assert max(sizes.values()) / sizes.total() < 0.013
    texts = [document.text for document in embedded]
    assert len(set(texts)) == len(texts)
    assert not [text for text in texts if "<|" in text or "\ufffd" in text]
    assert all(character.isprintable() or character.isspace() for text in texts for character in text)


def test_the_embedded_split_has_every_kind_on_both_sides(embedded):
    train, held_out = split(embedded, 0.1, seed=789)
    assert kinds_of(train) == kinds_of(held_out) == kinds_of(embedded)
    assert not groups_of(train) & groups_of(held_out)
    assert characters(held_out) / characters(embedded) == pytest.approx(0.1, abs=0.015)


def test_json_lines_with_and_without_groups(tmp_path):
    lines = [{"text": "Ein schöner Tag, 日本 🙂", "group": "a/1", "more": 3}, {"text": "line\u2028separator"}]
    content = "\n" + "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\r\n\n"
    expected = [Document("Ein schöner Tag, 日本 🙂", "a/1", 0), Document("line\u2028separator", "document-1", 1)]
    assert read_corpus(written(tmp_path, content)) == expected
    assert read_corpus(written(tmp_path, gzip.compress(content.encode()), "text.jsonl.gz")) == expected
    assert read_corpus(written(tmp_path, b"\xef\xbb\xbf" + content.encode())) == expected


def test_text_documents_are_separated_by_blank_lines(tmp_path):
    config = written(tmp_path, "\n\none\r\nstill one\r\n  \r\n\ntwo — zwei\n\t\nthree", "text.txt")
    documents = read_corpus(config)
    assert [document.text for document in documents] == ["one\nstill one", "two — zwei", "three"]
    assert len(groups_of(documents)) == 3


GOOD = '{"text": "good"}\n'
# Without the time: workers that begin in different seconds would collect tests of different names.
PACKED = gzip.compress(GOOD.encode() * 50, mtime=0)
DAMAGED = bytearray(gzip.compress("".join(f"{i * i}\n" for i in range(500)).encode(), mtime=0))
DAMAGED[len(DAMAGED) // 2] ^= 0xFF


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD + "{text: 1}", "a.jsonl.* line 2 is not JSON.* expected"),
        ("a.jsonl", GOOD + '{"txt": "a"}', "a.jsonl.* line 2 has no field 'text'.* expected"),
        ("a.jsonl", GOOD + '["a"]', "line 2 has no field 'text'"),
        ("a.jsonl", '[\n  {"text": "a"}\n]', "a.jsonl, line 1 is not JSON Lines, but begins an array: expected"),
        ("a.jsonl", '{"text": 3}', "a.jsonl.* line 1: 'text' is 3: expected"),
        ("a.jsonl", '{"text": " \\n"}', "line 1: 'text' is"),
        ("a.jsonl", '{"text": null}', "line 1: 'text' is null"),
        ("a.jsonl", '{"text": "a", "group": 7}', "a.jsonl.* line 1: 'group' is 7: expected"),
        ("a.jsonl", '{"text": "a", "group": ""}', "line 1: 'group' is"),
        ("a.jsonl", '{"text": "\\ud83d"}', "line 1: 'text' has an unpaired surrogate"),
        ("a.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", "", "a.jsonl holds no document.* expected"),
        ("a.jsonl", "\n \n", "holds no document"),
        ("a.jsonl", '{"text": "sch\xf6n"}'.encode("latin-1"), "a.jsonl.* not UTF-8 at byte 13"),
        ("text.txt", b"\n\n  \n", "holds no document"),
        ("text.txt", "Ein Text.".encode("utf-16-le"), "text.txt has many zero bytes, as UTF-16 does: expected"),
        ("text.jsonl.gz", b"", "holds no document"),  # of an empty file, Python's gzip makes empty content
        ("text.jsonl.gz", PACKED[:5], "not a whole gzip file"),
        ("text.jsonl.gz", PACKED[:30], "not a whole gzip file"),
        ("text.jsonl.gz", PACKED[:-1], "not a whole gzip file"),
        ("text.jsonl.gz", bytes(DAMAGED), "not a whole gzip file"),
        ("text.jsonl.gz", GOOD.encode(), "not a whole gzip file"),
        ("a.parquet", b"PAR1 and no more", "not a whole parquet file"),
        ("a.csv", b"a", "expected one of"),
        ("none.txt", None, "does not exist"),
        ("folder.txt", None, "cannot be read"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / "folder.txt").mkdir()
    config = written(tmp_path, content, name) if content is not None else CorpusConfig(path=str(tmp_path / name))
    with pytest.raises(UserError, match=message):
        read_corpus(config)
    if "gzip" in message:
        with pytest.raises(UserError, match=message):
            identity(config)


def test_all_bad_lines_are_told_at_once(tmp_path):
    """Of a file of another kind the first alone, so that no gigabytes are read in vain."""
    content = GOOD + '{"text": ""}\n' + GOOD + "{\n" + '{"text": ""}\n'
    line = "3 lines of those read hold no text: line 2: 'text' is .*; line 4 is not JSON: .*; and so in the line 5$"
    with pytest.raises(UserError, match=line):
        read_corpus(written(tmp_path, content))
    with pytest.raises(UserError, match="20 lines of those read .* lines 2, .*, 20$"):
        read_corpus(written(tmp_path, '{"txt": "a"}\n' * 1000))


def test_identity_follows_content_and_not_packing_or_path(tmp_path):
    plain = identity(written(tmp_path, GOOD))
    assert len(plain) == 16 and int(plain, 16) >= 0
    assert identity(written(tmp_path, gzip.compress(GOOD.encode()), "other.jsonl.gz")) == plain
    assert identity(written(tmp_path, GOOD + "\n", "other.jsonl")) != plain
    assert identity(written(tmp_path, GOOD, "other.txt")) != plain


def test_a_large_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    """Every command and process asks for the hash, and reading a corpus takes minutes."""
    read, hash_file = [], text_sources._hash
    monkeypatch.setattr(text_sources, "_hash", lambda *of: read.append(of) or hash_file(*of))
    monkeypatch.setattr(hashes, "_HASHED_AT_ONCE", 0)
    monkeypatch.setenv("SAEJAX_CACHE", str(tmp_path / "cache"))
    config = written(tmp_path, GOOD)
    assert identity(config) == identity(config) and len(read) == 1
    before = identity(config)
    assert identity(written(tmp_path, GOOD + "\n")) != before and len(read) == 2


def test_the_split_is_decided_by_the_seed():
    documents = made(*(f"{kind}/{number}" for kind in "abc" for number in range(20) for _ in range(3)))
    first = split(documents, 0.2, seed=1)
    assert split(documents, 0.2, seed=1) == first
    assert split(list(reversed(documents)), 0.2, seed=1) == tuple(list(reversed(side)) for side in first)
    assert all(split(documents, 0.2, seed=seed)[1] != first[1] for seed in range(2, 8))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.33, 0.5])
def test_the_split_keeps_groups_whole_and_meets_the_share(share):
    documents = made(*(f"{kind}/{number % 25}" for kind in "abcdef" for number in range(100)))
    train, held_out = split(documents, share, seed=3)
    assert sorted(train + held_out, key=lambda document: document.index) == documents
    assert not groups_of(train) & groups_of(held_out) and kinds_of(train) == kinds_of(held_out)
    assert len(held_out) / len(documents) == pytest.approx(max(share, 1 / 25), abs=1 / 150)
    assert [document.index for document in held_out] == sorted(document.index for document in held_out)


@pytest.mark.parametrize(
    "groups", [("a", "b"), ("a/0", "b/0"), ("a/0", "a/1"), ("a/0", "a/0", "b/0"), ("a/0", "b", "c/2")]
)
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_both_sides_of_a_small_split_hold_something(groups, share):
    assert all(all(split(made(*groups), share, seed)) for seed in range(5))


def test_every_kind_of_two_groups_is_on_both_sides_whatever_the_share():
    documents = made("a/0", "a/1", "b/0", "b/1", "c/0", "c/1", "c/2")
    for share in (0.01, 0.5, 0.99):
        assert [kinds_of(side) for side in split(documents, share, seed=4)] == [{"a", "b", "c"}] * 2
    without_kinds = made(*(f"document-{number}" for number in range(50)))
    assert [len(side) for side in split(without_kinds, 0.1, seed=0)] == [45, 5]


def test_a_large_group_neither_swallows_the_share_nor_is_held_out_for_its_kind():
    documents = made(*(f"a/{number}" for number in range(20)), *(f"b/{number}" for number in range(1000)))
    documents.append(Document("x" * 5000, "a/20", len(documents)))
    few = [*made("a/0", "a/1", "a/2"), Document("x" * 1000, "a/3", 3)]
    for seed in range(20):
        held_out = split(documents, 0.1, seed)[1]
        assert characters(held_out) / characters(documents) == pytest.approx(0.1, abs=0.001)
        assert [len(document.text) for document in split(few, 0.001, seed)[1]] == [10]


@pytest.mark.parametrize("groups", [(), ("a/0",), ("a/0", "a/0")])
def test_what_cannot_be_split(groups):
    with pytest.raises(UserError, match="expected at least 2 groups"):
        split(made(*groups), 0.1, seed=0)
