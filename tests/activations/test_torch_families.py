"""Every family's sites, read by hooks from tiny random models in a padded batch, against single documents' modules."""

import numpy as np
import pytest
from tiny_models import save_tiny
from torch_sites import MODULES, relative_error, run_torch
from transformers import AutoModelForCausalLM

from saejax.activations.plan import Batch
from saejax.activations.torch_capture import SiteReader
from saejax.models.sites import KINDS, NEURONS, Site

LENGTHS = (9, 4)  # longer than the sliding windows; the second document is padded
CHANGES = {
    "gpt_neox, not parallel": dict(use_parallel_residual=False),
    "phi": dict(partial_rotary_factor=0.4),
    "llama": dict(attention_bias=True, mlp_bias=True),
}


def make_batch() -> Batch:
    ids_BxT = np.random.default_rng(0).integers(4, 131, (len(LENGTHS), max(LENGTHS))).astype(np.int32)
    for row, length in zip(ids_BxT, LENGTHS, strict=True):
        row[length:] = 0
    stop_B = np.array(LENGTHS)
    rows_B = tuple(map(np.arange, LENGTHS))
    return Batch(ids_BxT, np.arange(len(LENGTHS)), np.zeros_like(stop_B), stop_B, rows_B, stop_B > 0, ids_BxT.shape)


def read(reader: SiteReader) -> dict[Site, np.ndarray]:
    """Values at a reader's sites, of the second of two equal batches."""
    values = {}
    reader.read([make_batch()] * 2, lambda _, site, value: values.update({site: value.pieces[0]}))
    return values


@pytest.mark.parametrize("name", [*MODULES, "gpt_neox, not parallel"])
def test_every_site_of_a_family_and_nothing_after_the_last_one(name, tmp_path):
    family = name.partition(",")[0]
    save_tiny(tmp_path, family, **CHANGES.get(name, {}))
    plain, whole, cut = (AutoModelForCausalLM.from_pretrained(tmp_path).eval() for _ in range(3))
    layers, ids_BxT = len(plain.get_submodule(MODULES[family].layers)), make_batch().ids_BxT
    kinds = (*KINDS, NEURONS) if MODULES[family].down else KINDS
    found = read(SiteReader(whole, [Site(kind, layer) for kind in reversed(kinds) for layer in range(layers)]))
    for row, length in enumerate(LENGTHS):
        _, expected = run_torch(plain, ids_BxT[row : row + 1, :length])
        assert {str(site) for site in found} == expected.keys()
        for site, values in found.items():
            assert relative_error(values[row, :length], expected[str(site)][0].detach().numpy()) < 1e-5, site

    site = Site("resid_mid", 1)
    reader = SiteReader(cut, [site])
    blocks = cut.get_submodule(MODULES[family].layers)
    assert len(blocks) == 2
    blocks[1].get_submodule(MODULES[family].mlp).register_forward_pre_hook(lambda *args: pytest.fail("the MLP was run"))
    assert relative_error(read(reader)[site], found[site]) < 1e-5
