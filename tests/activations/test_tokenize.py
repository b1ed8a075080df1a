"""Text that is read as a stream: the same documents as in memory, in an order of its own."""

import dataclasses
import gzip
import json
import tracemalloc

import numpy as np
import pytest

from saejax.activations.chunker import SPLITS, Chunker, TextPiece
from saejax.activations.documents import COLUMNS, Documents, make_documents
from saejax.activations.plan import Plan
from saejax.activations.request import read_request
from saejax.activations.settings import CaptureConfig
from saejax.config import Configs
from saejax.errors import Interrupted, UserError
from saejax.files import file_sha256
from saejax.models import identity, source
from saejax.models.settings import ModelConfig
from saejax.runner.workspace import Run
from saejax.stages.tokenize import run as tokenize
from saejax.stages.tokenize.run import run_tokenize, text_documents
from saejax.tasks import corpora
from saejax.tasks.corpora import Document
from saejax.tasks.settings import CorpusConfig, TaskConfig

TEXTS = [f"{name} number {n} is {n * 37 % 101} of them." * (1 + n % 9) for n in range(300) for name in ("Bird", "Fish")]


@pytest.fixture
def stream(inputs, tmp_path, monkeypatch):
    """Tokenizes texts as a stream; gives the run, its results and the documents."""

    def run(texts=TEXTS, name="tokenize", stopping=lambda: False, **settings):
        path = tmp_path / "text.jsonl.gz"
        with gzip.open(path, "wt") as file:
            file.write("\n".join(json.dumps(dict(text=text)) for text in texts))
        corpus = CorpusConfig(**dict(path=str(path), context=16, stream=True) | settings)
        capture = CaptureConfig(sites=("resid_post.0",))
        configs = Configs(ModelConfig(path=str(inputs[0])), corpus, TaskConfig(), capture)
        run = Run("tokenize", "", tmp_path / name, configs, {}, lambda line: None, stopping)
        results = run_tokenize(run)
        monkeypatch.setattr(tokenize, "load_results", lambda folder: results)
        return run, results, Documents.read(run.folder)

    return run


def contents(documents):
    return sorted(tuple(ids.tolist()) for ids in documents)


def test_a_stream_has_the_pieces_that_memory_has(stream):
    run, results, documents = stream()
    tokenizer = source.load_tokenizer(source.resolve(run.configs[ModelConfig]))
    in_memory = dataclasses.replace(run.configs[CorpusConfig], stream=False)
    assert contents(documents) == contents(make_documents(in_memory, tokenizer, 256))
    # Every document says what text it is of, and where in it.
    for number in (0, 17, len(documents) - 1):
        _, _, text, start = documents.table_Nx4[number].tolist()
        ids = tokenizer(TEXTS[text], add_special_tokens=False)["input_ids"]
        assert documents[number].tolist() == ids[start : start + 16]
    assert sum(results.tokens.values()) == documents.lengths_N.sum() == len(documents.ids_T)
    assert results.documents == {name: int((documents.split_N == i).sum()) for i, name in enumerate(SPLITS)}


def test_the_order_is_random_and_the_same_again(stream):
    _, _, documents = stream()
    assert (np.diff(documents.split_N) >= 0).all()  # the train split first, so that it can be had without a copy
    source_N = documents.column("source")[documents.split_N == 0]
    assert abs(np.corrcoef(np.arange(len(source_N)), source_N)[0, 1]) < 0.1
    assert len(set(np.diff(source_N))) > len(source_N) / 4  # pieces of one text do not follow one another
    again = stream(name="again")[2]
    assert all(np.array_equal(a, b) for a, b in zip(documents.arrays().values(), again.arrays().values(), strict=True))
    other_seed = stream(name="other", seed=3)[2]
    assert contents(other_seed) == contents(documents) and not np.array_equal(other_seed.starts_N, documents.starts_N)


def test_documents_are_shuffled_without_their_token_ids_in_memory(tmp_path):
    lengths_N = np.random.default_rng(0).integers(1, 16_384, 1_000)
    tracemalloc.start()
    with tokenize._open_whole(tmp_path / "ids.npy") as ids:
        writer = tokenize._DocumentsWriter(tmp_path, ids)
        for number, length in enumerate(lengths_N):
            writer.add(TextPiece(np.full(length, number, np.int32), number % 2, "", number, 0))
        writer.finish(seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    documents = Documents.read(tmp_path, ())
    assert peak < documents.ids_T.nbytes / 16
    source_N = documents.column("source")
    assert sorted(source_N) == list(range(1_000)) and (documents.split_N == source_N % 2).all()
    assert (np.diff(documents.split_N) >= 0).all()
    for ids, number in zip(documents, source_N, strict=True):
        assert len(ids) == lengths_N[number] and (ids == number).all()


def test_a_text_stays_on_its_side_whatever_else_there_is(stream):
    def held_out(documents, texts):
        return {texts[i] for i in documents.column("source")[documents.split_N == 1]}

    _, _, whole = stream(held_out=0.2)
    found = held_out(whole, TEXTS)
    assert 0.14 < len(found) / len(TEXTS) < 0.26
    fewer = TEXTS[100:] + TEXTS[150:200]  # copies are on the side of what they copy
    _, _, part = stream(fewer, name="part", held_out=0.2)
    assert held_out(part, fewer) == found & set(fewer)
    train = {fewer[i] for i in part.column("source")[part.split_N == 0]}
    assert not train & held_out(part, fewer)


def test_as_many_tokens_as_are_wanted_from_the_front(stream):
    _, results, documents = stream(max_tokens=1000)
    assert sum(results.tokens.values()) == 1000
    last = documents.column("source").max()
    assert last < 100 and set(documents.column("source")) == set(range(last + 1))


def test_a_run_reads_what_was_tokenized_and_notices_damage(stream):
    run, results, documents = stream()
    reads = dataclasses.replace(run, stage="capture", inputs=dict(tokenize=run.folder))
    request = read_request(run.configs)
    found = text_documents(reads, request)
    assert np.array_equal(found.ids_T, documents.ids_T)
    corpus, capture = (run.configs[group] for group in (CorpusConfig, CaptureConfig))
    both = run.configs | dataclasses.replace(corpus, pack=True) | dataclasses.replace(capture, last=1)
    with pytest.raises(UserError, match="--capture.last=1 records the ends of texts, which --corpus.pack puts"):
        text_documents(dataclasses.replace(reads, configs=both), request)
    training = found.training()
    assert np.shares_memory(training.ids_T, found.ids_T) and len(training) == results.documents["train"]
    content = bytearray((run.folder / "ids.npy").read_bytes())
    content[-2] ^= 1
    (run.folder / "ids.npy").write_bytes(content)
    with pytest.raises(UserError, match="ids.npy is damaged"):
        text_documents(reads, request)


def test_the_text_is_hashed_once_and_not_by_every_process_that_reads_it(stream, tmp_path, monkeypatch):
    """A hundred gigabytes would take minutes each time."""
    hashed = []
    monkeypatch.setenv("SAEJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "_HASHED_AT_ONCE", 0)
    monkeypatch.setattr(identity, "file_sha256", lambda path: hashed.append(path.name) or file_sha256(path))
    run, results, _ = stream()
    reads = dataclasses.replace(run, inputs={"tokenize": run.folder})
    for _ in range(2):
        text_documents(reads, read_request(run.configs))
    assert sorted(name for name in hashed if name in results.sha256) == sorted(results.sha256)


class WordTokenizer:
    """A word is a token; in front of a text comes "<s>", 0, and after it "</s>", 1."""

    pad_token_id = eos_token_id = None

    def __init__(self, bos_token_id=0, adds=True):
        self.bos_token_id, self._adds, self._ids = bos_token_id, adds, {"<s>": 0, "</s>": 1}

    def __call__(self, text, add_special_tokens=True, verbose=True):
        if isinstance(text, list):
            return dict(input_ids=[self(each, add_special_tokens)["input_ids"] for each in text])
        ids = [self._ids.setdefault(word, len(self._ids)) for word in text.split()]
        return dict(input_ids=[0, *ids, 1] if add_special_tokens and self._adds else ids)


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("bos", ["auto", "always", "never"])
def test_contexts_begin_with_bos_once_and_end_in_no_eos(bos, adds):
    texts = ["a b c d e f g", "<s> h i j", "k"]
    chunker = Chunker(CorpusConfig(context=4), WordTokenizer(adds=adds), 4, TaskConfig(), bos)
    documents = [Document(text, str(i), i) for i, text in enumerate(texts)]
    pieces = [piece.ids_T.tolist() for piece in chunker.pieces(documents, lambda document: False)]
    in_front = bos == "always" or (bos == "auto" and adds)
    if in_front:
        assert pieces == [[0, 2, 3, 4], [0, 5, 6, 7], [0, 8], [0, 9, 10, 11], [0, 12]]
    else:  # only the text that has a BOS of its own has one
        assert pieces == [[2, 3, 4, 5], [6, 7, 8], [0, 9, 10, 11], [12]]
    assert not any(1 in piece for piece in pieces)


@pytest.mark.parametrize("bos", ["always", "never"])
def test_packed_texts_fill_the_context_of_their_split(bos):
    """Against the joined tokens of each split, cut by hand: 0 begins a text, 1 ends one where none has a beginning."""
    words = ["a b c d e", "f", "g h", "i j k l m n o p q", "r", "s t u"]
    documents = [Document(text, str(i), i) for i, text in enumerate(words)]
    held_out = {1, 4}
    tokenizer = WordTokenizer()
    tokenizer.eos_token_id = 1
    chunker = Chunker(CorpusConfig(context=5, pack=True), tokenizer, 5, TaskConfig(), bos)
    pieces = list(chunker.pieces(documents, lambda document: document.index in held_out))
    ids = lambda text: [2 + "abcdefghijklmnopqrstu".index(letter) for letter in text if letter != " "]  # noqa: E731
    if bos == "always":
        expected = [[0, *ids("a b c d")], [0, *ids("e"), 0, *ids("g h")], [0, *ids("i j k l")], [0, *ids("m n o p")]]
        expected += [[0, *ids("q"), 0, *ids("s t")], [0, *ids("u")]]
        places = [(0, 0), (0, 4), (3, 0), (3, 4), (3, 8), (5, 2)]
        out = [[0, *ids("f"), 0, *ids("r")]]
    else:
        expected = [ids("a b c d e"), [*ids("g h"), 1, *ids("i j")], ids("k l m n o")]
        expected += [[*ids("p q"), 1, *ids("s t")], ids("u")]
        places = [(0, 0), (2, 0), (3, 2), (3, 7), (5, 2)]
        out = [[*ids("f"), 1, *ids("r")]]
    assert [piece.ids_T.tolist() for piece in pieces if not piece.split] == expected
    assert [(piece.source, piece.start) for piece in pieces if not piece.split] == places
    assert [piece.ids_T.tolist() for piece in pieces if piece.split] == out


def test_token_ids_and_chats_are_read_as_they_are_meant(tmp_path):
    """Token ids stay, less a BOS in front; chats go through the chat template."""

    class ChatTokenizer(WordTokenizer):
        def apply_chat_template(self, messages, tokenize):
            return "<s> " + " ".join(f"{message['role']} {message['content']}" for message in messages)

    chat = [dict(role="user", content="a b"), dict(role="assistant", content="c")]
    lines = [json.dumps(dict(x=value)) for value in ([0, 7, 9, 1, 8, 5], chat)]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines))
    config = CorpusConfig(path=str(tmp_path / "mixed.jsonl"), field="x", context=5)
    documents = list(corpora.documents(config))
    chunker = Chunker(config, ChatTokenizer(adds=True), 5, TaskConfig(), "always")
    pieces = [piece.ids_T.tolist() for piece in chunker.pieces(documents, lambda document: False)]
    assert pieces == [[0, 7, 9, 1, 8], [0, 5], [0, 3, 2, 4, 5], [0, 6]]  # "a" was the first word to be read
    for document, held in zip(documents, ("token ids", "the messages of a chat"), strict=True):
        with pytest.raises(UserError, match=f"is {held}: only tokenize, capture and train read these"):
            document.text  # noqa: B018
    with pytest.raises(UserError, match="cannot make text of the messages of a chat"):
        list(Chunker(config, WordTokenizer(adds=True), 5).pieces(documents, lambda document: False))


def test_of_many_documents_a_sample_takes_little_memory():
    lengths_N = np.random.default_rng(0).integers(1, 7, 50_000)
    split_N = np.sort(np.random.default_rng(1).random(len(lengths_N)) < 0.3)
    table_Nx4 = np.zeros((len(lengths_N), len(COLUMNS)), np.int32)
    table_Nx4[:, 0], table_Nx4[:, 2] = split_N, np.arange(len(lengths_N))
    documents = Documents.contiguous(np.zeros(lengths_N.sum(), np.int32), lengths_N, table_Nx4, ())
    for tokens in (1, 6, 7, 60_000):
        sample = documents.sample(tokens)
        for split in range(2):
            own = np.flatnonzero(split_N == split)
            wanted = own[: np.searchsorted(np.cumsum(lengths_N[own]), tokens) + 1]
            np.testing.assert_array_equal(sample.column("source")[sample.split_N == split], wanted)
    assert len(documents.sample(10**9)) == len(documents) and Plan(sample, 64, 64, 0, 0).rows == len(sample.ids_T)
    tracemalloc.start()
    documents.sample(1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * len(lengths_N)


def test_what_cannot_be_tokenized(stream, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="the tokenizer has no BOS token"):
        Chunker(CorpusConfig(), WordTokenizer(bos_token_id=None, adds=False), 256, TaskConfig(), "always")
    with pytest.raises(UserError, match="the held_out split has no text"):
        stream(["only one"])
    with pytest.raises(UserError, match="the text holds the token id 70000, and the model has embeddings for"):
        stream([[1, 2], [3, 70000], *([4, number] for number in range(20))])
    with pytest.raises(UserError, match="exceeds the model's context of 256"):
        stream(context=300)
    assert not list(tmp_path.glob("tokenize/*"))
    asked = iter([False] * 20)
    with pytest.raises(Interrupted):
        stream(stopping=lambda: next(asked, True))
    run, results, _ = stream()
    assert sum(results.documents.values()) > 600  # what the stopped run left is not in the way
    monkeypatch.setattr(corpora, "_MOST_IN_MEMORY", 1000)
    with pytest.raises(UserError, match="use --corpus.stream=True"):
        corpora.read_corpus(dataclasses.replace(run.configs[CorpusConfig], stream=False))
