"""The stage: every figure can be derived again, and a run that is stopped goes on to the same result."""

import dataclasses
import json

import numpy as np
import pytest
from runs import changed, write_members

from saejax.causal.ablate import run as stage
from saejax.causal.ablate import verdict
from saejax.causal.ablate.importance import Importance
from saejax.causal.ablate.importance_results import ImportanceSummary
from saejax.causal.ablate.results import AblateResults
from saejax.config import Configs
from saejax.dictionaries import Dictionary, save_dictionary
from saejax.errors import Interrupted, UserError
from saejax.interventions import activity
from saejax.interventions import engine as ablation
from saejax.interventions.split_model import SplitModel
from saejax.results import from_json, to_json
from saejax.settings import AblateConfig, CorpusConfig, MeshConfig, ModelConfig, TaskConfig
from saejax.tasks.behaviours import read_prompts, write_prompts
from saejax.workspace import Run


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
            ModelConfig(path=str(tiny_llama)),
            MeshConfig(),
            CorpusConfig(),
            TaskConfig(),
            AblateConfig(
                top=4, draws=12, matches=6, bootstrap=500, batch_rows=32, curve=False, baselines=(), text_documents=2
            ),
        )
        inputs = {"baseline": baseline, "train/topk": train}
        return Run("ablate", "topk", tmp_path / name, configs, inputs, say=said.append, **changes), said

    return make


def test_the_stage_end_to_end_killed_and_resumed(make_run):
    whole, said = make_run("whole")
    results = stage.run_ablate(whole)
    assert from_json(AblateResults, json.loads(json.dumps(to_json(results), allow_nan=False)), "") == results
    assert list(results.behaviours) == ["first", "second"]
    assert (results.dictionary, results.site, results.top, results.draws) == ("topk", "resid_post.1", 4, 12)
    assert any(line.startswith("ablate: second (2 of 2): ") for line in said)

    # Every figure can be derived again from the saved logit differences.
    for name, entry in results.behaviours.items():
        lines = [json.loads(line) for line in (whole.folder / f"{name}-prompts.jsonl").read_text().splitlines()]
        tested = [p for p in read_prompts(whole.inputs["baseline"] / "prompts.jsonl") if p.behaviour == name]
        assert [line["text"] for line in lines] == [p.text for p in tested if p.split == "test"]
        clean_P, joint_P = (np.array([line[key] for line in lines]) for key in ("clean", "joint"))
        again = verdict.over_prompts(np.array([""] * 8), whole.configs[AblateConfig])(clean_P - joint_P)
        assert entry.joint.logit_diff_drop == again
        controls_PxN = np.array([line["controls"] for line in lines])
        (other,) = entry.others  # what this one's top features cost the other behaviour
        beside = [json.loads(line) for line in (whole.folder / f"{other}-prompts.jsonl").read_text().splitlines()]
        left = np.mean([line["clean"] - line["others"][name] for line in beside])
        assert entry.others[other].logit_diff_drop.mean == pytest.approx(left)
        assert entry.text.documents == 2 and entry.grades.selective.holds in (True, False)
        np.testing.assert_allclose(
            entry.controls.logit_diff_drop, (clean_P[:, None] - controls_PxN).mean(axis=0), atol=1e-12
        )
        drawn = [json.loads(line) for line in (whole.folder / f"{name}-controls.jsonl").read_text().splitlines()]
        assert [line["kind"] for line in drawn] == ["controls"] * entry.controls.draws + ["draws"] * entry.claim.draws
        assert entry.controls.draws == 12 and all(len(line["features"]) == entry.joint.firing for line in drawn)

    # Asked to stop once the first behaviour is there: it is kept, and what comes then is the same to the bit.
    folder = whole.folder.parent / "stopped"
    stopped, _ = make_run("stopped", stopping=lambda: (folder / "first.json").exists())
    with pytest.raises(Interrupted, match="second .2 of 2.: stopped"):
        stage.run_ablate(stopped)
    assert not (folder / "second.json").exists()
    written = (folder / "first.json").stat().st_mtime_ns
    resumed, said = make_run("stopped")
    assert stage.run_ablate(resumed) == results
    assert (folder / "first.json").stat().st_mtime_ns == written
    assert said[0] == "ablate: kept from an earlier run: first"
    assert not list(folder.glob("*-partial"))


@pytest.mark.slow
def test_sets_on_request(make_run, tiny, make_dictionary):
    run, _ = make_run("sets")
    run = changed(run, curve=True, circuit_tests=True, greedy=2)
    prompts = [p for p in read_prompts(run.inputs["baseline"] / "prompts.jsonl") if p.behaviour == "first"]
    write_prompts(run.inputs["baseline"] / "prompts.jsonl", prompts)
    result = stage.run_ablate(run).behaviours["first"]
    assert json.loads((run.folder / "first.json").read_text()) == json.loads(
        json.dumps(to_json(result), allow_nan=False)
    )
    lines = [json.loads(line) for line in (run.folder / "first-prompts.jsonl").read_text().splitlines()]
    split = SplitModel(tiny, make_dictionary("resid_post.1"))
    runs, train_runs = (split.run([p for p in prompts if p.split == half]) for half in ("test", "train"))
    top = [entry.feature for entry in result.top]
    firing = np.flatnonzero(activity.statistics(split, runs).fires_at_all_F).tolist()

    # Kept alone, removed, the curve and the greedy set are ablations of these sets.
    chosen = result.greedy.features
    sets = [[f for f in firing if f not in top], top, top[:2], chosen]
    kept_P, removed_P, two_P, grown_P = ablation.ablate_sets(split, runs, sets).ablated_SxP
    for wanted_P, got in (
        (kept_P, [line["circuit"]["kept"] for line in lines]),
        (removed_P, [line["circuit"]["removed"] for line in lines]),
        (two_P, [line["curve"]["top"][2] for line in lines]),
        (removed_P, [line["curve"]["top"][4] for line in lines]),
        (grown_P, [line["greedy"]["greedy"][1] for line in lines]),
    ):
        np.testing.assert_allclose(got, wanted_P, atol=1e-4)
    assert result.circuit.kept == pytest.approx(kept_P.mean(), abs=1e-4)
    train_drop = ablation.ablate_sets(split, train_runs, [chosen[:1], chosen]).drop_SxP.mean(axis=1)
    np.testing.assert_allclose(result.greedy.train_drop, train_drop, atol=1e-4)


def test_every_feature_on_request(make_run, tiny, make_dictionary):
    run, _ = make_run("every")
    run = changed(run, effects="all")
    results = stage.run_ablate(run).behaviours
    kept = json.loads((run.folder / "first.json").read_text())["importance"]
    assert from_json(ImportanceSummary, kept, "") == results["first"].importance
    found = Importance.load(Importance.file(run.folder, "first"))
    prompts = [p for p in read_prompts(run.inputs["baseline"] / "prompts.jsonl") if p.behaviour == "first"]
    split = SplitModel(tiny, make_dictionary("resid_post.1"))
    runs = split.run([p for p in prompts if p.split == "test"])
    some = found.feature[:: len(found.feature) // 5]
    drop_SxP = ablation.ablate_sets(split, runs, [[int(feature)] for feature in some]).drop_SxP
    np.testing.assert_allclose(found.drop[np.isin(found.feature, some)], drop_SxP.mean(axis=1), atol=1e-5)
    assert found.feature.tolist() == np.flatnonzero(activity.statistics(split, runs).fires_at_all_F).tolist()
    tokens = tiny.tokenize([p.text for p in prompts if p.split == "test"])
    dictionary = make_dictionary("resid_post.1")
    x_BxTxD = tiny(tokens, capture=[dictionary.site], logits=False).sites[dictionary.site]
    read_BxT = tokens.mask_BxT & np.asarray(dictionary.is_not_sink(x_BxTxD))
    largest_PxF = (np.asarray(dictionary.encode(x_BxTxD)) * read_BxT[:, :, None]).max(axis=1)
    np.testing.assert_allclose(activity.maxima(split, runs), largest_PxF, atol=1e-4)
    top = {item.feature: item.logit_diff_drop.mean for item in results["first"].top}
    for feature, drop in zip(found.feature.tolist(), found.drop, strict=True):
        assert drop == pytest.approx(top.get(feature, drop), abs=1e-5)
    assert results["first"].importance.features == len(found.feature) > 100


def test_other_dictionaries_on_request(make_run, make_dictionary):
    run, _ = make_run("compared")
    same, elsewhere = make_dictionary("resid_post.1"), make_dictionary("mlp_out.1")
    order_F = np.random.default_rng(0).permutation(160)
    arrays = dict(same.arrays)
    permuted = Dictionary(
        same.config,
        W_enc_DxF=arrays["W_enc_DxF"][:, order_F],
        b_enc_F=arrays["b_enc_F"][order_F],
        W_dec_FxD=arrays["W_dec_FxD"][order_F],
        b_dec_D=arrays["b_dec_D"],
    )
    train = run.inputs["train/topk"].parent / "standard"
    for name, other in dict(seed1=permuted, seed2=elsewhere).items():
        save_dictionary(train / name / "dictionary", other)
    write_members(train, "seed1", "seed2")
    run.inputs["train/standard"] = train
    run = changed(run, effects="all", compare=("standard/seed1", "standard/seed2"))
    results = stage.run_ablate(run).behaviours
    pairs = results["first"].importance.agreement
    assert len(json.dumps(to_json(pairs), allow_nan=False)) > 100
    assert [(pair.first, pair.second, pair.by) for pair in pairs] == [
        ("topk", "standard/seed1", "direction"),
        ("topk", "standard/seed2", "activity"),
        ("standard/seed1", "standard/seed2", "activity"),
    ]
    assert pairs[0].matched == results["first"].importance.features and pairs[0].shares == (1.0, 1.0)
    assert pairs[0].rank_correlation.mean > 0.99 > 0.5 > pairs[0].shuffled.high
    assert 0 < pairs[1].matched < 160

    run = changed(run, effects="top")
    with pytest.raises(UserError, match="give --ablate.effects=all, or leave it out"):
        stage.run_ablate(run)
    run = changed(run, effects="all", compare=("topk",))
    with pytest.raises(UserError, match="name each dictionary once, the tested one never"):
        stage.run_ablate(run)


def test_other_trainings_are_tested_as_the_first_is(make_run, make_dictionary):
    run, said = make_run("repeated")
    train = run.inputs["train/topk"].parent / "standard"
    for name, seed in dict(seed1=11, seed2=7).items():
        save_dictionary(train / name / "dictionary", make_dictionary("resid_post.1", seed=seed))
    write_members(train, "seed1", "seed2")
    run.inputs["train/standard"] = train
    run = changed(run, repeats=("standard/seed1", "standard/seed2"), text_documents=0)
    results = stage.run_ablate(run)
    assert from_json(AblateResults, json.loads(json.dumps(to_json(results), allow_nan=False)), "") == results
    for result in results.behaviours.values():
        own, same, other = result.trainings
        # The first of them is the tested dictionary itself: what is measured is the same.
        assert (own.features, own.joint) == (same.features, same.joint) != (other.features, other.joint)
        assert own.claim.p_logit_diff == same.claim.p_logit_diff
        assert result.holds_again.reason.startswith("of 3 trainings")
    assert any("; holds again: " in line for line in said) and "holds again if in every training" in results.rule


def test_a_stack_asks_which_of_its_members(make_run):
    run, _ = make_run("refused")
    write_members(run.inputs["train/topk"], "k16", "k32")
    with pytest.raises(UserError, match=r"topk is a stack of 2 .* --ablate.dictionary=topk/k16, of k16, k32"):
        stage.run_ablate(run)
    for name, told in (("topk/k8", "there is no member k8: name one, .* of k16, k32"), ("topk/", "is a stack of 2")):
        run = changed(run, dictionary=name)
        with pytest.raises(UserError, match=told):
            stage.run_ablate(run)


def test_one_dictionary_has_no_members(make_run):
    run, _ = make_run("refused")
    run = changed(run, dictionary="topk/k8")
    with pytest.raises(UserError, match="topk is one dictionary and no stack: give --ablate.dictionary=topk"):
        stage.run_ablate(run)


def test_a_member_of_a_stack_is_tested(make_run, make_dictionary):
    run, _ = make_run("member")
    save_dictionary(run.inputs["train/topk"] / "k16" / "dictionary", make_dictionary("resid_post.1"))
    write_members(run.inputs["train/topk"], "k16")
    run = changed(run, dictionary="topk/k16", top=1, draws=2)
    results = stage.run_ablate(run)
    assert (results.dictionary, results.site) == ("topk/k16", "resid_post.1")


def test_features_of_a_transcoder_are_removed_from_what_it_predicts(tiny, make_dictionary, prompts):
    sae, features, few = make_dictionary("mlp_in.1"), [3, 5, 40], prompts[:4]
    transcoder = Dictionary(dataclasses.replace(sae.config, target="mlp_out.1", centred=False), **sae.arrays)
    split = SplitModel(tiny, transcoder)
    diffs = ablation.ablate_sets(split, split.run(few), [features])
    tokens = tiny.tokenize([prompt.text for prompt in few])
    logits_BxTxV = np.asarray(tiny(tokens, edits=[transcoder.ablate(features)]).logits_BxTxV)
    for p, prompt in enumerate(few):
        last_V = logits_BxTxV[p, tokens.last_B[p]]
        wanted = last_V[tiny.token_id(prompt.correct)] - last_V[tiny.token_id(prompt.wrong)]
        np.testing.assert_allclose(diffs.ablated_SxP[0, p], wanted, atol=1e-4)
    assert (np.abs(diffs.drop_SxP) > 1e-4).any()


def test_a_transcoder_over_layers_is_refused(tiny, make_dictionary):
    sae = make_dictionary("mlp_in.1")
    transcoder = Dictionary(dataclasses.replace(sae.config, target="mlp_out.2", centred=False), **sae.arrays)
    with pytest.raises(UserError, match="is a transcoder from mlp_in.1 to mlp_out.2"):
        SplitModel(tiny, transcoder)
