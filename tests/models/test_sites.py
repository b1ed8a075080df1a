"""Names of sites."""

import pytest
from test_families import LLAMA

from saejax.errors import UserError
from saejax.models.families import read_config
from saejax.models.sites import HEAD_KINDS, KINDS, Site

CONFIG = read_config(LLAMA, "config.json")


def test_names_go_there_and_back():
    for kind in (*KINDS, *HEAD_KINDS):
        site = Site.parse(f"{kind}.15")
        assert (site.kind, site.layer, str(site)) == (kind, 15, f"{kind}.15")
    assert {Site.parse("mlp_in.3"): 1}[Site("mlp_in", 3)] == 1


@pytest.mark.parametrize(
    "text", ["resid_post", "resid.3", "resid_post.", "resid_post.-1", "resid_post.1.2", "", "mlp_in.²"]
)
def test_no_such_name(text):
    with pytest.raises(UserError, match="there is no site"):
        Site.parse(text)


def test_widths():
    assert Site("attn_out", 3).width(CONFIG) == CONFIG.d_model
    assert Site("attn_z", 3).width(CONFIG) == Site("attn_q", 3).width(CONFIG) == CONFIG.n_heads * CONFIG.d_head
    assert Site("attn_k", 3).width(CONFIG) == Site("attn_v", 3).width(CONFIG) == CONFIG.n_kv_heads * CONFIG.d_head


def test_layers_end():
    with pytest.raises(UserError, match="attn_out.4: the model has 4 layers, 0 to 3"):
        Site("attn_out", 4).check(CONFIG)
