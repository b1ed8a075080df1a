"""Lengths of joined rows and relative norms, beside plain formulas in fp64."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.activations.joined import JoinedRows
from saejax.activations.results import SinkCounts
from saejax.dictionaries.joined import row_lengths, row_normals
from saejax.dictionaries.kinds import by_name
from saejax.dictionaries.losses import l1_norm_weighted
from saejax.evaluation.parts import histogram, is_shared, private_part, relative_norms
from saejax.models.sites import Site, decoder_site, is_joined, parse_site, site_parts
from saejax.training.optimizer import apply_constraints, project_out_radial_gradient
from saejax.training.settings import TrainConfig

WIDTHS = (3, 5)


@pytest.mark.parametrize("widths", [WIDTHS, ()])
def test_lengths_are_summed_over_parts_and_normals_are_their_gradient(widths):
    rows_FxD = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    rows_FxD[1, :3], rows_FxD[2] = 0, 0  # a part without a direction has no gradient
    parts = np.split(rows_FxD.astype(np.float64), [3] if widths else [], axis=1)
    norms = [np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
    by_hand_F, rows = sum(norms)[:, 0], jnp.asarray(rows_FxD)
    normals_FxD = np.concatenate([part / np.maximum(norm, 1e-30) for part, norm in zip(parts, norms, strict=True)], 1)
    gradient = jax.grad(lambda rows: row_lengths(rows, widths).sum())(rows)
    np.testing.assert_allclose(row_lengths(rows, widths), by_hand_F, rtol=1e-6)
    np.testing.assert_allclose(gradient, normals_FxD, atol=1e-6)
    np.testing.assert_allclose(row_normals(rows, widths), normals_FxD, atol=1e-6)
    f = np.abs(np.random.default_rng(1).normal(size=(6, 4)))
    weighted = l1_norm_weighted(jnp.asarray(f), row_lengths(rows, widths))
    np.testing.assert_allclose(weighted, (f.mean(0) * by_hand_F).sum(), rtol=1e-6)


def test_a_turned_gradient_leaves_the_length_as_it_is():
    """To first order: finite differences along it do not change any row's summed length."""
    rng, config = np.random.default_rng(2), TrainConfig()
    rows_FxD = jnp.asarray(rng.normal(size=(4, 8)))
    rows_FxD /= row_lengths(rows_FxD, WIDTHS)[:, None]
    params, grads = dict(W_dec_FxD=rows_FxD), dict(W_dec_FxD=jnp.asarray(rng.normal(size=(4, 8))))
    turn = project_out_radial_gradient(WIDTHS)
    turned, _ = turn.update(grads, turn.init(params), params)
    step = 1e-3
    change = row_lengths(rows_FxD + step * turned["W_dec_FxD"], WIDTHS) - 1
    untouched = row_lengths(rows_FxD + step * grads["W_dec_FxD"], WIDTHS) - 1
    assert np.abs(change).max() < 0.05 * np.abs(untouched).max()
    longer = dict(W_dec_FxD=3 * rows_FxD)
    after = apply_constraints(config, by_name("topk"), longer, longer, WIDTHS)
    np.testing.assert_allclose(row_lengths(after["W_dec_FxD"], WIDTHS), 1, rtol=1e-6)


def test_relative_norms():
    norms_PxF = np.array([[1.0, 0.0, 2.0, 0.0, 1.0], [0.0, 2.0, 2.0, 0.0, 0.5]])
    relative_PxF = relative_norms(norms_PxF)
    np.testing.assert_allclose(relative_PxF, [[1, 0, 0.5, 0.5, 0.75], [0, 1, 0.5, 0.5, 0.25]])
    assert private_part(relative_PxF).tolist() == [0, 1, -1, -1, -1]
    assert is_shared(relative_PxF).tolist() == [False, False, True, True, False]
    assert histogram(relative_PxF[0])[-1] == 1 and sum(histogram(relative_PxF[0])) == 5
    three_PxF = relative_norms(np.array([[4.0], [1.0], [0.0]]))
    np.testing.assert_allclose(three_PxF[:, 0], [1 - 0.125, 0.125, 0.0])


def test_names_of_sites():
    assert site_parts("resid_post.1+other:mlp_out.2") == ("resid_post.1", "other:mlp_out.2")
    assert site_parts("module:a+b") == ("module:a+b",) and not is_joined("module:a+b")
    assert str(parse_site("other:mlp_out.2")) == "other:mlp_out.2" and decoder_site("other:mlp_out.2") == Site(
        "mlp_out", 2
    )
    for text in ("resid_post.1+resid_post.2", "other:resid_post.1"):
        with pytest.raises(Exception, match="crosscoder"):
            Site.parse(text)


def test_sinks_of_a_joined_site_are_those_of_the_part_with_most():
    counts = {"resid_post.0": SinkCounts(3, 1, 0.1), "resid_post.1": SinkCounts(3, 5, 0.5)}
    rows = SimpleNamespace(sites=tuple(counts), sinks=counts.__getitem__)
    for site in ("resid_post.0+resid_post.1", "resid_post.1+resid_post.0"):
        assert JoinedRows(rows, [site], {site: (1.0, 1.0)}).sinks(site) == counts["resid_post.1"]
