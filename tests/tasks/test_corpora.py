"""Reading, identity and split of text, and what the embedded corpus promises."""

import collections
import gzip
import json
import re

import pytest

from saejax.errors import UserError
from saejax.settings import CorpusConfig
from saejax.tasks.corpora import Document, identity, read_corpus, split
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


def kind(group: str) -> str:
    return group.split("/")[0]


# The embedded corpus


def test_the_embedded_corpus_is_large_and_varied(embedded):
    # SmolLM2's tokenizer cuts text into at least these pieces before it forms tokens, which never span two.
    piece = re.compile(r"'(?:s|t|re|ve|m|ll|d)\b|[^\W\d_]+|\d|(?:[^\w\s]|_)+")
    assert sum(len(piece.findall(document.text)) for document in embedded) > 250_000
    groups = {document.group for document in embedded}
    assert len(groups) >= 100
    assert len({kind(group) for group in groups}) >= 12
    assert EMBEDDED.stat().st_size < 1_000_000


def test_no_group_gives_more_than_one_percent(embedded):
    sizes = collections.Counter()
    for document in embedded:
        sizes[document.group] += len(document.text)
    # The limit was met in tokens; characters per token differ from group to group.
    assert max(sizes.values()) / sizes.total() < 0.013


def test_the_embedded_texts_are_clean(embedded):
    texts = [document.text for document in embedded]
    assert len(set(texts)) == len(texts)
    assert not [text for text in texts if "<|" in text or "\ufffd" in text]
    assert all(character.isprintable() or character == "\n" or character.isspace() for t in texts for character in t)


def test_the_embedded_split_has_every_kind_on_both_sides(embedded):
    train, held_out = split(embedded, 0.1, seed=789)
    kinds = {kind(document.group) for document in embedded}
    assert {kind(document.group) for document in train} == {kind(document.group) for document in held_out} == kinds
    assert not {document.group for document in train} & {document.group for document in held_out}
    share = sum(len(d.text) for d in held_out) / sum(len(d.text) for d in embedded)
    assert share == pytest.approx(0.1, abs=0.015)


def test_packing_is_reproducible():
    """The file has no time stamp, so that its bytes depend on its content alone."""
    assert EMBEDDED.read_bytes()[4:8] == bytes(4)


# Reading


def test_json_lines_with_and_without_groups(tmp_path):
    lines = [{"text": "Ein schöner Tag, 日本 🙂", "group": "a/1", "more": 3}, {"text": "line\u2028separator"}]
    content = "\n" + "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\r\n\n"
    expected = [
        Document("Ein schöner Tag, 日本 🙂", "a/1", 0),
        Document("line\u2028separator", "document-1", 1),
    ]
    assert read_corpus(written(tmp_path, content)) == expected
    assert read_corpus(written(tmp_path, gzip.compress(content.encode()), "text.jsonl.gz")) == expected
    assert read_corpus(written(tmp_path, b"\xef\xbb\xbf" + content.encode())) == expected


def test_text_documents_are_separated_by_blank_lines(tmp_path):
    config = written(tmp_path, "\n\none\r\nstill one\r\n  \r\n\ntwo — zwei\n\t\nthree", "text.txt")
    documents = read_corpus(config)
    assert [document.text for document in documents] == ["one\nstill one", "two — zwei", "three"]
    assert len({document.group for document in documents}) == 3


GOOD = '{"text": "good"}\n'
BAD = {
    "not JSON": (GOOD + "{text: 1}", "line 2 is not JSON"),
    "no text": (GOOD + '{"txt": "a"}', "line 2 has no field 'text'"),
    "not an object": ('["a"]', "line 1 has no field 'text'"),
    "a number": ('{"text": 3}', "line 1: 'text' is 3"),
    "blank text": ('{"text": " \\n"}', "line 1: 'text' is"),
    "null": ('{"text": null}', "line 1: 'text' is null"),
    "group of a wrong type": ('{"text": "a", "group": 7}', "line 1: 'group' is 7"),
    "empty group": ('{"text": "a", "group": ""}', "line 1: 'group' is"),
    "half a surrogate pair": ('{"text": "\\ud83d"}', "line 1: 'text' holds half of a surrogate"),
    "nested beyond reason": ("[" * 100_000, "line 1 is not JSON"),
    "empty": ("", "holds no document"),
    "blank": ("\n \n", "holds no document"),
    "latin-1": ('{"text": "sch\xf6n"}'.encode("latin-1"), "not UTF-8 at byte 13"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_bad_json_lines(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as error:
        read_corpus(written(tmp_path, content))
    assert "text.jsonl" in str(error.value)
    assert "expected" in str(error.value)


def test_an_empty_text_file(tmp_path):
    with pytest.raises(UserError, match="holds no document"):
        read_corpus(written(tmp_path, "\n\n  \n", "text.txt"))


@pytest.mark.parametrize("keep", [0, 5, 30, -1])
def test_a_truncated_gzip_file(tmp_path, keep):
    config = written(tmp_path, gzip.compress(GOOD.encode() * 50)[:keep], "text.jsonl.gz")
    # Of an empty file, Python's gzip makes empty content.
    expected = "not a whole gzip file" if keep else "holds no document"
    with pytest.raises(UserError, match=expected):
        read_corpus(config)
    if keep:
        with pytest.raises(UserError, match=expected):
            identity(config)


def test_a_damaged_gzip_file(tmp_path):
    data = bytearray(gzip.compress("".join(f"{i * i}\n" for i in range(500)).encode()))
    data[len(data) // 2] ^= 0xFF
    for content in (bytes(data), GOOD.encode()):
        with pytest.raises(UserError, match="not a whole gzip file"):
            read_corpus(written(tmp_path, content, "text.jsonl.gz"))


def test_a_missing_file_a_folder_and_an_unknown_format(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    for name, message in {
        "none.txt": "does not exist",
        "folder.txt": "cannot be read",
        "a.csv": "expected one of",
    }.items():
        with pytest.raises(UserError, match=message):
            read_corpus(CorpusConfig(path=str(tmp_path / name)))


# Identity


def test_identity_follows_content_and_not_packing_or_path(tmp_path):
    plain = identity(written(tmp_path, GOOD))
    assert len(plain) == 16
    assert int(plain, 16) >= 0
    assert identity(written(tmp_path, gzip.compress(GOOD.encode()), "other.jsonl.gz")) == plain
    assert identity(written(tmp_path, GOOD + "\n", "other.jsonl")) != plain
    assert identity(written(tmp_path, GOOD, "other.txt")) != plain


# Split


def test_the_split_is_decided_by_the_seed():
    documents = made(*(f"{kind}/{number}" for kind in "abc" for number in range(20) for _ in range(3)))
    first = split(documents, 0.2, seed=1)
    assert split(documents, 0.2, seed=1) == first
    assert split(list(reversed(documents)), 0.2, seed=1) == tuple(list(reversed(side)) for side in first)
    reseeded = [split(documents, 0.2, seed=seed)[1] for seed in range(2, 8)]
    assert all(held_out != first[1] for held_out in reseeded)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.33, 0.5])
def test_the_split_keeps_groups_whole_and_meets_the_share(share):
    documents = made(*(f"{kind}/{number % 25}" for kind in "abcdef" for number in range(100)))
    train, held_out = split(documents, share, seed=3)
    assert sorted(train + held_out, key=lambda document: document.index) == documents
    assert not {document.group for document in train} & {document.group for document in held_out}
    assert {kind(document.group) for document in train} == {kind(document.group) for document in held_out}
    assert len(held_out) / len(documents) == pytest.approx(max(share, 1 / 25), abs=1 / 150)
    assert [document.index for document in held_out] == sorted(document.index for document in held_out)


def test_documents_without_kinds():
    documents = made(*(f"document-{number}" for number in range(50)))
    train, held_out = split(documents, 0.1, seed=0)
    assert (len(train), len(held_out)) == (45, 5)


@pytest.mark.parametrize(
    "groups", [("a", "b"), ("a/0", "b/0"), ("a/0", "a/1"), ("a/0", "a/0", "b/0"), ("a/0", "b", "c/2")]
)
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_both_sides_of_a_small_split_hold_something(groups, share):
    for seed in range(5):
        train, held_out = split(made(*groups), share, seed)
        assert train
        assert held_out


def test_a_large_group_does_not_swallow_the_share():
    documents = made(*(f"a/{number}" for number in range(20)), *(f"b/{number}" for number in range(1000)))
    documents.append(Document("x" * 5000, "a/20", len(documents)))
    for seed in range(20):
        _, held_out = split(documents, 0.1, seed)
        share = sum(len(d.text) for d in held_out) / sum(len(d.text) for d in documents)
        assert share == pytest.approx(0.1, abs=0.001)


def test_a_kind_that_must_be_held_out_gives_no_large_group():
    documents = [*made("a/0", "a/1", "a/2"), Document("x" * 1000, "a/3", 3)]
    for seed in range(20):
        _, held_out = split(documents, 0.001, seed)
        assert [len(document.text) for document in held_out] == [10]


def test_every_kind_of_two_groups_is_on_both_sides_whatever_the_share():
    documents = made("a/0", "a/1", "b/0", "b/1", "c/0", "c/1", "c/2")
    for share in (0.01, 0.5, 0.99):
        train, held_out = split(documents, share, seed=4)
        assert {kind(document.group) for document in train} == {"a", "b", "c"}
        assert {kind(document.group) for document in held_out} == {"a", "b", "c"}


@pytest.mark.parametrize("groups", [(), ("a/0",), ("a/0", "a/0")])
def test_what_cannot_be_split(groups):
    with pytest.raises(UserError, match="expected at least 2 groups"):
        split(made(*groups), 0.1, seed=0)
