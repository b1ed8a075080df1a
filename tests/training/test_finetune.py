"""Fine-tuning through the model: loss and gradients against PyTorch in float64, and what it does to a dictionary."""

import functools

import jax
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, Mesh
from scipy.special import log_softmax
from tiny_models import TINY_TEXT

import saejax
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.errors import Interrupted, UserError
from saejax.models import source
from saejax.parallel.mesh import AXES
from saejax.training.finetune import CleanBatches, finetune_loss, finetune_member, finetuning_stack
from saejax.training.members import Member
from saejax.training.scales import SiteScale
from saejax.training.settings import TrainConfig
from saejax.training.stack import TrainStack

D, F, K, RATE = 64, 96, 8, 1e-3
SAE = dict(site="resid_post.2")
TRANSCODER = dict(site="mlp_in.1", target="mlp_out.1", skip=True, centred=False)


def make_texts(count, seed=0) -> list[str]:
    """Texts of the same words, and so of as many tokens, in random orders."""
    rng, (first, *words) = np.random.default_rng(seed), TINY_TEXT.split()[:40]
    return [" ".join([first, *rng.permutation(words)]) for _ in range(count)]


def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, 384, size=n).astype(np.int32) for n in (5, 40, 1, 17, 33, 2)]


def random_dictionary(max_norm=1e9, **changes) -> Dictionary:
    fields = dict(d_in=D, n_features=F, k=K, max_norm=max_norm, target_max_norm=max_norm)
    start = Dictionary.initial(DictionaryConfig(**fields | changes), jax.random.key(0))
    noise = {name: 0.1 * jax.random.normal(jax.random.key(1), a.shape) for name, a in start.arrays.items()}
    return Dictionary(start.config, **{name: a + noise[name] for name, a in start.arrays.items()})


def make_stack(dictionary, mesh, steps=3, rate=RATE, scale=0.5, **settings) -> TrainStack:
    config = dictionary.config
    usual = dict(learning_rate=1.0, seed=1, k=K, l1=0.3)
    member = Member("", config.kind, config.site, config.target or config.site, usual | settings)
    scales = [SiteScale(scale, scale, np.zeros(D), config.max_norm, config.target_max_norm)]
    stack = TrainStack(TrainConfig(batch=512), config, [member], scales, 100, mesh)
    return finetuning_stack(stack, 0, steps, rate)


def encode(kind, pre_NxF) -> torch.Tensor:
    """Activations from the definition of each kind."""
    f_NxF = pre_NxF.relu()
    if kind == "standard":
        return f_NxF
    values = f_NxF if kind == "topk" else f_NxF.reshape(1, -1)
    kept = values.topk(K if kind == "topk" else K * len(f_NxF), dim=-1).indices
    return torch.zeros_like(values).scatter(-1, kept, values.gather(-1, kept)).reshape(f_NxF.shape)


def replaced_tokens(batch) -> np.ndarray:
    """The replaced tokens, counted in the order of the documents, not of the batch's rows; some of them twice."""
    ids = np.asarray(batch.ids_BxT)
    rows = [(d, next(i for i, row in enumerate(ids) if (row[: len(d)] == d).all())) for d in documents() if len(d) > 1]
    places = np.concatenate([row * ids.shape[1] + np.arange(len(d)) for d, row in rows])
    return np.array([np.flatnonzero(places == index).item() for index in np.asarray(batch.index_N)])


def reference(lm, dictionary, chosen, scale=0.5, l1=0.3) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The loss and its gradients with all tokens but sinks replaced, in float64, one unpadded document at a time."""
    model, config = source.load_torch_model(lm.source, "float32").double(), dictionary.config
    params = {
        name: torch.tensor(np.asarray(a, np.float64), requires_grad=True) for name, a in dictionary.arrays.items()
    }
    layer = model.model.layers[int(config.site[-1])]
    module, texts = (layer.mlp if config.target else layer), [d for d in documents() if len(d) > 1]
    # The values of all documents come first: BatchTopK chooses among the tokens of the whole batch.
    seen = []

    def record(module, inputs, output):
        y = output if torch.is_tensor(output) else output[0]
        seen.append((inputs[0] if config.target else y, y))

    def run(hook) -> list[torch.Tensor]:
        handle = module.register_forward_hook(hook)
        try:
            return [torch.log_softmax(model(torch.tensor(d[None].astype(np.int64))).logits[0, :-1], -1) for d in texts]
        finally:
            handle.remove()

    with torch.no_grad():
        clean = run(record)
    x, y = (torch.cat([pair[i][0] for pair in seen]) for i in (0, 1))
    inside = (x.norm(dim=-1) <= config.max_norm) & (y.norm(dim=-1) <= config.target_max_norm)
    count = int(inside.sum())
    assert sorted(chosen[:count]) == np.flatnonzero(inside).tolist() and len(chosen) < 1.04 * count
    x_s, y_s = x[chosen] * scale, y[chosen] * scale
    centre = params["b_dec_D"] if config.centred else 0.0
    f = encode(config.kind, (x_s - centre) @ params["W_enc_DxF"] + params["b_enc_F"])
    y_hat = f @ params["W_dec_FxD"] + params["b_dec_D"] + (x_s @ params["W_skip_DxD"] if config.skip else 0.0)
    whole = y.clone()
    whole[chosen[:count]] = y_hat[:count] / scale
    left = list(whole.split([len(d) for d in texts]))

    def replace(module, inputs, output):
        value = left.pop(0)[None]
        return value if torch.is_tensor(output) else (value, *output[1:])

    p, q = torch.cat(clean), torch.cat(run(replace))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    error = (y_s - y_hat).square().sum(-1).mean()
    penalty = l1 * (f.abs() * params["W_dec_FxD"].norm(dim=-1)).sum(-1).mean() if config.kind == "standard" else 0.0
    loss = 0.5 * (error + (error / kl).detach() * kl) + penalty
    loss.backward()
    terms = dict(kl=kl.item(), error=error.item(), loss=loss.item())
    return terms, {name: p.grad for name, p in params.items() if p.grad is not None}


@pytest.mark.parametrize(
    ("kind", "sites", "limit"),
    [
        ("batchtopk", SAE, 0.7),
        ("standard", SAE, 1e9),
        pytest.param("topk", TRANSCODER, 1e9, marks=pytest.mark.slow),
    ],
    ids=["sinks keep their value", "penalty", "skip transcoder"],
)
def test_loss_and_gradients_against_pytorch(lm, kind, sites, limit):
    if limit < 1:  # a share of the tokens
        norms = np.concatenate([np.linalg.norm(value, axis=-1) for value in values_of(lm, sites["site"])])
        limit = float(np.quantile(norms, limit))
    dictionary = random_dictionary(limit, kind=kind, **sites)
    stack = make_stack(dictionary, lm.mesh)
    batches = CleanBatches(stack, lm, documents())
    assert batches.per_epoch == 1
    batch, hyper = batches.clean(0), jax.tree.map(lambda leaf: leaf[0], stack.hyperparams)
    loss = functools.partial(finetune_loss, stack, batches.point, hyper=hyper, lm_params=lm.params, batch=batch)
    grads, (metrics, _) = jax.jit(jax.grad(loss, has_aux=True))(dictionary.arrays)
    terms, expected = reference(lm, dictionary, chosen := replaced_tokens(batch))
    assert metrics["tokens"] == len({*chosen.tolist()})
    for name, value in terms.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    for name, grad in expected.items():
        difference = np.abs(np.asarray(grads[name]) - grad.numpy()).max()
        assert difference < 1e-5 * np.abs(grad.numpy()).max(), name


def values_of(lm, site) -> list[np.ndarray]:
    """The values at a site of each document of two tokens or more."""
    return [np.asarray(lm([d.tolist()], capture=site, logits=False).sites[site][0]) for d in documents() if len(d) > 1]


@pytest.fixture(scope="module")
def trained(lm):
    """A dictionary on the tiny model that has begun to reconstruct, and the settings and texts of its training."""
    texts = make_texts(60)
    acts = saejax.capture(lm, texts, ["resid_post.1", "mlp_in.1", "mlp_out.1"])
    settings = dict(k=K, expansion=2, batch=256, learning_rate=3e-3, on_progress=None, mesh=lm.mesh)
    return saejax.train(acts, "resid_post.1", epochs=4, **settings), acts, settings, texts


def divergences(lm, dictionaries, texts) -> list[float]:
    """The KL divergence that each causes, from logits of whole passes."""
    tokens = lm.tokenize(texts)
    edits = [[], *([dictionary.ablate_error()] for dictionary in dictionaries)]
    clean, *changed = (log_softmax(np.asarray(lm(tokens, edits=each).logits_BxTxV, np.float64), -1) for each in edits)
    return [(np.exp(clean) * (clean - each)).sum(-1)[tokens.mask_BxT].mean() for each in changed]


@pytest.mark.slow  # that it falls at all is seen below, of a transcoder
def test_the_divergence_falls_and_further_training_lowers_it_less(lm, trained, tmp_path):
    sae, acts, settings, texts = trained
    held_out, steps = make_texts(20, seed=1), 30
    tuned = saejax.finetune(lm, sae, texts, steps=steps, learning_rate=RATE, batch=256)
    saejax.save_dictionary(tmp_path / "sae", sae)
    phase = dict(init_from=str(tmp_path / "sae"), max_steps=steps, warmup=0, decay=1.0, learning_rate=RATE)
    longer = saejax.train(acts, "resid_post.1", **settings | phase)
    before, after, without = divergences(lm, (sae, tuned.dictionary, longer), held_out)
    assert len(tuned.kl_S) == len(tuned.explained_variance_S) == steps
    assert np.mean(tuned.kl_S[-5:]) < 0.95 * np.mean(tuned.kl_S[:5])
    assert after < 0.95 * before and after < without
    assert tuned.dictionary.config == sae.config
    np.testing.assert_allclose(np.linalg.norm(tuned.dictionary.arrays["W_dec_FxD"], axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_there_is_a_new_threshold_and_nearly_the_same_on_four_devices(lm, tiny_llama, trained, devices):
    """That it gives the same bits twice is in test_finetune_stage.py."""
    _, acts, _, texts = trained
    sae = random_dictionary(acts.max_norm("resid_post.1"), kind="batchtopk", site="resid_post.1")
    tune = functools.partial(saejax.finetune, dictionary=sae, texts=texts, steps=2, learning_rate=RATE, batch=1024)
    first = tune(lm)
    if devices > 1:
        mesh = Mesh(np.array(jax.devices()[:devices]).reshape(1, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
        tuned = tune(saejax.load_model(str(tiny_llama), mesh=mesh))
        np.testing.assert_allclose(tuned.kl_S, first.kl_S, rtol=1e-4)
        for name, array in first.dictionary.arrays.items():
            np.testing.assert_allclose(tuned.dictionary.arrays[name], array, atol=2e-3, err_msg=name)
    first = first.dictionary
    assert not np.array_equal(first.arrays["threshold_F"], sae.arrays["threshold_F"])
    l0 = np.asarray(first.fires(first.encode(acts["resid_post.1"]))).sum(1).mean()
    assert l0 == pytest.approx(K, rel=0.05)


def test_a_transcoder_of_a_kind_with_a_penalty(lm):
    start, texts = random_dictionary(kind="jumprelu", **TRANSCODER | dict(skip=False)), make_texts(60)
    tuned = saejax.finetune(lm, start, texts, steps=6, learning_rate=RATE, batch=256, l0_coefficient=0.1)
    assert tuned.dictionary.config == start.config
    assert tuned.kl_S[-3:].mean() < tuned.kl_S[:3].mean()
    with pytest.raises(UserError, match="does not say with which l0_coefficient it was trained: give"):
        saejax.finetune(lm, start, texts)


def test_it_stops_where_a_loss_is_not_finite(lm, trained):
    sae, _, _, texts = trained
    with pytest.raises(UserError, match=r"is (nan|inf) at step \d of fine-tuning: lower its learning rate of 1e\+30$"):
        saejax.finetune(lm, sae, texts, steps=5, learning_rate=1e30, batch=256)


def test_it_stops_when_asked_to(lm):
    dictionary = random_dictionary(kind="topk", **SAE)
    stack, asked = make_stack(dictionary, lm.mesh, steps=9), iter([False, False, True])
    batches = CleanBatches(stack, lm, documents())
    with pytest.raises(Interrupted, match="stopped at step 2 of 9"):
        finetune_member(stack, dictionary.arrays, batches, lm.params, stopping=lambda: next(asked))


def test_every_epoch_reads_each_document_once_in_another_order(lm):
    stack = make_stack(random_dictionary(kind="topk", **SAE), lm.mesh)
    texts = [np.full(16, index, np.int32) for index in range(1, 81)]
    batches = CleanBatches(stack, lm, texts)
    epochs = [[np.asarray(batches.clean(e * batches.per_epoch + i).ids_BxT)[:, 0] for i in range(batches.per_epoch)]
              for e in range(2)]  # fmt: skip
    orders = [np.concatenate(epoch) for epoch in epochs]
    assert batches.per_epoch == 3 and all(sorted(order[order > 0]) == list(range(1, 81)) for order in orders)
    assert not np.array_equal(*orders)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        (
            dict(site="resid_post.1+resid_post.2", widths=(32, 32), scales=(1.0, 1.0)),
            {},
            "the crosscoder of resid_post",
        ),
        (dict(input_norm="layer_norm"), {}, "normalises each token"),
        (dict(d_in=32), {}, "has the width 32, but resid_post.2 of .* has 64"),
        (dict(site="resid_post.9"), {}, "resid_post.9"),
        ({}, dict(steps=0), "steps is 0: expected 1 or more"),
        ({}, dict(learning_rate=0.0), "learning_rate is 0.0: expected a number above 0"),
        ({}, dict(k=3), "takes no k among its settings"),
        ({}, dict(no_such=3), "unknown setting"),
    ],
)
def test_what_cannot_be(lm, changes, settings, message):
    dictionary = random_dictionary(**dict(kind="topk") | SAE | changes)
    with pytest.raises(UserError, match=message):
        saejax.finetune(lm, dictionary, make_texts(2), **settings)


def test_models_in_pytorch_are_refused(tiny_llama, one_device):
    in_torch = saejax.load_model(str(tiny_llama), backend="torch", mesh=one_device)
    with pytest.raises(UserError, match="runs in PyTorch, through which this loss has no gradient"):
        saejax.finetune(in_torch, random_dictionary(kind="topk", **SAE), make_texts(2))
