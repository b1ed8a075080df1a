"""Names of sites; values and edits at those of heads, compared with hooks on the projections of transformers."""

import dataclasses

import numpy as np
import pytest
import torch
from test_families import LLAMA
from tiny_models import save_tiny

from saejax import SiteEdit, load_model
from saejax.errors import UserError
from saejax.models import source
from saejax.models.families import read_config
from saejax.models.sites import ALL_KINDS, HEAD_KINDS, PATTERN, Site, readable_site
from saejax.models.tokens import pad

CONFIG = read_config(LLAMA, "config.json")


def test_names_go_there_and_back():
    for kind in ALL_KINDS:
        site = Site.parse(f"{kind}.15")
        assert (site.kind, site.layer, str(site)) == (kind, 15, f"{kind}.15")
    assert {Site.parse("mlp_in.3"): 1}[Site("mlp_in", 3)] == 1
    for text in ("resid_post", "resid.3", "resid_post.", "resid_post.-1", "resid_post.1.2", "", "mlp_in.²"):
        with pytest.raises(UserError, match="there is no site"):
            Site.parse(text)
    # A site has one name: values are looked up by it.
    for layer in ("05", "00", "٣", "1" * 5000):
        for kind in ("resid_post", PATTERN):
            with pytest.raises(UserError):
                readable_site(f"{kind}.{layer}")


def test_widths_and_layers():
    assert Site("attn_out", 3).width(CONFIG) == CONFIG.d_model
    assert Site("attn_z", 3).width(CONFIG) == Site("attn_q", 3).width(CONFIG) == CONFIG.n_heads * CONFIG.d_head
    assert Site("attn_k", 3).width(CONFIG) == Site("attn_v", 3).width(CONFIG) == CONFIG.n_kv_heads * CONFIG.d_head
    assert Site("mlp_act", 3).width(CONFIG) == CONFIG.d_mlp
    with pytest.raises(UserError, match="no site mlp_act.3: a router sends each token to 2 of 5 MLPs"):
        Site("mlp_act", 3).check(dataclasses.replace(CONFIG, n_experts=5, experts_per_token=2))
    with pytest.raises(UserError, match="embed.0 is named resid_pre.0 here"):
        Site.parse("embed.0")
    with pytest.raises(UserError, match="attn_out.4: the model has 4 layers, 0 to 3"):
        Site("attn_out", 4).check(CONFIG)


LAYER = 1


def projections(model, family):
    """The layer's modules that project to queries, keys and values (GPT-2 has one), and the output projection."""
    if family == "gpt2":
        attention = model.transformer.h[LAYER].attn
        return [attention.c_attn], attention.c_proj
    attention = model.model.layers[LAYER].self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj], attention.o_proj


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3"])
def test_head_sites_equal_those_of_transformers(family, one_device, tmp_path):
    save_tiny(tmp_path, family)
    lm = load_model(str(tmp_path), mesh=one_device)
    model = source.load_torch_model(lm.source, "float32")
    ids_BxT = np.random.default_rng(0).integers(1, 131, (2, 16))
    inputs, output = projections(model, family)
    seen = []
    for module in inputs:
        module.register_forward_hook(lambda _, args, value: seen.append(value))
    output.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(torch.tensor(ids_BxT))
    if family == "gpt2":
        seen = [*torch.split(seen[0], seen[0].shape[-1] // 3, dim=-1), seen[1]]
    sites = lm(pad(ids_BxT.tolist()), capture=[f"{kind}.{LAYER}" for kind in HEAD_KINDS]).sites
    for value, (name, found) in zip(seen, sites.items(), strict=True):
        assert value.shape == found.shape and Site.parse(name).width(lm.config) == found.shape[-1], name
        np.testing.assert_allclose(found, value, atol=2e-5 * float(value.abs().max()), err_msg=name)

    patched = np.random.default_rng(1).standard_normal(seen[3].shape).astype(np.float32)
    output.register_forward_pre_hook(lambda _, args: (torch.tensor(patched), *args[1:]))
    with torch.no_grad():
        expected = model(torch.tensor(ids_BxT)).logits.numpy()
    logits = lm(pad(ids_BxT.tolist()), edits=[SiteEdit.patch(f"attn_z.{LAYER}", patched)]).logits_BxTxV
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())
