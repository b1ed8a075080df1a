"""Fine-tuning through the model in the stage train: after training, by flag, and begun again where it was stopped."""

import contextlib
import io
import json
import types

import jax
import numpy as np
import pytest
import runs

import saejax
from saejax.activations.store import Store
from saejax.files import write_json
from saejax.page.findings import Findings
from saejax.runner import command
from saejax.runner.results import load_results
from saejax.runner.workplan import Workplan
from saejax.runner.workspace import STARTED
from saejax.stages.train.report import finetuning_tables, training_curves
from saejax.stages.train.run import _first_steps
from saejax.training import finetune

pytestmark = pytest.mark.usefixtures("single_device")
STAGES = ["baseline", "capture", "train"]
TUNED = dict(
    train__kl_steps=2, train__kl_learning_rate=3e-3, train__k="4,8", train__kinds="batchtopk",
    train__max_steps=20, train__log_every=1,
)  # fmt: skip


def run(inputs, workdir, stages=STAGES, **changes) -> int:
    return command.run(stages, "", ["program", *runs.small_flags(*inputs, workdir, **TUNED | changes)])


@pytest.fixture(scope="module")
def workdir(inputs, single_device, tmp_path_factory):
    """A run of two members that one command trains and a second one tunes, and a copy made between the two."""
    folder = tmp_path_factory.mktemp("finetune")
    for name, steps in (("plain", 0), ("tuned", 2)):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            assert run(inputs, folder / "tuned", train__kl_steps=steps) == 0
        (folder / f"{name}.txt").write_text(output.getvalue())
        if name == "plain":
            runs.copy_run(folder / "tuned", folder / "plain")
    return folder


def test_members_are_tuned_and_a_stopped_run_ends_with_the_same_bits(workdir, inputs, tmp_path, monkeypatch, capsys):
    """A run that was always to be tuned, as well as one that goes on after the last step of training."""
    output = (workdir / "tuned.txt").read_text()
    assert all(f"fine-tuning {member}: step 2 of 2, KL divergence" in output for member in ("k4", "k8"))
    assert "fine-tuning" not in (workdir / "plain.txt").read_text()
    runs.copy_units(workdir / "tuned", tmp_path / "broken", "baseline", "capture")
    with monkeypatch.context() as patch:
        steps = []
        patch.setattr(finetune._Progress, "__call__", lambda self, step, metrics: steps.append(step))
        patch.setattr(command, "install_signal_handlers", lambda: lambda: len(steps) == 1)
        assert run(inputs, tmp_path / "broken") == 143
    assert "stopped at step 1 of 2 of fine-tuning; what was trained before is saved" in capsys.readouterr().err
    assert run(inputs, tmp_path / "broken") == 0
    assert "resuming batchtopk at step" in capsys.readouterr().out
    folders = (workdir / "tuned", workdir / "plain", tmp_path / "broken")
    tuned, plain, broken = map(runs.dictionary_checksums, folders)
    assert tuned == broken and tuned.keys() == plain.keys() and len(tuned) == 2
    for member, arrays in tuned.items():
        assert arrays["threshold_F"] != plain[member]["threshold_F"], "calibrated anew"


def records(unit) -> list[dict]:
    return [json.loads(line) for line in (unit / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_another_number_of_steps_begins_after_the_last_step_of_training(inputs, tmp_path, capsys):
    """Whichever of the two ran first, and in a longer run, which begins where the learning rate began to fall."""
    assert run(inputs, tmp_path / "whole", train__max_steps=20) == 0
    capsys.readouterr()
    runs.copy_units(tmp_path / "whole", tmp_path / "after", "baseline", "capture")
    for changes, step in (
        (dict(train__kl_steps=0), 0),
        (dict(train__kl_steps=1), 20),
        (dict(), 20),
        (dict(train__max_steps=30), 16),
    ):
        assert run(inputs, tmp_path / "after", **dict(train__max_steps=20) | changes) == 0, capsys.readouterr().err
        output = capsys.readouterr().out
        assert (f"going on from step {step} of a run of 20 steps" in output) == bool(step), output
        if changes == {}:
            assert runs.dictionary_checksums(tmp_path / "after") == runs.dictionary_checksums(tmp_path / "whole")
        assert f"resuming batchtopk at step {step}" in output if step else "training batchtopk" in output


@pytest.mark.parametrize("source", ["store", "model"])
def test_settings_of_the_model_count_where_training_runs_it(source, tmp_path):
    """With a store only fine-tuning runs the model; without one, activations of another dtype are other ones."""
    firsts = []
    for number, dtype in enumerate(("float32", "bfloat16")):
        settings = {"train.source": source, "train.k": 4, "train.kl_steps": number, "model.dtype": dtype}
        unit = tmp_path / f"topk-{number}"
        unit.mkdir()
        write_json(unit / STARTED, dict(depends_on=dict(settings=settings, sources=dict(model="same"))))
        firsts.append(_first_steps(unit, ()))
    assert (firsts[0] == firsts[1]) == (source == "store")


def test_its_metrics_and_scores_are_among_the_results(workdir, inputs):
    lm = saejax.load_model(str(inputs[0]))
    unit, kl = workdir / "tuned" / "train" / "batchtopk", {}
    documents = Store.open(workdir / "tuned" / "capture").documents.of("held_out")
    for name in ("plain", "tuned"):
        folder = workdir / name / "train" / "batchtopk"
        kl[name] = [divergence(lm, saejax.load_dictionary(folder / member), documents) for member in ("k4", "k8")]
    results = load_results(unit)
    assert results.steps == 20 and results.tokens_per_second == 0, "no step of training was done again"
    for index, member in enumerate(results.members):
        *earlier, last = records(unit / member.name)
        assert [record["step"] for record in earlier[-2:]] == [20, 21] and last["step"] == 22
        assert last["kl"] > 0 and last["kl"] == member.final["kl"] and "kl" not in earlier[-2]
        found = [scores.kl for scores in member.finetuned]
        np.testing.assert_allclose(found, [kl["plain"][index], kl["tuned"][index]], rtol=1e-4)
        # The tokens that were replaced, of whole documents, not 64 a step.
        counts = np.diff([record["tokens"] for record in (*earlier[-2:], last)])
        assert earlier[-2]["tokens"] == 20 * 64 and all(0 < count < 64 for count in counts), counts
    assert [curve.tokens[-1] for curve in training_curves(unit)] == [last["tokens"]] * 2
    summaries = {"train/batchtopk": types.SimpleNamespace(results=results)}
    (table,) = finetuning_tables(Findings(summaries, {}, workdir / "tuned", {}))
    assert f"| batchtopk/k4 | {kl['plain'][0]:.4f} | {kl['tuned'][0]:.4f} |" in table.markdown()


def divergence(lm, dictionary, documents) -> float:
    """KL divergence on predicted tokens, from logits of whole passes."""
    total = tokens = 0
    for ids_T in documents:
        clean_TxV, changed_TxV = (
            np.asarray(jax.nn.log_softmax(lm(ids_T[None], edits=edits).logits_BxTxV[0, :-1]), np.float64)
            for edits in ([], [dictionary.ablate_error()])
        )
        total += (np.exp(clean_TxV) * (clean_TxV - changed_TxV)).sum()
        tokens += len(clean_TxV)
    return total / tokens


def test_what_it_depends_on(inputs):
    def mark(**changes):
        made = runs.make_configs(**dict(model__path=str(inputs[0])) | changes)
        return Workplan(made).fingerprint("train/topk")

    tuned = dict(train__kl_steps=9)
    assert mark() == mark(train__kl_learning_rate=1.0) == mark(model__dtype="bfloat16")
    changes = dict(train__kl_steps=8, train__kl_learning_rate=1.0, model__dtype="bfloat16")
    assert len({mark(), mark(**tuned), *(mark(**tuned | {key: value}) for key, value in changes.items())}) == 5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(train__form="cross_layer_transcoder"), "the form cross_layer_transcoder"),
        (dict(train__sites="resid_post.0+resid_post.1"), r"crosscoders (resid_post.0+resid_post.1)"),
        (dict(train__sites="module:model.norm"), "modules of PyTorch (module:model.norm)"),
        (dict(model__backend="torch"), "models that run in PyTorch"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_anything_runs(inputs, tmp_path, capsys, changes, reason):
    assert run(inputs, tmp_path / "run", **changes) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith(f"--train.kl_steps=2 is not for {reason}: leave it out")
