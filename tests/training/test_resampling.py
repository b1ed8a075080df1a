"""Dead features start again at tokens of high loss, with fresh moments; nothing else changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import STEPS, go, resident
from small_runs import make_stack as make_run
from small_stacks import B, D, F, batches, make_stack, parts, step

from saejax.errors import Interrupted
from saejax.parallel.mesh import make_mesh
from saejax.settings import MeshConfig
from saejax.training.resampling import draw_tokens, is_due
from saejax.training.state import init_state, state_shardings
from saejax.training.step import member_residual

DEAD = [3, 10, 40]
PER_FEATURE = dict(W_enc_DxF=1, W_dec_FxD=0, b_enc_F=0, threshold_F=0, r_mag_F=0, b_mag_F=0)


def step_with_dead(kind, data, scale=1.0, steps=1, **changes):
    """The state after steps from one in which the features ``DEAD`` have been silent for long."""
    stack = make_stack(kind, scale=scale, dead_tokens=10**6, decay=0.0, **changes)
    state = init_state(stack)
    state = dataclasses.replace(state, silent_MxF=state.silent_MxF.at[:, DEAD].set(10**7))
    moments = jax.tree.map(lambda leaf: leaf + 1 if leaf.ndim > 1 else leaf, state.optimizer)  # none is 0
    state = dataclasses.replace(state, optimizer=moments)
    state.params["b_enc_F"] = state.params["b_enc_F"].at[:, DEAD].set(-1e6)
    for batch in data[:steps]:
        state, _ = step(stack, jax.device_put(state, state_shardings(stack)), parts(stack, batch))
    return state


def of_features(name, array, features):
    return np.take(np.asarray(array), features, axis=PER_FEATURE[name])


@pytest.mark.parametrize("kind", ["gated", "jumprelu", "batchtopk"])
def test_what_dead_features_become_and_that_the_living_stay(kind):
    (batch,) = batches(1)
    plain, state = (step_with_dead(kind, [batch], resample_every=every) for every in (0, 1))
    living = np.setdiff1d(np.arange(F), DEAD)
    for name, array in state.params.items():
        if name in PER_FEATURE:
            assert np.array_equal(of_features(name, array[0], living), of_features(name, plain.params[name][0], living))
        else:
            assert np.array_equal(array, plain.params[name])
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


@pytest.mark.parametrize("kind", ["jumprelu", "batchtopk"])
def test_rows_may_be_directions_of_errors(kind):
    (batch,) = batches(1)
    state = step_with_dead(kind, [batch], resample_every=1, resample_from="errors")
    stack = make_stack(kind, dead_tokens=10**6, decay=0.0)
    params = {name: array[0] for name, array in step_with_dead(kind, [batch]).params.items()}  # before they start again
    x = jnp.asarray(batch)
    error = np.asarray(member_residual(stack, params, x, x, jax.tree.map(lambda leaf: leaf[0], stack.hyperparams)))
    directions = error / np.linalg.norm(error, axis=1, keepdims=True)
    W_enc, W_dec = (np.asarray(state.params[name][0]) for name in ("W_enc_DxF", "W_dec_FxD"))
    assert np.abs(W_dec[DEAD][:, None] - directions).max(-1).min(1).max() < 1e-5
    living = np.setdiff1d(np.arange(F), DEAD)
    length = np.linalg.norm(W_enc[:, living], axis=0).mean()
    np.testing.assert_allclose(W_enc[:, DEAD].T, length * W_dec[DEAD], rtol=1e-5, atol=1e-6)


def test_a_transcoder_reads_its_inputs_and_writes_its_errors():
    (batch,) = batches(1)
    changes = dict(form="skip_transcoder", sites=("mlp_in.1",), resample_every=1, resample_from="errors")
    state = step_with_dead("standard", [batch], **changes)
    columns = np.asarray(state.params["W_enc_DxF"][0])[:, DEAD].T
    inputs = batch / np.linalg.norm(batch, axis=1, keepdims=True)
    cosines = (columns / np.linalg.norm(columns, axis=1, keepdims=True)) @ inputs.T
    np.testing.assert_allclose(cosines.max(1), 1, atol=1e-6)
    rows = np.asarray(state.params["W_dec_FxD"][0])[DEAD]
    assert np.abs(rows - columns / np.linalg.norm(columns, axis=1, keepdims=True)).max() > 0.1


def test_a_transcoder_takes_the_directions_of_its_targets():
    (batch,) = batches(1)
    changes = dict(form="skip_transcoder", sites=("mlp_in.1",), resample_every=1)
    state = step_with_dead("standard", [batch], **changes)
    x, y = batch, batch[:, ::-1] - np.asarray(state.params["b_dec_D"][0])
    for feature in DEAD:
        row, column = state.params["W_dec_FxD"][0, feature], state.params["W_enc_DxF"][0, :, feature]
        drawn = np.argmax(y @ row / np.linalg.norm(y, axis=1))
        np.testing.assert_allclose(row, y[drawn] / np.linalg.norm(y[drawn]), atol=1e-6)
        np.testing.assert_allclose(column / np.linalg.norm(column), x[drawn] / np.linalg.norm(x[drawn]), atol=1e-6)


def test_when_it_is_due():
    stack = make_stack(resample_every=10, decay=0.2)
    assert [step for step in range(1, 51) if is_due(stack.config, 50, step)] == [10, 20, 30, 40]
    stack = make_stack(resample_every=10, decay=0.0)
    assert [step for step in range(1, 51) if is_due(stack.config, 50, step)] == [10, 20, 30, 40], "never the last"


def test_members_draw_as_they_would_alone_and_on_a_mesh():
    data = batches(2)
    mesh = make_mesh(MeshConfig(member=2, data=2, model=2))
    alone = [step_with_dead("topk", data, steps=2, resample_every=1, seed=(seed,)) for seed in (1, 2)]
    stack = step_with_dead("topk", data, steps=2, resample_every=1, seed=(1, 2), mesh=mesh)
    for index in (0, 1):
        for name, array in alone[index].params.items():
            np.testing.assert_allclose(stack.params[name][index], array[0], rtol=2e-5, atol=2e-6, err_msg=name)


def test_resumed_and_resident_give_the_same_bits(tmp_path):
    changes = dict(dead_tokens=2 * B, k=(1,))
    stack = make_run(resample_every=2, **changes)
    whole = go(tmp_path / "whole", stack)
    with pytest.raises(Interrupted):
        go(tmp_path / "broken", stack, stop_after=3)
    resumed = go(tmp_path / "broken", stack, resident)
    without = go(tmp_path / "without", make_run(**changes))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(whole.params["W_dec_FxD"], without.params["W_dec_FxD"]), "features had died"
    assert D < F and STEPS > 4
