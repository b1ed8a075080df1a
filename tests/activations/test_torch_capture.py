"""The torch backend: values against plain forward passes of single documents, and what it leaves unrun."""

import numpy as np
import pytest
import torch
from capture_setup import ALL_SITES, check_against_plain_forward, relative_error

from saejax.activations import torch_capture
from saejax.models import source
from saejax.models.sites import Site
from saejax.settings import ModelConfig


def test_every_site_equals_a_plain_forward_pass(captured, torch_model):
    store, _ = captured
    assert store.sites == ALL_SITES
    check_against_plain_forward(store, torch_model, 1e-5)


def test_the_model_can_run_in_bfloat16(setup):
    store, _ = setup.capture("bfloat16", dtype="bfloat16", sites=("resid_post.2", "attn_out.1"))
    model = source.load_torch_model(source.resolve(ModelConfig(path=str(setup.model))), "bfloat16")
    check_against_plain_forward(store, model, 0.03)
    values = store.read("resid_post.2", np.arange(100))
    assert np.array_equal(values, torch.tensor(values).to(torch.bfloat16).float().numpy())  # not run in fp32


@pytest.mark.parametrize(("site", "unused"), [("resid_post.2", "layers.3"), ("mlp_in.2", "layers.2.mlp.act_fn")])
def test_nothing_after_the_last_site_is_run(setup, captured, monkeypatch, site, unused):
    load, guarded = source.load_torch_model, []

    def refuse(module, args):
        # Passes on up to 8 tokens look for the sites; they run all of the model.
        assert args[0].shape[-2] <= 8, f"{type(module).__name__} was run"

    def load_guarded(*args, **kwargs):
        model = load(*args, **kwargs)
        for name, module in model.named_modules():
            if any(part in name for part in (unused, "layers.3", "model.norm", "lm_head")):
                module.register_forward_pre_hook(refuse)
                guarded.append(name)
        return model

    monkeypatch.setattr(source, "load_torch_model", load_guarded)
    store, _ = setup.capture("guarded", sites=(site,))
    assert len(guarded) > 3
    rows = np.arange(store.manifest.rows)
    assert relative_error(store.read(site, rows), captured[0].read(site, rows)) < 1e-5


def test_layers_after_the_last_site_are_dropped(setup):
    model = source.load_torch_model(source.resolve(ModelConfig(path=str(setup.model))), "float32")
    torch_capture.SiteReader(model, [Site("resid_post", 1), Site("mlp_in", 2)])
    assert len(model.model.layers) == 3
