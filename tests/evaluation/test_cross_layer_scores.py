"""A cross-layer transcoder through the stages: trained, scored, exported, reported."""

import numpy as np
import pytest
import runs
from scipy.special import log_softmax

from saejax import SiteEdit, load_model, load_results
from saejax.activations.store import Store
from saejax.attribution.local.dictionaries import open_transcoders
from saejax.errors import UserError
from saejax.evaluation.results import EvaluateResults
from saejax.models.tokens import Tokens
from saejax.runner import command, stacks
from saejax.runner.labels import labels_of_folders

pytestmark = pytest.mark.usefixtures("two_devices")

SITES = "mlp_in.0,mlp_in.1,mlp_out.0,mlp_out.1"
FORM = dict(
    train__form="skip_cross_layer_transcoder", train__sites="mlp_in.0-1", train__kinds="jumprelu", train__epochs=2,
    capture__sites=SITES, task__behaviours="", evaluate__ce_documents=2, export__format="circuit_tracer",
    export__dictionaries="jumprelu",
)  # fmt: skip


@pytest.fixture(scope="module")
def flags(inputs):
    return lambda workdir, **changes: ["program", *runs.small_flags(*inputs, workdir, **FORM | changes)]


@pytest.fixture(scope="module")
def workdir(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cross_layer") / "run"
    stages = ["capture", "train", "evaluate", "export"]
    assert command.run(stages, "", flags(folder)) == 0
    return folder


def test_scores_are_those_of_plain_passes(workdir, inputs, one_device):
    results: EvaluateResults = load_results(workdir / "evaluate" / "jumprelu")
    found, store = results.cross_layer, Store.open(workdir / "capture")
    opened = open_transcoders(workdir / "train" / "jumprelu")
    layers = [opened.load(layer) for layer in range(2)]
    writes = opened.writes(0, np.arange(layers[0].config.n_features))[:, 1]
    sites = SITES.split(",")
    rows = store.rows("held_out", *sites)
    x, y = (
        [store.read(f"{kind}.{layer}", rows).astype(np.float32) for layer in (0, 1)] for kind in ("mlp_in", "mlp_out")
    )
    acts = [np.asarray(one.encode(value), np.float64) for one, value in zip(layers, x, strict=True)]
    assert np.abs(layers[0].W_skip_DxD).max() > 0 < np.abs(layers[1].W_skip_DxD).max()
    predicted = [np.asarray(layer.decode(f, value)) for layer, f, value in zip(layers, acts, x, strict=True)]
    predicted[1] = predicted[1] + acts[0] @ writes
    for layer, scores in enumerate(found.layers):
        error = np.square(y[layer] - predicted[layer]).sum() / np.square(y[layer] - y[layer].mean(0)).sum()
        np.testing.assert_allclose(scores.explained_variance, 1 - error, rtol=1e-3, atol=1e-4)
        assert scores.l0 == pytest.approx((acts[layer] > 0).sum(1).mean())
    assert found.tokens == len(rows) and found.l0 == pytest.approx(sum(one.l0 for one in found.layers))

    lm = load_model(str(inputs[0]), mesh=one_device)
    total, count = 0.0, 0
    for document in store.documents.of("held_out")[:2]:
        tokens = Tokens(document[None].astype(np.int32), np.array([len(document)], np.int32))
        clean, edits, below = lm(tokens, capture=sites).sites, [], 0
        for layer, one in enumerate(layers):
            read = lm(tokens, capture=[f"mlp_in.{layer}"], edits=edits).sites[f"mlp_in.{layer}"]
            norms = [np.linalg.norm(clean[f"{kind}.{layer}"], axis=-1) for kind in ("mlp_in", "mlp_out")]
            limits = [store.max_norm(f"{kind}.{layer}") for kind in ("mlp_in", "mlp_out")]
            inside = ((norms[0] <= limits[0]) & (norms[1] <= limits[1]))[..., None]
            own = lm(tokens, capture=[f"mlp_out.{layer}"], edits=edits).sites[f"mlp_out.{layer}"]
            f = np.where(inside, one.encode(read), 0)
            new = np.where(inside, np.asarray(one.decode(f, read)) + below, own)
            below = f @ writes if layer == 0 else 0
            edits = [*edits, SiteEdit.patch(f"mlp_out.{layer}", new)]
        logp = log_softmax(np.asarray(lm(tokens, edits=edits).logits_BxTxV[0, :-1], np.float64), axis=-1)
        total -= np.take_along_axis(logp, document[1:, None].astype(int), 1).sum()
        count += len(document) - 1
    assert found.ce.tokens == count and found.ce.reconstructed == pytest.approx(total / count, rel=1e-4)
    assert found.kl.clean == 0 < found.kl.reconstructed


def test_exported_it_is_the_same_set(workdir):
    here, there = workdir / "train" / "jumprelu", workdir / "export" / "circuit_tracer-jumprelu"
    names = ["W_dec_0.safetensors", "W_dec_1.safetensors", "W_enc_0.safetensors", "W_enc_1.safetensors"]
    assert sorted(path.name for path in here.glob("W_*")) == names
    assert all((here / name).read_bytes() == (there / name).read_bytes() for name in names)
    assert open_transcoders(there).cross_layer and open_transcoders(there).configs == open_transcoders(here).configs


@pytest.mark.slow
def test_the_report_has_its_layers(workdir, flags):
    assert command.run(["baseline", "report"], "", flags(workdir)) == 0
    page = (workdir / "report" / "index.html").read_text()
    assert "The layers of the cross-layer transcoder" in page and "All MLPs replaced" in page


def test_what_takes_dictionaries_one_by_one_says_so(workdir, flags, capsys):
    unit = workdir / "train" / "jumprelu"
    capsys.readouterr()
    for stage, changes in [
        ("interpret", dict(interpret__dictionaries="jumprelu")),
        ("export", dict(export__format="saelens")),
    ]:
        assert command.run([stage], "", flags(workdir, **changes)) == 2
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert "cross-layer transcoder" in error
    with pytest.raises(UserError, match="traced with --graph.transcoders"):
        stacks.load_trained("jumprelu/mlp_in.0", {"train/jumprelu": unit}, "--ablate.dictionary")
    assert labels_of_folders([unit]) == {}  # which a graph of it asks for
