"""Where transformers models of many layouts have their sites, against what their layers take, return and add."""

import json
import re

import numpy as np
import pytest
import torch
from tiny_models import OTHER_FIELDS, make_tiny
from torch_sites import relative_error

from saejax.dictionaries.formats import hooks
from saejax.errors import UserError
from saejax.models.sites import KINDS, ModuleSite, Site
from saejax.models.torch_hooks import HookedModel

IDS_BxT = np.random.default_rng(0).integers(1, 131, (2, 9)).astype(np.int32)
ROTARY = {name: OTHER_FIELDS["olmo"][name] for name in OTHER_FIELDS["olmo"]}
LAYOUTS = OTHER_FIELDS | {
    "mpt": dict(vocab_size=131, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    "granite": ROTARY | dict(residual_multiplier=0.22),
    "olmo2": ROTARY,
    "cohere": ROTARY,
    "glm4": ROTARY | dict(head_dim=12),
}
# The last projection of an MLP; None: a mixture of experts has several.
PROJECTIONS = dict(gptj="mlp.fc_out", bloom="mlp.dense_4h_to_h", falcon="mlp.dense_4h_to_h", opt="fc2", mixtral=None)
PROJECTIONS |= dict(mpt="ffn.down_proj")
# Sites that modules are read as, where not all three are: no module gives what is added, or it has another name.
READ = dict(mpt=(), granite=("resid_post",), bloom=("resid_post",), falcon=("resid_post", "mlp_out"))
READ |= dict(opt=("resid_post", "attn_out"), mixtral=("resid_post", "attn_out"), qwen3_5_text=("resid_post", "mlp_out"))


def values_at(model: HookedModel, sites, put=None) -> tuple[dict, torch.Tensor]:
    """Values at sites, and the logits; ``put`` gives other values for some of them."""
    values = {}

    def visit(site, value):
        values[site] = value.clone()
        return (put or {}).get(site, value)

    with torch.no_grad():
        return values, model.run(IDS_BxT, None, sites, visit).logits


@pytest.mark.parametrize("family", LAYOUTS)
def test_sites_of_a_layout(family):
    model = HookedModel(make_tiny(family, LAYOUTS[family]))
    sites = [Site(kind, 1) for kind in KINDS]
    at, logits = values_at(model, sites)
    plain = model.model(torch.tensor(IDS_BxT.astype(np.int64)), output_hidden_states=True)
    pre, attn_out, mid, mlp_in, mlp_out, post = (at[site] for site in sites)
    # A pass with gradients and one without may take other kernels: the same to rounding.
    assert relative_error(logits, plain.logits.detach()) < 1e-5
    assert relative_error(pre, plain.hidden_states[1].detach()) < 1e-5
    torch.testing.assert_close(mid, pre + attn_out)
    torch.testing.assert_close(post, mid + mlp_out, rtol=1e-5, atol=1e-5)
    assert mlp_in.shape == mlp_out.shape and attn_out.abs().max() > 1e-2 and mlp_out.abs().max() > 1e-2
    # With nothing added by attention and the MLP, a layer hands on its stream, and so does one that is skipped.
    nothing = dict.fromkeys((Site("attn_out", 1), Site("mlp_out", 1)), torch.zeros_like(pre))
    changed, _ = values_at(model, sites, nothing)
    torch.testing.assert_close(changed[Site("resid_post", 1)], pre, rtol=1e-5, atol=1e-5)
    moved, _ = values_at(model, sites, {Site("resid_mid", 1): pre, Site("mlp_out", 1): torch.zeros_like(pre)})
    torch.testing.assert_close(moved[Site("resid_post", 1)], pre, rtol=1e-5, atol=1e-5)
    with model.skipping(2):
        skipped, _ = values_at(model, [Site("resid_pre", 0), Site("resid_post", 1)])
    assert torch.equal(*skipped.values())


@pytest.mark.parametrize("family", [*LAYOUTS, "flex_olmo", "exaone4", "gemma2", "afmoe"])
def test_modules_that_are_read_as_sites_have_their_values(family, tmp_path):
    """By a model's type: in many what is added to the stream is a norm, a multiple or a part of the MLP's output."""
    model = HookedModel(make_tiny(family, LAYOUTS.get(family, ROTARY)))
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type=family)))
    sites = {name: hooks.to_site(name, str(tmp_path)) for name in model._modules if re.search(r"\.1(\.\w+)?$", name)}
    sites = {name: Site.parse(site) for name, site in sites.items() if not site.startswith("module:")}
    assert {site.kind for site in sites.values()} >= set(READ.get(family, ("resid_post", "attn_out", "mlp_out")))
    by_module, _ = values_at(model, list(map(ModuleSite, sites)))
    by_site, _ = values_at(model, list(sites.values()))
    for name, site in sites.items():
        torch.testing.assert_close(by_module[ModuleSite(name)], by_site[site], msg=name)


@pytest.mark.parametrize("family", LAYOUTS)
def test_hidden_activations_of_the_mlp_of_a_layout(family):
    """Their values are the last projection's input; without them the MLP adds that projection's bias."""
    model, site = HookedModel(make_tiny(family, LAYOUTS[family])), Site("mlp_act", 1)
    path = PROJECTIONS.get(family, "mlp.down_proj")
    if path is None:
        with pytest.raises(UserError, match=r"the site mlp_act.1 cannot be resolved in MixtralForCausalLM"):
            model.check(site)
        return
    model.check(site)  # with passes of its own
    projection = model._layers[1].get_submodule(path)
    read = []
    handle = projection.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    at, _ = values_at(model, [site])
    handle.remove()
    assert torch.equal(at[site].reshape(-1), read[0].reshape(-1)) and at[site].shape[:2] == IDS_BxT.shape
    silent, _ = values_at(model, [site, Site("mlp_out", 1)], {site: torch.zeros_like(at[site])})
    added, bias = silent[Site("mlp_out", 1)], getattr(projection, "bias", None)
    expected = torch.zeros_like(added) if bias is None else bias.detach().expand(added.shape)
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-5)


def test_an_encoder_is_refused():
    """transformers has a class for it among the causal language models."""
    fields = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=131)
    for last_layer in (None, 0):
        with pytest.raises(UserError, match="BertLMHeadModel attends to later tokens, as encoders do: expected a"):
            HookedModel(make_tiny("bert", fields), last_layer)
        HookedModel(make_tiny("bert", fields | dict(is_decoder=True)), last_layer)


def test_a_layout_that_is_not_understood_asks_for_a_module():
    model = HookedModel(make_tiny("mamba", dict(vocab_size=131, hidden_size=16, state_size=4, num_hidden_layers=2)))
    model.check(Site("resid_post", 1))
    for kind in ("attn_out", "resid_mid", "mlp_in", "mlp_act", "mlp_out"):
        with pytest.raises(UserError, match=rf"^the site {kind}.1 .* name a module .*module:backbone.layers.1.<path>$"):
            model.check(Site(kind, 1))
    model.check(ModuleSite("backbone.layers.1.mixer"))
