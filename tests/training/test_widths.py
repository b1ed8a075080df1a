"""Transcoders whose target has another width than the site that they read: loss, stages, edits, export, devices."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from small_stacks import B, D, F, batches, make_stack, train

import saejax
from saejax.activations.store import Store
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.errors import UserError
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.runner import command
from saejax.runner.results import load_results
from saejax.stages.study.measure import _save_activity
from saejax.training.state import finish_dictionary, init_state
from saejax.training.step import MemberBatch, member_loss

WIDE = 24  # width of targets, where inputs have D
FORM = dict(sites=("mlp_in.1",), target="mlp_act", d_out=WIDE)
TEXTS = ["The river follows the teacher. The garden finds the engine.", "The winter letter carries a market window."]


@functools.cache
def data(count=20) -> list[tuple[np.ndarray, np.ndarray]]:
    """Inputs [count, 1, B, D], and targets [count, 1, B, WIDE] of the same directions."""
    inputs = batches(count)
    to_target = np.random.default_rng(7).normal(size=(D, WIDE)) / 4
    targets = np.maximum(inputs @ to_target, 0).astype(np.float32)
    return [(x[None], y[None]) for x, y in zip(inputs, targets, strict=True)]


def test_the_encoder_starts_at_directions_of_its_own():
    config = DictionaryConfig("topk", "mlp_in.1", "mlp_act.1", D, F, WIDE, k=4, centred=False, skip=True)
    arrays = Dictionary.initial(config, jax.random.key(0)).arrays
    shapes = {name: array.shape for name, array in arrays.items()}
    assert shapes == dict(W_enc_DxF=(D, F), b_enc_F=(F,), W_dec_FxD=(F, WIDE), b_dec_D=(WIDE,), W_skip_DxD=(D, WIDE))
    np.testing.assert_allclose(np.linalg.norm(arrays["W_enc_DxF"], axis=0), 1, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(arrays["W_dec_FxD"], axis=1), 1, rtol=1e-6)
    assert np.abs(arrays["W_enc_DxF"].T @ arrays["W_dec_FxD"][:, :D].T).max() < 0.99
    equal = Dictionary.initial(dataclasses.replace(config, target_width=D), jax.random.key(0)).arrays
    np.testing.assert_array_equal(equal["W_enc_DxF"], equal["W_dec_FxD"].T)
    with pytest.raises(UserError, match="reads 16 dimensions and writes 24 is a transcoder of one site"):
        dataclasses.replace(config, centred=True)


@pytest.mark.parametrize("products", ["dense", "rows"])
@pytest.mark.parametrize("metric", [False, True], ids=["plain", "whitened"])
def test_loss_and_gradients_are_the_formula_in_float64(products, metric, one_device):
    """Of a TopK skip transcoder with AuxK, which has half the target's width."""
    with jax.enable_x64(True):
        changes = dict(form="skip_transcoder", auxk=0.3, state_dtype="float64", products=products, **FORM)
        stack = make_stack("topk", one_device, **changes)
        rng = np.random.default_rng(1)
        params = {name: jnp.asarray(array[0]) for name, array in init_state(stack).params.items()}
        params = {name: array + 0.1 * rng.normal(size=array.shape) for name, array in params.items()}
        x, y = (part[0].astype(np.float64) / 2 for part in data()[0])
        dead = np.arange(F) < 40
        hyper = jax.tree.map(lambda array: jnp.asarray(array[0]), stack.hyperparams)
        whiten = rng.normal(size=(WIDE, WIDE)) if metric else np.eye(WIDE)
        if metric:
            hyper = dataclasses.replace(hyper, metric_DxD=jnp.asarray(whiten))
        batch = MemberBatch(jnp.asarray(x), jnp.asarray(y), hyper, jnp.int32(1000), jnp.asarray(dead))
        loss_of = jax.jit(jax.value_and_grad(lambda params: member_loss(stack, params, batch)[0]))
        loss, gradients = loss_of(params)
    w = {name: np.asarray(array) for name, array in params.items()}
    pre = x @ w["W_enc_DxF"] + w["b_enc_F"]

    def largest(values: np.ndarray, k: int) -> np.ndarray:
        return np.where((values >= np.sort(values, axis=1)[:, [-k]]) & (values > 0), values, 0)

    f = largest(pre, 4)
    error = f @ w["W_dec_FxD"] + w["b_dec_D"] + x @ w["W_skip_DxD"] - y
    f_dead = largest(np.where(dead, pre, -np.inf), WIDE // 2)
    left = f_dead @ w["W_dec_FxD"] + error  # of dead features, who see the error as a constant
    expected = np.square(error @ whiten).sum(1).mean() + 0.3 * np.square(left @ whiten).sum(1).mean()
    assert (f_dead > 0).sum(axis=1).max() == WIDE // 2
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    weight = whiten @ whiten.T
    to_output, to_left = (2 / B) * error @ weight, 0.3 * (2 / B) * left @ weight
    to_pre = np.where(f > 0, to_output @ w["W_dec_FxD"].T, 0) + np.where(f_dead > 0, to_left @ w["W_dec_FxD"].T, 0)
    formula = dict(
        W_enc_DxF=x.T @ to_pre,
        b_enc_F=to_pre.sum(0),
        W_dec_FxD=f.T @ to_output + f_dead.T @ to_left,
        b_dec_D=to_output.sum(0),
        W_skip_DxD=x.T @ to_output,
    )
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, formula[name], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    "kind",
    [
        "topk",
        "gated",
        "matryoshka",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("standard", "batchtopk", "jumprelu")),
    ],
)
def test_every_kind_learns_and_takes_raw_activations(kind, one_device):
    form = "transcoder" if kind == "topk" else "skip_transcoder"
    changes = dict(form=form, auxk=0.03, resample_every=7, dead_tokens=64, whiten_error=0.5, **FORM)
    stack = make_stack(kind, one_device, scale=0.25, steps=20, **changes)
    _, first = train(stack, data()[:1])
    state, last = train(stack, data())
    assert last["mse"][0] < 0.9 * first["mse"][0]
    np.testing.assert_allclose(np.linalg.norm(state.params["W_dec_FxD"][0], axis=1), 1, rtol=1e-6)
    dictionary = finish_dictionary(stack, state, 0)
    x, y = (jnp.asarray(part[0]) for part in data()[0])
    assert dictionary.config.d_out == WIDE and dictionary(x).shape == y.shape


def test_four_devices_train_the_same_and_read_their_parts(one_device, tmp_path):
    changes = dict(form="skip_transcoder", auxk=0.03, dead_tokens=64, **FORM)
    expected, _ = train(make_stack("batchtopk", one_device, **changes), data(5))
    mesh = make_mesh(MeshConfig(data=2, model=2), jax.devices()[:4])
    stack = make_stack("batchtopk", mesh, **changes)
    state, _ = train(stack, data(5))
    for name, value in expected.params.items():
        assert np.linalg.norm(value - np.asarray(state.params[name])) <= 1e-4 * np.linalg.norm(value), name
    dictionary, x = finish_dictionary(stack, state, 0), data()[0][0][0]
    for format in ("saejax", "saelens"):
        saejax.export(tmp_path / format, dictionary, format)
        loaded = saejax.load_dictionary(tmp_path / format, mesh=mesh)
        shards = {name: array.sharding.shard_shape(array.shape) for name, array in loaded.arrays.items()}
        assert shards["W_dec_FxD"] == (F // mesh.shape["model"], WIDE) and shards["W_skip_DxD"] == (D, WIDE)
        assert loaded.config.d_out == WIDE
        np.testing.assert_allclose(loaded(x), dictionary(x), rtol=1e-4, atol=1e-5)


# By the stages: a model whose heads, hidden activations and stream have three widths.
PAIRS = {"mlp_in": "mlp_act", "attn_z": "resid_post", "mlp_act": "mlp_out", "resid_pre": "attn_z"}
WIDTHS = dict(resid_pre=32, attn_z=48, mlp_in=32, mlp_act=56, mlp_out=32, resid_post=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return runs.save_model(tmp_path_factory.mktemp("wide") / "model", head_dim=12, intermediate_size=56)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return runs.save_corpus(tmp_path_factory.mktemp("text") / "corpus.jsonl.gz", documents=60)


def flags_of(model, corpus, workdir, site, target, **changes):
    changes = (
        dict(capture__sites=f"{site}.0,{target}.0", train__sites=f"{site}.0", train__target=target, train__epochs=2)
        | changes
    )
    form = dict(train__form="skip_transcoder", train__kinds="batchtopk", ablate__dictionary="batchtopk")
    behaviours = dict(task__behaviours="agreement", task__train_prompts=8, task__test_prompts=6)
    return ["program", *runs.small_flags(model, corpus, workdir, **form | behaviours | changes)]


@pytest.mark.slow
@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize("site", ["mlp_in", "attn_z"])
def test_the_stages_from_training_to_export(site, model, corpus, tmp_path, capsys):
    target = PAIRS[site]
    flags = flags_of(model, corpus, tmp_path / "run", site, target, export__dictionaries="batchtopk")
    stages = ["preflight", "baseline", "capture", "train", "evaluate", "ablate", "export"]
    assert command.run(stages, "", flags) == 0, capsys.readouterr().err
    workdir = tmp_path / "run"
    trained = saejax.load_dictionary(workdir / "train" / "batchtopk")
    assert (trained.config.d_in, trained.config.d_out) == (WIDTHS[site], WIDTHS[target])
    sizes = [program.size for program in load_results(workdir / "preflight").models[0].programs]
    assert any(f"{WIDTHS[site]} -> {WIDTHS[site] * 4} -> {WIDTHS[target]}" in size for size in sizes), sizes
    # Explained variance again, from the store and the files, in fp64.
    store, (scores,) = Store.open(workdir / "capture"), load_results(workdir / "evaluate" / "batchtopk").members
    rows = store.rows("held_out", f"{site}.0", f"{target}.0")
    x, y = (store.read(f"{name}.0", rows).astype(np.float64) for name in (site, target))
    error = y - np.asarray(trained(jnp.asarray(x, jnp.float32)), np.float64)
    expected = 1 - np.square(error).sum() / np.square(y - y.mean(0)).sum()
    assert scores.explained_variance == pytest.approx(expected, abs=1e-4)
    assert np.isfinite(scores.ce.reconstructed) and scores.ce.reconstructed != scores.ce.clean
    ablated = load_results(workdir / "ablate" / "batchtopk")
    assert ablated.site == f"{target}.0" and ablated.verdict.dictionaries["tested"]["agreement"].dose > 0
    exported = saejax.load_dictionary(workdir / "export" / "saelens-batchtopk" / f"{site}.0")
    assert exported.config.d_out == WIDTHS[target]
    np.testing.assert_allclose(exported(x[:50]), trained(x[:50]), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def lm(model, one_device):
    return saejax.load_model(str(model), mesh=one_device)


@pytest.fixture(scope="module")
def acts(lm):
    return saejax.capture(lm, TEXTS * 8, [f"{kind}.0" for kind in WIDTHS])


@pytest.mark.parametrize(
    ("site", "backend"),
    [
        ("attn_z", "jax"),
        ("mlp_in", "torch"),
        *(pytest.param(site, "jax", marks=pytest.mark.slow) for site in ("mlp_in", "mlp_act", "resid_pre")),
    ],
)
def test_an_edit_reads_the_site_and_changes_the_target(site, backend, lm, model, acts, one_device):
    target = f"{PAIRS[site]}.0"
    if backend == "torch":
        lm = saejax.load_model(str(model), backend="torch")
    if site == "mlp_in":
        settings = dict(form="transcoder", target=PAIRS[site], k=8, expansion=2, batch=64, max_steps=20)
        options = dict(on_progress=None, learning_rate=1e-3, mesh=one_device)
        trained = saejax.train(acts, f"{site}.0", **settings | options)
    else:
        rest = dict(n_features=2 * WIDTHS[site], target_width=WIDTHS[PAIRS[site]], k=8, centred=False)
        config = DictionaryConfig("topk", f"{site}.0", target, WIDTHS[site], **rest)
        trained = Dictionary.initial(config, jax.random.key(0))
    assert (trained.config.d_in, trained.config.d_out) == (WIDTHS[site], WIDTHS[PAIRS[site]])
    tokens, captured = lm.tokenize(TEXTS[:1]), [f"{site}.0", target]
    clean = lm(tokens, capture=captured).sites
    x, y = (np.asarray(clean[name][0], np.float64) for name in captured)
    f = np.asarray(trained.encode(jnp.asarray(x, jnp.float32)), np.float64)
    trained = trained.with_sink_norms(lm.sink_norm)
    inside = np.asarray(trained.is_not_sink(jnp.asarray(x), jnp.asarray(y)))
    feature = int((f * inside[:, None]).sum(0).argmax())
    without = y - f[:, [feature]] * np.asarray(trained.W_dec_FxD[feature], np.float64)
    rebuilt = np.asarray(trained(jnp.asarray(x, jnp.float32)), np.float64)
    for edit, expected in ((trained.ablate(feature), without), (trained.ablate_error(), rebuilt)):
        edited = lm(tokens, edits=[edit], capture=captured)
        found_x, found_y = (np.asarray(edited.sites[name][0], np.float64) for name in captured)
        np.testing.assert_allclose(found_x, x, atol=1e-5)
        np.testing.assert_allclose(found_y, np.where(inside[:, None], expected, y), atol=1e-4)
    assert inside.any() and np.abs(found_y - y).max() > 1e-3
    if (site, backend) == ("mlp_in", "jax"):
        tuned = saejax.finetune(lm, trained, TEXTS * 4, steps=2, learning_rate=1e-3, batch=64)
        assert np.isfinite(tuned.kl_S).all() and tuned.dictionary.config.d_out == WIDTHS[PAIRS[site]]


def test_a_study_keeps_no_activity_of_features_that_write_beside_the_stream(tmp_path):
    config = DictionaryConfig("topk", "mlp_in.0", "mlp_act.0", 32, 32, 56, k=4, centred=False)
    tested = SimpleNamespace(basis=Dictionary.initial(config, jax.random.key(0)), with_basis=lambda basis: basis)
    lm = SimpleNamespace(tokenizer=SimpleNamespace(is_fast=True), config=SimpleNamespace(d_model=32))
    items = SimpleNamespace(lm=lm, train=(), test=())
    _save_activity(tmp_path, SimpleNamespace(items=items, tested=tested), 1)
    assert not [*tmp_path.iterdir()]


def test_what_cannot_be_is_refused_in_one_line(lm, acts, tmp_path):
    settings = dict(form="transcoder", k=4, expansion=1, batch=64, max_steps=2, on_progress=None)
    for site, target, message in (
        ("mlp_act.0", "mlp_in", "target=mlp_in does not follow mlp_act.0 of site"),
        ("resid_post.0", "resid_post", "does not follow resid_post.0"),
        ("mlp_in.0", "mlp_act.0", "target is 'mlp_act.0': expected one of resid_pre, attn_q"),
        ("mlp_in.0", "resid_mid", "does not follow mlp_in.0"),
        ("resid_pre.0", "attn_out", "unknown site in this store 'attn_out.0'"),
    ):
        with pytest.raises(UserError, match=message):
            saejax.train(acts, site, target=target, **settings)
    with pytest.raises(UserError, match="resid_post.0: name the site"):
        saejax.train(acts, target="mlp_act", **settings)
    config = DictionaryConfig("topk", "mlp_in.0", "mlp_act.0", 32, 32, 56, k=4, centred=False)
    transcoder, narrow = (
        Dictionary.initial(dataclasses.replace(config, target_width=width), jax.random.key(0)) for width in (56, 55)
    )
    prompts = saejax.make_prompts(lm, "agreement", 4, 4)
    above = dataclasses.replace(transcoder.config, site="mlp_in.1", target="mlp_act.1")
    layers = [transcoder, transcoder.with_config(above)]
    for call, message in (
        (lambda: saejax.export(tmp_path / "set", layers, "circuit_tracer"), "reads 32 .* and writes 56"),
        (lambda: saejax.trace(lm, layers, "The river"), "writes 56 dimensions, but .* has 32"),
        (lambda: saejax.evaluate(lm, narrow, TEXTS), "the width 55, but mlp_act.0 of .* has 56"),
        (lambda: lm(lm.tokenize(TEXTS[:1]), edits=[narrow.ablate(0)]), "has the width 55, but mlp_act.0 is 56 wide"),
        (lambda: saejax.ablate(lm, narrow, prompts), "writes 55 dimensions, but mlp_act.0 has 56"),
    ):
        with pytest.raises(UserError, match=message):
            call()
