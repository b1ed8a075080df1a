"""Mixtures of experts: outputs and derivatives beside those of all experts on all tokens, and their work."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loaded_models import mesh_of

from benchmarks.collectives import product_flops, sent_bytes
from saejax.flops import pass_flops
from saejax.models.config import GRADIENT, DecoderConfig, RunRules
from saejax.models.experts import block_shape, mix_experts
from saejax.models.layers import mlp
from saejax.models.parameters import LAYERS, parameter_table
from saejax.parallel.mesh import BY_DOCUMENT, fitting_sharding

CONFIG = DecoderConfig(
    **dict(family="qwen3_moe", n_layers=3, d_model=16, n_heads=2, n_kv_heads=2, d_head=8, d_mlp=12, vocab=32),
    **dict(context=64, tied=True, norm="rms", norm_eps=1e-6, activation="silu", gated=True, score_scale=1.0),
    **dict(n_experts=6, experts_per_token=2, normalize_experts=True),
)
LAYER = 1


def draw(config: DecoderConfig, dtype=np.float32) -> dict[str, jax.Array]:
    """Random routers and experts of all layers."""
    rng, table = np.random.default_rng(0), parameter_table(config)
    names = [name for name in table if "router" in name or "_Ex" in name]
    return {name: jnp.asarray(rng.normal(size=table[name][0]) / 3, dtype) for name in names}


def run_all_experts(config, rules, params, layer, x_xTxD):
    """The same with every expert on every token."""
    of_layer = {name.removeprefix(LAYERS): value[layer] for name, value in params.items()}
    probability_xTxE = jax.nn.softmax(jnp.einsum("...d,de->...e", x_xTxD, of_layer["router_DxE"]))
    top, chosen = jax.lax.top_k(probability_xTxE, config.experts_per_token)
    top = top / top.sum(axis=-1, keepdims=True) if config.normalize_experts else top
    share_xTxE = jnp.sum(jax.nn.one_hot(chosen, config.n_experts, dtype=top.dtype) * top[..., None], axis=-2)
    share_xTxE, total = rules.factor(share_xTxE), 0
    for expert in range(config.n_experts):
        weights = {name.replace("_Ex", "_"): value[expert] for name, value in of_layer.items() if "_Ex" in name}
        total += share_xTxE[..., expert, None] * mlp(config, rules, weights, x_xTxD)
    return total


def tokens(shape, skewed=False):
    """Random streams; skewed ones, of which nearly all choose the same experts."""
    x = np.random.default_rng(1).normal(size=(*shape, CONFIG.d_model))
    return jnp.asarray(x * 0.1 + 3 if skewed else x, jnp.float32)


def close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), actual, expected)


@pytest.mark.parametrize(
    "shape, skewed, normalize", [((2, 40), False, True), ((3, 50), True, False), ((1, 1), False, True)]
)
def test_only_chosen_experts_run_and_no_token_is_dropped(shape, skewed, normalize):
    config, params, x = dataclasses.replace(CONFIG, normalize_experts=normalize), draw(CONFIG), tokens(shape, skewed)
    actual = jax.jit(mix_experts, static_argnums=(0, 1))(config, GRADIENT, params, jnp.int32(LAYER), x)
    close(actual, run_all_experts(config, GRADIENT, params, LAYER, x))


@pytest.mark.parametrize("rules", [GRADIENT, RunRules("relp", first_fixes=True)])
def test_derivatives(rules):
    """Backwards to the stream and to all parameters, forwards, and of several streams at once."""
    params, x = draw(CONFIG), tokens((2, 30))

    def measure(mix):
        def loss(params, x):
            return jnp.sum(jnp.sin(mix(CONFIG, rules, params, LAYER, x)))

        def run(x):
            return mix(CONFIG, rules, params, LAYER, x)

        streams = jnp.stack([x, 2 * x, -x])
        tangents = jax.jvp(run, (x,), (x[::-1],))
        pulled = jax.vmap(jax.vjp(run, x)[1])(streams)
        of_streams = jax.vmap(jax.value_and_grad(loss, 1), (None, 0))(params, streams)
        return jax.grad(loss, (0, 1))(params, x), tangents, pulled, of_streams

    close(*(jax.jit(measure, static_argnums=0)(mix) for mix in (mix_experts, run_all_experts)))


@pytest.mark.parametrize(
    "axes, shape", [((2, 2, 2), (8, 10)), ((1, 1, 8), (3, 10)), pytest.param((1, 4, 2), (10,), marks=pytest.mark.slow)]
)
def test_on_a_mesh(axes, shape):
    """Where prompts and hidden width are split, and where their sizes do not allow it."""
    mesh, params, x = mesh_of(*axes), draw(CONFIG), tokens(shape)
    table = parameter_table(CONFIG)
    placed = {
        name: jax.device_put(value, fitting_sharding(mesh, value.shape, *table[name][1]))
        for name, value in params.items()
    }

    @functools.partial(jax.jit, static_argnums=0)
    def run(mix, params, x):
        return jax.value_and_grad(lambda x: jnp.sum(jnp.sin(mix(CONFIG, GRADIENT, params, LAYER, x))))(x)

    where = fitting_sharding(mesh, x.shape, BY_DOCUMENT if x.ndim > 2 else None, *[None] * (x.ndim - 1))
    on_mesh = run(mix_experts, placed, jax.device_put(x, where))
    close(jax.device_get(on_mesh), run(run_all_experts, params, x))


def test_bfloat16():
    params, x = draw(CONFIG, jnp.bfloat16), tokens((2, 40)).astype(jnp.bfloat16)
    actual = jax.jit(mix_experts, static_argnums=(0, 1))(CONFIG, GRADIENT, params, jnp.int32(LAYER), x)
    assert actual.dtype == jnp.bfloat16
    exact = jax.tree.map(lambda value: value.astype(jnp.float32), (params, x))
    expected = run_all_experts(CONFIG, GRADIENT, exact[0], LAYER, exact[1])
    np.testing.assert_allclose(actual.astype(jnp.float32), expected, rtol=0.03, atol=0.03)


def test_blocks_are_enough_and_few():
    rng = np.random.default_rng(0)
    for pairs in (1, 5, 8, 100, 1000, 16_384, 100_000):
        for experts in (2, 8, 60, 128):
            blocks, rows = block_shape(pairs, experts)
            assert blocks * rows <= 1.25 * pairs, (pairs, experts)
            for concentration in (0.01, 1, 100):
                counts = rng.multinomial(pairs, rng.dirichlet([concentration] * experts))
                assert sum(math.ceil(count / rows) for count in counts) <= blocks


# Qwen3-30B-A3B's experts at a tenth of its widths.
WIDE = dataclasses.replace(CONFIG, d_model=200, d_mlp=80, n_experts=128, experts_per_token=8)
WORK = [(8, 256, (4, 2, 1)), (8, 16, (1, 1, 1)), (8, 1, (1, 1, 8))]
WORK += [pytest.param(8, 256, axes, marks=pytest.mark.slow) for axes in ((1, 1, 1), (1, 1, 8))]


@pytest.mark.parametrize("prompts, length, axes", WORK)
def test_work_in_the_compiled_program(prompts, length, axes):
    """Of a device: at most 1.3 times its share of the chosen experts' products; and one sum over ``model``."""
    mesh, devices = mesh_of(*axes), math.prod(axes)
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=fitting_sharding(mesh, shape, *spec))
        for name, (shape, spec) in parameter_table(WIDE).items()
    }
    shape = (prompts, length, WIDE.d_model)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=fitting_sharding(mesh, shape, BY_DOCUMENT, None, None))
    layer = jax.ShapeDtypeStruct((), jnp.int32, sharding=fitting_sharding(mesh, ()))
    program = jax.jit(mix_experts, static_argnums=(0, 1)).lower(WIDE, GRADIENT, params, layer, x).compile().as_text()
    count = prompts * length
    router = 2 * count * WIDE.d_model * WIDE.n_experts / (devices if axes[2] == 1 else 1)
    active = 6 * count * WIDE.experts_per_token * WIDE.d_model * WIDE.d_mlp / devices
    ratio = (product_flops(program) - router) / active
    print(prompts, length, axes, round(ratio, 3))
    assert 1 <= ratio <= 1.3
    summed = 2 * 4 * count * WIDE.d_model * 7 / 8 if axes[2] == 8 else 0
    assert sum(sent_bytes(program, devices, devices).values()) == summed


def test_passes_count_the_chosen_experts():
    dense = dataclasses.replace(WIDE, n_experts=0, d_mlp=WIDE.d_mlp * WIDE.experts_per_token)
    router = 2.0 * 10 * 2 * WIDE.d_model * WIDE.n_experts
    assert pass_flops(WIDE, 10, 10, 2) == pass_flops(dense, 10, 10, 2) + router
