"""The stage patch, end to end: kinds of site, heads and features, and a stopped run that ends with the same result."""

import dataclasses
import json

import numpy as np
import pytest

from saejax.errors import Interrupted, UserError
from saejax.interventions import patching as stage
from saejax.interventions.edits import swap
from saejax.interventions.engine import effects
from saejax.interventions.patching import fitting_pairs
from saejax.interventions.table import TESTED, load_effects
from saejax.results import from_json, to_json
from saejax.settings import PatchConfig
from saejax.tasks.behaviours import read_prompts, write_prompts

pytestmark = pytest.mark.usefixtures("two_devices")


@pytest.fixture
def make_run(tmp_path, save_inputs, stage_run, make_prompt):
    prompts = []
    for behaviour, templates in (("first", 1), ("second", 2)):
        some = [make_prompt(i, "train" if i < 8 else "test", behaviour, False) for i in range(16)]
        some = [dataclasses.replace(p, template=str(i % templates)) for i, p in enumerate(some)]
        prompts += [dataclasses.replace(p, counterpart=p.text.replace(" near ", " that ")) for p in some[:-1]]
        prompts.append(dataclasses.replace(some[-1], counterpart=""))
    inputs = save_inputs(tmp_path, prompts)
    config = PatchConfig(
        kinds=("resid_post", "attn_z"), dictionary="topk", top=3, placebo_targets=3, bootstrap=200, batch_rows=16
    )

    def make(unit, folder, **fields):
        return stage_run("patch", unit, inputs, folder, config, **fields)[0]

    return make


def assert_is_json(results):
    assert from_json(stage.PatchResults, json.loads(json.dumps(to_json(results), allow_nan=False)), "") == results


def test_sites_killed_and_resumed(make_run):
    whole = make_run("resid_post", "whole")
    results = stage.run_patch(whole)
    assert_is_json(results)
    first = results.behaviours["first"]
    assert first.prompts + sum(first.left_out.values()) == 8 and first.left_out["no counterpart"] == 1
    grid = stage.PatchGrid.load(stage.PatchGrid.file(whole.folder, "first"))
    assert [column.position for column in first.columns] == sorted(set(grid.position.tolist()))

    folder = whole.folder.parent / "stopped"
    with pytest.raises(Interrupted, match="second .2 of 2.: stopped"):
        stage.run_patch(make_run("resid_post", "stopped", stopping=lambda: (folder / "first.json").exists()))
    assert stage.run_patch(make_run("resid_post", "stopped")) == results


def test_heads_are_patched_at_all_positions_together(make_run):
    run = make_run("attn_z", "heads")
    results = stage.run_patch(run)
    assert_is_json(results)
    assert results.positions == "all"
    grid = stage.PatchGrid.load(stage.PatchGrid.file(run.folder, "second"))
    assert set(grid.head.tolist()) == {0, 1, 2, 3} and np.isnan(grid.position.astype(float)).all()


def test_features(make_run, tiny, make_dictionary):
    run = make_run("topk", "features")
    prompts = read_prompts(run.inputs["baseline"] / "prompts.jsonl")
    results = stage.run_patch(run)
    assert_is_json(results)
    assert (results.dictionary, results.site, results.k) == ("topk", "resid_post.1", 3)
    for name, entry in results.behaviours.items():
        verdict, table = results.verdict.dictionaries[TESTED][name], load_effects(run.folder / f"{name}-effects")
        (top,) = table.select_whole_edits(name, "top")
        assert verdict.features == top.features
        # Denoising is noising with prompts and counterparts exchanged, here by the engine.
        tests, _ = fitting_pairs(tiny, [prompt for prompt in prompts if prompt.behaviour == name])
        exchanged = [dataclasses.replace(p, text=p.counterpart, counterpart=p.text) for p in tests]
        edits = swap(make_dictionary("resid_post.1"), [[], top.features])
        corrupted_P, restored_P = effects(tiny, exchanged, edits)[..., 0]
        assert entry.restored.mean == pytest.approx((restored_P - corrupted_P).mean(), abs=1e-5)
        numbers = verdict.random.numbers
        assert numbers["needed"] == 39, "two behaviours"
        assert (verdict.random.answer == "not testable") == (numbers["sets"] < 39)
        assert verdict.selective.answer == "not tested"


def test_a_behaviour_that_cannot_be_patched_is_named_and_the_others_go_on(make_run):
    run = make_run("topk", "some")
    path = run.inputs["baseline"] / "prompts.jsonl"
    prompts = read_prompts(path)
    write_prompts(path, [p for p in prompts if (p.behaviour, p.split) != ("first", "train")])
    results = stage.run_patch(run)
    assert list(results.behaviours) == ["second"] and "no train prompts" in results.unpatched["first"]
    # Sites need no train prompts.
    results = stage.run_patch(make_run("resid_post", "sites"))
    assert list(results.behaviours) == ["first", "second"] and results.unpatched == {}

    write_prompts(path, [dataclasses.replace(p, counterpart="") for p in prompts])
    with pytest.raises(UserError, match=r"no behaviour can be patched .first: of 8 test prompts 8 have no counterpart"):
        stage.run_patch(make_run("resid_post", "none"))
