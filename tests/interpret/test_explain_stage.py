"""Labels written and judged by a stand-in for a language model, on a store whose features are planted."""

import dataclasses
import json
import re
import zlib

import numpy as np
import planted
import protocol
import pytest
from runs import write_members
from sklearn.metrics import balanced_accuracy_score

from saejax.config import Configs
from saejax.dictionaries import save_dictionary
from saejax.dictionaries.labels import load_labels
from saejax.interpret.held_out import MIN_FIRINGS
from saejax.interpret.label_scores import balanced_accuracy, is_kept
from saejax.interpret.results import ExplainedFeature, LabelScore
from saejax.interpret.settings import ExplainConfig
from saejax.interpret.text import CodedText
from saejax.models.loading import load_model
from saejax.parallel.settings import MeshConfig
from saejax.results import from_json
from saejax.runner.workspace import Run
from saejax.stages.explain import run as explain

pytestmark = pytest.mark.usefixtures("single_device")
FEATURES = 40
TOKENS = planted.TEXTS


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny_llama):
    """A store, a dictionary and what was interpreted."""
    folder = tmp_path_factory.mktemp("explain")
    store, dictionary = planted.make_store(folder / "capture"), planted.dictionary(FEATURES)
    save_dictionary(folder / "train" / "standard" / "dictionary", dictionary)
    write_members(folder / "train" / "standard", ("", planted.SITE, planted.SITE))
    lm = load_model(str(tiny_llama))
    planted.interpreter(folder / "interpret" / "standard", store, lm, dictionary).interpret()
    return folder, store, dictionary


@pytest.fixture(autouse=True)
def planted_text(workdir, monkeypatch):
    _, store, _ = workdir
    monkeypatch.setattr(explain, "read_text", lambda run: (store, CodedText(store.documents, TOKENS)))


def go(workdir, folder, url, interpreted=None, **settings):
    """The results of a run, and each feature's."""
    config = ExplainConfig(url=url, model="judge", dictionaries=("standard",), **settings)
    inputs = {f"{stage}/standard": workdir[0] / stage / "standard" for stage in ("train", "interpret")}
    inputs |= {"interpret/standard": interpreted} if interpreted else {}
    inputs["capture"] = workdir[0] / "capture"
    run = Run("explain", "standard", folder, Configs(config, MeshConfig()), inputs, lambda line: None)
    (member,) = explain.run_explain(run).members
    every = json.loads((folder / "explained.json").read_text())
    return member, {int(i): from_json(ExplainedFeature, one, "explained") for i, one in every.items()}


class Place:
    """Where the contexts of questions stand, and what is active there, from dense activations."""

    def __init__(self, workdir):
        _, store, dictionary = workdir
        self.f, self.split = {}, {}
        for split in ("train", "held_out"):
            dense = planted.Dense(store, dictionary, split)
            for d, p, f in zip(dense.document.tolist(), dense.position.tolist(), dense.f, strict=True):
                self.f[d, p], self.split[d] = f, split
        self.documents = ["".join(TOKENS[i] for i in store.documents[d]) for d in range(len(store.documents))]
        lengths = ([0, *(len(TOKENS[i]) for i in store.documents[d])] for d in range(len(self.documents)))
        self.starts = [np.cumsum(each) for each in lengths]

    def find(self, text):
        """Document, and first and last position of a context."""
        (found,) = (d for d, whole in enumerate(self.documents) if text in whole)
        at = self.documents[found].index(text)
        first, last = np.searchsorted(self.starts[found], [at, at + len(text)])
        return found, int(first), int(last)

    def active(self, text, feature):
        document, first, last = self.find(text)
        return [self.f.get((document, p), np.zeros(FEATURES))[feature] for p in range(first, last)]

    def feature_of(self, prompt):
        """The one feature that is active at the first marked token of every text of a question for a label."""
        active = []
        for text, marked in zip(parts(prompt)[1], protocol.texts_of(prompt), strict=True):
            document, _, _ = self.find(text)
            start = self.documents[document].index(text) + marked.index("<<")
            active.append(self.f[document, int(np.searchsorted(self.starts[document], start))] > 0)
        (feature,) = np.flatnonzero(np.all(active, axis=0))
        return feature

    def is_right(self, marked, feature):
        """Whether the first marked token of a text is active."""
        document, first, _ = self.find(marked.replace("<<", "").replace(">>", ""))
        start = self.starts[document][first] + marked.index("<<")
        return (
            self.f.get((document, int(np.searchsorted(self.starts[document], start))), np.zeros(FEATURES))[feature] > 0
        )


def parts(prompt):
    """The number in a question's label, -1 without one, and its texts without marks."""
    label = re.search(r"Description: concept (\d+)", prompt)
    texts = [text.strip("\n") for text in protocol.texts_of(prompt)]
    return int(label[1]) if label else -1, [text.replace("<<", "").replace(">>", "") for text in texts]


def is_of(prompt):
    """Which question it is."""
    if "marked tokens are those" in prompt:
        return "fuzzing"
    return "detection" if "somewhere in it" in prompt else "labels"


def judge(place):
    """Knows the planted concepts, guesses about all other labels, and says nothing that can be read about number 11."""

    def answer(prompt):
        feature, texts = parts(prompt)
        if is_of(prompt) == "labels":
            return f"Well.\n[EXPLANATION]: concept {place.feature_of(prompt)}"
        if is_of(prompt) == "fuzzing" and feature < FEATURES:
            marked = [text.strip("\n") for text in protocol.texts_of(prompt)]
            return json.dumps([int(place.is_right(text, feature)) for text in marked])
        if feature == 11:
            return "I would rather not say [1]"
        if feature < len(planted.CONCEPTS):
            return f"Sure: {[int(max(place.active(text, feature)) > 0) for text in texts]}"
        return json.dumps([zlib.crc32(f"{feature} {text}".encode()) % 2 for text in texts])

    return answer


def test_scores_equal_those_counted_from_what_the_server_saw(workdir, tmp_path):
    """What is active is known from dense activations at the places where the texts are found."""
    place = Place(workdir)
    with protocol.Server(judge(place)) as server:
        member, found = go(workdir, tmp_path / "unit", server.url, features=tuple(range(20)))
    held_out = np.array([f for (d, _), f in place.f.items() if place.split[d] == "held_out"])
    able = np.flatnonzero((held_out[:, :20] > 0).sum(0) >= MIN_FIRINGS).tolist()
    assert sorted(found) == able and len(able) > 12 and member.judged == len(able) == 20 - member.skipped
    assert [one.label for one in found.values()] == [f"concept {feature}" for feature in found]
    assert member.tokens == sum(len(prompt.split()) + 7 for prompt in server.asked)
    questions = [prompt for prompt in server.asked if is_of(prompt) == "detection"]
    first = questions[: len(questions) // 2]  # those with labels of other features follow
    for feature in able:
        prompts = [prompt for prompt in first if parts(prompt)[0] == feature]
        texts = [text for prompt in prompts for text in parts(prompt)[1]]
        there = [max(place.active(text, feature)) > 0 for text in texts]
        assert {place.split[place.find(text)[0]] for text in texts} == {"held_out"}
        assert sum(there) == 10 and len(there) <= 30
        scores = found[feature].scores
        if feature == 11 or len(there) == 10:  # no reply that can be parsed, or it fires everywhere
            assert "detection" not in scores and not found[feature].kept
            continue
        answers = [bool(one) for prompt in prompts for one in json.loads(judge(place)(prompt).removeprefix("Sure: "))]
        means = [scores[name].value.mean for name in ("detection", "near misses") if name in scores]
        if len(there) in (20, 30):  # as many silent contexts as near misses, if any
            assert np.mean(means) == pytest.approx(balanced_accuracy_score(there, answers))
        assert scores["fuzzing"].value.mean == 1  # this judge knows where every feature is active
        if feature < len(planted.CONCEPTS):
            assert set(means) == {1} and found[feature].kept
    assert 0 < member.unparsed < 1 / len(able) and member.kept >= 5
    assert load_labels(tmp_path / "unit" / "labels.json").keys() == {i for i, one in found.items() if one.kept}


def test_labels_are_written_from_training_text_and_kept_only_if_they_tell(workdir, tmp_path):
    place = Place(workdir)

    def answer(prompt):
        return f"[EXPLANATION]: concept {zlib.crc32(prompt.encode())}" if is_of(prompt) == "labels" else guess(prompt)

    guess = judge(place)
    with protocol.Server(answer) as server:
        member, found = go(workdir, tmp_path / "unit", server.url, sample=8)
        count = len(server.asked)
        again, _ = go(workdir, tmp_path / "unit", server.url, sample=8)  # has all answers
    assert member == again and len(server.asked) == count and len({one.label for one in found.values()}) > 4
    questions = [prompt for prompt in server.asked if is_of(prompt) == "labels"]
    assert len(questions) == 8
    for prompt in server.asked:
        split = "train" if prompt in questions else "held_out"
        assert {place.split[place.find(text)[0]] for text in parts(prompt)[1]} == {split}
    assert 0.2 < member.scores["detection"].value.mean < 0.8
    assert member.kept <= 2  # the judge guesses


def test_a_label_without_another_beside_it_is_not_kept(workdir, tmp_path):
    with protocol.Server(judge(Place(workdir))) as server:
        member, found = go(workdir, tmp_path / "unit", server.url, features=(1,))
    assert (
        found[1].scores["detection"].value.mean == 1 and member.scores["detection"].control is None and member.kept == 0
    )


def test_a_feature_that_is_silent_in_training_text_is_skipped(workdir, tmp_path):
    """It has no contexts that a label could be written from."""
    folder = tmp_path / "interpreted" / "features"
    folder.mkdir(parents=True)
    for path in (workdir[0] / "interpret" / "standard" / "features").glob("*.json"):
        records = json.loads(path.read_text())
        silent = {name: value for name, value in records[1].items() if name in ("feature", "nearest", "up", "down")}
        records[1] = silent | dict(fires=0, rate=0.0)
        (folder / path.name).write_text(json.dumps(records))
    with protocol.Server(judge(Place(workdir))) as server:
        member, found = go(workdir, tmp_path / "unit", server.url, folder.parent, features=(0, 1, 2))
    assert sorted(found) == [0, 2] and member.skipped == 1


@pytest.mark.parametrize("silent", [1, 2, 10])
def test_a_judge_that_guesses_keeps_few_labels(silent):
    """Worlds in which nothing is true: ten contexts and few or many others, answers by a coin, for both labels."""
    rng, kept = np.random.default_rng(0), 0
    sides = range(10), range(10, 10 + silent)
    for _ in range(2000):
        own, control = (balanced_accuracy(dict(enumerate(rng.integers(0, 2, 10 + silent))), *sides) for _ in range(2))
        kept += is_kept(dict(detection=LabelScore(own, control.mean)))
    assert kept / 2000 < 0.05
    # A label that tells contexts apart: nine of ten answers are right.
    true = 0
    for _ in range(200 if silent == 10 else 0):
        right = dict(enumerate((np.arange(10 + silent) < 10) == (rng.random(10 + silent) < 0.9)))
        control = balanced_accuracy(dict(enumerate(rng.integers(0, 2, 10 + silent))), *sides)
        true += is_kept(dict(detection=LabelScore(balanced_accuracy(right, *sides), control.mean)))
    print(f"a label is kept: {kept} of 2,000 null and {true} of 200 true worlds")
    assert silent < 10 or true >= 0.8 * 200
    sure = balanced_accuracy({n: n < 10 for n in range(10 + silent)}, *sides)
    assert is_kept(dict(detection=LabelScore(sure, 0.5))) == (silent > 1)


def test_no_answer_that_can_be_read(workdir, tmp_path):
    with protocol.Server(lambda prompt: "") as server:
        member, found = go(workdir, tmp_path / "unit", server.url, sample=3)
    assert member.kept == 0 and all(one.label == "" and not one.kept for one in found.values())
    assert member.scores == {}


def test_a_label_without_another_to_compare_with_is_not_testable(workdir, tmp_path):
    with protocol.Server(judge(Place(workdir))) as server:
        member, found = go(workdir, tmp_path / "unit", server.url, features=(0,))
    assert (member.judged, member.kept, member.untold) == (1, 0, 1) and not found[0].kept
    assert explain._line(member).startswith("0 of 1 features keep a label (1 not testable), detection 1.00")
    nothing = dataclasses.replace(member, judged=0, untold=None, scores={})
    assert explain._line(nothing) == "no feature fires often enough to be judged"
