"""The stage: its verdict follows from the saved table, and a run that is stopped goes on to the same result."""

import json

import numpy as np
import pytest
from runs import changed, write_members

import saejax
from saejax.dictionaries import save_dictionary
from saejax.errors import Interrupted, UserError
from saejax.interventions import ablate_run as stage
from saejax.interventions.ablation import verdict_config
from saejax.interventions.answers import AblateResults
from saejax.interventions.importance import Importance, has_same_sign
from saejax.interventions.table import TESTED, load_effects
from saejax.interventions.verdict import verdict
from saejax.results import from_json, to_json
from saejax.runner.config import Configs
from saejax.runner.workspace import Run
from saejax.settings import AblateConfig, CorpusConfig, MeshConfig, ModelConfig, TaskConfig
from saejax.tasks.behaviours import read_prompts, write_prompts

SETTINGS = dict(
    top=4,
    random_sets=12,
    placebo_targets=8,
    bootstrap=500,
    batch_rows=32,
    baselines=("pca",),
    untrained=False,
    text_documents=2,
)


@pytest.fixture
def make_run(tmp_path, tiny_llama, make_dictionary, make_prompt):
    baseline, train = tmp_path / "baseline", tmp_path / "train" / "topk"
    baseline.mkdir()
    prompts = [
        make_prompt(i, "train" if i < 10 else "test", behaviour) for behaviour in ("first", "second") for i in range(18)
    ]
    write_prompts(baseline / "prompts.jsonl", prompts)
    save_dictionary(train, make_dictionary("resid_post.1"))
    write_members(train, "")

    def make(name, **changes):
        (tmp_path / name).mkdir(exist_ok=True)
        said = []
        configs = Configs(
            ModelConfig(path=str(tiny_llama)), MeshConfig(), CorpusConfig(), TaskConfig(), AblateConfig(**SETTINGS)
        )
        inputs = {"baseline": baseline, "train/topk": train}
        return Run("ablate", "topk", tmp_path / name, configs, inputs, say=said.append, **changes), said

    return make


def test_the_stage_end_to_end_stopped_and_resumed(make_run, tiny, make_dictionary):
    whole, said = make_run("whole")
    results = stage.run_ablate(whole)
    assert from_json(AblateResults, json.loads(json.dumps(to_json(results), allow_nan=False)), "") == results
    assert (results.dictionary, results.site, results.k) == ("topk", "resid_post.1", 4)
    assert list(results.verdict.dictionaries[TESTED]) == ["first", "second"]
    assert any(line.startswith("ablate: second (2 of 2): ") for line in said)
    assert sorted(path.name for path in whole.folder.iterdir()) == [
        "edits.json", "effects.parquet", "first.json", "prompts.json", "second.json",
    ]  # fmt: skip

    # The verdict is a function of the saved table, and the library gives the same one without a workdir.
    table = load_effects(whole.folder)
    assert verdict(table, verdict_config(whole.configs[AblateConfig])) == results.verdict
    prompts = read_prompts(whole.inputs["baseline"] / "prompts.jsonl")
    found = saejax.ablate(tiny, make_dictionary("resid_post.1"), prompts, **SETTINGS)
    assert found.top["first"][0].feature == results.top["first"][0].feature
    for name in ("first", "second"):
        got, want = (each.dictionaries[TESTED][name] for each in (found.verdict, results.verdict))
        assert got.features == want.features and got.random.answer == want.random.answer
        assert got.ablation["logit_diff"].effect.mean == pytest.approx(
            want.ablation["logit_diff"].effect.mean, abs=1e-4
        )

    # Asked to stop once the first behaviour is there: it is kept, and what comes then is the same to the bit.
    folder = whole.folder.parent / "stopped"
    stopped, _ = make_run("stopped", stopping=lambda: (folder / "first.json").exists())
    with pytest.raises(Interrupted, match="second .2 of 2.: stopped"):
        stage.run_ablate(stopped)
    written = (folder / "first.json").stat().st_mtime_ns
    resumed, said = make_run("stopped")
    assert stage.run_ablate(resumed) == results
    assert (folder / "first.json").stat().st_mtime_ns == written
    assert said[0] == "ablate: kept from an earlier run: first"
    # Killed while it removed the parts' tables, before it was done: the whole table is there.
    assert stage.run_ablate(make_run("stopped")[0]) == results
    again = load_effects(folder)
    for edit_group in ("top", "random", "placebo"):
        edits, prompts_P = again.select_edits("second", edit_group), again.select_prompts("second")
        np.testing.assert_array_equal(
            again.values(edits, prompts_P, "logit_diff"), table.values(edits, prompts_P, "logit_diff")
        )


def test_all_features_are_ranked(make_run):
    run, _ = make_run("all")
    results = stage.run_ablate(changed(run, effects="all", placebo_targets=0, baselines=(), text_documents=0))
    importance = Importance.load(Importance.file(run.folder, "first"))
    table = load_effects(run.folder)
    drop_NxP = table.drops(table.select_edits("first", "every"), table.select_prompts("first"), "logit_diff")
    np.testing.assert_allclose(importance.drop, drop_NxP.mean(axis=1))
    assert len(importance.feature) == results.importance["first"].features
    effect = results.top["first"][0]
    assert importance.drop[importance.feature == effect.feature] == pytest.approx(effect.drop.mean, abs=1e-4)


def test_an_effect_of_one_sign_in_every_template():
    drop_NxP = np.array([[1.0, 2.0, 0.5, 0.1], [1.0, 2.0, -0.5, -0.1], [0.0, 0.0, 0.0, 0.0], [-1.0, -1.0, -2.0, 1.0]])
    assert has_same_sign(drop_NxP, ["a", "a", "b", "b"]).tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(positions="middle"), "there are no positions 'middle'"),
        (dict(repeats=("topk",)), "name each dictionary once"),
        (dict(replacement="counterpart"), "has no counterpart|counterpart"),
    ],
)
def test_what_cannot_be_run_is_said(make_run, changes, message):
    run, _ = make_run("refused")
    if changes.get("replacement"):
        lines = [json.loads(line) for line in (run.inputs["baseline"] / "prompts.jsonl").read_text().splitlines()]
        text = "\n".join(json.dumps(line | dict(counterpart="")) for line in lines)
        (run.inputs["baseline"] / "prompts.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        stage.run_ablate(changed(run, **changes))
