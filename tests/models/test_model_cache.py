"""Models made of others: where they are kept, and those with random weights."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from loaded_models import resolve
from safetensors.numpy import load_file, save_file

from saejax import load_model
from saejax.errors import UserError
from saejax.models import model_cache


def test_paths(monkeypatch, tmp_path):
    """The cache is in the home folder unless a variable names another."""
    for path, message in [("random:./nowhere", "no model folder"), (f"random:{tmp_path}", "no config.json")]:
        with pytest.raises(UserError, match=message):
            resolve(path)
    monkeypatch.setenv("SAEJAX_CACHE", "~/there")
    assert model_cache.cache_folder() == Path.home() / "there"
    monkeypatch.delenv("SAEJAX_CACHE")
    assert model_cache.cache_folder() == Path.home() / ".cache" / "saejax"


def test_a_random_model_has_all_but_the_weights(tiny_llama, cache):
    drawn = resolve(f"random:{tiny_llama}", decoder=True)
    own = resolve(tiny_llama)
    assert drawn.name == f"random:{tiny_llama}" and drawn.folder.parent == cache
    assert drawn.fingerprint != own.fingerprint
    theirs, ours = (load_file(found.folder / "model.safetensors") for found in (own, drawn))
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    matrices = [name for name, value in ours.items() if value.ndim == 2]
    assert len(matrices) > 7
    for name in matrices:
        assert np.abs(np.corrcoef(ours[name].ravel(), theirs[name].ravel())[0, 1]) < 0.1, name
    lm, trained = load_model(f"random:{tiny_llama}"), load_model(str(tiny_llama))
    tokens = lm.tokenize(["The cat near the dogs"])
    np.testing.assert_array_equal(tokens.ids_BxT, trained.tokenize(["The cat near the dogs"]).ids_BxT)
    assert np.isfinite(lm(tokens).logits_BxTxV).all()


def test_it_is_drawn_once_and_needs_no_weights(tiny_llama, cache, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    wanted = f"random:{tmp_path / 'copy'}"
    first = resolve(wanted)
    file = first.folder / "model.safetensors"
    written, tensors = file.stat().st_mtime_ns, load_file(file)
    assert resolve(wanted) == first and file.stat().st_mtime_ns == written
    save_file({name: value * 0 for name, value in tensors.items()}, file)
    assert resolve(wanted) == first  # damaged, so it was drawn again: the same
    np.testing.assert_array_equal(load_file(file)["lm_head.weight"], tensors["lm_head.weight"])
