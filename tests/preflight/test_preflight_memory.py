"""Bytes per device: of what stays exactly, of what comes and goes within a factor of what a compiler allocates."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from preflight_setup import make_needs, make_trainer, on_mesh, plan_run, shape

from saejax import load_model
from saejax.costs.programs import abstract_dictionary
from saejax.errors import UserError
from saejax.models.config import DecoderConfig, Rope
from saejax.parallel.mesh import AXES
from saejax.preflight import checks, topology
from saejax.preflight.advice import GIB, advice
from saejax.preflight.place import Place
from saejax.preflight.sums import Needs, replicated, stage_programs
from saejax.runner.registry import STAGES
from saejax.settings import TrainConfig
from saejax.training.cost import train_cost


def make_mesh(data: int, model: int) -> Mesh:
    devices = np.array(jax.devices()[: data * model]).reshape(1, data, model)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def axes(data: int = 1, model: int = 1) -> dict[str, int]:
    return dict(member=1, data=data, model=model)


def held(tree) -> int:
    """Bytes of a tree's arrays on the first device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("data,model", [(1, 1), (2, 4), (1, 8)])
def test_what_stays_is_counted_to_the_byte(tiny_llama, data, model):
    mesh = make_mesh(data, model)
    lm = load_model(str(tiny_llama), mesh=mesh)  # 4 query heads and 2 key-value heads: not divided by 4 and 8
    plan = plan_run(lm.config, "resid_post.1", axes(data, model), train__batch=64)
    units = Needs.of(plan).units
    assert units["ablate/topk"].bytes.model == held(lm.params)
    trainer, need = make_trainer(plan, mesh), units["train/topk"].bytes
    state = trainer.initial_state()
    assert need.dictionary == held(state.params)
    moments = held(state.optimizer)
    assert need.optimizer == pytest.approx(moments + need.dictionary, abs=64)  # and the gradient; counters are left out
    abstract = abstract_dictionary(plan.dictionary("ablate"), plan.configs[TrainConfig], mesh)
    assert units["ablate/topk"].bytes.dictionary == sum(leaf.size * 4 for leaf in jax.tree.leaves(abstract))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16"])
def test_members_in_turn_have_one_gradient_and_means_may_be_split(tiny_llama, zero, mu_dtype):
    """Of four members on a CPU one is computed at a time; accelerators take small ones together."""
    changes = dict(train__seed=(1, 2, 3, 4), train__zero_optimizer=zero, train__mu_dtype=mu_dtype, train__batch=64)
    lm = load_model(str(tiny_llama))
    plan = plan_run(lm.config, "resid_post.1", axes(4, 2), **changes)
    need = train_cost(plan, "topk").bytes
    state = make_trainer(plan, make_mesh(4, 2)).initial_state()
    moments, own = held(state.optimizer), held(state.params)
    assert need.dictionary == own
    assert need.optimizer == pytest.approx(moments + own / 4, rel=0.02)  # biases stay whole
    together = train_cost(dataclasses.replace(plan, stands_for="gpu"), "topk").bytes
    assert together.optimizer == pytest.approx(moments + own, rel=0.02)
    assert together.activations == 4 * need.activations


def test_what_a_process_does_by_itself_has_to_fit_on_its_own_devices():
    """Of two processes with four devices each, one evaluates a dictionary alone; both train and ablate together."""
    whole, part = (plan_run(shape("llama-3-8b"), "resid_post.15", axes(1, model)) for model in (8, 4))
    limit = (
        Needs.of(whole).units["evaluate/topk"].bytes.total + Needs.of(part).units["evaluate/topk"].bytes.total
    ) // 2
    two = dataclasses.replace(whole, own_devices=4)
    units = Needs.of(two).units
    assert units["evaluate/topk"] == Needs.of(part).units["evaluate/topk"]
    assert units["baseline"] == Needs.of(part).units["baseline"]
    for unit in ("capture", "train/topk", "ablate/topk"):
        assert units[unit] == Needs.of(whole).units[unit]
    place = Place(make_mesh(1, 8), limit, "devices", 4, False, 4)

    def narrow(plan) -> Needs:
        return Needs({"evaluate/topk": Needs.of(plan).units["evaluate/topk"]})

    checks._check_memory([(whole, narrow(whole))], [checks._facts(whole, narrow(whole), (), place)], place)
    said = r"GiB per device for evaluate/topk, which a process runs on its own 4 devices, but there are"
    with pytest.raises(UserError, match=said):
        checks._check_memory([(two, narrow(two))], [checks._facts(two, narrow(two), (), place)], place)


def test_a_plan_of_several_processes_has_their_meshes():
    plan = dataclasses.replace(on_mesh(plan_run(shape("smollm2-135m")), make_mesh(2, 4)), own_devices=2)
    alone, together = plan.placed(STAGES["evaluate"]), plan.placed(STAGES["train"])
    assert dict(alone.mesh.shape) == alone.axes == dict(member=1, data=1, model=2)
    assert alone.mesh.devices.flatten().tolist() == jax.devices()[:2]
    assert together is plan and plan.placed(STAGES["report"]).axes == alone.axes


def test_devices_of_a_process():
    of = {"v5e:2x4": 0, "v6e:2x4": 0, "v5e:4x4": 4, "v5p:2x2x2": 4, "v5e:2x2": 0, "v5p:2x2x1": 0}
    of |= {"h100:8": 0, "h100:4x8": 8, "h100:2x1": 1}
    for name, own in of.items():
        assert topology.of_process(name, np.prod([int(n) for n in name.partition(":")[2].split("x")])) == own, name


def test_dtypes_and_what_capture_reads():
    model = shape("qwen3-0.6b")

    def weights(**changes) -> tuple[int, int]:
        """Bytes of the weights that are captured from, and of those that are ablated."""
        units = make_needs(model, **changes).units
        return units["capture"].bytes.model, units["ablate/topk"].bytes.model

    narrow = weights(model__dtype="bfloat16", capture__backend="jax")
    wide = weights(capture__backend="jax")
    assert wide[1] == 2 * narrow[1] == 4 * 596_049_920
    outside = 151_936 * 1024 + 1024  # embedding and last norm
    assert wide[0] == 4 * (outside + 16 * (596_049_920 - outside) // 28)  # layers 0 to 15
    assert weights(capture__backend="torch")[0] == wide[1], "torch reads all layers"


def test_replicated_parts_are_named():
    def of(name: str, axes) -> list[str]:
        plan = plan_run(shape(name), "", axes)
        return replicated(plan, Needs.of(plan))

    lines = of("smollm2-135m", axes(1, 8))
    assert lines == [
        "9 query heads over 8 devices: o, q are replicated",
        "3 key-value heads over 8 devices: k, v are replicated",
    ]
    assert of("llama-3-8b", axes(1, 8)) == []
    assert any("50,257 entries of the vocabulary" in line for line in of("gpt2-medium", axes(1, 2)))
    assert of("gpt2-medium", axes(8, 1)) == []
    assert of("smollm2-135m", axes(32, 1)) == [
        "16 documents of evaluate over 32 devices: every device runs all of them",
        "16 prompts of ablate over 32 devices: every device runs all of them",
    ]


def test_advice():
    plan = plan_run(shape("llama-3-8b"), "", axes(8, 1), train__batch=32, capture__backend="torch")
    limit = int(15.75 * GIB)
    peak = Needs.of(plan).peak
    lines = advice(plan, limit, "GPUs", peak)
    assert lines[0] == "--capture.backend=jax --mesh.model=4 on the same 8 GPUs"  # torch reads all of it onto one
    sharded = dataclasses.replace(plan, torch_here=False)
    assert Needs.of(dataclasses.replace(sharded, axes=axes(2, 4))).peak <= limit
    assert Needs.of(dataclasses.replace(sharded, axes=axes(4, 2))).peak > limit, "a smaller split would not do"
    assert lines[1].startswith("--model.dtype=bfloat16 --capture.dtype=bfloat16")
    assert any("v5p:2x2x2 with --mesh.model=1" in line for line in lines)
    on_slice = advice(sharded, limit, "devices of a v5e:2x4", peak)
    assert not any("slice v5e:2x4" in line for line in on_slice), "it is the one at hand"
    # The compiler needs twice the estimate: so would it elsewhere.
    assert "--mesh.model=8" in advice(sharded, limit, "GPUs", 2 * peak)[0]
    # A narrower dtype alone will do; nothing will; 3 tokens a step cannot be split.
    one, narrow = dataclasses.replace(sharded, axes=axes()), "--model.dtype=bfloat16 --capture.dtype=bfloat16"
    assert advice(one, 24 * GIB, "GPU", peak)[0] == narrow
    assert not any("same" in line for line in advice(dataclasses.replace(plan, axes=axes()), 1024, "GPU", peak))
    odd = plan_run(shape("llama-3-8b"), "", axes(1, 8), train__batch=3, capture__backend="jax")
    assert "--mesh.model=8" in advice(odd, limit, "GPUs", peak)[0]


def test_an_optimizer_is_split_where_that_will_do():
    plan = plan_run(shape("gpt2-medium"), "resid_post.12", axes(8, 1), train__expansion=128, capture__backend="jax")
    split = dataclasses.replace(plan.configs[TrainConfig], zero_optimizer=True)
    enough = Needs.of(dataclasses.replace(plan, configs=plan.configs | split)).peak
    peak = Needs.of(plan).peak
    assert enough < 0.8 * peak
    assert "--train.zero_optimizer" in advice(plan, enough, "GPUs", peak)
    assert "--train.zero_optimizer" not in advice(plan, enough - 1, "GPUs", peak)


def test_estimates_against_a_compiler(tiny_llama):
    """Temporaries and results as XLA allocates them on one CPU device."""
    model = DecoderConfig(
        family="llama",
        n_layers=4,
        d_model=256,
        n_heads=8,
        n_kv_heads=4,
        d_head=32,
        d_mlp=1024,
        vocab=16_384,
        context=256,
        tied=False,
        norm="rms",
        norm_eps=1e-5,
        activation="silu",
        gated=True,
        score_scale=32**-0.5,
        rope=Rope(tuple(1e4 ** -(i / 16) for i in range(16))),
    )
    plan = plan_run(model, "resid_post.2", capture__backend="jax", train__batch=512)
    needs = {unit.partition("/")[0]: cost.bytes for unit, cost in Needs.of(plan).units.items()}
    for program in stage_programs(on_mesh(plan, make_mesh(1, 1))):
        stage = program.name.partition(":")[0]
        if program.name in ("capture: forward", "train: standard step", "evaluate: losses", "ablate: tail"):
            stated = program.lower().compile().memory_analysis()
            real = stated.temp_size_in_bytes + stated.output_size_in_bytes - stated.alias_size_in_bytes
            if stage == "train":
                real -= needs[stage].dictionary  # the gradient is counted with the optimizer
            assert 0.4 < needs[stage].activations / real < 2.5, (program.name, needs[stage], real)
