"""Fused attention: which kernel is taken when, what it is asked for beside ``attend``, and lowering for its devices.

No kernel runs here: splash is interpreted, cuDNN's masks and scale are computed by XLA from the same arguments. Where
libtpu is installed, splash is compiled for a slice.
"""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from loaded_models import mesh_of

from saejax.models import fused_attention
from saejax.models.attention import attend, whole_prompt_tables
from saejax.models.config import GRADIENT, DecoderConfig, RunRules
from saejax.models.fused_attention import attend_fused, find_kernel, select_kernel
from saejax.parallel import mesh as meshes
from saejax.parallel.settings import MeshConfig
from saejax.preflight import topology

CONFIG = DecoderConfig(
    **dict(family="qwen3", n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, d_head=128, d_mlp=12, vocab=32),
    **dict(context=512, tied=True, norm="rms", norm_eps=1e-6, activation="silu", gated=True, score_scale=0.08),
)
BF16, F32 = jnp.bfloat16, jnp.float32
WINDOWS = dict(sliding_layers=(True, False), sliding_window=70)
CAPPED = dict(attn_logit_softcap=5.0)


@pytest.mark.parametrize(
    "platform, capability, dtype, config, rules, length, devices, kernel",
    [
        ("gpu", 8.0, BF16, {}, {}, 256, 1, "cudnn"),
        ("gpu", 9.0, jnp.float16, WINDOWS, dict(remat=True), 1000, 2, "cudnn"),
        ("gpu", 9.0, BF16, dict(d_head=256), {}, 256, 1, "cudnn"),
        ("gpu", 8.0, BF16, dict(d_head=256), {}, 256, 1, None),
        ("gpu", 9.0, BF16, dict(d_head=264), {}, 256, 1, None),
        ("gpu", 9.0, BF16, dict(d_head=100), {}, 256, 1, None),
        ("gpu", 9.0, BF16, CAPPED, {}, 256, 1, None),
        ("gpu", 7.0, BF16, {}, {}, 256, 1, None),  # V100
        ("gpu", 0.0, BF16, {}, {}, 256, 1, None),  # AMD
        ("tpu", 0.0, BF16, {}, {}, 256, 1, "splash"),
        ("tpu", 0.0, BF16, WINDOWS | CAPPED, {}, 256, 2, "splash"),
        ("tpu", 0.0, BF16, dict(d_head=64), {}, 256, 1, None),
        ("tpu", 0.0, BF16, {}, {}, 200, 1, None),
        ("cpu", 0.0, BF16, {}, {}, 256, 1, None),
        *((p, 9.0, F32, {}, {}, 256, 1, None) for p in ("gpu", "tpu")),
        *((p, 9.0, BF16, {}, {}, 64, 1, None) for p in ("gpu", "tpu")),
        *((p, 9.0, BF16, {}, {}, 256, 4, None) for p in ("gpu", "tpu")),  # two key-value heads
        *((p, 9.0, BF16, dict(scale_by_layer=True), {}, 256, 1, None) for p in ("gpu", "tpu")),
        *((p, 9.0, BF16, {}, dict(backward="relp"), 256, 1, None) for p in ("gpu", "tpu")),
        *((p, 9.0, BF16, {}, dict(first_fixes=True), 256, 1, None) for p in ("gpu", "tpu")),
    ],
)
def test_selection(platform, capability, dtype, config, rules, length, devices, kernel):
    config, rules = dataclasses.replace(CONFIG, **config), RunRules(**rules)
    assert select_kernel(platform, capability, np.dtype(dtype), config, rules, length, devices) == kernel


def draw(length: int, dtype=F32, prompts=2):
    rng = np.random.default_rng(0)
    heads = (CONFIG.n_heads, CONFIG.n_kv_heads, CONFIG.n_kv_heads)
    return tuple(jnp.asarray(rng.normal(size=(prompts, length, count, CONFIG.d_head)), dtype) for count in heads)


def without_kernels(monkeypatch):
    monkeypatch.setattr(fused_attention, "_INTERPRETED", True)
    monkeypatch.setattr(fused_attention, "_CUDNN", "xla")


@pytest.mark.parametrize(
    "kernel, changes, axes, length",
    [
        ("cudnn", WINDOWS, None, 130),
        ("cudnn", {}, (2, 1, 2), 130),
        ("splash", WINDOWS | CAPPED, None, 256),
        ("splash", dict(sliding_layers=(True, True), sliding_window=256), (1, 2, 2), 128),
    ],
)
def test_values_and_gradients_are_those_of_attend(monkeypatch, kernel, changes, axes, length):
    """In layers with and without windows, on one device and with prompts and heads split."""
    without_kernels(monkeypatch)
    config, qkv = dataclasses.replace(CONFIG, **changes), draw(length, prompts=2 if axes else 1)
    tables = whole_prompt_tables(config, length)
    mesh = mesh_of(*axes) if axes else None
    where = mesh and meshes.sharding(mesh, meshes.BY_DOCUMENT, None, "model", None)
    placed = jax.device_put(qkv, where) if mesh else qkv

    @functools.partial(jax.jit, static_argnums=0)
    def run(fused, layer, qkv):
        def loss(qkv):
            if fused:
                z = attend_fused(kernel, config, meshes.mesh_of(qkv[0]), qkv, tables, layer)
            else:
                z = attend(config, GRADIENT, *qkv, tables.at(config, layer))
            return jnp.sum(jnp.sin(z)), z

        return jax.value_and_grad(loss, has_aux=True)(qkv)

    for layer in range(2 if changes else 1):
        (_, z), gradients = run(True, jnp.int32(layer), placed)
        (_, expected), expected_gradients = run(False, jnp.int32(layer), qkv)
        np.testing.assert_allclose(z, expected, atol=1e-5)
        for gradient, other in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(gradient, other, atol=2e-4)


@pytest.mark.parametrize(
    "kernel, platform, call", [("cudnn", "cuda", "__cudnn$fmha"), ("splash", "tpu", "tpu_custom_call")]
)
def test_kernels_are_lowered_for_their_devices(monkeypatch, kernel, platform, call):
    """Forwards and backwards; not compiled, for want of a compiler for them."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    config = dataclasses.replace(CONFIG, **WINDOWS)
    tables = whole_prompt_tables(config, 256)

    def loss(layer, *qkv):
        mesh = meshes.mesh_of(qkv[0])
        return jnp.sum(attend_fused(kernel, config, mesh, qkv, tables, layer).astype(F32))

    program = jax.jit(jax.grad(loss, (1, 2, 3))).trace(jnp.int32(0), *draw(256, BF16))
    text = program.lower(lowering_platforms=(platform,)).as_text()
    assert text.count(call) >= 4  # both windows, forwards and backwards


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra 'tpu')")
@pytest.mark.parametrize("name, axes", [("v5e:2x4", dict(data=4, model=2)), ("v5p:2x2x2", dict(member=2, data=4))])
def test_splash_is_chosen_and_compiles_for_slices(name, axes):
    """Forwards and backwards, prompts and heads split over the slice."""
    mesh = meshes.make_mesh(MeshConfig(**axes), topology.find_slice(name).devices)
    config = dataclasses.replace(CONFIG, **WINDOWS)
    tables = whole_prompt_tables(config, 256)
    spec = jax.sharding.PartitionSpec(meshes.BY_DOCUMENT, None, "model", None)
    where = jax.sharding.NamedSharding(mesh, spec)
    qkv = [jax.ShapeDtypeStruct((8, 256, heads, 128), BF16, sharding=where) for heads in (4, 2, 2)]

    def loss(layer, *qkv):
        mesh = meshes.mesh_of(qkv[0])
        kernel = find_kernel(config, GRADIENT, mesh, qkv[0][..., 0, :])
        assert kernel == "splash"
        return jnp.sum(attend_fused(kernel, config, mesh, qkv, tables, layer).astype(F32))

    layer = jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    compiled = jax.jit(jax.grad(loss, (1, 2, 3))).lower(layer, *qkv).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 4


def test_the_kernel_follows_the_mesh_and_the_stream():
    x = jnp.zeros((2, 256, 16), BF16)
    assert find_kernel(CONFIG, GRADIENT, meshes.mesh_of(jnp.zeros(2)), x) is None  # a CPU
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1, 4, 2), meshes.AXES, abstract_device=device)
    assert find_kernel(CONFIG, GRADIENT, mesh, x) == "splash"
    assert find_kernel(CONFIG, GRADIENT, mesh, x.astype(F32)) is None
