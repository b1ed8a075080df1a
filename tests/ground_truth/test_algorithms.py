"""Questions of known algorithms against other ways to answer them, and the transformers trained on them."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import settings_read
from scipy.sparse.csgraph import shortest_path

from saejax import load_model, load_results
from saejax.ground_truth.algorithms import transformer
from saejax.ground_truth.algorithms.addition import Addition
from saejax.ground_truth.algorithms.features import RANDOM, TRAINED, _match_value, ablate_each, compare, match_variables
from saejax.ground_truth.algorithms.paths import Paths
from saejax.ground_truth.circuits.cases import make_case
from saejax.ground_truth.circuits.dictionaries import untrained_sets
from saejax.ground_truth.circuits.handset import checkpoint
from saejax.ground_truth.hub_folder import save_model
from saejax.interventions.edits import mask
from saejax.interventions.engine import effects
from saejax.models.families import read_config
from saejax.runner import command
from saejax.runner.pipeline import run_stages
from saejax.stages.algorithm import run as algorithms_run
from saejax.stages.ground_truth.report import _features_line

pytestmark = pytest.mark.usefixtures("single_device")


NODES = "ABCDEF"


def sum_of(text):
    """The answer's digits, lowest first, of "3 4 7 + 5 8 6 = 3"."""
    first, second = (int(part.replace(" ", "")) for part in text.split("=")[0].split("+"))
    return str(first + second)[::-1].ljust(4, "0")


def test_sums_are_python_s_sums():
    algorithm, rng = Addition(3), np.random.default_rng(0)
    questions = algorithm.batch(300, rng)
    for ids_T, place_N, right_NxV in zip(questions.ids_BxT, questions.place_BxN, questions.right_BxNxV, strict=True):
        words = [algorithm.words[word] for word in ids_T]
        assert words[0] == "<s>" and words[place_N[0]] == "="
        answer = [algorithm.words[int(right_V.argmax())] for right_V in right_NxV]
        assert right_NxV.sum() == 4 and "".join(answer) == sum_of(" ".join(words[1:]))
        assert words[place_N[0] + 1 :] == answer
    assert 0.05 < questions.fresh_B.mean() < 0.16


def test_counterparts_of_sums_differ_in_the_carry_alone():
    for prompt in Addition(3).prompts(20, np.random.default_rng(1)):
        texts, place = (prompt.text, prompt.counterpart), len(prompt.text.partition("=")[2].split())
        assert [sum_of(text)[place] for text in texts] == [prompt.correct.strip(), prompt.wrong.strip()]
        for text in texts:
            assert text.partition("=")[2].split() == list(sum_of(text)[:place])
        first, second = (part.split() for part in prompt.text.split("=")[0].split("+"))
        below = [sum(int("".join(number[3 - place :]) or 0) for number in (first, second)) >= 10**place]
        assert dict(prompt.labels)["carry"] == ("yes" if place and below[0] else "no")
        columns = [[text.split()[2 - place], text.split()[6 - place]] for text in texts]
        assert place == 0 or columns[0] == columns[1]


def distances(words):
    """The edges "A-B" of a question, and how far each node is from each."""
    near_NxN = np.zeros((len(NODES), len(NODES)))
    for first, second in (word.split("-") for word in words if "-" in word):
        near_NxN[NODES.index(first), NODES.index(second)] = 1
    return near_NxN + near_NxN.T, shortest_path(near_NxN, directed=False, unweighted=True)


def right_answers(words):
    """How far the goal is, or the nodes beside the start that lie on a shortest path."""
    start, goal = (NODES.index(word.strip("<>")) for word in words[-3:-1])
    near_NxN, far_NxN = distances(words)
    assert np.isfinite(far_NxN).all()
    if words[-1] == "far":
        return {str(int(far_NxN[start, goal]))}
    on_path_N = (near_NxN[start] > 0) & (far_NxN[goal] == far_NxN[start, goal] - 1)
    return {NODES[node] for node in np.flatnonzero(on_path_N)}


@pytest.mark.parametrize("sort", ["next", "far"])
def test_paths_are_scipy_s_paths(sort):
    algorithm = Paths(6, 8)
    questions = algorithm.draw(sort, 200, np.random.default_rng(0))
    for ids_T, (place,), right_1xV in zip(questions.ids_BxT, questions.place_BxN, questions.right_BxNxV, strict=True):
        words = [algorithm.words[word] for word in ids_T[1 : place + 1]]
        assert words[-1] == sort
        assert {algorithm.words[word] for word in np.flatnonzero(right_1xV[0])} == right_answers(words)


def test_counterparts_of_paths_have_the_other_answer():
    for prompt in Paths(6, 8).prompts(40, np.random.default_rng(2)):
        words, swapped = prompt.text.split(), prompt.counterpart.split()
        assert len(words) == len(swapped)
        assert right_answers(words) == {prompt.correct.strip()} and right_answers(swapped) == {prompt.wrong.strip()}
        assert prompt.correct != prompt.wrong
        far_N = distances(words)[1][NODES.index(words[-3].strip("<>"))]
        labels = dict(prompt.labels)
        assert [labels[f"two_{name}"] == "yes" for name in NODES] == [far == 2 for far in far_N]


def test_a_checkpoint_is_read_as_it_was_written(tmp_path, one_device):
    algorithm = Addition(2)
    fields = transformer.describe(len(algorithm.words), 32, layers=2, width=16)
    config = read_config(fields, "config.json")
    params = transformer.initial(config, 0)
    save_model(tmp_path, fields, transformer.tensors(config, params), algorithm.words)
    model = load_model(str(tmp_path), mesh=one_device)
    assert model.config == config and model.params.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(model.params[name], value, err_msg=name)


def test_each_question_is_judged_once_whatever_the_batch(monkeypatch):
    algorithm = Addition(2)
    config = read_config(transformer.describe(len(algorithm.words), 16, 1, 16), "config.json")
    params, questions = transformer.initial(config, 0), algorithm.draw("addition", 5, np.random.default_rng(0))
    logits_BxNxV = transformer.answer_logits(config, params, questions.ids_BxT, questions.place_BxN)
    best_BxN = np.asarray(logits_BxNxV).argmax(axis=-1)
    right_BxNxV = np.zeros_like(questions.right_BxNxV)
    for number in (0, 3, 4):  # as if these were the right answers
        right_BxNxV[number, np.arange(best_BxN.shape[1]), best_BxN[number]] = True
    judged = dataclasses.replace(questions, right_BxNxV=right_BxNxV)
    monkeypatch.setattr(transformer, "_BATCH", 2)
    assert transformer.correct(config, params, judged).tolist() == [True, False, False, True, True]


def test_same_seed_same_bits_and_fresh_questions_are_never_learned(tmp_path, monkeypatch):
    for name, value in dict(_TEXTS=100, _PROMPTS=10, _FRESH=200, _WIDTH=32).items():
        monkeypatch.setattr(algorithms_run, name, value)
    monkeypatch.setitem(algorithms_run._DICTIONARY, "expansion", 2)
    configs = runs.make_configs(task__behaviours=(), algorithm__names=("addition",), algorithm__steps=10)
    run_stages(["algorithm"], configs, tmp_path / "first")
    assert settings_read.never_read("algorithm") <= set()
    with monkeypatch.context() as patch:  # the second ends where the first has what is compared
        patch.setattr(algorithms_run, "load_model", lambda *of, **more: None)
        patch.setattr(algorithms_run, "_dictionaries", lambda *of: {})
        patch.setattr(algorithms_run, "match_variables", lambda *of: ())
        patch.setattr(algorithms_run, "compare", lambda ablated: ablated)
        run_stages(["algorithm"], configs, tmp_path / "second")
    folders = [tmp_path / name / "algorithm" / "addition" for name in ("first", "second")]
    for file in ("model/model.safetensors", "prompts.jsonl"):
        assert len({(folder / file).read_bytes() for folder in folders}) == 1, file
    assert list(load_results(folders[0]).features) == ["trained", "random directions"]
    run_stages(["report"], configs, tmp_path / "first")
    text = (tmp_path / "first" / "report" / "report.md").read_text()
    assert (
        "Not learned to the required accuracy: addition" in text and "addition: features ablated one at a time" in text
    )
    # Weights of the loss are 0 for fresh questions: with nothing else there is nothing to learn.
    algorithm, optimizer = Addition(2), transformer.make_optimizer(10, 0.0)
    config = read_config(transformer.describe(len(algorithm.words), 16, 1, 16), "config.json")
    params = transformer.initial(config, 0)
    fresh = algorithm.fresh("addition", 8, np.random.default_rng(0))
    _, _, loss = transformer.trainer(config, optimizer)(params, optimizer.init(params), fresh)
    assert float(loss) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["addition", "paths"])
def test_algorithms_are_learned_and_the_binaries_take_them(name, tmp_path):
    flags = [f"--algorithm.names={name}"]
    assert command.run(["algorithm"], "", ["program", f"--workdir={tmp_path}", *flags]) == 0
    unit = tmp_path / "algorithm" / name
    results = load_results(unit)
    assert all(share.mean >= results.required[sort] for sort, share in results.accuracy.items())
    assert results.features["trained"].changing.mean > results.features["random directions"].changing.mean
    baseline = [
        f"--workdir={tmp_path / 'own'}",
        f"--model.path={unit / 'model'}",
        "--task.behaviours=",
        f"--task.prompts={unit / 'prompts.jsonl'}",
    ]
    assert command.run(["baseline"], "", ["program", *baseline]) == 0
    summary = json.loads((tmp_path / "own" / "baseline" / "done.json").read_text())
    assert all(each["test"]["accuracy"]["mean"] > 0.9 for each in summary["results"]["behaviours"].values())


@pytest.fixture(scope="module")
def logic(tmp_path_factory, one_device):
    """A transformer set by hand, and the exact dictionary of its neurons."""
    case, folder = make_case("logic", 20, 3), tmp_path_factory.mktemp("logic")
    save_model(folder, *checkpoint(case.model, 3), list(case.model.words))
    lm = load_model(str(folder), mesh=one_device)
    return case, lm, untrained_sets(case, lm, 1, 3)["exact"]


def test_features_change_the_answers_that_depend_on_them(logic):
    """Neurons of a transformer set by hand: without a pair of bits that is asked for, the last bit decides."""
    case, lm, exact = logic
    tests = [prompt for prompt in case.prompts if prompt.split == "test"]
    changed_N, effect_N = ablate_each(lm, exact, tests)
    bits_PxN = np.array([[int(bit) for bit in prompt.text.split()[:-1]] for prompt in tests])
    pair_PxM = np.arange(8)[None] * 4 + bits_PxN[:, ::2] * 2 + bits_PxN[:, 1::2]
    asked_P = np.array([["xor", "both", "either"].index(prompt.behaviour) for prompt in tests])
    right_P = np.array([prompt.correct == " yes" for prompt in tests])
    used_P = pair_PxM[np.arange(len(tests)), asked_P]
    live, fires_N = np.unique(pair_PxM, return_counts=True)
    changing = np.isin(live, used_P[(bits_PxN[:, -1] == 1) != right_P])
    # Features come in random order. With the pair goes the answer's logit of 8.
    wanted_N = 8 * np.array([(used_P == pair).sum() for pair in live]) / fires_N
    np.testing.assert_allclose(np.sort(effect_N), np.sort(wanted_N), atol=1e-4)
    assert 0 < changed_N.sum() == changing.sum() < len(live) == len(changed_N)


def test_known_variables_are_matched_with_the_features_that_fire_on_them(logic):
    """A neuron of a transformer set by hand fires on each pair of bits; 20 random labels go with none."""
    case, lm, exact = logic
    rng = np.random.default_rng(0)

    def label(prompt):
        is_both = prompt.text.split()[:2] == ["1", "1"]
        noise = tuple((f"noise{number}", str(rng.integers(2))) for number in range(20))
        return dataclasses.replace(prompt, labels=(("both", "yes" if is_both else "no"), *noise))

    prompts = [label(prompt) for prompt in case.prompts]
    first, *others = match_variables(lm, {TRAINED: exact, RANDOM: exact}, prompts)
    tests = [prompt for prompt in prompts if prompt.split == "test"]
    with_both = [prompt for prompt in tests if dict(prompt.labels)["both"] == "yes"]
    assert (first.variable, first.value, first.prompts) == ("both", "yes", len(with_both))
    assert first.auc == 1.0 and first.p_holm < 0.01 and first.drop == first.random_drop != 0
    ablated = [row for edit in ([], [first.feature]) for row in [effects(lm, with_both, mask(exact, [edit]))]]
    assert first.drop == pytest.approx(float((ablated[0] - ablated[1]).mean()), abs=1e-5)
    assert len(others) == 40 and sum(other.p_holm <= 0.05 for other in others) <= 1


def test_p_values_of_features_that_are_mostly_silent():
    """Labels that no feature goes with, 6 prompts with the label: 200 worlds, of which few have a small p-value.

    And 100 where a feature fires on four of five prompts with the label.
    """
    rng, found, has_Q = np.random.default_rng(0), [], np.arange(26) < 6
    for worlds, fires in ((200, 0.05), (100, 0.8)):
        p_values = []
        for _ in range(worlds):
            act_QxF = np.where(
                rng.random((26, 1)) < np.where(has_Q, fires, 0.05)[:, None], rng.lognormal(size=(26, 1)), 0
            )
            p_values.append(_match_value(act_QxF, has_Q, act_QxF, has_Q)[2])
        found.append(np.mean(np.array(p_values) <= 0.05))
    print(f"a variable has a feature: yes in {found[0]} of 200 null and {found[1]} of 100 true worlds")
    assert found[0] <= 0.06 and found[1] >= 0.8


def test_random_directions_do_no_more_than_random_directions():
    """200 worlds whose features are random directions, of few live features and of many, and 200 with effects."""
    rng, yes = np.random.default_rng(0), []
    for larger in (1.0, 4.0):
        said = []
        for world in range(200):
            effects_of = {RANDOM: (np.zeros(1, bool), rng.lognormal(size=20 + world))}
            effects_of[TRAINED] = np.zeros(1, bool), larger * rng.lognormal(size=20 + world)
            said.append("? YES: " in _features_line("addition", SimpleNamespace(features=compare(effects_of))))
        yes.append(sum(said))
    print(f"features do more than random directions: yes in {yes[0]} of 200 null and {yes[1]} of 200 true worlds")
    assert yes[0] <= 4 and yes[1] >= 160


def test_effects_are_compared_with_those_of_random_directions():
    ablated = {
        "trained": (np.arange(100) < 30, np.arange(100) / 10),
        "random directions": (np.zeros(100, bool), np.arange(100) / 100),
    }
    trained, random = compare(ablated).values()
    assert (trained.live, trained.changing.mean, random.changing.mean) == (100, 0.3, 0.0)
    assert (trained.above.mean, random.above.mean) == (0.9, 0.05)
    assert trained.effect.mean == pytest.approx(4.95)
