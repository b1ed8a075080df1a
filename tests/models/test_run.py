"""The one way to run layers: however it is asked for, it computes the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loaded_models import load
from tiny_models import save_tiny

from saejax.models import decoder
from saejax.models.decoder import KEYS, VALUES, run_layers
from saejax.models.layers import Taps
from saejax.models.sites import KINDS, Site
from saejax.models.split import SplitPoint

LAYERS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Configuration and parameters of a model with local layers, and a stream [2, 9, D] that enters it."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder, "gemma3_text")
    config, params = load(folder)
    return config, params, jax.random.normal(jax.random.key(0), (2, 9, config.d_model))


def compiled(config, params, x_BxTxD, *args, **options):
    """``run_layers`` as one program: else each of its operations would be one."""
    return jax.jit(lambda params, x_BxTxD: run_layers(config, params, x_BxTxD, *args, **options))(params, x_BxTxD)


def test_a_start_known_when_the_program_runs(model):
    config, params, x_BxTxD = model
    run = jax.jit(lambda start: run_layers(config, params, x_BxTxD, start, LAYERS).x)
    for start in (0, LAYERS - 1, LAYERS):
        np.testing.assert_allclose(run(jnp.int32(start)), compiled(config, params, x_BxTxD, start, LAYERS).x, atol=1e-5)


def test_a_hook_of_all_layers_in_the_loop_or_unrolled(model):
    """It changes a site of two layers; values are collected after the change."""
    config, params, x_BxTxD = model

    def hook(kind, layer, value_BxTxD):
        added = jnp.where((layer == 1) | (layer == 3), 0.5, 0.0)
        return value_BxTxD + added if kind == "attn_out" else value_BxTxD

    taps = functools.partial(Taps, hook, collect=("attn_out", KEYS, VALUES))
    run = functools.partial(compiled, config, params, x_BxTxD, 0, LAYERS)
    looped, plain = run(taps(None)), run(Taps(collect=("attn_out",)))
    for layers in (range(LAYERS), {1, 3}):
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), run(taps(layers)), looped)
    change_L = (looped.collected["attn_out"] - plain.collected["attn_out"])[:2].mean(axis=(1, 2, 3))
    np.testing.assert_allclose(change_L, [0, 0.5], atol=1e-5)
    assert np.abs(looped.x - plain.x).max() > 0.1
    seen = []  # by a hook of some layers: their sites in order
    keep = lambda *place: seen.append(place[:2]) or place[2]  # noqa: E731
    jax.eval_shape(lambda x_BxTxD: run_layers(config, params, x_BxTxD, 0, LAYERS, Taps(keep, (2, 0, 9))), x_BxTxD)
    assert seen == [(kind, layer) for layer in (0, 2) for kind in KINDS]


def test_a_run_of_no_layers(model):
    config, params, x_BxTxD = model
    run = compiled(config, params, x_BxTxD, LAYERS, LAYERS, Taps(collect=("mlp_out", KEYS)))
    np.testing.assert_array_equal(run.x, x_BxTxD)
    assert run.collected["mlp_out"].shape == (0, *x_BxTxD.shape)
    assert run.collected[KEYS].shape == (0, 2, 9, config.n_kv_heads, config.d_head)


@pytest.mark.parametrize(
    ("site", "reads"), [("resid_post.1", "resid_post.1"), ("mlp_out.2", "mlp_in.2"), ("resid_post.3", "resid_mid.1")]
)
def test_the_two_halves_of_a_split_decoder_are_the_whole(model, one_device, site, reads):
    config, params, _ = model
    ids_BxT = np.random.default_rng(0).integers(0, config.vocab, (2, 9))
    point = SplitPoint(config, Site.parse(site), Site.parse(reads), one_device)
    run_suffix = jax.jit(point.run_suffix)
    stream_BxTxD, value_BxTxD, read_BxTxD = jax.jit(point.run_prefix)(params, ids_BxT)
    x_BxTxD, kinds = decoder.embed(config, params, ids_BxT), (point.site.kind, point.reads.kind)
    whole = compiled(config, params, x_BxTxD, 0, LAYERS, Taps(collect=kinds))
    np.testing.assert_allclose(value_BxTxD, whole.collected[point.site.kind][point.site.layer], atol=1e-4)
    np.testing.assert_allclose(read_BxTxD, whole.collected[point.reads.kind][point.reads.layer], atol=1e-4)
    np.testing.assert_allclose(run_suffix(params, stream_BxTxD, value_BxTxD), whole.x, atol=1e-4)
    changed_BxTxD = run_suffix(params, stream_BxTxD, value_BxTxD + 1)
    assert np.abs(changed_BxTxD - whole.x).max() > 0.1
