"""What a TPU does with weights while it makes tokens."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from saejax.costs.programs import abstract_params
from saejax.files import read_json
from saejax.models import decoding
from saejax.models.decoding import KVCache
from saejax.models.families import read_config
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.preflight import topology

_MADE = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = \w+\[([\d,]+)\]\S* ([\w-]+)\(")
_MOVES_NOTHING = ("parameter", "get-tuple-element", "bitcast", "tuple", "while")


def sizes_made(program: str) -> set[int]:
    """Numbers of elements of the arrays that a program writes, outside of fusions, which write their results alone."""
    found, inside = set(), False
    for line in program.splitlines():
        if line.endswith("{") and "=" not in line.partition("(")[0]:
            inside = "fused_computation" in line.split()[0] or "fused_computation" in line.partition("(")[0]
        elif not inside and (made := _MADE.match(line)) and made[2] not in _MOVES_NOTHING:
            found.add(int(np.prod([int(size) for size in made[1].split(",")])))
    return found


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra 'tpu')")
@pytest.mark.parametrize("prompts", [1, 8])
def test_a_layers_weights_are_read_where_they_are(prompts):
    """Products read them in the stack of all layers: no layer's slice is written for each token."""
    config, room = read_config(read_json(runs.ROOT / "configs/shapes/smollm2-135m.json"), "smollm2"), 192
    mesh = make_mesh(MeshConfig(), topology.find_slice("v5e:2x4").devices[:1])
    here = jax.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def array(dtype: jnp.dtype | type, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=here)

    kept = array(jnp.bfloat16, config.n_layers, prompts, room, config.n_kv_heads, config.d_head)
    cache = KVCache(kept, kept, array(jnp.int32, prompts), array(jnp.int32))
    flags = array(bool, prompts), array(bool, prompts)
    state = decoding.DecodeState(cache, array(jnp.int32, prompts, 64), array(jnp.int32), *flags)
    key = array(jax.random.key(0).dtype)
    sampling = decoding.SamplingParams(array(jnp.float32), array(jnp.float32), key, sampled=False, nucleus=False)
    params = abstract_params(config, mesh, "bfloat16", config.n_layers)
    lowered = decoding.decode.lower(config, params, state, array(jnp.int32), array(jnp.int32, 1), (), sampling)
    written = sizes_made(lowered.compile().as_text())
    layers = [leaf for name, leaf in params.items() if name.startswith("layers.") and leaf.ndim > 2]
    weights = {leaf.size // config.n_layers for leaf in layers}
    assert kept.size in written, "the keys, with the new ones: the program is read as it should be"
    assert not weights & written
