"""The training step: formulas, constraints, the input scale, and agreement over meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.dictionaries import DictionaryConfig
from saejax.parallel import make_mesh
from saejax.settings import MeshConfig, TrainConfig
from saejax.training import schedules
from saejax.training.step import Trainer

D, F, B, STEPS = 16, 64, 32, 50


def make_trainer(kind="topk", mesh=None, scale=0.5, **changes) -> Trainer:
    config = TrainConfig(batch=B, k=4, learning_rate=3e-3, l1=0.05, **changes)
    dictionary = DictionaryConfig(kind=kind, site="resid_post.1", d_in=D, n_features=F, k=4 if kind == "topk" else 0)
    mesh = mesh or make_mesh(MeshConfig(data=8))
    return Trainer(config, dictionary, mesh, STEPS, scale, np.full(D, 0.7))


def batches(count=STEPS) -> np.ndarray:
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(40, D))
    codes = rng.exponential(size=(count, B, 40)) * (rng.random((count, B, 40)) < 0.1)
    return (codes @ directions + 0.7).astype(np.float32)


def run(trainer: Trainer, data: np.ndarray):
    state = trainer.initial_state()
    for batch in data:
        state, metrics = trainer.step(state, jax.device_put(batch, trainer.batch_sharding))
        jax.block_until_ready(metrics)  # eight devices on two cores must not queue up steps
    return state, metrics


@pytest.mark.parametrize("kind", ["topk", "standard"])
def test_loss_falls_and_decoder_rows_keep_unit_norm(kind):
    trainer = make_trainer(kind)
    data = batches()
    _, first = run(trainer, data[:1])
    state, last = run(trainer, data)
    assert last["loss"] < 0.5 * first["loss"]
    np.testing.assert_allclose(np.linalg.norm(state.params["W_dec_FxD"][...], axis=1), 1, rtol=1e-6)
    assert int(state.step) == STEPS


def test_the_first_step_is_adam_on_the_projected_gradient():
    trainer = make_trainer("standard", warmup=0.0, decay=0.0)
    before = trainer.initial_state()
    old = {
        name: np.asarray(before.params[name][...], np.float64)
        for name in ("W_enc_DxF", "b_enc_F", "W_dec_FxD", "b_dec_D")
    }
    x = batches(1)[0]
    after, metrics = trainer.step(before, jax.device_put(x, trainer.batch_sharding))
    x = x.astype(np.float64) * 0.5
    pre = (x - old["b_dec_D"]) @ old["W_enc_DxF"] + old["b_enc_F"]
    f = np.maximum(pre, 0)
    error = f @ old["W_dec_FxD"] + old["b_dec_D"] - x
    mse, penalty = np.square(error).sum(1).mean(), 0.05 * f.sum(1).mean()
    np.testing.assert_allclose([metrics["mse"], metrics["sparsity"]], [mse, penalty], rtol=1e-5)
    np.testing.assert_allclose(
        metrics["explained_variance"], 1 - np.square(error).sum() / np.square(x - x.mean(0)).sum(), rtol=1e-4
    )
    back = (2 / B) * error @ old["W_dec_FxD"].T + 0.05 / B
    back = np.where(pre > 0, back, 0)
    gradients = dict(
        W_enc_DxF=(x - old["b_dec_D"]).T @ back,
        b_enc_F=back.sum(0),
        W_dec_FxD=(2 / B) * f.T @ error,  # the penalty's part points along the rows and is projected out
        b_dec_D=(2 / B) * error.sum(0) - (back @ old["W_enc_DxF"].T).sum(0),
    )
    along = (gradients["W_dec_FxD"] * old["W_dec_FxD"]).sum(1, keepdims=True)
    gradients["W_dec_FxD"] -= along * old["W_dec_FxD"]
    clip = max(1.0, np.sqrt(sum(np.square(g).sum() for g in gradients.values())))
    for name, gradient in gradients.items():
        moved = old[name] - 3e-3 * (gradient / clip) / (np.abs(gradient / clip) + 1e-8)
        if name == "W_dec_FxD":
            moved /= np.linalg.norm(moved, axis=1, keepdims=True)
        sure = np.abs(gradient / clip) > 1e-6  # Adam's first step is the sign: near 0 it says nothing
        np.testing.assert_allclose(np.asarray(after.params[name][...])[sure], moved[sure], rtol=1e-4, atol=1e-6)


def test_silent_features_are_counted_in_tokens():
    trainer = make_trainer("topk")
    state, _ = run(trainer, batches(3))
    silent = np.asarray(state.silent_F)
    assert set(np.unique(silent)) <= {0, B, 2 * B, 3 * B}
    assert (silent == 3 * B).any() and (silent == 0).any()


def test_weight_decay_shrinks_the_encoder_and_nothing_else():
    data = batches(1)
    plain, decayed = (make_trainer(warmup=0.0, decay=0.0, weight_decay=value) for value in (0.0, 0.5))
    before = np.asarray(plain.initial_state().params["W_enc_DxF"][...])
    (one, _), (other, _) = (run(trainer, data) for trainer in (plain, decayed))
    for name in ("b_enc_F", "W_dec_FxD", "b_dec_D"):
        np.testing.assert_array_equal(one.params[name][...], other.params[name][...])
    difference = np.asarray(one.params["W_enc_DxF"][...]) - np.asarray(other.params["W_enc_DxF"][...])
    np.testing.assert_allclose(difference, 3e-3 * 0.5 * before, atol=1e-7)


@pytest.mark.parametrize("kind", ["topk", "standard"])
def test_the_finished_dictionary_takes_raw_activations(kind):
    trainer = make_trainer(kind, scale=0.25)
    state, _ = run(trainer, batches(10))
    x = batches(1)[0]
    from flax import nnx

    scaled = nnx.merge(trainer._graph, state.params)
    expected_f, expected_x = np.asarray(scaled.encode(x * 0.25)) / 0.25, np.asarray(scaled(x * 0.25)) / 0.25
    trainer.finish(state)  # must leave the state as it is
    finished = trainer.finish(state)
    np.testing.assert_allclose(finished.encode(x), expected_f, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(finished(x), expected_x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["topk", "standard"])
@pytest.mark.parametrize("shape", [(4, 2), (8, 1)])
def test_meshes_agree_after_fifty_steps(kind, shape, one_device):
    mesh = make_mesh(MeshConfig(data=shape[0], model=shape[1]))
    single = single_run(kind, one_device, "float32")
    split, _ = run(make_trainer(kind, mesh), batches())
    assert split.params["W_enc_DxF"][...].sharding.shard_shape((D, F)) == (D, F // shape[1])
    assert_close(single, split, 1e-4)
    with jax.enable_x64(True):
        single = single_run(kind, one_device, "float64")
        split, _ = run(make_trainer(kind, mesh, state_dtype="float64"), batches())
        assert single.params["W_enc_DxF"][...].dtype == jnp.float64
        assert_close(single, split, 1e-9)


@functools.cache
def single_run(kind, one_device, dtype):
    return run(make_trainer(kind, one_device, state_dtype=dtype), batches())[0]


def assert_close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params)):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(x)


def test_schedules():
    config = dataclasses.replace(TrainConfig(), learning_rate=2.0, warmup=0.1, decay=0.2, l1=3.0)
    rate, l1 = schedules.learning_rate(config, 100), schedules.l1_coefficient(config, 100)
    np.testing.assert_allclose(
        [rate(s) for s in (0, 4, 9, 50, 80, 90, 99)], [0.2, 1.0, 2.0, 2.0, 2.0, 1.0, 0.1], rtol=1e-6
    )
    np.testing.assert_allclose([l1(s) for s in (0, 4, 9, 99)], [0.3, 1.5, 3.0, 3.0], rtol=1e-6)
    flat = dataclasses.replace(config, warmup=0.0, decay=0.0)
    np.testing.assert_allclose([schedules.learning_rate(flat, 5)(s) for s in range(5)], 2.0)
