"""Dead features start again at tokens of high loss, with fresh moments; nothing else changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_stacks import B, F, batches, make_stack, parts, step

from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.training.resampling import draw_tokens, is_due, resample
from saejax.training.state import init_state, state_shardings
from saejax.training.step import member_residual

DEAD = [3, 10, 40]
PER_FEATURE = dict(W_enc_DxF=1, W_dec_FxD=0, b_enc_F=0, threshold_F=0, r_mag_F=0, b_mag_F=0)


def step_with_dead(kind, data, scale=1.0, like=None, **changes):
    """The state after steps from one in which the features ``DEAD`` have been silent for long."""
    stack = make_stack(kind, scale=scale, dead_tokens=10**6, decay=0.0, **changes)
    state = init_state(stack)
    state = dataclasses.replace(state, silent_MxF=state.silent_MxF.at[:, DEAD].set(10**7))
    moments = jax.tree.map(lambda leaf: leaf + 1 if leaf.ndim > 1 else leaf, state.optimizer)  # none is 0
    state = dataclasses.replace(state, optimizer=moments)
    state.params["b_enc_F"] = state.params["b_enc_F"].at[:, DEAD].set(-1e6)
    for batch in data:
        state, _ = step(stack, jax.device_put(state, state_shardings(stack)), parts(stack, batch), like)
    return state


def of_features(name, array, features):
    return np.take(np.asarray(array), features, axis=PER_FEATURE[name])


@pytest.mark.parametrize("kind", ["gated", pytest.param("jumprelu", marks=pytest.mark.slow), "batchtopk"])
def test_what_dead_features_become_and_that_the_living_stay(kind):
    (batch,) = batches(1)
    plain, state = (step_with_dead(kind, [batch], resample_every=every) for every in (0, 1))
    living = np.setdiff1d(np.arange(F), DEAD)
    for name, array in state.params.items():
        if name in PER_FEATURE:
            ours, theirs = (of_features(name, one, living) for one in (array[0], plain.params[name][0]))
        else:
            ours, theirs = np.asarray(array), np.asarray(plain.params[name])
        # Two programs; a step moves parameters by up to 3e-3, and what comes to life by much more.
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * max(np.abs(theirs).max(), 1), err_msg=name)
    W_enc, W_dec = (np.asarray(state.params[name][0], np.float64) for name in ("W_enc_DxF", "W_dec_FxD"))
    offsets = batch - np.asarray(state.params["b_dec_D"][0])
    directions = offsets / np.linalg.norm(offsets, axis=1, keepdims=True)
    assert np.abs(W_dec[DEAD][:, None] - directions).max(-1).min(1).max() < 1e-6, "each is a token's direction"
    length = 0.2 * np.linalg.norm(W_enc[:, living], axis=0).mean()
    np.testing.assert_allclose(W_enc[:, DEAD].T, length * W_dec[DEAD], rtol=1e-5, atol=1e-7)
    assert not np.asarray(state.params["b_enc_F"])[0, DEAD].any() and not np.asarray(state.silent_MxF)[0, DEAD].any()
    moments = {
        (path[-2].name, path[-1].key): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer)
        if getattr(path[-1], "key", None) in PER_FEATURE
    }
    assert {moment for moment, _ in moments} == {"mu", "nu"}
    for (_, name), leaf in moments.items():
        assert not of_features(name, leaf[0], DEAD).any()
        assert of_features(name, leaf[0], living).all()


def test_tokens_of_high_loss_are_drawn_none_twice():
    """One token is far from all others: nearly all of the squared loss is its own."""
    (batch,) = batches(1)
    batch[7] *= 300
    state = step_with_dead("standard", [batch], resample_every=1)
    offset = batch[7] - np.asarray(state.params["b_dec_D"][0])
    rows = np.asarray(state.params["W_dec_FxD"][0])[DEAD]
    cosines = np.sort(rows @ (offset / np.linalg.norm(offset)))
    assert abs(cosines[-1] - 1) < 1e-6 and cosines[-2] < 0.99


def test_where_more_are_dead_than_there_are_tokens_some_wait():
    (batch,) = batches(1)
    batch[5:] = batch[:1]  # five directions, the rest is at the decoder's bias
    stack = make_stack("standard", dead_tokens=1, decay=0.0, resample_every=1)
    hyper = jax.tree.map(lambda leaf: leaf[0], stack.hyperparams)
    losses = np.where(np.arange(B) < 5, 1.0, 0.0)
    dead = np.arange(F) % 2 == 0
    drawn, tokens = draw_tokens(hyper, 3, jnp.asarray(losses), jnp.asarray(dead))
    assert np.flatnonzero(drawn).tolist() == np.flatnonzero(dead)[:5].tolist()
    assert sorted(np.asarray(tokens)[np.asarray(drawn)]) == [0, 1, 2, 3, 4]


def test_rows_of_a_crosscoder_have_a_summed_length_of_1():
    (batch,) = batches(1)
    stack = make_stack("standard", dead_tokens=1, decay=0.0, resample_every=1)
    site, widths = "resid_post.0+resid_post.1", (3, batch.shape[1] - 3)
    joined = dataclasses.replace(stack, dictionary=dataclasses.replace(stack.dictionary, site=site, widths=widths))
    state, hyper = (jax.tree.map(lambda leaf: leaf[0], tree) for tree in (init_state(stack), stack.hyperparams))
    state = dataclasses.replace(state, silent_MxF=state.silent_MxF.at[jnp.array(DEAD)].set(10**7))
    rows = resample(joined, state, hyper, *[jnp.asarray(batch)] * 3).params["W_dec_FxD"]
    parts_of_rows = np.split(np.asarray(rows)[DEAD], [3], axis=1)
    np.testing.assert_allclose(sum(np.linalg.norm(part, axis=1) for part in parts_of_rows), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "form", "source"),
    [
        ("jumprelu", "sae", "errors"),
        pytest.param("batchtopk", "sae", "errors", marks=pytest.mark.slow),
        ("standard", "skip_transcoder", "errors"),
        ("standard", "skip_transcoder", "inputs"),  # of a transcoder the targets
    ],
)
def test_rows_are_directions_of_targets_or_errors_and_columns_of_inputs(kind, form, source):
    (x,) = batches(1)
    changes = dict(form=form, sites=("resid_post.1",) if form == "sae" else ("mlp_in.1",))
    state = step_with_dead(kind, [x], resample_every=1, resample_from=source, **changes)
    before = {name: array[0] for name, array in step_with_dead(kind, [x], **changes).params.items()}
    stack = make_stack(kind, dead_tokens=10**6, decay=0.0, **changes)
    y = x if form == "sae" else x[:, ::-1]
    written = y - np.asarray(before["b_dec_D"])
    if source == "errors":
        hyper = jax.tree.map(lambda leaf: leaf[0], stack.hyperparams)
        written = np.asarray(member_residual(stack, before, jnp.asarray(x), jnp.asarray(y), hyper))
    W_enc, W_dec = (np.asarray(state.params[name][0]) for name in ("W_enc_DxF", "W_dec_FxD"))
    length = np.linalg.norm(np.delete(W_enc, DEAD, axis=1), axis=0).mean()
    for row, column in zip(W_dec[DEAD], W_enc[:, DEAD].T, strict=True):
        token = np.argmax(written @ row / np.linalg.norm(written, axis=1))
        near = 1e-5 if source == "errors" else 1e-6
        np.testing.assert_allclose(row, written[token] / np.linalg.norm(written[token]), atol=near)
        read = row if form == "sae" else x[token] / np.linalg.norm(x[token])
        if form == "sae" or source == "errors":
            np.testing.assert_allclose(column, length * read, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(column / np.linalg.norm(column), read, atol=1e-6)


@pytest.mark.parametrize("decay", [0.2, 0.0])
def test_when_it_is_due(decay):
    stack = make_stack(resample_every=10, decay=decay)
    assert [step for step in range(1, 51) if is_due(stack, step)] == [10, 20, 30, 40], "never the last"


def test_members_draw_as_they_would_alone_and_on_a_mesh():
    data = batches(2)
    mesh = make_mesh(MeshConfig(member=2, data=2, model=2))
    first = make_stack("topk", scale=1.0, dead_tokens=10**6, decay=0.0, resample_every=1, seed=(1,))
    alone = [step_with_dead("topk", data, like=first, resample_every=1, seed=(seed,)) for seed in (1, 2)]
    stack = step_with_dead("topk", data, resample_every=1, seed=(1, 2), mesh=mesh)
    for index in (0, 1):
        for name, array in alone[index].params.items():
            np.testing.assert_allclose(stack.params[name][index], array[0], rtol=2e-5, atol=2e-6, err_msg=name)
