"""The causal calls of the library in a notebook: without a workdir, on one device, on eight, and on a PyTorch model."""

import numpy as np
import pytest

import saejax
from saejax.interventions import edits
from saejax.interventions.table import TESTED, save_effects
from saejax.interventions.verdict import verdict

SITE = "resid_post.1"
SETTINGS = dict(top=3, random_sets=12, placebo_targets=6, bootstrap=200, untrained=False, baselines=("pca",))


@pytest.fixture(scope="module", params=["eight devices", "PyTorch"])
def other(request, tiny_llama):
    """The tiny model where it is not on one device."""
    if request.param == "PyTorch":
        return saejax.load_model(str(tiny_llama), backend="torch")
    lm = saejax.load_model(str(tiny_llama))
    assert lm.mesh.shape["data"] == 8
    return lm


@pytest.fixture
def nothing_written(tmp_path, monkeypatch):
    """The current folder, which must stay empty."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("nothing_written")
def test_effects_and_slopes(tiny, other, prompts, make_dictionary):
    dictionary, few = make_dictionary(SITE), prompts[:5]
    batch = edits.mask(dictionary, [[3], [8, 20, 51], []])
    readouts = ("logit_diff", "log_prob", "top1", "kl", "change_norm")
    got, want = (saejax.effects(lm, few, batch, readouts) for lm in (other, tiny))
    np.testing.assert_allclose(got, want, atol=2e-5)
    slopes = [saejax.slopes(lm, few, "logit_diff", SITE) for lm in (other, tiny)]
    np.testing.assert_allclose(slopes[0], slopes[1], atol=2e-5)


@pytest.fixture(scope="module")
def ablate(make_dictionary, make_prompt):
    """ablate(lm): what the call gives on a model."""
    prompts = [make_prompt(i, "train" if i < 10 else "test", name) for name in ("first", "second") for i in range(18)]
    documents = ["The river follows the old road to the sea."] * 2
    return lambda lm: saejax.ablate(lm, make_dictionary(SITE), prompts, documents=documents, **SETTINGS)


@pytest.fixture(scope="module")
def expected(ablate, tiny):
    return ablate(tiny)


@pytest.mark.usefixtures("nothing_written")
def test_ablate_and_the_verdict(ablate, expected, other, tmp_path_factory):
    found = ablate(other)
    for name in ("first", "second"):
        got, want = (each.verdict.dictionaries[TESTED][name] for each in (found, expected))
        assert got.features == want.features
        assert got.ablation["logit_diff"].effect.mean == pytest.approx(
            want.ablation["logit_diff"].effect.mean, abs=2e-5
        )
        assert (got.random.numbers["sets"], got.placebo_sets) == (want.random.numbers["sets"], want.placebo_sets)
    folder = tmp_path_factory.mktemp("saved")
    save_effects(folder, found.table)
    config = saejax.VerdictConfig(resamples=SETTINGS["bootstrap"])
    assert saejax.verdict(saejax.load_effects(folder), config) == verdict(found.table, config) == found.verdict
