"""The stage steer, end to end on a tiny model: what is measured, stopped and gone on with, and what cannot be."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from runs import save_corpus, write_members

from saejax.causal.claims import SetEffects, claims
from saejax.causal.steer import run as stage
from saejax.causal.steer.draws import rule
from saejax.causal.steer.results import SteerResults
from saejax.dictionaries import save_dictionary
from saejax.errors import Interrupted, UserError
from saejax.results import from_json, to_json
from saejax.runner.config import Configs
from saejax.runner.workspace import Run
from saejax.settings import CorpusConfig, MeshConfig, ModelConfig, SteerConfig, TaskConfig
from saejax.tasks.behaviours import read_prompts, write_prompts

pytestmark = pytest.mark.usefixtures("two_devices")
CONFIG = SteerConfig(
    dictionary="topk", top=3, doses=(0.4, 0.1), draws=30, draw_prompts=6, bootstrap=200, batch_rows=16, text_documents=3
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny, make_dictionary, make_prompt):
    folder = tmp_path_factory.mktemp("inputs")
    baseline, train = folder / "baseline", folder / "train" / "topk"
    baseline.mkdir()
    prompts = []
    for behaviour in ("first", "second"):
        own = [make_prompt(i, "train" if i < 24 else "test", behaviour) for i in range(48)]
        own = [p if tiny(tiny.tokenize([p.text])).logit(p.correct) > tiny(tiny.tokenize([p.text])).logit(p.wrong)
               else dataclasses.replace(p, correct=p.wrong, wrong=p.correct) for p in own]  # fmt: skip
        prompts += [dataclasses.replace(p, counterpart=p.text.replace(" near ", " that "), template=str(i % 2))
                    for i, p in enumerate(own)]  # fmt: skip
    write_prompts(baseline / "prompts.jsonl", prompts)
    save_dictionary(train, make_dictionary("resid_post.1"))
    write_members(train, "")
    return {"baseline": baseline, "train/topk": train, "corpus": save_corpus(folder / "corpus.jsonl.gz")}


@pytest.fixture
def make_run(tmp_path, tiny_llama, inputs):
    def make(folder, config=CONFIG, **changes):
        (tmp_path / folder).mkdir(exist_ok=True)
        corpus = CorpusConfig(path=str(inputs["corpus"]), held_out=0.3)
        configs = Configs(ModelConfig(path=str(tiny_llama)), MeshConfig(), corpus, config, TaskConfig())
        return Run("steer", "topk", tmp_path / folder, configs, inputs, say=lambda line: None, **changes)

    return make


def test_steered_killed_and_resumed(make_run):
    whole = make_run("whole")
    results = stage.run_steer(whole)
    assert from_json(SteerResults, json.loads(json.dumps(to_json(results), allow_nan=False)), "") == results
    assert (results.site, results.positions) == ("resid_post.1", "all")
    effects = {}
    for name, result in results.behaviours.items():
        assert result.reason is None and result.prompts + sum(result.left_out.values()) == 24
        assert list(result.methods) == ["features", "clamp", "difference", "gradient"] and result.prompting
        assert [one.dose for one in result.random] == [0.1, 0.4]
        lines = [json.loads(line) for line in (whole.folder / f"{name}-prompts.jsonl").read_text().splitlines()]
        assert len(lines) == result.prompts and all(line["clean"] > 0 for line in lines)
        for kind, method in result.methods.items():
            steered_SxP = np.array([line["steered"][kind] for line in lines]).T
            for point, diff_P in zip(method.points, steered_SxP, strict=True):
                assert point.flipped.mean == pytest.approx((diff_P < 0).mean())
                assert point.ce_rise.low <= point.ce_rise.mean <= point.ce_rise.high and point.kl > 0
            if kind != "clamp":
                assert [p.dose for p in method.points] == pytest.approx([0.1, 0.4], rel=1e-4)
            assert method.random.dose == pytest.approx(method.points[method.chosen].dose)
            drawn = [line for line in lines if line["draws"]]
            assert len(drawn) == method.random.prompts == 6
            clean_Q, template_Q = (np.array([line[of] for line in drawn]) for of in ("clean", "template"))
            steered_Q = np.array([line["steered"][kind][method.chosen] for line in drawn])
            draws_NxQ = np.array([line["draws"][kind] for line in drawn]).T
            effects[name + kind] = SetEffects.of(clean_Q, steered_Q, draws_NxQ, template_Q, None)
    wanted = claims(effects, rule(CONFIG))  # corrected for four methods of two behaviours
    assert [m.claim for r in results.behaviours.values() for m in r.methods.values()] == list(wanted.values())

    # Killed after the first behaviour, the run has what a whole one has of it.
    folder = shutil.copytree(whole.folder, whole.folder.parent / "stopped")
    for file in folder.glob("second*"):
        file.unlink()
    with pytest.raises(Interrupted, match="second .2 of 2.: stopped"):
        stage.run_steer(make_run("stopped", stopping=lambda: True))
    assert not list(folder.glob("second*")) and stage.run_steer(make_run("stopped")) == results


def test_last_position_without_text(make_run, inputs):
    config = dataclasses.replace(CONFIG, positions="last", text_documents=0, doses=(0.4,), draws=20)
    result = stage.run_steer(make_run("last", config)).behaviours["first"]
    assert all(p.ce_rise is None and p.kl is None for m in result.methods.values() for p in m.points)
    assert set(result.equal_dose["difference"]) == {"norm"}


def test_a_behaviour_whose_answers_are_new_is_said(make_run, inputs, tmp_path):
    run, baseline = make_run("new"), tmp_path / "baseline"
    baseline.mkdir()
    prompts = read_prompts(inputs["baseline"] / "prompts.jsonl")
    changed = [
        dataclasses.replace(p, correct=" dogs", wrong=" cat") if (p.behaviour, p.split) == ("first", "test") else p
        for p in prompts
    ]
    write_prompts(baseline / "prompts.jsonl", changed)
    run = dataclasses.replace(run, inputs=run.inputs | dict(baseline=baseline))
    found = stage.run_steer(run).behaviours["first"]
    assert "of its test prompts 0 are answered rightly" in found.reason and not found.methods
    assert found.left_out == {"unknown answers": 24, "answered wrongly": 0}


def test_no_doses_are_refused(make_run):
    with pytest.raises(UserError, match="--steer.doses is empty"):
        stage.run_steer(make_run("none", dataclasses.replace(CONFIG, doses=())))
