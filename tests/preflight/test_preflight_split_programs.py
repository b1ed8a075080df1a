"""What preflight compiles of patch, steer and study is what they run; each of these programs fits eight devices."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from preflight_setup import assert_same_call, make_dictionary, on_mesh, plan_run

from saejax.causal.patching import atp, features, node_patches, paths, sites, subspace
from saejax.causal.patching.features import COUNTERPART, patch_parts
from saejax.causal.results import RankedFeature
from saejax.causal.steer import directions
from saejax.causal.steer import programs as steering
from saejax.causal.study import features as choosing
from saejax.causal.study import items, references, removal
from saejax.interventions import engine as ablation
from saejax.interventions import slopes as screening
from saejax.interventions import split_model as split
from saejax.models import decoding, language_model
from saejax.models.families import read_config
from saejax.models.tokens import Tokens
from saejax.parallel.mesh import AXES
from saejax.preflight.sums import stage_programs
from saejax.preflight.topology import compile_for
from saejax.settings import SteerConfig, StudyConfig
from saejax.tasks import likelihood
from saejax.tasks.behaviours import Prompt

PROMPTS = 16
TEXT, OTHER = "The cat near the dogs far", "A cat near the dogs far"


@pytest.fixture(scope="module")
def plan(tiny_llama, mesh):
    model = read_config(json.loads((tiny_llama / "config.json").read_text()), "tiny")
    plan = plan_run(
        model,
        "mlp_out.1",
        train__expansion=4,
        train__k=(3,),
        preflight__prompt_tokens=6,
        task__train_prompts=PROMPTS,
        task__test_prompts=PROMPTS,
        patch__kinds=("resid_post", "heads", "mlp_out"),
        patch__dictionary="topk",
        patch__paths=1,
        patch__das=2,
        steer__dictionary="topk",
        steer__top=3,
        study__benchmarks=("gsm8k",),
        study__dictionary="topk",
        study__top=3,
        study__batch_tokens=128,
        preflight__benchmark_tokens=32,
        task__max_new_tokens=8,
        task__batch=4,
    )
    return on_mesh(plan, mesh)


@pytest.fixture(scope="module")
def programs(plan):
    return {program.name: program for program in stage_programs(plan)}


@pytest.fixture(scope="module")
def prompts():
    return [Prompt("b", "test", TEXT, " runs", " far", OTHER, " run", ("cat",))] * PROMPTS


def test_patching_of_sites(programs, lm, prompts, spy):
    calls = {"record": spy(sites, "record"), "rows": spy(sites, "run_rows")}
    sites.patch_sites(lm, "mlp_out", prompts)
    for name, seen in calls.items():
        assert_same_call(programs[f"patch: {name}"], seen[0])
    assert programs["patch: rows"].arguments[1] == calls["rows"][0][1]  # tokens of the longest rows


def test_patching_of_heads(programs, lm, prompts, spy):
    calls = {
        "heads": spy(atp, "record_heads"),
        "slopes": spy(atp, "slopes"),
        "effects": spy(atp, "effects"),
        "nodes": spy(node_patches, "patch_nodes"),
        "paths": spy(paths, "patch_paths"),
    }
    atp.estimate_nodes(lm, prompts)
    places = node_patches.NodePlaces(*(np.array([value]) for value in ("query", 1, 0, -1)))
    node_patches.patch_exactly(lm, prompts, places)
    paths.path_effects(lm, prompts, paths.Receiver("query", 2, 0, -1))
    for name, seen in calls.items():
        assert_same_call(programs[f"patch: {name}"], seen[0])


def test_patching_of_features(programs, plan, lm, prompts, spy):
    calls = {
        "head": spy(split, "run_head"),
        "attribution": spy(screening, "score_features"),
        "features": spy(ablation, "gather"),
        "tail": spy(ablation, "run_rows"),
        "parts": spy(features, "run_parts"),
        "subspace": spy(subspace, "learn_step"),
    }
    cut_model = split.SplitModel(lm, make_dictionary(lm, plan, "patch"))
    sides = cut_model.run(prompts), cut_model.run_counterparts(prompts)
    screening.attribution(cut_model, sides[0], "gradient", COUNTERPART, sides[1])
    every = [list(range(cut_model.dictionary.config.n_features))] * 6
    more = dict(plain=True, source=COUNTERPART, counterparts=sides[1])
    ablation.ablate_sets(cut_model, sides[0], every, 64, **more)
    patch_parts(cut_model, *sides, "error")
    subspace.learn_subspace(cut_model, *sides, 2, 1, [0])
    for name, seen in calls.items():
        assert_same_call(programs[f"patch: {name}"], seen[0])


def test_steering(programs, plan, lm, prompts, spy):
    calls = {
        "head": spy(split, "run_head"),
        "slopes": spy(directions, "last_slope"),
        "rows": spy(steering, "steer_rows"),
    }
    cut_model = split.SplitModel(lm, make_dictionary(lm, plan, "steer"))
    runs = cut_model.run(prompts)
    directions.AnswerTexts.of(cut_model, prompts[:4])
    clamped = steering.SteeredTexts.clamping([[1]] * PROMPTS, [np.ones(1)] * PROMPTS, 64, plan.configs[SteerConfig].top)
    steering.steer_prompts(cut_model, runs, [clamped] * 4, plan.configs[SteerConfig].batch_rows)
    for name, seen in calls.items():
        assert_same_call(programs[f"steer: {name}"], seen[0])
    assert len(calls) == sum(name.startswith("steer") for name in programs)


def test_studies(programs, plan, lm, spy, tmp_path):
    calls = {
        "head": spy(references, "run_head"),
        "attribution": spy(references, "attribute"),
        "features": spy(removal, "activations"),
        "single features": spy(removal, "without"),
        "likelihoods": spy(language_model, "forward"),
        "prefill": spy(decoding, "prefill"),
    }
    study, dictionary = plan.configs[StudyConfig], make_dictionary(lm, plan, "study")
    texts = [references.Reference(item, [1] * 24, [2] * 8) for item in range(items.ITEMS)]
    made = references.References(split.SplitModel(lm, dictionary), texts, study.batch_tokens)
    made.attribution()
    removal.log_likelihoods(split.SplitModel(lm, dictionary), made, len(texts), [0, 1])
    chosen = SimpleNamespace(
        top=[RankedFeature(k, 0.0, 0.0, 0.0) for k in range(3)], pools={k: (1.0,) for k in range(3)}
    )
    edits = choosing.edits_of(dictionary, chosen, "top/random", 32, study, range(items.ITEMS))
    likelihood.loglikelihoods(lm, [[1] * 24] * items.ITEMS, [[2] * 8] * items.ITEMS, edits)
    prompts = Tokens(np.ones((4, 32), np.int32), np.full(4, 32))
    lm.generate(prompts, 8, edits=choosing.edits_of(dictionary, chosen, "top/random", 32, study, range(4)))
    for name, seen in calls.items():
        assert_same_call(programs[f"study: {name}"], seen[0])
    assert len(calls) == sum(name.startswith("study") for name in programs)


def test_each_compiles(plan, tiny_llama):
    """For eight devices that share the batch."""
    devices = np.array(jax.devices()).reshape(1, 8, 1)
    other = on_mesh(plan, Mesh(devices, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3))
    own = [one for one in stage_programs(other) if one.name.partition(":")[0] in ("patch", "steer", "study")]
    assert all(compile_for(program, 2**30, 8).fits for program in own)
    assert len(own) == 22
