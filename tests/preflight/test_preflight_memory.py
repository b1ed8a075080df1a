"""Bytes per device: of what stays exactly, of what comes and goes within a factor of what a compiler allocates."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from preflight_setup import make_trainer, make_work, shape

from saejax import load_model
from saejax.models.config import DecoderConfig, Rope
from saejax.parallel import AXES
from saejax.preflight import memory
from saejax.preflight.advice import advice
from saejax.preflight.memory import GIB
from saejax.preflight.programs import abstract_dictionary, stage_programs


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
    work = make_work(lm.config, "resid_post.1", train__batch=64)
    need = memory.device_memory(work, axes(data, model))
    assert need.model == held(lm.params)
    trainer = make_trainer(work, mesh)
    state = trainer.initial_state()
    assert need.dictionary == held(state.params)
    moments = held(state.optimizer)
    assert need.optimizer == pytest.approx(moments + need.dictionary, abs=64)  # and the gradient; counters are left out
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(abstract_dictionary(work, mesh)[1]))
    assert need.whole_dictionary == whole


def test_dtypes_and_what_capture_reads():
    model = shape("qwen3-0.6b")
    narrow = memory.device_memory(make_work(model, model__dtype="bfloat16", capture__backend="jax"), axes())
    wide = memory.device_memory(make_work(model, capture__backend="jax"), axes())
    assert wide.model == 2 * narrow.model == 4 * 596_049_920
    outside = 151_936 * 1024 + 1024  # embedding and last norm
    assert wide.captured == 4 * (outside + 16 * (596_049_920 - outside) // 28)  # layers 0 to 15
    assert memory.device_memory(make_work(model), axes()).captured == wide.model, "torch reads all layers"


def test_replicated_parts_are_named():
    lines = memory.replicated(make_work(shape("smollm2-135m")), axes(1, 8))
    assert lines == [
        "9 query heads over 8 devices: o, q are replicated",
        "3 key-value heads over 8 devices: k, v are replicated",
    ]
    assert memory.replicated(make_work(shape("llama-3-8b")), axes(1, 8)) == []
    assert any(
        "50,257 entries of the vocabulary" in x for x in memory.replicated(make_work(shape("gpt2-medium")), axes(1, 2))
    )
    assert memory.replicated(make_work(shape("gpt2-medium")), axes(8, 1)) == []
    assert memory.replicated(make_work(shape("smollm2-135m")), axes(32, 1)) == [
        "16 documents of evaluate over 32 devices: every device runs all of them",
        "16 prompts of ablate over 32 devices: every device runs all of them",
    ]


def test_advice():
    work = make_work(shape("llama-3-8b"), train__batch=32)
    limit = int(15.75 * GIB)
    need = memory.device_memory(work, axes(8, 1))
    lines = advice(work, axes(8, 1), limit, "GPUs", need.peak)
    assert lines[0] == "--capture.backend=jax --mesh.model=4 on the same 8 GPUs"  # torch reads all of it onto one
    sharded = dataclasses.replace(work, backend="jax")
    assert memory.device_memory(sharded, axes(2, 4)).peak <= limit
    assert memory.device_memory(sharded, axes(4, 2)).peak > limit, "a smaller split would not do"
    assert lines[1].startswith("--model.dtype=bfloat16 --capture.dtype=bfloat16")
    assert any("v5p:2x2x2 with --mesh.model=1" in line for line in lines)
    on_slice = advice(sharded, axes(8, 1), limit, "devices of a v5e:2x4", need.peak)
    assert not any("slice v5e:2x4" in line for line in on_slice), "it is the one at hand"
    # The compiler needs twice the estimate: so would it elsewhere.
    assert "--mesh.model=8" in advice(sharded, axes(8, 1), limit, "GPUs", 2 * need.peak)[0]
    # A narrower dtype alone will do; nothing will; 3 tokens a step cannot be split.
    assert advice(sharded, axes(1, 1), 24 * GIB, "GPU", need.peak)[0] == (
        "--model.dtype=bfloat16 --capture.dtype=bfloat16"
    )
    assert not any("same" in line for line in advice(work, axes(1, 1), 1024, "GPU", need.peak))
    odd = make_work(shape("llama-3-8b"), train__batch=3, capture__backend="jax")
    assert "--mesh.model=8" in advice(odd, axes(8, 1), limit, "GPUs", need.peak)[0]


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
    work = make_work(model, "resid_post.2", capture__backend="jax", train__batch=512)
    activations = memory.device_memory(work, axes()).activations
    for program in stage_programs(work, make_mesh(1, 1)):
        stage = program.name.partition(":")[0]
        if program.name in ("capture: forward", "train: standard step", "evaluate: losses", "ablate: tail"):
            stated = program.lower().compile().memory_analysis()
            real = stated.temp_size_in_bytes + stated.output_size_in_bytes - stated.alias_size_in_bytes
            if stage == "train":
                real -= memory.device_memory(work, axes()).dictionary  # the gradient is counted with the optimizer
            assert 0.4 < activations[stage] / real < 2.5, (program.name, activations[stage], real)
