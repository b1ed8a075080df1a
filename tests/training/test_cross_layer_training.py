"""Cross-layer transcoders: their loss against plain numpy, planted features, meshes, resuming, and what is written."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_runs import STEPS, assert_same_bits, go
from small_runs import make_stack as make_small_run
from small_stacks import B, D, F, compiled, make_stack, train

import saejax
from saejax.attribution.local.dictionaries import open_transcoders
from saejax.dictionaries.cross_layer import SKIP_FORM
from saejax.dictionaries.formats import circuit_tracer
from saejax.dictionaries.hashes import hash_dictionaries
from saejax.errors import Interrupted, UserError
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.training import in_memory
from saejax.training.cross_layer import LayersBatch, cross_layer_loss, find_levels, finish_layer
from saejax.training.stack import TrainStack
from saejax.training.state import abstract_state, init_state

LAYERS, SITES = 3, ("mlp_in.0", "mlp_in.1", "mlp_in.2")
FORM = dict(form="cross_layer_transcoder", sites=SITES)
FREE = dict(decoder_norm="free")
KINDS = {
    "standard": dict(l1=(0.3,), **FREE),
    "jumprelu": dict(l0_penalty="tanh", l0_coefficient=(0.4,), bandwidth=0.5, initial_threshold=0.6, **FREE),
    "batchtopk": {},
    "across layers": dict(across_layers=True),
}
KIND_OF = dict.fromkeys(KINDS) | {name: name for name in ("standard", "jumprelu", "batchtopk")}


def make(kind="jumprelu", mesh=None, maker=make_stack, **changes) -> TrainStack:
    """A stack of three layers, each with scales of its own."""
    stack = maker(KIND_OF[kind] or "batchtopk", mesh, **FORM | KINDS[kind] | changes)
    scales = [
        dataclasses.replace(scale, input=0.5 + 0.1 * i, output=0.4 + 0.2 * i, max_norm=9.0 + i)
        for i, scale in enumerate(stack.scales)
    ]
    return dataclasses.replace(stack, scales=scales)


def random_layers(stack: TrainStack, seed=0) -> list[dict[str, np.ndarray]]:
    """Arrays of all layers that write everywhere, fp64."""
    rng = np.random.default_rng(seed)
    start = [jax.tree.map(np.asarray, arrays) for arrays in init_state(stack).params]
    return [{name: array + 0.1 * rng.normal(size=array.shape) for name, array in arrays.items()} for arrays in start]


def values(count=B, seed=1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(LAYERS, count, D)) + 0.3, rng.normal(size=(LAYERS, count, D))


def plain(layers, x_LxBxD, y_LxBxD, kind, step_share):
    """Loss, gradients and errors in numpy, by the chain rule written out; jumprelu's thresholds straight through."""
    acts, total = [], 0.0
    pres = [x @ arrays["W_enc_DxF"] + arrays["b_enc_F"] for arrays, x in zip(layers, x_LxBxD, strict=True)]
    of_all = np.sort(np.maximum(pres, 0).ravel())[-4 * B * LAYERS - 1]
    for arrays, pre_BxF in zip(layers, pres, strict=True):
        smallest = np.sort(np.maximum(pre_BxF, 0).ravel())[-4 * B - 1]
        above = {"standard": 0.0, "jumprelu": arrays.get("threshold_F"), "batchtopk": smallest, "across layers": of_all}
        acts.append(np.where(pre_BxF > above[kind], np.maximum(pre_BxF, 0), 0.0))
    errors = []
    for m in range(LAYERS):
        y_hat_BxD = layers[m]["b_dec_D"] + sum(
            acts[l] @ layers[l]["W_dec_FxD"][:, (m - l) * D : (m - l + 1) * D] for l in range(m + 1)
        )
        if "W_skip_DxD" in layers[m]:
            y_hat_BxD = y_hat_BxD + x_LxBxD[m] @ layers[m]["W_skip_DxD"]
        errors.append(y_hat_BxD - y_LxBxD[m])
        total += np.square(errors[m]).sum() / B
    grads = []
    for l, arrays in enumerate(layers):
        W_dec, f_BxF = arrays["W_dec_FxD"], acts[l]
        norm_F = np.sqrt(np.square(W_dec).sum(1))
        to_y = 2 / B * np.concatenate(errors[l:], axis=1)
        to_f, to_W, to_norm = to_y @ W_dec.T, f_BxF.T @ to_y, np.zeros_like(norm_F)
        if kind == "standard":
            total += step_share * 0.3 / B * (f_BxF * norm_F).sum()
            to_f, to_norm = to_f + step_share * 0.3 / B * norm_F, step_share * 0.3 / B * f_BxF.sum(0)
        if kind == "jumprelu":
            size = np.tanh(4 * f_BxF * norm_F)
            slope = step_share * 0.4 / B * 4 * (1 - size**2)
            total += step_share * 0.4 / B * size.sum()
            to_f, to_norm = to_f + slope * norm_F, (slope * f_BxF).sum(0)
        to_W = to_W + (to_norm / norm_F)[:, None] * W_dec
        to_pre = to_f * (f_BxF > 0)
        own = dict(W_enc_DxF=x_LxBxD[l].T @ to_pre, b_enc_F=to_pre.sum(0), W_dec_FxD=to_W)
        own["b_dec_D"] = 2 / B * errors[l].sum(0)
        own |= {"W_skip_DxD": 2 / B * x_LxBxD[l].T @ errors[l]} if "W_skip_DxD" in arrays else {}
        if kind == "jumprelu":
            near = np.abs(pres[l] - arrays["threshold_F"]) < 0.25
            own["threshold_F"] = -(arrays["threshold_F"] / 0.5) * (near * to_f).sum(0)
        grads.append(own)
    return total, grads, errors


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        pytest.param("standard", FORM["form"], marks=pytest.mark.slow),
        ("jumprelu", SKIP_FORM),
        ("batchtopk", FORM["form"]),
        ("across layers", FORM["form"]),
    ],
)
def test_loss_and_gradients_are_those_of_plain_numpy(kind, form, one_device):
    with jax.enable_x64(True):
        stack = make(kind, one_device, state_dtype="float64", form=form)
        layers, (x, y) = random_layers(stack), values()
        dead = jnp.zeros((LAYERS, F), bool)
        loss = lambda layers: cross_layer_loss(  # noqa: E731
            stack, layers, LayersBatch(jnp.asarray(x), jnp.asarray(y), stack.hyperparams, jnp.int32(0), dead)
        )
        loss_and_gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (total, (metrics, *_)), grads = loss_and_gradients(jax.tree.map(jnp.asarray, layers))
        wanted, plain_grads, errors = plain(layers, x, y, kind, step_share=1 / 2)  # of 50 steps 2 are warm-up
        (total, metrics, grads) = jax.tree.map(np.asarray, (total, metrics, grads))
    assert abs(total / wanted - 1) < 1e-12 and 0.02 < metrics["l0"].mean() / F < 0.9
    np.testing.assert_allclose(metrics["mse"], [np.square(e).sum() / B for e in errors], rtol=1e-10)
    for found, own in zip(grads, plain_grads, strict=True):
        assert ("W_skip_DxD" in own) == (form == SKIP_FORM)
        for name, gradient in own.items():
            assert np.abs(gradient).max() > 0
            np.testing.assert_allclose(
                found[name], gradient, rtol=1e-9, atol=1e-12 * np.abs(gradient).max(), err_msg=name
            )


def test_in_auxk_dead_features_of_all_layers_reconstruct_each_layers_residual(one_device):
    with jax.enable_x64(True):
        stacks = [
            make("batchtopk", one_device, state_dtype="float64", auxk=auxk, auxk_features=3) for auxk in (0.5, 0.0)
        ]
        layers, (x, y) = random_layers(stacks[0]), values()
        dead = np.random.default_rng(5).random((LAYERS, F)) < 0.1
        batch = LayersBatch(*map(jnp.asarray, (x, y)), stacks[0].hyperparams, jnp.int32(0), jnp.asarray(dead))
        (with_auxk, gradients), (without, plain_gradients) = (
            jax.tree.map(
                np.asarray,
                jax.jit(jax.value_and_grad(lambda layers, stack=stack: cross_layer_loss(stack, layers, batch)[0]))(
                    jax.tree.map(jnp.asarray, layers)
                ),
            )
            for stack in stacks
        )
    _, _, errors = plain(layers, x, y, "batchtopk", step_share=1 / 2)
    written = [-error for error in errors]  # the residual, y - y_hat
    for l, arrays in enumerate(layers):
        pre_BxF = np.where(dead[l], np.maximum(x[l] @ arrays["W_enc_DxF"] + arrays["b_enc_F"], 0), 0)
        f_BxF = np.where(pre_BxF > np.sort(pre_BxF, axis=1)[:, [-4]], pre_BxF, 0)
        for m in range(l, LAYERS):
            written[m] = written[m] - f_BxF @ arrays["W_dec_FxD"][:, (m - l) * D : (m - l + 1) * D]
    share = min(dead.sum() / (3 * LAYERS), 1)
    expected = 0.5 * share * sum(np.square(left).sum() / B for left in written)
    assert expected > 1 and with_auxk - without == pytest.approx(expected, rel=1e-9)
    for l in range(LAYERS):
        changed = np.abs(gradients[l]["W_enc_DxF"] - plain_gradients[l]["W_enc_DxF"]).max(axis=0) > 1e-9
        assert changed.any() and not changed[~dead[l]].any(), "the residual is a constant"
        np.testing.assert_allclose(gradients[l]["b_dec_D"], plain_gradients[l]["b_dec_D"], rtol=1e-12)


def planted(steps, tokens=B, features=6):
    """Batches in which every layer reads codes of its own features, that write to it and to all later layers."""
    rng = np.random.default_rng(0)
    reads = [np.linalg.qr(rng.normal(size=(D, features)))[0].T for _ in range(LAYERS)]
    writes = [rng.normal(size=(features, LAYERS - layer, D)) / np.sqrt(D) for layer in range(LAYERS)]
    shape = (steps, LAYERS, tokens, features)
    codes = rng.exponential(size=shape) * (rng.random(shape) < 0.1)
    x, y = np.zeros((2, steps, LAYERS, tokens, D), np.float32)
    for l in range(LAYERS):
        x[:, l] = 4 * codes[:, l] @ reads[l]
        y[:, l:] += 4 * np.einsum("sbf,fxd->sxbd", codes[:, l], writes[l])
    return x, y, writes


def test_features_that_write_across_layers_are_found_again(one_device):
    """A transcoder of the last layer alone cannot know what the first writes there: its own input does not tell."""
    x, y, writes = planted(320, tokens=128)
    settings = dict(sites=SITES, steps=320, k=(1,), learning_rate=(1e-2,), batch=128, warmup=20, dead_tokens=100_000)
    stack, alone = (
        make_stack("batchtopk", one_device, 1.0, form=form, **settings) for form in (FORM["form"], "transcoder")
    )
    (state, metrics), (_, of_transcoders) = (train(each, zip(x, y, strict=True)) for each in (stack, alone))
    found = finish_layer(stack, state, 0)[1].reshape(F, -1)
    wanted = writes[0].reshape(len(writes[0]), -1)
    lengths = np.linalg.norm(wanted, axis=1)[:, None] * np.maximum(np.linalg.norm(found, axis=1), 1e-9)
    assert (wanted @ found.T / lengths).max(1).min() > 0.95, "its three decoders together, as one direction"
    assert metrics["explained_variance"][2] > 0.9 > 0.6 > of_transcoders["explained_variance"][2]


@pytest.mark.parametrize("shape", [pytest.param((1, 1, 8), marks=pytest.mark.slow), (1, 2, 4)])
@pytest.mark.parametrize("kind", ["jumprelu", pytest.param("batchtopk", marks=pytest.mark.slow)])
@pytest.mark.parametrize("zero", [pytest.param(False, marks=pytest.mark.slow), True])
def test_features_over_eight_devices_are_those_of_one(kind, shape, zero, one_device):
    with jax.enable_x64(True):
        x, y, _ = planted(10)
        wanted, _ = train(make(kind, one_device, state_dtype="float64"), zip(x, y, strict=True))
        mesh = make_mesh(MeshConfig(**dict(zip(("member", "data", "model"), shape, strict=True))))
        stack = make(kind, mesh, state_dtype="float64", zero_optimizer=zero)
        found, _ = train(stack, zip(x, y, strict=True))
        for layer, arrays in enumerate(found.params):  # only what is written is stored
            decoder = arrays["W_dec_FxD"]
            assert decoder.sharding.shard_shape(decoder.shape) == (F // shape[2], (LAYERS - layer) * D)
            finished, writes = finish_layer(stack, found, layer)
            for array in (finished.W_enc_DxF[...].T, finished.W_dec_FxD[...], writes):
                assert array.sharding.shard_shape(array.shape)[0] == F // shape[2]
        for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
        text = compiled(stack).lower(abstract_state(stack), stack.hyperparams, (x[0], y[0])).compile().as_text()
        sums = [line for line in text.splitlines() if "all-reduce(" in line and f"{LAYERS * D}]" in line]
        gradients = shape[1] > 1  # of the first layer's decoder, over the tokens of all devices
        assert len(sums) == 1 + gradients, "what devices write to all layers meets once"


@pytest.mark.parametrize("kind", ["batchtopk", pytest.param("jumprelu", marks=pytest.mark.slow)])
def test_resumed_equals_uninterrupted_bit_for_bit(kind, tmp_path):
    stack = make(kind, maker=make_small_run, auxk=0.0)
    whole = go(tmp_path / "whole", stack)
    with pytest.raises(Interrupted, match=f"step 7 of {STEPS}"):
        go(tmp_path / "broken", stack, stop_after=7)
    assert_same_bits(go(tmp_path / "broken", stack), whole)


@pytest.mark.parametrize(
    "kind", ["across layers", *(pytest.param(k, marks=pytest.mark.slow) for k in ("standard", "jumprelu", "batchtopk"))]
)
def test_the_set_that_is_written_predicts_raw_values(kind, tmp_path, one_device):
    """With a skip path, too, as circuit-tracer applies it: x @ W_skip_{layer}."""
    stack = make(kind, one_device, form=SKIP_FORM)
    x, y, _ = planted(8)
    state, _ = train(stack, zip(x, y, strict=True))
    kept_L = np.full(LAYERS, 0.1, np.float32)
    if kind == "across layers":
        kept_L = np.asarray(find_levels(stack, state.params, stack.hyperparams, jnp.asarray(x[0])))
        every = jax.tree.map(np.asarray, state.params)
        pres = [x[0, l] @ arrays["W_enc_DxF"] + arrays["b_enc_F"] for l, arrays in enumerate(every)]
        sorted_N, kept = np.sort(np.maximum(pres, 0).ravel()), 4 * B * LAYERS
        np.testing.assert_allclose(kept_L, sorted_N[[-kept - 1, -kept]].mean(), rtol=1e-5)
    load = lambda layer: finish_layer(stack, state, layer, kept_L)  # noqa: E731
    circuit_tracer.save_cross_layer(tmp_path / "set", LAYERS, load)
    written = hash_dictionaries(str(tmp_path / "set"))
    circuit_tracer.save_cross_layer(tmp_path / "set" / "steps" / "5", LAYERS, load)
    assert hash_dictionaries(str(tmp_path / "set")) == written, "what is saved midway may be deleted"
    opened = open_transcoders(tmp_path / "set")
    assert opened.cross_layer and [config.max_norm for config in opened.configs] == [9.0, 10.0, 11.0]
    for m in range(LAYERS):
        raw_BxD, scaled_BxD = (np.asarray(opened.load(m).b_dec_D), np.asarray(state.params[m]["b_dec_D"]))
        for l in range(m + 1):
            layer, arrays = opened.load(l), jax.tree.map(np.asarray, state.params[l])
            assert layer.config.kind == ("standard" if kind == "standard" else "jumprelu")
            writes_FxXxD = opened.writes(l, np.arange(F))
            np.testing.assert_allclose(np.linalg.norm(writes_FxXxD.reshape(F, -1), axis=1), 1, rtol=1e-5)
            raw_BxD = raw_BxD + np.asarray(layer.encode(x[0, l]), np.float64) @ writes_FxXxD[:, m - l]
            pre_BxF = x[0, l] * stack.scales[l].input @ arrays["W_enc_DxF"] + arrays["b_enc_F"]
            above = dict(standard=0, jumprelu=arrays.get("threshold_F")).get(kind, kept_L[l])
            acts_BxF = np.where(pre_BxF > above, np.maximum(pre_BxF, 0), 0)
            scaled_BxD = scaled_BxD + acts_BxF @ arrays["W_dec_FxD"][:, (m - l) * D : (m - l + 1) * D]
        W_skip_DxD = load_file(tmp_path / "set" / f"W_enc_{m}.safetensors")[f"W_skip_{m}"]
        np.testing.assert_array_equal(np.asarray(opened.load(m).W_skip_DxD), W_skip_DxD)
        raw_BxD = raw_BxD + x[0, m] @ W_skip_DxD
        scaled_BxD = scaled_BxD + x[0, m] * stack.scales[m].input @ np.asarray(state.params[m]["W_skip_DxD"])
        np.testing.assert_allclose(raw_BxD * stack.scales[m].output, scaled_BxD, atol=2e-5)
    with pytest.raises(UserError, match="already holds"):
        circuit_tracer.save_cross_layer(tmp_path / "set", LAYERS, load)
    described = tmp_path / "set" / "config.yaml"
    described.write_text(described.read_text().replace("  - 11.0\n", ""))
    with pytest.raises(UserError, match=r"has no norm for each of the 3 layers \(max_norms\)"):
        open_transcoders(tmp_path / "set")


def test_a_feature_that_never_fires_and_no_spread_are_no_trouble(one_device):
    stack = make("jumprelu", one_device)
    state = init_state(stack)
    silent = tuple(arrays | dict(b_enc_F=arrays["b_enc_F"] - 100) for arrays in state.params)
    x = np.ones((3, LAYERS, B, D), np.float32)
    state, metrics = train(stack, zip(x, 0 * x, strict=True), dataclasses.replace(state, params=silent))
    assert not np.asarray(metrics["l0"]).any() and np.isfinite(jax.tree.leaves(metrics)).all()
    assert all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(kind="topk"), "--train.kinds=topk: a cross_layer_transcoder is one of standard, jumprelu, batchtopk"),
        (dict(sites=("mlp_in.0", "mlp_in.2")), "one encoder of every layer from 0, in order"),
        (dict(seed=(1, 2)), "one value of each setting"),
        (dict(sites=("mlp_in.0",)), "of one layer is a transcoder"),
        (dict(decorrelation=0.1), "--train.decorrelation=0.1: not for a cross_layer_transcoder"),
        (dict(kind="jumprelu", nested=(0.5, 1.0)), "--train.jumprelu.nested=0.5,1: not for a cross_layer_transcoder"),
        (dict(mesh=make_mesh(MeshConfig(member=2))), "--mesh.member=2: the layers of a cross_layer_transcoder are one"),
    ],
)
def test_what_is_no_cross_layer_transcoder_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_stack(**dict(kind="batchtopk") | FORM | changes)


def test_in_memory_none_is_trained_in_vain(monkeypatch):
    """It has no dictionary of each layer that could be returned."""
    store = SimpleNamespace(sites=("mlp_in.0", "mlp_in.1", "mlp_out.0", "mlp_out.1"))
    monkeypatch.setattr(in_memory.Store, "open", lambda folder: store)
    with pytest.raises(UserError, match="train it with the command saejax train --train.form=cross_layer_transcoder"):
        saejax.train_all("capture", kind="jumprelu", on_progress=pytest.fail, form=FORM["form"])
