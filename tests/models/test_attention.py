"""Attention in blocks of queries against its formula in fp64, whole and with a cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.models import attention, decoder
from saejax.models.attention import whole_prompt_tables
from saejax.models.config import GRADIENT, DecoderConfig, RunRules
from saejax.models.decoding import init_cache
from saejax.models.parameters import parameter_table

SIZES = dict(n_layers=1, d_model=24, n_heads=6, n_kv_heads=2, d_head=8, d_mlp=8, vocab=8, context=512)
REST = dict(tied=True, norm="rms", norm_eps=1e-6, activation="silu", gated=True)
CONFIG = DecoderConfig(family="llama", **SIZES, **REST, score_scale=0.3)


def capped_local(window):
    return dataclasses.replace(CONFIG, sliding_layers=(True,), sliding_window=window, attn_logit_softcap=2.0)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def formula(config, q_BxTxHxK, k_BxSxNxK, v_BxSxNxK, seen_BxTxS):
    """One query, one head at a time."""
    mixed = np.zeros_like(q_BxTxHxK)
    for b, t, h in np.ndindex(q_BxTxHxK.shape[:3]):
        n = h // (config.n_heads // config.n_kv_heads)
        scores_S = k_BxSxNxK[b, :, n] @ q_BxTxHxK[b, t, h] * config.score_scale
        if config.attn_logit_softcap:
            scores_S = config.attn_logit_softcap * np.tanh(scores_S / config.attn_logit_softcap)
        shares_S = np.where(seen_BxTxS[b, t], np.exp(scores_S), 0)
        mixed[b, t, h] = shares_S / shares_S.sum() @ v_BxSxNxK[b, :, n]
    return mixed


def attended(config, tables, q, k, v):
    arrays = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    # One program: step by step, as many as there are operations in it.
    return jax.jit(lambda *qkv: attention.attend(config, GRADIENT, *qkv, tables.at(config, 0)))(*arrays)


@pytest.fixture
def few_rows(monkeypatch):
    """Every prompt is long, and five rows of queries are computed at a time."""
    for name, value in dict(_LONG=8, _ROW_SCORES=1, _MIN_ROWS=5).items():
        monkeypatch.setattr(attention, name, value)


@pytest.mark.parametrize("config", [CONFIG, capped_local(2), capped_local(50)], ids=["plain", "local 2", "local 50"])
@pytest.mark.parametrize(
    ("length", "by_rows"),
    [
        *((1, False), (128, False), (131, False), (131, True)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((127, False), (8, True), (40, True))),
    ],
)
def test_whole_prompts(request, config, length, by_rows):
    """At once, in blocks and row by row; also where a window ends within the rows."""
    if by_rows:
        request.getfixturevalue("few_rows")
    q, k, v = draw(2, length, 6, 8), draw(2, length, 2, 8, seed=1), draw(2, length, 2, 8, seed=2)
    age_TxT = np.arange(length)[:, None] - np.arange(length)
    seen_TxT = (age_TxT >= 0) & (age_TxT < (config.sliding_window or length))
    found = attended(config, whole_prompt_tables(config, length), q, k, v)
    expected = formula(config, q, k, v, np.broadcast_to(seen_TxT, (2, length, length)))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("new", "slots"), [(130, 130), (1, 130), (1, 20)])
def test_left_padded_prompts_with_a_cache(new, slots):
    """At first the cache is as long as the prompts; afterwards the new token meets all that went before."""
    pad_B = np.array([0, 13])
    cache = init_cache(CONFIG, 2, slots, jnp.float32, pad_B)
    cache = dataclasses.replace(cache, length=jnp.int32(slots - new))
    q, k, v = draw(2, new, 6, 8), draw(2, slots, 2, 8, seed=1), draw(2, slots, 2, 8, seed=2)
    found = attended(CONFIG, cache.attention(CONFIG, new).tables, q, k, v)
    age_TxS = np.arange(slots - new, slots)[:, None] - np.arange(slots)
    seen_BxTxS = (age_TxS >= 0) & (np.arange(slots) >= pad_B[:, None])[:, None] | (age_TxS == 0)
    expected = formula(CONFIG, q, k, v, seen_BxTxS)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


RULES = dict(gradient=GRADIENT, relp=RunRules(backward="relp"), first=RunRules(first_fixes=True))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(("config", "length", "limit"), [(capped_local(9), 37, "_LONG"), (CONFIG, 130, "_BLOCKS_FROM")])
def test_values_and_gradients_in_parts_equal_those_of_larger_ones(monkeypatch, request, rules, config, length, limit):
    """Row by row and in blocks, and in blocks and at once."""
    if limit == "_LONG":
        request.getfixturevalue("few_rows")
    with jax.enable_x64(True):
        arrays = [jnp.asarray(draw(2, length, heads, 8, seed=heads)) for heads in (6, 2, 2)]
        weight = draw(2, length, 6, 8, seed=3)
        tables = whole_prompt_tables(config, length).at(config, 0)

        def found():
            def loss(*qkv):
                return jnp.sum(weight * attention.attend(config, RULES[rules], *qkv, tables))

            return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arrays)

        parts = found()
        monkeypatch.setattr(attention, limit, 10_000)
        for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(found()), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_of_long_prompts_grows_with_tokens_and_not_with_their_square(gradient):
    def temporaries(length):
        def loss(*qkv):
            return attention.attend(CONFIG, GRADIENT, *qkv, whole_prompt_tables(CONFIG, length).at(CONFIG, 0)).sum()

        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2)) if gradient else loss)
        shapes = (jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32) for heads in (6, 2, 2))
        return program.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert max(temporaries(4096), temporaries(4095)) < 6 * 4096**2 * 4 / 8  # of the bytes of all scores


@pytest.mark.parametrize("left_padded", [False, True])
def test_no_array_of_all_pairs_of_tokens_is_kept_for_long_prompts(left_padded):
    """Layers with and without windows, in a loop; prompts as such, and those that fill a cache."""
    length, layers = 32_768, dict(n_layers=4, sliding_layers=(True, False) * 2, sliding_window=512)
    config = dataclasses.replace(CONFIG, **layers, context=length)

    def run(params, ids_BxT, pad_B):
        if left_padded:
            cache = init_cache(config, 1, length, jnp.float32, pad_B)
            spec, x_BxTxD = cache.attention(config, length), decoder.embed(config, params, ids_BxT)
            return decoder.run_layers(config, params, x_BxTxD, 0, 4, attention=spec).x
        return decoder.run_layers(config, params, decoder.embed(config, params, ids_BxT), 0, 4).x

    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, (shape, _) in parameter_table(config).items()}
    batch = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, length), (1,)))
    memory = jax.jit(run).lower(params, *batch).compile().memory_analysis()
    print(f"{memory.temp_size_in_bytes / 1e6:.0f} MB")
    assert memory.temp_size_in_bytes < length**2 / 4  # a quarter of a boolean for each pair
