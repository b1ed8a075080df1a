"""The training step compiled for TPU slices that are not there: one large dictionary, and layers together."""

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

GIB, BATCH = 2**30, 4096
CROSS_LAYER = dict(form=FORM, decoder_norm="free", by_kind=dict(jumprelu=JumpReLUConfig(l0_penalty="tanh")))
SHAPES = {  # members, widths, mesh
    "4096 to 131,072": (1, 4096, 131_072, MeshConfig(model=8)),
    "6 layers together, 512 to 8192": (6, 512, 8192, MeshConfig(model=8)),
}
CASES = [
    *((kind, "4096 to 131,072", name) for kind in ("standard", "topk") for name in ("v5e:2x4", "v5p:2x2x2")),
    ("jumprelu", "6 layers together, 512 to 8192", "v5e:2x4"),
]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the package libtpu is not installed")
@pytest.mark.parametrize(("kind", "shape", "name"), CASES)
def test_the_step_compiles_and_fits(kind, shape, name, quick_compiler, capsys):
    count, d, features, mesh_config = SHAPES[shape]
    target, is_cross_layer = topology.find_slice(name), kind == "jumprelu"
    sites = tuple(f"{'mlp_in' if is_cross_layer else 'resid_post'}.{i}" for i in range(count))
    config = TrainConfig(sites=sites, batch=BATCH, matmul="bfloat16", **CROSS_LAYER if is_cross_layer else {})
    dictionary = DictionaryConfig(
        kind=kind,
        site=sites[0],
        d_in=d,
        n_features=features,
        k=config.k[0] * (kind == "topk"),
        centred=not is_cross_layer,
    )
    scales = [SiteScale(1.0, 1.0, np.zeros(d, np.float32))] * count
    mesh = make_mesh(mesh_config, target.devices)
    stack = TrainStack(config, dictionary, make_members(config, kind, sites), scales, 1000, mesh)
    batch = jax.ShapeDtypeStruct((count, BATCH, d), "bfloat16", sharding=stack.batch_sharding)
    arguments = (abstract_state(stack), stack.abstract_hyperparams(), (batch,) * (1 + is_cross_layer))
    program = Program(kind, shape, compile_step(stack), arguments, (), count * step_flops(BATCH, d, features))
    compiled = topology.compile_for(program, target.limit, target.of_node)
    # Parameters and two moments, an eighth of them on each device; each layer's decoder writes to all later ones.
    matrices = count + count * (count + 1) // 2 if is_cross_layer else 2 * count
    state = 3 * matrices * d * features * 4 / 8
    assert compiled.fits and state < compiled.memory
    assert not is_cross_layer or compiled.memory < 8 * state
    with capsys.disabled():
        print(
            f"\n{name}, {kind}, {shape}, batch {BATCH:,}: {compiled.memory / GIB:.2f} of {target.limit / GIB:.2f} GiB "
            f"HBM a device, of which {state / GIB:.2f} are state; compiled in {compiled.seconds:.0f} s"
        )
