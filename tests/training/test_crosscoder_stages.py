"""Crosscoders by the stages: two layers of a model, and two models; bad input."""

import json

import jax
import numpy as np
import pytest
import runs
from scipy.special import log_softmax
from tiny_models import save_tiny_llama, save_tiny_tokenizer

import saejax
from saejax.activations.store import Store
from saejax.dictionaries.joined import is_not_sink, join, unjoin
from saejax.dictionaries.names import folder_name
from saejax.errors import UserError
from saejax.runner import command, command_line
from saejax.runner.registry import all_stages
from saejax.runner.results import load_results

pytestmark = pytest.mark.usefixtures("single_device")
LAYERS, MODELS = "resid_post.0+resid_post.1", "resid_post.1+other:resid_post.1"
CHANGES = dict(
    capture__sites="resid_post.0,resid_post.1,other:resid_post.1",
    train__sites=f"{LAYERS},{MODELS}",
    train__kinds="batchtopk",
    train__epochs=2,
    task__behaviours="agreement",
    task__train_prompts=6,
    task__test_prompts=6,
)


@pytest.fixture(scope="module")
def second_model(inputs, tmp_path_factory):
    """The second model: random too, but near the first."""
    return runs.save_model(tmp_path_factory.mktemp("other") / "model", seed=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return runs.save_corpus(tmp_path_factory.mktemp("text") / "corpus.jsonl.gz", documents=50)


def go(stages, inputs, corpus, workdir, **changes):
    flags = runs.small_flags(inputs[0], corpus, workdir, **CHANGES | changes)
    return command.run(stages, "", ["program", *flags])


@pytest.fixture(scope="module")
def workdir(inputs, corpus, second_model, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("crosscoder") / "run"
    stages = ["baseline", "capture", "train", "evaluate"]
    assert go(stages, inputs, corpus, workdir, model__other=second_model) == 0
    return workdir


def test_the_pipeline_goes_on_to_its_report(workdir, inputs, corpus, second_model, capsys):
    """Preflight knows joined sites; crosscoders of one model are ablated, steered and patched, those of two are not."""
    ablated = dict(ablate__dictionary=f"batchtopk/{LAYERS}", ablate__untrained_dictionaries=0, causal__random_sets=4)
    ablated |= dict(ablate__text_documents=0)
    both = dict(model__other=second_model)
    assert go(list(all_stages()), inputs, corpus, workdir, **both | ablated) == 0
    (page,) = (workdir / "report").glob("*.md")
    assert "The parts of crosscoders" in page.read_text()
    assert (workdir / "preflight" / "done.json").exists()
    results = load_results(workdir / "ablate" / folder_name(f"batchtopk/{LAYERS}"))
    assert results.site == LAYERS and all(results.verdict.dictionaries["tested"][name].dose for name in results.top)
    assert go(["ablate"], inputs, corpus, workdir, ablate__error="drop", **both | ablated) == 2
    message = "is a crosscoder, whose features are of several sites: leave out --ablate.repeats, --ablate.joined"
    assert message in capsys.readouterr().err
    alone = dict(train__sites=MODELS, ablate__dictionary="batchtopk", capture__sites=MODELS.replace("+", ","))
    flags = ["program", *runs.small_flags(inputs[0], corpus, workdir, **CHANGES | both | alone)]
    configs = command_line.read_configs(command_line.stage_flags(), flags)
    assert not all_stages()["ablate"].units(configs)


def test_scores_by_part(workdir, inputs, second_model):
    scores = {one.site: one for one in load_results(workdir / "evaluate" / "batchtopk").members}
    for site in (LAYERS, MODELS):
        assert list(scores[site].parts) == site.split("+")
        for part in scores[site].parts.values():
            assert sum(part.relative_norms) >= part.private + scores[site].shared
            assert part.explained_variance > 0 and abs(part.kl.clean) < 1e-6 < part.kl.reconstructed
            assert 0 <= part.specific <= part.private
        ratio_2xF = np.load(workdir / "evaluate" / "batchtopk" / site / "latent_scaling.npy")
        of_parts = scores[site].parts.values()
        assert np.isfinite(ratio_2xF).sum(axis=1).max() <= sum(part.private for part in of_parts)
        assert (ratio_2xF < [[0.2], [0.5]]).all(axis=0).sum() == sum(part.specific for part in of_parts)
    parts = scores[MODELS].parts
    assert parts["resid_post.1"].ce.clean != parts["other:resid_post.1"].ce.clean
    assert scores[MODELS].ce == parts["resid_post.1"].ce  # the first model has that part alone
    # Whatever is read after the last layer is its own part alone.
    np.testing.assert_allclose(scores[LAYERS].ce.reconstructed, scores[LAYERS].parts["resid_post.1"].ce.reconstructed)
    # Explained variance again, from the store and the files, part by part in fp64.
    sae = saejax.load_dictionary(workdir / "train" / "batchtopk" / MODELS)
    store = Store.open(workdir / "capture")
    rows = store.rows("held_out", *MODELS.split("+"))
    x = [np.float64(store.read(part, rows)) for part in MODELS.split("+")]
    joined = np.concatenate([part * scale for part, scale in zip(x, sae.config.scales, strict=True)], axis=1)
    made = np.split(np.float64(sae(joined.astype(np.float32))), 2, axis=1)
    for part, own, scale, name in zip(x, made, sae.config.scales, parts, strict=True):
        left = np.square(part - own / scale).sum() / np.square(part - part.mean(0)).sum()
        assert parts[name].explained_variance == pytest.approx(1 - left, abs=1e-4)


def test_a_crosscoder_of_two_models_is_scored_in_memory(workdir, inputs, second_model):
    """Against the joined values by hand, and the first model with its part of the reconstruction patched in."""
    lm, other = saejax.load_model(inputs[0]), saejax.load_model(second_model)
    sae = saejax.load_dictionary(workdir / "train" / "batchtopk" / MODELS)
    texts = ["The key to the cabinets is here.", "In 1732 the captain saw 48 men"]
    scores = saejax.evaluate(lm, sae, texts, other=other)
    tokens, mask = lm.tokenize(texts), lm.tokenize(texts).mask_BxT
    site, second = MODELS.split("+")
    values = {site: lm(tokens, capture=site).sites[site], second: other(tokens, capture=site).sites[site]}
    x_BxTxD = join(sae.config, values)
    rebuilt_BxTxD = sae(x_BxTxD)
    x_NxD, left_NxD = np.float64(x_BxTxD)[mask], np.float64(x_BxTxD - rebuilt_BxTxD)[mask]
    expected = 1 - np.square(left_NxD).sum() / np.square(x_NxD - x_NxD.mean(axis=0)).sum()
    assert scores.explained_variance == pytest.approx(expected, abs=1e-4)
    patch = saejax.SiteEdit.patch(site, unjoin(sae.config, rebuilt_BxTxD)[site])
    for edits, name in ((), "clean"), ([patch], "reconstructed"):
        logp_BxTxV = log_softmax(np.float64(lm(tokens, edits=edits).logits_BxTxV), axis=-1)
        nats = [-logp_BxTxV[b, t - 1, tokens.ids_BxT[b, t]] for b in range(2) for t in range(1, tokens.lengths_B[b])]
        assert scores.losses.ce[name] == pytest.approx(np.mean(nats), rel=1e-4)
    with pytest.raises(UserError, match=f"reads {second} of a second model: give that model as other="):
        saejax.evaluate(lm, sae, texts)
    alone = saejax.load_dictionary(workdir / "train" / "batchtopk" / LAYERS)
    with pytest.raises(UserError, match="of one model: leave other out"):
        saejax.evaluate(lm, alone, texts, other=other)


@pytest.mark.slow  # test_model_input.py has one model
def test_straight_from_the_models_it_is_the_same_rows(inputs, corpus, second_model, tmp_path):
    changes = dict(model__other=second_model, train__source="model", train__buffer_rows=300, train__sites=MODELS)
    assert go(["train"], inputs, corpus, tmp_path / "run", **changes) == 0
    trained = json.loads((tmp_path / "run/train/batchtopk/done.json").read_text())["results"]["members"]
    assert trained[0]["site"] == MODELS and trained[0]["final"]["explained_variance"] > 0


def test_features_of_a_crosscoder_are_steered_and_patched_by_the_stages(
    workdir, inputs, corpus, second_model, tmp_path
):
    runs.copy_run(workdir, tmp_path / "run")
    changes = dict(model__other=second_model, task__train_prompts=24, task__test_prompts=24)
    changes |= dict(steer__dictionary=f"batchtopk/{LAYERS}", patch__dictionary=f"batchtopk/{LAYERS}")
    changes |= dict(causal__random_sets=4, causal__placebo_targets=2, ablate__text_documents=0)
    changes |= dict(ablate__dictionary=f"batchtopk/{LAYERS}", ablate__untrained_dictionaries=0)
    assert go(["baseline", "ablate", "steer", "patch", "report"], inputs, corpus, tmp_path / "run", **changes) == 0
    steered, patched = (
        load_results(tmp_path / "run" / stage / folder_name(f"batchtopk/{LAYERS}")) for stage in ("steer", "patch")
    )
    assert steered.site == patched.site == LAYERS
    assert steered.behaviours["agreement"].reason is None and "agreement" in patched.behaviours
    (page,) = (tmp_path / "run" / "report").glob("*.md")
    assert "the residual stream after layer 1 (resid_post.1)" in page.read_text(encoding="utf-8")


def test_bad_input_is_one_line(workdir, inputs, corpus, second_model, tmp_path, capsys):
    odd, both = tmp_path / "odd", dict(model__other=second_model)
    save_tiny_llama(odd, num_hidden_layers=2)
    save_tiny_tokenizer(odd, 384)
    runs.copy_run(workdir, tmp_path / "run")
    for stage, message, changes in [
        ("capture", "do not share a tokenizer", dict(model__other=odd)),
        ("capture", "is of a second model: name that by --model.other", {}),
        ("capture", "all sites are of the second model", both | dict(capture__sites="other:resid_post.0")),
        ("capture", "no site resid_post.9", both | dict(capture__sites="mlp_in.0,other:resid_post.9")),
        ("train", "has an empty part, or one twice", both | dict(train__sites="resid_post.1+resid_post.1")),
        ("train", "has an empty part", both | dict(train__sites="resid_post.1+")),
        ("train", "resid_post.7", both | dict(train__sites="resid_post.1+resid_post.7")),
        ("train", "--train.target=mlp_out does not follow resid_post.0", both | dict(train__form="transcoder")),
    ]:
        folder = tmp_path / ("run" if stage == "train" else "bad")
        assert go([stage], inputs, corpus, folder, **changes) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, error


def test_a_crosscoder_is_read_back(workdir):
    sae = saejax.load_dictionary(workdir / "train" / "batchtopk" / LAYERS)
    first, second = LAYERS.split("+")
    assert sae.config.site == LAYERS
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(2, 3, 32)).astype(np.float32) for name in (first, second)}
    x = join(sae.config, values)
    for name, value in unjoin(sae.config, x).items():
        np.testing.assert_allclose(value, values[name], rtol=1e-5)
    values[second][1, 2] *= 1e6
    assert np.asarray(is_not_sink(sae.config, join(sae.config, values))).tolist() == [[True] * 3, [True, True, False]]
    with pytest.raises(UserError, match=f"needs the values at {second}"):
        join(sae.config, {first: values[first]})
    with pytest.raises(UserError, match="wide"):
        join(sae.config, {name: value[..., :5] for name, value in values.items()})
    assert jax.numpy.isfinite(sae(x)).all()
