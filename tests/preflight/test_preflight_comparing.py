"""What preflight compiles of track, transfer, probe and cluster is what they run; each fits eight devices."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from preflight_setup import assert_same_call, make_dictionary, on_mesh, plan_run

from saejax.causal.cost import kept_prompts
from saejax.causal.probes import inputs
from saejax.interventions import split_model as split
from saejax.matching import match as matching
from saejax.matching.track import firings, tested
from saejax.matching.track.cost import counted, planned_texts
from saejax.matching.track.run import LENS_TOP
from saejax.matching.track.texts import Segment
from saejax.matching.transfer import activity
from saejax.models import language_model, lens
from saejax.models.families import read_config
from saejax.models.sites import Site
from saejax.models.tokens import pad
from saejax.parallel.mesh import AXES
from saejax.preflight.sums import stage_programs
from saejax.preflight.topology import compile_for
from saejax.settings import ProbeConfig
from saejax.stages.track import TrackConfig
from saejax.tasks.behaviours import Prompt

STAGES = ("track", "transfer", "probe", "cluster")
SITES = ("resid_post.1", "resid_post.2")


@pytest.fixture(scope="module")
def plan(tiny_llama, mesh):
    model = read_config(json.loads((tiny_llama / "config.json").read_text()), "tiny")
    plan = plan_run(
        model,
        capture__sites=SITES,
        train__sites=SITES,
        train__source="model",
        train__expansion=4,
        train__k=(3,),
        corpus__context=32,
        preflight__prompt_tokens=6,
        ablate__dictionary="topk/resid_post.1",
        probe__labels=("answer",),
        probe__dictionary="topk/resid_post.1",
        track__prompt="The cat near the dogs runs. The dogs near the cat run far from it.",
        track__dictionaries=("topk",),
        track__test_layers=(1,),
        transfer__dictionaries=("topk",),
        transfer__measures=("decoder", "activity"),
        transfer__tokens=256,
        transfer__batch_tokens=128,
        cluster__dictionaries=("topk",),
        cluster__batch_tokens=64,
    )
    return on_mesh(plan, mesh)


@pytest.fixture(scope="module")
def programs(plan):
    return {program.name: program for program in stage_programs(plan)}


@pytest.fixture
def dictionary(lm, plan):
    return make_dictionary(lm, plan, "probe")


def compare(programs, stage: str, calls: dict[str, list]) -> None:
    for name, seen in calls.items():
        assert_same_call(programs[f"{stage}: {name}"], seen[0])
    assert len(calls) == sum(name.startswith(f"{stage}:") for name in programs)


def test_tracking(programs, plan, lm, dictionary, spy):
    calls = {
        "model": spy(language_model, "forward"),
        "encode": spy(firings, "active_features"),
        "lens": spy(lens, "read_positions"),
        "rows": spy(tested, "run_rows"),
    }
    config = plan.configs[TrackConfig]
    ((prompt, steps),) = planned_texts(config)
    ids_T = np.arange(counted(prompt, *steps)) % 300
    layers = [SimpleNamespace(reads=Site.parse(site), name=site, load=lambda: dictionary) for site in SITES]
    firings.follow(lm, SimpleNamespace(layers=layers), ids_T)
    lm.lens(pad([ids_T.tolist()]), answers=[1], top=LENS_TOP)
    text = SimpleNamespace(ids_T=ids_T, problem=SimpleNamespace(slug="text"))
    tester = tested.StepTester(lm, dictionary, layers[0].reads, layers[0].reads, text, config)
    step = Segment("1", "", 1, 1 + max(map(counted, steps)))
    pool = np.arange(config.step_features * (1 + config.matches))
    tester._scores(step, pool, [()])
    compare(programs, "track", calls)


def test_transfer(programs, plan, lm, dictionary, mesh, spy):
    calls = {
        "matching": spy(matching, "best_rows"),
        "text": spy(language_model, "forward"),
        "encode": spy(activity, "encode_tokens"),
    }
    read_and_encode(plan, "transfer", lm, dictionary)
    rows = np.random.default_rng(0).normal(size=(dictionary.config.n_features, 128)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    list(matching.match([("one", rows, rows)], mesh))
    compare(programs, "transfer", calls)


def test_clusters(programs, plan, lm, dictionary, spy):
    calls = {"text": spy(language_model, "forward"), "encode": spy(activity, "encode_tokens")}
    read_and_encode(plan, "cluster", lm, dictionary)
    compare(programs, "cluster", calls)


def read_and_encode(plan, stage: str, lm, dictionary) -> None:
    """As a stage does it, which reads the text of all dictionaries' sites."""
    batch = plan.configs.named(stage).batch_tokens
    read = SimpleNamespace(pieces=[np.ones(32, np.int64)] * 16, front=0)
    sites = list(dict.fromkeys(one.site for one in plan.dictionaries(plan.configs.named(stage).dictionaries)))
    values = activity.site_values(lm, read, sites, batch)
    activity.encode(dictionary, values[sites[0]], batch)


def test_probing(programs, plan, lm, dictionary, spy):
    calls = {"head": spy(split, "run_head"), "inputs": spy(inputs, "pool_prompts")}
    prompts = [Prompt("b", "test", "The cat near the dogs far", " runs", " far", "", " run", ("cat",))]
    inputs.pooled_inputs(split.SplitModel(lm, dictionary), prompts * kept_prompts(plan), plan.configs[ProbeConfig].pool)
    compare(programs, "probe", calls)


def test_each_compiles(plan):
    """For eight devices that share the batch."""
    devices = np.array(jax.devices()).reshape(1, 8, 1)
    other = on_mesh(plan, Mesh(devices, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3))
    other = dataclasses.replace(other, stands_for="gpu")
    own = [one for one in stage_programs(other) if one.name.partition(":")[0] in STAGES]
    assert all(compile_for(program, 2**30, 8).fits for program in own) and len(own) == 11
