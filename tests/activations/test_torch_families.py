"""Every family's sites, read by hooks from tiny random models, against hidden states, inner products and each other."""

import numpy as np
import pytest
import torch
from capture_setup import relative_error
from tiny_models import save_tiny
from torch_sites import MODULES
from transformers import AutoModelForCausalLM

from saejax.activations.plan import Batch
from saejax.activations.torch_capture import SiteReader
from saejax.models.sites import KINDS, Site

LENGTHS = (9, 4)  # longer than the sliding windows; the second document is padded
MODELS = {
    "gpt2": {},
    "gpt_neox": {},
    "gpt_neox, not parallel": dict(use_parallel_residual=False),
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma3": {},
    "phi": dict(partial_rotary_factor=0.4),
    "llama": dict(attention_bias=True, mlp_bias=True),
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
}
# The innermost products of a layer: what attention gives before it is normed or added, what the MLP reads and gives.
INNER = {
    "gpt2": ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "phi": ("self_attn.dense", "mlp.fc1", "mlp.fc2"),
}
OTHERS = ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(params=MODELS)
def model(request, tmp_path):
    """``model()`` loads a tiny random model; its family."""
    family = request.param.partition(",")[0]
    save_tiny(tmp_path, family, **MODELS[request.param])
    return lambda: AutoModelForCausalLM.from_pretrained(tmp_path).eval(), family


def make_batch() -> Batch:
    ids_BxT = np.random.default_rng(0).integers(4, 131, (len(LENGTHS), max(LENGTHS))).astype(np.int32)
    for row, length in zip(ids_BxT, LENGTHS, strict=True):
        row[length:] = 0
    stop_B = np.array(LENGTHS)
    return Batch(ids_BxT, np.arange(len(LENGTHS)), np.zeros_like(stop_B), stop_B, tuple(map(np.arange, LENGTHS)))


def read(model, sites, batch) -> dict[Site, np.ndarray]:
    """Values at sites, in the order in which they came."""
    values = {}
    SiteReader(model, sites).read([batch], lambda _, site, value: values.update({site: value.copy()}))
    return values


def inside(model, family, ids) -> list[dict[str, np.ndarray]]:
    """Of every layer, for one document without padding: the stream that enters it and its innermost products."""
    layers = model.get_submodule(MODULES[family].layers)
    found = [{} for _ in layers]
    attended, mlp_in, mlp_out = INNER.get(family, OTHERS)
    for values, layer in zip(found, layers, strict=True):
        for name, path, before in (("attn", attended, False), ("mlp_in", mlp_in, True), ("mlp", mlp_out, False)):
            layer.get_submodule(path).register_forward_hook(
                lambda module, args, output, values=values, name=name, before=before: values.update(
                    {name: (args[0] if before else output)[0].numpy()}
                )
            )
    with torch.no_grad():
        stream = model(torch.tensor(ids[None].astype(np.int64)), output_hidden_states=True).hidden_states
    for values, entering in zip(found, stream[:-1], strict=True):  # the last one is normed
        values["resid_pre"] = entering[0].numpy()
    return found


def test_every_site_of_every_family(model):
    load, family = model
    batch, layers = make_batch(), len(load().get_submodule(MODULES[family].layers))
    sites = [Site(kind, layer) for kind in reversed(KINDS) for layer in range(layers)]
    found = read(load(), sites, batch)
    assert set(found) == set(sites)
    post_norms = MODULES[family].attn_out != INNER.get(family, OTHERS)[0].partition(".")[0]
    for row, length in enumerate(LENGTHS):
        expected = inside(load(), family, batch.ids_BxT[row, :length])
        for layer, inner in enumerate(expected):
            at = {kind: found[Site(kind, layer)][row, :length].astype(np.float64) for kind in KINDS}
            assert relative_error(at["resid_pre"], inner["resid_pre"]) < 1e-5
            if layer:
                assert relative_error(at["resid_pre"], found[Site("resid_post", layer - 1)][row, :length]) == 0
            assert relative_error(at["mlp_in"], inner["mlp_in"]) < 1e-5
            assert relative_error(at["resid_pre"] + at["attn_out"], at["resid_mid"]) < 1e-5
            assert relative_error(at["resid_mid"] + at["mlp_out"], at["resid_post"]) < 1e-5
            for site, product in (("attn_out", "attn"), ("mlp_out", "mlp")):
                assert (relative_error(at[site], inner[product]) < 1e-5) == (not post_norms), (site, layer)


def test_a_pass_ends_after_its_last_site(model):
    load, family = model
    whole = read(load(), [Site("resid_mid", 1), Site("resid_post", 2)], make_batch())
    cut = load()
    reader = SiteReader(cut, [Site("resid_mid", 1)])
    layers = cut.get_submodule(MODULES[family].layers)
    assert len(layers) == 2
    layers[1].get_submodule(MODULES[family].mlp).register_forward_pre_hook(lambda *args: pytest.fail("the MLP was run"))
    values = {}
    reader.read([make_batch()] * 2, lambda _, site, value: values.update({site: value}))
    np.testing.assert_array_equal(values[Site("resid_mid", 1)], whole[Site("resid_mid", 1)])
