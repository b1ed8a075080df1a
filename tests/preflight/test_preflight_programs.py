"""What preflight compiles is what the stages run: the same functions, with arguments of the same shapes and places."""

import dataclasses

import jax
import numpy as np
import pytest
from preflight_setup import arrays, assert_same_call, make_dictionary, make_stack, on_mesh, plan_run

from saejax.activations import jax_capture
from saejax.activations.documents import Documents
from saejax.activations.plan import Plan
from saejax.evaluation import loss_recovered
from saejax.evaluation import programs as evaluation
from saejax.flops import head_flops, pass_flops, peak_flops, step_flops
from saejax.interventions import engine as ablation
from saejax.interventions import slopes as screening
from saejax.interventions import split_model as split
from saejax.interventions.edits import mask
from saejax.interventions.settings import AblateConfig
from saejax.models import decoding
from saejax.models.sites import Site
from saejax.preflight import topology
from saejax.preflight.plan import stage_programs
from saejax.stages.ablate import plan as planned
from saejax.stages.ablate.plan import kept_prompts, prompt_length, ranking_prompts
from saejax.stages.baseline import plan as benchmarks
from saejax.tasks.behaviours import Prompt
from saejax.tasks.settings import TaskConfig
from saejax.training.finetune import CleanBatches, finetuning_stack
from saejax.training.state import init_state
from saejax.training.step import train_step

K = 30
READ = dict(corpus__context=32, capture__batch_tokens=256)


@pytest.fixture(scope="module")
def plan(lm, mesh):
    changes = dict(task__benchmarks=("gsm8k",), task__max_new_tokens=32, task__batch=4, evaluate__batch_tokens=256)
    changes |= dict(train__batch=64, train__expansion=(4,), ablate__top=3, ablate__dictionary="standard")
    plan = plan_run(lm.config, "mlp_out.1", **READ, capture__store_dtype="float32", **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planned, "PROMPT_TOKENS", 5)
        patch.setattr(benchmarks, "prompt_tokens", lambda name, task: 32)
        yield on_mesh(plan, mesh)


@pytest.fixture(scope="module")
def programs(plan):
    return {program.name: program for program in stage_programs(plan)}


def test_ablation(programs, plan, lm, spy, monkeypatch):
    calls = {
        "ablate: head": spy(split, "run_head"),
        "ablate: placebo slopes": spy(screening, "target_slopes"),
        "ablate: placebo attribution": spy(screening, "score_slopes"),
        "ablate: features": spy(ablation, "gather"),
        "ablate: tail": spy(ablation, "run_rows"),
    }
    text = "The cat near the dogs far"
    count = kept_prompts(plan, lm.mesh, plan.configs[TaskConfig].train_prompts)
    prompts = [Prompt("b", "test", text, " runs", " far", text, " run", ("cat",))] * count
    # Nothing is padded or shared, and the batches below are full.
    assert prompt_length(plan) == len(lm.tokenize([text]).ids_BxT[0])
    monkeypatch.setattr(split, "prefixes", lambda ids_PxT: np.arange(ids_PxT.size).reshape(ids_PxT.shape))
    cut_model = split.SplitModel(lm, make_dictionary(lm, plan))
    ranking = cut_model.run(prompts[: ranking_prompts(plan)])
    screening.attribution(cut_model, ranking)
    for name in ("slopes", "attribution"):
        calls[f"ablate: {name}"] = list(calls[f"ablate: placebo {name}"])
    screening.target_attributions([cut_model], [ranking], np.array([[3, 4]]))
    rows = plan.configs[AblateConfig].batch_rows
    # Every row on all its tokens: batches are full.
    batches_of = ablation.batches_of
    monkeypatch.setattr(ablation, "batches_of", lambda first_SxP, *rest: batches_of(0 * first_SxP, *rest))
    runs = cut_model.run(prompts)
    ablation.run_edits(cut_model, runs, mask(cut_model.dictionary, [list(range(K))] * 6), rows)
    for name, seen in calls.items():
        assert_same_call(programs[name], seen[-1])
    assert len(calls) == sum(name.startswith("ablate") for name in programs)


def test_generation(programs, lm, spy):
    prompts, tokens = spy(decoding, "prefill"), spy(decoding, "decode")
    lm.generate(lm.tokenize(["The cat near the dogs"] * 4), 32)
    assert_same_call(programs["benchmark: prefill"], prompts[-1])
    expected, seen = arrays(programs["benchmark: decoding"].arguments), arrays(tokens[-1])
    assert [shape for shape, *_ in expected] == [shape for shape, *_ in seen]


def test_evaluation(programs, plan, lm, spy):
    calls = {name: spy(evaluation, name.replace("-", "_")) for name in ("head", "stand-in", "tail", "compare")}
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 384, 32) for _ in range(8)]
    mean_D = np.zeros(plan.dictionary("ablate").d_in)
    loss_recovered.stand_in_losses(lm, [make_dictionary(lm, plan)], documents, mean_D, 256)
    for name, seen in calls.items():
        assert_same_call(programs[f"evaluate: {name}"], seen[-1])


def test_capture(programs, lm, mesh, spy):
    calls = spy(jax_capture, "read_sites")
    ids_N = np.arange(16 * 32, dtype=np.int32) % 384
    documents = Documents.contiguous(ids_N, np.full(16, 32), np.zeros((16, 4), np.int32), ["group"])
    plan = Plan(documents, 1000, 256, 0, 0, devices=2)
    reader = jax_capture.DecoderReader(lm.source, lm.config, [Site("mlp_out", 1)], mesh, "float32", "float32")
    reader.read(plan.batches(0), lambda batch, site, value_BxTxD: None)
    assert_same_call(programs["capture: forward"], calls[-1])


def test_training(programs, plan, mesh):
    stack = make_stack(plan, mesh)
    batch = jax.make_array_from_process_local_data(stack.batch_sharding, np.ones((1, 64, 64), np.float32))
    assert_same_call(programs["train: topk step"], (init_state(stack), stack.hyperparams, (batch,)))


def test_fine_tuning_through_the_model(mesh, lm):
    changes = dict(train__kl_steps=5, train__batch=64, train__expansion=(4,), capture__store_dtype="float32")
    plan = on_mesh(plan_run(lm.config, "mlp_out.1", **READ, **changes), mesh)
    program = {program.name: program for program in stage_programs(plan)}["train: topk fine-tuning"]
    stack = make_stack(plan, mesh)
    stack = dataclasses.replace(stack, scales=[dataclasses.replace(scale, max_norm=1e9) for scale in stack.scales])
    single = finetuning_stack(stack, 0, 5, 1e-3)
    batches = CleanBatches(single, lm, [np.arange(32, dtype=np.int32)] * 2)
    hyper = jax.tree.map(lambda leaf: leaf[0], single.hyperparams)
    call = init_state(single), hyper, lm.params, batches.clean(0)
    planned_shapes, shapes = ([(x.shape, x.dtype) for x in jax.tree.leaves(args)] for args in (program.arguments, call))
    assert planned_shapes == shapes and jax.tree.structure(program.arguments) == jax.tree.structure(call)
    assert topology.compile_for(program, 2**30).fits and program.runs == 5


def test_they_are_the_stages_own_functions(programs):
    assert programs["capture: forward"].function is jax_capture.read_sites
    assert programs["evaluate: tail"].function is evaluation.tail
    assert programs["ablate: tail"].function is ablation.run_rows
    assert programs["train: standard step"].function.__wrapped__.func is train_step


def test_flops_against_xla(plan, mesh):
    """One layer and no loop: then XLA's count is right, and ours is its products."""
    alone = plan_run(plan.model, "resid_post.0", **READ, capture__dtype="float32")
    program = stage_programs(on_mesh(alone, mesh))[0]
    counted = program.lower().compile().cost_analysis()["flops"] * 2  # devices on the data axis; heads: 4 over 4
    assert program.flops == pass_flops(plan.model, 512, 32, 1)
    by_hand = 2 * 512 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96) + 512 * 4 * 32 * 64
    assert program.flops == by_hand
    assert 0.9 * by_hand < counted * 4 < 1.6 * by_hand  # norms and softmax are in XLA's
    assert step_flops(10, 3, 5) == 10 * 12 * 3 * 5


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        *[("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("h100", 989)],
        *[("NVIDIA A100-SXM4-80GB", 312), ("a100-80", 312), ("NVIDIA GH200 480GB", 989), ("NVIDIA A10", 125)],
        *[("TPU v5 lite", 197), ("TPU v5", 459), ("TPU v4", 275)],
        *[("NVIDIA A10G", None), ("NVIDIA RTX A1000", None), ("NVIDIA GB200", None), ("cpu", None)],
    ],
)
def test_peaks_are_those_of_whole_names(kind, tera):
    """An unknown device has no peak: a wrong one would give a wrong share of it."""
    assert peak_flops(kind, "bfloat16") == (tera and tera * 1e12)


def test_decoding_compiles_and_its_flops_are_those_of_the_new_tokens(programs, plan):
    program = programs["benchmark: decoding"]
    assert topology.compile_for(program, 2**30).fits
    model = plan.model
    assert program.flops == pass_flops(model, 4 * 32, 32 + 32, model.n_layers) + head_flops(model, 4 * 32)


def test_training_from_the_model_keeps_all_of_it_on_the_devices(mesh, lm):
    """While a buffer is filled there is the state; while a step is taken there are the model and the buffer."""
    changes = dict(train__source="model", train__batch=64, train__buffer_rows=512)
    plan = on_mesh(plan_run(lm.config, "resid_post.3", **READ, **changes), mesh)
    programs = {program.name: program for program in stage_programs(plan)}
    stack = make_stack(plan, mesh)
    fill, step = programs["train: topk buffer"], programs["train: topk step"]
    assert arrays(fill.kept) == arrays((init_state(stack), stack.hyperparams))
    model, parts, norms = step.kept
    assert sorted(arrays(model)) == sorted(arrays(lm.params))
    assert [place.shape for place in jax.tree.leaves(parts)] == [(1, 512, 64)]
    assert [place.shape for place in jax.tree.leaves(norms)] == [(1, 512)]
