"""Linear probes: what they find, what chance gives, whether the model uses it; and the stage end to end."""

import dataclasses
import importlib.resources
import json
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.files import write_lines
from saejax.interventions import probing
from saejax.interventions.behaviour_prompts import BehaviourPrompts
from saejax.interventions.edits import mask
from saejax.interventions.engine import change_norms, effects
from saejax.interventions.references import Reference, References
from saejax.interventions.settings import ProbeConfig
from saejax.interventions.split_model import SplitModel
from saejax.results import Interval, from_json, to_json
from saejax.stages.probe import run as stage
from saejax.tasks.behaviours import Prompt, write_prompts
from saejax.tasks.benchmarks import read_items
from saejax.tasks.labels import LABELS, label_prompts
from saejax.tasks.likelihood import encode_pair
from saejax.tasks.settings import PROBE_LABELS, TaskConfig

CONFIG = ProbeConfig(strengths=(0.01, 1.0), sparse=(1, 2), shuffles=4)


@pytest.fixture(autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield


def make_task(inputs=40, train=120, test=60, classes=2, seed=0, planted=True) -> probing.ProbeTask:
    """Return sparse inputs; where planted, the class says which of inputs 3 and 8 fire (of two: how strongly)."""
    rng = np.random.default_rng(seed)
    class_N = np.arange(train + test) % classes if planted else rng.integers(classes, size=train + test)
    x_NxC = rng.exponential(size=(train + test, inputs)) * (rng.random((train + test, inputs)) < 0.3)
    x_NxC[:, 5] = 0.0  # never fires
    if planted:
        x_NxC[:, 3] = 2.0 * (class_N % 2) + 0.7 * rng.normal(size=train + test)
        x_NxC[:, 8] = 2.0 * (class_N >= classes / 2) + 0.7 * rng.normal(size=train + test)
    return probing.ProbeTask(x_NxC[:train], class_N[:train], x_NxC[train:], class_N[train:])


def test_sparse_probes_find_the_planted_inputs():
    (single, two, full), _ = zip(*probing.run_probes(make_task(classes=4), CONFIG, [1]), strict=True)
    assert (single.k, two.k, full.k) == (1, 2, None)
    assert set(two.inputs) == {3, 8} and single.inputs == two.inputs[:1] and full.inputs is None
    # Two independent bits, each read with an error rate of P(z > 1 / 0.7), 7.7 %: 85 % are right.
    assert two.accuracy.low < 0.852 < two.accuracy.high
    wilson = binomtest(round(60 * two.accuracy.mean), 60).proportion_ci(method="wilson")
    assert (two.accuracy.low, two.accuracy.high) == pytest.approx((wilson.low, wilson.high))
    assert single.accuracy.mean < 0.6 < two.accuracy.mean
    assert two.p_value == pytest.approx(1 / 10_001)
    assert two.shuffled.high < 0.5 and two.control.mean < 0.5 and full.control is None


def test_random_labels_are_not_read():
    """Rejections at 10 % are no more frequent than that, and the mean accuracy is that of guessing."""
    rng, p, accuracy = np.random.default_rng(3), [], []
    for seed in range(150):
        task = make_task(inputs=12, train=40, test=30, seed=seed, planted=False)
        answer_M = probing.fit_probe(task, 2, 0.1).class_M
        p.append(probing.permutation_p(answer_M, task.test_class_M, 200, rng))
        accuracy.append((answer_M == task.test_class_M).mean())
    assert binomtest(int((np.array(p) <= 0.1).sum()), len(p), 0.1, alternative="greater").pvalue > 0.01
    assert 0.3 < np.mean(p) < 0.85  # not all at one end
    assert np.mean(accuracy) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_full_probe_is_that_of_a_plain_pipeline(classes):
    """The plain one sees all inputs, and scales them without centring."""
    task = make_task(inputs=200, train=80, classes=classes)
    for strength in (1e-3, 1.0):
        plain = make_pipeline(
            StandardScaler(with_mean=False), LogisticRegression(C=strength, tol=1e-9, max_iter=20_000)
        ).fit(task.train_NxC, task.train_class_N)
        np.testing.assert_array_equal(probing.fit_probe(task, None, strength).class_M, plain.predict(task.test_MxC))


def test_the_penalty_is_chosen_on_train_prompts():
    strong, weak = 1e-4, 1.0
    config = dataclasses.replace(CONFIG, strengths=(weak, strong))
    assert probing.choose_strength(make_task(), None, config, 0) == weak
    assert probing.choose_strength(make_task(planted=False), None, config, 0) == strong
    task = make_task()
    upside_down = dataclasses.replace(task, test_class_M=1 - task.test_class_M, test_MxC=-task.test_MxC)
    assert [row.strength for row, _ in probing.run_probes(task, config, [1])] == [
        row.strength for row, _ in probing.run_probes(upside_down, config, [1])
    ]


def test_differences_of_class_means():
    for classes, size in ((2, np.abs), (4, np.array)):
        task = make_task(classes=classes)
        for k, ours_C in enumerate(probing.mean_differences(task.train_NxC, task.train_class_N)):
            is_class_N = task.train_class_N == k
            theirs_C = task.train_NxC[is_class_N].mean(axis=0) - task.train_NxC[~is_class_N].mean(axis=0)
            np.testing.assert_allclose(ours_C, size(theirs_C), atol=1e-12)
    assert probing.select_inputs(make_task(), 1).tolist() in ([3], [8])
    # In units of the input: one that varies a lot comes before one that says more.
    loud = dataclasses.replace(make_task(), train_NxC=make_task().train_NxC * np.where(np.arange(40) == 0, 1e3, 1.0))
    assert probing.select_inputs(loud, 1).tolist() == [0]


def test_differences_are_paired_by_prompt():
    right_M, second_M = np.array([True] * 8 + [False] * 2), np.array([False] * 2 + [True] * 8)
    gap = probing.paired_difference(right_M, second_M, 0)
    assert gap.mean == 0 and gap.low < 0 < gap.high
    assert probing.paired_difference(right_M, right_M, 0) == Interval(0.0, 0.0, 0.0)


def test_every_class_gets_an_input():
    """Inputs 0 to 5 all say class 0, one each the other classes, and less clearly."""
    class_N = np.arange(90) % 3
    noise_NxC = np.random.default_rng(0).normal(size=(90, 12))
    shift_NxC = np.zeros((90, 12))
    shift_NxC[:, :6], shift_NxC[:, 8], shift_NxC[:, 11] = (class_N == 0)[:, None], class_N == 1, class_N == 2
    x_NxC = noise_NxC + shift_NxC * np.where(np.arange(12) < 6, 30.0, 6.0)
    chosen = probing.select_inputs(probing.ProbeTask(x_NxC, class_N, x_NxC, class_N), 3)
    assert chosen[0] < 6 and set(chosen[1:]) == {8, 11}


def _prompt(i: int, split: str, correct: str, behaviour: str = "sums") -> Prompt:
    return Prompt(behaviour, split, f"{split} {i}", correct, " x", "", "", ())


def test_labels():
    assert tuple(LABELS) == PROBE_LABELS
    train = [_prompt(i, "train", answer) for i, answer in enumerate(["7"] * 6 + ["8"] * 5 + ["9"] * 4)]
    prompts = [*train, _prompt(0, "test", "8"), _prompt(1, "test", "9"), _prompt(2, "test", "7")]
    prompts += [_prompt(i, "train", " are" if i % 2 else " is", "verbs") for i in range(10)]
    diffs = [1.0] * 5 + [-1.0] * 13 + [2.0] * 10
    sums, verbs = label_prompts("answer", prompts, diffs)
    assert (sums.name, sums.classes, sums.left_out) == ("answer-sums", {"7": (6, 1), "8": (5, 1)}, {"9": 5})
    assert sums.train_N.tolist() == list(range(11)) and sums.test_M.tolist() == [15, 17]
    assert sums.train_class_N.tolist() == [0] * 6 + [1] * 5 and sums.test_class_M.tolist() == [1, 0]
    assert verbs.reason == "no test prompt is of a class with 5 train prompts" and not len(verbs.train_N)
    sums, verbs = label_prompts("parity", prompts, diffs)
    assert sums.classes == {"odd": (10, 2), "even": (5, 1)}
    assert verbs.reason == "no prompt has such a label" and verbs.unlabelled == 10
    assert label_prompts("number", prompts, diffs)[0].unlabelled == 18
    right, always = label_prompts("correct", prompts, diffs)
    assert right.classes == {"wrong": (10, 3), "right": (5, 0)}
    assert always.reason == "fewer than two classes with 5 train prompts: right 10"
    (every,) = label_prompts("behaviour", prompts, diffs)
    assert every.name == "behaviour" and every.classes == {"sums": (15, 3), "verbs": (10, 0)}


def test_the_noun_beside_the_verb_does_not_say_the_subjects_number():
    """As the prompts are, that noun gives every number away; then it is as often plural beside either number."""
    words = json.loads((importlib.resources.files("saejax.tasks") / "data" / "behaviours.json").read_text("utf-8"))
    nouns = list(words["nouns"].items())[:20]
    prompts = []
    for i in range(100):  # as they are in the behaviour: the other noun has the other number
        (subject, beside), plural = (nouns[i % 20], nouns[(7 * i + 3) % 20]), i % 2
        text = f"Everyone knows that the {subject[plural]} near the {beside[1 - plural]}"
        split, verb = "train" if i < 80 else "test", " are" if plural else " is"
        prompts.append(Prompt("agreement", split, text, verb, " x", items=(subject[0], beside[0])))

    def beside_is_plural(some):
        return np.array([prompt.text.split()[-1] in words["nouns"].values() for prompt in some])

    assert (beside_is_plural(prompts) == [prompt.correct == " is" for prompt in prompts]).all()
    (label,) = label_prompts("number", prompts, [1.0] * len(prompts))
    assert label.classes == {"plural": (40, 10), "singular": (40, 10)} and label.congruent == 50
    beside_N = beside_is_plural(label.prompts)
    for places, class_N in ((label.train_N, label.train_class_N), (label.test_M, label.test_class_M)):
        assert beside_N[places][class_N == 0].mean() == beside_N[places][class_N == 1].mean() == 0.5
    # Subjects and what is right stay; other behaviours and prompts of one's own are left as they are.
    for old, new in zip(prompts, label.prompts, strict=True):
        assert (new.correct, new.text.split()[:5]) == (old.correct, old.text.split()[:5])
    without_items = [dataclasses.replace(prompt, items=()) for prompt in prompts]
    assert label_prompts("number", without_items, [1.0] * 100)[0].prompts == tuple(without_items)
    assert label_prompts("answer", prompts, [1.0] * 100)[0].prompts == tuple(prompts)


@pytest.fixture
def make_run(tmp_path, save_inputs, stage_run, make_prompt, single_device):
    behaviours = ("first", "second")
    prompts = [make_prompt(i, "train" if i < 14 else "test", name, False) for name in behaviours for i in range(22)]
    inputs = save_inputs(tmp_path, prompts)

    def make(name, *settings, labels=("answer", "correct"), strengths=CONFIG.strengths, **fields):
        config = dataclasses.replace(CONFIG, labels=labels, strengths=strengths, shuffles=2)
        return stage_run("probe", "topk", inputs, name, config, *settings, **fields)

    return make


def test_the_stage_end_to_end(make_run, monkeypatch):
    monkeypatch.setattr(probing, "LEAST_PROMPTS", 4)  # so many test prompts has a class here
    whole, lines = make_run("whole")
    results = stage.run_probe(whole)
    assert sum(" (weak: one answer is right in every prompt): " in line for line in lines) == 2  # of two labels
    assert from_json(probing.ProbeResults, json.loads(json.dumps(to_json(results), allow_nan=False)), "") == results
    assert (results.dictionary, results.site) == ("topk", "resid_post.1")
    answer, again, first, second = results.labels
    assert (answer.label, answer.behaviour) == ("answer", "first") and again.behaviour == "second"
    assert answer.classes == {"runs": dict(train=7, test=4), "the": dict(train=7, test=4)}
    assert [(row.input, row.k) for row in answer.probes] == [
        (name, k) for name in ("features", "raw") for k in (1, 2, None)
    ]
    for label in (first, second):
        assert label.reason == "fewer than two classes with 5 train prompts: right 14" and not label.probes
    mark = "(weak: one answer is right in every prompt)"
    assert any(f"correct-first (3 of 4) {mark}: no probe: fewer than two classes" in line for line in lines)

    dense = answer.probes[-1]
    for probe in answer.probes[:-1]:
        assert probe.against_dense.mean == pytest.approx(probe.accuracy.mean - dense.accuracy.mean)
    assert dense.against_dense is None
    assert answer.selected.readout == "logit difference"
    assert [each.feature for each in answer.selected.features] == list(answer.probes[1].inputs)


@pytest.mark.parametrize(
    "site,target",
    [("resid_post.1", None), ("mlp_in.1", "mlp_out.1")],  # a transcoder reads its input
)
def test_inputs_are_those_of_the_last_position(tiny, make_dictionary, prompts, plain, site, target):
    dictionary = make_dictionary(site)
    if target:
        config = dataclasses.replace(dictionary.config, target=target, centred=False)
        dictionary = Dictionary(config, **dictionary.arrays | dict(b_dec_D=np.zeros(config.d_in, np.float32)))
    inputs, read_N = probing.probe_inputs(SplitModel(tiny, dictionary), prompts)
    tokens = tiny.tokenize([prompt.text for prompt in prompts])
    x_NxTxD = np.asarray(tiny(tokens, capture=[dictionary.site], logits=False).sites[dictionary.site], np.float64)
    for n, length in enumerate(tokens.lengths_B):
        x_TxD = x_NxTxD[n, :length]
        is_read = np.linalg.norm(x_TxD[-1]) <= dictionary.config.max_norm
        assert read_N[n] == is_read
        f_TxF = plain(dictionary, prompts[n]).features(x_TxD)
        for input_C, plain_TxC in ((inputs["features"][n], f_TxF), (inputs["raw"][n], x_TxD)):
            np.testing.assert_allclose(input_C, plain_TxC[-1] * is_read, atol=2e-4)
    assert target or not read_N.all()


def test_what_is_refused(make_run, tiny, make_dictionary, prompts):
    dictionary = make_dictionary("resid_post.1")
    broken = {**dictionary.arrays, "b_enc_F": dictionary.arrays["b_enc_F"].at[7].set(np.nan)}
    with pytest.raises(UserError, match="feature 7 has an activation that is not finite"):
        probing.probe_inputs(SplitModel(tiny, Dictionary(dictionary.config, **broken)), prompts)
    for settings, message in (
        (dict(labels=("verb",)), "unknown label 'verb': expected one of behaviour, answer, parity"),
        (dict(strengths=()), "strengths is empty"),
    ):
        with pytest.raises(UserError, match=message):
            stage.run_probe(make_run("refused", **settings)[0])
    run, _ = make_run("refused")
    for written, message in (
        (prompts, r"line 1 of .* is not a prompt with its scores"),
        ([], r"has no train prompts: run the stage baseline again"),
    ):
        write_prompts(run.inputs["baseline"] / "prompts.jsonl", written)
        with pytest.raises(UserError, match=message):
            stage.run_probe(run)


def test_scores_are_those_of_sklearn():
    task = make_task(classes=2)
    ((two, right_M),) = [row for row in probing.run_probes(task, CONFIG, [1]) if row[0].k == 2]
    answers = probing.fit_probe(task, 2, two.strength)
    assert two.f1 == pytest.approx(f1_score(task.test_class_M, answers.class_M, average="macro"))
    assert two.accuracy.mean == right_M.mean() and two.p_holm == two.p_value
    alone = dataclasses.replace(make_task(), test_class_M=np.zeros(60, int))  # one class among test prompts
    assert all(0 <= row.f1 <= 1 for row, _ in probing.run_probes(alone, CONFIG, [1]))


def test_controls_of_features_fire_as_often():
    """Features that hardly fire say nothing of a label: they are no control of one that fires often."""
    rng = np.random.default_rng(0)
    active_F = np.concatenate([rng.integers(0, 6, 200), rng.integers(50, 70, 40)])
    for _ in range(50):
        matched = probing.match_firing_rates(active_F, [200, 210, 220], rng)
        assert len(set(matched.tolist()) - {200, 210, 220}) == 3 and (active_F[matched] >= 50).all()
    assert probing.match_firing_rates(np.array([3, 4]), [0, 1], rng).tolist() == []
    # Of 60 inputs 20 are active on half of the prompts, more often in one class; the others on hardly any prompt.
    class_N = np.arange(160) % 2
    rate_NxC = np.where(np.arange(60)[None, :] < 40, 0.02, np.where(class_N == 1, 0.8, 0.2)[:, None])
    x_NxC = np.where(rng.random((160, 60)) < rate_NxC, 1.0, 0.0)
    task = probing.ProbeTask(x_NxC[:100], class_N[:100], x_NxC[100:], class_N[100:])
    fit = next(probing.run_probes(task, dataclasses.replace(CONFIG, sparse=(1,), shuffles=20), [3]))[0]
    assert fit.inputs[0] >= 40 and fit.control.low > 0.6  # those of most inputs would be those of guessing


def test_raw_controls_are_random_directions():
    rng = np.random.default_rng(0)
    class_N = np.arange(200) % 2
    direction_C = rng.normal(size=20)
    x_NxC = rng.normal(size=(200, 20)) + 3 * class_N[:, None] * direction_C / np.linalg.norm(direction_C)
    task = probing.ProbeTask(x_NxC[:120], class_N[:120], x_NxC[120:], class_N[120:])
    config = dataclasses.replace(CONFIG, sparse=(20,), shuffles=3)
    fit, _ = next(probing.run_probes(task, config, [1], "raw"))
    # As many directions as there are dimensions span all of them.
    assert fit.control.mean == pytest.approx(fit.accuracy.mean, abs=0.05)


def on_prompts(split, prompts):
    templates = [prompt.template for prompt in prompts]
    return probing.FeatureAblation("logit difference", BehaviourPrompts(split, prompts), templates)


def test_effects_of_selected_features(tiny, make_dictionary, prompts, plain):
    """Of logit differences against a hook, of reference answers against the engine."""
    dictionary, some = make_dictionary("resid_post.1"), prompts[:3]
    split = SplitModel(tiny, dictionary)
    drop_SxP = on_prompts(split, some).measure_drop([[3], [50]], [1.0, 1.0])
    for p, prompt in enumerate(some):
        run = plain(dictionary, prompt)
        wanted_S = [run.ablated([]) - run.ablated([feature]) for feature in (3, 50)]
        np.testing.assert_allclose(drop_SxP[:, p], wanted_S, atol=2e-5)
    references = [Reference(*encode_pair(tiny.tokenizer, prompt.text, prompt.correct)) for prompt in some]
    answers = References(split, references, 8192)
    drop_SxP = probing.FeatureAblation("", answers, [""] * 3).measure_drop([[3], [50]], [1.0, 1.0])
    value_SxP = effects(tiny, some, mask(dictionary, [[], [3], [50]]), ["answer_log_prob"])[..., 0]
    np.testing.assert_allclose(drop_SxP, value_SxP[:1] - value_SxP[1:], atol=1e-5)
    assert np.abs(drop_SxP).max() > 1e-3


def test_controls_of_selected_features_have_their_doses(tiny, make_dictionary, prompts, monkeypatch):
    """Random lists of other features, each measured where it changes the site as much as the feature does."""
    split = SplitModel(tiny, make_dictionary("resid_post.1"))
    tests, seen = on_prompts(split, prompts[:6]), []
    measure_drop = probing.FeatureAblation.measure_drop

    def record(self, sets, fractions):
        seen.extend(zip(sets, fractions, strict=True))
        return measure_drop(self, sets, fractions)

    monkeypatch.setattr(probing.FeatureAblation, "measure_drop", record)
    (fit,) = [fit for fit, _ in probing.run_probes(make_task(), CONFIG, [1]) if fit.k == 1]
    firing = np.argsort(-tests.texts.statistics().prompts_F, kind="stable")[:2].tolist()
    fit = dataclasses.replace(fit, inputs=tuple(firing))
    selected = probing.ablate_selected(CONFIG, [fit], lambda: tests)
    edits = mask(split.dictionary, *map(list, zip(*seen, strict=True)))
    dose_S = np.sqrt(np.mean(np.square(change_norms(split, split.run(prompts[:6]), edits)), axis=1))
    assert len(seen) == 2 + 2 * 5 and [len(each.controls) for each in selected.features] == [5, 5]
    assert not any({*members} & {*firing} for members, _ in seen[2:])
    np.testing.assert_allclose(dose_S[2:], np.repeat(dose_S[:2], 5), rtol=1e-4)


@pytest.mark.parametrize("prompts", [2, 5])
def test_noise_on_few_prompts_is_not_testable(prompts):
    """On two prompts with effects of one sign every resample agrees: noise was significant in most runs."""
    noise = np.random.default_rng(0).normal(size=(40, prompts))

    class Noise(probing.FeatureAblation):
        def measure_drop(self, sets, fractions):
            return noise[np.concatenate(sets)]

    def ablation():
        return Noise("", None, [""] * prompts)

    fits = [fit for fit, _ in probing.run_probes(make_task(test=2 * prompts), CONFIG, [1])]
    assert probing.ablate_selected(CONFIG, fits, ablation) is None
    assert {fit.p_value for fit in fits} == {None}
    single = dataclasses.replace(make_task(), test_class_M=np.zeros_like(make_task().test_class_M))
    assert {fit.p_value for fit, _ in probing.run_probes(single, CONFIG, [1])} == {None}  # of one class
    label = probing.ProbedLabel("a", "", None, {}, {}, 0, 0, 0, tuple(fits), None)
    assert {fit.p_holm for fit in probing.correct([label])[0].probes} == {None}


class Drawn(probing.FeatureAblation):
    """Effects of ten features that are drawn, without controls."""

    def measure_drop(self, sets, fractions):
        return self.texts.drop_SxP[: len(sets)]


def drawn_label(rng, number, fit, prompts, is_true):
    """A label that a probe reads, or not, and ten features of which one costs two deviations, or none anything."""
    class_M, answer_M = rng.integers(2, size=(2, 2 * prompts))
    answer_M = np.where(rng.random(2 * prompts) < 0.95 * is_true, class_M, answer_M)
    fit = dataclasses.replace(fit, inputs=tuple(range(10)), k=10)
    fit = dataclasses.replace(fit, p_value=probing.permutation_p(answer_M, class_M, 500, rng))
    texts = SimpleNamespace(
        drop_SxP=rng.normal(size=(10, prompts)) + 2 * is_true * (np.arange(10) == 0)[:, None],
        statistics=lambda: SimpleNamespace(prompts_F=np.zeros(11, int)),
        changes=lambda features: SimpleNamespace(dose=lambda some: 0.0),
    )
    selected = probing.ablate_selected(CONFIG, [fit], lambda: Drawn("", texts, ["x", "y"] * (prompts // 2)))
    return probing.ProbedLabel(number, "b", None, {}, {}, 0, 0, 0, (fit,), selected)


@pytest.mark.parametrize("prompts", [8, 20])
def test_few_probes_and_features_are_significant_where_nothing_is_read_or_used(prompts, monkeypatch):
    """A defect: of ten features each of four labels one was significant in 84 of 100 worlds of 8 prompts, 15 of 20."""
    monkeypatch.setattr(probing, "_RESAMPLES", 1999)
    fit, rates = next(probing.run_probes(make_task(), CONFIG, [1]))[0], {}
    for is_true in (False, True):
        rng, found_2 = np.random.default_rng(prompts + is_true), np.zeros(2, int)
        for _ in range(100):
            labels = probing.correct([drawn_label(rng, str(number), fit, prompts, is_true) for number in range(4)])
            features = [feature.p_holm for label in labels for feature in label.selected.features]
            found_2 += [min(label.probes[0].p_holm for label in labels) <= 0.05, min(features) <= 0.05]
        rates[is_true] = found_2.tolist()
    print(f"{prompts} prompts, probes and features: {rates[False]} of 100 null and {rates[True]} of 100 true worlds")
    assert max(rates[False]) <= 8
    assert min(rates[True]) >= 80 or prompts < 20  # of 8 prompts no p-value is small enough for 40 features


def test_p_values_are_corrected_over_labels_and_features():
    fit = next(probing.run_probes(make_task(), CONFIG, [1]))[0]
    features = (
        probing.SelectedFeature(3, Interval(1.0, 0.5, 1.5), 0.01, 0.01, (0.2, 1.2)),
        probing.SelectedFeature(8, Interval(0.1, -0.1, 0.3), 0.3, 0.3, ()),
    )
    labels = []
    for p_value in (0.01, 0.04):
        selected = probing.SelectedFeatures("logit difference", features)
        probe = dataclasses.replace(fit, p_value=p_value)
        labels.append(probing.ProbedLabel("answer", "b", None, {}, {}, 0, 0, 0, (probe,), selected))
    first, second = probing.correct(labels)
    assert [label.probes[0].p_holm for label in (first, second)] == pytest.approx([0.02, 0.04])
    assert [each.p_holm for each in first.selected.features] == pytest.approx([0.04, 0.6])


def test_questions_of_benchmarks_are_probed_and_ablated(tmp_path, make_run):
    solution = "He buys <<3*4=12>>12 and then <<12-5=7>>7.\n#### 7"
    items = tmp_path / "gsm8k.jsonl"
    write_lines(items, [dict(question=f"What of {n}?", answer=solution) for n in range(40)])
    task = TaskConfig(benchmarks=("gsm8k",), path=str(items), examples=40, shots=0)
    unit = tmp_path / "benchmark"
    unit.mkdir()
    rest = dict(
        task="", question="", reference="7", output="7", finished="eos", strict=dict(answer=None, correct=False)
    )
    rows = [
        dict(id=item.id, prompt=f"Q {n}", flexible=dict(answer="7", correct=n % 2 == 0), **rest)
        for n, item in enumerate(read_items("gsm8k", task))
    ]
    write_lines(unit / "items.jsonl", rows)
    run, _ = make_run("benchmarks", task, labels=("correct",))
    run = dataclasses.replace(run, inputs={**run.inputs, "benchmark/gsm8k": unit})
    prompts, diffs = stage.read_benchmark_prompts(run, "benchmark/gsm8k")
    assert [dict(p.labels) for p in prompts] == [
        dict(correct="wrong" if n % 2 else "right", steps="2", operation="-") for n in range(40)
    ]
    assert [diff > 0 for diff in diffs] == [n % 2 == 0 for n in range(40)]
    assert sorted(p.split for p in prompts) == ["test"] * 20 + ["train"] * 20
    assert {p.behaviour for p in prompts} == {"gsm8k"}
    *_, last = stage.run_probe(run).labels
    assert last.behaviour == "gsm8k" and last.reason is None and len(last.probes) == 6
    assert last.selected.readout == "log-likelihood of the reference answer"
    assert len(last.selected.features) == 2
