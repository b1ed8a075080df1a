"""The stage on small runs: stacks over sites and settings, transcoders, and going on after a stop."""

import dataclasses
import json

import numpy as np
import pytest
import runs

from saejax import command
from saejax.activations.store import Store
from saejax.dictionaries import load_dictionary
from saejax.errors import Interrupted
from saejax.evaluation import evaluate
from saejax.settings import EvaluateConfig, MeshConfig, ModelConfig
from saejax.workspace import Run, read_json

NAMES = ["resid_post.0-k4", "resid_post.0-k8", "resid_post.1-k4", "resid_post.1-k8"]


@pytest.fixture(scope="module")
def workdir(inputs, tmp_path_factory):
    """A run with a stack of four and a linear dictionary, trained for a few steps, and a skip transcoder."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    sites = "resid_post.0,resid_post.1,mlp_in.1,mlp_out.1"
    common = dict(capture__sites=sites, train__epochs=1, train__kinds="topk")
    stack = dict(train__sites="resid_post.0,resid_post.1", train__k="4,8")
    go(["baseline", "capture", "train", "evaluate"], inputs, folder, **common, **stack)
    linear = dict(train__sites="resid_post.0", train__kinds="linear", train__fires_above=0.3)
    skip = dict(train__sites="mlp_in.1", train__kinds="jumprelu", train__form="skip_transcoder")
    for own in (linear, skip):
        go(["train", "evaluate"], inputs, folder, **common | own)
    return folder


def go(stages, inputs, folder, **changes):
    assert command.run(stages, "", ["program", *runs.small_flags(*inputs, folder, **changes)]) == 0


def scores(workdir, kind):
    return read_json(workdir / "evaluate" / kind / "summary.json")["results"]


def check(workdir, folder, entry):
    """Figures of one member against its dictionary and the store, the plain way."""
    store = Store.open(workdir / "capture")
    dictionary = load_dictionary(workdir / "train" / folder)
    rows = store.rows("held_out", *{entry["site"], entry["target"]})
    x, y = (store.read(entry[key], rows).astype(np.float32) for key in ("site", "target"))
    fires = np.asarray(dictionary.fires(dictionary.encode(x)))
    np.testing.assert_allclose(np.load(workdir / "evaluate" / folder / "firing_rate.npy"), fires.mean(0), atol=1e-6)
    assert len(np.load(workdir / "evaluate" / folder / "mean_activation.npy")) == dictionary.config.n_features
    error = np.square(y - np.asarray(dictionary(x), np.float64)).sum() / np.square(y - y.mean(0)).sum()
    np.testing.assert_allclose(entry["explained_variance"], 1 - error, rtol=1e-3)
    assert entry["tokens"] == len(rows) and entry["sinks"]["max_norm"] == store.max_norm(entry["site"])
    assert 0 < entry["ce"]["clean"] < 12 and entry["kl"]["clean"] == 0 < entry["kl"]["reconstructed"]
    assert {"mean", "near", "max"} < set(entry["decoder_neighbours"])


def test_every_member_of_a_stack_is_scored(workdir):
    found = scores(workdir, "topk")
    assert found["kind"] == "topk" and [entry["name"] for entry in found["members"]] == NAMES
    for entry in found["members"]:
        check(workdir, f"topk/{entry['name']}", entry)
        assert entry["name"].startswith(entry["site"]) and entry["target"] == entry["site"]
        assert entry["l0"] <= int(entry["name"][-1])
    assert len({entry["ce"]["clean"] for entry in found["members"]}) == 1
    assert len({entry["ce"]["mean_ablated"] for entry in found["members"]}) == 2  # one for each site


def test_a_dictionary_alone_has_no_folder_of_its_own(workdir):
    (entry,) = scores(workdir, "linear")["members"]
    assert entry["name"] == "" and (workdir / "evaluate" / "linear" / "firing_rate.npy").exists()
    check(workdir, "linear", entry)
    rate = np.load(workdir / "evaluate" / "linear" / "firing_rate.npy")
    np.testing.assert_allclose(entry["l0"], rate.sum(dtype=np.float64), rtol=1e-5)
    assert entry["l0"] < len(rate)  # by size, not by being other than zero


def test_a_transcoder_is_scored_against_its_target(workdir):
    (entry,) = scores(workdir, "jumprelu")["members"]
    assert (entry["site"], entry["target"]) == ("mlp_in.1", "mlp_out.1")
    check(workdir, "jumprelu", entry)
    assert entry["target_sinks"]["max_norm"] == Store.open(workdir / "capture").max_norm("mlp_out.1")


@pytest.fixture
def make_run(workdir, inputs, tmp_path):
    def make(**changes):
        configs = dict(
            model=ModelConfig(path=str(inputs[0])), mesh=MeshConfig(), evaluate=EvaluateConfig(ce_documents=3)
        )
        units = {"capture": workdir / "capture", "train/topk": workdir / "train" / "topk"}
        return Run("evaluate", "topk", tmp_path, configs, units, say=lambda line: None, **changes)

    return make


def test_a_stopped_run_goes_on_with_the_members_that_are_missing(workdir, make_run, tmp_path, monkeypatch):
    last_of_first_site = tmp_path / NAMES[1] / evaluate.SCORES
    with pytest.raises(Interrupted):
        evaluate.run_evaluate(make_run(stopping=last_of_first_site.exists))
    assert [(tmp_path / name / evaluate.SCORES).exists() for name in NAMES] == [True, True, False, False]
    (tmp_path / NAMES[0] / evaluate.SCORES).unlink()  # as if killed before it was written
    scored = []
    whole = evaluate.reconstruct
    monkeypatch.setattr(
        evaluate, "reconstruct", lambda own, *rest: [scored.append(d.config.site) for d in own] and whole(own, *rest)
    )
    results = evaluate.run_evaluate(make_run())
    assert scored == ["resid_post.0", "resid_post.1", "resid_post.1"]
    assert json.loads(json.dumps(results)) == results
    expected = scores(workdir, "topk")["members"]
    for entry, other in zip(results["members"], expected, strict=True):
        np.testing.assert_allclose(entry["explained_variance"], other["explained_variance"], rtol=1e-6)
        np.testing.assert_allclose(entry["ce"]["reconstructed"], other["ce"]["reconstructed"], rtol=1e-6)
    again = dataclasses.replace(make_run(), inputs={k: v for k, v in make_run().inputs.items()})
    monkeypatch.setattr(evaluate, "load_model", None)  # nothing is left that needs it
    assert evaluate.run_evaluate(again) == results
