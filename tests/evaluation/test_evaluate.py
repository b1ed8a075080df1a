"""The stage on small runs: stacks over sites and settings, transcoders, and going on after a stop."""

import json

import jax
import numpy as np
import pytest
import runs

from saejax.activations.store import Store
from saejax.config import Configs
from saejax.dictionaries import Dictionary, DictionaryConfig, load_dictionary, save_dictionary
from saejax.dictionaries.results import TrainedMember
from saejax.errors import Interrupted
from saejax.evaluation.results import EvaluateResults
from saejax.evaluation.settings import EvaluateConfig
from saejax.models.settings import ModelConfig
from saejax.parallel.settings import MeshConfig
from saejax.results import from_json, to_json
from saejax.runner import command
from saejax.runner.workspace import Run
from saejax.stages.evaluate import run as evaluate

pytestmark = pytest.mark.usefixtures("single_device")
CAPTURE = dict(
    capture__sites="resid_post.0,resid_post.1,resid_mid.1,mlp_in.1,mlp_out.1",
    capture__sink_factor=1.2,
    capture__max_sink_share=1.0,
)
NAMES = ["resid_post.0-k4", "resid_post.0-k8", "resid_post.1-k4", "resid_post.1-k8"]


@pytest.fixture(scope="module")
def workdir(inputs, tmp_path_factory):
    """A store of a small model with many sinks, and train units of random dictionaries.

    A stack, a linear one, a skip transcoder, and one dictionary twice: as trained here, and without its sink rule.
    """
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    flags = runs.small_flags(*inputs, folder, **CAPTURE)
    assert command.run(["baseline", "capture"], "", ["program", *flags]) == 0
    for name in NAMES:
        save(folder, "topk", name, site=name.partition("-")[0], k=int(name[-1]))
    save(folder, "linear", "", site="resid_post.0", fires_above=0.3)
    save(folder, "jumprelu", "", site="mlp_in.1", target="mlp_out.1", skip=True, centred=False)
    save(folder, "gated", "ours", site="resid_mid.1", target="mlp_out.1", centred=False)
    save(folder, "gated", "plain", site="resid_mid.1", target="mlp_out.1", centred=False, max_norm=None)
    for kind, names in dict(topk=NAMES, linear=[""], jumprelu=[""], gated=["ours", "plain"]).items():
        configs = {name: load_dictionary(folder / "train" / kind / name).config for name in names}
        members = [(name, config.site, config.target or config.site) for name, config in configs.items()]
        runs.write_members(folder / "train" / kind, *members)
    return folder


def save(workdir, kind, name, **fields):
    store = Store.open(workdir / "capture")
    fields.setdefault("max_norm", store.max_norm(fields["site"]))
    config = DictionaryConfig(kind=kind, d_in=store.d(fields["site"]), n_features=64, **fields)
    arrays = Dictionary.initial(config, jax.random.key(len(name) if kind == "topk" else 1)).arrays
    noise = {n: 0.1 * jax.random.normal(jax.random.key(7), a.shape) for n, a in arrays.items()}
    dictionary = Dictionary(config, **{n: a + noise[n] for n, a in arrays.items()})
    save_dictionary(workdir / "train" / kind / name / "dictionary", dictionary)


@pytest.fixture(scope="module")
def make_run(workdir, inputs):
    """make_run(kind, folder): a run of the stage."""

    def make(kind, folder, **changes):
        configs = Configs(ModelConfig(path=str(inputs[0])), MeshConfig(), EvaluateConfig(ce_documents=1))
        units = {"capture": workdir / "capture", f"train/{kind}": workdir / "train" / kind}
        return Run("evaluate", kind, folder, configs, units, say=lambda line: None, **changes)

    return make


def check(workdir, kind, entry, written):
    """Figures of one member against its dictionary and the store, the plain way."""
    store = Store.open(workdir / "capture")
    dictionary = load_dictionary(workdir / "train" / kind / entry.name)
    rows = store.rows("held_out", *{entry.site, entry.target})
    x, y = (store.read(site, rows).astype(np.float32) for site in (entry.site, entry.target))
    fires = np.asarray(dictionary.fires(dictionary.encode(x)))
    np.testing.assert_allclose(np.load(written / "firing_rate.npy"), fires.mean(0), atol=1e-6)
    assert len(np.load(written / "mean_activation.npy")) == dictionary.config.n_features
    error = np.square(y - np.asarray(dictionary(x), np.float64)).sum() / np.square(y - y.mean(0)).sum()
    np.testing.assert_allclose(entry.explained_variance, 1 - error, rtol=1e-3)
    assert entry.tokens == len(rows) and entry.sinks.max_norm == store.max_norm(entry.site)
    assert 0 < entry.ce.clean < 12 and entry.kl.clean == 0 < entry.kl.reconstructed


def test_a_stack_stopped_and_gone_on_with(workdir, make_run, tmp_path, monkeypatch):
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    with pytest.raises(Interrupted):
        evaluate.run_evaluate(make_run("topk", stopped, stopping=(stopped / NAMES[1] / evaluate.SCORES).exists))
    assert [(stopped / name / evaluate.SCORES).exists() for name in NAMES] == [True, True, False, False]
    (stopped / NAMES[0] / evaluate.SCORES).unlink()  # as if killed before it was written
    scored = []
    reconstruct = evaluate.reconstruct
    monkeypatch.setattr(
        evaluate, "reconstruct", lambda own, *rest: scored.extend(d.config.site for d in own) or reconstruct(own, *rest)
    )
    results = evaluate.run_evaluate(make_run("topk", stopped))
    assert scored == ["resid_post.0", "resid_post.1", "resid_post.1"]
    assert from_json(EvaluateResults, json.loads(json.dumps(to_json(results))), "") == results
    assert results.kind == "topk" and [entry.name for entry in results.members] == NAMES
    for entry in results.members:
        check(workdir, "topk", entry, stopped / entry.name)
        assert entry.name.startswith(entry.site) and entry.target == entry.site
        assert entry.l0 <= int(entry.name[-1])
    first, second, third, _ = results.members
    for key in ("clean", "mean_ablated"):  # scored alone or together
        np.testing.assert_allclose(getattr(first.ce, key), getattr(second.ce, key), rtol=1e-6)
    assert first.ce.mean_ablated != third.ce.mean_ablated
    monkeypatch.setattr(evaluate, "load_configured_model", None)  # nothing is left that needs it
    assert evaluate.run_evaluate(make_run("topk", stopped)) == results


def test_the_training_rows_are_not_read_for_their_mean(workdir, make_run, tmp_path, monkeypatch):
    """Their sums were taken when the store was made; only rows that are sinks at another site are read."""
    seen, read = [], Store.read
    monkeypatch.setattr(
        Store, "read", lambda self, site, rows, *rest: seen.append(rows) or read(self, site, rows, *rest)
    )
    evaluate.run_evaluate(make_run("topk", tmp_path))
    store = Store.open(workdir / "capture")
    training, held_out = (store.rows(split, "resid_post.0") for split in ("train", "held_out"))
    assert np.isin(held_out, np.concatenate(seen)).all() and np.isin(training, np.concatenate(seen)).mean() < 0.1


def test_one_dictionary_alone_has_no_folder_of_its_own(workdir, make_run, tmp_path):
    for kind, site, target in (("linear", "resid_post.0", "resid_post.0"), ("jumprelu", "mlp_in.1", "mlp_out.1")):
        folder = tmp_path / kind
        folder.mkdir()
        (entry,) = evaluate.run_evaluate(make_run(kind, folder)).members
        assert (entry.name, entry.site, entry.target) == ("", site, target)
        check(workdir, kind, entry, folder)
        rate = np.load(folder / "firing_rate.npy")
        np.testing.assert_allclose(entry.l0, rate.sum(dtype=np.float64), rtol=1e-5)
        assert entry.l0 < 0.9 * len(rate)  # linear ones by size, not by being other than zero
    assert entry.target_sinks.max_norm == Store.open(workdir / "capture").max_norm("mlp_out.1")


@pytest.mark.parametrize(("scale", "max_norm", "groups"), [(1.0, 9.0, 1), (0.5, 9.0, 2), (1.0, 3.0, 1)])
def test_crosscoders_with_other_scales_are_scored_apart(tmp_path, scale, max_norm, groups):
    """The store's parts are put together once for those that are scored together."""
    site, members = "resid_post.0+resid_post.1", []
    for name, scales, limits in (("a", (1.0, 1.0), (9.0, 9.0)), ("b", (1.0, scale), (9.0, max_norm))):
        fields = dict(site=site, d_in=8, n_features=4, widths=(4, 4), scales=scales, max_norms=limits)
        made = Dictionary.initial(DictionaryConfig(kind="batchtopk", k=2, **fields), jax.random.key(0))
        save_dictionary(tmp_path / name / "dictionary", made)
        members.append(TrainedMember(name, site, site, {}, 1.0, 1.0, None, {}))
    assert len(evaluate._together(tmp_path, members)) == groups


def test_the_stores_sink_rule_is_used_whoever_trained_a_dictionary(workdir, make_run, tmp_path):
    ours, plain = evaluate.run_evaluate(make_run("gated", tmp_path)).members
    first, second = (dict(to_json(entry), name="") for entry in (ours, plain))
    assert first == second
    store = Store.open(workdir / "capture")
    assert min(store.sinks(site).beyond for site in ("resid_mid.1", "mlp_out.1")) > 0
