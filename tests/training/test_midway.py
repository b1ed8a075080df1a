"""Scores and dictionaries of a training that goes on are those of a dictionary that is finished at that step."""

import dataclasses
import re

import jax
import numpy as np
import pytest
import runs
from small_runs import Rows, make_stack, streamed
from small_stacks import B, D, first_device

from saejax import load_model
from saejax.dictionaries.cross_layer import FORM
from saejax.evaluation.loss_recovered import recovered, stand_in_losses
from saejax.evaluation.reconstruction import reconstruct
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.training.cross_layer import finish_layer
from saejax.training.held_out import HeldOutScorer, LossScorer
from saejax.training.scales import HELD_OUT_TOKENS
from saejax.training.state import finish_dictionary, init_state
from saejax.training.thresholds import Calibration

SITES = dict(sites=("resid_post.0", "resid_post.1"))
CLT = dict(form=FORM, sites=("mlp_in.0", "mlp_in.1"), auxk=0.0)


class HeldOut(Rows):
    """Rows of which others are held out; more than one batch, and not whole batches."""

    def held_out(self, count, *sites):
        assert count == HELD_OUT_TOKENS
        values = np.random.default_rng(1).normal(size=(3 * B - 5, D)).astype(np.float32)
        return {
            site: (1 + int(site[-1])) * (values[:, ::-1] if site.startswith("mlp_out") else values) for site in sites
        }


@pytest.mark.parametrize(
    ("kind", "mesh", "changes"),
    [
        pytest.param("batchtopk", None, SITES, marks=pytest.mark.slow),  # as on eight devices
        ("batchtopk", MeshConfig(2, 2, 2), SITES),
        ("linear", None, dict(form="transcoder", sites=("mlp_in.0",))),
        ("gated", None, dict(decoder_norm="free")),
        ("topk", None, dict(k=(2, 6))),
        ("batchtopk", None, CLT),
    ],
    ids=["batchtopk", "eight devices", "transcoder", "free decoder", "sweep", "cross-layer transcoder"],
)
def test_scores_are_those_of_evaluation(kind, mesh, changes):
    stack, rows = make_stack(kind, mesh and make_mesh(mesh), **changes), HeldOut()
    batches = streamed(stack, rows)
    state, rng = init_state(stack), np.random.default_rng(0)
    moved = jax.tree.map(lambda array: array + 0.2 * rng.normal(size=array.shape).astype(np.float32), state.params)
    state = dataclasses.replace(state, params=moved)
    kept_M = Calibration(stack)(state, batches, 4)
    scorer = HeldOutScorer.of(stack, rows)
    if mesh:
        sums = np.zeros(2, np.float32), np.zeros(state.silent_MxF.shape, np.float32)
        programs = [
            Calibration(stack)._run.lower(state.params, stack.hyperparams, [batches.batch(0)[0]]),
            scorer._add.lower(sums, state.params, stack.hyperparams, kept_M, next(scorer._batches())),
        ]
        for program in programs:
            gathered = re.findall(r" = (\S+) all-gather", program.compile().as_text())
            weights = [shape for shape in gathered if shape.split("]")[0].count(",") == 2]
            assert gathered and not weights, "members stay on their devices"
    scores = {name.removeprefix("held_out_"): np.asarray(value_M) for name, value_M in scorer(state, kept_M).items()}
    assert scorer.tokens == 2 * B
    values = {site: rows.held_out(HELD_OUT_TOKENS, site)[site][: 2 * B] for pair in stack.sites for site in pair}
    if stack.is_cross_layer:
        layers, writes = zip(*(finish_layer(stack, state, i, kept_M) for i in range(2)), strict=True)
        writes = [np.asarray(write_FxLxD) for write_FxLxD in writes]
        f_LxNxF = [np.asarray(layer.encode(values[layer.site])) for layer in layers]
        for i, layer in enumerate(layers):
            y_NxD = values[layer.config.target]
            y_hat_NxD = np.asarray(layer.b_dec_D) + sum(f_LxNxF[j] @ writes[j][:, i - j] for j in range(i + 1))
            variance = np.square(y_NxD - y_NxD.mean(0)).sum()
            explained = 1 - np.square(y_NxD - y_hat_NxD).sum() / variance
            assert scores["explained_variance"][i] == pytest.approx(explained, abs=1e-4)
            assert scores["l0"][i] == pytest.approx((f_LxNxF[i] > 0).sum(1).mean(), rel=1e-3)
            assert scores["dead"][i] == np.mean((f_LxNxF[i] > 0).sum(0) == 0)
        return
    for i, member in enumerate(stack.members):
        dictionary = finish_dictionary(stack, state, i, kept_M)
        parts = [values[site] for site in dict.fromkeys((member.site, member.target))]
        (expected,) = reconstruct([dictionary], [parts], first_device())
        assert scores["explained_variance"][i] == pytest.approx(expected.explained_variance, abs=1e-5)
        assert scores["l0"][i] == pytest.approx(expected.l0, rel=1e-3)
        assert scores["dead"][i] == pytest.approx(expected.dead_fraction, abs=1e-3)


def test_without_held_out_tokens_there_are_no_scores():
    rows = Rows()
    rows.held_out = lambda count, *sites: {site: np.zeros((0, D), np.float32) for site in sites}
    assert HeldOutScorer.of(make_stack(), rows) is None


def test_cross_entropy_is_that_of_each_finished_member_alone(tmp_path, one_device):
    lm = load_model(str(runs.save_model(tmp_path, hidden_size=D)), mesh=one_device)
    stack, rng = make_stack(k=(1, 2, 3, 4, 5, 6), **SITES), np.random.default_rng(0)
    state = init_state(stack)
    documents = [rng.integers(1, 1000, size=length).astype(np.int32) for length in (20, 33, 7)]
    (scores_M,) = LossScorer(stack, lm, documents)(state, None).values()
    for i, score in enumerate(scores_M):
        dictionary = finish_dictionary(stack, state, i)
        (losses,) = stand_in_losses(lm, [dictionary], documents, stack.scales[i].bias_D)
        share = recovered(losses.ce, "mean_ablated")
        assert score == pytest.approx(np.nan if share is None else share, abs=1e-5, nan_ok=True)
    assert np.isfinite(scores_M).any() and len(set(scores_M)) > 6
