"""Members, bytes and hours of a plan against formulas, and what fits which devices."""

import dataclasses
from math import prod

import jax
import pytest
from preflight_setup import axes, make_stack, on_mesh, plan_run, shape

from saejax.errors import UserError
from saejax.flops import pass_flops
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.preflight import rates, topology
from saejax.preflight.plan import check_dictionaries, disk_bytes, stage_programs, stage_seconds
from saejax.preflight.uncompiled import count_flops
from saejax.runner.registry import all_stages
from saejax.stages.capture.plan import recorded_rows, store_bytes
from saejax.stages.train.plan import checkpoint_bytes, host_bytes, resident_bytes, train_programs
from saejax.training.state import init_state


def held(tree) -> int:
    """Bytes of a tree's arrays on the first device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("data", "model"), [(1, 1), (2, 4), (1, 8)])
def test_memory_of_a_training_step_is_the_state_and_its_temporaries(lm, data, model):
    plan = plan_run(lm.config, "resid_post.1", axes(data, model), train__batch=64)
    program = next(program for program in train_programs(plan, plan.mesh) if "topk" in program.name)
    state = held(init_state(make_stack(plan, plan.mesh)))
    assert state < topology.compile_for(program, 2**30).memory < 3 * state


def test_the_least_effort_of_the_compiler_changes_no_memory(lm, monkeypatch):
    plan = plan_run(lm.config, "resid_post.1", axes(2, 4), train__batch=64)
    program = next(program for program in train_programs(plan, plan.mesh) if "topk" in program.name)
    full = dict(xla_backend_optimization_level=3, xla_llvm_disable_expensive_passes=False)
    if "xla_cpu_use_fusion_emitters" in topology._LEAST_EFFORT:
        full |= dict(xla_cpu_use_fusion_emitters=True)
    memory = topology.device_bytes(program, program.lower().compile(full))
    compiler, asked = jax.stages.Lowered.compile, []
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self, how: asked.append(how) or compiler(self, how))
    assert topology.compile_for(program, 2**30).memory == pytest.approx(memory, rel=1e-3)
    assert asked == [topology._LEAST_EFFORT] and asked[0]["xla_backend_optimization_level"] == 0


def test_disk_host_memory_and_resident_rows():
    changes = dict(capture__store_dtype="float32", train__kinds=("topk",), train__batch=1000, train__buffer_rows=600)
    plan, spread = (
        plan_run(shape("smollm2-135m"), "resid_post.15", axes(data), text=(10, 1000), **changes) for data in (1, 8)
    )
    parameters = 2 * 576 * 4608 + 4608 + 576
    assert store_bytes(plan) == 1000 * (4 * 576 + 16)
    assert disk_bytes(plan, ["capture"]) == store_bytes(plan) and disk_bytes(plan, ["evaluate"]) == 0
    assert disk_bytes(plan, ["train"]) == 10 * 4 * parameters  # three checkpoints of three copies
    assert host_bytes(plan) == 600 * 4 * 576 + 3 * 4 * parameters
    assert resident_bytes(plan) == 1000 * 4 * 576
    assert resident_bytes(spread) == 125 * 4 * 576
    cut = dict(capture__last=5, train__kinds=("topk",))
    rows = [recorded_rows(plan_run(shape("smollm2-135m"), text=text, **cut)) for text in ((100, 20_000), (1, 20_000))]
    assert rows == [500, 79 * 5], "one document is cut into 79 pieces of 256 tokens"


def test_expected_seconds_are_operations_over_the_measured_rate():
    program = topology.CompiledProgram("train: step", "", 3e9, 20, 0, True, None, 0.0)
    reading = dataclasses.replace(program, name="capture: forward", runs=5)
    rate = dict(float32=1e9, bfloat16=3e9)
    seconds = stage_seconds([program, program, reading], rate, dict(capture="bfloat16"))
    assert seconds == dict(train=2 * 3 * 20, capture=5)


def test_more_is_expected_of_longer_runs(lm):
    rate = dict(float32=1e11, bfloat16=2e11)

    def seconds(**changes) -> dict[str, float]:
        base = dict(task__test_prompts=20, train__batch=64, train__epochs=6)
        plan = plan_run(lm.config, "resid_post.1", text=(1000, 100_000), **base | changes)
        compiled = [
            topology.CompiledProgram(program.name, program.size, program.flops, program.runs, 0, True, None, 0.0)
            for program in stage_programs(plan)
        ]
        return stage_seconds(compiled, rate, dict(capture=changes.get("capture__dtype", "float32")))

    base = seconds()
    assert set(base) == {"capture", "train", "evaluate", "ablate"} and min(base.values()) > 0
    assert seconds(train__epochs=12)["train"] == pytest.approx(2 * base["train"])
    assert seconds(capture__dtype="bfloat16")["capture"] == pytest.approx(base["capture"] / 2)
    assert seconds(ablate__placebo_targets=0)["ablate"] < base["ablate"]
    assert seconds(ablate__effects="all")["ablate"] > base["ablate"]
    generated = [seconds(task__benchmarks=(name,))["benchmark"] for name in ("gsm8k", "math")]
    assert generated[0] > generated[1] > 0
    studied = seconds(task__benchmarks=("gsm8k",), study__benchmarks=("gsm8k",))["benchmark"]
    # Clean, the top features by zero and by resampling, 19 random, placebo and untrained sets, on 100 of 500 items.
    assert studied / generated[0] == pytest.approx(1 + 100 * (1 + 2 + 3 * 19) / 500), "items times conditions"


def test_stages_without_compiled_programs_are_counted(lm):
    def flops(stage: str, **changes) -> float:
        base = dict(train__kinds=("topk",), task__test_prompts=20, task__examples=100)
        plan = plan_run(lm.config, "resid_post.0", text=(1000, 100_000), **base | changes)
        return count_flops(plan, [stage])[stage]

    model, width = lm.config, 4 * lm.config.d_model
    passes = pass_flops(model, 1, model.context, model.n_layers)
    by_choice = flops("study", study__benchmarks=("word_problems",))
    unscored = flops("study", study__benchmarks=("word_problems",), task__score="likelihood")
    # 50 items judge; 4 choices of each under 60 conditions are whole passes of at most the context.
    scored = (by_choice - unscored) / (50 * 4 * 60)
    assert 0.1 * model.context * passes < scored <= model.context * passes
    few = flops("study", study__benchmarks=("word_problems",), study__items=50)
    assert by_choice == pytest.approx(2 * few, rel=0.1)  # at most so many train items choose features
    interpret = dict(interpret__dictionaries=("topk",), train__expansion=(4,))
    of_text = 3 * 2 * 100_000 * model.d_model * width  # the dictionary and both controls
    assert flops("interpret", **interpret) == pytest.approx(of_text)
    assert flops("interpret", **interpret, train__k=(4, 8)) == pytest.approx(2 * of_text)
    by_position, at_once = (
        flops("patch", patch__kinds=("mlp_out",), patch__positions=where) for where in ("each", "all")
    )
    assert by_position > 3 * at_once > 0
    assert flops("patch", patch__kinds=("attn_z",)) == pytest.approx(model.n_heads * at_once)
    assert flops("patch", patch__dictionary="topk") > 0
    steer = [flops("steer", steer__dictionary="topk", steer__random_sets=sets) for sets in (1, 41)]
    assert steer[1] > 2 * steer[0] > 0
    assert flops("benchmark", task__benchmarks=("logic",)) > 0 == flops("benchmark", task__benchmarks=("gsm8k",))


def test_a_plan_of_several_processes_has_their_meshes():
    plan = dataclasses.replace(plan_run(shape("smollm2-135m"), sizes=axes(2, 4)), own_devices=2)
    alone, together = plan.placed(all_stages()["evaluate"]), plan.placed(all_stages()["train"])
    assert dict(alone.mesh.shape) == dict(member=1, data=1, model=2)
    assert alone.mesh.devices.flatten().tolist() == jax.devices()[:2]
    assert together is plan and plan.placed(all_stages()["report"]).mesh.shape == alone.mesh.shape


def test_devices_of_a_process():
    of = {"v5e:2x4": 0, "v6e:2x4": 0, "v5e:4x4": 4, "v5p:2x2x2": 4, "v5e:2x2": 0, "v5p:2x2x1": 0}
    of |= {"h100:8": 0, "h100:4x8": 8, "h100:2x1": 1}
    for name, devices in of.items():
        assert topology.of_process(name, prod(int(n) for n in name.partition(":")[2].split("x"))) == devices, name


@pytest.mark.parametrize("stage", ["patch", "probe", "steer", "study"])
def test_dictionaries_that_no_stage_trains_are_refused_before_anything_runs(stage):
    changes = dict(probe__labels=("answer",), study__benchmarks=("logic",)) | {f"{stage}__dictionary": "gated"}
    with pytest.raises(UserError, match=f"--{stage}.dictionary=gated is no dictionary that is trained here"):
        check_dictionaries(plan_run(shape("smollm2-135m"), **changes))


def test_rates_are_of_this_machine():
    measured = rates.matmul_rates()
    assert set(measured) == {"float32", "bfloat16"} and all(rate > 1e7 for rate in measured.values())


STACK = dict(train__kinds=("topk",), train__seed=(1, 2), train__epochs=2, train__batch=100)


def plan_stack(**changes):
    return plan_run(shape("smollm2-135m"), "resid_post.15", text=(100, 10_000), **STACK | changes)


def test_the_widest_is_the_one_that_must_fit_and_narrower_ones_add_their_steps(one_device):
    (program,) = train_programs(on_mesh(plan_stack(train__expansion=(4, 2)), one_device), one_device)
    assert program.size == "2 members, 100 tokens, 576 -> 2,304"
    (wide,) = train_programs(on_mesh(plan_stack(train__expansion=(4,)), one_device), one_device)
    assert wide.runs == 200 and program.runs == pytest.approx(1.5 * wide.runs)
    (short,) = train_programs(on_mesh(plan_stack(train__max_steps=7), one_device), one_device)
    assert short.runs == 7


def test_checkpoints_that_are_kept_count():
    parameters = 2 * (2 * 576 * 4608 + 4608 + 576)
    assert checkpoint_bytes(plan_stack()) == parameters * 4 * (1 + 3 * 3)
    assert checkpoint_bytes(plan_stack(train__mu_dtype="bfloat16")) == parameters * (4 + 3 * (4 + 4 + 2))


def test_expansions_are_trained_one_after_the_other_and_a_cross_layer_transcoder_has_many_decoders():
    sizes = [2 * (2 * 576 * 576 * expansion + 576 * expansion + 576) for expansion in (2, 4)]
    plan = plan_stack(train__expansion=(2, 4))
    assert checkpoint_bytes(plan) == sum(sizes) * 4 * (1 + 3 * 3)
    assert host_bytes(plan) - host_bytes(plan_stack(train__expansion=(4,))) == 0
    layers = range(30)
    sites = {f"{kind}.{layer}": kind for kind in ("mlp_in", "mlp_out") for layer in layers}
    plan = plan_run(
        shape("smollm2-135m"),
        capture__sites=tuple(sites),
        train__sites=tuple(f"mlp_in.{layer}" for layer in layers),
        train__form="cross_layer_transcoder",
        train__kinds=("jumprelu",),
        train__buffer_rows=1,
    )
    encoders, decoders = 30 * 576 * 4608, 30 * 31 / 2 * 576 * 4608
    assert host_bytes(plan) == pytest.approx(3 * 4 * (encoders + decoders), rel=0.01)
    split = dataclasses.replace(plan, mesh=make_mesh(MeshConfig(model=8), jax.devices()[:8]), own_devices=2)
    assert host_bytes(split) == pytest.approx(host_bytes(plan) / 4, rel=0.01)


def test_each_member_of_a_stack_of_transcoders_has_its_own_sites():
    plan = plan_run(
        shape("qwen3-0.6b"),
        capture__sites=tuple(f"{kind}.{layer}" for layer in (3, 7) for kind in ("mlp_in", "mlp_out")),
        train__sites=("mlp_in.3", "mlp_in.7"),
        train__form="transcoder",
        train__kinds=("topk",),
        ablate__dictionary="topk/mlp_in.7",
    )
    places = [("mlp_in.3", "mlp_out.3"), ("mlp_in.7", "mlp_out.7")]
    stack = plan.stacks["topk"]
    assert [(member.site, member.target) for member in map(stack.of, stack.members)] == places
    tested = plan.dictionary("ablate")
    assert (tested.site, tested.target) == places[1]
