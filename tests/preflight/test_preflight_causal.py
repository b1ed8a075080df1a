"""What patch, probe and study take: rows counted as the stages count them, time and memory by what is asked for."""

import pytest
from preflight_setup import make_needs, shape

from saejax.causal.patching.features import steps
from saejax.settings import TaskConfig

RATES = dict(float32=1e11, bfloat16=2e11)
ASKED = dict(
    patch__kinds=("resid_post", "attn_out"),
    patch__dictionary="topk",
    probe__labels=("behaviour", "answer"),
    steer__dictionary="topk",
    study__benchmarks=("logic", "math"),
)


@pytest.fixture(scope="module")
def model():
    return shape("smollm2-135m")


def units(model, **changes):
    """What units count beside their bytes and time."""
    return {unit: cost.counts for unit, cost in make_needs(model, **changes).units.items() if cost.counts}


def stages(model, **changes):
    """The stages whose memory is counted."""
    return {unit.partition("/")[0] for unit in make_needs(model, **changes).units}


def seconds(model, **changes):
    return make_needs(model, text=(1000, 100_000), **changes).seconds(RATES)


def test_only_what_is_asked_for(model):
    assert units(model) == {}
    assert not {"patch", "probe", "study"} & {*seconds(model), *stages(model)}
    asked = units(model, **ASKED)
    assert list(asked) == [
        "patch/resid_post", "patch/attn_out", "patch/topk", "probe/topk", "steer/topk", "study/logic", "study/math",
    ]  # fmt: skip
    assert {"patch", "probe", "study"} <= {*seconds(model, **ASKED)}
    assert {"patch", "probe", "study"} <= stages(model, **ASKED)
    without = ASKED | dict(task__behaviours=())
    assert list(units(model, **without)) == ["study/logic", "study/math"]


def test_rows_are_those_of_the_stages(model):
    found, task = units(model, **ASKED), TaskConfig()
    behaviours, pairs = len(task.behaviours), len(task.behaviours) * task.test_prompts
    # Two directions, 30 layers, half of 16 positions; the strongest place is chosen on train pairs.
    choosing = len(task.behaviours) * min(task.train_prompts, task.test_prompts)
    assert found["patch/resid_post"]["rows"] == 2 * 30 * 8 * (pairs + choosing)
    # Of heads the first 20 nodes of three estimates and 100 random ones; a path is two runs, of half of all senders.
    heads = units(model, patch__kinds=("heads",))["patch/heads"]["rows"]
    assert heads == pairs * (3 * 20 + 100)
    paths = units(model, patch__kinds=("heads",), patch__paths=2)["patch/heads"]["rows"]
    assert paths == heads + 2 * pairs * 2 * 30 * (9 + 1)
    sets = 2 * (20 + len(steps(20)) + 1) + 20 * len(steps(20))
    assert found["patch/topk"]["rows"] == pytest.approx(0.85 * pairs * sets, abs=1)
    probe = found["probe/topk"]
    assert probe["rows"] == behaviours * (task.train_prompts + task.test_prompts)
    # On features and on raw activations: 5 folds of 6 penalties, the probe itself, 20 shuffles; sparse ones thrice.
    assert probe["fits"] == 2 * (1 + behaviours) * (51 + 5 * 71)
    strengths, drawn = 3 * 5 + 4, 20 * (4 * 320 + 5 * 10)  # of four methods; 10 draws at every dose
    assert found["steer/topk"]["rows"] == behaviours * ((task.train_prompts + task.test_prompts) * strengths + drawn)
    assert found["study/logic"]["rows"] == 100 * (1 + 2 + 2 * 20)


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("patch", dict(patch__kinds=("resid_post", "attn_out", "mlp_out"))),
        ("patch", dict(patch__draws=60)),
        ("patch", dict(task__test_prompts=200)),
        ("probe", dict(probe__shuffles=60)),
        ("probe", dict(probe__labels=("behaviour", "answer", "parity"))),
        ("steer", dict(steer__draws=800)),
        ("study", dict(study__draws=30)),
        ("study", dict(study__items=1000, task__examples=1000)),
        ("study", dict(preflight__benchmark_tokens=2000)),
    ],
)
def test_what_makes_a_stage_longer(model, stage, more):
    assert seconds(model, **ASKED | more)[stage] > 1.15 * seconds(model, **ASKED)[stage]


def test_memory_follows_what_is_gathered(model):
    def need(**changes):
        return {unit: cost.bytes for unit, cost in make_needs(model, **changes).units.items()}

    both = need(**ASKED)
    # All features of prompts and counterparts at once; recorded runs of sites take more here.
    features, fewer = (need(patch__dictionary="topk", train__expansion=width) for width in (16, 4))
    assert features["patch/topk"].activations > 1.6 * fewer["patch/topk"].activations
    few, many = (need(study__benchmarks=("logic",), study__batch_tokens=tokens) for tokens in (2048, 8192))
    assert many["study/logic"].activations > 1.5 * few["study/logic"].activations
    sites = need(patch__kinds=("resid_post",))
    patched = sites["patch/resid_post"]
    assert patched.dictionary == 0 < both["patch/topk"].dictionary == both["ablate/topk"].dictionary
    assert patched.total == patched.model + patched.activations
    assert not any(unit.startswith("study") for unit in sites)
    generated = need(**ASKED | dict(study__benchmarks=("gsm8k",), task__benchmarks=("gsm8k",), task__batch=64))
    assert generated["study/gsm8k"].activations >= generated["benchmark/gsm8k"].activations > 0
