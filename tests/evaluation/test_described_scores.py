"""The figures in ``scores.json`` are those that were measured, and shares are of the right differences."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.evaluation import cross_layer
from saejax.evaluation.latent_scaling import LatentScaling
from saejax.evaluation.loss_recovered import Losses
from saejax.evaluation.reconstruction import Reconstruction
from saejax.evaluation.results import LeftOutSinks, RoleScores
from saejax.stages.evaluate import run as evaluate
from saejax.stages.train import report

CE = dict(clean=2.0, mean_ablated=6.0, zero_ablated=10.0, reconstructed=3.0)
KL = dict(clean=0.0, mean_ablated=5.0, zero_ablated=20.0, reconstructed=1.0)
SHARES = dict(
    ce_recovered_mean=0.75,  # (6 - 3) / (6 - 2)
    ce_recovered_zero=0.875,  # (10 - 3) / (10 - 2)
    kl_recovered_mean=0.8,  # (5 - 1) / (5 - 0)
    kl_recovered_zero=0.95,  # (20 - 1) / (20 - 0)
)
SCORE = Reconstruction(
    tokens=200,
    explained_variance=0.4,
    cosine=0.7,
    l0=0.75,
    firing_rate_F=np.array([0.5, 0.25, 0.0, 0.0]),
    mean_activation_F=np.array([2.0, 4.0, 0.0, 0.0]),
)


def losses() -> Losses:
    return Losses(57, CE, KL)


def test_a_dictionary():
    config = DictionaryConfig(kind="standard", site="resid_post.0", d_in=2, n_features=4)
    rows = jnp.array([[1.0, 0], [0, 0.5], [3, 0], [-1, 0]])
    dictionary = Dictionary(config, W_enc_DxF=rows.T, b_enc_F=jnp.zeros(4), W_dec_FxD=rows, b_dec_D=jnp.zeros(2))
    sinks = LeftOutSinks(position_0=3, beyond=1, share_beyond=0.01, max_norm=9.0)
    where = dict(name="k4", site="resid_post.0", target="resid_post.0", sinks=sinks)
    found = evaluate._describe(dictionary, SCORE, losses(), **where)
    assert {name: getattr(found, name) for name in SHARES} == pytest.approx(SHARES)
    assert (found.tokens, found.explained_variance, found.cosine, found.l0) == (200, 0.4, 0.7, 0.75)
    assert found.dead_fraction == 0.5 and found.dense_fraction == 0.5
    assert (found.ce.clean, found.ce.reconstructed, found.ce.mean_ablated, found.ce.zero_ablated) == (2, 3, 6, 10)
    assert (found.kl.clean, found.kl.reconstructed, found.kl.mean_ablated, found.kl.zero_ablated) == (0, 1, 5, 20)
    assert found.ce.tokens == 57 and found.sinks == sinks
    near = found.decoder_neighbours  # largest cosines 1, 0, 1 and 0
    assert (near.mean, near.median, near.max, near.near, near.looked_at) == (0.5, 0.5, 1.0, 0.5, None)
    assert near.p90 == near.p99 == 1.0
    histogram = found.density_histogram  # log10 of 0.5 and 0.25, from 0.001 on in quarters of a decade
    assert histogram.never == 2 and sum(histogram.counts) == 2 and histogram.log10_edges[0] == -3
    assert [histogram.counts[i] for i in (-2, -3)] == [1, 1]
    assert "cross-entropy 0.750, KL 0.800, on 57" in evaluate._line(found)


def test_the_roles_of_chats_are_rows_of_a_table():
    roles = {role: RoleScores(100 + i, **SCORE.figures()) for i, role in enumerate(("user", "assistant"))}
    member = SimpleNamespace(name="k4", roles=roles)
    (table,) = report._roles_tables({"topk": [member, SimpleNamespace(name="k8", roles=None)]})
    assert table.columns[:3] == ("Dictionary", "Role", "Tokens")
    assert [row[:3] for row in table.rows] == [("topk/k4", "user", "100"), ("topk/k4", "assistant", "101")]
    assert table.rows[0][3:5] == ("0.8", "0.400") and report._roles_tables({"topk": []}) == []


def test_the_parts_of_a_crosscoder():
    relative = np.array([[1.0, 0.95, 0.5, 0.02], [0.0, 0.05, 0.5, 0.98]])  # two features of the first part alone
    crosscoder = SimpleNamespace(site="a.0+a.1", config=SimpleNamespace(widths=(4, 4)))
    live, ratio = np.array([True, True, False, True, True]), np.array([0.1, 0.3, 0.1, np.nan, 0.1])
    made = [0.3, 0.9], {"a.0": losses(), "a.1": losses()}, relative, live, LatentScaling(ratio, ratio)
    parts = evaluate._parts(crosscoder, *made)
    assert [part.private for part in parts.values()] == [2, 1]
    assert [part.specific for part in parts.values()] == [1, 1]
    crosscoder.config.widths = (4, 6)
    assert [part.specific for part in evaluate._parts(crosscoder, *made).values()] == [None, None]
    assert [part.explained_variance for part in parts.values()] == [0.3, 0.9]
    for part in parts.values():
        assert (part.ce_recovered_mean, part.kl_recovered_mean) == pytest.approx((0.75, 0.8))


def test_a_cross_layer_transcoder():
    second_layer = Reconstruction(200, 0.8, 0.9, 1.25, np.array([0.5, 0.5, 0.25, 0.0]), np.ones(4))
    found = cross_layer.describe_layers([SCORE, second_layer], losses())
    assert found.explained_variance == pytest.approx(0.6) and found.l0 == 2.0 and found.dead_fraction == 0.375
    assert (found.ce_recovered_mean, found.kl_recovered_mean) == pytest.approx((0.75, 0.8))
    assert [layer.dense_fraction for layer in found.layers] == [0.5, 0.75]
    assert [(layer.layer, layer.l0, layer.cosine) for layer in found.layers] == [(0, 0.75, 0.7), (1, 1.25, 0.9)]
