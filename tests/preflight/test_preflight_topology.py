"""Programs compiled for TPU slices that are not there."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from preflight_setup import CONFIGS, needs_libtpu, on_mesh, plan_run, shape

from saejax.costs.programs import Program
from saejax.dictionaries.kinds.jumprelu import JumpReLUConfig
from saejax.errors import UserError
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.preflight import topology
from saejax.preflight.plan import stage_programs
from saejax.runner import command
from saejax.stages.train.plan import train_programs

GIB = 2**30
STUDIES = sorted(path for path in CONFIGS.glob("*.flags") if not path.name.startswith(("accelerator", "demo")))


@pytest.fixture(scope="module")
def v5e():
    return topology.find_slice("v5e:2x4")


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package libtpu, which is not installed: run pip install"):
        topology.find_slice("v5e:2x4")


@needs_libtpu
def test_slices(v5e):
    assert len(v5e.devices) == 8 and v5e.devices[0].device_kind == "TPU v5 lite"
    assert v5e.limit == int(15.75 * GIB)
    assert jax.devices()[0].platform == "cpu", "the devices of the slice are not this process's"
    assert len(topology.find_slice("v5e:1x1").devices) == 1, "a part of a host"


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:3x3", "v9z:2x2", "v5e", "nonsense", "v5e:2x2x2x2"])
def test_no_such_slice(name):
    with pytest.raises(UserError, match="expected a kind and its layout, such as v5e:2x4"):
        topology.find_slice(name)


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:4x4", "v5p:2x2x4"])
def test_a_host_of_a_larger_slice(name):
    """Its programs compile, which those of a part of the slice would not on a v5e."""
    mesh = make_mesh(MeshConfig(), topology.host_alone(name))
    assert mesh.size == 4
    split = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=jax.NamedSharding(mesh, PartitionSpec("data")))
    assert topology.compile_for(Program("sum", "", jax.jit(jnp.sum), (split,), (), 1.0), GIB).fits


@needs_libtpu
def test_a_program_that_does_not_fit(v5e):
    mesh = make_mesh(MeshConfig(), v5e.devices)
    whole = jax.ShapeDtypeStruct((16, GIB // 4), jnp.float32, sharding=jax.NamedSharding(mesh, PartitionSpec()))
    by_columns = jax.NamedSharding(mesh, PartitionSpec(None, "data"))
    split = jax.ShapeDtypeStruct(whole.shape, whole.dtype, sharding=by_columns)
    function = jax.jit(lambda x: x + 1)

    def compiled(argument, *kept):
        return topology.compile_for(Program("a: b", "", function, (argument,), kept, 1.0), v5e.limit)

    too_large, small = compiled(whole), compiled(split)
    assert not too_large.fits and too_large.counted_flops is None
    assert too_large.memory == pytest.approx(32 * GIB, rel=0.02)  # argument and result
    assert small.fits and small.memory == pytest.approx(4 * GIB, rel=0.02)
    together = compiled(split, split, split)  # what else the stage keeps there counts
    assert together.fits and together.memory - small.memory == 4 * GIB
    assert not compiled(split, whole).fits


@needs_libtpu
def test_stages_compile_for_a_slice(v5e, quick_compiler):
    """A training step sharded over features, and an edit: the quickest of the programs to compile."""
    plan = plan_run(shape("llama-3-8b"), "resid_post.16", train__batch=64, model__dtype="bfloat16")
    mesh = make_mesh(MeshConfig(data=2, model=4), v5e.devices)
    programs = {program.name: program for program in stage_programs(on_mesh(plan, mesh))}
    step = topology.compile_for(programs["train: standard step"], v5e.limit)
    state = 3 * 2 * 4096 * 32_768 * 4 / 4  # parameters and two moments, a quarter of the features
    assert step.fits and state < step.memory < 2 * state
    assert step.counted_flops == pytest.approx(programs["train: standard step"].flops / 8, rel=0.2)
    edited = topology.compile_for(programs["ablate: features"], v5e.limit)
    assert edited.fits and 16e9 / 4 < edited.memory < 7 * GIB, "the weights stay beside it"


CROSS_LAYER = dict(train__form="cross_layer_transcoder", train__decoder_norm="free")
CROSS_LAYER |= dict(train__by_kind=dict(jumprelu=JumpReLUConfig(l0_penalty="tanh")))


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:2x4", "v5p:2x2x2"])
@pytest.mark.parametrize(
    ("kind", "model", "site", "layers", "expansion", "axes", "changes"),
    [
        *((kind, "gpt2-medium", "resid_post", 24, 8, dict(member=8), {}) for kind in ("standard", "topk")),
        *((kind, "llama-3-8b", "resid_post", 1, 32, dict(model=8), {}) for kind in ("standard", "topk")),
        ("jumprelu", "smollm2-135m", "mlp_in", 6, 14, dict(model=8), CROSS_LAYER),
    ],
)
def test_steps_of_many_layers_and_of_a_large_dictionary_fit(
    name, kind, model, site, layers, expansion, axes, changes, quick_compiler
):
    """Each device has an eighth of the parameters and of their two moments."""
    tpus, sites = topology.find_slice(name), tuple(f"{site}.{layer}" for layer in range(layers))
    mesh = make_mesh(MeshConfig(**axes), tpus.devices)
    captured = tuple({each.replace("mlp_in", read): 0 for read in ("mlp_in", "mlp_out") for each in sites})
    changes = changes | dict(capture__sites=captured, train__sites=sites, train__kinds=(kind,), train__batch=4096)
    plan = plan_run(shape(model), train__expansion=(expansion,), train__matmul="bfloat16", **changes)
    (program,) = train_programs(on_mesh(plan, mesh), mesh)
    step = topology.compile_for(program, tpus.limit)
    matrices = layers + layers * (layers + 1) // 2 if site == "mlp_in" else 2 * layers
    state = 3 * matrices * expansion * plan.model.d_model**2 * 4 / 8
    assert step.fits and state < step.memory < 8 * state


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_config_compiles_for_the_slice_that_it_names(path, tmp_path, monkeypatch, capsys, quick_compiler):
    monkeypatch.chdir(CONFIGS.parent)  # configs name their shapes from there
    flags = re.search(r"^# Fits a TPU slice: (--preflight.topology=\S+(?: --mesh.model=\d+)?)", path.read_text(), re.M)
    argv = ["preflight", f"--workdir={tmp_path}", f"--flagfile={path}", *flags[1].split()]
    assert command.run(["preflight"], "", argv) == 0, capsys.readouterr().err
    with capsys.disabled():
        print()
        print("\n".join(line.partition("preflight: ")[2] for line in capsys.readouterr().out.splitlines()))
