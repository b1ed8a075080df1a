"""Latent scaling: against its formula in float64, and on features whose presence in each model is known."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.collectives import product_flops
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.evaluation import latent_scaling, parts
from saejax.evaluation.latent_scaling import LatentScaling, scale_latents
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig

WIDTH, TOKENS = 8, 4000
SITE = "resid_post.1+other:resid_post.1"


def crosscoder(encoder_DxF: np.ndarray, decoder_FxD: np.ndarray, widths=(WIDTH, WIDTH), site=SITE) -> Dictionary:
    """Return a ReLU crosscoder without biases."""
    d, features = encoder_DxF.shape
    scales = (1.0,) * len(widths)
    config = DictionaryConfig("standard", site, d_in=d, n_features=features, widths=widths, scales=scales)
    arrays = dict(W_enc_DxF=encoder_DxF, W_dec_FxD=decoder_FxD, b_enc_F=np.zeros(features), b_dec_D=np.zeros(d))
    return Dictionary(config, **{name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()})


def plain_scaling(x_NxD, f_NxF, decoder_FxD, own: int, feature: int) -> tuple[float, float]:
    """Return both ratios of a feature that is private to one of two parts, as the module's text gives them."""
    ratios = []
    for is_error in (True, False):
        betas = []
        for part in (1 - own, own):
            here = slice(part * WIDTH, (part + 1) * WIDTH)
            y_NxD = f_NxF @ decoder_FxD[:, here]
            if is_error:
                without_NxF = f_NxF.copy()
                without_NxF[:, feature] = 0
                y_NxD = x_NxD[:, here] - without_NxF @ decoder_FxD[:, here]
            d_D = decoder_FxD[feature, own * WIDTH : (own + 1) * WIDTH]
            f_N = f_NxF[:, feature]
            (beta,), *_ = np.linalg.lstsq(np.outer(f_N, d_D).reshape(-1, 1), y_NxD.ravel(), rcond=None)
            betas.append(beta)
        ratios.append(betas[0] / betas[1] if betas[1] > 0 else np.nan)
    return tuple(ratios)


def blocks_of(x_NxD: np.ndarray):
    return lambda: ([part] for part in np.array_split(x_NxD.astype(np.float32), 3))


def test_it_is_the_least_squares_scale_in_float64():
    rng = np.random.default_rng(0)
    encoder_DxF, decoder_FxD = rng.normal(size=(2 * WIDTH, 12)), rng.normal(size=(12, 2 * WIDTH))
    x_NxD = rng.normal(size=(TOKENS, 2 * WIDTH))
    part_F = np.array([0, 1, -1] * 4)
    found = scale_latents(crosscoder(encoder_DxF, decoder_FxD), part_F, blocks_of(x_NxD))
    f_NxF = np.maximum(x_NxD @ encoder_DxF, 0)
    none = np.nan, np.nan
    wanted = [
        plain_scaling(x_NxD, f_NxF, decoder_FxD, part, feature) if part >= 0 else none
        for feature, part in enumerate(part_F)
    ]
    np.testing.assert_allclose(np.stack(found, axis=1), wanted, rtol=1e-4, atol=1e-5)
    assert np.isfinite(found.error_F).sum() >= 4 and np.isfinite(found.reconstruction_F).sum() >= 4


# The tuned model's concepts: the base has the first not at all, the second at 0.4 where the crosscoder writes nothing
# there (complete shrinkage), the third wholly, by a feature of its own (latent decoupling).
EYE = np.eye(WIDTH)
ENCODER = np.zeros((2 * WIDTH, 4))
ENCODER[WIDTH:, :3], ENCODER[:WIDTH, 3] = EYE[:, :3], EYE[:, 2]
DECODER = np.zeros((4, 2 * WIDTH))
DECODER[:3, WIDTH:], DECODER[3, :WIDTH] = EYE[:3], EYE[2]


def planted_values(firing: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(1)
    truth_Nx3 = rng.exponential(size=(TOKENS, 3)) * (rng.random((TOKENS, 3)) < firing)
    tuned_NxD = truth_Nx3 @ EYE[:3]
    base_NxD = truth_Nx3 * [0, 0.4, 1] @ EYE[:3]
    return np.concatenate([base_NxD, tuned_NxD], axis=1)


@pytest.mark.parametrize("firing", [0.1, 1.0])
def test_shrunk_and_decoupled_features_are_told_from_specific_ones(firing):
    found = scale_latents(crosscoder(ENCODER, DECODER), np.array([1, 1, 1, 0]), blocks_of(planted_values(firing)))
    np.testing.assert_allclose(found.error_F, [0, 0.4, 0, 0], atol=1e-5)
    np.testing.assert_allclose(found.reconstruction_F, [0, 0, 1, 1], atol=1e-5)
    assert found.is_specific().tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    "axes",
    [
        dict(data=2, model=4),
        *(pytest.param(axes, marks=pytest.mark.slow) for axes in (dict(data=8), dict(member=4, data=2))),
    ],
)
def test_eight_devices_give_the_ratios_of_one(axes):
    rng = np.random.default_rng(3)
    encoder_DxF, decoder_FxD = rng.normal(size=(2 * WIDTH, 16)), rng.normal(size=(16, 2 * WIDTH))
    alone, part_F = crosscoder(encoder_DxF, decoder_FxD), np.array([0, 1] * 8)
    blocks = blocks_of(rng.normal(size=(TOKENS, 2 * WIDTH)))  # of numbers of rows that eight does not divide, too
    expected = scale_latents(alone, part_F, blocks)
    spread = scale_latents(alone.on_mesh(make_mesh(MeshConfig(**axes))), part_F, blocks)
    assert np.isfinite(expected.error_F).sum() > 4
    np.testing.assert_allclose(np.stack(spread), np.stack(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("axes", [dict(data=8), dict(data=2, model=4), dict(model=8)])
def test_each_of_eight_devices_does_an_eighth_of_the_work(axes, monkeypatch):
    rng, flops = np.random.default_rng(3), []
    alone = crosscoder(rng.normal(size=(2 * WIDTH, 512)), rng.normal(size=(512, 2 * WIDTH)))
    part_F, x_NxD = np.repeat([0, -1], [64, 448]), rng.normal(size=(1000, 2 * WIDTH)).astype(np.float32)

    def count(module, name):
        program = getattr(module, name)

        def counted(*args):
            flops.append(product_flops(program.lower(*args).compile().as_text()))
            return program(*args)

        monkeypatch.setattr(module, name, counted)

    count(latent_scaling, "_add_up")
    count(parts, "_reconstruction")
    mesh = make_mesh(MeshConfig(**axes))
    for blocks in ([x_NxD], [x_NxD[:333], x_NxD[333:]]):  # eight devices divide the first one's rows alone
        shares = []
        for dictionary in (alone, alone.on_mesh(mesh)):
            flops.clear()
            ratios = scale_latents(dictionary, part_F, lambda blocks=blocks: ([x] for x in blocks))
            variances = parts.part_variances([dictionary], ([x] for x in blocks))
            shares.append((sum(flops[: len(blocks)]), sum(flops[len(blocks) :]), ratios.error_F[:64], *variances))
        (once, again, *figures), (scaled, rebuilt, *others) = shares
        assert scaled <= 1.15 * once / 8 and rebuilt <= 1.15 * again / 8
        for of_one, of_eight in zip(figures, others, strict=True):
            np.testing.assert_allclose(of_eight, of_one, rtol=1e-3, atol=1e-4)


def test_features_that_never_fire_and_parts_of_other_widths_have_no_ratio():
    silent = scale_latents(crosscoder(ENCODER, DECODER), np.array([1, 1, 1, 0]), blocks_of(0 * planted_values()))
    assert np.isnan(silent.error_F).all() and not silent.is_specific().any()
    wide = (WIDTH - 2, WIDTH + 2)
    found = scale_latents(crosscoder(ENCODER, DECODER, wide), np.array([1, 1, 1, 0]), blocks_of(planted_values()))
    assert np.isnan(found.error_F).all() and isinstance(found, LatentScaling)


def test_of_three_parts_the_one_that_has_most_of_it_counts():
    """The other parts have a half and a quarter of the concept, and the crosscoder writes to neither."""
    rng = np.random.default_rng(2)
    truth_N = rng.exponential(size=TOKENS)
    x_NxD = np.concatenate([np.outer(truth_N * share, EYE[0]) for share in (1.0, 0.5, 0.25)], axis=1)
    encoder_Dx1 = np.concatenate([EYE[0], 0 * EYE[0], 0 * EYE[0]])[:, None]
    three = crosscoder(encoder_Dx1, encoder_Dx1.T, (WIDTH,) * 3, "resid_post.0+resid_post.1+resid_post.2")
    found = scale_latents(three, np.array([0]), blocks_of(x_NxD))
    np.testing.assert_allclose([found.error_F[0], found.reconstruction_F[0]], [0.5, 0], atol=1e-5)
