"""How long a run takes, against whole runs that were timed; and what it writes."""

import pytest
from preflight_setup import make_needs, plan_run, shape

from saejax.activations.cost import recorded_rows
from saejax.preflight import rates
from saejax.preflight.sums import Needs

# Two runs of the demo on two cores, one of them beside other work: rates at the start, then seconds by stage.
RUNS = [
    (dict(float32=198e9, bfloat16=445e9), dict(baseline=30, capture=127, train=304)),
    (dict(float32=138e9, bfloat16=310e9), dict(baseline=41, capture=163, train=451, evaluate=222, ablate=179)),
]


# What they ran: the demo's settings then, on 2,319 documents of 288,888 tokens.
TIMED = dict(
    task__test_prompts=20,
    capture__dtype="bfloat16",
    train__batch=1024,
    train__epochs=3,
    train__matmul="bfloat16",
    train__k=(64,),
    evaluate__ce_documents=40,
    ablate__random_sets=67,  # of which half are ablated twice: 100 sets
    ablate__placebo_targets=0,
    ablate__untrained=False,
    ablate__baselines=(),
    ablate__text_documents=0,
)


@pytest.mark.parametrize("speed,measured", RUNS)
def test_estimates_against_timed_runs(speed, measured):
    seconds = make_needs(shape("smollm2-135m"), text=(2319, 288_888), **TIMED).seconds(speed)
    for stage, real in measured.items():
        assert 1 / 1.5 < seconds[stage] / real < 1.5, (stage, seconds[stage], real)


def test_what_makes_a_run_longer():
    model, speed = shape("smollm2-135m"), dict(float32=1e11, bfloat16=2e11)

    def seconds(**changes) -> dict[str, float]:
        few = dict(task__test_prompts=20, ablate__placebo_targets=0, ablate__untrained=False)
        few |= dict(ablate__random_sets=20, ablate__baselines=(), ablate__text_documents=0)
        return make_needs(model, text=(1000, 100_000), **few | changes).seconds(speed)

    base = seconds()
    assert "benchmark" not in base
    assert seconds(train__epochs=12)["train"] > 1.9 * base["train"]
    assert seconds(train__max_steps=1)["train"] < 0.2 * base["train"]
    assert seconds(capture__dtype="bfloat16")["capture"] < 0.8 * base["capture"]
    assert seconds(ablate__placebo_targets=199)["ablate"] > 3 * base["ablate"]
    fewer = seconds(ablate__placebo_targets=199, ablate__attribution_prompts=20)["ablate"]
    assert base["ablate"] < fewer < 0.7 * seconds(ablate__placebo_targets=199)["ablate"]
    asked = dict(baselines=("pca",), text_documents=16, untrained=True, effects="all", random_sets=199)
    for name, value in asked.items():
        assert seconds(**{f"ablate__{name}": value})["ablate"] > base["ablate"]
    assert seconds(capture__last=5)["train"] < 0.2 * base["train"]
    benchmarks = {name: seconds(task__benchmarks=(name,))["benchmark"] for name in ("gsm8k", "math", "logic")}
    assert benchmarks["gsm8k"] > benchmarks["math"] > 0 and benchmarks["logic"] > 0
    scored = dict(task__benchmarks=("gsm8k",), task__score="likelihood", task__examples=50)
    assert seconds(**scored)["benchmark"] < 0.2 * benchmarks["gsm8k"]


def test_what_is_written():
    def plan(documents: int, tokens: int, last: int):
        changes = dict(capture__store_dtype="float32", train__kinds=("topk",), capture__last=last)
        return plan_run(shape("smollm2-135m"), text=(documents, tokens), **changes)

    dictionary = 4 * 2 * 576 * 4608
    assert Needs.of(plan(10, 1000, 0)).disk == 1000 * (4 * 576 + 16) + 7 * dictionary
    assert recorded_rows(plan(100, 20_000, 0)) == 20_000
    assert recorded_rows(plan(100, 20_000, 5)) == 500
    assert recorded_rows(plan(1, 20_000, 5)) == 79 * 5, "one document is cut into 79 pieces of 256 tokens"
    assert recorded_rows(plan(100, 300, 5)) == 300


def test_rates_are_of_this_machine():
    found = rates.matmul_rates(256, 2)
    assert set(found) == {"float32", "bfloat16"} and all(rate > 1e7 for rate in found.values())


def test_known_features_and_circuits_against_a_timed_run():
    """`make demo-truth` on two cores."""
    world = dict(truth__features=1024, truth__dimensions=256, truth__held_out=50_000, truth__roots=0)
    trained = dict(train__kinds=("topk", "batchtopk"), train__expansion=4, train__batch=512, train__epochs=1)
    asked = world | trained | dict(train__matmul="bfloat16", known__circuits=("chain", "induction", "logic"))
    seconds = make_needs(shape("smollm2-135m"), **asked).seconds(dict(float32=170e9, bfloat16=434e9))
    assert 1 / 1.3 < seconds["ground_truth"] / 87 < 1.3 and 1 / 1.3 < seconds["known_circuits"] / 197 < 1.3
    # Vectors are drawn in float32, however fast the products of training are.
    needs = [make_needs(shape("smollm2-135m"), **asked | dict(truth__features=count)) for count in (1024, 2048)]
    few, many = (one.seconds(dict(float32=170e9, bfloat16=1e15))["ground_truth"] for one in needs)
    assert many - few > 3 * 1e6 * 1024 * 2 * 256 / 170e9
