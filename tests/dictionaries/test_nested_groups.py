"""Reconstructions of nested groups where features are split over devices, against those on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.dictionaries.kinds.groups import group_reconstructions
from saejax.parallel.mesh import make_mesh
from saejax.settings import MeshConfig

F, D, B = 32, 6, 8


@pytest.mark.parametrize("matmul_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("groups", [(2, 4, 8, 16, 32), (8, 24, 32), (32,)])
def test_split_features_give_the_same(groups, matmul_dtype):
    rng = np.random.default_rng(0)
    f_BxF, x_BxD, weights_SxBxD = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, F), (B, D), (len(groups), B, D))
    )
    config = DictionaryConfig("matryoshka", "resid_post.1", "", D, F, k=3, groups=groups)
    arrays = {name: value[...] for name, value in Dictionary.initial(config, jax.random.key(0)).arrays.items()}

    def loss(arrays, f_BxF):
        dictionary = Dictionary(config, **arrays)
        dictionary.matmul_dtype = matmul_dtype
        nested_SxBxD = jnp.stack(group_reconstructions(dictionary, f_BxF, x_BxD))
        return (nested_SxBxD * weights_SxBxD).sum(), nested_SxBxD

    run = jax.grad(loss, argnums=(0, 1), has_aux=True)
    mesh = make_mesh(MeshConfig(data=2, model=4), jax.devices()[:8])
    split_BxF = jax.device_put(f_BxF, NamedSharding(mesh, PartitionSpec("data", "model")))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        split = jax.jit(run)(arrays, split_BxF)
    for ours, whole in zip(jax.tree.leaves(split), jax.tree.leaves(jax.jit(run)(arrays, f_BxF)), strict=True):
        np.testing.assert_allclose(ours, whole, atol=1e-5)
