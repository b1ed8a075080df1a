"""Gradients of every term against finite differences in fp64, or the written formula of a straight-through one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_kind import KINDS
from small_stacks import B, D, F, batches, make_stack

from saejax.dictionaries import Dictionary, losses, sparsity
from saejax.dictionaries.kinds.base import EncodedBatch
from saejax.dictionaries.losses import AuxKForm, auxk, dead_columns
from saejax.dictionaries.matmul import matmul
from saejax.errors import UserError
from saejax.training.optimizer import penalty_schedule
from saejax.training.state import init_state
from saejax.training.step import MemberBatch, member_loss
from saejax.training.widening import alignment

DECODER = ("W_dec_FxD", "b_dec_D")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def setting(kind, form="sae", **changes):
    """A stack in fp64, its member's arrays (moved off their symmetric start), one batch, and hyperparameters."""
    stack = make_stack(kind, None, form=form, sites=("mlp_in.1",), state_dtype="float64", **changes)
    rng = np.random.default_rng(1)
    params = {name: jnp.asarray(array[0]) for name, array in init_state(stack).params.items()}
    params = {name: array + 0.1 * rng.normal(size=array.shape) for name, array in params.items()}
    if "threshold_F" in params:
        params["threshold_F"] = jnp.abs(params["threshold_F"]) + 0.2
    x = jnp.asarray(batches(1)[0], jnp.float64) * 0.5
    y = x if form == "sae" else x[:, ::-1]
    hyper = jax.tree.map(lambda array: jnp.asarray(array[0]), stack.hyperparams)
    return stack, params, x, y, hyper


def loss_of(stack, x, y, hyper, dead=None):
    dead = jnp.zeros(F, bool) if dead is None else dead
    return lambda params: member_loss(stack, params, MemberBatch(x, y, hyper, jnp.int32(1000), dead))[0]


def first_loss(stack, params, x, y, hyper):
    """The loss and the metrics at the first step, without dead features."""
    batch = MemberBatch(x, y, hyper, jnp.int32(0), jnp.zeros(F, bool))
    loss, (metrics, _) = jax.jit(functools.partial(member_loss, stack))(params, batch)
    return loss, metrics


def slope(function, params, direction, step=1e-6):
    def moved(by):
        return jax.tree.map(lambda p, d: p + by * d, params, direction)

    return (function(moved(step)) - function(moved(-step))) / (2 * step)


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *((kind, "sae") for kind in KINDS),
        ("gated", "skip_transcoder"),
        *(pytest.param(kind, "skip_transcoder", marks=pytest.mark.slow) for kind in KINDS if kind != "gated"),
    ],
)
def test_the_loss_falls_as_its_gradient_says(kind, form):
    """Along random directions; thresholds, whose gradients are straight-through, stay where they are here."""
    stack, params, x, y, hyper = setting(kind, form, decorrelation=0.1)
    function = jax.jit(loss_of(stack, x, y, hyper))
    gradient = jax.grad(function)(params)
    rng = np.random.default_rng(2)
    for name in params:
        if name == "threshold_F":
            continue
        direction = {key: jnp.zeros_like(value) for key, value in params.items()}
        direction[name] = jnp.asarray(rng.normal(size=params[name].shape))
        expected = float(jnp.vdot(gradient[name], direction[name]))
        if kind == "gated" and name in (*DECODER, "W_skip_DxD"):  # the gate's own error sees these as constants
            continue
        np.testing.assert_allclose(slope(function, params, direction), expected, rtol=2e-5, atol=1e-7, err_msg=name)


def _member(stack, params):
    return Dictionary(stack.dictionary, **params)


def test_the_gates_own_error_reaches_the_encoder_only():
    stack, params, x, y, _ = setting("gated")

    def gate_error(params):
        member = _member(stack, params)
        pre, none = member.encoder_inputs(x).pre_xF, jnp.zeros(F, bool)
        batch = EncodedBatch(member, x, y, pre, member.encode(x), none, None, {}, None)
        return member.kind.losses(batch)["gate_error"]

    gradient = jax.jit(jax.grad(gate_error))(params)
    centred = np.asarray(x) - np.asarray(params["b_dec_D"])
    pre = centred @ np.asarray(params["W_enc_DxF"]) + np.asarray(params["b_enc_F"])
    error = np.maximum(pre, 0) @ np.asarray(params["W_dec_FxD"]) + np.asarray(params["b_dec_D"]) - np.asarray(y)
    back = np.where(pre > 0, (2 / B) * error @ np.asarray(params["W_dec_FxD"]).T, 0)
    expected = dict(W_enc_DxF=centred.T @ back, b_enc_F=back.sum(0), W_dec_FxD=0, r_mag_F=0, b_mag_F=0)
    # Only by way of the centred input does the decoder's bias matter here.
    expected["b_dec_D"] = -(back @ np.asarray(params["W_enc_DxF"]).T).sum(0)
    for name, array in gradient.items():
        np.testing.assert_allclose(array, np.broadcast_to(expected[name], array.shape), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("penalty", ["step", "target"])
def test_the_l0_penalty_moves_thresholds_only(penalty):
    stack, params, x, y, hyper = setting("jumprelu", l0_penalty=penalty, bandwidth=0.5, target_l0=(8.0,))
    with_penalty = jax.jit(jax.grad(loss_of(stack, x, y, hyper)))(params)
    without, *_ = setting("jumprelu", l0_penalty=penalty, bandwidth=0.5, l0_coefficient=(0.0,), target_l0=(8.0,))
    plain_loss = loss_of(without, x, y, jax.tree.map(lambda a: jnp.asarray(a[0]), without.hyperparams))
    plain = jax.jit(jax.grad(plain_loss))(params)
    for name in params:
        changed = np.abs(with_penalty[name] - plain[name]).max() > 1e-12 * np.abs(plain[name]).max()
        assert changed == (name == "threshold_F"), name
    pre = np.asarray(_member(stack, params).encoder_inputs(x).pre_xF)
    theta = np.asarray(params["threshold_F"])
    per_feature = -(np.abs(pre - theta) < 0.25).sum(0) / 0.5 / B
    l0 = (pre > theta).sum(1).mean()
    factor = 0.01 if penalty == "step" else 0.01 * 2 * (l0 / 8 - 1) / 8
    np.testing.assert_allclose(
        np.asarray(with_penalty["threshold_F"]) - np.asarray(plain["threshold_F"]), factor * per_feature, rtol=1e-8
    )


def test_the_target_is_of_all_features_also_where_groups_of_them_are_nested():
    changes = dict(l0_penalty="target", target_l0=(8.0,), nested=(0.25, 0.5, 1.0))
    stack, params, x, y, hyper = setting("jumprelu", **changes)
    _, metrics = first_loss(stack, params, x, y, hyper)
    weight = float(hyper.kind_params["l0_coefficient"]) * float(penalty_schedule(stack.config, stack.steps)(0))
    np.testing.assert_allclose(metrics["sparsity"], weight * (metrics["l0"] / 8 - 1) ** 2, rtol=1e-6)


@pytest.mark.parametrize("nested", [(), (0.25, 0.5, 1.0)])
def test_the_tanh_penalty_is_its_formula_times_its_coefficient(nested):
    """A feature counts once for every nested group that it is in, as the step penalty counts it."""
    values = []
    for coefficient in (0.0, 0.03):
        changes = dict(l0_penalty="tanh", l0_coefficient=(coefficient,), nested=nested)
        stack, params, x, y, hyper = setting("jumprelu", **changes)
        values.append(float(jax.jit(loss_of(stack, x, y, hyper))(params)))
    f_BxF = np.asarray(_member(stack, params).encode(x))
    norm_F = np.linalg.norm(params["W_dec_FxD"], axis=1)
    weight_F = np.repeat([3, 2, 1], [F // 4, F // 4, F // 2]) if nested else np.ones(F)
    wanted = 0.03 * (np.tanh(4 * f_BxF * norm_F) * weight_F).sum(axis=1).mean()
    assert wanted > 0.01 and values[1] - values[0] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("k", "metric"), [(3, False), (3, True), (8, False)])  # five are dead
def test_auxk_reaches_dead_features_and_no_others(k, metric):
    rng = np.random.default_rng(4)
    pre, W_dec, error = rng.normal(size=(B, F)), rng.normal(size=(F, D)), rng.normal(size=(B, D))
    dead = np.zeros(F, bool)
    dead[[3, 17, 40, 41, 42]] = True

    metric_DxD = rng.normal(size=(D, D)) if metric else np.eye(D)

    def aux(pre, W_dec, error):
        return auxk(pre, jnp.asarray(dead), W_dec, error, AuxKForm(k), jnp.asarray(metric_DxD))

    to_pre, to_W, to_error = jax.grad(aux, argnums=(0, 1, 2))(*map(jnp.asarray, (pre, W_dec, error)))
    assert not np.any(to_error), "the error is a constant"
    assert not np.any(np.asarray(to_pre)[:, ~dead]) and np.any(np.asarray(to_pre)[:, dead])
    assert not np.any(np.asarray(to_W)[~dead]) and np.any(np.asarray(to_W)[dead])
    ranked = np.where(dead, pre, -np.inf)
    kept = (ranked >= np.sort(ranked, axis=1)[:, [-k]]) & (ranked > 0)
    f, share, weight = np.where(kept, pre, 0), min(5 / k, 1), metric_DxD @ metric_DxD.T
    expected = share * np.square((error - f @ W_dec) @ metric_DxD).sum(1).mean()
    np.testing.assert_allclose(aux(*map(jnp.asarray, (pre, W_dec, error))), expected, rtol=1e-12)
    to_output = (2 / B) * share * (f @ W_dec - error) @ weight
    np.testing.assert_allclose(to_W, f.T @ to_output, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(to_pre, np.where(kept, to_output @ W_dec.T, 0), rtol=1e-9, atol=1e-12)


@functools.partial(jax.jit, static_argnums=4)
def auxk_and_slopes(pre_BxF, W_dec_FxD, error_BxD, dead_F, form):
    """AuxK, and its gradients by the first two: one program for all that differ in the features that are dead."""
    return jax.value_and_grad(lambda *of: auxk(of[0], dead_F, of[1], error_BxD, form), (0, 1))(pre_BxF, W_dec_FxD)


@pytest.mark.parametrize("dead", [0, 1, 128, 129, 1024])  # there is room for 128
@pytest.mark.parametrize("k", [1, 20])
def test_auxk_of_few_dead_features_is_that_of_all_columns(dead, k):
    rng, features = np.random.default_rng(dead), 1024
    assert dead_columns(features, k) == 128
    arrays = [jnp.asarray(rng.normal(size=shape)) for shape in ((B, features), (features, D), (B, D))]
    dead_F = jnp.asarray(np.isin(np.arange(features), rng.permutation(features)[:dead]))
    (short, to_short), (whole, to_whole) = (
        auxk_and_slopes(*arrays, dead_F, AuxKForm(k, all_columns=every)) for every in (False, True)
    )
    np.testing.assert_allclose(short, whole, rtol=1e-13)
    assert bool(dead) == bool(whole)
    for a, b in zip(to_short, to_whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-15)
        assert bool(dead) == np.any(b)


def computed_unconditionally(program):
    """Matrix products of a program that stand in no branch."""
    found = [equation for equation in program.eqns if equation.primitive.name == "dot_general"]
    for equation in program.eqns:
        if equation.primitive.name != "cond":
            for part in jax.tree.leaves(list(equation.params.values())):
                found += computed_unconditionally(part.jaxpr) if hasattr(part, "jaxpr") else []
    return found


def test_vectorised_members_compute_auxk_only_if_one_has_a_dead_feature():
    """A condition on each member's own features would become a choice between two values that are both computed."""
    pre, W_dec, error = jnp.ones((2, B, F)), jnp.ones((2, F, D)), jnp.ones((2, B, D))

    def both(dead, most_dead):
        one = functools.partial(auxk, form=AuxKForm(3))
        return jax.vmap(lambda *own: one(*own, most_dead=most_dead))(pre, dead, W_dec, error)

    program = jax.make_jaxpr(both)(jnp.zeros((2, F), bool), jnp.asarray(0)).jaxpr
    assert "dot_general" in str(program) and not computed_unconditionally(program)


def test_explained_variance_of_tokens_that_are_all_alike_is_zero():
    for tokens in (1, 3):
        assert losses.explained_variance(jnp.ones((tokens, D)), jnp.zeros((tokens, D))) == 0
    rng = np.random.default_rng(11)
    row_D = rng.normal(size=D)
    # In float32 the mean of many equal numbers differs from each; and values that are computed differ by rounding.
    for noise in (0.0, 3e-7):
        y = jnp.asarray(row_D * (1 + noise * rng.normal(size=(4096, D))), jnp.float32)
        assert jax.jit(losses.explained_variance)(y, 1e-3 * y) == 0
    y = 1000 + rng.normal(size=(4096, D))  # far from 0, and it varies
    explained = jax.jit(losses.explained_variance)(jnp.asarray(y, jnp.float32), jnp.full((4096, D), 0.5, jnp.float32))
    assert explained == pytest.approx(1 - 0.25 / y.var(axis=0).mean(), abs=1e-3)


def test_decorrelation_is_the_mean_squared_covariance_of_pairs():
    f = np.random.default_rng(5).exponential(size=(40, 12))
    covariance = np.cov(f.T)
    pairs = ~np.eye(12, dtype=bool)
    np.testing.assert_allclose(losses.decorrelation(jnp.asarray(f)), np.square(covariance[pairs]).mean(), rtol=1e-10)
    thinned = losses.decorrelation(jnp.asarray(f), tokens=10)
    np.testing.assert_allclose(thinned, np.square(np.cov(f[::4].T)[pairs]).mean(), rtol=1e-10)
    assert losses.decorrelation(jnp.ones((1, 12))) == 0
    with jax.enable_x64(False):  # of very many features
        f_BxF = jnp.asarray(np.random.default_rng(0).normal(size=(4, 50_000)), jnp.float32)
        assert 0 < jax.jit(losses.decorrelation)(f_BxF) < 1


def test_alignment_is_one_less_the_cosine_of_encoder_and_decoder():
    rng = np.random.default_rng(7)
    encoder, decoder = rng.normal(size=(D, F)), rng.normal(size=(F, D))
    encoder[:, 0] = 0
    cosines = np.einsum("df,fd->f", encoder, decoder) / np.linalg.norm(decoder, axis=1)
    cosines[1:] /= np.linalg.norm(encoder, axis=0)[1:]
    value, gradients = jax.value_and_grad(alignment, argnums=(0, 1))(jnp.asarray(encoder), jnp.asarray(decoder))
    np.testing.assert_allclose(value, (1 - cosines).sum(), rtol=1e-12)
    assert all(jnp.all(jnp.isfinite(gradient)) for gradient in gradients)


@pytest.mark.parametrize("name", ["auxk", "decorrelation", "alignment"])
def test_a_further_term_is_in_every_loss_by_its_coefficient(name):
    stack, params, x, y, hyper = setting("standard", **{name: 0.3})
    plain, dead = setting("standard")[0], jnp.arange(F) < 5
    params["b_enc_F"] = params["b_enc_F"].at[:5].set(3.0)
    member = _member(stack, params)
    pre = member.encoder_inputs(x).pre_xF
    terms = dict(
        auxk=lambda: auxk(pre, dead, params["W_dec_FxD"], y - member(x), AuxKForm(D // 2)),
        decorrelation=lambda: losses.decorrelation(member.encode(x)),
        alignment=lambda: alignment(params["W_enc_DxF"], params["W_dec_FxD"]),
    )
    whole, without = (jax.jit(loss_of(each, x, y, hyper, dead))(params) for each in (stack, plain))
    change = whole - without
    assert change > 0
    np.testing.assert_allclose(change, 0.3 * terms[name](), rtol=1e-8)


@pytest.mark.parametrize(("kind", "changes"), [("matryoshka", {}), ("jumprelu", dict(nested=(0.25, 0.5, 1.0)))])
def test_nested_kinds_sum_the_errors_of_their_groups(kind, changes):
    stack, params, x, y, hyper = setting(kind, **changes)
    loss, metrics = first_loss(stack, params, x, y, hyper)
    member, sizes = _member(stack, params), (16, 32, F)
    batch_topk = sparsity.batch_topk(member.encoder_inputs(x).pre_xF, 4)
    f, W_dec = np.asarray(batch_topk if kind == "matryoshka" else member.encode(x)), np.asarray(params["W_dec_FxD"])
    nested = [np.square(f[:, :n] @ W_dec[:n] + np.asarray(params["b_dec_D"]) - y).sum(1).mean() for n in sizes]
    np.testing.assert_allclose(metrics["error"], sum(nested), rtol=1e-10)
    np.testing.assert_allclose(metrics["mse"], nested[-1], rtol=1e-10)
    if kind == "matryoshka":  # it has no penalty
        np.testing.assert_allclose(loss, sum(nested), rtol=1e-10)
        return
    coefficient = float(hyper.kind_params["l0_coefficient"]) * float(penalty_schedule(stack.config, stack.steps)(0))
    penalty = coefficient * sum((f[:, :n] > 0).sum(1).mean() for n in sizes)
    assert penalty > 0
    np.testing.assert_allclose(metrics["sparsity"], penalty, rtol=1e-6)
    with pytest.raises(UserError, match=r"--train.jumprelu.nested=\(0.5, 0.25\) gives groups of"):
        setting(kind, nested=(0.5, 0.25))


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_whitening_evens_out_the_variances_and_keeps_their_sum(power):
    rng = np.random.default_rng(7)
    acts = rng.normal(size=(4000, D)) @ rng.normal(size=(D, D)) + 3
    before, after = (np.linalg.eigvalsh(np.cov(a.T)) for a in (acts, acts @ losses.whitening(acts, power)))
    np.testing.assert_allclose(after.sum(), before.sum(), rtol=1e-9)
    expected = np.sort(np.maximum(before, 1e-3 * before.mean()) ** -power * before)
    np.testing.assert_allclose(after, expected * before.sum() / expected.sum(), rtol=1e-6)


def test_a_whitened_error_is_measured_after_its_matrix():
    stack, params, x, y, hyper = setting("topk")
    metric = np.random.default_rng(8).normal(size=(D, D))
    hyper = dataclasses.replace(hyper, metric_DxD=jnp.asarray(metric))
    loss, metrics = first_loss(stack, params, x, y, hyper)
    error = np.asarray(y) - np.asarray(_member(stack, params)(x))
    np.testing.assert_allclose(loss, np.square(error @ metric).sum(1).mean(), rtol=1e-10)
    np.testing.assert_allclose(metrics["mse"], np.square(error).sum(1).mean(), rtol=1e-10)


@pytest.mark.parametrize("width", [D, 4 * F])
def test_products_of_bfloat16_operands_have_the_gradient_of_the_rounded_ones(width):
    """Of wide left operands the transpose of the product is computed."""
    rng = np.random.default_rng(6)
    a, b, g = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, width), (width, F), (B, F)))
    ours = jax.vjp(lambda a, b: matmul(a, b, "bfloat16"), a, b)
    rounded_a, rounded_b, rounded_g = (np.asarray(value.astype(jnp.bfloat16), np.float64) for value in (a, b, g))
    to_a, to_b = ours[1](g)
    np.testing.assert_allclose(ours[0], rounded_a @ rounded_b, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(to_a, rounded_g @ rounded_b.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(to_b, rounded_a.T @ rounded_g, rtol=1e-4, atol=1e-4)


def test_matching_pursuit_is_the_loop_over_its_steps():
    """Values and gradients; a member's k is less than the stack's largest, and features are chosen twice."""
    stack, params, x, _, hyper = setting("matching_pursuit", k=(14, 16))
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(B, F)))

    def loop(params):
        residual, f_BxF, W_dec = x - params["b_dec_D"][None], jnp.zeros((B, F)), params["W_dec_FxD"]
        for _ in range(14):
            index = jnp.argmax(residual @ W_dec.T, axis=1)
            value = jnp.maximum(jnp.sum(residual * W_dec[index], axis=1), 0)
            f_BxF = f_BxF.at[jnp.arange(B), index].add(value)
            residual = residual - value[:, None] * W_dec[index]
        return f_BxF

    def encode(params):
        member = _member(stack, params)
        return member.kind.encode_in_training(member, member.encoder_inputs(x), hyper.kind_params, None)

    def values_and_gradients(function):
        def weighted(params):
            f_BxF = function(params)
            return jnp.vdot(weights, f_BxF), f_BxF

        gradients, f_BxF = jax.jit(jax.grad(weighted, has_aux=True))(params)
        return np.asarray(f_BxF), gradients

    (found, *gradients), (expected, of_loop) = values_and_gradients(encode), values_and_gradients(loop)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
    assert 8 < (expected > 0).sum(1).min() < 14
    gradients.append(of_loop)
    assert np.abs(gradients[1]["W_dec_FxD"]).max() > 0.1
    for name in params:
        np.testing.assert_allclose(gradients[0][name], gradients[1][name], rtol=1e-5, atol=1e-9, err_msg=name)


def test_the_pre_activation_loss_is_its_formula_over_dead_features():
    stack, params, x, y, hyper = setting("jumprelu", pre_activation=0.3)
    without, *_ = setting("jumprelu")
    dead = jnp.asarray(np.random.default_rng(5).random(F) < 0.2)
    both = [jax.jit(jax.value_and_grad(loss_of(each, x, y, hyper, dead)))(params) for each in (stack, without)]
    (value, gradient), (plain, plain_gradient) = jax.tree.map(np.asarray, both)
    missing_BxF = np.asarray(params["threshold_F"]) - np.asarray(_member(stack, params).encoder_inputs(x).pre_xF)
    norms_F = np.linalg.norm(params["W_dec_FxD"], axis=1)
    expected = 0.3 * (np.maximum(missing_BxF, 0) * norms_F * np.asarray(dead)).sum(1).mean()
    assert expected > 0.1 and value - plain == pytest.approx(expected, rel=1e-9)
    to_threshold = 0.3 / B * ((missing_BxF > 0) * norms_F * np.asarray(dead)).sum(0)
    np.testing.assert_allclose(gradient["threshold_F"] - plain_gradient["threshold_F"], to_threshold, atol=1e-12)
    np.testing.assert_allclose(gradient["b_enc_F"] - plain_gradient["b_enc_F"], -to_threshold, atol=1e-12)
