"""Fine-tuning through the model in the stage train: after training, by flag, and begun again where it was stopped."""

import pytest
import runs

from saejax.runner import command
from saejax.runner.workplan import Workplan
from saejax.training import finetune

pytestmark = pytest.mark.usefixtures("single_device")
STAGES = ["baseline", "capture", "train"]
TUNED = dict(train__kl_steps=4, train__kl_learning_rate=3e-3, train__k="4,8", train__kinds="batchtopk")


def run(inputs, workdir, stages=STAGES, **changes) -> int:
    return command.run(stages, "", ["program", *runs.small_flags(*inputs, workdir, **TUNED | changes)])


def test_members_are_tuned_and_a_stopped_run_ends_with_the_same_bits(inputs, tmp_path, monkeypatch, capsys):
    assert run(inputs, tmp_path / "whole") == 0
    output = capsys.readouterr().out
    assert all(f"fine-tuning {member}: step 4 of 4, KL divergence" in output for member in ("k4", "k8"))
    runs.copy_units(tmp_path / "whole", tmp_path / "plain", "baseline", "capture")
    assert run(inputs, tmp_path / "plain", train__kl_steps=0) == 0
    assert "fine-tuning" not in capsys.readouterr().out
    runs.copy_units(tmp_path / "whole", tmp_path / "broken", "baseline", "capture")
    with monkeypatch.context() as patch:
        steps = []
        patch.setattr(finetune._Progress, "__call__", lambda self, step, metrics: steps.append(step))
        patch.setattr(command, "install_signal_handlers", lambda: lambda: len(steps) == 2)
        assert run(inputs, tmp_path / "broken") == 143
    assert "stopped at step 2 of 4 of fine-tuning; what was trained before is saved" in capsys.readouterr().err
    assert run(inputs, tmp_path / "broken") == 0
    assert "resuming batchtopk at step" in capsys.readouterr().out
    whole, plain, broken = (runs.dictionary_checksums(tmp_path / name) for name in ("whole", "plain", "broken"))
    assert whole == broken and whole.keys() == plain.keys() and len(whole) == 2
    for member, arrays in whole.items():
        assert arrays["threshold_F"] != plain[member]["threshold_F"], "calibrated anew"


def test_it_follows_training_straight_from_the_model(inputs, tmp_path, capsys):
    changes = dict(train__source="model", train__buffer_rows=200, train__epochs=1, train__k=8, train__kinds="topk")
    assert run(inputs, tmp_path / "run", ["train"], **changes) == 0
    assert "fine-tuning: step 4 of 4" in capsys.readouterr().out


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
    assert line.endswith(f"--train.kl_steps=4 is not for {reason}: leave it out")
