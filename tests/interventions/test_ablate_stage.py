"""The stage: its verdict follows from the saved table, and a run that is stopped goes on to the same result."""

import dataclasses
import json

import numpy as np
import pytest

import saejax
from saejax.errors import Interrupted, UserError
from saejax.interventions import ablate_run as stage
from saejax.interventions.ablation import verdict_config
from saejax.interventions.answers import AblateResults
from saejax.interventions.table import TESTED
from saejax.results import from_json, to_json
from saejax.settings import AblateConfig, CorpusConfig, TaskConfig
from saejax.tasks.behaviours import read_prompts, write_prompts

SETTINGS = dict(
    top=4, random_sets=12, placebo_targets=8, bootstrap=500, batch_rows=32, baselines=("pca",), untrained=False
)
CONFIG = AblateConfig(**SETTINGS, text_documents=2)


@pytest.fixture
def make_run(tmp_path, save_inputs, stage_run, make_prompt):
    behaviours = ("first", "second")
    prompts = [make_prompt(i, "train" if i < 10 else "test", name, False) for name in behaviours for i in range(18)]
    inputs = save_inputs(tmp_path, prompts)

    def make(name, config=CONFIG, **fields):
        return stage_run("ablate", "topk", inputs, name, CorpusConfig(), TaskConfig(), config, **fields)

    return make


def test_the_stage_end_to_end_stopped_and_resumed(make_run, tiny, make_dictionary):
    whole, lines = make_run("whole")
    results = stage.run_ablate(whole)
    assert from_json(AblateResults, json.loads(json.dumps(to_json(results), allow_nan=False)), "") == results
    assert (results.dictionary, results.site, results.k) == ("topk", "resid_post.1", 4)
    assert list(results.verdict.dictionaries[TESTED]) == ["first", "second"]
    assert any(line.startswith("ablate: second (2 of 2): ") for line in lines)
    assert sorted(path.name for path in whole.folder.iterdir()) == [
        "edits.json", "effects.parquet", "first-effects", "first.json", "prompts.json", "second-effects", "second.json",
    ]  # fmt: skip

    # The verdict is a function of the saved table, and the library gives the same one without a workdir.
    table = saejax.load_effects(whole.folder)
    assert saejax.verdict(table, verdict_config(CONFIG)) == results.verdict
    prompts = read_prompts(whole.inputs["baseline"] / "prompts.jsonl")
    called = saejax.ablate(tiny, make_dictionary("resid_post.1"), prompts, **SETTINGS)
    assert called.top["first"][0].feature == results.top["first"][0].feature
    for name in ("first", "second"):
        of_call, of_stage = (each.dictionaries[TESTED][name] for each in (called.verdict, results.verdict))
        assert of_call.features == of_stage.features and of_call.random.answer == of_stage.random.answer
        means = [each.ablation["logit_diff"].effect.mean for each in (of_call, of_stage)]
        assert means[0] == pytest.approx(means[1], abs=1e-4)

    # Asked to stop once the first behaviour is there: it is kept, and what comes then is the same to the bit.
    folder = whole.folder.parent / "stopped"
    stopped, _ = make_run("stopped", stopping=lambda: (folder / "first.json").exists())
    with pytest.raises(Interrupted, match="second .2 of 2.: stopped"):
        stage.run_ablate(stopped)
    written = (folder / "first.json").stat().st_mtime_ns
    resumed, lines = make_run("stopped")
    assert stage.run_ablate(resumed) == results
    assert (folder / "first.json").stat().st_mtime_ns == written
    assert lines[0] == "ablate: kept from an earlier run: first"
    # Killed before it was done, when all behaviours were: nothing is measured again.
    assert stage.run_ablate(make_run("stopped")[0]) == results
    again = saejax.load_effects(folder)
    for group in ("top", "random", "placebo"):
        edits, prompts_P = again.select_edits("second", group), again.select_prompts("second")
        resumed_ExP, whole_ExP = (each.values(edits, prompts_P, "logit_diff") for each in (again, table))
        np.testing.assert_array_equal(resumed_ExP, whole_ExP)


def test_what_cannot_be_run_is_said(make_run):
    for changes, message in (
        (dict(positions="middle"), "there are no positions 'middle'"),
        (dict(repeats=("topk",)), "name each dictionary once"),
        (dict(replacement="counterpart"), "first, prompt 'The .*', has no counterpart: give it one"),
    ):
        run, _ = make_run("refused", dataclasses.replace(CONFIG, **changes))
        path = run.inputs["baseline"] / "prompts.jsonl"
        write_prompts(path, [dataclasses.replace(prompt, counterpart="") for prompt in read_prompts(path)])
        with pytest.raises(UserError, match=message):
            stage.run_ablate(run)
