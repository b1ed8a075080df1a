"""The training step: Adam's formula, constraints, the input scale, frozen halves, thresholds, schedules."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from every_kind import KINDS
from small_stacks import STEPS, B, D, F, batches, make_config, make_stack, parts, run, step

from saejax.config import Config, setting
from saejax.dictionaries import Dictionary, kinds
from saejax.dictionaries.kinds.batchtopk import BatchTopK
from saejax.dictionaries.kinds.topk import TopK
from saejax.errors import UserError
from saejax.training import optimizer as updates
from saejax.training.stack import read_facts
from saejax.training.state import finish_dictionary, init_state
from saejax.training.step import MemberBatch, compile_step, member_loss


def host(state) -> dict[str, np.ndarray]:
    return {name: np.asarray(array[0], np.float64) for name, array in state.params.items()}


# What all kinds share of it is in their first steps and gradients, and in test_initial.py.
OWN_WAYS = ("jumprelu", "matching_pursuit")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in OWN_WAYS else pytest.mark.slow) for k in KINDS])
def test_loss_falls_decoder_rows_keep_unit_norm_and_the_finished_dictionary_takes_raw_activations(kind, one_device):
    stack = make_stack(kind, one_device, scale=0.25, auxk=0.03)
    data = batches()
    _, first = run(stack, data[:1])
    state, last = run(stack, data)
    assert last["mse"][0] < 0.7 * first["mse"][0]
    np.testing.assert_allclose(np.linalg.norm(state.params["W_dec_FxD"][0], axis=1), 1, rtol=1e-6)
    assert int(state.step_M[0]) == STEPS
    assert_takes_raw_activations(stack, state)


TRANSCODER = dict(sites=("mlp_in.1",))


@pytest.mark.parametrize(
    ("kind", "changes", "loss", "gradient_norm"),
    [
        ("jumprelu", {}, 78.0877, 91.5891),
        ("topk", dict(products="rows"), 23.0653, 21.98001),
        ("batchtopk", {}, 44.10896, 43.85572),
        ("matryoshka", {}, 88.87534, 68.8895),
        ("gated", {}, 156.6155, 165.1408),
        ("linear", {}, 418.887, 278.2091),
        ("standard", dict(decorrelation=0.01), 78.68024, 91.95998),
        ("topk", dict(form="transcoder", **TRANSCODER), 72.92908, 41.01249),
        ("standard", dict(form="skip_transcoder", **TRANSCODER), 189.5043, 142.4536),
    ],
)
def test_the_first_step_has_the_figures_of_commit_9b9b75b(kind, changes, loss, gradient_norm, one_device):
    """Of the same state and batch: rewriting the code has not changed what is trained."""
    stack = make_stack(kind, one_device, **changes)
    _, metrics = step(stack, init_state(stack), parts(stack, batches(5)[0]))
    figures = float(metrics["loss"][0]), float(metrics["gradient_norm"][0])
    assert figures == pytest.approx((loss, gradient_norm), rel=2e-6)


def test_the_first_step_is_adam_on_the_projected_gradient(one_device):
    stack = make_stack("standard", one_device, warmup=0, decay=0.0)
    before, silent = init_state(stack), np.zeros(F, np.int32)
    before.params["b_enc_F"] = before.params["b_enc_F"].at[0, :2].set(-100.0)  # they do not fire
    silent[:5] = 200, 4, 4, 0, 7  # the first has been dead
    before = dataclasses.replace(before, silent_MxF=jnp.asarray(silent[None]))
    x = batches(1)[0]
    centred = 0.5 * x - np.asarray(before.params["b_dec_D"])
    second, largest = np.sort(centred @ np.asarray(before.params["W_enc_DxF"])[0, :, 4])[-2:]
    before.params["b_enc_F"] = before.params["b_enc_F"].at[0, 4].set(-(second + largest) / 2)  # fires on one token
    old = host(before)
    after, metrics = step(stack, before, parts(stack, x))
    x = x.astype(np.float64) * 0.5
    pre = (x - old["b_dec_D"]) @ old["W_enc_DxF"] + old["b_enc_F"]
    f = np.maximum(pre, 0)
    error = f @ old["W_dec_FxD"] + old["b_dec_D"] - x
    mse, penalty = np.square(error).sum(1).mean(), 0.05 * f.sum(1).mean()
    back = np.where(pre > 0, (2 / B) * error @ old["W_dec_FxD"].T + 0.05 / B, 0)
    gradients = dict(
        W_enc_DxF=(x - old["b_dec_D"]).T @ back,
        b_enc_F=back.sum(0),
        W_dec_FxD=(2 / B) * f.T @ error,  # the penalty's part points along the rows and is projected out
        b_dec_D=(2 / B) * error.sum(0) - (back @ old["W_enc_DxF"].T).sum(0),
    )
    along = (gradients["W_dec_FxD"] * old["W_dec_FxD"]).sum(1, keepdims=True)
    gradients["W_dec_FxD"] -= along * old["W_dec_FxD"]
    norm = np.sqrt(sum(np.square(g).sum() for g in gradients.values()))
    expected = dict(error=mse, mse=mse, sparsity=penalty, loss=mse + penalty, l0=(f > 0).sum(1).mean())
    expected |= dict(explained_variance=1 - np.square(error).sum() / np.square(x - x.mean(0)).sum())
    expected |= dict(gradient_norm=norm, learning_rate=3e-3, dead=1 / F)
    assert {name: float(value[0]) for name, value in metrics.items()} == pytest.approx(expected, rel=1e-4)
    np.testing.assert_array_equal(after.silent_MxF[0], np.where((f > 0).any(0), 0, silent + B))
    clip = max(1.0, norm)
    for name, gradient in gradients.items():
        moved = old[name] - 3e-3 * (gradient / clip) / (np.abs(gradient / clip) + 1e-8)
        if name == "W_dec_FxD":
            moved /= np.linalg.norm(moved, axis=1, keepdims=True)
        sure = np.abs(gradient / clip) > 1e-6  # Adam's first step is the sign: near 0 it says nothing
        np.testing.assert_allclose(host(after)[name][sure], moved[sure], rtol=1e-4, atol=1e-6)


def test_means_of_gradients_in_bfloat16_train_as_well(one_device):
    data = batches()
    whole, half = (make_stack(mesh=one_device, mu_dtype=dtype) for dtype in ("float32", "bfloat16"))
    (_, expected), (state, metrics) = run(whole, data), run(half, data)
    assert {array.dtype.name for array in optax.tree.get(state.optimizer, "mu").values()} == {"bfloat16"}
    assert {array.dtype.name for array in optax.tree.get(state.optimizer, "nu").values()} == {"float32"}
    np.testing.assert_allclose(metrics["mse"], expected["mse"], rtol=0.02)


@pytest.mark.parametrize(("freeze", "name"), [("decoder", "W_dec_FxD"), ("encoder", "W_enc_DxF")])
def test_a_frozen_half_keeps_its_bits_and_the_rest_learns(freeze, name, one_device):
    stack = make_stack(mesh=one_device, freeze=freeze, weight_decay=0.1)
    before, (state, _) = host(init_state(stack)), run(stack, batches(5))
    for key, value in host(state).items():
        assert np.array_equal(value, before[key]) == (key == name), key


# Of an SAE the figures of the first step have either product, and gradients are compared below.
@pytest.mark.parametrize(
    "form", [*(pytest.param(form, marks=pytest.mark.slow) for form in ("sae", "transcoder")), "skip_transcoder"]
)
def test_codes_of_the_active_features_train_what_all_features_train(form, one_device):
    changes = dict(form=form, k=(2, 5), auxk=0.1, dead_tokens=2 * B, decorrelation=0.01, resample_every=6)
    if form != "sae":
        changes |= dict(sites=("mlp_in.1",))
    (dense, wanted), (state, metrics) = (
        run(make_stack("topk", one_device, products=products, **changes), batches(12)) for products in ("dense", "rows")
    )
    assert wanted["dead"].min() > 0 and wanted["auxk"].min() > 0  # the auxiliary loss moves dead features
    for name, values_M in wanted.items():
        np.testing.assert_allclose(metrics[name], values_M, rtol=1e-4, err_msg=name)
    for name, array in dense.params.items():
        np.testing.assert_allclose(state.params[name], array, atol=2e-4 * np.abs(array).max(), err_msg=name)
    np.testing.assert_array_equal(state.silent_MxF, dense.silent_MxF)


class PulledTopK(TopK):
    """TopK with a loss on all pre-activations."""

    name = "pulled"

    def losses(self, batch):
        return dict(pull=jnp.mean(jnp.square(batch.pre_BxF)))


class HalvedTopK(TopK):
    """TopK whose activations in training are half as large."""

    name = "halved"

    def encode_in_training(self, dictionary, inputs, values, settings):
        return self.encode(dictionary, inputs, values) / 2


@pytest.mark.parametrize("kind", [PulledTopK, HalvedTopK])
def test_a_kind_has_the_same_gradients_by_every_form_of_products(kind, one_device, monkeypatch):
    monkeypatch.setitem(kinds.KINDS, kind.name, kind())
    gradients, x = {}, jnp.asarray(batches(1)[0])
    for products in ("dense", "rows"):
        stack = make_stack(kind.name, one_device, products=products)
        params, hyper = jax.tree.map(lambda array: array[0], (init_state(stack).params, stack.hyperparams))
        dead_F, steps = jnp.zeros(F, bool), jnp.int32(1000)
        gradient = jax.jit(jax.grad(functools.partial(member_loss, stack), has_aux=True))
        gradients[products], _ = gradient(params, MemberBatch(x, x, hyper, steps, dead_F))
    for name, gradient in gradients["dense"].items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(gradients["rows"][name], gradient, atol=1e-5 * scale, err_msg=name)


def assert_takes_raw_activations(stack, state):
    """Compare the finished dictionary with the trained one on scaled inputs, whose outputs are scaled back."""
    x, scale = jnp.asarray(batches(1)[0]), stack.scales[0]
    arrays = {name: array[0] for name, array in state.params.items()}
    if stack.kind.name in ("batchtopk", "matryoshka"):
        arrays["threshold_F"] = jnp.full(F, 0.1)
    inside = Dictionary(stack.dictionary, **arrays)
    f, y = inside.encode(x * scale.input) / scale.output, inside(x * scale.input) / scale.output
    finished = finish_dictionary(stack, state, 0, np.array([0.1], np.float32))
    assert float(jnp.abs(f).sum()) > 0
    np.testing.assert_allclose(finished.encode(x), f, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(finished(x), y, rtol=1e-4, atol=1e-4)
    assert finished.config.target == ("" if stack.config.form == "sae" else "mlp_out.1")


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("gated", "skip_transcoder"),
        ("standard", "transcoder"),
        *(
            pytest.param(kind, "skip_transcoder", marks=pytest.mark.slow)
            for kind in KINDS
            if not kinds.by_name(kind).rebuilds_input and kind != "gated"
        ),
    ],
)
def test_the_finished_transcoder_takes_raw_activations(kind, form, one_device):
    stack = make_stack(kind, one_device, form=form, sites=("mlp_in.1",))
    stack = dataclasses.replace(stack, scales=[dataclasses.replace(stack.scales[0], input=0.25, output=0.4)])
    assert_takes_raw_activations(stack, run(stack, batches(10))[0])


# One whose threshold is folded as well, and the one with most vectors.
@pytest.mark.parametrize("kind", [pytest.param("standard", marks=pytest.mark.slow), "jumprelu", "gated"])
def test_rows_that_grew_freely_are_folded_to_unit_length(kind, one_device):
    stack = make_stack(kind, one_device, decoder_norm="free")
    state, _ = run(stack, batches(20))
    assert np.abs(np.linalg.norm(state.params["W_dec_FxD"][0], axis=1) - 1).max() > 1e-3
    finished, x = finish_dictionary(stack, state, 0), jnp.asarray(batches(1)[0])
    np.testing.assert_allclose(np.linalg.norm(finished.W_dec_FxD[...], axis=1), 1, rtol=1e-5)
    inside = Dictionary(stack.dictionary, **{name: array[0] for name, array in state.params.items()})
    np.testing.assert_allclose(finished(x), inside(x * 0.5) / 0.5, rtol=1e-4, atol=1e-4)


@dataclasses.dataclass(frozen=True)
class ActiveConfig(Config):
    """The number of active features under a name of the kind's own."""

    active: tuple[int, ...] = setting((3, 5), "active features", swept=True)


class ActiveTopK(TopK):
    """TopK whose k follows from a setting of its own."""

    name, Settings, reads = "active", ActiveConfig, ()

    def facts(self, values, settings, n_features):
        return dict(k=values["active"])


class ActiveBatchTopK(BatchTopK):
    """The same of a kind that reads its k in training alone."""

    name, Settings, reads, facts = "active", ActiveConfig, (), ActiveTopK.facts


def test_a_batchtopk_whose_k_follows_from_its_own_setting_trains(one_device, monkeypatch):
    monkeypatch.setitem(kinds.KINDS, "active", ActiveBatchTopK())
    stack = make_stack("active", one_device)
    _, metrics = run(stack, batches(2))
    np.testing.assert_allclose(metrics["l0"], [3, 5])


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (dict(k=0), "k=0: expected a whole number from 1 to the 64"),
        (dict(), "k=0: expected a whole number from 1 to the 64"),
        (dict(k=F + 1), "k=65: expected a whole number from 1 to the 64"),
        (dict(k=2.5), "k=2.5 and groups=\\(\\): expected whole numbers"),
        (dict(k=3, other=1), "other: expected some of k, groups, fires_above"),
        (dict(k=3, groups=(F, F // 2)), "expected numbers that ascend to the 64 features"),
    ],
)
def test_facts_that_cannot_be_are_refused_by_name(facts, message):
    kind = ActiveTopK()
    kind.facts = lambda values, settings, n_features: facts
    with pytest.raises(UserError, match=f"the kind active returns as facts .*{message}"):
        read_facts(kind, {}, None, F)
    kind.facts = lambda values, settings, n_features: dict(k=np.int64(3), groups=(np.int64(2), np.int64(F)))
    plain = read_facts(kind, {}, None, F)
    assert json.dumps(plain) == f'{{"k": 3, "groups": [2, {F}]}}'


def test_a_kind_whose_k_follows_from_its_own_setting_trains_and_encodes(one_device, monkeypatch):
    monkeypatch.setitem(kinds.KINDS, "active", ActiveTopK())
    stack, x = make_stack("active", one_device), batches(1)[0]
    state, _ = run(stack, batches(2))
    for index, k in enumerate((3, 5)):
        finished = finish_dictionary(stack, state, index)
        assert finished.config.k == k
        assert int((finished.encode(jnp.asarray(x)) > 0).sum(axis=1).max()) == k


def test_schedules():
    config = make_config(warmup=10, decay=0.2)
    rate = [updates.learning_rate_schedule(config, 100)(s) for s in (0, 4, 9, 50, 80, 90, 99)]
    np.testing.assert_allclose(rate, [0.1, 0.5, 1, 1, 1, 0.5, 0.05], rtol=1e-6)
    penalty = [updates.penalty_schedule(config, 100)(s) for s in (0, 4, 9, 99)]
    np.testing.assert_allclose(penalty, [0.1, 0.5, 1, 1], rtol=1e-6)
    later = updates.penalty_schedule(make_config(warmup=10, penalty_warmup=1.0), 100)
    np.testing.assert_allclose([later(s) for s in (0, 49, 99)], [0.01, 0.5, 1], rtol=1e-6)
    flat = make_config(warmup=0, decay=0.0)
    np.testing.assert_allclose([updates.learning_rate_schedule(flat, 5)(s) for s in range(5)], 1.0)


def test_defaults_that_follow_from_sizes():
    stack = make_stack(learning_rate=(0.0, 1e-2), dead_tokens=0)
    rates = [member.settings["learning_rate"] for member in stack.members]
    assert rates == pytest.approx([2e-4 * 16, 1e-2]) and F == 2**14 / 16**2
    assert stack.hyperparams.learning_rate.tolist() == pytest.approx(rates)
    assert stack.config.dead_tokens == 10_000_000
    # The same tokens whatever the batch: of much text 10 million, of less an epoch.
    for batch in (1024, 32_768):
        config = make_config(batch=batch, dead_tokens=0)
        assert config.with_dead_tokens(2**30 // batch).dead_tokens == 10_000_000
        assert config.with_dead_tokens(2**20 // batch).dead_tokens == 2**20
        assert make_config(dead_tokens=7).with_dead_tokens(1).dead_tokens == 7


@pytest.mark.parametrize("limit", [0.0, 1e3, 0.5])
def test_updates_are_adams_on_clipped_gradients_and_the_encoder_alone_decays(limit):
    b1, b2, eps, mean, square = 0.6, 0.7, 0.1, 0.0, 0.0
    config = make_config(clip=limit, b1=b1, b2=b2, eps=eps, weight_decay=0.5, decoder_norm="free")
    optimizer = updates.make_optimizer(config)
    params = dict(W_enc_DxF=jnp.full((2, 3), 7.0), W_dec_FxD=jnp.full((3, 2), 7.0), b_dec_D=jnp.full(2, 7.0))
    state = optimizer.init(params)
    for count, factor in enumerate((1.0, -0.25), 1):
        grads = {name: jnp.full_like(array, -40.0 * factor) for name, array in params.items()}
        moves, state = optimizer.update(grads, state, params, learning_rate=2.0)
        norm = abs(factor) * 40.0 * np.sqrt(2 * 3 + 3 * 2 + 2)
        np.testing.assert_allclose(optax.tree.get(state, "gradient_norm"), norm, rtol=1e-5)
        clipped = -40.0 * factor * (min(1, limit / norm) if limit else 1)
        mean, square = b1 * mean + (1 - b1) * clipped, b2 * square + (1 - b2) * clipped**2
        expected = -2.0 * mean / (1 - b1**count) / (np.sqrt(square / (1 - b2**count)) + eps)
        for name, move in moves.items():
            decay = 2.0 * 0.5 * 7.0 if name == "W_enc_DxF" else 0.0
            np.testing.assert_allclose(move, expected - decay, rtol=1e-5)


def test_members_of_a_stack_start_as_they_would_alone_but_apart_at_several_sites(one_device):
    together = init_state(make_stack(mesh=one_device, seed=(1, 2), k=(3, 5)))
    for index, (seed, k) in enumerate([(1, 3), (1, 5), (2, 3), (2, 5)]):
        alone = init_state(make_stack(mesh=one_device, seed=(seed,), k=(k,)))
        for a, b in zip(jax.tree.leaves(together.params), jax.tree.leaves(alone.params), strict=True):
            np.testing.assert_allclose(a[index], b[0], rtol=1e-5, atol=1e-6)  # other programs, of other shapes
    sites = make_stack(mesh=one_device, sites=("resid_post.1", "resid_post.2"))
    first, second = np.asarray(init_state(sites).params["W_dec_FxD"])
    # By their names, whatever stands before them.
    more = make_stack(mesh=one_device, sites=("resid_post.0", "resid_post.2", "resid_post.1"))
    np.testing.assert_allclose(
        np.asarray(init_state(more).params["W_dec_FxD"])[:0:-1], [first, second], rtol=1e-5, atol=1e-6
    )
    assert np.abs((first * second).sum(-1)).max() < 0.95 and not np.allclose(first, second)


# Kinds differ here in their vectors alone, of which gated has most.
@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "gated" else pytest.mark.slow) for k in KINDS])
def test_a_turn_of_a_member_copies_no_state_of_all_members(kind, one_device):
    """Members take turns in a loop, and a copy of all states at each turn would be work of members squared."""
    sites = tuple(f"resid_post.{layer}" for layer in range(5))
    stack = make_stack(kind, one_device, sites=sites, members_at_once=1, matmul="float32", auxk=0.03)
    batch = (jnp.zeros((len(sites), B, D)),)
    program = compile_step(stack).lower(init_state(stack), stack.hyperparams, batch).compile().as_text()
    assert f"f32[5,{D},{F}]" in program
    copies = re.findall(rf"= f32\[5,(?:{D},{F}|{F},{D})\]\S* copy\(.*", program)
    assert not [line for line in copies if "while" in line or "get-tuple-element" in line], copies
