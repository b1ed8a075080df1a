"""The stage ``evaluate``."""

from typing import Any

from saejax.runner.stage import Stage
from saejax.runner.workspace import Run
from saejax.settings import EvaluateConfig, MeshConfig, ModelConfig, TrainConfig
from saejax.stages.train import train_members, trained_sites
from saejax.tasks import identities


def _run(run: Run) -> Any:
    from saejax.evaluation.evaluate import run_evaluate

    return run_evaluate(run)


def _results() -> Any:
    from saejax.evaluation.results import EvaluateResults

    return EvaluateResults


EVALUATE = Stage(
    name="evaluate",
    summary="scores dictionaries on held-out text: fidelity, sparsity, cross-entropy recovered",
    run=_run,
    results=_results,
    groups=(ModelConfig, EvaluateConfig),
    placement=(MeshConfig,),
    reads=("capture", "train"),
    needs=lambda configs, name: ("capture", f"train/{name}"),
    inputs=trained_sites,
    names=lambda configs: configs[TrainConfig].kinds,
    identity=dict(model=identities.model),
    members=train_members,
    revision=2,  # dictionaries that normalise tokens are scored with their normalisation
    processes="items",
)
