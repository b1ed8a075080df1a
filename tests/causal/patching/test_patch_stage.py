"""The stage patch, end to end: kinds of site and features, and a run that is stopped goes on to the same result."""

import dataclasses
import json

import numpy as np
import pytest
from runs import changed, write_members

from saejax.causal.patching import run as stage
from saejax.causal.patching.grid import PatchingGrid
from saejax.causal.patching.nodes import NodeTable
from saejax.causal.patching.results import HeadPatchResults, PatchResults
from saejax.dictionaries import save_dictionary
from saejax.errors import Interrupted, UserError
from saejax.results import from_json, to_json
from saejax.runner.config import Configs
from saejax.runner.workspace import Run
from saejax.settings import MeshConfig, ModelConfig, PatchConfig
from saejax.tasks.behaviours import read_prompts, write_prompts

pytestmark = pytest.mark.usefixtures("two_devices")


@pytest.fixture
def make_run(tmp_path, tiny_llama, make_dictionary, make_prompt):
    baseline, train = tmp_path / "baseline", tmp_path / "train" / "topk"
    baseline.mkdir()
    prompts = []
    for behaviour in ("first", "second"):
        own = [make_prompt(i, "train" if i < 8 else "test", behaviour) for i in range(16)]
        if behaviour == "second":
            own = [dataclasses.replace(p, template=str(i % 2)) for i, p in enumerate(own)]
        prompts += [dataclasses.replace(p, counterpart=p.text.replace(" near ", " that ")) for p in own[:-1]]
        prompts.append(dataclasses.replace(own[-1], counterpart=""))
    write_prompts(baseline / "prompts.jsonl", prompts)
    save_dictionary(train, make_dictionary("resid_post.1"))
    write_members(train, "")

    def make(unit, folder, **changes):
        (tmp_path / folder).mkdir(exist_ok=True)
        configs = Configs(
            ModelConfig(path=str(tiny_llama)),
            MeshConfig(),
            PatchConfig(dictionary="topk", top=3, draws=3, matches=4, bootstrap=200, batch_rows=16),
        )
        inputs = {"baseline": baseline, "train/topk": train}
        return Run("patch", unit, tmp_path / folder, configs, inputs, say=lambda line: None, **changes)

    return make


def test_sites_killed_and_resumed(make_run):
    whole = make_run("resid_post", "whole")
    results = stage.run_patch(whole)
    assert from_json(PatchResults, json.loads(json.dumps(to_json(results), allow_nan=False)), "") == results
    first = results.behaviours["first"]
    assert first.prompts + sum(first.left_out.values()) == 8 and first.left_out["no counterpart"] == 1
    grid = PatchingGrid.load(PatchingGrid.file(whole.folder, "first"))
    for direction, best in first.strongest.items():
        place = (grid.direction == direction) & (grid.layer == best.layer) & (grid.position == best.position)
        assert grid.effect[place] == best.effect.mean != best.train_effect  # that of other prompts
    assert first.templates == 0 and results.behaviours["second"].templates == 2
    assert [column.position for column in first.columns] == sorted(set(grid.position.tolist()))

    folder = whole.folder.parent / "stopped"
    with pytest.raises(Interrupted, match="second .2 of 2.: stopped"):
        stage.run_patch(make_run("resid_post", "stopped", stopping=lambda: (folder / "first.json").exists()))
    assert stage.run_patch(make_run("resid_post", "stopped")) == results


def test_features(make_run):
    results = stage.run_patch(make_run("topk", "features"))
    assert from_json(PatchResults, json.loads(json.dumps(to_json(results), allow_nan=False)), "") == results
    assert (results.dictionary, results.site) == ("topk", "resid_post.1")
    for entry in results.behaviours.values():
        assert [item.features for item in entry.together] == [1, 2, 3, "all"]
        assert entry.disentangled == ()


def test_features_beside_a_learned_subspace(make_run):
    run = make_run("topk", "learned")
    run = changed(run, das=2, das_steps=3)
    results = stage.run_patch(run)
    assert from_json(PatchResults, json.loads(json.dumps(to_json(results), allow_nan=False)), "") == results
    for entry in results.behaviours.values():
        methods = [(one.method, one.size) for one in entry.disentangled]
        assert methods == [
            ("features", 3), ("random features", 3), ("DAS", 2), ("random subspace", 2), ("whole site", 64),
        ]  # fmt: skip


def test_a_behaviour_that_cannot_be_patched_is_said_and_the_others_go_on(make_run):
    run = make_run("topk", "some")
    path = run.inputs["baseline"] / "prompts.jsonl"
    prompts = read_prompts(path)
    write_prompts(path, [p for p in prompts if (p.behaviour, p.split) != ("first", "train")])
    results = stage.run_patch(run)
    assert list(results.behaviours) == ["second"]
    assert results.unpatched == dict(first="it has no train prompts with counterparts of as many tokens, which choose")
    # Sites need no train prompts, but without them no place is the strongest.
    results = stage.run_patch(make_run("resid_post", "sites"))
    assert results.behaviours["first"].strongest == {} and len(results.behaviours["second"].strongest) == 2
    assert list(results.behaviours) == ["first", "second"] and results.unpatched == {}

    write_prompts(path, [dataclasses.replace(p, counterpart="") for p in prompts])
    told = r"no behaviour can be patched .first: of 8 test prompts 8 have no counterpart and 0 .*in --task.prompts"
    with pytest.raises(UserError, match=told):
        stage.run_patch(make_run("resid_post", "none"))


def test_an_unknown_behaviour_is_refused(make_run):
    run = make_run("resid_post", "refused")
    run = changed(run, behaviours=("third",))
    with pytest.raises(UserError, match=r"unknown behaviour \(--patch.behaviours\) 'third'"):
        stage.run_patch(run)


def test_heads(make_run):
    run = make_run("heads", "heads")
    results = stage.run_patch(run)
    assert from_json(PatchResults, json.loads(json.dumps(to_json(results), allow_nan=False)), "") == results
    assert isinstance(results, HeadPatchResults) and (results.top, list(results.behaviours)) == (3, ["first", "second"])
    for name, found in results.behaviours.items():
        table = NodeTable.load(NodeTable.file(run.folder, name))
        assert len(table.node) == found.nodes and (~np.isnan(table.effect)).sum() == found.measured
        assert len(found.strongest) == 3 and set(found.estimates) == {"atp_star", "atp", "change"}
