"""The torch backend: values against plain forward passes of single documents, and what it leaves unrun."""

import shutil

import numpy as np
import pytest
import torch
from capture_setup import (
    ALL_SITES,
    check_against_plain_forward,
    relative_error,
)

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


@pytest.mark.parametrize(("site", "unused"), [("resid_post.2", "layers.3"), ("mlp_in.2", "layers.2.mlp")])
def test_nothing_after_the_last_site_is_run(setup, captured, tiny_llama, tmp_path, site, unused):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(tiny_llama, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    poisoned = [name for name in weights if any(part in name for part in (unused, "layers.3", "model.norm", "lm_head"))]
    assert len(poisoned) > 3
    for name in poisoned:
        weights[name] = np.full_like(weights[name], 1e30)  # overflows where it is multiplied
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata=dict(format="pt"))
    store, _ = setup.capture("poisoned", model=tmp_path / "model", sites=(site,))
    rows = np.arange(store.manifest.rows)
    assert relative_error(store.read(site, rows), captured[0].read(site, rows)) < 1e-5


def test_layers_after_the_last_site_are_dropped(setup):
    model = source.load_torch_model(source.resolve(ModelConfig(path=str(setup.model))), "float32")
    torch_capture.SiteReader(model, [Site("resid_post", 1), Site("mlp_in", 2)])
    assert len(model.model.layers) == 3
