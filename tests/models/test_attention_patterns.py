"""Attention patterns that runs return and readouts take, beside those of transformers, and under edits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_models import save_tiny

from saejax import SiteEdit, load_model
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.errors import UserError
from saejax.models import language_model, source
from saejax.models.sites import PATTERN, Site
from saejax.models.split import Readout, SharedPrefixBatch, SplitPoint
from saejax.models.tokens import pad

FAMILIES = ["gpt2", "gemma3_text", "gpt_oss"]


def fast_in(family):
    """Of a test whose patterns another one compares in all families."""
    params = [pytest.param(name, marks=() if name == family else pytest.mark.slow) for name in FAMILIES]
    return pytest.mark.parametrize("models", params, indirect=True)


# Groups of heads and windows are in gpt_oss, too, with its sinks.
@pytest.fixture(scope="module", params=["gpt2", pytest.param("gemma3_text", marks=pytest.mark.slow), "gpt_oss"])
def models(request, tmp_path_factory, one_device):
    """A model of a family in JAX and in transformers: plain heads; groups of heads and windows; sinks of heads."""
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(folder, request.param)
    lm = load_model(str(folder), mesh=one_device)
    model = source.load_torch_model(lm.source, "float32")
    model.set_attn_implementation("eager")
    return lm, model


@pytest.fixture(scope="module")
def ids_BxT(models):
    return np.random.default_rng(0).integers(1, 120, (2, 21))


def names(lm):
    return [f"attn_pattern.{layer}" for layer in range(lm.config.n_layers)]


def theirs(model, ids_BxT):
    with torch.no_grad():
        return [pattern.numpy() for pattern in model(torch.tensor(ids_BxT), output_attentions=True).attentions]


def test_patterns_are_those_of_transformers(models, ids_BxT, monkeypatch):
    lm, model = models
    output = lm(pad(ids_BxT.tolist()), capture=["resid_post.1", *names(lm)[::-1]])
    expected = theirs(model, ids_BxT)
    for layer, pattern_BxHxTxT in enumerate(expected):
        found_BxHxTxT = output.sites[f"attn_pattern.{layer}"]
        assert found_BxHxTxT.shape == (2, lm.config.n_heads, 21, 21) and found_BxHxTxT.dtype == np.float32
        np.testing.assert_allclose(found_BxHxTxT, pattern_BxHxTxT, atol=2e-5)
    if lm.config.sliding_window:
        far = np.arange(21)[:, None] - np.arange(21)[None, :] >= lm.config.sliding_window
        by_layer = [bool((np.asarray(output.sites[name])[..., far] > 0).any()) for name in names(lm)]
        assert by_layer == [not slides for slides in lm.config.sliding_layers]
    plain = lm(pad(ids_BxT.tolist()), capture="resid_post.1")
    np.testing.assert_allclose(output.sites["resid_post.1"], plain.sites["resid_post.1"], atol=1e-5)
    # Many layers go through one loop.
    monkeypatch.setattr(language_model, "_UNROLLED", 0)
    many = lm(pad(ids_BxT.tolist()), capture=[*names(lm), "resid_pre.0"], logits=False)  # traced here alone
    for layer, pattern_BxHxTxT in enumerate(expected):
        np.testing.assert_allclose(many.sites[f"attn_pattern.{layer}"], pattern_BxHxTxT, atol=2e-5)


def test_prompts_of_several_lengths_have_their_own_patterns(models, ids_BxT):
    lm, _ = models
    prompts = [ids_BxT[0].tolist(), ids_BxT[1, :6].tolist()]
    together = lm(pad(prompts), capture="attn_pattern.1", logits=False).sites["attn_pattern.1"]
    alone = lm(pad(prompts[1:]), capture="attn_pattern.1", logits=False).sites["attn_pattern.1"]
    assert alone.shape == (1, lm.config.n_heads, 6, 6)
    np.testing.assert_allclose(together[1:, :, :6, :6], alone, atol=1e-6)
    assert not np.any(np.asarray(together)[1, :, :6, 6:])


@fast_in("gpt2")
def test_edits_of_features_and_sites_reach_later_patterns(models, ids_BxT):
    """The value that an ablation leaves at a site is put there in transformers, too."""
    lm, model = models
    config = DictionaryConfig("standard", "resid_post.0", "", lm.config.d_model, 24, max_norm=1e4, target_max_norm=1e4)
    sae, tokens = Dictionary.initial(config, jax.random.key(0)), pad(ids_BxT.tolist())
    clean = lm(tokens, capture=names(lm)).sites
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    for edit in (sae.ablate(list(range(24))), sae.steer([3], 20.0)):
        edited = lm(tokens, capture=["resid_post.0", *names(lm)], edits=[edit]).sites
        value = torch.tensor(np.array(edited["resid_post.0"]))
        handle = layers[0].register_forward_hook(
            lambda _, args, output, value=value: (value, *output[1:]) if isinstance(output, tuple) else value
        )
        expected = theirs(model, ids_BxT)
        handle.remove()
        np.testing.assert_array_equal(edited["attn_pattern.0"], clean["attn_pattern.0"])
        for layer in range(1, lm.config.n_layers):
            np.testing.assert_allclose(edited[f"attn_pattern.{layer}"], expected[layer], atol=2e-5)
        assert np.abs(edited["attn_pattern.1"] - clean["attn_pattern.1"]).max() > 1e-3
    # Without queries all scores are 0: attention is spread over the tokens that a query sees.
    edited = lm(tokens, capture="attn_pattern.1", edits=[SiteEdit.ablate("attn_q.1")]).sites["attn_pattern.1"]
    if lm.config.family == "gpt2":
        seen_TxT = np.tri(21)
        even_TxT = seen_TxT / seen_TxT.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(edited, np.broadcast_to(even_TxT, edited.shape), atol=1e-6)


@fast_in("gpt_oss")  # with groups, windows and sinks
def test_readouts_get_the_patterns_of_edited_rows(models, ids_BxT):
    """Of rows that are run from their first changed token on, and of whole prompts, at the last three tokens."""
    lm, model = models
    site, layers, last_B = Site("resid_post", 0), tuple(range(1, lm.config.n_layers)), np.array([20, 16])
    readout = Readout((lambda output: output.logits[:, 0, 0],), 3, layers)
    point = SplitPoint(lm.config, site, site, lm.mesh, readout=readout)
    change_BxTxD = np.random.default_rng(1).normal(size=(*ids_BxT.shape, lm.config.d_model)).astype(np.float32)
    change_BxTxD[0, :9] = change_BxTxD[1, :5] = 0

    @jax.jit
    def run():
        stream, value, _ = point.run_prefix(lm.params, ids_BxT)
        _, past = point.run_suffix_with_kv(lm.params, stream, value)
        edited = value + change_BxTxD
        found = []
        for first_B, length in (([9, 5], 12), ([0, 0], 21)):
            tree = SharedPrefixBatch.unshared(jnp.arange(2), jnp.array(first_B), length, 1)
            end_1xE = np.array([[b * length + last_B[b] - first_B[b] - c for b in (0, 1) for c in (2, 1, 0)]])
            found.append(point.run_shared_ends(lm.params, past, tree, tree.take(stream), tree.take(edited), end_1xE))
        return edited, *found

    edited_BxTxD, *found = run()
    block = (model.transformer.h if hasattr(model, "transformer") else model.model.layers)[0]
    value = torch.tensor(np.array(edited_BxTxD))
    handle = block.register_forward_hook(
        lambda _, args, output: (value, *output[1:]) if isinstance(output, tuple) else value
    )
    expected = theirs(model, ids_BxT)
    handle.remove()
    for ends in found:
        for pattern_BxHxCxT, expected_BxHxTxT in zip(ends.pattern_LxRxHxCxT, expected[1:], strict=True):
            for b, last in enumerate(last_B):
                wanted = expected_BxHxTxT[b, :, last - 2 : last + 1]
                np.testing.assert_allclose(pattern_BxHxCxT[b], wanted, atol=2e-5)


def test_patterns_are_read_only(models, ids_BxT):
    lm, _ = models
    tokens = pad(ids_BxT.tolist())
    with pytest.raises(UserError, match="attn_pattern.1 is the attention of each head, .* nothing edits"):
        SiteEdit.ablate("attn_pattern.1")
    with pytest.raises(UserError, match="attn_pattern.1 is the attention of each head, .* nothing edits"):
        lm(tokens, edits=[SiteEdit.ablate(Site(PATTERN, 1))])
    for name in ("attn_pattern.05", "attn_pattern.-1", "attn_pattern.all", "attn_pattern"):
        with pytest.raises(UserError, match=f"the site '{name}' names no layer: expected attn_pattern, a dot"):
            lm(tokens, capture=name)
    with pytest.raises(UserError, match="attn_pattern.9: the model has"):
        lm(tokens, capture="attn_pattern.9")
    in_torch = load_model(str(lm.source.folder), backend="torch")
    with pytest.raises(UserError, match="attn_pattern.1 cannot be read .* runs in PyTorch"):
        in_torch(tokens, capture="attn_pattern.1")
    site = Site("resid_post", 0)
    point = SplitPoint(in_torch.config, site, site, in_torch.mesh, readout=Readout((jnp.sum,), layers=(1,)))
    with pytest.raises(UserError, match="runs in PyTorch, .* attention patterns are not available"):
        point.least_tokens()
