"""The training step compiled for TPU slices that are not there: a stack of layers, and one large dictionary."""

import importlib.util

import jax
import numpy as np
import pytest

from saejax.costs.passes import step_flops
from saejax.costs.programs import Program
from saejax.dictionaries import DictionaryConfig
from saejax.dictionaries.cross_layer import FORM
from saejax.parallel.mesh import make_mesh
from saejax.preflight import topology
from saejax.settings import MeshConfig, TrainConfig
from saejax.settings.kinds import JumpReLUConfig
from saejax.training.members import make_members
from saejax.training.scales import SiteScale
from saejax.training.stack import TrainStack
from saejax.training.state import abstract_state
from saejax.training.step import compile_step

GIB = 2**30
LAYERS = 24
BATCH = 4096
SHAPES = {
    "24 layers, 1024 to 8192": (LAYERS, 1024, 8192, MeshConfig(member=8)),
    "4096 to 131,072": (1, 4096, 131_072, MeshConfig(model=8)),
}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the package libtpu is not installed")
@pytest.mark.parametrize("name", ["v5e:2x4", "v5p:2x2x2"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["standard", "topk"])
def test_the_step_compiles_and_fits(kind, shape, name, quick_compiler, capsys):
    count, d, features, mesh_config = SHAPES[shape]
    found = topology.find_slice(name)
    mesh = make_mesh(mesh_config, found.devices)
    config = TrainConfig(sites=tuple(f"resid_post.{i}" for i in range(count)), batch=BATCH, matmul="bfloat16")
    k = config.k[0] if kind == "topk" else 0
    dictionary = DictionaryConfig(kind=kind, site=config.sites[0], d_in=d, n_features=features, k=k)
    scales = [SiteScale(1.0, 1.0, np.zeros(d, np.float32))] * count
    stack = TrainStack(config, dictionary, make_members(config, kind, config.sites), scales, 1000, mesh)
    batch = jax.ShapeDtypeStruct((count, BATCH, d), "bfloat16", sharding=stack.batch_sharding)
    arguments = (abstract_state(stack), stack.abstract_hyperparams(), (batch,))
    flops = count * step_flops(BATCH, d, features)
    program = Program(kind, shape, compile_step(stack), arguments, (), flops)
    compiled = topology.compile_for(program, found.limit, found.of_node)
    state = 3 * 2 * count * d * features * 4 / 8  # parameters and two moments, an eighth of them on each device
    assert compiled.fits and state < compiled.memory
    with capsys.disabled():
        print(
            f"\n{name}, {kind}, {shape}, batch {BATCH:,}: {compiled.memory / GIB:.2f} of {found.limit / GIB:.2f} GiB "
            f"HBM a device, of which {state / GIB:.2f} are state; compiled in {compiled.seconds:.0f} s"
        )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the package libtpu is not installed")
def test_the_step_of_a_cross_layer_transcoder_compiles_and_fits(quick_compiler, capsys):
    count, d, features, found = 6, 512, 8192, topology.find_slice("v5e:2x4")
    mesh, sites = make_mesh(MeshConfig(model=8), found.devices), tuple(f"mlp_in.{i}" for i in range(count))
    own = dict(jumprelu=JumpReLUConfig(l0_penalty="tanh"))
    config = TrainConfig(sites=sites, form=FORM, batch=BATCH, matmul="bfloat16", decoder_norm="free", by_kind=own)
    dictionary = DictionaryConfig(kind="jumprelu", site=sites[0], d_in=d, n_features=features, centred=False)
    scales = [SiteScale(1.0, 1.0, np.zeros(d, np.float32))] * count
    stack = TrainStack(config, dictionary, make_members(config, "jumprelu", sites), scales, 1000, mesh)
    batch = jax.ShapeDtypeStruct((count, BATCH, d), "bfloat16", sharding=stack.batch_sharding)
    arguments = (abstract_state(stack), stack.abstract_hyperparams(), (batch, batch))
    program = Program("jumprelu", FORM, compile_step(stack), arguments, (), 1.0)
    compiled = topology.compile_for(program, found.limit, found.of_node)
    state = 3 * (count + count * (count + 1) // 2) * d * features * 4 / 8
    assert compiled.fits and state < compiled.memory < 8 * state
    with capsys.disabled():
        print(f"\n{compiled.memory / GIB:.2f} GiB a device, {state / GIB:.2f} of state; {compiled.seconds:.0f} s")
