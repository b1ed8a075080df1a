"""What docs/extending.md says how to add, added as it says."""

import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import TINY_FIELDS, save_tiny, save_tiny_tokenizer
from transformers import AutoModelForCausalLM

from saejax import load_model
from saejax.models import families
from saejax.models.sites import KINDS, Site
from saejax.models.torch_hooks import HookedModel

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()


def code_of(path: str) -> str:
    """The page's code that begins with a comment that names this file."""
    (code,) = re.findall(rf"```python\n# {re.escape(path)}\n(.*?)```", PAGE, re.S)
    return code


@pytest.fixture
def starcoder2(monkeypatch):
    name = "saejax.models.families.starcoder2"
    module = types.ModuleType(name)
    exec(compile(code_of("saejax/models/families/starcoder2.py"), "docs/extending.md", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(families, "starcoder2", module, raising=False)
    joined: dict = {}
    exec(compile(code_of("saejax/models/families/__init__.py"), "docs/extending.md", "exec"), joined)
    assert set(joined["FAMILIES"]) == {*families.FAMILIES, "starcoder2"}
    monkeypatch.setitem(families.FAMILIES, "starcoder2", joined["FAMILIES"]["starcoder2"])
    monkeypatch.setitem(TINY_FIELDS, "starcoder2", TINY_FIELDS["llama"])


@pytest.mark.parametrize("changes", [{}, dict(sliding_window=5, use_bias=False, tie_word_embeddings=False)])
def test_a_family_of_models(tmp_path, one_device, starcoder2, changes):
    """Its logits and sites are those of the PyTorch model."""
    save_tiny(tmp_path, "starcoder2", vocab_size=300, **changes)
    save_tiny_tokenizer(tmp_path, 300)
    lm = load_model(str(tmp_path), mesh=one_device)
    tokens = lm.tokenize(["The cat near the dogs"])
    ours = lm(tokens, capture=[f"{kind}.1" for kind in KINDS])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    pairs = {}

    def keep(site, value):
        pairs[site.kind] = np.asarray(ours.sites[str(site)]), value.numpy().copy()
        return value

    with torch.no_grad():
        pairs["logits"] = np.asarray(ours.logits_BxTxV), model(torch.tensor(tokens.ids_BxT)).logits.numpy()
        HookedModel(model).run(tokens.ids_BxT, None, [Site(kind, 1) for kind in KINDS], keep)
    assert pairs.keys() == {"logits", *KINDS}
    for name, (value, expected) in pairs.items():
        assert np.abs(value - expected).max() < 1e-5 * np.abs(expected).max(), name
