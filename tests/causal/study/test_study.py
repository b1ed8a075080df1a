"""Benchmarks without features: every condition by hand, attribution by autograd, resuming, chance, bad input."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from runs import write_members

from saejax.causal import parts
from saejax.causal.study import run as stage
from saejax.causal.study import scores as study_scores
from saejax.causal.study.references import Reference, References
from saejax.causal.study.results import StudyEffects, StudyItems, StudyResults
from saejax.dictionaries import Dictionary, save_dictionary
from saejax.errors import Interrupted, UserError
from saejax.interventions.split_model import SplitModel
from saejax.models.tokens import pad
from saejax.results import Interval, from_json, to_json
from saejax.runner import pipeline, workplan
from saejax.runner.config import Configs
from saejax.runner.registry import default_configs
from saejax.runner.workspace import Run
from saejax.settings import MeshConfig, ModelConfig, StudyConfig, TaskConfig
from saejax.tasks.benchmark_definitions import LOGIC_TASKS
from saejax.tasks.benchmark_scores import score_items
from saejax.tasks.benchmarks import read_items
from saejax.tasks.scoring import wilson

SITE = "resid_post.1"
CONFIG = StudyConfig(
    benchmarks=("logic", "gsm8k"), items=12, top=3, draws=2, matches=4, bootstrap=200, batch_tokens=4096
)


@pytest.fixture(autouse=True)
def small_machine(one_device, monkeypatch):
    """Most of the time of these tests is compiling, for eight devices the more so."""
    monkeypatch.setattr(parts, "make_mesh", lambda config: one_device)


def write_lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Questions that are short enough for the tiny model."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for number, name in enumerate(LOGIC_TASKS):
        rows = [dict(input=f"{number} Pick {letter}\n(A) x\n(B) y\n(C) z", target=f"({letter})") for letter in "BAC"]
        if name in ("boolean_expressions", "web_of_lies"):
            right = "True" if name == "boolean_expressions" else "No"
            rows = [dict(input=f"Is {n} so", target=right) for n in range(3)]
        write_lines(folder / "logic" / f"{name}.jsonl", rows)
    sums = [dict(question=f"{n} + 3?", answer=f"It is {n + 3}\n#### {n + 3}") for n in range(12)]
    write_lines(folder / "gsm8k.jsonl", sums)
    return TaskConfig(path=str(folder), examples=12, shots=0, bootstrap=200, max_new_tokens=6, batch=4)


@pytest.fixture(scope="module")
def dictionary(make_dictionary):
    return make_dictionary(SITE, dead=8)


@pytest.fixture
def make_run(tmp_path, tiny_llama, dictionary, task):
    def make(name, folder="run", stopping=lambda: False, made=dictionary, score="auto", **changes):
        train = tmp_path / f"{folder}-topk"
        if not train.exists():
            save_dictionary(train, made)
            write_members(train, "")
        (tmp_path / folder).mkdir(exist_ok=True)
        configs = Configs(
            ModelConfig(path=str(tiny_llama)),
            MeshConfig(),
            dataclasses.replace(task, score=score),
            dataclasses.replace(CONFIG, **changes),
        )
        said = []
        return Run("study", name, tmp_path / folder, configs, {"train/topk": train}, said.append, stopping), said

    return make


def read(run):
    return [json.loads(text) for text in (run.folder / stage.ITEMS).read_text().split("\n") if text]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gsm8k", dict(score="likelihood")),
        pytest.param("logic", {}, marks=pytest.mark.slow),
        pytest.param("logic", dict(even_at_chance=True), marks=pytest.mark.slow),
    ],
)
def test_conditions_by_hand_killed_and_resumed(make_run, tiny, dictionary, task, name, settings):
    judged, every = name == "logic", "even_at_chance" in settings
    run, _ = make_run(name, **settings)
    path = run.folder / stage.CONDITIONS / "top-zero.jsonl"
    stopped = dataclasses.replace(run, stopping=path.exists)
    with pytest.raises(Interrupted, match=f"{name}: stopped; conditions that were finished are kept"):
        stage.run_study(stopped)
    kept = [path.with_name(f"{name}.jsonl").read_text() for name in ("clean", "top-zero")]

    run, said = make_run(name, **settings)
    results = stage.run_study(run)
    assert from_json(StudyResults, json.loads(json.dumps(to_json(results), allow_nan=False)), "") == results
    rows = read(run)
    assert (run.folder / stage.ITEMS).read_text().startswith("".join(kept)) and not path.parent.exists()
    assert [row["condition"] for row in rows[:12]] == ["clean"] * 6 + ["top/zero"] * 6
    assert not any(line.startswith(("clean:", "top/zero:")) for line in said)
    assert results.at_chance is (True if judged else None)
    assert said[0].startswith("At chance before any edit: accuracy on 6 test items is ") == judged
    by_condition = {}
    for row in rows:
        by_condition.setdefault(row["condition"], []).append(row)
    assert list(by_condition) == study_scores.conditions(2) and results.items == StudyItems(train=6, test=6)
    assert all(("correct" in row) == (judged and (every or row["condition"] == "clean")) for row in rows)

    chosen = json.loads((run.folder / stage.FEATURES).read_text())
    top = [entry.feature for entry in results.top]
    assert len(top) == 3 and all(len(set(draw)) == 3 for draw in results.controls)
    train, test = stage.halves(read_items(name, task), CONFIG, name)
    assert not {item.id for item in train} & {item.id for item in test}
    pools = [chosen["pools"][str(feature)] for feature in top]
    edits = {
        "clean": [],
        "top/zero": [dictionary.ablate(top)],
        "top/random": None,
        "control-1/zero": [dictionary.ablate(results.controls[1])],
    }
    for condition, own in edits.items():
        redrawn = own is None
        own = [dictionary.redraw(top, pools, 128, seed=42, texts=range(6))] if redrawn else own
        solved = score_items(tiny, name, test, dataclasses.replace(task, score="likelihood"), own)
        for row, solution in zip(by_condition[condition], solved, strict=True):
            assert (row["id"], row["tokens"]) == (solution.id, solution.tokens)
            assert row["log_likelihood"] == pytest.approx(solution.log_likelihood, rel=1e-4)
        if redrawn and every:
            texts = np.repeat(np.arange(6), [len(item.choices) for item in test])
            own = [dictionary.redraw(top, pools, 128, seed=42, texts=texts)]
        answered = score_items(tiny, name, test, task, own) if every else []
        for row, choice in zip(by_condition[condition], answered, strict=False):
            assert (row["answer"], row["correct"]) == (choice.raw.found, choice.raw.correct)
    nats = {key: np.array([r["log_likelihood"] / r["tokens"] for r in own]) for key, own in by_condition.items()}
    assert len({value.tobytes() for value in nats.values()}) == 7  # no edit is without effect
    _same_figures(results.log_likelihood_per_token, nats)
    if every:
        right = {key: np.array([float(r["correct"]) for r in own]) for key, own in by_condition.items()}
        _same_figures(results.accuracy, right)
    else:
        assert results.claims == dict(zero=None, random=None)
        assert results.reason.endswith("were compared." if judged else "(--task.score=likelihood).")
    _one_by_one(run, results, test, tiny, dictionary, name, task, every)


def _one_by_one(run, results, test, tiny, dictionary, name, task, every):
    """The top features in the file of all features, and one of them removed by hand."""
    firing = [entry.feature for entry in results.top if entry.firing_rate > 0]
    ranking = json.loads((run.folder / stage.RANKING).read_text())
    assert sorted(entry["feature"] for entry in ranking if "single" in entry) == sorted(firing)
    first = results.single.features[0]
    scored = "choice" if every else "likelihood"
    rows = [score_items(tiny, name, test, task, own, scored) for own in ((), [dictionary.ablate([first.feature])])]
    if every:
        right = [np.mean([row.raw.correct for row in own]) for own in rows]
        assert first.accuracy_drop.mean == pytest.approx(right[0] - right[1])
        nats = [[row.log_likelihoods[item.choices.index(item.answer)] for item, row in zip(test, own)] for own in rows]
        tokens = [row.tokens for row in score_items(tiny, name, test, task, (), "likelihood")]
        drop = np.mean((np.array(nats[0]) - nats[1]) / tokens)
    else:
        assert first.accuracy_drop is None
        drop = np.mean([a.log_likelihood_per_token - b.log_likelihood_per_token for a, b in zip(*rows)])
    assert first.drop.mean == pytest.approx(drop, abs=1e-4)


def _same_figures(found, scores):
    """The figures are those of the kept rows."""
    assert found.before.mean == pytest.approx(scores["clean"].mean())
    for kind in ("zero", "random"):
        drop = (scores["clean"] - scores[f"top/{kind}"]).mean()
        others = [(scores["clean"] - scores[f"control-{n}/{kind}"]).mean() for n in range(2)]
        assert found.replaced[kind].drop.mean == pytest.approx(drop)
        assert found.replaced[kind].controls == pytest.approx(others)
        assert found.replaced[kind].difference.mean == pytest.approx(drop - np.mean(others))
        assert found.replaced[kind].p_value == pytest.approx((1 + np.sum(np.array(others) >= drop - 1e-9)) / 3)


@pytest.mark.parametrize("batch_tokens", [200, pytest.param(16, marks=pytest.mark.slow)])
def test_attribution_equals_torch_autograd(tiny, tiny_torch, dictionary, plain, prompts, batch_tokens):
    rng = np.random.default_rng(5)
    sizes = [(0, 9, 3, 1.0), (0, 9, 2, -1.0), (1, 30, 11, 1.0), (2, 14, 1, 1.0)]
    references = [
        Reference(item, rng.integers(1, 384, n).tolist(), rng.integers(1, 384, m).tolist(), sign)
        for item, n, m, sign in sizes
    ]
    run, wanted_F = plain(dictionary, prompts[0]), 0.0
    for one in references:
        ids_T, kept = one.context + one.answer, []

        def keep(module, inputs, output, kept=kept):
            stream = output[0] if isinstance(output, tuple) else output
            kept.append(stream.detach().requires_grad_())
            return (kept[0], *output[1:]) if isinstance(output, tuple) else kept[0]

        hook = tiny_torch.model.layers[1].register_forward_hook(keep)
        logp_TxV = torch.log_softmax(tiny_torch(torch.tensor([ids_T])).logits[0], dim=-1)
        hook.remove()
        at = torch.arange(len(one.context) - 1, len(ids_T) - 1)
        (one.sign * logp_TxV[at, torch.tensor(one.answer)].sum()).backward()
        f_TxF = run.features(kept[0].detach()[0].numpy())
        slope_TxF = kept[0].grad[0].numpy() @ np.asarray(dictionary.W_dec_FxD[...], np.float64).T
        wanted_F = wanted_F + (f_TxF * slope_TxF).sum(axis=0) / 3
    found_F = References(SplitModel(tiny, dictionary), references, batch_tokens).attribution()
    np.testing.assert_allclose(found_F, wanted_F, atol=1e-4 * np.abs(wanted_F).max())


def test_statistics_and_pools_are_those_of_the_text(tiny, dictionary, plain, prompts):
    rng = np.random.default_rng(6)
    references = [
        Reference(i, rng.integers(1, 384, n).tolist(), rng.integers(1, 384, 4).tolist())
        for i, n in enumerate((5, 20, 9))
    ]
    run, positions, firing = plain(dictionary, prompts[0]), 0, [[] for _ in range(160)]
    for one in references:
        tokens = pad([one.context + one.answer])
        x_TxD = np.asarray(tiny(tokens, capture=[SITE], logits=False).sites[SITE], np.float64)[0]
        positions += int((np.linalg.norm(x_TxD, axis=1) <= dictionary.config.max_norm).sum())
        for own, f_T in zip(firing, run.features(x_TxD).T, strict=True):
            own += f_T[f_T > 0].tolist()
    made = References(SplitModel(tiny, dictionary), references, 100)
    statistics = made.statistics()
    assert statistics.positions == positions < sum(map(len, references))
    assert statistics.fires_F.tolist() == [len(own) for own in firing]
    np.testing.assert_allclose(statistics.sum_F, [sum(own) for own in firing], rtol=1e-3, atol=1e-3)
    often = int(np.argmax(statistics.fires_F))
    pools = made.pools([often, 159], 10_000, 1)
    np.testing.assert_allclose(sorted(pools[often]), sorted(firing[often]), rtol=1e-3, atol=1e-4)
    few = made.pools([often, 159], 2, 1)[often]
    assert pools[159] == [] and len(few) == 2 and set(few) <= set(pools[often])


@pytest.mark.slow
def test_where_nothing_is_answered_rightly_only_likelihoods_are_measured(make_run):
    run, said = make_run("gsm8k")
    results = stage.run_study(run)
    place = next(i for i, line in enumerate(said) if line.startswith("At chance before any edit: none of 6 test items"))
    assert said[place - 1].startswith("clean:") and not any(line.startswith("top/") for line in said[:place])
    assert results.at_chance is True and results.claims == dict(zero=None, random=None)
    assert results.accuracy == StudyEffects(before=wilson(np.zeros(6)), zero=None, random=None)
    assert results.reason.startswith("At chance before") and results.reason.endswith("were compared.")
    assert results.log_likelihood_per_token.zero.drop.mean != 0
    assert all(("correct" in row) == (row["condition"] == "clean") for row in read(run))


def test_a_dictionary_none_of_whose_features_fires(make_run, dictionary):
    arrays = dictionary.arrays
    arrays["b_enc_F"] = jnp.full_like(arrays["b_enc_F"], -1e4)
    run, _ = make_run("gsm8k", made=Dictionary(dictionary.config, **arrays), score="likelihood")
    results = stage.run_study(run)
    assert results.top == () and results.controls == ((), ())
    effect = results.log_likelihood_per_token.random
    assert effect.drop == Interval(0.0, 0.0, 0.0) and effect.controls == (0.0, 0.0)


def test_what_is_refused(make_run, dictionary):
    with pytest.raises(UserError, match="benchmarks is 'mmlu': expected one of gsm8k, math, logic"):
        StudyConfig(benchmarks=("mmlu",))
    other = Dictionary(dataclasses.replace(dictionary.config, fingerprint="0" * 16), **dictionary.arrays)
    with pytest.raises(UserError, match="use the model it was trained on, or train one for this model"):
        stage.run_study(make_run("logic", "other", made=other)[0])
    with pytest.raises(UserError, match=r"lower --study.top or --study.matches, raise --study.items, or train"):
        stage.run_study(make_run("gsm8k", "many", score="likelihood", matches=200)[0])
    with pytest.raises(UserError, match=r"--study.dictionary=topk/k9, but topk is one dictionary"):
        stage.run_study(make_run("gsm8k", "member", dictionary="topk/k9")[0])
    with pytest.raises(UserError, match="gsm8k has 1 items for --study: expected at least 2"):
        stage.halves([None], CONFIG, "gsm8k")


def test_the_units(task):
    def plan(**changes):
        configs = default_configs() | task | StudyConfig(**changes)
        made = workplan.Workplan(configs)
        return {unit: made.fingerprint(unit) for stage in pipeline.STAGES.values() for unit in stage.units(configs)}

    plain, both = plan(), plan(benchmarks=("logic", "gsm8k"))
    units = {"study/logic", "study/gsm8k"}
    assert set(both) - set(plain) == units
    assert {unit for unit in plain if both[unit] != plain[unit]} == {"preflight", "report"}
    for changes, again in ((dict(top=3), units | {"preflight", "report"}), (dict(batch_tokens=9), set())):
        other = plan(benchmarks=("logic", "gsm8k"), **changes)
        assert {unit for unit in both if both[unit] != other[unit]} == again
