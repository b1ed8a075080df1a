"""Cross-entropies and KL divergences against transformers' own losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from saejax import load_model
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.evaluation import programs
from saejax.evaluation.loss_recovered import recovered, stand_in_losses
from saejax.models import source


@pytest.fixture(scope="module")
def model(lm):
    """The same weights in PyTorch, fp64."""
    return source.load_torch_model(lm.source, "float32").double()


def identity(lm) -> Dictionary:
    """A dictionary that rebuilds its input: every direction and its opposite."""
    d = lm.config.d_model
    config = DictionaryConfig(kind="standard", site="resid_post.2", d_in=d, n_features=2 * d, max_norm=1e9)
    both = jnp.concatenate([jnp.eye(d), -jnp.eye(d)])
    return Dictionary(config, W_enc_DxF=both.T, b_enc_F=jnp.zeros(2 * d), W_dec_FxD=both, b_dec_D=jnp.zeros(d))


def random_dictionary(lm, seed=0, **changes) -> Dictionary:
    fields = dict(kind="topk", site="resid_post.2", d_in=lm.config.d_model, n_features=96, k=8, max_norm=1e9)
    start = Dictionary.initial(DictionaryConfig(**fields | changes), jax.random.key(seed))
    noise = {name: 0.1 * jax.random.normal(jax.random.key(seed + 1), a.shape) for name, a in start.arrays.items()}
    return Dictionary(start.config, **{name: a + noise[name] for name, a in start.arrays.items()})


def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, 384, size=n).astype(np.int32) for n in (5, 40, 1, 17, 33, 2)]


def log_probabilities(model, hooks=()) -> list[torch.Tensor]:
    """Of each predicted token's distribution, one unpadded document at a time, with forward hooks in place."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        with torch.no_grad():
            ids = [torch.tensor(d[None].astype(np.int64)) for d in documents() if len(d) > 1]
            return [torch.log_softmax(model(i).logits[0, :-1].double(), -1) for i in ids]
    finally:
        for handle in handles:
            handle.remove()


def change_stream(model, change):
    """A hook that changes what layer 2 gives out."""

    def hook(module, inputs, output):
        return change(output) if torch.is_tensor(output) else (change(output[0]), *output[1:])

    return [(model.model.layers[2], hook)]


def ce_and_kl(clean, edited) -> tuple[float, float]:
    next_ids = torch.cat([torch.tensor(d[1:].astype(np.int64)) for d in documents() if len(d) > 1])
    p, q = torch.cat(clean), torch.cat(edited)
    ce = -q[torch.arange(len(q)), next_ids].mean()
    return float(ce), float((p.exp() * (p - q)).sum(-1).mean())


def as_torch(function):
    """A function of arrays as one of tensors."""
    return lambda x: torch.tensor(np.asarray(function(jnp.asarray(x.numpy(), jnp.float32)), np.float64))


@pytest.mark.parametrize(
    ("batch_tokens", "devices"),
    [*(pytest.param(count, 1, marks=pytest.mark.slow) for count in (64, 4096)), (64, 8)],  # of several batches
)
def test_every_variant_against_transformers(lm, model, tiny_llama, batch_tokens, devices):
    placed = lm if devices == 1 else load_model(str(tiny_llama))
    mean = np.random.default_rng(1).normal(size=64).astype(np.float32)
    dictionary = random_dictionary(lm)
    (losses,) = stand_in_losses(placed, [dictionary], documents(), mean, batch_tokens)
    assert losses.tokens == 4 + 39 + 16 + 32 + 1
    clean = log_probabilities(model)
    changes = dict(
        clean=lambda x: x,
        mean_ablated=lambda x: torch.tensor(mean, dtype=x.dtype).expand_as(x),
        zero_ablated=torch.zeros_like,
        reconstructed=as_torch(dictionary),
    )
    for name, change in changes.items():
        ce, kl = ce_and_kl(clean, log_probabilities(model, change_stream(model, change)))
        np.testing.assert_allclose(losses.ce[name], ce, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(losses.kl[name], kl, rtol=1e-4, atol=1e-6, err_msg=name)
    assert losses.kl["clean"] == 0


def test_a_perfect_stand_in_recovers_everything_in_bfloat16_nearly(lm, tiny_llama, one_device):
    low = load_model(str(tiny_llama), dtype="bfloat16", mesh=one_device)
    full, rounded = (stand_in_losses(each, [identity(lm)], documents(), np.zeros(64))[0] for each in (lm, low))
    np.testing.assert_allclose(full.ce["reconstructed"], full.ce["clean"], rtol=1e-6)
    np.testing.assert_allclose(recovered(full.kl, "mean_ablated"), 1, rtol=1e-5)
    assert 0 <= full.kl["reconstructed"] < 1e-6 and rounded.kl["reconstructed"] < 0.01
    np.testing.assert_allclose(rounded.ce["clean"], full.ce["clean"], rtol=0.03)


@pytest.mark.parametrize("has_sinks", [False, True])
def test_a_transcoders_prediction_replaces_its_target_but_for_sinks(lm, model, has_sinks):
    mlp, norms = model.model.layers[1].mlp, []
    log_probabilities(model, [(mlp, lambda module, inputs, output: norms.append(output.norm(dim=-1).flatten()))])
    limit = float(torch.cat(norms).quantile(0.7)) if has_sinks else 1e9
    sites = dict(site="mlp_in.1", target="mlp_out.1", target_max_norm=limit)
    transcoder = random_dictionary(lm, centred=False, skip=True, **sites)
    mean = np.random.default_rng(1).normal(size=64).astype(np.float32)
    (losses,) = stand_in_losses(lm, [transcoder], documents(), mean)
    predict = as_torch(transcoder)
    clean = log_probabilities(model)
    for name, stand_in in (
        ("reconstructed", lambda x, y: predict(x)),
        ("mean_ablated", lambda x, y: torch.tensor(mean, dtype=y.dtype).expand_as(y)),
        ("zero_ablated", lambda x, y: torch.zeros_like(y)),
    ):

        def hook(module, inputs, output, stand_in=stand_in):
            return torch.where(output.norm(dim=-1, keepdim=True) <= limit, stand_in(inputs[0], output), output)

        ce, kl = ce_and_kl(clean, log_probabilities(model, [(mlp, hook)]))
        np.testing.assert_allclose(losses.ce[name], ce, rtol=1e-5)
        np.testing.assert_allclose(losses.kl[name], kl, rtol=1e-4)


def test_members_are_scored_as_they_are_alone_by_one_program(lm):
    sizes = ((0, 4), (5, 8), (9, 30))
    stack = [random_dictionary(lm, seed, k=k, n_features=88) for seed, k in sizes]  # as no other test has
    before = programs.stand_in._cache_size()
    together = stand_in_losses(lm, stack, documents(), np.zeros(64, np.float32))
    assert programs.stand_in._cache_size() == before + 1
    alone = [stand_in_losses(lm, [member], documents(), np.zeros(64, np.float32))[0] for member in stack]
    for single, stacked in zip(alone, together, strict=True):
        np.testing.assert_allclose(list(single.ce.values()), list(stacked.ce.values()), rtol=1e-6)
        np.testing.assert_allclose(list(single.kl.values()), list(stacked.kl.values()), rtol=1e-5, atol=1e-7)
    assert len({losses.ce["reconstructed"] for losses in together}) == 3


def test_members_of_different_sites_are_not_scored_together(lm):
    stack = [random_dictionary(lm), random_dictionary(lm, site="resid_post.1")]
    with pytest.raises(ValueError, match="one site, target and sink rule"):
        stand_in_losses(lm, stack, documents(), np.zeros(64))


# Statement 7 of WORKSPACE.md, what must hold.
def test_sinks_keep_their_value(lm, model):
    limit = 8.0
    whole, limited = (random_dictionary(lm, max_norm=norm) for norm in (1e9, limit))
    (losses,) = stand_in_losses(lm, [limited], documents(), np.zeros(64, np.float32))
    clean = log_probabilities(model)
    for name, stand_in in dict(zero_ablated=torch.zeros_like, reconstructed=as_torch(whole)).items():

        def change(x, stand_in=stand_in):
            return torch.where(x.norm(dim=-1, keepdim=True) <= limit, stand_in(x), x)

        ce, kl = ce_and_kl(clean, log_probabilities(model, change_stream(model, change)))
        np.testing.assert_allclose([losses.ce[name], losses.kl[name]], [ce, kl], rtol=1e-4)
        everything, _ = ce_and_kl(clean, log_probabilities(model, change_stream(model, stand_in)))
        assert abs(losses.ce[name] - everything) > 1e-3, "the limit must leave some positions as they are"


def test_worse_than_the_floor_is_below_zero_and_nothing_to_recover_is_none():
    assert recovered(dict(clean=2.0, mean_ablated=6.0, reconstructed=7.0), "mean_ablated") == -0.25
    for harmless in (2.9, 3.0, 3.0 + 3e-8):
        assert recovered(dict(clean=3.0, mean_ablated=harmless, reconstructed=3.1), "mean_ablated") is None


def test_no_document_predicts_anything(lm):
    (losses,) = stand_in_losses(lm, [identity(lm)], [np.array([3], np.int32)], np.zeros(64))
    assert losses.tokens == 0 and recovered(losses.ce, "mean_ablated") is None
