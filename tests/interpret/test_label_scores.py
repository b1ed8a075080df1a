"""Exams of labels: what each question shows, and scores of judges whose knowledge is known."""

import dataclasses
import json
import re

import numpy as np
import planted
import pytest
from sklearn.metrics import balanced_accuracy_score

from saejax.interpret import contexts
from saejax.interpret.firings import record
from saejax.interpret.held_out import HeldOut, held_out
from saejax.interpret.label_scores import EXAMS, balanced_accuracy, is_kept
from saejax.interpret.questions import read_activations, read_choice
from saejax.interpret.results import LabelScore
from saejax.interpret.text import CodedText
from saejax.parallel.mesh import make_mesh
from saejax.results import Interval


def context(name, acts):
    """A context whose tokens tell where it is from."""
    tokens = [f" {name}{place}" for place in range(len(acts))]
    return dict(tokens=tokens, acts=acts, peak=int(np.argmax(acts)), document=0, position=0)


@pytest.fixture
def held():
    active = [context(f"a{n}-", [0.0] * n + [1.0 + n, 0.1, 1.0 + n] + [0.0] * (9 - n)) for n in range(10)]
    return HeldOut(
        3, active, [context(f"s{n}-", [0.0] * 12) for n in range(10)], [context(f"n{n}-", [0.0] * 12) for n in range(6)]
    )


def texts_of(question):
    return re.findall(r"Text \d+: (.*)", question.text)


def is_active(text):
    return text.strip("< ").startswith("a")


def scores(name, held, answer):
    """The scores of a judge, and its unparsed replies."""
    exam = EXAMS[name](held, "a label", 1)
    return exam.read([answer(question) for question in exam.questions])


def test_a_label_of_the_topic_alone_fails_on_near_misses(held):
    def topic(question):
        return json.dumps([int(text.strip()[0] in "an") for text in texts_of(question)])

    def knowing(question):
        return json.dumps([int(is_active(text)) for text in texts_of(question)])

    told, _ = scores("detection", held, topic)
    assert told["detection"].mean == 1 and told["near misses"].mean == 0.5
    known, _ = scores("detection", held, knowing)
    assert known["detection"].mean == known["near misses"].mean == 1
    for read, kept in ((told, False), (known, True)):
        assert is_kept({name: LabelScore(score, 0.5) for name, score in read.items()}) == kept
    # A single near miss shows nothing, whatever the replies: the label is judged by the other contexts.
    single, _ = scores("detection", dataclasses.replace(held, near=held.near[:1]), knowing)
    assert single.keys() == {"detection"}
    assert is_kept({name: LabelScore(score, 0.5) for name, score in single.items()})
    asked = [text for question in EXAMS["detection"](held, "a label", 1).questions for text in texts_of(question)]
    assert sorted(asked) == sorted("".join(one["tokens"]) for one in (*held.active, *held.silent, *held.near))
    guess = np.random.default_rng(0)
    assert scores("detection", held, lambda question: "no idea") == ({}, 6)
    called = {n: bool(guess.integers(2)) for n in range(26)}
    truth = [n < 10 for n in range(20)]
    expected = balanced_accuracy_score(truth, [called[n] for n in range(20)])
    assert balanced_accuracy(called, range(10), range(10, 20)).mean == pytest.approx(expected)
    assert not is_kept({"detection": LabelScore(Interval(1.0, 0.9, 1.0), None)}) and not is_kept({})


def test_fuzzing_marks_the_right_tokens_or_as_many_others(held):
    def right(text):
        """Whether the marked tokens are those of at least 0.3 of the largest activation."""
        number = int(re.search(r"a(\d)-", text)[1])
        marked = sorted(int(place) for piece in re.findall("<<(.*?)>>", text) for place in re.findall(r"-(\d+)", piece))
        assert len(marked) == 2
        return marked == [number, number + 2]

    read, unparsed = scores(
        "fuzzing", held, lambda question: json.dumps(list(map(int, map(right, texts_of(question)))))
    )
    assert read["fuzzing"].mean == 1 and not unparsed
    always, _ = scores("fuzzing", held, lambda question: json.dumps([1] * len(texts_of(question))))
    assert always["fuzzing"].mean == 0.5  # as many right ones as wrong ones


def test_the_intruder_is_the_context_without_the_feature(held):
    def find(question):
        assert len(texts_of(question)) == 5 and all("<<" in text for text in texts_of(question))
        (place,) = [n for n, text in enumerate(texts_of(question), 1) if not is_active(text.replace("<<", ""))]
        return f"They differ.\n[RESPONSE]: Text {place}"

    read, unparsed = scores("intruder", held, find)
    assert read["intruder"].mean == 1 and not unparsed
    assert scores("intruder", held, lambda question: "none")[1] == 5
    # Its marks stand as those of another context do, around the middle: where they stand tells nothing.
    for question in EXAMS["intruder"](held, "a label", 1).questions:
        (text,) = [text for text in texts_of(question) if not is_active(text)]
        assert re.findall(r"<< s\d-(\d+)>>", text) == ["0", "2"]
    assert [read_choice(reply, 5) for reply in ("3", "[RESPONSE]: 5.", "**Text 2**", "6", "Text 1 or 2")] == [
        2, 4, 1, None, None,
    ]  # fmt: skip


def test_simulation_is_the_correlation_over_all_tokens(held):
    rng, pairs = np.random.default_rng(2), []
    contexts_of = {"".join(one["tokens"]): one for one in (*held.active, *held.silent)}

    def simulate(question):
        (text,) = texts_of(question)
        one = contexts_of[text]
        assert json.loads(question.text.partition("Tokens: ")[2]) == one["tokens"]
        predicted = rng.integers(0, 11, len(one["tokens"]))
        pairs.append((one["acts"], predicted))
        return json.dumps(predicted.tolist())

    read, unparsed = scores("simulation", held, simulate)
    true, predicted = (np.concatenate(side) for side in zip(*pairs, strict=True))
    value = read["simulation"]
    assert value.mean == pytest.approx(np.corrcoef(true, predicted)[0, 1]) and not unparsed
    assert value.low < value.mean < value.high
    exact, _ = scores(
        "simulation", held, lambda question: json.dumps([act for act in contexts_of[texts_of(question)[0]]["acts"]])
    )
    assert exact["simulation"].mean == pytest.approx(1)
    for same in np.arange(100) / 10:  # also where rounding gives what does not vary a spread
        assert scores("simulation", held, lambda _, same=same: json.dumps([same] * 12))[0] == {}
    assert read_activations("[1, 2.5, 10]", 3) == [1, 2.5, 10] and read_activations("[1, 11]", 2) is None


def test_near_misses_are_silent_where_similar_features_fire_most(tmp_path):
    store, dictionary = planted.make_store(tmp_path / "store"), planted.dictionary(40)
    place = record(store, "held_out", {tmp_path / "firings": dictionary}, make_mesh(), 256)
    text, dense = CodedText(store.documents, planted.TEXTS), planted.Dense(store, dictionary, "held_out")
    where = zip(dense.document.tolist(), dense.position.tolist(), dense.f, strict=True)
    at = {(document, position): f for document, position, f in where}
    similar = {0: [1, 2], 5: [20], 7: []}
    found = {one.feature: one for one in held_out(tmp_path / "firings", 40, similar, place, text, 1)}
    assert found[0].near and not found[7].near
    for feature, others in similar.items():
        near = found[feature].near
        assert len({one["document"] for one in near}) == len(near) <= len(found[feature].active)
        for one in near:
            here = range(one["position"] - contexts.BEFORE, one["position"] + contexts.AFTER + 1)
            assert not any(at.get((one["document"], p), np.zeros(40))[feature] for p in here)
            assert any(at[one["document"], one["position"]][other] > 0 for other in others)
