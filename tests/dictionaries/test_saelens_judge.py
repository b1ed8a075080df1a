"""sae-lens itself on our folders, and we on its: run with SAEJAX_SAELENS_PYTHON=/a/venv/with/sae-lens/bin/python."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import known_dictionaries as known
import numpy as np
import pytest
import test_temporal

import saejax
from saejax.dictionaries import load_dictionary, save_dictionary

sys.path.append(str(Path(__file__).parents[1] / "training"))
import small_stacks

from saejax.training.state import finish_dictionary
from saejax.training.thresholds import Calibration

PYTHON = os.environ.get("SAEJAX_SAELENS_PYTHON") or (sys.executable if importlib.util.find_spec("sae_lens") else "")
MISSING = "sae-lens is not installed, and SAEJAX_SAELENS_PYTHON names no interpreter"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason=MISSING)]


def judge(task: str, folder: Path) -> None:
    script = Path(__file__).with_name("saelens_judge.py")
    command, environment = [PYTHON, script, task, folder], os.environ | dict(HF_HUB_OFFLINE="1")
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def trained(kind: str, form: str, mesh):
    """A dictionary after some steps, and inputs."""
    sites = dict(sites=("resid_post.1",) if form == "sae" else ("mlp_in.1",))
    stack = small_stacks.make_stack(kind, mesh, steps=20, form=form, **sites)
    data = small_stacks.batches(20)
    state, _ = small_stacks.run(stack, data)
    batches = SimpleNamespace(batch=lambda step: small_stacks.parts(stack, data[step]))
    return finish_dictionary(stack, state, 0, Calibration(stack)(state, batches, stack.steps)), data[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_device) -> Path:
    """Everything that the judge made and read."""
    folder = tmp_path_factory.mktemp("judge")
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32) * 2)
    (folder / "features").write_text("384")
    judge("make", folder)
    for path in (folder / "theirs").iterdir():
        save_dictionary(folder / "returned" / path.name, load_dictionary(path), "saelens")
    wide = {f"{kind}-wide": known.make(kind, "skip_transcoder", d_out=known.D + 5) for kind in ("standard", "jumprelu")}
    for name, dictionary in wide.items():
        save_dictionary(folder / "own" / name, dictionary)
        save_dictionary(folder / "ours" / name, dictionary, "saelens")
        np.save(folder / "ours" / name / "x.npy", known.activations())
    for kind, form in known.IN_SAELENS:
        dictionary, x = trained(kind, form, one_device)
        save_dictionary(folder / "own" / f"{kind}-{form}", dictionary)
        save_dictionary(folder / "ours" / f"{kind}-{form}", dictionary, "saelens")
        np.save(folder / "ours" / f"{kind}-{form}" / "x.npy", x)
    judge("read", folder)
    return folder


def assert_same(theirs: Path, dictionary, x: np.ndarray) -> None:
    """Activations and outputs of x are what sae-lens wrote."""
    result = np.load(theirs)
    assert (result["f"] > 0).any()
    known.assert_computes(dictionary, jnp.asarray(x), (result["f"], result["y"]))


@pytest.mark.parametrize("kind,form", [*known.IN_SAELENS, ("standard", "wide"), ("jumprelu", "wide")])
def test_sae_lens_computes_the_same_with_what_we_trained_and_saves_it_as_ours(kind, form, folder):
    name = f"{kind}-{form}"
    x = np.load(folder / "ours" / name / "x.npy")
    assert_same(folder / "read" / f"ours-{name}.npz", load_dictionary(folder / "own" / name), x)
    ours, again = (load_dictionary(folder / path) for path in (f"ours/{name}", f"resaved/ours-{name}"))
    for array in ours.arrays:
        np.testing.assert_array_equal(again.arrays[array], ours.arrays[array], array)
    assert (again.config.kind, again.config.max_norm, again.site) == (ours.config.kind, ours.config.max_norm, ours.site)


def test_we_compute_the_same_with_what_it_saved_and_it_with_what_comes_back(folder):
    x, names = np.load(folder / "x.npy"), sorted(path.name for path in (folder / "theirs").iterdir())
    assert len(names) == 20
    for name in names:
        assert_same(folder / "read" / f"theirs-{name}.npz", load_dictionary(folder / "theirs" / name), x)
        before, after = (np.load(folder / "read" / f"{source}-{name}.npz") for source in ("theirs", "returned"))
        for key in ("f", "y"):
            assert known.relative(after[key], before[key]) < 1e-5, name


def test_we_compute_the_same_with_temporal_saes(tmp_path):
    variants = dict(
        tied={},
        untied=dict(sae_diff_type="relu", tied_weights=False, apply_b_dec_to_input=False),
        deep=dict(normalize_activations="none", n_attn_layers=3),
    )
    x_BxTxD = 3 * np.random.default_rng(1).normal(size=(4, 33, test_temporal.D)).astype(np.float32)
    np.save(tmp_path / "texts.npy", x_BxTxD)
    (tmp_path / "temporal").mkdir()
    for name, changes in variants.items():
        test_temporal.save(tmp_path / "temporal" / name, **changes)
    judge("temporal", tmp_path)
    for name in variants:
        theirs, sae = np.load(tmp_path / f"{name}.npz"), saejax.load_temporal(tmp_path / "temporal" / name)
        found = dict(zip(("novel", "predicted"), sae.encode_with_predictions(jnp.asarray(x_BxTxD)), strict=True))
        for key, values in (found | dict(y=sae(jnp.asarray(x_BxTxD)))).items():
            assert known.relative(values, theirs[key]) < 1e-5, (name, key)
